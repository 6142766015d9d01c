"""Distillation: a student learns from a teacher's probabilities, from its texts, or from its marks. Chapter 08.

P is the teacher's distribution of the next token, Q the student's. What they differ by is a divergence:

    KL(P || Q) = Σ P ln(P / Q)        forward: Q has to be large wherever P is
    KL(Q || P) = Σ Q ln(Q / P)        reverse: Q may be large only where P is
    JSD_β(P || Q) = β KL(P || M) + (1 - β) KL(Q || M)   with the mixture M = β P + (1 - β) Q

Hinton et al. 2015 (arXiv:1503.02531), Kim and Rush 2016 (arXiv:1606.07947), Agarwal et al. 2023 (arXiv:2306.13649).

Rows of tokens may end in fillers, -1 as `mini.sample` leaves them: no loss is taken there.
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mini.model import Transformer
from mini.sample import sample
from mini.train import Loss


def divergence(
    student: Float[Tensor, "*b vocab"],
    teacher: Float[Tensor, "*b _"],
    beta: float = 0.0,
    temperature: float = 1.0,
) -> Float[Tensor, "*b"]:
    """How far the student's distribution is from the teacher's, in nats, for each row of logits.

    beta = 0 is forward KL(P || Q), beta = 1 reverse KL(Q || P), between them the generalised Jensen-Shannon
    divergence of arXiv:2306.13649. (Its limits are not the two KLs: JSD_β falls to 0 at both ends. The names are
    that paper's.) Both logits are divided by the temperature; there is no factor T² here.

    Raises ValueError for another beta, a temperature that is not above 0, or vocabularies of two sizes.
    """
    if not 0 <= beta <= 1:
        raise ValueError(f"beta={beta} is outside [0, 1]; 0 is forward KL, 1 reverse KL, 0.5 the plain JSD")
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be above 0; 1 leaves the distributions as they are")
    if student.shape[-1] != teacher.shape[-1]:
        raise ValueError(
            f"the student scores {student.shape[-1]} tokens, the teacher {teacher.shape[-1]}; "
            "logits compare only over one vocabulary: distil by text, or remap the teacher's"
        )
    q, p = ((x / temperature).log_softmax(dim=-1) for x in (student, teacher))
    if beta == 0:
        return kl(p, q)
    if beta == 1:
        return kl(q, p)
    mixture = torch.logaddexp(p + math.log(beta), q + math.log1p(-beta))
    return beta * kl(p, mixture) + (1 - beta) * kl(q, mixture)


def kl(p: Float[Tensor, "*b vocab"], q: Float[Tensor, "*b vocab"]) -> Float[Tensor, "*b"]:
    """KL(p || q) = Σ p (ln p - ln q), from log-probabilities; what p never says (-inf) costs nothing."""
    gap = (p - q).masked_fill(p == -torch.inf, 0.0)
    return (p.exp() * gap).sum(dim=-1)


def masked_mean(values: Float[Tensor, "*b"], valid: Bool[Tensor, "*b"]) -> Float[Tensor, ""]:
    """The mean of the valid values, each counted alike, whichever row it stands in; 0 where none is valid."""
    return values.masked_fill(~valid, 0.0).sum() / valid.sum().clamp(min=1)


def score(model: nn.Module, rows: Int[Tensor, "b n"]) -> Float[Tensor, "b t vocab"]:
    """Logits for every token of the rows but the first. Fillers stand at the end, so that no token looks at them."""
    return model(rows[:, :-1].clamp(min=0))


def surprise(logits: Float[Tensor, "b t vocab"], targets: Int[Tensor, "b t"]) -> Float[Tensor, "b t"]:
    """-ln P of each target, in nats; 0 at fillers."""
    return F.cross_entropy(rearrange(logits, "b t v -> b v t"), targets, reduction="none", ignore_index=-1)


def stack(rows: Sequence[Sequence[int]]) -> Int[Tensor, "b n"]:
    """Rows of unequal length as one matrix; shorter ones are filled up with -1."""
    return nn.utils.rnn.pad_sequence([torch.tensor(r) for r in rows], batch_first=True, padding_value=-1)


def distil(teacher: nn.Module, beta: float = 0.0, temperature: float = 1.0, hard: float = 0.0) -> Loss:
    """Logit distillation, as the `loss` of `mini.train.train`: (1 - hard) T² D(P, Q) + hard · cross-entropy, nats.

    D is `divergence` at temperature T. Its gradient shrinks with 1/T², so that T² keeps its size beside the
    cross-entropy of the text's own tokens (Hinton et al. 2015, section 2).
    """
    if not 0 <= hard <= 1:
        raise ValueError(f"hard={hard} is a share; use 0 (the teacher alone) to 1 (the text alone)")

    def loss(model: nn.Module, rows: Int[Tensor, "b n"]) -> Float[Tensor, ""]:
        targets = rows[:, 1:]
        with torch.no_grad():  # the teacher does not learn
            p = score(teacher, rows)
        q = score(model, rows)
        soft = temperature**2 * masked_mean(divergence(q, p, beta, temperature), targets >= 0)
        if not hard:
            return soft
        return (1 - hard) * soft + hard * masked_mean(surprise(q, targets), targets >= 0)

    return loss


def write_rows(
    model: Transformer,
    starts: Int[Tensor, "n t"],
    new_tokens: int,
    *,
    temperature: float = 1.0,
    end: int | None = None,
    generator: torch.Generator | None = None,
    batch_size: int = 1024,
) -> Int[Tensor, "n length"]:
    """The starts, each continued by the model: the text of sequence-level distillation (arXiv:1606.07947).

    Rows that end early are filled up with -1. Kim and Rush search for the likeliest text; like DeepSeek-R1, we draw it.
    """
    drawn = [
        sample(model, part, new_tokens, temperature=temperature, end=end, generator=generator).tokens
        for part in starts.split(batch_size)
    ]
    return torch.cat((starts, torch.cat(drawn)), dim=1)


def deal(
    rows: Int[Tensor, "n length"], batch_size: int, seed: int = 0
) -> Callable[[int], Int[Tensor, "b length"]]:
    """`batch(i)` of whole rows for `train`: each pass deals them in a fresh order, a pure function of (seed, i)."""
    if len(rows) < 1 or batch_size < 1:
        raise ValueError(f"{len(rows)} rows in batches of {batch_size}; give at least one of each")

    @lru_cache(maxsize=2)  # a batch can straddle two passes
    def order(epoch: int) -> Tensor:
        return torch.randperm(len(rows), generator=torch.Generator().manual_seed(1_000_003 * seed + epoch))

    def batch(step: int) -> Int[Tensor, "b length"]:
        places = range(step * batch_size, (step + 1) * batch_size)
        return rows[torch.stack([order(i // len(rows))[i % len(rows)] for i in places])]

    return batch


def on_policy(teacher: nn.Module, new_tokens: int, beta: float = 1.0, seed: int = 0) -> Loss:
    """On-policy distillation (arXiv:2306.13649): the student continues each row, and the teacher scores what it wrote.

    The loss is the divergence at the student's own tokens; drawing them has no gradient. The draws follow from `seed`
    and the rows, so that a resumed run repeats them.
    """

    def loss(model: Transformer, rows: Int[Tensor, "b n"]) -> Float[Tensor, ""]:
        g = torch.Generator(rows.device).manual_seed(seed + int(rows.sum()))
        drawn = sample(model, rows, new_tokens, generator=g).tokens
        whole = torch.cat((rows, drawn), dim=1)
        with torch.no_grad():
            p = score(teacher, whole)[:, -new_tokens:]
        return divergence(score(model, whole)[:, -new_tokens:], p, beta).mean()

    return loss


def exposure(secret: Float[Tensor, ""] | float, others: Float[Tensor, "n"]) -> float:
    """How much of a secret a model gives away, in bits: log2 of the number of candidates - log2 of the secret's rank.

    From log-probabilities of the secret and of all other candidates. Rank 1 is the likeliest: all log2(n + 1) bits.
    A model that never met the secret gives 1.44 bits on average. Carlini et al. 2019 (arXiv:1802.08232).
    """
    rank = 1 + int((torch.as_tensor(others) >= secret).sum())
    return math.log2(len(others) + 1) - math.log2(rank)
