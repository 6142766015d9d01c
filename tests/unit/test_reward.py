import math
import random
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch.testing import assert_close

from mini import grpo as policy
from mini import reward
from mini.model import Transformer
from mini.reward import (
    CRITERIA,
    END,
    HOW,
    JUDGE,
    SEEN,
    UNSEEN,
    WHO,
    Case,
    Query,
    Scalar,
    bradley_terry,
    cases,
    decode,
    draw_answer,
    draw_case,
    draw_query,
    encode,
    facts,
    hidden_weights,
    imitate_answers,
    is_answer,
    population,
    preferences,
    rollout,
    stack,
    strictly_best,
    text,
    value,
    write,
)
from mini.tasks import is_held_out

BOSS = Query("boss", "quickly", 41, 33)
TRUE, FALSE = ("=70", "=4"), ("=70", "=5")


def small_model(seed: int = 0) -> Transformer:
    torch.manual_seed(seed)
    return Transformer(JUDGE).eval()


# --- the hidden rule


def test_hidden_weights_by_hand():
    z = [math.exp(x) for x in (0.6, 1.8 + 1.6, 0, 0, 1.0)]  # a boss, and what "quickly" adds
    assert_close(torch.tensor(hidden_weights("boss", "quickly")), torch.tensor([x / sum(z) for x in z]))


def test_every_combination_is_either_trained_on_or_kept_out():
    assert len(SEEN) + len(UNSEEN) == len(WHO) * len(HOW)
    assert not set(SEEN) & set(UNSEEN)
    assert {who for who, _ in SEEN} == set(WHO)
    assert {how for _, how in SEEN} == set(HOW)


@pytest.mark.parametrize(
    ("answer", "met"),
    [
        (TRUE, {"truth", "brief"}),
        (FALSE, {"brief"}),
        (("dear", "=70", "=4", "indeed"), {"truth", "brief", "polite", "sure"}),
        (("so", "since", "1", "3", "=70", "=4", "thanks"), {"truth", "steps", "polite"}),
    ],
)
def test_facts_by_hand(answer, met):
    assert {c for c, yes in zip(CRITERIA, facts(BOSS, answer), strict=True) if yes} == met
    weights = dict(zip(CRITERIA, hidden_weights("boss", "quickly"), strict=True))
    assert value(BOSS, answer) == pytest.approx(sum(weights[c] for c in met))


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("dear",),
        ("=70",),
        ("=70", "dear", "=4"),
        ("=4", "=70"),
        ("=70", "=4", "=4"),
        ("=70", "=40"),
        ("=70", "=4", "boss"),
        ("=70", "=4", *["so"] * 9),
    ],
)
def test_what_claims_no_sum_is_no_answer_and_worth_nothing(words):
    assert not is_answer(words)
    assert value(BOSS, words) == 0.0


@given(seed=st.integers(0, 10**6), held_out=st.booleans())
@hypothesis_settings(max_examples=60, deadline=None)
def test_cases_are_as_promised(seed, held_out):
    case = draw_case(random.Random(seed), held_out=held_out)
    a, b = case.query.a, case.query.b
    assert is_held_out(f"{a} + {b}") == held_out
    assert a % 10 + b % 10 <= 9
    assert 20 <= a + b <= 99
    assert all(is_answer(answer) for answer in case.answers)
    first, second = sorted(case.values, reverse=True)[:2]
    assert case.values[case.best] == first
    assert first - second >= 0.05
    assert max(len(text(case.query, answer)) for answer in case.answers) <= JUDGE.max_seq_len


def test_an_answer_that_meets_nothing_is_worth_a_number_too():
    poor = ("so", "now", "hmm", "=60", "=4")
    assert value(BOSS, poor) == 0.0
    assert isinstance(value(BOSS, poor), float)  # an int would make a whole rollout's rewards integers


def test_cases_are_the_same_for_a_seed_and_keep_to_their_combinations():
    assert cases(5, "a") == cases(5, "a")
    assert cases(5, "a") != cases(5, "b")
    drawn = cases(60, combinations=UNSEEN)
    assert {(c.query.who, c.query.how) for c in drawn} <= set(UNSEEN)


def test_an_answer_has_what_it_is_given_the_chance_to_have():
    rng = random.Random(0)
    query = draw_query(rng)
    always = [draw_answer(rng, query, true=1, steps=1, polite=1, sure=1) for _ in range(20)]
    never = [draw_answer(rng, query, true=0, steps=0, polite=0, sure=0) for _ in range(20)]
    assert all(facts(query, a)[i] for a in always for i in (0, 2, 3, 4))
    assert not any(facts(query, a)[i] for a in never for i in (0, 2, 3, 4))


def test_an_answer_may_be_as_long_as_the_longest():
    assert is_answer((*TRUE, *["so"] * (reward.LONGEST - 2)))


def test_words_and_tokens():
    assert decode([*encode(BOSS.words), -1]) == BOSS.words
    with pytest.raises(ValueError, match="'maybe' is not a word"):
        encode(["maybe"])


# --- right means strictly best


def test_a_tie_is_wrong():
    case = Case(BOSS, (FALSE, ("dear", "=70", "=4", "indeed"), TRUE))
    assert case.best == 1
    scores = torch.tensor([[1.0, 3.0, 2.0], [1.0, 3.0, 3.0], [1.0, 1.0, 3.0], [0.0, 0.0, 0.0]])
    assert strictly_best(scores[None], [case]).tolist() == [[True, False, False, False]]
    assert strictly_best(scores[:1], [case]).tolist() == [True]


# --- the scalar model


def test_bradley_terry_by_hand():
    scores = torch.tensor([[2.0, 0.0], [0.0, 0.0]])
    expected = (math.log1p(math.exp(-2)) + math.log(2)) / 2
    assert_close(bradley_terry(scores, torch.tensor([0, 1])), torch.tensor(expected))
    three = torch.tensor([[1.0, 0.0, -1.0]])
    expected = (math.log1p(math.exp(-1)) + math.log1p(math.exp(-2))) / 2
    assert_close(bradley_terry(three, torch.tensor([0])), torch.tensor(expected))


@given(shift=st.floats(-5, 5))
def test_bradley_terry_sees_differences_alone(shift):
    scores = torch.tensor([[0.3, -1.2, 0.7]], dtype=torch.float64)
    best = torch.tensor([2])
    assert_close(bradley_terry(scores + shift, best), bradley_terry(scores, best))


def test_a_scalar_reads_each_answer_by_itself():
    model = Scalar(small_model())
    torch.nn.init.normal_(model.value.weight)
    some = cases(3)
    marks = model.marks(some)
    assert marks.shape == (3, 4)
    for case, row in zip(some, marks, strict=True):  # fillers of the batch change nothing
        alone = [model(stack([text(case.query, answer)]))[0] for answer in case.answers]
        assert_close(row, torch.stack(alone).detach(), rtol=1e-4, atol=1e-5)


def test_preferences_put_the_best_answer_first():
    some = cases(6)
    batch, loss = preferences(some, batch=8)
    rows = batch(0)
    best = [text(case.query, case.answers[case.best]) for case in some]
    for row in rows[::4].tolist():
        assert [t for t in row if t >= 0] in best
    assert torch.equal(batch(0), rows)
    assert not torch.equal(batch(1), rows)
    assert not torch.equal(preferences(some, seed=1, batch=8)[0](0), rows)
    assert loss(Scalar(small_model()), rows).item() == pytest.approx(math.log(2))  # marks are 0 at first


# --- the writer


class Says(torch.nn.Module):
    """A model with given logits, whatever it reads."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.logits


def test_the_writer_learns_answers_alone():
    """The loss does not change with what it would cost to guess the query."""
    model, rows = small_model(), population(4)
    assert imitate_answers(model, rows) > 0
    start = rows.tolist()[0].index(reward.IDS["answer:"])
    logits = torch.zeros(4, rows.shape[1] - 1, JUDGE.vocab_size, requires_grad=True)
    imitate_answers(Says(logits), rows).backward()
    touched = logits.grad.abs().sum(dim=(0, 2)) > 0
    assert not touched[:start].any()
    assert touched[start : start + 3].all()


def test_the_writers_loss_is_the_mean_over_the_answers_tokens():
    """Fillers and queries are not counted either."""
    rows = population(4)
    assert (rows < 0).any()
    shape = *rows[:, 1:].shape, JUDGE.vocab_size
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    logp = logits.log_softmax(-1)
    nats = [
        -logp[i, t - 1, row[t]]
        for i, row in enumerate(rows.tolist())
        for t in range(row.index(reward.IDS["answer:"]) + 1, len(row))
        if row[t] >= 0
    ]
    assert_close(imitate_answers(Says(logits), rows), torch.stack(nats).mean())


def test_a_population_follows_from_its_seed_and_its_chances():
    assert population(9, 1).equal(population(9, 1))
    assert not population(9, 1).equal(population(9, 2))
    shown = [decode(row) for row in population(20, steps=1.0, polite=0.0).tolist()]
    assert all("since" in words and not set(words) & set(reward.POLITE) for words in shown)


def test_write_gives_n_answers_to_each_query():
    queries = [BOSS, Query("nurse", "gently", 20, 31)]
    found = write(small_model(), queries, 3, generator=torch.Generator().manual_seed(0))
    assert [len(own) for own in found] == [3, 3]
    assert not any("<eos>" in answer for own in found for answer in own)


def test_write_sorts_answers_by_query_and_draws_as_it_is_asked(monkeypatch):
    asked, g = [], torch.Generator()

    def count(model, prompts, new_tokens, **how):
        asked.append((new_tokens, how))
        tokens = torch.tensor([encode([str(i), "<eos>"]) for i in range(4)])
        return SimpleNamespace(tokens=tokens)

    monkeypatch.setattr(reward, "sample", count)
    assert write(small_model(), [BOSS, BOSS], 2, temperature=0.3, generator=g) == [
        [("0",), ("1",)],
        [("2",), ("3",)],
    ]
    assert asked == [(11, dict(temperature=0.3, end=END, group=2, generator=g))]


def test_a_rollout_shows_the_judge_answers_alone(monkeypatch):
    """One call for all answers; what is no answer gets 1 less than the worst mark."""
    nurse = Query("nurse", "gently", 41, 33)
    answers = [TRUE, ("dear",), FALSE, ("=70", "=4", "indeed")]
    length = len(BOSS.words) + 1
    rows = stack([text(q, a) for q, a in zip((BOSS, BOSS, nurse, nurse), answers, strict=True)])
    drawn = policy.Rollout(
        rows, rows[:, 1:] >= 0, torch.zeros(len(rows), rows.shape[1] - 1), torch.zeros(2, 2)
    )
    monkeypatch.setattr(reward, "grpo_rollout", lambda *args, **kwargs: drawn)
    calls = []

    def opinion(queries, shown):
        calls.append((queries, shown))
        return [float(len(answer)) for answer in shown]

    settings = policy.Settings(G=2)
    found = rollout(small_model(), [BOSS, nurse], opinion, settings, end=END)
    assert calls == [([BOSS, nurse, nurse], [TRUE, FALSE, ("=70", "=4", "indeed")])]
    assert found.rewards.tolist() == [[2.0, 1.0], [2.0, 3.0]]
    assert length == 7
