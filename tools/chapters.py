"""Run solutions/ and derive chapters/ from it: `python -m tools.chapters [NN ...] [--changed]`.

solutions/NN_slug.ipynb is run in place with MINI_STRICT=1. chapters/NN_slug.ipynb is the same notebook with the
solutions taken out by nbgrader's own preprocessors, run as a learner first meets it. What is stored is the same on each
machine and Python, but for what cells measure: cell ids are digests; timings, versions and widgets are left out.
"""

import argparse
import hashlib
import json
import os
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbconvert.exporters.exporter import ResourcesDict
from nbformat import NotebookNode
from nbgrader import preprocessors

ROOT = Path(__file__).resolve().parent.parent
SOLUTIONS, CHAPTERS = ROOT / "solutions", ROOT / "chapters"
KEPT = ("nbgrader", "tags", "deletable", "editable")  # the last two: nbgrader locks cells with them
WIDGET = "application/vnd.jupyter.widget-view+json"
# those of `nbgrader generate_assignment`, without SaveCells, which writes to its database
STEPS = (
    preprocessors.IncludeHeaderFooter,
    preprocessors.LockCells,
    preprocessors.ClearSolutions,
    preprocessors.ClearOutput,
    preprocessors.CheckCellMetadata,
    preprocessors.ComputeChecksums,
    preprocessors.ClearHiddenTests,
    preprocessors.ClearMarkScheme,
    preprocessors.ComputeChecksums,
    preprocessors.CheckCellMetadata,
)


def tidy(nb: NotebookNode) -> NotebookNode:
    """A copy with stable cell ids and with the metadata alone that a reader's Jupyter needs."""
    nb = _plain(nb)
    seen: set[str] = set()
    for cell in nb.cells:
        name = hashlib.sha256(f"{cell.cell_type}\n{cell.source}".encode()).hexdigest()[:8]
        cell.id = next(i for n in range(len(nb.cells)) if (i := f"{name}-{n}" if n else name) not in seen)
        seen.add(cell.id)
    return nb


def _plain(nb: NotebookNode) -> NotebookNode:
    """A copy without metadata of machines, editors and runs."""
    nb = nbformat.from_dict(json.loads(json.dumps(nb)))
    nb.nbformat, nb.nbformat_minor = 4, 5
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    kept = {"mini": nb.metadata.mini} if "mini" in nb.metadata else {}
    nb.metadata = NotebookNode(kernelspec=kernel, language_info={"name": "python"}, **kept)
    for cell in nb.cells:
        cell.metadata = NotebookNode({k: v for k, v in cell.metadata.items() if k in KEPT})
    return nb


def derive(nb: NotebookNode) -> NotebookNode:
    """The learner's notebook, not yet run, from one with solutions."""
    nb = tidy(nb)
    nb.metadata.pop("mini", None)
    resources = ResourcesDict(unique_key="chapter", metadata={})
    for step in STEPS:
        nb, resources = step().preprocess(nb, resources)
    return nb


def digest(nb: NotebookNode) -> str:
    """Names the cells of a notebook: what it was run from."""
    cells = [[cell.id, cell.cell_type, cell.source, cell.metadata] for cell in nb.cells]
    return hashlib.sha256(json.dumps(cells, sort_keys=True).encode()).hexdigest()[:16]


def execute(nb: NotebookNode, folder: Path, strict: bool, **options: Any) -> NotebookNode:
    """Run a tidy notebook from the top in a kernel of its own; raises CellExecutionError. `options`: the client's."""
    # a maintainer's own predictions do not belong in the file
    with tempfile.TemporaryDirectory() as predictions:
        env = {**os.environ, "MINI_STRICT": "1" if strict else "", "MINI_PREDICTIONS": predictions}
        client = NotebookClient(
            nb,
            **{"timeout": 600, **options},
            kernel_name="python3",
            resources={"metadata": {"path": str(folder)}},
            record_timing=False,
            store_widget_state=False,
            extra_arguments=["--log-level=ERROR"],  # ipykernel's warning about its own transport
            coalesce_streams=True,
        )
        client.execute(env=env)
    for cell in nb.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in map(_still, cell.outputs) if output is not None]
    nb = _plain(nb)
    nb.metadata.mini = {"executed": digest(nb)}
    return nb


def _still(output: NotebookNode) -> NotebookNode | None:
    """An output without its live widget: its picture remains, a progress bar goes."""
    data = output.get("data", {})
    bar = re.search(r"\d/\d+ \[\d\d:\d\d", data.get("text/plain", ""))  # "3/10 [00:01"
    return None if data.pop(WIDGET, None) and bar else output


def executed(nb: NotebookNode) -> bool:
    """Whether the stored outputs come from the cells as they stand."""
    return nb.metadata.get("mini", {}).get("executed") == digest(nb)


def holds(path: Path, nb: NotebookNode) -> bool:
    """Whether a file has the cells of this notebook, run as they stand."""
    return path.exists() and executed(old := read(path)) and digest(old) == digest(nb)


def read(path: Path) -> NotebookNode:
    return nbformat.read(path, as_version=4)


def write(path: Path, nb: NotebookNode) -> None:
    """Write whole or not at all: an interrupted run leaves the old notebook."""
    part = path.with_suffix(".part")
    part.write_text(nbformat.writes(nb) + "\n", encoding="utf-8", newline="\n")
    os.replace(part, path)


def chosen(
    parser: argparse.ArgumentParser, arguments: list[str] | None
) -> tuple[argparse.Namespace, list[Path]]:
    """The command's options, and the solved notebooks that it names."""
    parser.add_argument("chapters", nargs="*", metavar="NN", help="a chapter's number; all without any")
    options = parser.parse_args(arguments)
    paths = [p for p in sorted(SOLUTIONS.glob("*.ipynb")) if p.name.startswith(tuple(options.chapters) or "")]
    if not paths:
        parser.error(f"no notebook in solutions/ begins with {' or '.join(options.chapters) or 'anything'}")
    return options, paths


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.chapters", description="Run solutions/, derive and run chapters/."
    )
    parser.add_argument(
        "--changed", action="store_true", help="only notebooks whose own cells changed since they were run"
    )
    options, paths = chosen(parser, arguments)
    failed = False
    for path in paths:
        solution = tidy(read(path))
        for target, nb, strict in ((path, solution, True), (CHAPTERS / path.name, derive(solution), False)):
            name = f"{target.parent.name}/{target.name}"
            if options.changed and holds(target, nb):
                print(f"{name}: unchanged")
                continue
            start = time.perf_counter()
            target.parent.mkdir(exist_ok=True)
            try:
                write(target, execute(nb, target.parent, strict))
                print(f"{name}: run in {time.perf_counter() - start:.0f} s", flush=True)
            except CellExecutionError as error:
                print(f"{name}: stopped, and left as it was\n{error}", file=sys.stderr, flush=True)
                failed = True
                break
    for path in CHAPTERS.glob("*.ipynb"):
        if not (SOLUTIONS / path.name).exists():
            print(f"chapters/{path.name} has no solution beside it; remove it", file=sys.stderr)
            failed = True
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
