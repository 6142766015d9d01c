"""Run every chapter once, so that all that it trains is kept: `make weights`, ahead of a workshop."""

import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

CHAPTERS = Path(__file__).resolve().parent.parent / "chapters"


def main(folder: Path = CHAPTERS) -> None:
    """Run the notebooks of a folder in order; what they print is dropped, what they keep is the point."""
    for path in sorted(folder.glob("*.ipynb")):
        start = time.perf_counter()
        print(f"{path.stem}: ", end="", flush=True)
        nb = nbformat.read(path, as_version=4)
        NotebookClient(nb, timeout=None, resources={"metadata": {"path": str(folder)}}).execute()
        print(f"ready after {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    sys.exit(main())
