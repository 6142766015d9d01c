"""Copy the chapters into my/ and open JupyterLab on one: `python -m tools.start [00] [Lab's own options]`.

Standard library only, and the same on every system: `make lab` ends with it, and so do the lines by hand.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def copy_chapters(chapters: Path, mine: Path) -> list[Path]:
    """Copy each notebook of `chapters` that `mine` does not have yet; returns the new copies.

    A copy that is there is the learner's and stays as it is, whatever is in it. A copy appears whole or not
    at all (written beside its place, then renamed), so an interrupt leaves no half notebook.
    """
    notebooks = sorted(chapters.glob("*.ipynb"))
    if not notebooks:
        raise FileNotFoundError(f"there are no notebooks in {chapters}; is the course's folder complete?")
    mine.mkdir(exist_ok=True)
    new = []
    for notebook in notebooks:
        copy = mine / notebook.name
        if copy.exists():
            continue
        unfinished = mine / f".{notebook.name}.unfinished"
        shutil.copyfile(notebook, unfinished)
        unfinished.replace(copy)
        new.append(copy)
    return new


def choose(mine: Path, number: str = "") -> Path:
    """The notebook to open: the one whose name starts with `number` ("2" and "02" alike), or the first."""
    notebooks = sorted(mine.glob("[0-9]*.ipynb"))
    wanted = [path for path in notebooks if not number or path.name.startswith(f"{int(number):02d}_")]
    if not wanted:
        there = ", ".join(path.name[:2] for path in notebooks)
        raise ValueError(f"there is no chapter {number} in {mine}; try one of {there}")
    return wanted[0]


def lab_command(notebook: Path, options: list[str]) -> list[str]:
    """The command line that serves the notebook's folder on this machine alone, opened on the notebook."""
    command = [sys.executable, "-m", "jupyterlab", f"--ServerApp.root_dir={notebook.parent}"]
    command += ["--log-level=WARN", f"--LabApp.default_url=/lab/tree/{notebook.name}"]
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        command += ["--allow-root"]  # one is often root in a container; the server listens on localhost only
    return command + options


def lab_environment(environment: dict[str, str]) -> dict[str, str]:
    """The environment for Lab: the course's settings first, and this Python's programs on PATH."""
    settings = [str(ROOT / "tools" / "jupyter"), environment.get("JUPYTER_CONFIG_PATH", "")]
    programs = [str(Path(sys.executable).parent), environment.get("PATH", "")]
    return environment | {
        "JUPYTER_CONFIG_PATH": os.pathsep.join(filter(None, settings)),
        "PATH": os.pathsep.join(filter(None, programs)),
    }


def main(arguments: list[str]) -> int:
    number = arguments[0] if arguments and re.fullmatch(r"\d+", arguments[0]) else ""
    options = arguments[1:] if number else arguments
    mine = ROOT / "my"
    try:
        new = copy_chapters(ROOT / "chapters", mine)
        notebook = choose(mine, number)
    except (OSError, ValueError) as trouble:
        print(f"Cannot start: {trouble}", file=sys.stderr)
        return 1
    for copy in new:
        print(f"· Copied chapters/{copy.name} to my/{copy.name}")
    kept = len(list(mine.glob("[0-9]*.ipynb"))) - len(new)
    if kept:
        print(f"· Kept as you left them: the chapters already in my/ ({kept})")
    print(f"· Opening JupyterLab on my/{notebook.name}. To stop it: Ctrl-C here.", flush=True)
    lab = subprocess.Popen(lab_command(notebook, options), env=lab_environment(dict(os.environ)))
    while True:
        try:
            return lab.wait()
        except KeyboardInterrupt:  # Lab has it too: it stops its kernels, then itself
            continue


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
