"""What the bench prints, kept for docs/BENCH.md: the tables, on which machine, with which versions, when."""

import datetime
import os
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

REPORT = Path(__file__).resolve().parent.parent / "docs" / "BENCH.md"
MARKER = "<!-- Below this line, written by `make bench`. -->"
PACKAGES = ("torch", "transformers", "torchao", "trl")
said: list[str] = []


def say(text: str) -> None:
    """Print at once, and keep for the report."""
    print(text, flush=True)
    said.append(text)


def processor() -> str:
    """The processor's name, as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def setting(threads: int, packages: Sequence[str] = PACKAGES) -> str:
    """Date, machine and versions, as a list."""
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    return "\n".join(
        (
            f"- Date: {datetime.date.today().isoformat()}",
            f"- Machine: {processor()}, {os.cpu_count()} cores; {platform.system()} {platform.machine()}",
            f"- Versions: Python {platform.python_version()}, {versions}",
            f"- Numbers: float32, {threads} thread{'s' * (threads != 1)}",
        )
    )


def method(path: Path) -> str:
    """What a report says above its tables. Raises ValueError where there is not one marker."""
    above, *below = path.read_text(encoding="utf-8").split(MARKER)
    if len(below) != 1:
        raise ValueError(f"{path.name} has {len(below)} lines {MARKER}; the tables go below one such line")
    return above


def write(path: Path, tables: str) -> None:
    """Replace all that stands below the marker of a report."""
    path.write_text(f"{method(path)}{MARKER}\n\n{tables.strip()}\n", encoding="utf-8", newline="\n")
