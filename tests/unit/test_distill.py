"""Distillation: divergences by hand and by their properties, what has a gradient, what counts in a mean, exposure."""

import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from mini.distill import deal, distil, divergence, exposure, kl, masked_mean, on_policy, score, write_rows
from mini.lab import teacher as lab_teacher
from mini.model import Config, Transformer, cross_entropy
from mini.train import Settings, save, train
from tools import teacher as tool

SMALL = Config(vocab_size=12, dim=16, n_layers=1, n_heads=2, inter_dim=24, max_seq_len=24)
LARGE = Config(vocab_size=12, dim=32, n_layers=2, n_heads=2, inter_dim=48, max_seq_len=24)
logits = st.lists(st.floats(-20, 20, width=32), min_size=5, max_size=5)


def model(config, seed):
    torch.manual_seed(seed)
    made = Transformer(config)
    with torch.no_grad():
        made.embed.weight *= 3  # not quite uniform
    return made


def rows(n=3, length=10, seed=0):
    return torch.randint(12, (n, length), generator=torch.Generator().manual_seed(seed))


# --- divergences


def test_by_hand():
    """P = (1/2, 1/2), Q = (1/4, 3/4)."""
    p, q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    assert_close(divergence(q, p, 0.0).item(), 0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    assert_close(divergence(q, p, 1.0).item(), 0.25 * math.log(1 / 2) + 0.75 * math.log(3 / 2))
    m = [0.2 * 0.5 + 0.8 * 0.25, 0.2 * 0.5 + 0.8 * 0.75]
    by_p = sum(a * math.log(a / b) for a, b in zip((0.5, 0.5), m, strict=True))
    by_q = sum(a * math.log(a / b) for a, b in zip((0.25, 0.75), m, strict=True))
    assert_close(divergence(q, p, 0.2).item(), 0.2 * by_p + 0.8 * by_q)


@settings(max_examples=100, deadline=None)
@given(logits, logits, st.sampled_from([0.0, 0.125, 0.5, 0.875, 1.0]), st.floats(0.3, 5))
def test_properties(a, b, beta, temperature):
    """Never negative, zero for equals, blind to a constant, symmetric when the roles and β are exchanged."""
    s, t = torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64)
    d = divergence(s, t, beta, temperature)
    assert d >= -1e-9
    assert divergence(t, t, beta, temperature).abs() < 1e-9
    assert_close(divergence(s + 3, t - 2, beta, temperature), d, atol=1e-9, rtol=1e-6)
    assert_close(divergence(t, s, 1 - beta, temperature), d, atol=1e-9, rtol=1e-6)
    assert_close(divergence(s / temperature, t / temperature, beta), d)
    if 0 < beta < 1:  # a mixture holds a share of both, so that no ratio exceeds 1/β or 1/(1-β)
        assert d <= -beta * math.log(beta) - (1 - beta) * math.log1p(-beta) + 1e-9


def test_a_token_without_any_chance():
    """-inf: costs nothing where P has it, everything where Q alone has it, and a mixture stays finite."""
    never, even = torch.tensor([0.0, -torch.inf]), torch.zeros(2)
    assert_close(divergence(even, never, 0.0).item(), math.log(2))
    assert divergence(never, even, 0.0) == torch.inf
    assert divergence(never, even, 0.5).isfinite()
    assert kl(never.log_softmax(-1), never.log_softmax(-1)) == 0


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_gradient_is_that_of_differences(beta):
    g = torch.Generator().manual_seed(0)
    s = torch.randn(2, 6, generator=g, dtype=torch.float64, requires_grad=True)
    t = torch.randn(2, 6, generator=g, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda s: divergence(s, t, beta, 2.0), (s,))


def test_temperature_shrinks_the_gradient_and_t_squared_restores_it():
    """At a high temperature, T² ∂KL/∂s is (s - t) / n for centred logits (Hinton et al. 2015, equation 4)."""
    g = torch.Generator().manual_seed(0)
    s, t = (x - x.mean() for x in torch.randn(2, 8, generator=g, dtype=torch.float64))
    s.requires_grad_()
    gradient = torch.autograd.grad(divergence(s, t, 0.0, 1e3), s)[0]
    assert_close(1e6 * gradient, (s - t).detach() / 8, atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize("wrong", [dict(beta=-0.1), dict(beta=1.1), dict(beta=math.nan)])
def test_betas_that_are_none(wrong):
    with pytest.raises(ValueError, match="beta="):
        divergence(torch.zeros(1, 3), torch.zeros(1, 3), **wrong)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_temperatures_that_are_none(temperature):
    with pytest.raises(ValueError, match="temperature="):
        divergence(torch.zeros(1, 3), torch.zeros(1, 3), temperature=temperature)


def test_two_vocabularies_are_refused():
    with pytest.raises(ValueError, match="the student scores 3 tokens, the teacher 4"):
        divergence(torch.zeros(1, 3), torch.zeros(1, 4))


# --- means


def test_mean_of_tokens_not_of_rows():
    values = torch.tensor([[1.0, 2.0, 3.0], [10.0, torch.nan, torch.inf]])
    valid = torch.tensor([[True, True, True], [True, False, False]])
    assert masked_mean(values, valid) == 4.0
    assert masked_mean(values, torch.zeros(2, 3, dtype=torch.bool)) == 0.0


@pytest.mark.parametrize("hard", [0.0, 0.5, 1.0])
def test_fillers_change_nothing(hard):
    """Rows of two lengths together give what each gives alone, weighted by its tokens."""
    student, loss = model(SMALL, 0), distil(model(LARGE, 1), 0.5, 2.0, hard)
    long, short = rows(1, 9), rows(1, 5, seed=1)
    both = torch.cat((long, F.pad(short, (0, 4), value=-1)))
    expected = (8 * loss(student, long) + 4 * loss(student, short)) / 12
    assert_close(loss(student, both), expected)
    assert_close(score(student, both)[1, :4], score(student, short)[0])


# --- losses


def test_the_parts_of_the_loss():
    student, teacher, text = model(SMALL, 0), model(LARGE, 1), rows()
    soft = 9 * divergence(student(text[:, :-1]), teacher(text[:, :-1]), 0.0, 3.0).mean()
    assert_close(distil(teacher, 0.0, 3.0)(student, text), soft)
    assert_close(distil(teacher, hard=1.0)(student, text), cross_entropy(student, text))
    assert_close(
        distil(teacher, 0.0, 3.0, hard=0.25)(student, text), 0.75 * soft + 0.25 * cross_entropy(student, text)
    )
    with pytest.raises(ValueError, match="hard=2"):
        distil(teacher, hard=2)


@pytest.mark.parametrize("make", [lambda t: distil(t, 0.0, 2.0), lambda t: on_policy(t, 5)])
def test_only_the_student_learns(make):
    student, teacher = model(SMALL, 0), model(LARGE, 1)
    make(teacher)(student, rows()).backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert student.embed.weight.grad.abs().sum() > 0


def test_a_student_of_the_teachers_size_becomes_the_teacher():
    """From random tokens, which alone would teach it nothing: the divergence falls to a tenth."""
    teacher, student = model(LARGE, 1), model(LARGE, 2)
    history = train(
        student,
        lambda i: rows(8, 16, seed=i),
        Settings(steps=60, warmup=4),
        loss=distil(teacher),
        progress=False,
    )
    assert history[-1]["loss"] < 0.1 * history[0]["loss"]


def test_on_policy_scores_the_students_own_tokens():
    """Equal to the divergence at tokens drawn again by hand, and the same for the same rows."""
    student, teacher, starts = model(SMALL, 0).eval(), model(LARGE, 1), rows(4, 3)
    loss = on_policy(teacher, 6, beta=1.0, seed=5)
    g = torch.Generator().manual_seed(5 + int(starts.sum()))
    drawn = write_rows(student, starts, 6, generator=g)
    expected = divergence(student(drawn[:, :-1])[:, -6:], teacher(drawn[:, :-1])[:, -6:], 1.0).mean()
    assert_close(loss(student, starts), expected)
    assert loss(student, starts) == loss(student, starts)
    assert loss(student, starts) != on_policy(teacher, 6, seed=6)(student, starts)
    assert loss(teacher, starts).abs() < 1e-6


# --- texts


def test_rows_go_on_from_their_starts():
    writer, starts = model(LARGE, 1).eval(), rows(5, 3)
    written = write_rows(writer, starts, 6, temperature=0, batch_size=2)
    assert written.shape == (5, 9)
    assert written[:, :3].equal(starts)
    assert written[:, 3:].equal(writer(written[:, :-1])[:, 2:].argmax(dim=-1))
    drawn = write_rows(writer, rows(40, 3), 6, end=0, generator=torch.Generator().manual_seed(1))
    ended = (drawn[:, 3:] == 0).any(dim=1)
    assert ended.any()
    assert (drawn[ended, 3:] == -1).any()


@given(st.integers(1, 9), st.integers(1, 5), st.integers(0, 99))
def test_a_pass_deals_each_row_once_and_is_a_function_of_the_step(n, size, seed):
    data = rows(n, 4) * 0 + torch.arange(n)[:, None]
    batch = deal(data, size, seed)
    dealt = torch.cat([batch(i) for i in range(n)])[: size * n, 0]
    for epoch in dealt.split(n):
        assert sorted(epoch.tolist()) == list(range(n))
    assert deal(data, size, seed)(n - 1).equal(batch(n - 1))


def test_each_pass_and_each_seed_deals_in_an_order_of_its_own():
    data = torch.arange(50)[:, None]
    batch = deal(data, 50, 0)
    assert not batch(0).equal(batch(1))
    assert not batch(0).equal(deal(data, 50, 1)(0))


def test_nothing_to_deal_is_refused():
    with pytest.raises(ValueError, match="0 rows in batches of 4"):
        deal(rows(1, 4)[:0], 4)


# --- exposure


def test_exposure_by_hand():
    others = torch.tensor([-1.0, -2.0, -3.0])
    assert exposure(-0.5, others) == 2.0  # the likeliest of four
    assert exposure(-1.5, others) == 1.0
    assert exposure(-9.0, others) == 0.0
    assert exposure(-1.0, others) == 1.0  # a tie is no advantage


def test_exposure_without_any_leak():
    g = torch.Generator().manual_seed(0)
    scores = torch.rand(2000, 1000, generator=g)
    mean = sum(exposure(row[0], row[1:]) for row in scores) / len(scores)
    assert abs(mean - 1 / math.log(2)) < 0.1


# --- the real teacher's file


def test_no_teacher_is_no_error(monkeypatch, tmp_path):
    monkeypatch.setattr(lab_teacher, "FILE", tmp_path / "none.safetensors")
    assert lab_teacher.real_teacher() is None


def test_a_kept_teacher_is_loaded(monkeypatch, tmp_path):
    from dataclasses import asdict

    from mini.data import train_bpe

    file, kept = tmp_path / "teacher.safetensors", model(LARGE, 1)
    save(file, kept.state_dict(), {"config": asdict(LARGE), "tokenizer": train_bpe("abc abc", 6).to_json()})
    monkeypatch.setattr(lab_teacher, "FILE", file)
    loaded, engine = lab_teacher.real_teacher()
    assert loaded(rows()[:, :-1]).equal(kept(rows()[:, :-1]))
    assert not any(p.requires_grad for p in loaded.parameters())
    assert engine.decode(engine.encode("abc").ids, skip_special_tokens=False).replace(" ", "") == "abc"


def test_what_make_teacher_says(monkeypatch, tmp_path, capsys):
    """Already there; too little room; pip fails."""
    monkeypatch.setattr(tool, "FILE", file := tmp_path / "a" / "teacher.safetensors")
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setattr(tool, "ROOM", 1e18)
    with pytest.raises(SystemExit, match="make room"):
        tool.main()
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, 1))
    with pytest.raises(SystemExit, match="needs the network, once"):
        tool.pip("nothing")
    file.touch()
    tool.main()
    assert "there already" in capsys.readouterr().out
