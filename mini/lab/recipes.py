"""Recipes: train a model once, keep it, load it from then on."""

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
from mini.data import Tokenizer, batches, bits_per_character, corpus, train_bpe
from mini.lab.files import home, set_aside
from mini.model import Config, Transformer
from mini.train import Settings, load, save, train

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
    sources = [*sorted(root.glob("*.py")), root / "lab" / "recipes.py", root / "lab" / "study.py"]
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


# Chapter 02's language model.
LANGUAGE_MODEL = Config(vocab_size=1024, dim=128, n_layers=3, n_heads=2, inter_dim=336, max_seq_len=128)
LANGUAGE_TRAINING = Settings(steps=1800, eval_every=200)
LANGUAGE_BATCH = 8


def validation_sample() -> str:
    """A tenth of the held-out plays, spread over all of them: quick to score while training runs."""
    _, held_out = corpus()
    return "".join(held_out[i : i + 4_000] for i in range(0, len(held_out), 40_000))


def language_model(seed: int = 0) -> tuple[Transformer, Tokenizer, list[dict[str, float]]]:
    """The model trained on Shakespeare, its tokenizer and its history: about two minutes on two cores.

    The history has `bits` (per character of `validation_sample()`) every 200 steps, and at the end `bits_on_all`
    (of all held-out plays).
    """

    def make(checkpoint: Path | None) -> Made:
        text, held_out = corpus()
        sample = validation_sample()
        tokenizer = train_bpe(text, LANGUAGE_MODEL.vocab_size)
        torch.manual_seed(seed)
        model = Transformer(LANGUAGE_MODEL)
        history = train(
            model,
            batches(tokenizer.encode(text), LANGUAGE_BATCH, LANGUAGE_MODEL.max_seq_len, seed),
            LANGUAGE_TRAINING,
            evaluate=lambda model: {"bits": bits_per_character(model, tokenizer, sample)},
            checkpoint=checkpoint,
        )
        history[-1]["bits_on_all"] = bits_per_character(model, tokenizer, held_out)
        return model.state_dict(), {"history": history, "tokenizer": tokenizer.to_json()}

    settings = [LANGUAGE_MODEL, LANGUAGE_TRAINING, LANGUAGE_BATCH, seed]
    tensors, facts = remember("language-model", settings, make)
    model = Transformer(LANGUAGE_MODEL).eval()
    model.load_state_dict(tensors)
    return model, Tokenizer.from_json(facts["tokenizer"]), facts["history"]
