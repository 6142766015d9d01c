"""Where the classroom keeps files: the cache of trained models and the reader's predictions."""

import os
from pathlib import Path

import platformdirs


def home() -> Path:
    """The folder for everything that the course keeps: MINI_HOME, or the user's cache folder."""
    return Path(os.environ.get("MINI_HOME") or platformdirs.user_cache_dir("deepseek-in-miniature"))


def write(path: Path, text: str) -> None:
    """Write a text file whole or not at all, also when two processes write at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def set_aside(path: Path, why: str) -> None:
    """Move a file that cannot be used out of the way, never deleting it, and say so."""
    aside = next(p for i in range(1000) if not (p := path.with_name(f"{path.name}.broken-{i}")).exists())
    try:
        os.replace(path, aside)
        print(f"Warning: {path.name} could not be used ({why}); kept as {aside.name}")
    except OSError as error:
        print(f"Warning: {path.name} could not be used ({why}), nor moved away ({error.strerror})")
