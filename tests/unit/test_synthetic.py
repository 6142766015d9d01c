"""Generations that learn from the generation before: what each learns from, what they do, and how it is measured."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mini.data import corpus
from mini.distill import write_rows
from mini.model import Config, cross_entropy
from mini.synthetic import (
    REGIMES,
    chain,
    choose_rows,
    coverage,
    distinct,
    diversity,
    entropy,
    learn_rows,
    ngrams,
    training_set,
    unseen,
    world,
)
from mini.train import Settings

TINY = dict(vocab_size=7, dim=16, n_layers=1, n_heads=1, inter_dim=16, max_seq_len=6)
MOE = dict(n_routed_experts=4, n_activated_experts=2, n_shared_experts=1, moe_inter_dim=8)
texts = st.lists(st.text("abc ", max_size=30), min_size=1, max_size=5)


def rows(start, n=10):
    return torch.arange(start, start + n)[:, None].expand(n, 3)


def test_what_each_regime_learns_from():
    real, first, second = rows(0), rows(100), rows(200)
    for regime in REGIMES:
        assert training_set(regime, real, []).equal(real)
    assert training_set("replace", real, [first, second]).equal(second)
    assert training_set("accumulate", real, [first, second]).equal(torch.cat((real, first, second)))
    mixed = training_set("mix", real, [first, second], share=0.3)[:, 0]
    assert len(mixed) == 10
    assert len(mixed.unique()) == 10
    assert (mixed < 100).sum() == 3
    assert ((mixed >= 100) & (mixed < 200)).sum() == 0


def test_rows_are_chosen_at_random_by_the_generator():
    def chosen(seed):
        return choose_rows(torch.arange(50), 10, torch.Generator().manual_seed(seed)).tolist()

    assert chosen(0) == chosen(0) != chosen(1)
    assert set().union(*map(chosen, range(60))) == set(range(50))


@given(st.floats(0, 1), st.integers(1, 30), st.integers(0, 20), st.integers(0, 99))
def test_a_mix_is_as_large_as_the_real_data_with_its_share(share, n, more, seed):
    generator = torch.Generator().manual_seed(seed)
    mixed = training_set("mix", rows(0, n), [rows(1000, n + more)], share, generator)
    assert len(mixed) == n
    assert (mixed[:, 0] < 1000).sum() == round(share * n)


def test_bad_requests_are_refused():
    with pytest.raises(ValueError, match="regime='reuse'"):
        training_set("reuse", rows(0), [])
    with pytest.raises(ValueError, match=r"share=1\.5"):
        training_set("mix", rows(0), [rows(9)], share=1.5)
    with pytest.raises(ValueError, match="8 rows out of 5"):
        training_set("mix", rows(0), [rows(9, 5)], share=0.2)
    with pytest.raises(ValueError, match="generations=0"):
        next(chain(rows(0), lambda d, s: d, lambda m, g: m, regime="mix", generations=0))
    with pytest.raises(ValueError, match="n=0"):
        ngrams(["a"], 0)
    with pytest.raises(ValueError, match="widen the band"):
        coverage(Counter("ab"), Counter("ab"), (5, 9))


def test_a_chain_hands_each_generation_what_its_regime_says():
    seen = []

    def learn(data, seed):
        seen.append((len(data), seed))
        return data.max().item()

    def draw(model, generator):
        return rows(int(model) + 1, 4)

    models = [m for m, _ in chain(rows(0), learn, draw, regime="accumulate", generations=3, seed=2)]
    assert models == [9, 13, 17]
    assert seen == [(10, 2000), (14, 2001), (18, 2002)]


def gaussian(regime, n, generations, seed):
    def learn(data, seed):
        return data.mean(), data.var(correction=0).sqrt()

    def draw(model, generator):
        return model[0] + model[1] * torch.randn(n, generator=generator, dtype=torch.float64)

    real = torch.randn(n, generator=torch.Generator().manual_seed(10_000 + seed), dtype=torch.float64)
    return [
        m[1].item() ** 2
        for m, _ in chain(real, learn, draw, regime=regime, generations=generations, seed=seed)
    ]


def test_the_variance_of_a_gaussian_chain_shrinks_as_derived():
    n, generations = 10, 6
    variances = np.array([gaussian("replace", n, generations, seed) for seed in range(3000)])
    expected = ((n - 1) / n) ** np.arange(1, generations + 1)
    error = variances.std(axis=0) / math.sqrt(len(variances))
    assert (abs(variances.mean(axis=0) - expected) < 4.5 * error).all()
    kept = np.array([gaussian("accumulate", n, generations, seed) for seed in range(300)])
    assert kept[:, -1].mean() > variances[:, -1].mean() + 0.1


def test_the_same_seed_gives_the_same_chain():
    assert gaussian("mix", 8, 3, 1) == gaussian("mix", 8, 3, 1) != gaussian("mix", 8, 3, 2)


def test_ngrams_by_hand_and_never_across_texts():
    assert ngrams(["abab", "ab", "a"], 2) == {"ab": 3, "ba": 1}
    assert ngrams(["ab", "cd"], 3) == {}


def test_measures_by_hand():
    counts = Counter({"aa": 2, "ab": 1, "bb": 1})
    assert entropy(counts) == 1.5
    assert distinct(counts) == 3 / 4
    assert unseen(counts, {"aa", "bb"}) == 1 / 4
    reference = Counter({"aa": 9, "ab": 2, "ba": 2, "bb": 1, "cc": 1, "cd": 1})
    assert coverage(counts, reference, (1, 2)) == 2 / 5
    assert coverage(counts, reference, (9, math.inf)) == 1


@given(texts, st.integers(1, 3))
def test_measures_agree_with_numpy_and_keep_their_bounds(texts, n):
    counts = ngrams(texts, n)
    grams = [text[i : i + n] for text in texts for i in range(len(text) - n + 1)]
    if not grams:
        assert not counts
        return
    kinds, each = np.unique(grams, return_counts=True)
    p = each / each.sum()
    assert math.isclose(entropy(counts), -(p * np.log2(p)).sum(), abs_tol=1e-9)
    assert distinct(counts) == len(kinds) / len(grams)
    assert 0 <= entropy(counts) <= math.log2(len(kinds)) + 1e-9
    assert unseen(counts, counts) == 0
    assert coverage(counts, counts, (1, math.inf)) == 1


@pytest.mark.parametrize("extra", [{}, MOE], ids=["dense", "MoE"])
def test_a_model_learns_its_rows_and_writes_them_again(extra):
    cycle = torch.stack([(torch.arange(6) + i) % 7 for i in range(7)]).repeat(4, 1)
    model = learn_rows(cycle, Config(**TINY, **extra), Settings(steps=60), batch_size=14)
    written = write_rows(model, cycle[:7, :1], 5, temperature=0)
    assert written.equal(cycle[:7])
    assert written.shape == (7, 6)
    for layer in model.layers if extra else ():
        assert layer.ffn.gate.bias.abs().sum() > 0, "the router's bias has moved: it was balanced"


def test_learning_and_writing_come_from_their_seeds():
    def make(seed):
        model = learn_rows(rows(0, 6) % 7, Config(**TINY), Settings(steps=3), batch_size=4, seed=seed)
        return write_rows(
            model, torch.zeros(5, 2, dtype=torch.long), 4, generator=torch.Generator().manual_seed(1)
        )

    assert make(0).equal(make(0))
    assert make(0)[:, :2].eq(0).all()


@pytest.mark.parametrize("extra", [{}, MOE], ids=["dense", "MoE"])
def test_a_model_begins_from_its_seed_and_learns_by_the_loss_it_is_given(extra):
    still, read = Settings(steps=1, lr=0.0, matrix_lr=0.0, weight_decay=0.0), []

    def loss(model, rows):
        read.append(len(rows))
        return cross_entropy(model, rows)

    one, again, other = (
        learn_rows(rows(0, 6) % 7, Config(**TINY, **extra), still, batch_size=4, seed=seed, loss=loss)
        for seed in (0, 0, 1)
    )
    assert read == [4, 4, 4]
    assert one.embed.weight.equal(again.embed.weight)
    assert not one.embed.weight.equal(other.embed.weight)


def test_the_world_is_made_of_rows_of_plays_with_its_own_ngrams():
    place = world()
    assert place.rows.shape[1] == 32
    assert place.tokenizer.vocab_size == 256
    text = [
        place.tokenizer.decode(row) for row in choose_rows(place.rows, 50, torch.Generator().manual_seed(0))
    ]
    found = diversity(text, place.reference)
    assert found["unseen"] == 0
    assert 0 < found["rare"] < found["common"] <= 1
    assert place.tokenizer.decode(place.tokenizer.encode(place.held_out)) == place.held_out
    assert len(place.held_out) == 20_000
    unread = corpus()[1]
    assert all(place.held_out[i : i + 1_000] in unread for i in range(0, 20_000, 1_000))
