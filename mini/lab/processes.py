"""Start a function of the notebook in several processes at once, with torchrun."""

import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cloudpickle
import psutil

STOP_SECONDS = 40  # torchrun gives its processes 30 to stop


def launch(run: Callable[..., Any], processes: int = 2, **arguments: Any) -> list[Any]:
    """What `run(**arguments)` returned in each of the processes that torchrun started, in the order of their ranks.

    Each runs on one thread, inside `mini.parallel.processes()`, and returns plain values (what JSON can hold).
    RuntimeError says what went wrong in the process that failed first. Nothing is left running, whatever happens.
    """
    if processes < 1:
        raise ValueError(f"processes={processes} must be at least 1")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "run").write_bytes(cloudpickle.dumps((run, arguments)))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
        # this file by its path: as a part of mini.lab it would take seconds to import
        command += [f"--nproc-per-node={processes}", __file__, folder, str(os.getpid())]
        with open(Path(folder) / "errors", "w+", encoding="utf-8") as errors:
            torchrun = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
            try:
                for line in torchrun.stdout:
                    print(line, end="")
                failed = torchrun.wait()
            finally:
                stop(torchrun)
            errors.seek(0)
            said = errors.read()
        if failed:
            raise RuntimeError(diagnosis(Path(folder), processes, said)) from None
        return [json.loads((Path(folder) / f"{rank}.result").read_text()) for rank in range(processes)]


def stop(torchrun: subprocess.Popen) -> None:
    """End torchrun, which ends its processes; by force if it does not."""
    if torchrun.poll() is None:
        torchrun.terminate()
        try:
            torchrun.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            torchrun.kill()
            torchrun.wait()
    torchrun.stdout.close()


def diagnosis(folder: Path, processes: int, said: str) -> str:
    """Which process failed first, and why; `said` is what torchrun wrote to stderr.

    An error of its own comes before a silent end, and both before the complaint that another process is gone.
    """
    told = sorted(folder.glob("*.error"), key=lambda path: path.stat().st_mtime)
    codes = dict(re.findall(r"rank\s*:\s*(\d+) .*\n\s*exitcode\s*:\s*(-?\d+)", said))
    silent = [rank for rank, code in codes.items() if code != "-15" and not list(folder.glob(f"{rank}.*"))]
    if told or not silent:
        told += folder.glob("*.lost")
        why = told[0].read_text(encoding="utf-8") if told else f"torchrun says:\n{said[-2000:]}"
        rank = told[0].stem if told else "?"
    else:
        rank = silent[0]
        why = f"it ended with exit code {codes[rank]}, without a word"
    return f"process {rank} of {processes} failed: {why}"


def follow(torchrun: int, notebook: int) -> None:
    """End this process when torchrun is gone or the notebook's kernel, which a kill stops without a last word."""
    while os.getppid() == torchrun and psutil.pid_exists(notebook):
        time.sleep(0.5)
    os._exit(1)


def main(folder: Path, notebook: int) -> int:
    """One process: run, and leave the result, or the error in words, in the folder."""
    from mini import parallel

    sys.stdout.reconfigure(line_buffering=True, write_through=False)  # whole lines, not mixed with another's
    threading.Thread(target=follow, args=(os.getppid(), notebook), daemon=True).start()
    rank = os.environ["RANK"]
    with parallel.processes():
        try:
            run, arguments = cloudpickle.loads((folder / "run").read_bytes())
            (folder / f"{rank}.result").write_text(json.dumps(run(**arguments)))
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            words = (
                f"{type(error).__name__}: {error}\n    in {where.name}, line {where.lineno}:  {where.line}"
            )
            kind = "lost" if parallel.lost_another(error) else "error"
            (folder / f"{rank}.{kind}").write_text(words, encoding="utf-8")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2])))
