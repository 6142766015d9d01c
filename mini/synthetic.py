"""Synthetic data: generations of models that learn from the generation before, and measures of collapse. Chapter 09.

Shumailov et al. 2024, "AI models collapse when trained on recursively generated data", Nature 631:755; Gerstgrasser
et al. 2024, "Is model collapse inevitable?", arXiv:2404.01413.
"""

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from mini.data import Tokenizer, corpus, train_bpe
from mini.distill import deal
from mini.model import Config, Transformer, cross_entropy
from mini.moe import balanced
from mini.train import Loss, Settings, train

Model = TypeVar("Model")
REGIMES = ("replace", "accumulate", "mix")
RARE, COMMON = (5, 20), (500, math.inf)  # how often an n-gram occurs in the reference


def choose_rows(
    rows: Shaped[Tensor, "n *d"], count: int, generator: torch.Generator | None = None
) -> Shaped[Tensor, "m *d"]:
    """`count` different rows, at random. ValueError where there are fewer."""
    if not 0 <= count <= len(rows):
        raise ValueError(f"{count} rows out of {len(rows)}; ask for fewer, or draw more samples")
    return rows[torch.randperm(len(rows), generator=generator)[:count]]


def training_set(
    regime: str,
    real: Shaped[Tensor, "n *d"],
    samples: Sequence[Tensor],
    share: float = 0.2,
    generator: torch.Generator | None = None,
) -> Shaped[Tensor, "m *d"]:
    """What the next generation learns from: `samples` holds those of each generation so far, the oldest first.

    "replace": the last generation's samples alone. "accumulate": the real data and all samples so far
    (arXiv:2404.01413). "mix": as much as there is real data, a `share` of it real (drawn anew each time) and the
    rest from the last generation. Before there are samples, each of them is the real data.
    """
    if regime not in REGIMES:
        raise ValueError(f"regime={regime!r}; use one of {', '.join(REGIMES)}")
    if not 0 <= share <= 1:
        raise ValueError(f"share={share} of real data; use 0 to 1")
    if not samples:
        return real
    if regime == "replace":
        return samples[-1]
    if regime == "accumulate":
        return torch.cat((real, *samples))
    kept = round(share * len(real))
    return torch.cat(
        (choose_rows(real, kept, generator), choose_rows(samples[-1], len(real) - kept, generator))
    )


def chain(
    real: Shaped[Tensor, "n *d"],
    learn: Callable[[Tensor, int], Model],
    draw: Callable[[Model, torch.Generator], Tensor],
    *,
    regime: str,
    generations: int,
    share: float = 0.2,
    seed: int = 0,
) -> Iterator[tuple[Model, Tensor]]:
    """Model and samples of generation 0, which learns from `real`, and of each generation after it.

    `learn(data, seed)` makes a fresh model, `draw(model, generator)` its samples. The model can be anything: a mean
    and a variance, a regression, a transformer.
    """
    if generations < 1:
        raise ValueError(f"generations={generations} must be at least 1")
    samples: list[Tensor] = []
    for g in range(generations):
        generator = torch.Generator().manual_seed(1_000_003 * seed + g)
        model = learn(training_set(regime, real, samples, share, generator), 1_000 * seed + g)
        samples.append(draw(model, generator))
        yield model, samples[-1]


def learn_rows(
    rows: Int[Tensor, "n t"],
    config: Config,
    settings: Settings,
    *,
    batch_size: int = 24,
    seed: int = 0,
    loss: Loss = cross_entropy,
) -> Transformer:
    """A fresh model trained on rows of tokens: the same number of steps, however many rows there are.

    A mixture of experts is balanced as in chapter 04.
    """
    torch.manual_seed(seed)
    model = Transformer(config)
    loss = balanced(loss) if config.n_routed_experts else loss
    train(model, deal(rows, batch_size, seed), settings, loss=loss, progress=False)
    return model


def ngrams(texts: Sequence[str], n: int = 4) -> Counter[str]:
    """How often each run of n characters occurs; none reaches from one text into the next."""
    if n < 1:
        raise ValueError(f"n={n} must be at least 1")
    return Counter(text[i : i + n] for text in texts for i in range(len(text) - n + 1))


def entropy(counts: Counter) -> float:
    """-Σ p log2 p of the observed shares, in bits. Too low for small samples, so compare samples of equal size."""
    total = counts.total()
    return -sum(c / total * math.log2(c / total) for c in counts.values())


def distinct(counts: Counter) -> float:
    """Different n-grams as a share of all (Li et al. 2016, arXiv:1510.03055); it falls with the sample's size."""
    return len(counts) / counts.total()


def unseen(counts: Counter, reference: Collection) -> float:
    """The share of all n-grams, each as often as it occurs, that the reference does not hold."""
    return sum(c for gram, c in counts.items() if gram not in reference) / counts.total()


def coverage(counts: Counter, reference: Counter, band: tuple[float, float] = RARE) -> float:
    """Of the n-grams that the reference has band[0] to band[1] times, each counted once: the share still there."""
    wanted = {gram for gram, c in reference.items() if band[0] <= c <= band[1]}
    if not wanted:
        raise ValueError(f"no n-gram occurs {band[0]} to {band[1]} times in the reference; widen the band")
    return len(wanted & counts.keys()) / len(wanted)


def diversity(texts: Sequence[str], reference: Counter) -> dict[str, float]:
    """All of these measures, for the reference's n."""
    counts = ngrams(texts, len(next(iter(reference))))
    return {
        "entropy": entropy(counts),
        "distinct": distinct(counts),
        "unseen": unseen(counts, reference),
        "rare": coverage(counts, reference),
        "common": coverage(counts, reference, COMMON),
    }


@dataclass(frozen=True)
class World:
    """Real text that generations of small models can live on."""

    rows: Int[Tensor, "n t"]  # of tokens, from all plays for training
    tokenizer: Tokenizer
    reference: Counter[str]  # 4-grams of the same text
    held_out: str  # from the other plays


@lru_cache(maxsize=1)
def world(vocab_size: int = 256, length: int = 32) -> World:
    """A fifth of Shakespeare in rows of `length` tokens, and 20,000 held-out characters; made once in each process."""
    text, held_out = corpus()
    part = "".join(text[i : i + 4_000] for i in range(0, len(text), 20_000))
    tokenizer = train_bpe(part + "".join(sorted(set(text))), vocab_size)  # every character, the rarest too
    ids = torch.tensor(tokenizer.encode(part))
    rows = ids[: len(ids) // length * length].view(-1, length)
    step = len(held_out) // 20
    pieces = [held_out[i * step : i * step + 1_000] for i in range(20)]
    return World(rows, tokenizer, ngrams([part]), "".join(pieces))
