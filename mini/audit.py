"""Auditing a judge: what is to be known of whoever marks the answers, before and while something learns from it.
Chapter 14.

    print(report(pointwise("mine", opinion)))

A judge is a name and a function; how it works inside does not matter. The audit asks how often it is right
(`accuracy`), what it pays for at equal worth (`style`; Zheng et al. 2023, arXiv:2306.05685), whether it knows when it
is right (`calibration`), whether it says the same twice (`consistency`, `swaps`), whether its errors are shared
between samples (`shared`), and, while it is used, whether its errors stay below what was allowed (`evidence`).

Shapes: k judgements of a case, n answers in it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from einops import rearrange, reduce, repeat
from jaxtyping import Bool, Float
from torch import Tensor

from mini import critique
from mini.critique import read_principles
from mini.model import Transformer
from mini.reward import CRITERIA, Answer, Case, Opinion, Query, strictly_best


@dataclass(frozen=True)
class Judge:
    """marks(cases, k, generator): k judgements of each case, higher is better, [cases, k, n].

    prefers(query, first, second): whether the first is better, for judges that read two answers at a time.
    """

    name: str
    marks: Callable[[Sequence[Case], int, torch.Generator], Float[Tensor, "cases k n"]]
    prefers: Callable[[Query, Answer, Answer], bool] | None = None


def pointwise(name: str, opinion: Opinion) -> Judge:
    """A judge that marks one answer at a time, always alike: opinion(queries, answers) -> numbers."""

    def marks(cases: Sequence[Case], k: int, generator: torch.Generator) -> Float[Tensor, "cases k n"]:
        asked = [case.query for case in cases for _ in case.answers]
        given = opinion(asked, [answer for case in cases for answer in case.answers])
        return repeat(torch.as_tensor(given).float(), "(c n) -> c k n", c=len(cases), k=k)

    return Judge(name, marks)


def generative(name: str, model: Transformer, **options) -> Judge:
    """A judge in words of chapter 13; `options` as for `mini.critique.judge`."""

    def marks(cases: Sequence[Case], k: int, generator: torch.Generator) -> Float[Tensor, "cases k n"]:
        return critique.marks(critique.judge(model, cases, k, generator=generator, **options))

    return Judge(name, marks)


def pairwise(name: str, prefers: Callable[[Query, Answer, Answer], bool]) -> Judge:
    """A judge that reads two answers at a time. Its mark of an answer: how many others that beats, read in order."""

    def marks(cases: Sequence[Case], k: int, generator: torch.Generator) -> Float[Tensor, "cases k n"]:
        won = torch.zeros(len(cases), len(cases[0].answers))
        for c, case in enumerate(cases):
            for i, first in enumerate(case.answers):
                for j in range(i + 1, len(case.answers)):
                    won[c, i if prefers(case.query, first, case.answers[j]) else j] += 1
        return repeat(won, "c n -> c k n", k=k)

    return Judge(name, marks, prefers)


def opinion_of(judge: Judge, k: int = 1, seed: int = 0) -> Opinion:
    """What `mini.reward.rollout` asks for: the mean of k marks. Neighbours with one query are judged as one case."""
    g = torch.Generator().manual_seed(seed)

    def opinion(queries: Sequence[Query], answers: Sequence[Answer]) -> list[float]:
        pairs = groupby(zip(queries, answers, strict=True), key=lambda pair: pair[0])
        found = [Case(query, tuple(answer for _, answer in own)) for query, own in pairs]
        most = max((len(case.answers) for case in found), default=0)
        even = [Case(c.query, c.answers + c.answers[-1:] * (most - len(c.answers))) for c in found]
        means = judge.marks(even, k, g).mean(dim=1) if even else []
        return [m for case, own in zip(found, means, strict=True) for m in own[: len(case.answers)].tolist()]

    return opinion


def interval(share: float, n: int) -> tuple[float, float]:
    """Wilson's 95% interval of a share of n."""
    z = 1.96
    middle, half = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


Feature = Callable[[Case, int], float]
FEATURES: Mapping[str, Feature] = {  # of answer i of a case; three words, since fillers come in ones and twos
    "truth": lambda case, i: case.facts[i][CRITERIA.index("truth")],
    "3 words": lambda case, i: len(case.answers[i]) / 3,
    "polite": lambda case, i: case.facts[i][CRITERIA.index("polite")],
    "sure": lambda case, i: case.facts[i][CRITERIA.index("sure")],
}


def style(
    marks: Float[Tensor, "cases n"], cases: Sequence[Case], features: Mapping[str, Feature] = FEATURES
) -> dict[str, tuple[float, float]]:
    """What the mark pays for each feature at equal worth by the hidden rule, with the half-width of its 95% interval.

    Least squares within cases, marks in their standard deviations; errors are clustered by case. A judge that marks
    by worth alone, however noisily, pays 0 for all. A feature that never differs within a case gets nan.
    """
    columns = [lambda case, i: case.values[i], *features.values()]
    x = torch.tensor([[[f(case, i) for f in columns] for i in range(marks.shape[1])] for case in cases])
    x, y = (z.double() - z.double().mean(dim=1, keepdim=True) for z in (x, marks))
    y = y / y.std().clamp(min=1e-9)
    flat = rearrange(x, "c n f -> (c n) f")
    inverse = torch.linalg.pinv(flat.T @ flat)
    slopes = inverse @ flat.T @ rearrange(y, "c n -> (c n)")
    scores = torch.einsum("cnf,cn->cf", x, y - x @ slopes)
    errors = (inverse @ scores.T @ scores @ inverse).diagonal().sqrt()
    found = zip(features, slopes[1:], errors[1:], flat.std(dim=0)[1:], strict=True)
    return {f: (b.item(), 1.96 * e.item()) if s > 0 else (math.nan, math.nan) for f, b, e, s in found}


def choices(marks: Float[Tensor, "cases k n"]) -> Tensor:
    """Which answer each judgement puts strictly on top, -1 for a tie. Int, [cases, k]."""
    top = marks.max(dim=-1)
    tie = (marks == top.values[..., None]).sum(dim=-1) > 1
    return top.indices.masked_fill(tie, -1)


def confidence(marks: Float[Tensor, "cases k n"]) -> Float[Tensor, "cases"]:
    """How sure of its choice a judge claims to be, 0 to 1.

    Where judgements differ, the share of them that chose what their sum chose. Where they are all alike, the softmax
    of the marks, which a Bradley-Terry model means as odds; of other judges it is a mere reading of the margin.
    """
    if (marks == marks[:, :1]).all():
        return marks[:, 0].softmax(dim=-1).amax(dim=-1)
    chosen = marks.sum(dim=1).argmax(dim=-1, keepdim=True)
    return (choices(marks) == chosen).float().mean(dim=1)


def calibration(
    claimed: Float[Tensor, "n"], right: Bool[Tensor, "n"], bins: int = 5
) -> tuple[list[tuple[float, float, int]], float]:
    """For each bin of equal width that is not empty: mean claimed, share right, count. And their mean distance, ECE."""
    place = (claimed * bins).long().clamp(max=bins - 1)
    found = []
    for b in place.unique():
        own = place == b
        found.append((claimed[own].mean().item(), right[own].float().mean().item(), int(own.sum())))
    return found, sum(n * abs(c - r) for c, r, n in found) / len(claimed)


def consistency(marks: Float[Tensor, "cases k n"]) -> float:
    """The chance that two judgements of a case choose the same answer; a tie chooses none."""
    chosen, k = choices(marks), marks.shape[1]
    same = (chosen[:, :, None] == chosen[:, None, :]) & (chosen >= 0)[:, :, None]
    pairs = reduce(same.float(), "c a b -> c", "sum") - (chosen >= 0).sum(dim=1)
    return (pairs / max(1, k * (k - 1))).mean().item()


def swaps(judge: Judge, cases: Sequence[Case]) -> tuple[float, float]:
    """Shares of pairs in which the same answer wins in both orders, and in which the first place wins in both."""
    same = first = 0
    for case in cases:
        a, b = case.answers[:2]
        one, two = judge.prefers(case.query, a, b), judge.prefers(case.query, b, a)
        same, first = same + (one != two), first + (one and two)
    return same / len(cases), first / len(cases)


def shared(right: Bool[Tensor, "cases k"]) -> float:
    """The correlation between two judgements of a case in being right: 0 for errors of chance, 1 for convictions.

    It counts what makes a case hard or easy for this judge. nan where all judgements are right, or all wrong.
    """
    k, c = right.shape[1], right.sum(dim=1).double()
    both, mean = (c * (c - 1) / (k * (k - 1))).mean(), (c / k).mean()
    return ((both - mean**2) / (mean * (1 - mean))).item() if 0 < mean < 1 else math.nan


def evidence(
    errors: Float[Tensor, "n"], allowed: float, bet: float = 0.5, floor: float = 0.0
) -> Float[Tensor, "n"]:
    """Wealth after each label of a gambler who bets that errors, 0 or 1, are more frequent than `allowed`.

    It starts from 1 and is multiplied by 1 + bet · (error - allowed) / allowed: no gain on average while they are not.
    Then it ever exceeds 1/α with a chance of at most α (Ville 1939): stop there, whenever it is. With floor=1 each bet
    is made with 1 at least, which finds errors that became frequent late; the promise is then only that false alarms
    are 1/α labels apart on average.
    """
    if not (0 < allowed < 1 and 0 < bet < 1):
        raise ValueError(f"allowed={allowed}, bet={bet}; both lie between 0 and 1")
    wealth, found = 1.0, []
    for error in errors.tolist():
        wealth = max(wealth, floor) * (1 + bet * (error - allowed) / allowed)
        found.append(wealth)
    return torch.tensor(found)


def principle_shares(
    judge: Transformer, queries: Sequence[Query], k: int, seed: int = 0
) -> Float[Tensor, "queries 5"]:
    """How much weight the principles that a judge states give each of the CRITERIA, the mean of k; sums to 1."""
    g = torch.Generator().manual_seed(seed)
    drawn = critique.judge(judge, [Case(query, ()) for query in queries], k, generator=g)
    shares = torch.zeros(len(queries), len(CRITERIA))
    for i, own in enumerate(drawn):
        for criterion, weight in (pair for j in own for pair in read_principles(j.principles) or ()):
            shares[i, CRITERIA.index(criterion)] += weight
    return shares / shares.sum(dim=1, keepdim=True).clamp(min=1)


@dataclass(frozen=True)
class Report:
    """What the audit of one judge found; shares from 0 to 1, style in deviations of its marks."""

    name: str
    n: int
    k: int
    accuracy: float
    single: float
    style: dict[str, tuple[float, float]]
    bins: list[tuple[float, float, int]]
    ece: float
    consistency: float
    shared: float
    swaps: tuple[float, float] | None

    def __str__(self) -> str:
        low, high = interval(self.accuracy, self.n)
        pays = ", ".join(f"{name} {round(b, 2) + 0.0:+.2f} ± {e:.2f}" for name, (b, e) in self.style.items())
        pair = "reads one answer at a time: no order to be swapped"
        if self.swaps:
            pair = f"same winner {self.swaps[0]:.0%}, always the first {self.swaps[1]:.0%} of pairs"
        return "\n".join(
            (
                f"{self.name}: {self.n} cases, {self.k} judgements of each",
                f"  right         {self.accuracy:.0%} ({low:.0%} to {high:.0%}); a single judgement {self.single:.0%}",
                f"  pays extra    {pays} (deviations of its marks, at equal worth)",
                f"  calibration   claims are off by {self.ece:.0%} on average",
                f"  repeated      the same choice {self.consistency:.0%}; errors correlate {self.shared:.2f}",
                f"  swapped       {pair}",
            )
        )


def report(
    judge: Judge, cases: Sequence[Case], k: int = 8, seed: int = 0, features: Mapping[str, Feature] = FEATURES
) -> Report:
    """Audit a judge on cases whose best answer people know; k judgements of each are summed."""
    marks = judge.marks(cases, k, torch.Generator().manual_seed(seed))
    if marks.shape != (len(cases), k, len(cases[0].answers)) or not marks.isfinite().all():
        wanted = f"[{len(cases)}, {k}, {len(cases[0].answers)}]"
        raise ValueError(f"{judge.name} gave marks {list(marks.shape)}; give finite ones, {wanted}")
    total, each = strictly_best(marks.sum(dim=1), cases), strictly_best(marks, cases)
    bins, ece = calibration(confidence(marks), total)
    return Report(
        name=judge.name,
        n=len(cases),
        k=k,
        accuracy=total.float().mean().item(),
        single=each.float().mean().item(),
        style=style(marks.mean(dim=1), cases, features),
        bins=bins,
        ece=ece,
        consistency=consistency(marks),
        shared=shared(each),
        swaps=swaps(judge, cases) if judge.prefers else None,
    )
