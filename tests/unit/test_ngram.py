"""mini.ngram: counts by hand, probabilities that sum to one."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mini.ngram import KneserNey


def test_bigram_by_hand():
    # abracadabra: a 5, b 2, c 1, d 1, r 2. Pairs ab 2, br 2, ra 2, ac 1, ca 1, ad 1, da 1: n1 = 4, n2 = 3, D = 4/10.
    # Unigram: n1 = 2, n2 = 2, D = 1/3. Different characters before a: 3, before each other: 1; n1 = 4, n2 = 0, D = 1.
    model = KneserNey(2).fit("abracadabra")
    uniform, unigram, bigram = model.probabilities("abra")
    assert uniform == pytest.approx([1 / 5] * 4)
    assert unigram == pytest.approx([(n - 1 / 3 + 1 / 3 * 5 / 5) / 11 for n in (5, 2, 2, 5)])
    b, r, a = 1 / 7, 1 / 7, 3 / 7  # lower order: (N - 1 + 1 · 5 · 1/5) / 7
    assert bigram == pytest.approx(
        [unigram[0], (2 - 0.4 + 0.4 * 3 * b) / 4, (2 - 0.4 + 0.4 * r) / 2, (2 - 0.4 + 0.4 * a) / 2]
    )
    assert model.bits_per_character("abra")[2] == pytest.approx(-np.log2(bigram).mean())


def test_an_unseen_context_falls_back_to_the_lower_order():
    # "cc" never occurred, so the trigram of "cca" is the lower order's p(a | c). Different pairs of "abcabcab": ab, bc,
    # ca; one character before each of a, b and c, so D = 1 and q_1 is uniform. Different trigrams: abc, bca, cab;
    # n1 = 3, n2 = 0, D = 1 again: q_2(a | c) = (1 - 1) / 1 + 1 · 1 / 1 · 1/3.
    assert KneserNey(3).fit("abcabcab").probabilities("cca")[3, 2] == pytest.approx(1 / 3)
    # The bigram itself counts: pairs ab 3, bc 2, ca 2; n1 = 0, D = 1/2: (2 - 1/2 + 1/2 · 1/3) / 2.
    assert KneserNey(2).fit("abcabcab").probabilities("cca")[2, 2] == pytest.approx(5 / 6)


@given(
    text=st.text("abcd", min_size=3, max_size=80),
    context=st.text("abcd", max_size=6),
    order=st.integers(1, 3),
)
@settings(deadline=None)
def test_probabilities_sum_to_one(text, context, order):
    model = KneserNey(order).fit(text)
    context = "".join(c for c in context if c in model.alphabet)
    last = np.stack([model.probabilities(context + c)[:, -1] for c in model.alphabet])
    assert (last > 0).all()
    assert last.sum(axis=0) == pytest.approx(np.ones(order + 1))


@given(text=st.text("ab \n", min_size=4, max_size=60), order=st.integers(1, 4))
@settings(deadline=None)
def test_lower_orders_do_not_depend_on_the_highest(text, order):
    bits = KneserNey(4).fit(text).bits_per_character(text)
    assert KneserNey(order).fit(text).bits_per_character(text) == pytest.approx(bits[: order + 1])
    assert bits[0] == pytest.approx(math.log2(len(set(text))))


def test_orders_help_on_real_text():
    from mini.data import plays

    model = KneserNey(5).fit(plays()["hamlet"])
    bits = model.bits_per_character("".join(c for c in plays()["macbeth"] if c in model.alphabet))
    assert all(high > low for high, low in itertools.pairwise(bits))


def test_refusals():
    with pytest.raises(ValueError, match="order=0 has nothing to count"):
        KneserNey(0)
    with pytest.raises(ValueError, match="the text has 2 characters, too few for order=3"):
        KneserNey(3).fit("ab")
    with pytest.raises(ValueError, match="order=27 is too high for 4 characters"):  # 5^28 > 2^63 > 5^27
        KneserNey(27).fit("abcd" * 60)
    assert KneserNey(26).fit("abcd" * 60).bits_per_character("abcd")[0] == 2
    with pytest.raises(ValueError, match="the text is empty"):
        KneserNey(2).fit("abab").bits_per_character("")
    with pytest.raises(ValueError, match="order=60 is too high"):
        KneserNey(60).fit("abcd" * 60)
    with pytest.raises(ValueError, match=r"'z' \(character 1 of the text\) is not in the training text"):
        KneserNey(2).fit("abab").probabilities("az")
