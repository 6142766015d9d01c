"""All tests, in order, from the cheap to the dear: `python -m tests.run [stage ...] [-- pytest's options]`.

code       unit tests, parity with other libraries, the notebooks' contract; in parallel, one thread each
solutions  nbval over solutions/ with MINI_STRICT=1: the stored outputs are what comes out
chapters   nbval over chapters/, as a learner first opens them
browser    a real JupyterLab in Chromium (skipped without one, unless MINI_BROWSER=required)

In a fresh clone the notebooks train their models from nothing. Solutions, chapters and browser share them, in a folder
of tests/artifacts/ (or in MINI_TEST_HOME) where the next run finds them, too: it trains what has changed, and what an
interrupt left undone. Another torch begins anew, and so does `make clean`. Notebooks run two at a time, each with half
of the cores: small models gain little from a second core, a second notebook all of it. All stages run, whatever fails.
"""

import argparse
import os
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CORES = os.cpu_count() or 1
IN_PAIRS = [f"-n{min(CORES, 2)}", "--dist=loadfile"]
HALF = {"OMP_NUM_THREADS": str(max(1, CORES // 2))}
# nbval reads what a cell says only when the cell has ended, and ZeroMQ keeps a thousand messages for it: a progress bar
# at tqdm's ten updates a second fills that in a minute, and the message that the cell is done is then lost.
PACED = {**HALF, "TQDM_MININTERVAL": "5"}
NBVAL = ["--nbval", "--nbval-current-env", "--nbval-cell-timeout=1200"]
NBVAL += ["--nbval-sanitize-with=tests/nbval_sanitize.cfg"]
# The dearest notebooks first, so that none is left to run alone at the end; and those that take models over from
# others (11 from 10; 12, 14 from 13) long after these, so that they need not wait for them.
ORDER = ["13", "10", "02", "04", "09", "15", "08", "12", "05", "03", "06", "11", "14", "07", "01", "00"]
SOLUTIONS = sorted(
    (f"solutions/{path.name}" for path in (ROOT / "solutions").glob("*.ipynb")),
    key=lambda name: [*ORDER, name[10:12]].index(name[10:12]),  # one that is not named above comes last
)
# what pytest runs, and the environment it runs in
STAGES: dict[str, tuple[list[str], dict[str, str]]] = {
    "code": (
        ["tests/unit", "tests/parity", "tests/notebooks", f"-n{min(CORES, 8)}", "--dist=loadfile"],
        {"OMP_NUM_THREADS": "1"},
    ),
    "solutions": ([*SOLUTIONS, *NBVAL, *IN_PAIRS, "--no-loadscope-reorder"], {"MINI_STRICT": "1", **PACED}),
    "chapters": (["chapters", *NBVAL, *IN_PAIRS], PACED),
    "browser": (["tests/browser", IN_PAIRS[0]], HALF),
}


def environment(stage: str, home: str) -> dict[str, str]:
    """The environment of a stage: its own models, nobody's grading, this Python's programs on PATH."""
    kept = {
        name: value for name, value in os.environ.items() if name not in ("MINI_STRICT", "NBGRADER_EXECUTION")
    }
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return kept | {"MINI_HOME": home, "PATH": path} | STAGES[stage][1]


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    parser = argparse.ArgumentParser(
        prog="python -m tests.run", description="All tests, or the stages named."
    )
    parser.add_argument("stages", nargs="*", metavar="stage", help=f"{', '.join(STAGES)}; all without any")
    stages = parser.parse_args(arguments[:cut]).stages or list(STAGES)
    if unknown := [stage for stage in stages if stage not in STAGES]:
        parser.error(f"there is no stage {unknown[0]!r}; choose from {', '.join(STAGES)}")

    home = os.environ.get("MINI_TEST_HOME") or str(ROOT / "tests/artifacts" / f"models-{version('torch')}")
    table = []
    for stage in stages:
        print(f"\n· {stage}", flush=True)
        command = [
            sys.executable,
            "-m",
            "pytest",
            *STAGES[stage][0],
            "--durations=5",
            *arguments[cut + 1 :],
        ]
        started = time.monotonic()
        code = subprocess.run(command, cwd=ROOT, env=environment(stage, home)).returncode
        table.append((stage, code, time.monotonic() - started))
    print()
    for stage, code, seconds in table:
        outcome = {0: "passed", 5: "found no test"}.get(code, "FAILED")
        print(f"· {stage:10} {outcome:14} {seconds:5.0f} s")
    return int(any(code for _, code, _ in table))  # no test found (5) is a failure too


if __name__ == "__main__":
    sys.exit(main())
