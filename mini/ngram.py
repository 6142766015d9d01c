"""The baselines of chapter 02: how well do counts alone predict the next character?"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int64
from numpy import ndarray


class Table(NamedTuple):
    """What one order has counted; every array is sorted by n-gram or context."""

    grams: Int64[ndarray, " g"]  # each n-gram seen, as a number
    count: Int64[ndarray, " g"]
    contexts: Int64[ndarray, " h"]  # each n-gram's first n - 1 characters, as a number
    total: Float64[ndarray, " h"]  # c(h)
    different: Int64[ndarray, " h"]  # N(h)
    discount: float  # D


class KneserNey:
    """Interpolated Kneser-Ney n-grams over characters, for every order from 0 (uniform) and 1 (unigram) to `order`.

    With h the n - 1 characters before c, h' the same without the first, and c(...) a count,

        p_n(c | h) = max(c(h c) - D, 0) / c(h)  +  D N(h) / c(h) · q_{n-1}(c | h')

    N(h) is the number of different characters seen after h; the discount D = n1 / (n1 + 2 n2), from the number of
    n-grams seen once and twice. q, the lower orders, is the same formula with each count c(h c) replaced by the
    number of different characters seen before h c: what matters for a back-off is in how many contexts c follows h.
    q_0 is uniform over the training text's alphabet; a context never seen leaves q_{n-1} as it is.
    Source: Kneser & Ney 1995, in the interpolated form of Chen & Goodman 1999, with one discount for each order.
    """

    def __init__(self, order: int):
        if order < 1:
            raise ValueError(f"order={order} has nothing to count; try 1 (single characters) to 6")
        self.order = order

    def fit(self, text: str) -> "KneserNey":
        """Count `text`. ValueError where it is shorter than `order` or its n-grams do not fit 64 bits."""
        self.alphabet = "".join(sorted(set(text)))
        if len(text) < self.order:
            raise ValueError(
                f"the text has {len(text)} characters, too few for order={self.order}; give a longer one"
            )
        if (len(self.alphabet) + 1) ** (self.order + 1) >= 2**63:
            raise ValueError(
                f"order={self.order} is too high for {len(self.alphabet)} characters; try a lower one"
            )
        ids = self._ids(text)
        self.counts, self.continuations = [], []
        for n in range(1, self.order + 1):
            grams, count = np.unique(self._grams(ids, n), return_counts=True)
            self.counts.append(self._table(grams, count))
            if n > 1:  # each different n-gram is one more context for the (n-1)-gram that ends it
                grams, count = np.unique(grams % len(self.alphabet) ** (n - 1), return_counts=True)
                self.continuations.append(self._table(grams, count))
        return self

    def probabilities(self, text: str) -> Float64[ndarray, "orders t"]:
        """Row n: each character's probability under order n, given the n - 1 before it (or all there are)."""
        ids = self._ids(text)
        rows = np.full((self.order + 1, len(ids)), 1 / len(self.alphabet))
        lower = rows[0]
        for n in range(1, self.order + 1):
            grams = self._grams(ids, n)
            rows[n, : n - 1] = rows[n - 1, : n - 1]
            rows[n, n - 1 :] = self._interpolate(self.counts[n - 1], grams, lower[n - 1 :])
            if n < self.order:
                continuation = self._interpolate(self.continuations[n - 1], grams, lower[n - 1 :])
                lower = np.concatenate([lower[: n - 1], continuation])
        return rows

    def bits_per_character(self, text: str) -> list[float]:
        """-log2 p(text) / len(text) under order 0 (uniform), 1 (unigram), 2, ... `order`."""
        if not text:
            raise ValueError("the text is empty; give at least one character")
        return (-np.log2(self.probabilities(text)).mean(axis=1)).tolist()

    def _ids(self, text: str) -> Int64[ndarray, " t"]:
        codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
        alphabet = np.array([ord(c) for c in self.alphabet], dtype=np.uint32)
        ids = np.minimum(np.searchsorted(alphabet, codes), len(alphabet) - 1)
        unknown = np.flatnonzero(alphabet[ids] != codes)
        if len(unknown):
            raise ValueError(
                f"{text[unknown[0]]!r} (character {unknown[0]} of the text) is not in the training text; replace it"
            )
        return ids.astype(np.int64)

    def _grams(self, ids: Int64[ndarray, " t"], n: int) -> Int64[ndarray, " m"]:
        """Every run of n characters as one number, the first character most significant."""
        grams = np.zeros(max(0, len(ids) - n + 1), dtype=np.int64)
        for i in range(n):
            grams = grams * len(self.alphabet) + ids[i : i + len(grams)]
        return grams

    def _table(self, grams: Int64[ndarray, " g"], count: Int64[ndarray, " g"]) -> Table:
        contexts, which = np.unique(grams // len(self.alphabet), return_inverse=True)
        once, twice = (count == 1).sum(), (count == 2).sum()
        discount = once / (once + 2 * twice) if once else 0.5
        total, different = np.bincount(which, weights=count), np.bincount(which)
        return Table(grams, count, contexts, total, different, float(discount))

    def _interpolate(
        self, table: Table, grams: Int64[ndarray, " t"], lower: Float64[ndarray, " t"]
    ) -> Float64[ndarray, " t"]:
        contexts = grams // len(self.alphabet)
        i = np.minimum(np.searchsorted(table.grams, grams), len(table.grams) - 1)
        j = np.minimum(np.searchsorted(table.contexts, contexts), len(table.contexts) - 1)
        count = np.where(table.grams[i] == grams, table.count[i], 0)
        left_over = table.discount * table.different[j] / table.total[j]
        mixed = np.maximum(count - table.discount, 0) / table.total[j] + left_over * lower
        return np.where(table.contexts[j] == contexts, mixed, lower)
