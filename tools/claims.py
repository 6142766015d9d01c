"""Collect the claim cards of the executed notebooks: `python -m tools.claims` writes docs/CLAIMS.md.

It also writes how many there are into README.md, over the line that says so there.
"""

import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path

from mini.lab import ledger
from mini.lab.claims import cards, table, title
from tools.chapters import ROOT, SOLUTIONS

LEDGER = ROOT / "docs" / "CLAIMS.md"
README = ROOT / "README.md"
COUNT = re.compile(r"^\d+ claims?: .*$", re.M)

# What the public says of DeepSeek, and the claims of the course that speak to it: the chapter's number and some words
# of the claim that no other claim of that chapter has.
STORY: dict[str, list[tuple[str, str]]] = {
    "V3 was trained for 5.6 million dollars": [
        ("00", "5.576 M dollars at 2 dollars an hour"),
        ("00", "less than 1.2% of a rival's run"),
    ],
    "The KV cache shrank by 93%": [
        ("03", "reduces the KV cache by 93.3%"),
    ],
    "Latent attention is as good as multi-head attention, or better": [
        ("03", "MLA beats MHA"),
        ("03", "the more it matters how attention uses them"),
    ],
    "Experts give more quality for the same compute": [
        ("04", "learns more from a token than a dense model"),
        ("04", "the better use of training time"),
    ],
    "Balance of experts needs no auxiliary loss": [
        ("04", "a router sends most tokens to one and the same expert"),
        ("04", "Balancing each sequence costs quality"),
    ],
    "Multi-token prediction makes decoding 1.8 times as fast": [
        ("05", "1.8 times as many tokens are written per second"),
        ("05", "Serving one text at a time"),
    ],
    "FP8 keeps the loss within 0.25%": [
        ("06", "below 0.25%"),
        ("06", "Fine-grained scales are needed"),
    ],
    "The cut interconnect was the constraint": [
        ("07", "The cut interconnect was the constraint"),
        ("07", "With tensor parallelism, which V3 avoids"),
    ],
    "Mixture-of-experts models stand synthetic data better than dense ones": [
        ("09", "T = 1, equal active parameters"),
        ("09", "T = 1, equal total parameters"),
    ],
    "For a small model, distilling beats reinforcement learning": [
        ("08", "R1's texts were worth more"),
        ("10", "gets further by distillation"),
        ("15", "beats reinforcement learning on the small one"),
    ],
    "Reinforcement learning alone makes a model think longer": [
        ("10", "Responses grow longer"),
        ("10", "made a behaviour frequent that the base had"),
    ],
    "Judging improves with more samples": [
        ("13", "Summing the scores of 32 judgements"),
        ("14", "More samples fix a judge"),
    ],
    "A judge that writes its own principles beats a scalar reward model": [
        ("13", "beats a scalar model of the same labels"),
        ("13", "Stating principles makes a judge better"),
    ],
    "Judges that write their own principles drift away from what people want": [
        ("14", "Self-written principles drift away"),
    ],
    "A learned judge can be gamed": [
        ("14", "a model pleases it ever more"),
        ("14", "pays for style beyond what it is worth"),
    ],
}


def story(paths: Iterable[Path], told: dict[str, list[tuple[str, str]]] = STORY) -> list[str]:
    """The lines of the table that sets the public story beside the cards. Raises ValueError for a card not found."""
    notebooks = {path.name[:2]: (path, json.loads(path.read_text(encoding="utf-8"))) for path in paths}
    rows = []
    for said, places in told.items():
        for i, (number, words) in enumerate(places):
            path, nb = notebooks.get(number, (None, {"cells": []}))
            found = [card for card in cards(nb) if words in card["claim"]]
            if len(found) != 1:
                raise ValueError(
                    f"tools/claims.py, {said!r}: {len(found)} claims of chapter {number} contain {words!r}; "
                    "name words that stand in one of them alone"
                )
            (card,) = found
            measured = card["measured"] + (f"; 95%: {card['interval']}" if card["interval"] else "")
            link = f"[{title(nb)}](../chapters/{path.name})"
            rows.append(("" if i else f"**{said}**", link, card["verdict"], card["claim"], measured))
    return [
        "## The public story",
        "",
        "What is said of DeepSeek in public, and the claims below that speak most plainly to it.",
        "",
        *table(("the story", "chapter", "verdict", "the claim that was tested", "measured"), rows),
    ]


def collect() -> str:
    """What docs/CLAIMS.md should hold."""
    paths = sorted(SOLUTIONS.glob("*.ipynb"))
    return ledger(paths, story(paths))


def counted(readme: str, claims: str) -> str:
    """README.md with the line of docs/CLAIMS.md that counts the claims."""
    (line,) = COUNT.findall(claims)
    text, found = COUNT.subn(lambda _: line, readme)
    if found != 1:
        raise ValueError(f"README.md has {found} lines that begin like {line[:12]!r}; it should have one")
    return text


if __name__ == "__main__":
    try:
        text = collect()
        readme = counted(README.read_text(encoding="utf-8"), text)
    except ValueError as error:
        sys.exit(f"docs/CLAIMS.md and README.md left as they were: {error}")
    LEDGER.parent.mkdir(exist_ok=True)
    LEDGER.write_text(text, encoding="utf-8", newline="\n")
    README.write_text(readme, encoding="utf-8", newline="\n")
    print(f"{LEDGER.relative_to(ROOT)} written")
