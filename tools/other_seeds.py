"""Run the course at other seeds: `python -m tools.other_seeds [NN ...]`. A claim whose verdict flips is not a claim.

Every random number of the notebooks is drawn from a seed; here all of them are shifted (`tools/shifted`), and whatever
is trained is trained anew. The cards that come out go beside the stored ones into docs/OTHER_SEEDS.md. The notebooks
run two at a time and go on after an error. What is made stays under tests/artifacts/other_seeds: an interrupted run
goes on.
"""

import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mini.lab.claims import cards, table, title
from tools.chapters import ROOT, SOLUTIONS, chosen, execute, read, write

REPORT = ROOT / "docs" / "OTHER_SEEDS.md"
KEPT = ROOT / "tests" / "artifacts" / "other_seeds"
HERE = Path(__file__).parent


def run(path: Path, target: Path) -> None:
    """The notebook run from the top, errors and all, into `target`; this process's environment says which seeds.

    Not strict: a card whose verdict does not hold says so, and does not stop its cell.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    write(target, execute(read(path), path.parent, strict=False, timeout=3600, allow_errors=True))


def start(path: Path) -> None:
    """`run` in a process of its own, at shifted seeds and on half of the cores."""
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(HERE / "shifted"), str(ROOT)]),
        "MINI_HOME": str(KEPT / "home"),
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // 2)),
    }
    code = "import sys, pathlib; from tools.other_seeds import run; run(*map(pathlib.Path, sys.argv[1:]))"
    subprocess.run(
        [sys.executable, "-c", code, str(path), str(KEPT / path.name)], env=env, cwd=ROOT, check=True
    )
    print(f"{path.name}: run", flush=True)


def errors(nb: dict) -> list[str]:
    """The first assertion, or the first line, of each cell that stopped, and what stopped it."""
    found = []
    for cell in nb["cells"]:
        for output in cell.get("outputs", []):
            if output["output_type"] == "error":
                said = f"{output['ename']}: {output['evalue']}".strip(": ")
                lines = "".join(cell["source"]).splitlines()
                asserts = [line for line in lines if line.startswith("assert")]
                found.append(f"`{(asserts or lines)[0]}`: {said.splitlines()[0]}")
    return found


def report() -> str:
    """What docs/OTHER_SEEDS.md should hold, from the notebooks that were run."""
    sections, whole, kept, changed = [], 0, 0, 0
    for path in sorted(SOLUTIONS.glob("*.ipynb")):
        if not (other := KEPT / path.name).exists():
            continue
        stored, shifted = read(path), read(other)
        rows = []
        for mine, theirs in zip(cards(stored), cards(shifted), strict=True):
            whole += 1
            kept += (same := mine["verdict"] == theirs["verdict"])
            if said(mine) != said(theirs):
                changed += 1
                verdict = (
                    mine["verdict"] if same else f"**{mine['verdict']}; at other seeds: {theirs['verdict']}**"
                )
                rows.append((mine["claim"], said(mine), said(theirs), verdict))
        stopped = [f"- stopped: {line}" for line in errors(shifted)]
        if rows or stopped:
            sections += ["", f"## {title(stored)}", ""]
            sections += table(("claim", "stored run", "other seeds", "verdict"), rows) if rows else []
            sections += ["", *stopped] if stopped else []
    head = [
        "# The cards at other seeds",
        "",
        "The chapters run once more from nothing, with every seed shifted: `python -m tools.other_seeds`.",
        "Brackets: 95% intervals over seeds; in chapters 11 and 13 over questions, leaving out how trainings differ.",
        "",
        f"{whole} cards, {kept} with the same verdict, now that some were changed: see [RERUNS.md](RERUNS.md).",
        f"The {changed} below measured something else than in the stored run; the others came out the same.",
    ]
    return "\n".join([*head, *sections]) + "\n"


def said(card: dict) -> str:
    return card["measured"] + (f" ({card['interval']})" if card["interval"] else "")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.other_seeds", description="Run solutions/ at other seeds."
    )
    _, paths = chosen(parser, arguments)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(start, paths))
    REPORT.write_text(report(), encoding="utf-8", newline="\n")
    print(f"{REPORT.relative_to(ROOT)} written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
