"""Studies: rows in order, kept, resumed after a failure, and made anew when what they use changes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import joblib
import pytest
import torch

from mini import attention
from mini.attention import attend
from mini.lab import recipes, study
from mini.lab.sources import imported, sources, text
from mini.train import LANGUAGE_MODEL, load

FACTOR = 3
FAIL = "fail"  # a file in MINI_HOME: while it is there, job 2 fails


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("MINI_HOME", str(tmp_path))
    return tmp_path


def scale(x):
    return x * FACTOR


def kept(home):
    """The jobs whose rows are in the half-way state."""
    return {row for file in Path(home).glob("cache/*.partial") for row in load(file)[1]["rows"]}


def run(x, home):
    if x == 2 and os.path.exists(f"{home}/{FAIL}"):
        limit = time.monotonic() + 60
        while not {"0", "1"} <= kept(home) and time.monotonic() < limit:
            time.sleep(0.1)
        raise RuntimeError("job 2 fails")
    with open(f"{home}/calls", "a") as f:
        f.write(f"{x}\n")
    torch.manual_seed(0)
    mean = (torch.randn(500, 500) @ torch.randn(500, 500)).mean()
    return {"y": scale(x), "threads": torch.get_num_threads(), "mean": mean.item(), "process": os.getpid()}


def jobs(home, n=4):
    return [dict(x=x, home=str(home)) for x in range(n)]


def test_a_study_whose_last_save_failed_is_only_saved_again(home, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(recipes, "save", full)
        rows = study("squares", run, jobs(home))
    assert study("squares", run, jobs(home)) == rows
    assert len((home / "calls").read_text().split()) == 4, "nothing is run twice"
    assert study("none", run, []) == []


@pytest.mark.parametrize("threads", [1, 2])
def test_rows_come_in_the_jobs_order_and_do_not_depend_on_the_cores(home, monkeypatch, threads):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    before = joblib.cpu_count()
    rows = study("squares", run, jobs(home))
    assert [(row["x"], row["y"]) for row in rows] == [(0, 0), (1, 3), (2, 6), (3, 9)]
    assert len({row["mean"] for row in rows}) == 1
    assert all(row["seconds"] > 0 for row in rows)
    assert (os.getpid() in {row["process"] for row in rows}) == (threads == 1)
    assert joblib.cpu_count() == before
    assert study("squares", run, jobs(home)) == rows
    assert len((home / "calls").read_text().split()) == 4, "the second time nothing is run"


def test_other_jobs_and_another_run_are_made_anew(home, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert [row["y"] for row in study("squares", run, jobs(home, 3))] == [0, 3, 6]
    assert [row["y"] for row in study("squares", run, jobs(home, 3)[::-1])] == [6, 3, 0]
    monkeypatch.setitem(globals(), "FACTOR", 4)
    assert [row["y"] for row in study("squares", run, jobs(home, 3))] == [0, 4, 8]


@pytest.mark.parametrize("threads", [1, 2])
def test_rows_that_are_done_survive_a_failure(home, monkeypatch, threads):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    (home / FAIL).touch()
    with pytest.raises(RuntimeError, match="job 2 fails"):
        study("squares", run, jobs(home))
    (home / FAIL).unlink()
    assert [row["y"] for row in study("squares", run, jobs(home))] == [0, 3, 6, 9]
    calls = (home / "calls").read_text().split()  # job 3 may have been under way when job 2 failed
    assert (calls.count("0"), calls.count("1"), calls.count("2")) == (1, 1, 1)


def test_one_thread_a_run_and_the_callers_threads_stay(home):
    before = torch.get_num_threads()
    assert {row["threads"] for row in study("squares", run, jobs(home, 1))} == {1}
    assert torch.get_num_threads() == before


mean = torch.zeros(3)  # `run` reads an attribute of this name, which is another thing


class Local:
    pass


def inside(x):
    return [(lambda y: y * FACTOR)(i) for i in range(x)]


def bad_tensor(x):
    return {"y": mean[x]}


def bad_class(x):
    return {"y": Local()}


def test_a_global_inside_an_inner_function_counts():
    assert [line.split(":")[0] for line in sources(inside)] == ["FACTOR", "inside"]


@pytest.mark.parametrize(
    ("run", "message"),
    [(bad_tensor, "bad_tensor uses mean, a tensor"), (bad_class, "bad_class uses Local, a class")],
)
def test_what_a_text_would_not_show_is_refused(run, message):
    with pytest.raises(ValueError, match=message):
        sources(run)


def test_what_run_uses_belongs_to_what_is_kept(monkeypatch):
    found = sources(run)
    own = [line.split(":")[0] for line in found if not line.startswith("mini.")]
    assert own == ["FACTOR", "FAIL", "kept", "run", "scale"]
    monkeypatch.setitem(globals(), "FACTOR", 4)
    assert sources(run) != found


def uses_a_function(x):
    return {"y": attend(x, x, x)}


def uses_a_module(x):
    return {"y": attention.attend(x, x, x)}


def uses_the_classroom(x):
    return {"y": study("inner", run, [])}


def uses_a_value(x):
    return {"y": LANGUAGE_MODEL.dim}


def test_a_module_of_mini_counts_with_what_it_imports():
    for function in (uses_a_function, uses_a_module):
        assert f"mini.attention: {text('mini.attention')}" in sources(function)
        assert not any(line.startswith("mini.model") for line in sources(function))
    names = [line.split(":")[0] for line in sources(uses_a_value)]
    assert {"LANGUAGE_MODEL", "mini.model", "mini.attention", "mini.moe"} <= set(names)
    assert imported("mini.attention") == {"mini.attention"}
    assert imported("mini.moe") == {"mini.attention", "mini.moe"}
    assert {"mini.reward", "mini.grpo", "mini.parallel"} <= imported("mini.spct")
    assert "mini.audit" not in imported("mini.spct")


def test_a_function_without_a_text_counts_by_what_it_does():
    """Functions of a notebook, in a process of `study`."""

    def made(source):
        names = {"__name__": "cells"}
        # under another name than exec's own <string>, which from 3.13 on stands for the text of `python -c`
        exec(compile(source, "a notebook's cell", "exec"), names)
        return sources(names["run"])

    first = made("def run(x):\n    return {'y': [x * i for i in range(3)]}")
    assert first == made("def run(x):\n    return {'y': [x * i for i in range(3)]}  # the same")
    assert first != made("def run(x):\n    return {'y': [x + i for i in range(3)]}")
    assert first != made("def run(x):\n    return {'y': [x * i for i in range(4)]}")
    assert "0x" not in "".join(first)


def test_the_classroom_does_not_count():
    assert not any(line.startswith("mini.lab") for line in sources(uses_the_classroom))


PLAIN = 'class A:\n    """Some words."""\n\n\ndef f(x):\n    """What f does."""\n    return x + "a"  # why\n'


def test_comments_docstrings_and_layout_do_not_count(tmp_path, monkeypatch):
    other = PLAIN.replace("Some words", "Others").replace("What f does", "It adds").replace("  # why", "")
    variants = dict(plain=PLAIN, other=f'"""A module."""\n{other}', windows=PLAIN.replace("\n", "\r\n"))
    variants["changed"] = PLAIN.replace('+ "a"', '+ "b"')
    monkeypatch.syspath_prepend(tmp_path)
    for name, source in variants.items():
        (tmp_path / f"variant_{name}.py").write_bytes(source.encode())
    found = {name: text(f"variant_{name}") for name in variants}
    assert found["plain"] == found["other"] == found["windows"] != found["changed"]


SLOW = """
import os, signal, sys, time, torch
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs start without
from mini import attention
from mini.attention import attend
from mini.lab import study

def run(x):
    with open(os.environ["MINI_HOME"] + "/calls", "a") as f:
        f.write(f"{x} {os.getpid()}\\n")
    time.sleep(0.3 if x < 2 else float(sys.argv[1]))
    return {"y": x}

torch.set_num_threads(2)
print([row["y"] for row in study("slow", run, [dict(x=x) for x in range(6)])])
"""


def test_an_interrupt_ends_the_workers_and_keeps_the_rows(home):
    (home / "slow.py").write_text(SLOW)
    env = {**os.environ, "MINI_HOME": str(home), "PYTHONFAULTHANDLER": "1"}

    def start(seconds):
        command = [sys.executable, str(home / "slow.py"), str(seconds)]
        return subprocess.Popen(
            command,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def calls():
        return (home / "calls").read_text().splitlines() if (home / "calls").exists() else []

    process = start(600)
    limit = time.monotonic() + 90
    while len(calls()) < 4 and time.monotonic() < limit:  # two are done, two sleep
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)  # as Jupyter's stop button does
    try:
        _, error = process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGABRT)  # each process then says where its threads stand
        pytest.fail(f"still running 60 s after the interrupt\n{process.communicate()[1]}")
    assert process.returncode != 0
    assert "KeyboardInterrupt" in error
    limit = time.monotonic() + 30
    while (left := [pid for pid in {line.split()[1] for line in calls()} if alive(int(pid))]) and (
        time.monotonic() < limit
    ):
        time.sleep(0.1)
    assert not left, "workers should not outlive the interrupt"
    done = start(0)
    out, error = done.communicate(timeout=90)
    assert done.returncode == 0, error
    assert "[0, 1, 2, 3, 4, 5]" in out
    assert [line.split()[0] for line in calls()].count("0") == 1, "a row that was kept is not made again"


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return (
        "Z" not in Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0]
        if Path("/proc").exists()
        else True
    )
