"""SPCT: a judge that learns which principles to write, from right and wrong alone. Chapter 13.

Self-principled critique tuning (DeepSeek-GRM, Liu et al. 2025, arXiv:2504.02495): p ~ p_θ(query), C ~ r_θ(query,
answer, p), the score is read off C (`mini.critique`). A school and demonstrations, then its two stages, rejective
fine-tuning and rule-based reinforcement learning; at inference, the scores of k judgements are summed.

Shapes: k judgements of a case, n answers in it.
"""

import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mini.critique import (
    CRITIQUE_TOKENS,
    Judgement,
    draw_principles,
    judge,
    marks,
    read_principles,
    transcript,
    write_critique,
    write_principles,
)
from mini.distill import deal, masked_mean, score, surprise
from mini.grpo import Rollout, Settings, grpo, token_logprobs
from mini.model import Transformer
from mini.reward import (
    CRITERIA,
    END,
    IDS,
    JUDGE,
    Case,
    Query,
    draw_answer,
    draw_query,
    hidden_weights,
    last_hidden,
    stack,
    strictly_best,
)
from mini.reward import cases as draw_cases
from mini.train import Settings as Training
from mini.train import train


def rows(case: Case, judgement: Judgement) -> list[list[int]]:
    """The texts of a judgement, one an answer, as tokens."""
    pairs = zip(case.answers, judgement.critiques, strict=True)
    return [transcript(case.query, judgement.principles, answer, critique) for answer, critique in pairs]


def written(rows: Int[Tensor, "b n"]) -> tuple[Bool[Tensor, "b t"], Bool[Tensor, "b t"]]:
    """Which of rows[:, 1:] the judge writes: the principles, and the critique with its end."""

    def since(word: str) -> Tensor:
        return (rows == IDS[word]).cumsum(dim=1)[:, :-1] > 0

    target, answer = rows[:, 1:], (rows == IDS["answer:"]).cumsum(dim=1)[:, 1:] > 0
    return since("principles:") & ~answer, since("critique:") & (target >= 0)


def imitate(model: nn.Module, rows: Int[Tensor, "b n"]) -> Float[Tensor, ""]:
    """Nats a token of principles and of critiques, the two weighing alike; neither query nor answer has a loss."""
    nats = surprise(score(model, rows), rows[:, 1:])
    return sum(masked_mean(nats, part) for part in written(rows))


Odds = Callable[[Query], Sequence[float]]  # of each of the CRITERIA to be a principle


def any_principles(query: Query) -> Sequence[float]:
    """School's odds: nothing to do with the query, and truth most often, since it is the hardest to check."""
    return 6, 1, 1, 1, 1


def half_taught(query: Query) -> Sequence[float]:
    """The demonstrations' odds: half of the principles follow the hidden rule, half are drawn blindly."""
    return [(w + 1 / len(CRITERIA)) / 2 for w in hidden_weights(query.who, query.how)]


def lessons(
    n: int, seed: int | str, odds: Odds, plain: float = 0.0, held_out: bool = False
) -> Int[Tensor, "n t"]:
    """n transcripts of single answers with every check right; a share `plain` of them states no principles."""
    rng = random.Random(f"lessons {seed}")
    found = []
    for _ in range(n):
        query = draw_query(rng, held_out=held_out)
        answer, principles = draw_answer(rng, query), draw_principles(rng, odds(query))
        stated = [] if rng.random() < plain else write_principles(principles)
        found.append(transcript(query, stated, answer, write_critique(query, answer, principles)))
    return stack(found)


SCHOOL = Training(steps=400, decay=0.6)
SFT = Training(steps=100, lr=1.5e-3, matrix_lr=3e-3, warmup=5, decay=0.5, weight_decay=0.0)
RFT = replace(SFT, steps=140)
RL = Training(steps=40, lr=5e-4, matrix_lr=0.0, warmup=5, decay=0.5, weight_decay=0.0)
OBJECTIVE = Settings(max_new_tokens=CRITIQUE_TOKENS, average="batch", beta=0.1, texts=4)
LESSONS, DEMONSTRATIONS = 20_000, 800  # texts of single answers
RFT_CASES, RL_CASES = 400, 16  # cases of four answers: in all, and in each rollout


def go_to_school(seed: int = 0, **options) -> tuple[Transformer, list[dict[str, float]]]:
    """A judge that checks well and has no idea of what matters, and its history: about a minute on one core."""
    torch.manual_seed(seed)
    model = Transformer(JUDGE)
    batch = deal(lessons(LESSONS, seed, any_principles, plain=0.1), 64, seed)
    return model, train(model, batch, SCHOOL, loss=imitate, **options)


def supervised(
    model: Transformer, seed: int = 0, *, principled: bool = True, **options
) -> list[dict[str, float]]:
    """Fine-tune the judge in place on a few demonstrations."""
    shown = lessons(DEMONSTRATIONS, f"demonstrations {seed}", half_taught, plain=0.0 if principled else 1.0)
    return train(model, deal(shown, 64, seed), SFT, loss=imitate, **options)


@dataclass(frozen=True)
class Kept:
    """What rejective fine-tuning keeps of the judge's own judgements, and counts of what it rejects."""

    rows: Int[Tensor, "n t"]
    right: float  # the share of judgements that were right
    easy: int  # cases judged right every time: rejected
    never: int  # cases never judged right
    hinted: int  # right judgements of those, after a hint


def select(
    model: Transformer, cases: Sequence[Case], seed: int = 0, *, draws: int = 8, principled: bool = True
) -> Kept:
    """Draw judgements, keep the right ones, and nothing of a case that is right every time.

    A case that is never right is tried again with a hint. The paper's is the best answer's number in the prompt, which
    a judge this small cannot read; ours is a pair of principles drawn blindly. No hint stays in the rows that are kept.
    """
    g = torch.Generator().manual_seed(seed)
    drawn = judge(model, cases, draws, principled=principled, generator=g)
    right = strictly_best(marks(drawn), cases)
    easy, never = right.all(dim=1), ~right.any(dim=1)
    found = pick(cases, drawn, right & ~rearrange(easy, "c -> c 1"))
    lost = [case for case, hopeless in zip(cases, never.tolist(), strict=True) if hopeless]
    hinted = []
    if lost and principled:
        rng = random.Random(f"hints {seed}")
        again = judge(
            model, lost, draws, given=lambda _: draw_principles(rng, (1,) * len(CRITERIA)), generator=g
        )
        hinted = pick(lost, again, strictly_best(marks(again), lost))
    kept = [row for case, judgement in found + hinted for row in rows(case, judgement)]
    if not kept:
        raise ValueError(
            f"of {len(cases)} cases none was judged right; train the judge on demonstrations first"
        )
    return Kept(stack(kept), right.float().mean().item(), int(easy.sum()), len(lost), len(hinted))


def pick(
    cases: Sequence[Case], drawn: Sequence[Sequence[Judgement]], wanted: Bool[Tensor, "cases k"]
) -> list[tuple[Case, Judgement]]:
    """The wanted judgements, each with its case."""
    pairs = [(case, judgement) for case, own in zip(cases, drawn, strict=True) for judgement in own]
    return [pair for pair, is_wanted in zip(pairs, wanted.flatten().tolist(), strict=True) if is_wanted]


def rejective(
    model: Transformer, seed: int = 0, *, principled: bool = True, **options
) -> tuple[Kept, list[dict[str, float]]]:
    """Rejective fine-tuning, SPCT's first stage, in place: imitate the judge's own right judgements of hard cases."""
    kept = select(model, draw_cases(RFT_CASES, f"rft {seed}"), seed, principled=principled)
    return kept, train(model, deal(kept.rows, 64, seed), RFT, loss=imitate, **options)


def reinforced(
    model: Transformer, seed: int = 0, *, principled: bool = True, steps: int = RL.steps, **options
) -> list[dict[str, float]]:
    """Rule-based online RL, SPCT's second stage, in place: GRPO on +1 for a right judgement, -1 for any other."""
    return grpo(
        model,
        lambda i: draw_cases(RL_CASES, f"rl {seed} {i}"),
        rule,
        OBJECTIVE,
        replace(RL, steps=steps),
        end=END,
        draw=partial(rollout, principled=principled),
        reference=copy.deepcopy(model),
        seed=seed,
        **options,
    )


def rollout(
    model: Transformer,
    cases: Sequence[Case],
    reward: Callable[[Case, Judgement], float],
    settings: Settings,
    *,
    end: int,
    generator: torch.Generator | None = None,
    principled: bool = True,
) -> Rollout:
    """G judgements of each case for `mini.grpo.grpo`; its settings.texts is the number of answers.

    All texts of a judgement get its reward; principles count once, with the first answer.
    """
    how = dict(temperature=settings.temperature, principled=principled, generator=generator)
    drawn = judge(model, cases, settings.G, **how)
    texts = stack([row for case, own in zip(cases, drawn, strict=True) for j in own for row in rows(case, j)])
    principles, critiques = written(texts)
    first = rearrange(torch.arange(len(texts)) % settings.texts == 0, "n -> n 1")
    mask = critiques | (principles & first)
    with torch.no_grad():
        logprobs = token_logprobs(model, texts, settings.temperature)[0].masked_fill(~mask, 0.0)
    rewards = [[float(reward(case, j)) for j in own] for case, own in zip(cases, drawn, strict=True)]
    return Rollout(texts, mask, logprobs, torch.tensor(rewards))


def rule(case: Case, judgement: Judgement) -> float:
    """SPCT's reward: +1 where the best answer stands strictly above all others, -1 for any other judgement."""
    return 1.0 if strictly_best(torch.tensor([judgement.scores]).float(), [case])[0] else -1.0


def vote(
    scores: Float[Tensor, "cases k n"],
    cases: Sequence[Case],
    k: int,
    *,
    quality: Float[Tensor, "cases k"] | None = None,
    keep: float = 0.5,
    repeats: int = 8,
    seed: int = 0,
) -> Float[Tensor, "cases"]:
    """How often the summed scores of k judgements are right, over `repeats` draws of k from those there are.

    With `quality`, a meta reward model's opinion, only the share `keep` of the k that it ranks highest is summed.
    """
    if not 1 <= k <= scores.shape[1]:
        raise ValueError(f"k={k}: there are {scores.shape[1]} judgements of each case; use 1 to that")
    g = torch.Generator().manual_seed(seed)
    won = torch.zeros(len(scores))
    repeats = repeats if k < scores.shape[1] else 1
    for _ in range(repeats):
        places = torch.rand(scores.shape[:2], generator=g).argsort(dim=1)[:, :k]
        if quality is not None:
            best = quality.gather(1, places).topk(max(1, int(k * keep)), dim=1).indices
            places = places.gather(1, best)
        chosen = scores.gather(1, places[..., None].expand(-1, -1, scores.shape[2]))
        won += strictly_best(chosen.sum(dim=1), cases).float() / repeats
    return won


def audit(cases: Sequence[Case], judgements: Sequence[Sequence[Judgement]]) -> dict[str, float]:
    """Shares of what was written: readable, checks right by criterion, scores that add up, ties."""
    total = readable = summed = ties = 0
    right: dict[str, list[bool]] = {criterion: [] for criterion in CRITERIA}
    for case, own in zip(cases, judgements, strict=True):
        for judgement in own:
            total += 1
            if (found := judgement.read()) is None:
                continue
            readable += 1
            top = max(c.score for c in found)
            ties += sum(c.score == top for c in found) > 1
            for critique, known in zip(found, case.facts, strict=True):
                for criterion, met in critique.verdicts:
                    right[criterion].append(met == known[CRITERIA.index(criterion)])
            principles = read_principles(judgement.principles)
            for critique in found if principles else ():
                met = sum(w for (_, w), (_, yes) in zip(principles, critique.verdicts, strict=True) if yes)
                summed += (critique.score == 1 + met) / len(found)
    every = [x for own in right.values() for x in own]
    share = {criterion: sum(own) / max(1, len(own)) for criterion, own in right.items()}
    return dict(
        read=readable / total,
        checks=sum(every) / max(1, len(every)),
        **share,
        summed=summed / max(1, readable),
        ties=ties / max(1, readable),
    )


class Meta(nn.Module):
    """A logit for each judgement, from its n texts, one an answer, the one with the highest score first."""

    def __init__(self, model: Transformer, n: int = 4) -> None:
        super().__init__()
        self.model, self.n, d = model, n, model.config.dim
        self.value = nn.Sequential(nn.Linear(n * d, d), nn.SiLU(), nn.Linear(d, 1))
        nn.init.zeros_(self.value[2].weight)
        nn.init.zeros_(self.value[2].bias)

    def forward(self, rows: Int[Tensor, "bn t"]) -> Float[Tensor, "b"]:
        last = last_hidden(self.model, rows)
        return self.value(rearrange(last, "(b n) d -> b (n d)", n=self.n))[:, 0]


def verdicts(
    judgements: Sequence[Sequence[Sequence[int]]], right: Sequence[bool], seed: int = 0, batch: int = 24
) -> tuple[Callable[[int], Int[Tensor, "bn t"]], Callable[[nn.Module, Tensor], Float[Tensor, ""]]]:
    """`batch` and `loss` for `mini.train.train`: whether each judgement, given by its texts, was right."""

    def draw(step: int) -> Int[Tensor, "bn t"]:
        g = torch.Generator().manual_seed(1_000_003 * seed + step)
        chosen = torch.randint(len(judgements), (batch,), generator=g).tolist()
        return stack([[int(right[i]), *text] for i in chosen for text in judgements[i]])

    def loss(model: nn.Module, rows: Int[Tensor, "bn t"]) -> Float[Tensor, ""]:
        n = len(judgements[0])
        return F.binary_cross_entropy_with_logits(model(rows[:, 1:]), rows[::n, 0].float())

    return draw, loss
