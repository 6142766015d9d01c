"""Estimators against every subset counted by hand, closed forms against many draws, budgets token by token."""

from collections import Counter
from itertools import combinations, pairwise
from math import comb

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mini.budget import forward_flops
from mini.model import Config, Transformer
from mini.test_time import (
    BLANK,
    Tags,
    accepted,
    answer_now,
    best_of_k,
    continue_rows,
    draw_another,
    generation_flops,
    loophole,
    maj_at_k,
    pass_at_k,
    think_at_most,
    think_on,
    weighted_vote,
)

from .test_model import random_model

answer_rows = st.integers(1, 8).flatmap(
    lambda n: st.tuples(
        st.lists(st.integers(-1, 3), min_size=n, max_size=n), st.integers(1, n), st.integers(0, 3)
    )
)


def over_subsets(n, k, value):
    """The mean of value(places) over all subsets of k of n places."""
    return sum(map(value, combinations(range(n), k))) / comb(n, k)


def vote(answers, right, weights=None):
    """The chance that a vote with ties broken at random is right."""
    tally = Counter()
    for i, a in enumerate(answers):
        if a != BLANK:
            tally[a] += 1 if weights is None else weights[i]
    top = [a for a, w in tally.items() if w > max(tally.values()) - 1e-9]
    return (right in top) / len(top) if top else 0.0


@given(answer_rows)
def test_pass_at_k_is_the_mean_over_all_subsets(case):
    answers, k, right = case
    n, good = len(answers), [a == right for a in answers]
    expected = over_subsets(n, k, lambda places: any(good[i] for i in places))
    assert pass_at_k(n, torch.tensor(sum(good)), k).item() == pytest.approx(expected, abs=1e-12)


@given(answer_rows)
@settings(deadline=None)
def test_maj_at_k_is_the_mean_over_all_subsets(case):
    answers, k, right = case
    expected = over_subsets(len(answers), k, lambda places: vote([answers[i] for i in places], right))
    got = maj_at_k(torch.tensor([answers]), torch.tensor([right]))
    assert got.shape == (1, len(answers))
    assert got[0, k - 1].item() == pytest.approx(expected, abs=1e-12)


@given(answer_rows, st.data())
@settings(deadline=None)
def test_best_of_k_is_the_mean_over_all_subsets(case, data):
    answers, k, right = case
    n, good = len(answers), [a == right for a in answers]
    scores = data.draw(st.lists(st.integers(0, 3), min_size=n, max_size=n))

    def pick(places):
        top = [i for i in places if scores[i] == max(scores[j] for j in places)]
        return sum(good[i] for i in top) / len(top)

    got = best_of_k(torch.tensor([scores]).float(), torch.tensor([good]), k)
    assert got.item() == pytest.approx(over_subsets(n, k, pick), abs=1e-12)


@given(st.integers(1, 64), st.data())
def test_pass_at_k_has_its_bounds_and_never_falls(n, data):
    c = torch.tensor(data.draw(st.integers(0, n)))
    curve = [pass_at_k(n, c, k).item() for k in range(1, n + 1)]
    assert curve[0] == pytest.approx(c.item() / n, abs=1e-12)
    assert all(low <= high + 1e-12 for low, high in pairwise(curve))
    assert 0 <= curve[0] <= curve[-1] == float(c > 0)
    if c < n:  # and it grows with c
        k = data.draw(st.integers(1, n))
        assert curve[k - 1] - 1e-12 <= pass_at_k(n, c + 1, k).item() <= 1


@given(st.lists(st.integers(-1, 9), min_size=1, max_size=64), st.integers(0, 9))
@settings(deadline=None)
def test_a_vote_of_one_is_pass_at_1_and_no_vote_beats_pass_at_k(answers, right):
    n, c = len(answers), torch.tensor(answers.count(right))
    majority = maj_at_k(torch.tensor([answers]), torch.tensor([right]))[0]
    assert majority[0].item() == pytest.approx(c.item() / n, abs=1e-12)
    assert majority[-1].item() == pytest.approx(vote(answers, right), abs=1e-9)
    assert all(majority[k - 1] <= pass_at_k(n, c, k) + 1e-9 for k in range(1, n + 1))


def test_scores_that_know_or_do_not_know_the_answer():
    right = torch.tensor([[True, False, False, True, False, False]])
    for k in range(1, 7):
        oracle = best_of_k(right.float(), right, k)
        torch.testing.assert_close(oracle, pass_at_k(6, right.sum(1), k))
        blind = best_of_k(torch.zeros(1, 6), right, k)
        torch.testing.assert_close(blind, torch.tensor([2 / 6], dtype=torch.float64))


def test_a_draw_without_right_samples_has_the_stated_bias():
    """E[1 - (1 - c/n)^k] is below 1 - (1 - p)^k, and E[pass@k] is it: summed over all c, with p = 0.1, n = k = 10."""
    n, k, p = 10, 10, 0.1
    chance = torch.tensor([comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)], dtype=torch.float64)
    c = torch.arange(n + 1)
    assert (chance * pass_at_k(n, c, k)).sum().item() == pytest.approx(1 - (1 - p) ** k, abs=1e-12)
    assert (chance * (1 - (1 - c / n) ** k)).sum() < 1 - (1 - p) ** k - 0.1


def test_a_weighted_vote_is_near_the_mean_over_all_subsets():
    answers, right = (
        torch.tensor([[0, 1, 1, 2, 0, BLANK, 1], [3, 3, 0, 0, 0, BLANK, BLANK]]),
        torch.tensor([0, 3]),
    )
    weights = torch.tensor([[3.0, 1.0, 1.0, 2.0, 0.5, 9.0, 1.0], [2.0, 1.0, 1.0, 1.0, 1.0, 5.0, 5.0]])
    g = torch.Generator().manual_seed(0)
    for k in (1, 3, 4, 7):
        got = weighted_vote(answers, right, weights, k, draws=4000, generator=g)
        equal = weighted_vote(answers, right, torch.ones(2, 7), k, draws=4000, generator=g)
        torch.testing.assert_close(equal, maj_at_k(answers, right)[:, k - 1], atol=0.04, rtol=0)
        for row in range(2):
            a, w = answers[row].tolist(), weights[row].tolist()
            expected = over_subsets(
                7, k, lambda s, a=a, w=w, r=row: vote([a[i] for i in s], right[r].item(), [w[i] for i in s])
            )
            assert got[row].item() == pytest.approx(expected, abs=0.04)


def test_closed_forms_of_imperfect_verifiers():
    """Many prompts with one p: the closed form is the mean of the exact estimate, within 4 standard errors."""
    g = torch.Generator().manual_seed(0)
    p, n = 0.3, 16
    right = torch.rand(4000, n, generator=g) < p
    luck = torch.rand(right.shape, generator=g)
    passes = torch.where(right, luck > 0.25, luck < 0.1).float()
    fooled = torch.where(right, 1.0, torch.where(luck < 0.06, 2.0, 0.0))
    for scores, formula in (
        (passes, lambda k: accepted(torch.tensor(p), k, 0.1, 0.25)),
        (fooled, lambda k: loophole(torch.tensor(p), k, 0.06)),
    ):
        for k in (1, 2, 5, 16):
            measured = best_of_k(scores, right, k)
            error = (measured.mean() - formula(k)).abs()
            assert error < 4 * measured.std() / 4000**0.5


def test_perfect_verifiers_are_pass_at_k():
    p = torch.tensor([0.0, 0.2, 1.0])
    for k in (1, 7):
        torch.testing.assert_close(accepted(p, k, 0.0), 1 - (1 - p) ** k)
        torch.testing.assert_close(loophole(p, k, 0.0), 1 - (1 - p) ** k)
    precision = 0.2 / (0.2 + 0.8 * 0.1)
    assert accepted(torch.tensor(0.2), 500, 0.1).item() == pytest.approx(precision)
    assert loophole(torch.tensor(0.2), 500, 0.05).item() < 1e-6


def test_bad_requests_are_refused():
    c = torch.tensor([1, 3])
    with pytest.raises(ValueError, match="k=5 of n=4"):
        pass_at_k(4, c, 5)
    with pytest.raises(ValueError, match="k=0"):
        pass_at_k(4, c, 0)
    with pytest.raises(ValueError, match="n=2 samples right"):
        pass_at_k(2, c, 1)
    with pytest.raises(ValueError, match="n=4 samples right"):
        pass_at_k(4, torch.tensor([-1, 3]), 1)
    with pytest.raises(ValueError, match="k=3 of n=2"):
        best_of_k(torch.zeros(1, 2), torch.zeros(1, 2, dtype=torch.bool), 3)
    with pytest.raises(ValueError, match="have to be above 0"):
        weighted_vote(torch.zeros(1, 2, dtype=torch.long), torch.tensor([0]), torch.tensor([[0.0, 1.0]]), 1)
    with pytest.raises(ValueError, match=r"false_pass=5"):
        accepted(torch.tensor(0.5), 2, 5)
    with pytest.raises(ValueError, match=r"rate=-1"):
        loophole(torch.tensor(0.5), 2, -1)


# --- thinking budgets: a model that only counts up, so that each token is known

SHUT, ANSWER, END = 20, 21, 22
TAGS = Tags(think_end=SHUT, answer=ANSWER, end=END)


class Counting(Transformer):
    """Says t + 1 after the token t, up to 9, then </think>; after that <answer>, 15, the end."""

    def __init__(self):
        super().__init__(Config(vocab_size=23, dim=4, n_layers=1, n_heads=1, inter_dim=4, max_seq_len=40))
        self.then = torch.arange(1, 24)
        self.then[9], self.then[SHUT], self.then[ANSWER], self.then[15] = SHUT, ANSWER, 15, END

    def hidden(self, tokens, cache=None, pad=None):
        return tokens

    def logits(self, tokens):
        second = torch.full((len(tokens), 23), -1e9)
        second[:, 6] = -1e3  # where the first choice is banned
        return second.scatter(1, self.then[tokens][:, None], 0.0)


def test_a_row_stops_at_its_end_in_any_batch(monkeypatch):
    rows = [[3], [7], [1, 2, 8]]
    expected = [[4, 5, 6, 7, 8, 9, SHUT], [8, 9, SHUT], [9, SHUT]]
    for batch in (1, 2, 3):
        monkeypatch.setattr("mini.test_time.BATCH", batch)
        assert continue_rows(Counting(), rows, 10, SHUT) == expected
    assert continue_rows(Counting(), [], 10, SHUT) == []


def test_thinking_is_cut_at_its_budget_and_an_answer_begun():
    model, tail = Counting(), [ANSWER, 15, END]
    assert think_at_most(model, [[3], [8]], 2, TAGS, 3) == [[4, 5, SHUT, *tail], [9, SHUT, *tail]]
    assert think_at_most(model, [[3]], 7, TAGS, 3) == [[4, 5, 6, 7, 8, 9, SHUT, *tail]]
    assert answer_now(model, [[3]], [[]], TAGS, 3) == [[SHUT, *tail]]  # no thought at all
    with pytest.raises(ValueError, match="max_new_tokens=0"):
        think_at_most(model, [[3]], 0, TAGS, 3)


def test_thinking_goes_on_from_the_second_choice_instead_of_its_end():
    tail = [SHUT, ANSWER, 15, END]
    rounds = list(think_on(Counting(), [[7], [8]], 2, 8, TAGS, 3))
    assert rounds[0] == [[8, 9, *tail], [9, *tail]]
    assert rounds[1] == [[8, 9, 6, 7, 8, 9, *tail], [9, 6, 7, 8, 9, *tail]]
    assert rounds[2] == [[8, 9, 6, 7, 8, 9, 6, 7, 8, 9, *tail], [9, 6, 7, 8, 9, 6, 7, 8, 9, *tail]]


def test_who_goes_on_can_be_chosen_and_a_full_round_is_the_last():
    tail = [SHUT, ANSWER, 15, END]
    stays = list(think_on(Counting(), [[7], [8]], 1, 8, TAGS, 3, again=lambda t: len(t) > 1))
    assert stays[1] == [[8, 9, 6, 7, 8, 9, *tail], [9, *tail]]
    full = list(think_on(Counting(), [[7], [8]], 2, 3, TAGS, 3))
    assert full[1][0] == full[2][0] == [8, 9, 6, 7, 8, 9, *tail]  # cut off, so it cannot go on


def test_thinking_goes_on_while_another_round_fits():
    rounds = [row for (row,) in think_on(Counting(), [[7]], 9, 8, TAGS, 3)]
    lengths = [len(row) for row in rounds]  # 6, and 4 more each round, as long as 27 positions are not passed
    assert lengths == [6, 10, 14, 18, 22, 26, 30, 30, 30, 30]
    for prompt, last in (([1, 2, 3, 7], 30), ([1, 2, 3, 4, 7], 26)):  # just 27, and one more
        *_, (row,) = think_on(Counting(), [prompt], 9, 8, TAGS, 3)
        assert len(row) == last


def test_another_token_is_drawn_from_all_but_one():
    model, rows = random_model(), [[1, 2], [3], [4, 5, 6]] * 40
    drawn = draw_another(model, rows, 7, torch.Generator().manual_seed(0))
    assert 7 not in drawn
    assert len(set(drawn)) > 10
    free = draw_another(model, rows, 8, torch.Generator().manual_seed(0))
    assert 7 in free


def test_another_token_is_drawn_by_what_each_row_says_alone(monkeypatch):
    model, rows, seen = random_model(), [[1, 2], [3], [4, 5, 6]], []

    def first(logits, *args):
        seen.extend(logits)
        return logits.argmax(dim=-1)

    monkeypatch.setattr("mini.test_time.choose", first)
    monkeypatch.setattr("mini.test_time.BATCH", 2)
    assert len(draw_another(model, rows, 7)) == 3
    for row, logits in zip(rows, seen, strict=True):
        expected = model(torch.tensor([row]))[0, -1].detach()
        expected[7] = -torch.inf
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


def test_budgets_with_a_transformer():
    model = random_model()
    tags = Tags(think_end=1, answer=2, end=3)
    prompts = [[4, 5], [6], [7, 8, 9]]
    cut = think_at_most(model, prompts, 6, tags, 4, torch.Generator().manual_seed(0))
    for response in cut:
        shut = response.index(1)
        assert shut <= 6
        assert len(response) <= 6 + 2 + 4
        assert shut < 6 or response[6:8] == [1, 2] or response[5] == 1
    with pytest.raises(ValueError, match="max_seq_len"):
        think_at_most(model, prompts, 10_000, tags, 4)


def test_flops_of_a_generation_count_each_token_once():
    config = Config(vocab_size=11, dim=8, n_layers=2, n_heads=2, inter_dim=16)
    step_by_step = sum(
        forward_flops(config) + (forward_flops(config, seq_len=2 * t + 1) - forward_flops(config))
        for t in range(5 + 4 - 1)  # token t sees t + 1 keys, the mean over a sequence of 2t + 1
    )
    assert generation_flops(config, 5, 4) == pytest.approx(step_by_step)
