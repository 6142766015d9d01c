"""Studies: one small training many times over, with other settings and seeds, on all cores at once, and kept."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from joblib import Parallel, delayed, parallel_config
from joblib.externals.loky import get_reusable_executor
from tqdm.auto import tqdm

from mini.lab.recipes import Made, remember
from mini.lab.sources import sources
from mini.train import load, save

Row = dict[str, Any]


def study(name: str, run: Callable[..., Row], jobs: Sequence[Row]) -> list[Row]:
    """`run(**job)` for every job: a row each, the job with what `run` returned and its `seconds`, in the jobs' order.

    Jobs share the cores, one thread each, so a row does not depend on how many cores there are. The result is
    kept: it belongs to the jobs, and to `run` with all that it uses of the notebook (functions and plain values) and
    of `mini`; a change of any makes it anew. After an interrupt the next call goes on with the jobs left.
    """

    def make(checkpoint: Path | None) -> Made:
        done: dict[str, Row] = load(checkpoint)[1]["rows"] if checkpoint and checkpoint.exists() else {}
        todo = [i for i in range(len(jobs)) if str(i) not in done]
        workers = max(1, min(torch.get_num_threads(), len(todo)))
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

    return remember(name, list(jobs), make, sources(run))[1]["rows"]


def _timed(run: Callable[..., Row], i: int, job: Row) -> tuple[int, Row]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    start = time.perf_counter()
    try:
        return i, {**job, **run(**job), "seconds": time.perf_counter() - start}
    finally:
        torch.set_num_threads(threads)
