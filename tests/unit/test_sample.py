import inspect
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mini.sample import choose, sample, stack_prompts

from .test_model import random_model


def draw(**changes):
    call = dict(prompts=[[1, 2, 3]], max_new_tokens=5) | changes
    return sample(random_model(), call.pop("prompts"), call.pop("max_new_tokens"), **call)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_greedy_is_the_argmax_without_a_cache():
    model = random_model()
    text = torch.tensor([[4, 8, 15]])
    drawn = sample(model, text, 10, temperature=0)
    for i in range(10):
        logits = model(text)[:, -1]
        assert drawn.tokens[0, i] == logits.argmax()
        torch.testing.assert_close(drawn.logprobs[0, i], logits.log_softmax(-1).max(), atol=1e-5, rtol=0)
        text = torch.cat((text, drawn.tokens[:, i : i + 1]), dim=1)


def test_prompts_of_different_lengths_give_what_each_gives_alone():
    model = random_model()
    prompts = [[1, 2, 3, 4], [5], [6, 7]]
    together = sample(model, prompts, 12, temperature=0)
    for row, prompt in enumerate(prompts):
        assert torch.equal(sample(model, [prompt], 12, temperature=0).tokens[0], together.tokens[row])


def test_a_row_stops_at_the_end_token_and_dropping_it_leaves_the_others_alone():
    model = random_model()
    prompts = torch.randint(50, (16, 4), generator=seeded())
    free = sample(model, prompts, 15, temperature=0)
    end = free.tokens[:, 3].mode().values.item()  # a token that ends some rows early and others late or never
    stopped = sample(model, prompts, 15, temperature=0, end=end)
    assert 1 < (stopped.lengths < 15).sum() < 16 or stopped.lengths.unique().numel() > 1
    for row in range(16):
        where = (free.tokens[row] == end).nonzero()
        n = where[0].item() + 1 if len(where) else 15
        assert stopped.lengths[row] == n
        assert torch.equal(stopped.tokens[row, :n], free.tokens[row, :n])
        torch.testing.assert_close(stopped.logprobs[row, :n], free.logprobs[row, :n], atol=1e-5, rtol=0)
        assert (stopped.tokens[row, n:] == -1).all()
        assert (stopped.logprobs[row, n:] == 0).all()


def test_ended_rows_are_not_computed(monkeypatch):
    model = random_model()
    prompts = torch.randint(50, (16, 4), generator=seeded())
    end = sample(model, prompts, 15, temperature=0).tokens[:, 1].mode().values.item()
    sizes = []
    hidden = model.hidden
    monkeypatch.setattr(
        model, "hidden", lambda tokens, *rest: sizes.append(len(tokens)) or hidden(tokens, *rest)
    )
    drawn = sample(model, prompts, 15, temperature=0, end=end)
    for i, size in enumerate(sizes[1:], start=1):
        running = (drawn.lengths > i).sum().item()
        assert running <= size <= math.ceil(running / 0.75), "more than a quarter of the batch had ended"


def test_log_probabilities_are_the_models_own():
    model = random_model()
    drawn = sample(model, [[1, 2], [3, 4]], 6, temperature=0.5, top_p=0.9, generator=seeded())
    text = torch.cat((torch.tensor([[1, 2], [3, 4]]), drawn.tokens), dim=1)
    logprobs = model(text).log_softmax(-1)[:, 1:-1].gather(2, text[:, 2:, None])[..., 0]
    torch.testing.assert_close(drawn.logprobs, logprobs, atol=1e-5, rtol=0)


def test_the_same_seed_draws_the_same_text():
    a, b, c = (draw(generator=seeded(s)) for s in (1, 1, 2))
    assert torch.equal(a.tokens, b.tokens)
    assert not torch.equal(a.tokens, c.tokens)


LATENT = dict(q_lora_rank=12, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8)


@pytest.mark.parametrize("shape", [dict(), dict(n_kv_heads=2), LATENT], ids=["heads", "grouped", "latent"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_group_is_what_its_prompt_repeated_gives(shape, temperature):
    """Prompts of several lengths, rows that end early and are dropped; the samples of a prompt side by side."""
    model = random_model(**shape)
    prompts = [[1, 2, 3, 4], [5], [6, 7], [8, 9, 10]]
    call = dict(max_new_tokens=15, temperature=temperature)
    end = sample(model, prompts, **call, generator=seeded()).tokens[:, 2].mode().values.item()
    repeated = [p for p in prompts for _ in range(3)]
    expected = sample(model, repeated, **call, end=end, generator=seeded())
    grouped = sample(model, prompts, **call, end=end, group=3, generator=seeded())
    assert torch.equal(grouped.tokens, expected.tokens)
    assert torch.equal(grouped.lengths, expected.lengths)
    torch.testing.assert_close(grouped.logprobs, expected.logprobs, atol=1e-5, rtol=0)
    assert grouped.lengths.unique().numel() > 1
    if temperature:
        assert not torch.equal(grouped.tokens[0], grouped.tokens[1])


def test_a_groups_prompt_is_read_once(monkeypatch):
    model = random_model()
    read = []
    hidden = model.hidden
    monkeypatch.setattr(
        model, "hidden", lambda tokens, *rest: read.append(tuple(tokens.shape)) or hidden(tokens, *rest)
    )
    sample(model, [[1, 2, 3], [4, 5, 6]], 3, group=8)
    assert read == [(2, 3), (16, 1), (16, 1)]


@pytest.mark.parametrize(("top_p", "kept"), [(0.25, 1), (0.26, 2), (0.5, 2), (0.75, 3), (0.99, 4)])
def test_top_p_takes_no_token_more_than_reach_it(top_p, kept):
    drawn = choose(torch.zeros(500, 4), 1.0, top_p, seeded())  # four tokens, each of probability 1/4 exactly
    assert len(drawn.unique()) == kept


@given(temperature=st.floats(0.2, 3), top_p=st.floats(0.05, 1))
@settings(max_examples=20, deadline=None)
def test_draws_have_the_frequencies_that_they_should(temperature, top_p):
    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0])
    probs = (logits / temperature).softmax(-1)
    kept = [i for i in range(5) if probs[:i].sum() < top_p]  # probs are in descending order
    expected = torch.zeros(5).index_copy(0, torch.tensor(kept), probs[kept] / probs[kept].sum())
    drawn = choose(logits.repeat(20_000, 1), temperature, top_p, seeded())
    seen = torch.bincount(drawn, minlength=5) / 20_000
    assert (seen[expected == 0] == 0).all()
    assert (seen - expected).abs().max() < 0.02  # 5.6 standard errors at the widest


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(temperature=-0.1), r"temperature=-0.1 is below 0; use 0"),
        (dict(temperature=float("nan")), r"temperature=nan"),
        (dict(top_p=0.0), r"top_p=0.0 is outside \(0, 1\]"),
        (dict(top_p=1.5), r"top_p=1.5"),
        (dict(prompts=[[1], []]), r"prompt 1 is empty; give it at least one token"),
        (dict(prompts=[]), r"prompts must be"),
        (dict(prompts=[[50]]), r"prompt 0 holds token 50, outside this model's vocabulary of 50"),
        (dict(prompts=[[-1]]), r"token -1"),
        (dict(group=0), r"group=0 must be at least 1"),
        (dict(max_new_tokens=0), r"max_new_tokens=0 must be at least 1"),
        (dict(max_new_tokens=22), r"3 tokens and 22 new ones make 25, past max_seq_len=24.*at most 21"),
    ],
)
def test_bad_input_is_refused_with_the_fix(changes, message):
    with pytest.raises(ValueError, match=message):
        draw(**changes)


def test_a_single_prompt_is_told_to_be_wrapped():
    without_type_checks = inspect.unwrap(stack_prompts)  # as it runs in a notebook
    with pytest.raises(ValueError, match="wrap a single prompt in a list"):
        without_type_checks([1, 2], 50)
