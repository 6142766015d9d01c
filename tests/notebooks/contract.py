"""What every chapter's notebook keeps to. Each rule yields the ways in which a notebook breaks it, in words."""

import re
from collections.abc import Callable, Iterator
from statistics import median

import nbformat
from nbformat import NotebookNode

from mini.lab.claims import MIME
from tools.chapters import KEPT, WIDGET, executed

LINES, MEDIAN_LINES, FIRST_FIGURE, BYTES = 25, 8, 6, 1_000_000
TAGS = {"nbval-ignore-output"}
PATHS = re.compile(
    r"(?<![\w.:/<])/(home|Users|tmp|root|work|mnt|var|usr|opt|private)/|\b[A-Z]:\\\\?Users|ipykernel_\d"
)
NETWORK = re.compile(
    r"https?://|load_dataset|[!%]\s*(pip|conda|wget|curl)\b"
    r"|\b(import|from)\s+(requests|urllib|httpx|aiohttp|socket|huggingface_hub|gdown)\b"
)
REMOTE = re.compile(
    r"!\[[^\]]*\]\(\s*(https?:)?//|src\s*=\s*[\"']?(https?:)?//|<(script|iframe|link)\b", re.IGNORECASE
)

Rule = Callable[[NotebookNode, bool], Iterator[str]]


def code(nb: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in nb.cells if cell.cell_type == "code"]


def outputs(nb: NotebookNode) -> list[NotebookNode]:
    return [output for cell in code(nb) for output in cell.outputs]


def graded(cell: NotebookNode, key: str) -> bool:
    return bool(cell.metadata.get("nbgrader", {}).get(key))


def text_of(output: NotebookNode) -> str:
    data = output.get("data", {})
    return "\n".join([output.get("text", ""), data.get("text/plain", ""), data.get("text/html", "")])


def tagged(cell: NotebookNode) -> bool:
    return "nbval-ignore-output" in cell.metadata.get("tags", [])


def calls(nb: NotebookNode, name: str) -> list[str]:
    """The first argument, where it is a string, of each call of this name."""
    return [a for cell in code(nb) for a in re.findall(rf"\b{name}\(\s*(?:[\"']([^\"']*))?", cell.source)]


def kernel(nb: NotebookNode, solved: bool) -> Iterator[str]:
    if nb.metadata.get("kernelspec", {}).get("name") != "python3":
        yield "the kernel's name is not python3"
    if nb.metadata.get("language_info") != {"name": "python"}:
        yield "language_info holds more than the language: versions differ between machines"
    if extra := nb.metadata.keys() - {"kernelspec", "language_info", "mini"}:
        yield f"metadata has {sorted(extra)}"


def cells(nb: NotebookNode, solved: bool) -> Iterator[str]:
    if (nb.nbformat, nb.nbformat_minor) < (4, 5) or len({cell.get("id") for cell in nb.cells}) < len(
        nb.cells
    ):
        yield "cell ids are missing or repeated"
    for cell in nb.cells:
        if extra := cell.metadata.keys() - set(KEPT):
            yield f"cell {cell.id} has metadata {sorted(extra)}"
        if unknown := set(cell.metadata.get("tags", [])) - TAGS:
            yield f"cell {cell.id} has unknown tags {sorted(unknown)}"


def title(nb: NotebookNode, solved: bool) -> Iterator[str]:
    if nb.cells[0].cell_type != "markdown" or not re.match(r"# \S", nb.cells[0].source):
        yield "the first cell is not a title"


def length(nb: NotebookNode, solved: bool) -> Iterator[str]:
    lines = [len(cell.source.splitlines()) for cell in code(nb)]
    for cell, n in zip(code(nb), lines, strict=True):
        if n > LINES:
            yield f"cell {cell.id} has {n} lines, more than {LINES}: {cell.source.splitlines()[0]}"
    if median(lines) > MEDIAN_LINES:
        yield f"the median code cell has {median(lines)} lines, more than {MEDIAN_LINES}"


def exercises(nb: NotebookNode, solved: bool) -> Iterator[str]:
    number = re.match(r"# (\d+)", nb.cells[0].source)
    chapter = int(number[1]) if number else None
    todo = [i for i, cell in enumerate(nb.cells) if graded(cell, "solution")]
    if not todo:
        yield "there is no exercise"
    for count, i in enumerate(todo, 1):
        name, cell = nb.cells[i].metadata.nbgrader.grade_id, nb.cells[i]
        if name != f"ex-{chapter}-{count}":
            yield f"exercise {name} should be ex-{chapter}-{count}"
        before = nb.cells[i - 1]
        if before.cell_type != "markdown" or not re.search(
            r"<details>\s*<summary>Hint.*</details>", before.source, re.S
        ):
            yield f"{name}: the cell before it does not end with a hint in <details>"
        following = next((c for c in nb.cells[i + 1 :] if c.cell_type == "code"), None)
        if following is None or following.metadata.get("nbgrader", {}).get("grade_id") != name.replace(
            "ex-", "check-"
        ):
            yield f"{name}: the next code cell is not its check"
        if solved != ("### BEGIN SOLUTION" in cell.source) or solved == (
            "raise NotImplementedError()" in cell.source
        ):
            yield f"{name}: " + ("no solution between the markers" if solved else "not a stub")
    checks = [cell for cell in code(nb) if graded(cell, "grade")]
    if len(checks) != len(todo):
        yield f"{len(todo)} exercises and {len(checks)} checks"
    for cell in checks:
        name, points = cell.metadata.nbgrader.grade_id, cell.metadata.nbgrader.points
        dotted = name.removeprefix("check-").replace("-", ".")
        if not re.search(rf'(?m)^with check\("{re.escape(dotted)}", points={points}\):', cell.source):
            yield f'{name}: does not hold `with check("{dotted}", points={points}):`'
        if "mistakes=" not in cell.source:
            yield f"{name}: registers no known mistake"
        said = "".join(output.get("text", "") for output in cell.outputs)
        if not said.startswith(f"✓ {dotted} passed" if solved else f"○ {dotted} not attempted"):
            yield f"{name}: says {said!r}"


def paths(nb: NotebookNode, solved: bool) -> Iterator[str]:
    for text in [cell.source for cell in nb.cells] + [text_of(output) for output in outputs(nb)]:
        if found := PATHS.search(text):
            yield f"a path of one machine: {text[max(found.start() - 20, 0) : found.end() + 30]!r}"


def network(nb: NotebookNode, solved: bool) -> Iterator[str]:
    for cell in nb.cells:
        if found := (NETWORK if cell.cell_type == "code" else REMOTE).search(cell.source):
            yield f"cell {cell.id} uses the network: {found[0]!r}"


def dollars(nb: NotebookNode, solved: bool) -> Iterator[str]:
    """Between two dollar signs everything is mathematics, also prices and the words between them."""
    texts = [
        re.sub(r"```.*?```|`[^`]*`", "", cell.source, flags=re.S)
        for cell in nb.cells
        if cell.cell_type == "markdown"
    ]
    for text in texts:
        signs = re.sub(r"\\\$", "", text)
        if signs.count("$") % 2:
            yield f"an odd number of dollar signs; write \\$ for money: {text[:60]!r}"
        for span in re.findall(r"\$\$.*?\$\$|\$[^$]+\$", signs, re.S):
            words = re.sub(r"\\(text|mathrm|operatorname|textbf|mathbf)\{[^}]*\}|\\[A-Za-z]+", "", span)
            if re.search(r"[A-Za-z]{3,}\s+[A-Za-z]{2,}", words):
                yield f"words would be set as mathematics; write \\$ for money: {span[:60]!r}"


def figures(nb: NotebookNode, solved: bool) -> Iterator[str]:
    for cell in code(nb):
        for output in cell.outputs:
            if any(mime.startswith("image/") for mime in output.get("data", {})):
                alt = output.metadata.get("image/png", {}).get("alt")
                if not alt or not output.data.get("text/plain", "").startswith(alt):
                    yield f"cell {cell.id} has a figure without alt text; draw it with show() or explore()"
    first = next(
        (i for i, cell in enumerate(code(nb), 1) for o in cell.outputs if "image/png" in o.get("data", {})),
        None,
    )
    if first is None or first > FIRST_FIGURE:
        yield f"the first figure is in code cell {first}; it should be among the first {FIRST_FIGURE}"


def clean(nb: NotebookNode, solved: bool) -> Iterator[str]:
    for output in outputs(nb):
        if output.output_type == "error":
            yield f"an error is stored: {output.ename}: {output.evalue}"
        if output.get("name") == "stderr":
            yield f"something was written to stderr: {output.text[:80]!r}"
        if WIDGET in output.get("data", {}):
            yield "a widget is stored, which nobody can draw without the kernel that made it"
        if found := re.search(r"\bat 0x[0-9a-f]{6,}", text_of(output)):
            yield f"an object's address is stored: {found[0]}"


def run(nb: NotebookNode, solved: bool) -> Iterator[str]:
    if [cell.execution_count for cell in code(nb)] != list(range(1, len(code(nb)) + 1)):
        yield "not run from the top, every code cell once"
    if not executed(nb):
        yield "cells were edited after the run; python -m tools.chapters runs them"


def size(nb: NotebookNode, solved: bool) -> Iterator[str]:
    if (n := len(nbformat.writes(nb).encode())) > BYTES:
        yield f"{n / 1e6:.2f} MB is more than {BYTES / 1e6:.0f} MB; figures at 100 dpi?"


def play(nb: NotebookNode, solved: bool) -> Iterator[str]:
    if not calls(nb, "explore"):
        yield "there is nothing to play with; explore() a figure"
    if not calls(nb, "predict"):
        yield "the reader is asked for no prediction"
    if set(calls(nb, "predict")) != set(calls(nb, "recall")):
        yield f"predictions {calls(nb, 'predict')} and recalls {calls(nb, 'recall')} do not match"


def claims(nb: NotebookNode, solved: bool) -> Iterator[str]:
    cards = [output.data[MIME] for output in outputs(nb) if MIME in output.get("data", {})]
    if not cards:
        yield "there is no claim"
    for card in cards:
        if not card["holds"]:
            yield f"a claim did not hold: {card['claim']}"


def measured(nb: NotebookNode, solved: bool) -> Iterator[str]:
    """What a test of outputs cannot compare is asserted, with a margin, in the next cell that it can compare."""
    for i, cell in enumerate(code(nb)):
        if "recall(" in cell.source and not tagged(cell):
            yield f"cell {cell.id} shows the reader's own prediction: tag it nbval-ignore-output"
        if not tagged(cell) or re.search(r"\b(predict|recall|explore|claim)\(", cell.source):
            continue
        after = next((c for c in code(nb)[i + 1 :] if not tagged(c)), None)
        if "assert " not in cell.source and (after is None or "assert " not in after.source):
            yield f"cell {cell.id} is not compared, and the next cell that is asserts nothing about it"


RULES: list[Rule] = [
    kernel,
    cells,
    title,
    length,
    exercises,
    paths,
    network,
    dollars,
    figures,
    clean,
    run,
    size,
    play,
    claims,
    measured,
]
