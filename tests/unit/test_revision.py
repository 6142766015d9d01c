import itertools
import random

import pytest
import torch

from mini.critique import corrected, revised, write_critique
from mini.reward import CRITERIA, Query, best_of, draw_answer, draw_query, facts, is_answer, kl_best_of

BOSS = Query("boss", "quickly", 41, 33)


def test_best_of_is_the_mean_over_all_choices():
    g = torch.Generator().manual_seed(0)
    marks, values = torch.rand(3, 6, generator=g), torch.rand(3, 6, generator=g)
    for n in range(1, 7):
        for row, own in enumerate(best_of(marks, values, n).tolist()):
            picks = [max(s, key=lambda i: marks[row, i]) for s in itertools.combinations(range(6), n)]
            assert own == pytest.approx(sum(values[row, i].item() for i in picks) / len(picks), abs=1e-5)
    with pytest.raises(ValueError, match="n=7: there are 6"):
        best_of(marks, values, 7)


def test_of_equal_marks_the_later_answer_is_the_best():
    assert best_of(torch.zeros(1, 3), torch.tensor([[1.0, 2.0, 4.0]]), 3).tolist() == [4.0]


def test_kl_is_that_of_the_largest_of_n_uniform_numbers():
    u = (torch.arange(400_000, dtype=torch.float64) + 0.5) / 400_000  # its density is n u^(n-1)
    for n in (1, 2, 4, 64):
        density = n * u ** (n - 1)
        assert kl_best_of(n) == pytest.approx(torch.xlogy(density, density).mean().item(), abs=1e-3)
    with pytest.raises(ValueError, match="n=0"):
        kl_best_of(0)


def test_corrected_takes_what_was_computed():
    units = ["truth", "70", "70", "4", "5", "no", "polite", "none", "no", "1/10", "<eos>"]
    assert corrected(("so", "=70", "=5", "surely"), units) == ("so", "=70", "=4", "surely")
    tens = ["polite", "none", "no", "truth", "70", "80", "no", "1/10", "<eos>"]
    assert corrected(("=80", "=4"), tens) == ("=70", "=4")
    assert corrected(("=70", "=5"), ["brief", "two", "yes", "sure", "none", "no", "5/10", "<eos>"]) == (
        "=70",
        "=5",
    )


def test_revised_repairs_what_is_named_and_stays_an_answer():
    rng = random.Random(0)
    for _ in range(300):
        query = draw_query(rng)
        answer, names = draw_answer(rng, query), rng.sample(CRITERIA, 2)
        principles, after = ((names[0], 6), (names[1], 3)), answer
        for _ in range(2):  # where both digits are wrong, the first check stops at the tens
            after = revised(query, after, write_critique(query, after, principles))
        assert is_answer(after)
        met = dict(zip(CRITERIA, facts(query, after), strict=True))
        if "brief" not in names:
            assert met[names[0]]
            assert met[names[1]]
        untouched = [n for n in met if n not in names and n not in ("brief", "steps")]
        before = dict(zip(CRITERIA, facts(query, answer), strict=True))
        assert all(met[n] == before[n] for n in untouched)


def test_repairs_by_hand():
    steps = ["steps", "none", "no", "polite", "none", "no", "1/10", "<eos>"]
    assert revised(BOSS, ("so", "=70", "=4"), steps) == ("dear", "so", "since", "1", "3", "=70", "=4")
    sure = ["sure", "none", "no", "brief", "three", "yes", "4/10", "<eos>"]
    assert revised(BOSS, ("=70", "=4", "now"), sure) == ("=70", "=4", "surely", "now")


def test_revised_leaves_alone_what_it_cannot_read():
    assert revised(BOSS, ("=70", "=5"), ("truth", "yes")) == ("=70", "=5")
    brief = ["brief", "six", "no", "sure", "surely", "yes", "4/10", "<eos>"]
    assert revised(BOSS, ("so", "since", "1", "3", "=70", "=4", "surely"), brief) == ("=70", "=4", "surely")
