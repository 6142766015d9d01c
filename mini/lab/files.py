"""Where the classroom keeps files: the cache of trained models and the reader's predictions."""

import os
from pathlib import Path

import platformdirs


def home() -> Path:
    """The folder for everything that the course keeps: MINI_HOME, or the user's cache folder."""
    return Path(os.environ.get("MINI_HOME") or platformdirs.user_cache_dir("deepseek-in-miniature"))


def set_aside(path: Path, why: str) -> None:
    """Move a file that cannot be used out of the way, never deleting it, and say so."""
    aside = next(p for i in range(1000) if not (p := path.with_name(f"{path.name}.broken-{i}")).exists())
    try:
        os.replace(path, aside)
        print(f"Warning: {path.name} could not be used ({why}); kept as {aside.name}")
    except OSError as error:
        print(f"Warning: {path.name} could not be used ({why}), nor moved away ({error.strerror})")
