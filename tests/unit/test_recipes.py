"""Train or load: what is kept, when it is made anew, and what happens when files, disks and processes fail."""

import dataclasses
import functools
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mini.capstone import Plan
from mini.lab import recipes
from mini.lab.recipes import digest
from mini.lab.sources import sources
from mini.model import Transformer
from mini.reward import JUDGE
from mini.tasks import REASONER
from mini.train import load, save

SETTINGS = {"steps": 3, "lr": 0.01, "betas": (0.9, 0.95)}
remember = functools.partial(recipes.remember, code=())  # what the makers here consist of does not matter


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MINI_HOME", str(tmp_path))
    return tmp_path / "cache"


class Maker:
    """Makes a tensor, and counts how often."""

    def __init__(self, value: float = 1.0) -> None:
        self.value, self.calls, self.checkpoints = value, 0, []

    def __call__(self, checkpoint: Path | None):
        self.calls += 1
        self.checkpoints.append(checkpoint)
        return {"w": torch.full((2, 3), self.value)}, {"loss": 0.5, "history": [{"step": 1}]}


def kept(cache) -> list[str]:
    return sorted(path.name for path in cache.iterdir() if path.suffix != ".lock")


def test_made_once_and_loaded_from_then_on(cache, capsys):
    make = Maker()
    tensors, facts = remember("model", SETTINGS, make)
    assert "model: making it now" in capsys.readouterr().out
    again, same = remember("model", SETTINGS, make)
    assert make.calls == 1
    assert torch.equal(again["w"], tensors["w"])
    assert same == facts
    assert facts["loss"] == 0.5
    out = capsys.readouterr().out
    assert out == f"model: loaded; made on {facts['recipe']['made']} in 0 s, {facts['recipe']['machine']}\n"
    assert kept(cache) == [f"model-{digest('model', SETTINGS)}.safetensors"]


def test_other_settings_name_or_code_are_made_anew(cache):
    one = digest("model", SETTINGS)
    assert digest("model", dict(reversed(SETTINGS.items()))) == one
    assert digest("model", {**SETTINGS, "steps": 4}) != one
    assert digest("other", SETTINGS) != one
    assert digest("model", SETTINGS, ["make: ..."]) != one

    def make(checkpoint):
        return {"w": torch.ones(1)}, {}

    recipes.remember("model", SETTINGS, make)
    assert kept(cache) == [f"model-{digest('model', SETTINGS, sources(make))}.safetensors"]


def test_settings_may_be_dataclasses_and_have_to_be_plain():
    @dataclasses.dataclass(frozen=True)
    class Sizes:
        width: int = 8

    assert digest("m", Sizes()) == digest("m", {"width": 8})
    assert digest("m", {"sizes": Sizes()}) == digest("m", {"sizes": {"width": 8}})
    with pytest.raises(ValueError, match=r"settings of m have to be plain values.*Tensor"):
        digest("m", {"w": torch.ones(1)})


class Asked(Exception):
    pass


def key(monkeypatch, make, *args, **options) -> str:
    """Under which name a recipe keeps its result."""

    def ask(name, settings, make, code=None):
        raise Asked(f"{name}-{digest(name, settings)}")

    with monkeypatch.context() as patch:
        patch.setattr(recipes, "remember", ask)
        with pytest.raises(Asked) as asked:
            make(*args, **options)
    return str(asked.value)


def test_every_recipe_keeps_each_seed_stage_and_arm_apart(monkeypatch):
    calls = [(recipes.language_model, seed) for seed in (0, 1)]
    calls += [(recipes.writer, seed) for seed in (0, 1)]
    calls += [(recipes.reasoner, seed, stage) for seed in (0, 1) for stage in ("base", "rl")]
    calls += [(recipes.reasoner, 0, "base", dataclasses.replace(REASONER, dim=32))]
    calls += [(recipes.grm, seed, stage) for seed in (0, 1) for stage in recipes.STAGES]
    calls += [(recipes.grm, 0, stage, False) for stage in recipes.STAGES[1:]]
    calls += [(recipes.line, plan, s) for plan in (Plan(), Plan(seed=1)) for s in ("base", "student")]
    assert len({key(monkeypatch, *call) for call in calls}) == len(calls)
    school = [key(monkeypatch, recipes.grm, 0, "school", arm) for arm in (True, False)]
    assert school[0] == school[1], "one school serves both arms"


@pytest.mark.parametrize("principled", [True, False])
def test_each_stage_of_a_judge_goes_on_from_the_one_before(monkeypatch, principled):
    """Each stage adds its number to one weight, in the place of training."""
    calls = []

    def stage(name, add):
        def trained(model, seed, *, principled, **options):
            calls.append((name, seed, principled))
            with torch.no_grad():
                model.embed.weight[0, 0] = 10 * model.embed.weight[0, 0] + add
            return [{"step": 1}]

        return trained

    def school(seed, **options):
        model = Transformer(JUDGE)
        torch.nn.init.zeros_(model.embed.weight)
        return model, [{"step": seed}]

    kept = SimpleNamespace(right=0.5, easy=1, never=2, hinted=3)
    rejective = stage("rft", 2)
    monkeypatch.setattr(recipes, "remember", lambda name, settings, make: make(None))
    monkeypatch.setattr(recipes.spct, "go_to_school", school)
    monkeypatch.setattr(recipes.spct, "supervised", stage("sft", 1))
    monkeypatch.setattr(
        recipes.spct, "rejective", lambda *args, **options: (kept, rejective(*args, **options))
    )
    monkeypatch.setattr(recipes.spct, "reinforced", stage("rl", 3))
    assert recipes.grm(7, "rl", principled)[0].embed.weight[0, 0] == 123
    assert calls == [(name, 7, principled) for name in ("sft", "rft", "rl")]
    facts = recipes.grm(7, "rft", principled)[1]
    assert facts == dict(history=[{"step": 1}], right=0.5, easy=1, never=2, hinted=3)


def test_a_reasoner_is_compared_with_a_copy_of_its_base(monkeypatch):
    calls = []

    def fake(model, *args, reference, seed, **options):
        calls.append((reference.embed.weight.equal(model.embed.weight), reference is model, seed))
        return [{"step": 1}]

    base = Transformer(REASONER)
    monkeypatch.setattr(recipes, "remember", lambda name, settings, make: make(None))
    monkeypatch.setattr(recipes, "pretrained", lambda *args, **options: (base, []))
    monkeypatch.setattr(recipes, "grpo", fake)
    recipes.reasoner(5)
    assert calls == [(True, False, 5)]


@pytest.mark.parametrize("content", [b"", b"not safetensors", b"\x08\0\0\0\0\0\0\0{}      "])
def test_corrupt_file_is_said_set_aside_and_made_anew(cache, capsys, content):
    path = cache / f"model-{digest('model', SETTINGS)}.safetensors"
    cache.mkdir(parents=True)
    path.write_bytes(content)
    tensors, _ = remember("model", SETTINGS, Maker())
    assert torch.equal(tensors["w"], torch.ones(2, 3))
    assert f"Warning: {path.name} could not be used" in capsys.readouterr().out
    assert (cache / f"{path.name}.broken-0").read_bytes() == content
    assert torch.equal(load(path)[0]["w"], torch.ones(2, 3))


def test_a_truncated_file_is_made_anew(cache, capsys):
    make = Maker()
    remember("model", SETTINGS, make)
    path = cache / kept(cache)[0]
    path.write_bytes(path.read_bytes()[:-5])
    remember("model", SETTINGS, make)
    assert make.calls == 2
    assert "could not be used" in capsys.readouterr().out


def test_foreign_file_is_said_set_aside_and_made_anew(cache, capsys):
    path = cache / f"model-{digest('model', SETTINGS)}.safetensors"
    save(path, {"w": torch.zeros(1)}, {"recipe": {"key": "another"}})
    tensors, _ = remember("model", SETTINGS, Maker())
    assert tensors["w"].shape == (2, 3)
    assert "it holds something else" in capsys.readouterr().out
    assert kept(cache) == [path.name, f"{path.name}.broken-0"]


def test_full_disk_is_a_warning_and_the_result_comes_back(monkeypatch, capsys):
    def full(path, tensors, facts):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(recipes, "save", full)
    make = Maker()
    tensors, facts = remember("model", SETTINGS, make)
    assert torch.equal(tensors["w"], torch.ones(2, 3))
    assert facts["loss"] == 0.5
    out = capsys.readouterr().out
    assert "Warning: model could not be kept, and will be made anew next time: No space left on device" in out


def test_a_cache_that_cannot_be_written_is_a_warning_too(monkeypatch, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("MINI_HOME", str(tmp_path / "file"))
    make = Maker()
    assert torch.equal(remember("model", SETTINGS, make)[0]["w"], torch.ones(2, 3))
    assert make.checkpoints == [None]
    assert "could not be kept" in capsys.readouterr().out


def test_a_disk_that_fills_up_on_the_way_costs_time_but_not_the_result(cache, capsys):
    seen = []

    def make(checkpoint):
        seen.append(checkpoint)
        if checkpoint is not None:
            raise OSError(28, "No space left on device")
        return {"w": torch.ones(1)}, {}

    assert remember("model", SETTINGS, make)[0]["w"] == 1
    assert [checkpoint is None for checkpoint in seen] == [False, True]
    assert "a half-way state could not be saved (No space left on device)" in capsys.readouterr().out


def test_an_error_that_is_not_about_saving_comes_out():
    def make(checkpoint):
        raise FileNotFoundError(2, "no text")

    with pytest.raises(FileNotFoundError, match="no text"):
        remember("model", SETTINGS, make)


def test_a_broken_checkpoint_is_set_aside(cache, capsys):
    partial = cache / f"model-{digest('model', SETTINGS)}.partial"
    cache.mkdir(parents=True)
    partial.write_bytes(b"half a file")

    def make(checkpoint):
        assert not checkpoint.exists()
        return {"w": torch.ones(1)}, {}

    remember("model", SETTINGS, make)
    out = capsys.readouterr().out
    assert f"Warning: {partial.name} could not be used" in out
    assert "the rest of" not in out
    assert kept(cache) == [f"{partial.name}.broken-0", f"{partial.stem}.safetensors"]


def test_an_unreadable_file_is_made_anew(cache, monkeypatch, capsys):
    make = Maker()
    remember("model", SETTINGS, make)

    def denied(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(recipes, "load", denied)
    remember("model", SETTINGS, make)
    assert make.calls == 2
    assert "Permission denied" in capsys.readouterr().out


def test_a_failing_recipe_leaves_nothing_but_its_checkpoint(cache):
    def fails(checkpoint):
        save(checkpoint, {"half": torch.ones(1)}, {})
        raise RuntimeError("diverged")

    with pytest.raises(RuntimeError, match="diverged"):
        remember("model", SETTINGS, fails)
    assert kept(cache) == [f"model-{digest('model', SETTINGS)}.partial"]


WORKER = """
    import sys, time, torch
    from pathlib import Path
    from mini.lab.recipes import remember
    from mini.train import load, save

    seconds, log = float(sys.argv[1]), Path(sys.argv[2])

    def make(checkpoint):
        start = 0
        if checkpoint.exists():
            start = load(checkpoint)[1]["step"]
        with log.open("a") as f:
            f.write(f"{start}\\n")
        for step in range(start, 10):
            time.sleep(seconds / 10)
            save(checkpoint, {"half": torch.ones(1)}, {"step": step + 1})
        return {"w": torch.full((1000,), 7.0)}, {"steps": 10}

    tensors, facts = remember("model", {"steps": 10}, make, code=())
    assert tensors["w"].tolist() == [7.0] * 1000 and facts["steps"] == 10
"""


def worker(tmp_path, seconds) -> subprocess.Popen:
    command = [sys.executable, "-c", textwrap.dedent(WORKER), str(seconds), str(tmp_path / "log")]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )


def test_killed_in_the_middle_it_resumes(cache, tmp_path):
    first = worker(tmp_path, seconds=100)
    partial = cache / f"model-{digest('model', {'steps': 10})}.partial"
    deadline = time.monotonic() + 60
    while not partial.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(first.pid, signal.SIGKILL) if os.name == "posix" else first.kill()
    first.communicate()
    assert kept(cache) == [partial.name]
    second = worker(tmp_path, seconds=0)
    out, _ = second.communicate(timeout=60)
    assert second.returncode == 0
    assert "(the rest of an earlier run)" in out
    start, resumed = map(int, (tmp_path / "log").read_text().split())
    assert start == 0
    assert resumed >= 1
    assert kept(cache) == [f"{partial.stem}.safetensors"]


def test_two_processes_at_once_make_it_once(cache, tmp_path):
    both = [worker(tmp_path, seconds=3) for _ in range(2)]
    outs = [process.communicate(timeout=90)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert (tmp_path / "log").read_text() == "0\n"
    assert sum("another process is making this; waiting for it" in out for out in outs) <= 1
    assert sum("model: loaded; made on" in out for out in outs) == 1
    assert len(kept(cache)) == 1
