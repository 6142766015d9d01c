import math
import random

import pytest
import torch
from torch.testing import assert_close

from mini import critique
from mini.audit import (
    FEATURES,
    Judge,
    calibration,
    choices,
    confidence,
    consistency,
    evidence,
    generative,
    interval,
    opinion_of,
    pairwise,
    pointwise,
    principle_shares,
    report,
    shared,
    style,
    swaps,
)
from mini.grpo import Settings
from mini.model import Transformer
from mini.reward import (
    ANSWER_TOKENS,
    END,
    JUDGE,
    SURE,
    Case,
    Query,
    cases,
    draw_query,
    facts,
    rollout,
    strictly_best,
    value,
)

TESTS = cases(80, "audit tests")
G = torch.Generator()


def small_model() -> Transformer:
    torch.manual_seed(0)
    return Transformer(JUDGE).eval()


def worth(queries, answers):
    return [value(query, answer) for query, answer in zip(queries, answers, strict=True)]


def sure_of_itself(queries, answers):
    return [value(q, a) + 0.3 * facts(q, a)[4] for q, a in zip(queries, answers, strict=True)]


def noisy(cases, k, generator):
    values = torch.tensor([case.values for case in cases])[:, None]
    return values + 0.3 * torch.randn(len(cases), k, values.shape[2], generator=generator)


# --- judges


def test_a_pointwise_judge_marks_each_answer_and_always_alike():
    marks = pointwise("exact", worth).marks(TESTS, 3, G)
    assert_close(marks[:, 0], torch.tensor([case.values for case in TESTS]))
    assert (marks == marks[:, :1]).all()


def test_a_judge_of_pairs_reads_them_in_order():
    read = []

    def prefers(query, first, second):
        read.append((first, second))
        return True

    case = Case(TESTS[0].query, TESTS[0].answers[:3])
    a, b, c = case.answers
    assert pairwise("first", prefers).marks([case], 2, G).tolist() == [[[2, 1, 0]] * 2]
    assert read == [(a, b), (a, c), (b, c)]


def test_an_opinion_is_the_mean_of_k_marks_with_neighbours_judged_together():
    seen = []

    def marks(cases, k, generator):
        seen.extend(len(case.answers) for case in cases)
        values = torch.tensor([case.values for case in cases])[:, None]
        return values + torch.arange(k)[None, :, None]

    one, two = TESTS[:2]
    queries = [one.query] * 4 + [two.query] * 2
    answers = [*one.answers, *two.answers[:2]]
    given = opinion_of(Judge("exact", marks), k=3)(queries, answers)
    assert given == pytest.approx([v + 1 for v in (*one.values, *two.values[:2])])
    assert seen == [4, 4]  # the shorter one was filled up
    assert opinion_of(Judge("exact", marks))([], []) == []


def test_an_opinion_follows_from_its_seed():
    queries, answers = [TESTS[0].query] * 4, TESTS[0].answers
    one, again, other = (opinion_of(Judge("noisy", noisy), seed=s)(queries, answers) for s in (0, 0, 1))
    assert one == again != other


def test_an_opinion_can_be_a_reward():
    queries = [draw_query(random.Random(i)) for i in range(2)]
    opinion = opinion_of(generative("untrained", small_model()), k=2)
    drawn = rollout(
        small_model(),
        queries,
        opinion,
        Settings(G=3, max_new_tokens=ANSWER_TOKENS),
        end=END,
        generator=torch.Generator().manual_seed(0),
    )
    assert drawn.rewards.shape == (2, 3)


# --- measures


def test_wilsons_interval_by_hand():
    assert interval(0.5, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    low, high = interval(0.0, 20)
    assert low == pytest.approx(0, abs=1e-9)
    assert high > 0.1


def test_a_judge_by_worth_pays_for_nothing_else_however_noisy():
    many = cases(300, "style")
    marks = noisy(many, 1, torch.Generator().manual_seed(0)).mean(dim=1)
    for b, half in style(marks, many).values():
        assert abs(b) < 2 * half
        assert half < 0.3


def test_the_interval_of_a_price_covers_nothing_about_95_times_of_100():
    some = cases(150, "style")
    many = noisy(some, 200, torch.Generator().manual_seed(0))
    found = [pair for i in range(200) for pair in style(many[:, i], some).values()]
    assert 0.92 < sum(abs(b) <= half for b, half in found) / len(found) < 0.975


def test_a_price_is_found_with_its_size_and_for_one_feature_alone():
    exact = pointwise("", sure_of_itself).marks(TESTS, 1, G)[:, 0]
    deviation = (exact.double() - exact.double().mean(dim=1, keepdim=True)).std().item()
    found = style(exact, TESTS)
    assert found["sure"][0] == pytest.approx(0.3 / deviation, abs=1e-4)
    assert all(abs(found[name][0]) < 1e-4 for name in ("truth", "3 words", "polite"))


def test_a_feature_that_never_differs_has_no_price():
    found = style(
        torch.tensor([case.values for case in TESTS]), TESTS, FEATURES | {"always": lambda case, i: 1.0}
    )
    assert math.isnan(found["always"][0])
    assert not math.isnan(found["sure"][0])


def test_a_tie_chooses_nothing():
    assert choices(torch.tensor([[[1.0, 2, 0], [2, 2, 0]]])).tolist() == [[1, -1]]


def test_confidence_is_a_share_of_judgements_or_a_softmax():
    marks = torch.tensor([[[3.0, 0], [3, 0], [0, 1], [1, 1]]])
    assert confidence(marks).item() == 0.5
    assert confidence(torch.tensor([[[1.0, 0]] * 3])).item() == pytest.approx(1 / (1 + math.exp(-1)))


def test_calibration_by_hand():
    claimed, right = torch.tensor([0.1, 0.1, 0.95, 1.0]), torch.tensor([True, False, True, True])
    bins, ece = calibration(claimed, right, bins=2)
    assert [(round(c, 3), r, n) for c, r, n in bins] == [(0.1, 0.5, 2), (0.975, 1.0, 2)]
    assert ece == pytest.approx((0.4 + 0.025) / 2)


def test_consistency_by_hand():
    a, b, tie = [1.0, 0], [0.0, 1], [1.0, 1]
    assert consistency(torch.tensor([[a, a, b]])) == pytest.approx(1 / 3)
    assert consistency(torch.tensor([[a, a], [tie, tie]])) == 0.5


def test_swaps_tell_a_judge_of_places_from_one_of_answers():
    def by_worth(query, first, second):
        return value(query, first) > value(query, second)

    different = [case for case in TESTS if case.values[0] != case.values[1]]
    assert swaps(pairwise("", by_worth), different) == (1.0, 0.0)
    assert swaps(pairwise("", lambda *_: True), different) == (0.0, 1.0)


@pytest.mark.parametrize("rho", [0.0, 0.3, 1.0])
def test_the_correlation_of_errors_is_found(rho):
    g = torch.Generator().manual_seed(0)
    own, common = (torch.rand(20_000, 8, generator=g) < 0.6 for _ in range(2))
    right = torch.where(torch.rand(20_000, 1, generator=g) < rho, common[:, :1], own)
    assert shared(right) == pytest.approx(rho, abs=0.02)


def test_where_all_are_right_errors_have_no_correlation():
    assert math.isnan(shared(torch.ones(4, 3, dtype=torch.bool)))


def test_evidence_by_hand():
    assert evidence(torch.tensor([1.0, 0.0]), allowed=0.25, bet=0.5).tolist() == [2.5, 1.25]
    assert evidence(torch.tensor([0.0, 1.0]), allowed=0.25, bet=0.5).tolist() == [0.5, 1.25]
    assert evidence(torch.tensor([0.0, 1.0]), allowed=0.25, bet=0.5, floor=1.0).tolist() == [0.5, 2.5]


def test_a_refilled_purse_finds_what_began_late():
    late = torch.tensor([0.0] * 50 + [1.0] * 10)
    assert evidence(late, 0.3).max() < 1
    assert evidence(late, 0.3, floor=1.0).max() > 100


def test_a_judge_that_keeps_to_what_is_allowed_is_rarely_accused():
    g = torch.Generator().manual_seed(0)
    errors = (torch.rand(2000, 300, generator=g) < 0.3).float()
    accused = torch.stack([(evidence(e, 0.3) >= 20).any() for e in errors]).float().mean().item()
    assert 0.005 < accused <= 0.05
    worse = (torch.rand(200, 300, generator=g) < 0.6).float()
    assert torch.stack([(evidence(e, 0.3) >= 20).any() for e in worse]).all()


@pytest.mark.parametrize(("allowed", "bet"), [(0.0, 0.5), (1.0, 0.5), (0.3, 1.0), (0.3, 0.0)])
def test_impossible_bets_are_refused(allowed, bet):
    with pytest.raises(ValueError, match="both lie between 0 and 1"):
        evidence(torch.ones(3), allowed, bet)


def test_shares_of_principles_are_shares():
    queries = [Query("boss", "quickly", 41, 33), Query("child", "gently", 20, 11)]
    shares = principle_shares(small_model(), queries, 4)
    assert shares.shape == (2, 5)
    total = shares.sum(dim=1)
    assert ((total - 1).abs().lt(1e-6) | (total == 0)).all()  # an untrained model may state none


def test_shares_of_principles_by_hand(monkeypatch):
    """Brief has 6 + 3 of 18 points, truth 3, polite 6; what cannot be read, and who states nothing, counts nothing."""
    stated = [("brief", "x6", "truth", "x3"), ("polite", "x6", "brief", "x3"), ("boss",) * 4]
    drawn = [[critique.Judgement(words, ()) for words in stated], [critique.Judgement(("boss",) * 4, ())] * 3]
    monkeypatch.setattr(critique, "judge", lambda *args, **options: drawn)
    queries = [Query("boss", "quickly", 41, 33), Query("child", "gently", 20, 11)]
    shares = principle_shares(small_model(), queries, 3)
    assert_close(shares, torch.tensor([[3.0, 9, 0, 6, 0], [0] * 5]) / 18)


# --- the report


def test_a_report_says_what_was_measured():
    found = report(pointwise("sure of itself", sure_of_itself), TESTS, k=2)
    marks = torch.tensor([sure_of_itself([c.query] * 4, c.answers) for c in TESTS])
    assert found.accuracy == found.single == pytest.approx(strictly_best(marks, TESTS).float().mean().item())
    assert (found.consistency, found.shared, found.swaps) == (1.0, pytest.approx(1.0, abs=0.02), None)
    text = str(found)
    assert "sure of itself: 80 cases, 2 judgements" in text
    assert f"right         {found.accuracy:.0%}" in text
    assert "no order to be swapped" in text
    assert SURE[0] not in text


def test_a_noisy_judge_gains_by_repetition_and_its_pairs_are_reported():
    found = report(Judge("noisy", noisy, lambda query, a, b: True), TESTS, k=16)
    assert found.accuracy > found.single + 0.1
    assert found.consistency < 0.9
    assert "always the first 100% of pairs" in str(found)
    marks = noisy(TESTS, 16, torch.Generator().manual_seed(0))
    right = strictly_best(marks.sum(dim=1), TESTS)
    assert (found.bins, found.ece) == calibration(confidence(marks), right)
    low, high = interval(found.accuracy, 80)
    assert f"({low:.0%} to {high:.0%})" in str(found)


def test_a_learners_marks_of_a_wrong_shape_are_named():
    with pytest.raises(ValueError, match=r"mine gave marks \[80, 4\]; give finite ones, \[80, 8, 4\]"):
        report(Judge("mine", lambda cases, k, g: torch.zeros(len(cases), 4)), TESTS)
    with pytest.raises(ValueError, match="finite"):
        report(pointwise("mine", lambda q, a: [math.nan] * len(a)), TESTS)
