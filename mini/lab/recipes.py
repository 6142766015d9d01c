"""Recipes: train a model once, keep it, load it from then on. `python -m mini.lab.recipes` makes them all."""

import contextlib
import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import filelock
import torch
from torch import Tensor

import mini
from mini.lab.files import home, set_aside
from mini.train import load, save

Made = tuple[dict[str, Tensor], dict]


def remember(name: str, settings: Any, make: Callable[[Path | None], Made]) -> Made:
    """The tensors and facts that `make(checkpoint)` returns, made once and loaded from then on.

    settings: a dict or dataclass of everything that the result depends on. What is kept belongs to these settings
    and to these sources of `mini`: a change of either makes it anew. `make` may keep a half-way state in the file
    `checkpoint`, which an interrupted run finds again; it is None where the cache cannot be written. A second
    process waits for the first one's result. Whatever happens to the cache, the result is returned, with a warning.
    """
    key = f"{name}-{digest(name, settings)}"
    folder = home() / "cache"
    path = folder / f"{key}.safetensors"
    with _alone(folder / f"{key}.lock"):
        if (kept := _read(path, key)) is not None:
            facts = kept[1]["recipe"]
            print(f"{name}: loaded; made on {facts['made']} in {facts['seconds']:.0f} s, {facts['machine']}")
            return kept
        print(f"{name}: making it now; it is kept for the next time")
        checkpoint = path.with_suffix(".partial") if os.access(folder, os.W_OK) else None
        resumed, start = checkpoint is not None and _sound(checkpoint), time.perf_counter()
        try:
            tensors, facts = make(checkpoint)
        except OSError as error:
            if checkpoint is None:
                raise
            print(f"Warning: a half-way state could not be saved ({error.strerror}); starting again without")
            tensors, facts = make(None)
        facts = {**facts, "recipe": _facts(key, time.perf_counter() - start)}
        print(
            f"{name}: made in {facts['recipe']['seconds']:.0f} s" + " (the rest of an earlier run)" * resumed
        )
        try:
            save(path, tensors, facts)
            path.with_suffix(".partial").unlink(missing_ok=True)
        except OSError as error:
            print(f"Warning: {name} could not be kept, and will be made anew next time: {error.strerror}")
        return tensors, facts


def digest(name: str, settings: Any) -> str:
    """Names what is kept: changes with the settings and with any source file that a result could depend on."""
    if dataclasses.is_dataclass(settings):
        settings = dataclasses.asdict(settings)
    try:
        text = json.dumps([name, settings], sort_keys=True, default=_plain)
    except TypeError as error:
        raise ValueError(f"the settings of {name} have to be plain values: {error}") from error
    root = Path(mini.__file__).parent
    sources = [*sorted(root.glob("*.py")), root / "lab" / "recipes.py"]
    parts = [
        text,
        *(f"{p.name}\n{p.read_text(encoding='utf-8')}" for p in sources),
    ]  # read_text evens out line ends
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return dataclasses.asdict(value)
    raise TypeError(f"{value!r} is a {type(value).__name__}")


def _facts(key: str, seconds: float) -> dict:
    machine = f"torch {torch.__version__}, {torch.get_num_threads()} threads"
    return {"key": key, "made": f"{datetime.now():%Y-%m-%d %H:%M}", "seconds": seconds, "machine": machine}


def _read(path: Path, key: str) -> Made | None:
    if not path.exists():
        return None
    try:
        tensors, facts = load(path)
    except (ValueError, OSError) as error:
        set_aside(path, str(error))
        return None
    if facts.get("recipe", {}).get("key") != key:
        set_aside(path, "it holds something else")
        return None
    return tensors, facts


def _sound(checkpoint: Path) -> bool:
    """Whether a half-way state is there; one that cannot be read is set aside."""
    if not checkpoint.exists():
        return False
    try:
        load(checkpoint)
    except (ValueError, OSError) as error:
        set_aside(checkpoint, str(error))
        return False
    return True


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold a lock that the system lets go of when the process ends; without one where none can be had."""
    lock = filelock.FileLock(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            print("another process is making this; waiting for it")
            lock.acquire()
    except (OSError, NotImplementedError):
        pass  # a folder that cannot be written: saving will say so
    try:
        yield
    finally:
        lock.release()


def make_all() -> None:
    """Make every recipe that is not kept yet."""
    start = time.perf_counter()
    for recipe in RECIPES:
        recipe()
    print(f"{len(RECIPES)} recipes ready after {time.perf_counter() - start:.0f} s")


RECIPES: tuple[Callable[[], Any], ...] = ()

if __name__ == "__main__":
    make_all()
