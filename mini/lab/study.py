"""Studies: one small training many times over, with other settings and seeds, on all cores at once, and kept."""

import dis
import functools
import inspect
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import CodeType
from typing import Any

import numpy as np
import torch
from joblib import Parallel, delayed, parallel_config
from joblib.externals.loky import get_reusable_executor
from torch import Tensor
from tqdm.auto import tqdm

from mini.data import Tokenizer, corpus, train_bpe, validation_sample
from mini.lab.recipes import Made, remember
from mini.train import load, save

Row = dict[str, Any]


def study(name: str, run: Callable[..., Row], jobs: Sequence[Row]) -> list[Row]:
    """`run(**job)` for every job: a row each, the job with what `run` returned and its `seconds`, in the jobs' order.

    Jobs share the cores, one thread each, so a row does not depend on how many cores there are. The result is
    kept: it belongs to the jobs, to `run` and what it uses of the notebook (functions and plain values), and to the
    sources of `mini`; a change of any makes it anew. After an interrupt the next call goes on with the jobs left.
    """

    def make(checkpoint: Path | None) -> Made:
        done: dict[str, Row] = load(checkpoint)[1]["rows"] if checkpoint and checkpoint.exists() else {}
        todo = [i for i in range(len(jobs)) if str(i) not in done]
        workers = min(torch.get_num_threads(), len(todo))
        bar = tqdm(total=len(jobs), initial=len(done), desc=name, unit="run")
        with bar, parallel_config("loky", inner_max_num_threads=1):
            pool = Parallel(n_jobs=workers, return_as="generator_unordered")
            try:
                for i, row in pool(delayed(_timed)(run, i, jobs[i]) for i in todo):
                    done[str(i)] = row
                    bar.update()
                    if checkpoint is not None:
                        save(checkpoint, {}, {"rows": done})
            finally:
                if workers > 1:  # nothing is left running, nor waiting with its memory
                    get_reusable_executor().shutdown(wait=False, kill_workers=True)
        return {}, {"rows": [done[str(i)] for i in range(len(jobs))]}

    return remember(name, [list(jobs), sources(run)], make)[1]["rows"]


def _timed(run: Callable[..., Row], i: int, job: Row) -> tuple[int, Row]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    start = time.perf_counter()
    try:
        return i, {**job, **run(**job), "seconds": time.perf_counter() - start}
    finally:
        torch.set_num_threads(threads)


def sources(run: Callable) -> list[str]:
    """The text of `run` and of all that it uses of its own module: functions and plain values.

    What `mini` and other libraries define is left out; `remember` looks after the first. Raises ValueError for a
    tensor or a class of the notebook, whose content a text would not show.
    """
    found: dict[str, str] = {}

    def add(name: str, value: object) -> None:
        if name in found or inspect.ismodule(value):
            return
        if isinstance(value, Tensor | np.ndarray):
            raise ValueError(
                f"{run.__name__} uses {name}, a tensor of the notebook; make it inside {run.__name__}"
            )
        if not callable(value):
            found[name] = repr(value)
        elif getattr(value, "__module__", None) == run.__module__:
            if not inspect.isfunction(value):
                raise ValueError(
                    f"{run.__name__} uses {name}, a class of the notebook; use functions, or a class of mini"
                )
            found[name] = inspect.getsource(value)
            for key in sorted(globals_read(value.__code__) & value.__globals__.keys()):
                add(key, value.__globals__[key])

    add(run.__qualname__, run)
    return [f"{name}: {text}" for name, text in sorted(found.items())]


def globals_read(code: CodeType) -> set[str]:
    """The global names that a function reads, also in the functions and comprehensions inside it."""
    names = {i.argval for i in dis.get_instructions(code) if i.opname == "LOAD_GLOBAL"}
    return names.union(*(globals_read(inner) for inner in code.co_consts if isinstance(inner, CodeType)))


@functools.cache
def shakespeare(vocab_size: int = 1024) -> tuple[Tensor, str, Tokenizer]:
    """The training text as tokens, `validation_sample()`, and the tokenizer; made once in each process."""
    text, _ = corpus()
    tokenizer = train_bpe(text, vocab_size)
    return torch.tensor(tokenizer.encode(text)), validation_sample(), tokenizer
