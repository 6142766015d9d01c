"""Recipes: train a model once, keep it, load it from then on."""

import contextlib
import copy
import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import filelock
import torch
from torch import Tensor, nn

from mini import capstone, spct
from mini.data import Tokenizer, batches, bits_per_character, corpus, train_bpe, validation_sample
from mini.grpo import Settings as Objective
from mini.grpo import grpo
from mini.lab.files import home, set_aside
from mini.lab.sources import sources
from mini.model import Config, Transformer
from mini.reward import JUDGE, WRITER_TRAINING, trained_writer
from mini.tasks import NEW_TOKENS, REASONER, SCHOOL, answers, pretrained, puzzles
from mini.train import LANGUAGE_BATCH, LANGUAGE_MODEL, LANGUAGE_TRAINING, Settings, load, save, train

Made = tuple[dict[str, Tensor], dict]


def remember(
    name: str, settings: Any, make: Callable[[Path | None], Made], code: Sequence[str] | None = None
) -> Made:
    """The tensors and facts that `make(checkpoint)` returns, made once and loaded from then on.

    settings: a dict or dataclass of everything that the result depends on, the code apart. What is kept belongs to
    these settings and to `code`, by default `make` and what it uses of its own module and of `mini`: a change of
    either makes it anew. `make` may keep a half-way state in the file
    `checkpoint`, which an interrupted run finds again; it is None where the cache cannot be written. A second
    process waits for the first one's result. Whatever happens to the cache, the result is returned, with a warning.
    """
    key = f"{name}-{digest(name, settings, sources(make) if code is None else code)}"
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


def digest(name: str, settings: Any, code: Sequence[str] = ()) -> str:
    """Names what is kept: changes with the settings and with the code that the result depends on."""
    if dataclasses.is_dataclass(settings):
        settings = dataclasses.asdict(settings)
    try:
        text = json.dumps([name, settings, list(code)], sort_keys=True, default=_plain)
    except TypeError as error:
        raise ValueError(f"the settings of {name} have to be plain values: {error}") from error
    return hashlib.sha256(text.encode()).hexdigest()[:16]


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


def _loaded(config: Config, tensors: dict[str, Tensor]) -> Transformer:
    model = Transformer(config).eval()
    model.load_state_dict(tensors)
    return model


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
    return _loaded(LANGUAGE_MODEL, tensors), Tokenizer.from_json(facts["tokenizer"]), facts["history"]


GRPO = Objective(max_new_tokens=NEW_TOKENS)
GRPO_STEPS = Settings(steps=20, lr=1e-3, matrix_lr=0.0, warmup=5, decay=0.8, weight_decay=0.0, eval_every=2)
GRPO_PROMPTS = 32


def reasoner(
    seed: int = 0, stage: str = "rl", config: Config = REASONER
) -> tuple[Transformer, list[dict[str, float]]]:
    """Chapter 10's models and their histories: "base", after a minute of supervised training on documents that search
    a little, and "rl", the same after half a minute of GRPO with a verifier.

    Every second row of the latter's history has `held_out_…`, a summary of 150 answers.
    """
    if stage not in ("base", "rl"):
        raise ValueError(f"stage={stage!r}; use 'base' or 'rl'")

    def base(checkpoint: Path | None) -> Made:
        model, history = pretrained(seed, config=config, checkpoint=checkpoint, progress=True)
        return model.state_dict(), {"history": history}

    def rl(checkpoint: Path | None) -> Made:
        model, _ = reasoner(seed, "base", config)
        task = puzzles()
        history = grpo(
            model,
            task.ask(GRPO_PROMPTS, seed),
            task.reward(),
            GRPO,
            GRPO_STEPS,
            end=task.end,
            reference=copy.deepcopy(model),
            seed=seed,
            evaluate=lambda model: {f"held_out_{k}": v for k, v in answers(model, 150).summary().items()},
            checkpoint=checkpoint,
        )
        return model.state_dict(), {"history": history}

    made = {"base": base, "rl": rl}[stage]
    tensors, facts = remember(
        f"reasoner-{stage}", [config, SCHOOL, GRPO, GRPO_STEPS, GRPO_PROMPTS, seed], made
    )
    return _loaded(config, tensors), facts["history"]


STAGES = ("school", "sft", "rft", "rl")


def grm(seed: int = 0, stage: str = "rl", principled: bool = True) -> tuple[Transformer, dict]:
    """Chapter 13's judges, a generative reward model after each stage of its training, and facts about it.

    "school" learns to check, for a minute; then, some seconds each: "sft", on demonstrations; "rft", rejective
    fine-tuning; "rl", by rule. principled=False: the arm that states no principles. Facts: "history", and for "rft"
    the counts of `mini.spct.Kept`.
    """
    if stage not in STAGES:
        raise ValueError(f"stage={stage!r}; use one of {', '.join(STAGES)}")

    def make(checkpoint: Path | None) -> Made:
        options = dict(checkpoint=checkpoint, progress=True)
        if stage == "school":
            model, history = spct.go_to_school(seed, **options)
            return model.state_dict(), {"history": history}
        model, facts = grm(seed, STAGES[STAGES.index(stage) - 1], principled)[0], {}
        if stage == "rft":
            kept, history = spct.rejective(model, seed, principled=principled, **options)
            facts = {name: getattr(kept, name) for name in ("right", "easy", "never", "hinted")}
        else:
            step = spct.supervised if stage == "sft" else spct.reinforced
            history = step(model, seed, principled=principled, **options)
        return model.state_dict(), {"history": history, **facts}

    arm = "grm" if principled or stage == "school" else "grm-plain"  # one school serves both arms
    settings = [JUDGE, spct.SCHOOL, spct.SFT, spct.RFT, spct.RL, spct.OBJECTIVE, seed]
    tensors, facts = remember(f"{arm}-{stage}", settings, make)
    return _loaded(JUDGE, tensors), facts


def writer(seed: int = 0) -> tuple[Transformer, list[dict[str, float]]]:
    """A model that answers the queries of chapters 12 to 14 about as well as people do there, and its history."""

    def make(checkpoint: Path | None) -> Made:
        model, history = trained_writer(seed, checkpoint=checkpoint, progress=True)
        return model.state_dict(), {"history": history}

    tensors, facts = remember("writer", [JUDGE, WRITER_TRAINING, seed], make)
    return _loaded(JUDGE, tensors), facts["history"]


def line(plan: capstone.Plan, stage: str = "student", progress: bool = True) -> tuple[nn.Module, dict]:
    """A stage of chapter 15's line and its facts (`mini.capstone.make`); what it starts from is made first."""

    def made(checkpoint: Path | None) -> Made:
        def before(earlier: str) -> Transformer:
            return capstone.plain(line(plan, earlier, progress)[0])

        return capstone.make(stage, plan, before, checkpoint, progress)

    tensors, facts = remember(f"line-{stage}", capstone.concerns(stage, plan), made)
    return capstone.built(stage, plan, tensors), facts
