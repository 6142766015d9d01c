import argparse
import errno
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from einops import rearrange
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mini.model import Config, Transformer
from mini.train import (
    LANGUAGE_MODEL,
    Muon,
    Settings,
    add_options,
    finish_step_on_interrupt,
    from_options,
    load,
    load_weights,
    optimizers,
    orthogonal,
    save,
    train,
)

CONFIG = Config(vocab_size=20, dim=16, n_layers=1, n_heads=2, inter_dim=24, max_seq_len=16)


def fresh(seed: int = 0) -> Transformer:
    torch.manual_seed(seed)
    return Transformer(CONFIG)


def batch(step: int) -> torch.Tensor:
    """Counting modulo 20 from a random start: a rule that a model can learn in a few steps."""
    start = torch.randint(20, (8, 1), generator=torch.Generator().manual_seed(step))
    return (start + torch.arange(13)) % 20


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(
        torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("matrix_lr", [0.02, 0.0])
def test_training_learns_what_can_be_learned(matrix_lr):
    model = fresh()
    history = train(model, batch, Settings(steps=120, lr=1e-2, matrix_lr=matrix_lr), progress=False)
    assert history[0]["loss"] > 2.5
    assert history[-1]["loss"] < 0.1
    assert [row["step"] for row in history] == list(range(1, 121))
    assert history[-1]["tokens"] == 120 * 8 * 12
    assert not model.training


def test_training_on_noise_does_not_get_below_chance():
    def noise(step):
        return torch.randint(20, (8, 13), generator=torch.Generator().manual_seed(step))

    history = train(fresh(), noise, Settings(steps=60, lr=1e-2), progress=False)
    assert sum(row["loss"] for row in history[-20:]) / 20 > 2.95  # ln 20 = 2.996


def test_the_rate_rises_holds_and_falls():
    plan = Settings(steps=100, warmup=10, decay=0.5)
    rates = [plan.rate(i) for i in range(101)]
    assert rates[0] == 0.1
    assert rates[9:51] == [1.0] * 42
    assert rates[75] == 0.5
    assert rates[100] == 0.0
    assert [Settings(steps=3, warmup=0, decay=0.0).rate(i) for i in range(3)] == [1.0] * 3


def test_each_step_takes_its_share_of_the_rate_and_a_gradient_that_was_cut(monkeypatch):
    taken = []

    class Noting(torch.optim.SGD):
        def step(self):
            (group,) = self.param_groups
            norm = torch.stack([p.grad.norm() for p in group["params"]]).norm().item()
            taken.append((group["lr"], norm))

    model = fresh()
    sgd = Noting([{"params": list(model.parameters()), "peak": 6.0}], lr=6.0)
    monkeypatch.setattr("mini.train.optimizers", lambda model, settings: [sgd])
    plan = Settings(steps=8, lr=2.0, warmup=3, decay=0.5, clip=0.01)
    history = train(model, batch, plan, progress=False)
    shares = [1 / 3, 2 / 3, 1, 1, 1, 3 / 4, 2 / 4, 1 / 4]
    assert [lr for lr, _ in taken] == pytest.approx([6 * share for share in shares])
    assert [row["lr"] for row in history] == pytest.approx([2 * share for share in shares])
    assert [norm for _, norm in taken] == pytest.approx([0.01] * 8, rel=1e-3)
    assert all(row["grad_norm"] > 0.02 for row in history)  # as it was before the cut


def test_each_optimizer_has_the_peak_and_the_betas_of_the_settings():
    adamw, muon = optimizers(fresh(), Settings(steps=1, lr=0.003, matrix_lr=0.05, betas=(0.8, 0.9)))
    assert [group["peak"] for group in adamw.param_groups] == [0.003]
    assert [group["betas"] for group in adamw.param_groups] == [(0.8, 0.9)]
    assert [group["peak"] for group in muon.param_groups] == [0.05]


@pytest.mark.parametrize("matrix_lr", [0.02, 0.0])
def test_a_resumed_run_is_the_same_bit_for_bit(tmp_path, matrix_lr):
    plan = Settings(steps=30, matrix_lr=matrix_lr, save_every=10)
    whole = fresh()
    history = train(whole, batch, plan, progress=False)

    def broken(step):
        if step == 17:
            raise RuntimeError("power cut")
        return batch(step)

    path = tmp_path / "run.safetensors"
    with pytest.raises(RuntimeError, match="power cut"):
        train(fresh(), broken, plan, checkpoint=path, progress=False)
    resumed = fresh(seed=1)  # its own weights must not matter
    again = train(resumed, batch, plan, checkpoint=path, progress=False)
    assert same(whole, resumed)
    for column in ("loss", "tokens"):
        assert [row[column] for row in again] == [row[column] for row in history]
    seconds = [row["seconds"] for row in again]
    assert seconds == sorted(seconds)


RUN = """
import sys, time
sys.path.insert(0, {tests!r})
from test_train import Settings, batch, fresh, train
def slow(step):
    time.sleep(0.02)
    return batch(step)
train(fresh(), slow, Settings(steps=60, save_every=5), checkpoint={path!r}, progress=False)
"""


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_run_resumes_bit_for_bit(tmp_path, stop):
    if sys.platform == "win32":
        pytest.skip("Windows has no SIGKILL")
    path = tmp_path / "run.safetensors"
    code = RUN.format(tests=os.path.dirname(__file__), path=str(path))
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 120
    while not path.exists():
        assert process.poll() is None, process.stderr.read()
        assert time.time() < deadline
        time.sleep(0.01)
    process.send_signal(stop)
    errors = process.communicate()[1]
    assert process.returncode != 0
    kept = len(load(path)[1]["history"])
    assert 5 <= kept < 60
    if stop == signal.SIGINT:
        assert f"stopped after step {kept} of 60: saved; run this again" in errors
    plan = Settings(steps=60, save_every=5)
    resumed, whole = fresh(seed=2), fresh()
    train(resumed, batch, plan, checkpoint=path, progress=False)
    train(whole, batch, plan, progress=False)
    assert same(whole, resumed)


def test_ctrl_c_is_what_it_was_when_training_ends_well_or_badly():
    def broken(step):
        raise RuntimeError("power cut")

    before = signal.getsignal(signal.SIGINT)
    train(fresh(), batch, Settings(steps=1), progress=False)
    assert signal.getsignal(signal.SIGINT) == before
    with pytest.raises(RuntimeError, match="power cut"):
        train(fresh(), broken, Settings(steps=1), progress=False)
    assert signal.getsignal(signal.SIGINT) == before


def test_a_second_ctrl_c_acts_at_once_but_not_the_echo_of_the_first(monkeypatch):
    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
    monkeypatch.setattr("mini.train.time", clock)
    with finish_step_on_interrupt() as asked:
        signal.raise_signal(signal.SIGINT)
        clock.now = 0.9
        signal.raise_signal(signal.SIGINT)
        assert asked == [0.0, 0.9]
        clock.now = 1.1
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_thread_can_train_too():
    with ThreadPoolExecutor(1) as pool:
        history = pool.submit(train, fresh(), batch, Settings(steps=1), progress=False).result()
    assert len(history) == 1


def test_a_finished_run_is_loaded_not_repeated(tmp_path):
    plan = Settings(steps=5)
    first, second = fresh(), fresh(seed=1)
    train(first, batch, plan, checkpoint=tmp_path / "run", progress=False)

    def forbidden(step):
        raise AssertionError("trained again")

    train(second, forbidden, plan, checkpoint=tmp_path / "run", progress=False)
    assert same(first, second)


def test_evaluate_is_called_when_asked_and_at_the_end():
    calls = []

    def evaluate(model):
        assert not model.training
        calls.append(1)
        return {"score": float(len(calls))}

    history = train(fresh(), batch, Settings(steps=7, eval_every=3), evaluate=evaluate, progress=False)
    assert {row["step"]: row["score"] for row in history if "score" in row} == {3: 1.0, 6: 2.0, 7: 3.0}


def test_a_diverged_run_stops_and_says_where():
    def bad(model, data):
        return model(data[:, :-1]).sum() * float("nan")

    with pytest.raises(FloatingPointError, match=r"loss nan at step 0; lower lr=0.003"):
        train(fresh(), batch, Settings(steps=3, lr=0.003), loss=bad, progress=False)


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    path = tmp_path / "run"
    train(fresh(), batch, Settings(steps=5), checkpoint=path, progress=False)
    with pytest.raises(ValueError, match=r"saved with steps=5, this run has steps=6"):
        train(fresh(), batch, Settings(steps=6), checkpoint=path, progress=False)
    wider = Transformer(Config(vocab_size=20, dim=32, n_layers=1, n_heads=2, inter_dim=24))
    with pytest.raises(ValueError, match=r"does not fit this model"):
        train(wider, batch, Settings(steps=5), checkpoint=path, progress=False)
    save(path, {}, {"kind": "something else"})
    with pytest.raises(ValueError, match="holds no training run"):
        train(fresh(), batch, Settings(steps=5), checkpoint=path, progress=False)


@pytest.mark.parametrize("content", [b"", b"not a tensor file", b"\x80\x04\x95pickle"])
def test_a_broken_file_is_refused(tmp_path, content):
    path = tmp_path / "run"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"is damaged or was not saved by mini.*remove it"):
        load(path)


def test_a_truncated_file_is_refused(tmp_path):
    path = tmp_path / "run"
    save(path, fresh().state_dict(), {})
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="is damaged"):
        load(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*gone"):
        load(tmp_path / "gone")


def test_save_and_load_keep_everything(tmp_path):
    tensors = {"a": torch.randn(3, 4), "transposed": torch.randn(3, 4).T, "whole": torch.arange(3)}
    save(tmp_path / "deep" / "file", tensors, {"name": "ü", "list": [1, None]})
    again, facts = load(tmp_path / "deep" / "file")
    assert facts == {"name": "ü", "list": [1, None]}
    assert all(torch.equal(tensors[k], again[k]) for k in tensors)


def test_a_full_disk_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "weights"
    save(path, {"w": torch.ones(4)}, {})

    def full(fd):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"could not save .* MB to .*No space left.*untouched") as caught:
        save(path, {"w": torch.zeros(4)}, {})
    assert caught.value.errno == errno.ENOSPC
    assert torch.equal(load(path)[0]["w"], torch.ones(4))
    assert [p.name for p in tmp_path.iterdir()] == ["weights"]


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on file size")
def test_a_write_that_really_fails_keeps_the_old_file(tmp_path):
    """The kernel itself refuses to write past 4 KB, as it would past the end of a disk."""
    path = tmp_path / "weights"
    save(path, {"w": torch.ones(4)}, {})
    code = (
        "import resource, signal, sys, torch; from mini.train import save;"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096));"
        "save(sys.argv[1], {'w': torch.zeros(10_000)}, {})"
    )
    run = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    assert run.returncode != 0
    assert "could not save 0.0 MB" in run.stderr
    assert torch.equal(load(path)[0]["w"], torch.ones(4))
    assert [p.name for p in tmp_path.iterdir()] == ["weights"]


def test_weights_that_do_not_fit_are_named():
    model = fresh()
    weights = model.state_dict() | {"extra": torch.ones(1)}
    with pytest.raises(
        ValueError, match=r"file\.x does not fit this model: extra is \(1,\) there and missing here"
    ):
        load_weights(model, weights, "file.x")


@pytest.mark.parametrize("changes", [dict(steps=0), dict(steps=1, decay=1.5)])
def test_bad_settings_are_refused(changes):
    with pytest.raises(ValueError, match=r"steps=0|decay=1.5"):
        Settings(**changes)


@given(rows=st.integers(1, 12), columns=st.integers(1, 12), seed=st.integers(0, 1000))
@settings(max_examples=50, deadline=None)
def test_orthogonal_keeps_directions_and_evens_out_their_sizes(rows, columns, seed):
    g = torch.randn(2, rows, columns, generator=torch.Generator().manual_seed(seed))
    sizes = torch.linalg.svdvals(g)
    left, _, right = torch.linalg.svd(g, full_matrices=False)
    made = left.mT @ orthogonal(g) @ right.mT  # diagonal, if the singular vectors are the same
    diagonal = made.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(made, torch.diag_embed(diagonal), atol=2e-3, rtol=0)
    large = sizes > 0.1 * sizes.norm(dim=1, keepdim=True)
    assert ((diagonal > 0.5) & (diagonal < 1.3))[large].all()


@pytest.mark.parametrize("shape", [(24, 8), (8, 24), (16, 16)])
def test_muon_takes_pytorchs_steps(shape):
    torch.manual_seed(0)
    start = torch.randn(shape)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    steps = Muon([ours], lr=0.02), torch.optim.Muon([theirs], lr=0.02, weight_decay=0.0)
    for _ in range(4):
        ours.grad = theirs.grad = torch.randn(shape)
        for optimizer in steps:
            optimizer.step()
    moved = (ours - start).norm()
    assert (ours - theirs).norm() < 0.02 * moved, "PyTorch's is computed in bfloat16, to within 1 or 2%"


def test_muon_leaves_a_matrix_without_gradient_as_it_is():
    moved, frozen = (nn.Parameter(torch.randn(4, 3)) for _ in range(2))
    before = frozen.detach().clone()
    moved.grad = torch.randn(4, 3)
    Muon([moved, frozen], lr=0.02, weight_decay=0.1).step()
    assert frozen.equal(before)


def test_muon_treats_stacked_matrices_each_by_itself():
    torch.manual_seed(0)
    whole, grad = torch.randn(20, 8), torch.randn(20, 8)
    stacked = nn.Parameter(whole.clone())
    stacked.parts = (8, 12)
    alone = [nn.Parameter(part.clone()) for part in whole.split((8, 12))]
    stacked.grad = grad.clone()
    for p, g in zip(alone, grad.split((8, 12)), strict=True):
        p.grad = g.clone()
    Muon([stacked], lr=0.02).step()
    Muon(alone, lr=0.02).step()
    torch.testing.assert_close(stacked.data, torch.cat([p.data for p in alone]))


def test_muon_treats_every_experts_matrices_each_by_themselves():
    torch.manual_seed(0)
    start, grad = torch.randn(3, 20, 8), torch.randn(3, 20, 8)
    experts = nn.Parameter(start.clone())
    experts.parts = (8, 12)
    alone = [nn.Parameter(part.clone()) for expert in start for part in expert.split((8, 12))]
    experts.grad = grad.clone()
    for p, g in zip(alone, [part for expert in grad for part in expert.split((8, 12))], strict=True):
        p.grad = g.clone()
    Muon([experts], lr=0.02).step()
    Muon(alone, lr=0.02).step()
    torch.testing.assert_close(
        rearrange(experts.data, "e r c -> (e r) c"), torch.cat([p.data for p in alone])
    )


@pytest.mark.parametrize("matrix_lr", [0.02, 0.0])
def test_weight_decay_acts_on_the_matrices_of_the_layers_alone(matrix_lr):
    model = fresh()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for optimizer in optimizers(model, Settings(steps=1, lr=0.02, matrix_lr=matrix_lr, weight_decay=0.5)):
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.zeros_like(p)
        optimizer.step()
    for name, p in model.named_parameters():
        decayed = p.dim() == 2 and "layers." in name
        torch.testing.assert_close(p.data, before[name] * (0.99 if decayed else 1.0))


def test_options_change_the_settings_that_they_name():
    parser = argparse.ArgumentParser()
    add_options(parser, LANGUAGE_MODEL)
    assert from_options(Config, parser.parse_args([])) == LANGUAGE_MODEL
    changed = parser.parse_args(["--no-tie-embeddings", "--rope-theta", "500", "--n-layers", "2"])
    expected = replace(LANGUAGE_MODEL, tie_embeddings=False, rope_theta=500.0, n_layers=2)
    assert from_options(Config, changed) == expected
