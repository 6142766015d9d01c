"""Claims: a card that sets a public statement beside what this run measured, and the ledger of all cards."""

import html
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from IPython.display import display

from mini.lab.check import strict
from mini.lab.figures import PALETTE

MARKDOWN = str.maketrans({"|": r"\|", "$": r"\$", "\n": " "})
MISSED = "did not hold"
MIME = "application/vnd.mini.claim+json"
VERDICTS = {
    "reproduced": PALETTE["green"],
    "in direction": PALETTE["sky"],
    "not at this scale": PALETTE["orange"],
    "derived": PALETTE["pink"],
}


def claim(
    text: str,
    *,
    source: str,
    measured: float | str,
    holds: bool,
    verdict: str,
    n: int | None = None,
    seeds: int | None = None,
    interval: tuple[float, float] | None = None,
    unit: str = "",
) -> None:
    """Show a card: what is claimed, where, what was measured here, and the verdict.

    verdict: "reproduced", "in direction" (the sign holds, the size does not), "not at this scale" (looked for
    and not found) or "derived" (arithmetic on published figures). holds: whether this run's measurement supports
    that verdict; if not, the card says so, and with MINI_STRICT=1 it raises. n: how many samples; seeds: how many
    seeds; interval: 95%, as (low, high).
    """
    if verdict not in VERDICTS:
        raise ValueError(f"verdict={verdict!r} is none of {', '.join(VERDICTS)}")
    if interval is not None and not interval[0] <= interval[1]:
        raise ValueError(f"interval={interval} is not (low, high)")
    if not isinstance(seeds, int | None):
        raise ValueError(f"seeds={seeds!r} is how many seeds were run, a whole number")
    decimals = places(interval) if interval else None
    card = {
        "claim": text,
        "source": source,
        "measured": f"{number(measured, decimals)} {unit}".strip(),
        "evidence": evidence(n, seeds),
        "interval": " to ".join(number(end, decimals) for end in interval) if interval else "",
        "verdict": verdict,
        "holds": bool(holds),
    }
    display({"text/plain": _plain(card), "text/html": _html(card), MIME: card}, raw=True)
    if not holds and strict():
        raise AssertionError(f"not {verdict} on this run: {text!r}, measured {card['measured']}")


def places(interval: tuple[float, float]) -> int | None:
    """Decimals that show two digits of half of an interval: more would be noise. None where it has no width."""
    half = (interval[1] - interval[0]) / 2
    return max(0, 1 - math.floor(math.log10(half))) if half else None


def number(value: Any, decimals: int | None = None) -> str:
    """A number for people: so many decimals, or else 4 significant digits; whole numbers in full; text as it is."""
    if isinstance(value, str):
        return value
    if decimals is not None:
        return f"{round(float(value), decimals) + 0.0:,.{decimals}f}"  # + 0.0: no "-0.00"
    if isinstance(value, int):
        return f"{value:,}"
    value = float(value)
    if value and not 1e-4 <= abs(value) < 1e7:
        return f"{value:.3e}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def evidence(n: int | None, seeds: int | None) -> str:
    """n and seeds in words, "" where neither was given."""
    parts = [f"n = {n:,}"] if n is not None else []
    parts += [f"{seeds} seed" + "s" * (seeds != 1)] if seeds is not None else []
    return ", ".join(parts)


def ledger(paths: Iterable[str | Path], top: Sequence[str] = ()) -> str:
    """All cards stored in executed notebooks, as Markdown: how many of each verdict, `top`, a table a chapter."""
    notebooks = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(map(Path, paths))]
    lines = [
        "# Claims",
        "",
        count([card for nb in notebooks for card in cards(nb)]),
        "",
        "Collected from the executed notebooks by `python -m tools.claims`, not edited by hand. Intervals are 95%:",
        "over seeds where several are given; in chapters 11 and 13 over questions, leaving out how trainings differ.",
        "*Reproduced*: measured here. *In direction*: the sign holds here, the size does not.",
        "*Not at this scale*: looked for here and not found. *Derived*: arithmetic on published figures.",
    ]
    lines += ["", *top] if top else []
    columns = ("claim", "source", "measured", "evidence", "interval", "verdict")
    for nb in notebooks:
        rows = [[card[column] for column in columns] for card in cards(nb)]
        lines += ["", f"## {title(nb)}", "", *(table(columns, rows) if rows else ["No claims."])]
    return "\n".join(lines) + "\n"


def cards(nb: dict) -> list[dict]:
    """The cards of an executed notebook; the verdict of one whose measurement did not support it is MISSED."""
    outputs = [output for cell in nb["cells"] for output in cell.get("outputs", [])]
    found = [output["data"][MIME] for output in outputs if MIME in output.get("data", {})]
    return [card if card["holds"] else {**card, "verdict": MISSED} for card in found]


def count(cards: Sequence[dict]) -> str:
    """How many claims there are of each verdict, in a line."""
    counts = Counter(card["verdict"] for card in cards)
    each = ", ".join(f"{counts[verdict]} {verdict}" for verdict in (*VERDICTS, MISSED) if counts[verdict])
    return f"{len(cards)} claim{'s' * (len(cards) != 1)}: {each}." if cards else "No claims."


def title(nb: dict) -> str:
    """The first heading of a notebook."""
    first = next("".join(cell["source"]) for cell in nb["cells"] if cell["cell_type"] == "markdown")
    return re.sub(r"^#+\s*", "", first.splitlines()[0])


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """The lines of a Markdown table."""
    cells = [[str(cell).translate(MARKDOWN) for cell in row] for row in (columns, *rows)]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return [lines[0], "|" + "---|" * len(columns), *lines[1:]]


def escape(text: str) -> str:
    """Text as HTML; a dollar sign stays one, and does not begin a formula."""
    return html.escape(text).replace("$", "<span>$</span>")


def _details(card: dict) -> str:
    interval = card["interval"] and f"95% interval {card['interval']}"
    return ", ".join(filter(None, (card["evidence"], interval)))


def _verdict(card: dict) -> str:
    return card["verdict"] if card["holds"] else f"the verdict “{card['verdict']}” did not hold on this run"


def _plain(card: dict) -> str:
    details = _details(card)
    return (
        f"Claim: {card['claim']} [{card['source']}]\n"
        f"Measured: {card['measured']}{f' ({details})' if details else ''}\nVerdict: {_verdict(card)}"
    )


def _html(card: dict) -> str:
    colour = VERDICTS[card["verdict"]] if card["holds"] else PALETTE["red"]
    safe = {key: escape(str(value)) for key, value in card.items()}
    details = escape(_details(card))
    return (
        f'<div style="border-left: 8px solid {colour}; padding: 0.4em 1em; margin: 0.5em 0; max-width: 52em">'
        f'<div style="font-size: 1.1em"><b>{safe["claim"]}</b></div>'
        f'<div style="opacity: 0.8">{safe["source"]}</div>'
        f"<div>Measured here: <b>{safe['measured']}</b>{f' ({details})' if details else ''}</div>"
        f"<div>Verdict: <b>{escape(_verdict(card))}</b></div></div>"
    )
