"""Studies: rows in order, kept, resumed after a failure, and made anew when what they use changes."""

import os

import joblib
import pytest
import torch

from mini.lab import study
from mini.lab.study import sources

FACTOR = 3
FAIL = "fail"  # a file in MINI_HOME: while it is there, job 2 fails


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("MINI_HOME", str(tmp_path))
    return tmp_path


def scale(x):
    return x * FACTOR


def run(x, home):
    if x == 2 and os.path.exists(f"{home}/{FAIL}"):
        raise RuntimeError("job 2 fails")
    with open(f"{home}/calls", "a") as f:
        f.write(f"{x}\n")
    torch.manual_seed(0)
    mean = (torch.randn(500, 500) @ torch.randn(500, 500)).mean()
    return {"y": scale(x), "threads": torch.get_num_threads(), "mean": mean.item(), "process": os.getpid()}


def jobs(home, n=4):
    return [dict(x=x, home=str(home)) for x in range(n)]


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


def test_what_run_uses_belongs_to_what_is_kept(monkeypatch):
    text = sources(run)
    assert [line.split(":")[0] for line in text] == ["FACTOR", "FAIL", "run", "scale"]
    monkeypatch.setitem(globals(), "FACTOR", 4)
    assert sources(run) != text
