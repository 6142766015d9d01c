"""Test-time compute: many samples or longer ones, how to choose among them, and what that costs. Chapter 11.

n samples of each prompt are drawn once. What k of them would have done, for every k up to n, is the mean over all
subsets of k samples: exact, from counts, and without bias. Estimating with (1 - c/n)^k instead is biased.

Chen et al. 2021 (arXiv:2107.03374), Wang et al. 2022 (arXiv:2203.11171), Muennighoff et al. 2025 (arXiv:2501.19393).
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import comb

import torch
from einops import rearrange, reduce
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mini.budget import Number, forward_flops
from mini.model import Config, Transformer
from mini.sample import choose, sample, stack_prompts

BLANK = -1  # the answer of a sample that gave none: it can win no vote
BATCH = 512  # rows that are sampled at once


def pass_at_k(n: int, c: Int[Tensor, "*b"], k: int) -> Float[Tensor, "*b"]:
    """The chance that k of n samples, of which c are right, hold a right one: 1 - C(n-c, k) / C(n, k).

    As the product 1 - Π (1 - k/i) over i = n-c+1 … n, which cannot overflow (arXiv:2107.03374, Eq. 1). Over draws of
    the n samples its expectation is 1 - (1 - p)^k. Raises ValueError for k outside 1 … n, or c outside 0 … n.
    """
    _check_k(k, n)
    if c.numel() and not 0 <= int(c.min()) <= int(c.max()) <= n:
        raise ValueError(f"c={c.tolist()} of n={n} samples right; count between 0 and n")
    i = torch.arange(n, 0, -1, dtype=torch.float64)
    none_right = torch.cat((i.new_ones(1), (1 - k / i).clamp(min=0))).cumprod(dim=0)  # for c = 0 … n
    return 1 - none_right[c]


def maj_at_k(answers: Int[Tensor, "prompts n"], right: Int[Tensor, "prompts"]) -> Float[Tensor, "prompts n"]:
    """Self-consistency: the chance that the most frequent of k answers is the right one, for k = 1 … n.

    Exact over all subsets of k of the n samples, so unbiased for a vote among k fresh ones (arXiv:2203.11171 votes
    once). A tie is broken at random: with m others it counts 1 / (m + 1). BLANK answers take a place in the subset
    and no vote; a subset of blanks is wrong.
    """
    n = answers.shape[1]
    subsets = torch.tensor([comb(n, k) for k in range(1, n + 1)], dtype=torch.float64)
    rows = []
    for row, truth in zip(answers.tolist(), right.tolist(), strict=True):
        votes = Counter(a for a in row if a != BLANK)
        c = votes.pop(truth, 0)
        rows.append(_ways_to_win(c, tuple(sorted(votes.values())), n)[1:] / subsets)
    return torch.stack(rows)


@lru_cache(maxsize=4096)
def _ways_to_win(c: int, others: tuple[int, ...], n: int) -> Float[Tensor, "sizes"]:
    """For subsets of size 0 … n: in how many the answer with c votes wins, ties counted in part.

    An answer with w votes gives x of them to a subset in C(w, x) ways. Nothing is ever subtracted, so that floats
    lose nothing.
    """
    wins = torch.zeros(n + 1, dtype=torch.float64)
    for v in range(1, c + 1):  # the right answer has v votes in the subset
        rivals = [w for w in others if w >= v]  # only they can reach v
        rest = n - c - sum(rivals)  # all else may come in any number
        # ways[m, size]: subsets of this size in which m of the rivals have v votes too, and the others fewer
        ways = wins.new_zeros(len(rivals) + 1, n + 1)
        ways[0, : rest + 1] = torch.tensor([float(comb(rest, x)) for x in range(rest + 1)])
        for w in rivals:
            more = torch.zeros_like(ways)
            for x in range(v):
                more[:, x:] += comb(w, x) * ways[:, : n + 1 - x]
            more[1:, v:] += comb(w, v) * ways[:-1, : n + 1 - v]
            ways = more
        share = 1 / torch.arange(1, len(rivals) + 2, dtype=torch.float64)
        wins[v:] += comb(c, v) * (share @ ways)[: n + 1 - v]
    return wins


def best_of_k(
    scores: Float[Tensor, "prompts n"], right: Bool[Tensor, "prompts n"], k: int
) -> Float[Tensor, "prompts"]:
    """The chance that the best-scored of k samples is right; among equal scores one is taken at random.

    Exact over all subsets: the sample at place i of n (from 0, the best first) is the best of C(n-1-i, k-1) of them.
    With `right` itself for scores this is `pass_at_k`, with a constant it is pass@1.
    """
    n = scores.shape[1]
    _check_k(k, n)
    equal = rearrange(scores, "p i -> p i 1") == rearrange(scores, "p j -> p 1 j")
    hits = reduce(equal & rearrange(right, "p j -> p 1 j"), "p i j -> p i", "sum")
    mean_right = hits.double() / equal.sum(dim=2)  # of all samples with this score
    return mean_right.gather(1, scores.argsort(dim=1, descending=True)) @ shares_of_best(n, k)


def shares_of_best(n: int, k: int) -> Float[Tensor, "n"]:
    """In which share of all subsets of k the sample at place i of n, from 0, the best first, is the best one."""
    return torch.tensor([comb(n - 1 - i, k - 1) / comb(n, k) for i in range(n)], dtype=torch.float64)


def weighted_vote(
    answers: Int[Tensor, "prompts n"],
    right: Int[Tensor, "prompts"],
    weights: Float[Tensor, "prompts n"],
    k: int,
    *,
    draws: int = 256,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "prompts"]:
    """The chance that the answer with the largest sum of weights among k samples is right, ties as in `maj_at_k`.

    Sums of any weights cannot be counted as votes can, so this is the mean over `draws` random subsets: unbiased, with
    a standard error of at most 0.5 / √draws a prompt. Weights are above 0; equal ones give `maj_at_k`.
    """
    n = answers.shape[1]
    _check_k(k, n)
    if not (weights > 0).all():
        raise ValueError(
            f"weights={weights.min():.3g} is the smallest; they have to be above 0: try exp(score)"
        )
    choices = torch.arange(int(answers.max().clamp(min=0)) + 1)
    ballots = weights[..., None].double() * (answers[..., None] == choices)
    wins = torch.zeros(len(answers), dtype=torch.float64)
    for _ in range(draws):
        chosen = torch.rand(answers.shape, generator=generator).argsort(dim=1)[:, :k]
        tally = ballots.gather(1, chosen[..., None].expand(-1, -1, len(choices))).sum(dim=1)
        most = tally.max(dim=1, keepdim=True).values
        top = (tally >= most * (1 - 1e-9)) & (most > 0)  # sums in another order may differ in the last digit
        hit = (top & (choices == right[:, None])).any(dim=1)
        wins += hit / top.sum(dim=1).clamp(min=1)
    return wins / draws


def accepted(
    p: Float[Tensor, "*b"], k: int, false_pass: float, false_fail: float = 0.0
) -> Float[Tensor, "*b"]:
    """Closed form of `best_of_k` for a verifier that says yes or no, and errs on each sample by itself.

    Of the samples that pass one is taken at random, and if none passes, one of all. p: the share of right samples;
    k samples; false_pass and false_fail: the shares of wrong samples that pass, of right ones that do not. For many
    samples it ends at the precision, p (1 - false_fail) over all that pass (arXiv:2411.17501).
    """
    _check_shares(false_pass=false_pass, false_fail=false_fail)
    passing = p * (1 - false_fail) + (1 - p) * false_pass
    none = (1 - passing) ** (k - 1)
    precision = torch.where(passing > 0, p * (1 - false_fail) / passing, 0.0)
    return precision * (1 - none * (1 - passing)) + none * p * false_fail


def loophole(p: Float[Tensor, "*b"], k: int, rate: float) -> Float[Tensor, "*b"]:
    """Closed form of `best_of_k` where a share `rate` of the wrong samples scores above every right one.

    The pick is right if no such sample is among the k and a right one is: A^k - B^k, with A = 1 - (1 - p) rate and
    B = (1 - p)(1 - rate). It rises, turns at k = ln(ln B / ln A) / ln(A / B), and falls to 0.
    """
    _check_shares(rate=rate)
    return (1 - (1 - p) * rate) ** k - ((1 - p) * (1 - rate)) ** k


@dataclass(frozen=True)
class Tags:
    """The tokens that begin and end what a reasoner writes."""

    think_end: int  # </think>
    answer: int  # <answer>
    end: int  # the end of the text


def continue_rows(
    model: Transformer,
    rows: Sequence[list[int]],
    new_tokens: int,
    end: int,
    generator: torch.Generator | None = None,
) -> list[list[int]]:
    """What the model adds to each row, at temperature 1, until the token `end`, which is kept; see `sample`."""
    added: list[list[int]] = [[]] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))  # rows of like length, with little filler
    for start in range(0, len(rows), BATCH):
        batch = order[start : start + BATCH]
        drawn = sample(model, [rows[i] for i in batch], new_tokens, end=end, generator=generator)
        for i, tokens, n in zip(batch, drawn.tokens.tolist(), drawn.lengths.tolist(), strict=True):
            added[i] = tokens[:n]
    return added


def answer_now(
    model: Transformer,
    prompts: Sequence[list[int]],
    thoughts: Sequence[list[int]],
    tags: Tags,
    answer_tokens: int,
    generator: torch.Generator | None = None,
) -> list[list[int]]:
    """The whole response of each row: its thoughts, and an answer after them.

    A thought that did not come to `</think>` by itself is given `</think> <answer>`: a budget that is forced.
    """
    closed = [t if tags.think_end in t else [*t, tags.think_end, tags.answer] for t in thoughts]
    rows = [p + t for p, t in zip(prompts, closed, strict=True)]
    added = continue_rows(model, rows, answer_tokens, tags.end, generator)
    return [t + a for t, a in zip(closed, added, strict=True)]


def think_at_most(
    model: Transformer,
    prompts: Sequence[list[int]],
    budget: int,
    tags: Tags,
    answer_tokens: int,
    generator: torch.Generator | None = None,
) -> list[list[int]]:
    """Responses whose thinking is cut off after `budget` tokens (arXiv:2501.19393, section 3.1).

    `answer_tokens`: room for what follows `</think>`, the end token included. Raises ValueError for no budget, or
    past the model's max_seq_len.
    """
    thoughts = continue_rows(model, prompts, budget, tags.think_end, generator)
    return answer_now(model, prompts, thoughts, tags, answer_tokens, generator)


def think_on(
    model: Transformer,
    prompts: Sequence[list[int]],
    rounds: int,
    budget: int,
    tags: Tags,
    answer_tokens: int,
    generator: torch.Generator | None = None,
    again: Callable[[list[int]], bool] = lambda thought: True,
) -> Iterator[list[list[int]]]:
    """Responses after 0, 1, … `rounds` times of going on: each `</think>` is taken away, and another word drawn there.

    s1 (arXiv:2501.19393, section 3.1) suppresses the end of thinking like this, and writes "Wait" in its place. The
    model sees all that it has thought so far, so the responses are also a sequence of revisions. `again(thought)` says
    whether a row goes on. One that does not, that filled its `budget` tokens of a round, or for which another round
    would not fit into the model's max_seq_len, keeps its thoughts.
    """
    room = model.config.max_seq_len - budget - answer_tokens - 2  # for a prompt and its thoughts so far
    thoughts = continue_rows(model, prompts, budget, tags.think_end, generator)
    yield answer_now(model, prompts, thoughts, tags, answer_tokens, generator)
    for _ in range(rounds):
        going = [
            i
            for i, t in enumerate(thoughts)
            if t[-1] == tags.think_end and again(t[:-1]) and len(prompts[i]) + len(t) <= room
        ]
        for i in going:
            thoughts[i] = thoughts[i][:-1]
        rows = [prompts[i] + thoughts[i] for i in going]
        waits = draw_another(model, rows, tags.think_end, generator)
        rows = [[*row, word] for row, word in zip(rows, waits, strict=True)]
        added = continue_rows(model, rows, budget, tags.think_end, generator)
        for i, word, new in zip(going, waits, added, strict=True):
            thoughts[i] = [*thoughts[i], word, *new]
        yield answer_now(model, prompts, thoughts, tags, answer_tokens, generator)


@torch.inference_mode()
def draw_another(
    model: Transformer, rows: Sequence[list[int]], banned: int, generator: torch.Generator | None = None
) -> list[int]:
    """The next token of each row, drawn from all but the banned one."""
    drawn: list[int] = []
    for i in range(0, len(rows), BATCH):
        tokens, pad = stack_prompts(rows[i : i + BATCH], model.config.vocab_size)
        logits = model.logits(model.hidden(tokens, pad=pad)[:, -1])
        logits[:, banned] = -torch.inf
        drawn += choose(logits, 1.0, 1.0, generator).tolist()
    return drawn


def generation_flops(config: Config, prompt: int, new: Number) -> Number:
    """FLOPs to read a prompt and write `new` tokens after it, with a cache: each token but the last is read once."""
    length = prompt + new - 1
    return length * forward_flops(config, seq_len=length)


def _check_k(k: int, n: int) -> None:
    if not 1 <= k <= n:
        raise ValueError(f"k={k} of n={n} samples; ask for 1 to {n}, or draw more samples")


def _check_shares(**shares: float) -> None:
    for name, value in shares.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name}={value} is a share; write 5% as 0.05")
