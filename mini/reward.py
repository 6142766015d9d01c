"""Reward models: which of several answers is the best one for the person who asked? Chapter 12.

The domain: someone asks for a sum of two numbers, in a certain spirit. What counts (a true sum, few words, shown
steps, a polite word, a sure word) depends on who asks and on how, by a rule that no text ever states.

    boss quickly +40 +1 +30 +3          a query: the boss wants 41 + 33, quickly
    dear since 1 3 =70 =4 surely        an answer: it claims 74, with a kind word, the steps, and a sure word

Two kinds of judges read them. A scalar reward model (Bradley and Terry 1952; Christiano et al. 2017, arXiv:1706.03741)
gives an answer a number. A generative one (`mini.critique`) writes down what it looks at, and then a mark.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from mini.distill import deal, masked_mean, score, stack, surprise
from mini.grpo import Rollout, Settings
from mini.grpo import rollout as grpo_rollout
from mini.model import Config, Transformer
from mini.sample import sample
from mini.tasks import is_held_out
from mini.test_time import shares_of_best
from mini.train import Settings as Training
from mini.train import train

CRITERIA = ("truth", "brief", "steps", "polite", "sure")
WHO = {  # what each person cares for, in the order of CRITERIA
    "teacher": (1.2, 0, 1.8, 0, 0),
    "boss": (0.6, 1.8, 0, 0, 1.0),
    "child": (0, 0, 1.0, 1.8, 0),
    "friend": (0, 0.9, 0, 1.6, 0.6),
    "examiner": (2.2, 0, 1.0, 0, 0),
    "client": (1.0, 0, 0, 1.4, 1.2),
    "coder": (1.8, 1.2, 0, 0, 0),
    "nurse": (1.2, 0, 0, 1.2, 0),
}
HOW = {  # and what the way of asking adds
    "quickly": (0, 1.6, 0, 0, 0),
    "gently": (0, 0, 0, 1.6, 0),
    "fully": (0.3, 0, 1.6, 0, 0),
    "exactly": (1.7, 0, 0, 0, 0),
    "boldly": (0, 0.3, 0, 0, 1.7),
    "anyhow": (0, 0, 0, 0, 0),
}
UNSEEN = (  # combinations kept out of all training
    ("teacher", "quickly"),
    ("boss", "gently"),
    ("child", "exactly"),
    ("friend", "fully"),
    ("examiner", "boldly"),
    ("client", "quickly"),
    ("coder", "gently"),
    ("nurse", "boldly"),
    ("child", "boldly"),
    ("coder", "fully"),
)
SEEN = tuple((who, how) for who in WHO for how in HOW if (who, how) not in UNSEEN)

POLITE, SURE = ("dear", "please", "thanks"), ("surely", "clearly", "indeed")
FILLER = ("well", "so", "now", "hmm")
DIGITS, TENS = tuple(map(str, range(10))), tuple(str(10 * d) for d in range(1, 10))
COUNTS = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
BRIEF, LONGEST = 4, 10  # a brief answer has at most so many words; none has more than LONGEST
WEIGHTS = tuple(f"x{w}" for w in range(1, 9))
SCORES = tuple(f"{s}/10" for s in range(1, 11))
SPOKEN = (*POLITE, *SURE, *FILLER, *DIGITS, "since")  # in answers, beside the sum that they claim
MARKS = (
    "<eos>",
    "principles:",
    "answer:",
    "critique:",
    "better:",
    "first",
    "second",
    "yes",
    "no",
    "none",
    "since",
)
WORDS = (
    *(*MARKS, *CRITERIA, *WHO, *HOW, *POLITE, *SURE, *FILLER, *DIGITS, *TENS, *COUNTS, *WEIGHTS, *SCORES),
    *(f"{mark}{n}" for mark in "+=" for n in (*TENS, *DIGITS)),  # of a summand, of a claimed sum
)
IDS = {word: i for i, word in enumerate(WORDS)}
END = IDS["<eos>"]
JUDGE = Config(vocab_size=len(WORDS), dim=96, n_layers=3, n_heads=4, inter_dim=256, max_seq_len=40)


@dataclass(frozen=True)
class Query:
    who: str
    how: str
    a: int
    b: int

    @property
    def words(self) -> list[str]:
        numbers = [f"+{n}" for x in (self.a, self.b) for n in (x // 10 * 10, x % 10)]
        return [self.who, self.how, *numbers]


Answer = tuple[str, ...]


@dataclass(frozen=True)
class Case:
    """A query, and the answers that compete for it."""

    query: Query
    answers: tuple[Answer, ...]

    @cached_property
    def facts(self) -> list[tuple[bool, ...]]:
        """Which of the CRITERIA each answer meets."""
        return [facts(self.query, answer) for answer in self.answers]

    @cached_property
    def values(self) -> list[float]:
        """What each answer is worth by the hidden rule, from 0 to 1."""
        return [value(self.query, answer) for answer in self.answers]

    @cached_property
    def best(self) -> int:
        return max(range(len(self.answers)), key=self.values.__getitem__)


@lru_cache
def hidden_weights(who: str, how: str) -> tuple[float, ...]:
    """The hidden rule: how much each of the CRITERIA counts for this person and way of asking; they sum to 1."""
    z = [math.exp(a + b) for a, b in zip(WHO[who], HOW[how], strict=True)]
    return tuple(x / sum(z) for x in z)


def claimed(answer: Sequence[str]) -> tuple[str, str]:
    """Tens and units of the sum that an answer claims."""
    tens, units = (word[1:] for word in answer if word[0] == "=")
    return tens, units


def claim_place(answer: Sequence[str]) -> int:
    """Where in an answer its sum stands: the place of the tens."""
    return next(place for place, word in enumerate(answer) if word[0] == "=")


def is_answer(words: Sequence[str]) -> bool:
    """Whether it claims one sum, in at most LONGEST words of those that answers are made of."""
    marks = [i for i, word in enumerate(words) if word[0] == "="]
    claims = len(marks) == 2 and marks[1] == marks[0] + 1 and words[marks[0]][1:] in TENS
    known = all(word in SPOKEN for i, word in enumerate(words) if i not in marks)
    return bool(claims and words[marks[1]][1:] in DIGITS and known and len(words) <= LONGEST)


def true_sum(query: Query) -> tuple[str, str]:
    total = query.a + query.b
    return str(total // 10 * 10), str(total % 10)


def facts(query: Query, answer: Sequence[str]) -> tuple[bool, ...]:
    """Which of the CRITERIA an answer meets: computed, not read off."""
    return (
        claimed(answer) == true_sum(query),
        len(answer) <= BRIEF,
        "since" in answer,
        any(word in POLITE for word in answer),
        any(word in SURE for word in answer),
    )


def value(query: Query, answer: Sequence[str]) -> float:
    """What an answer is worth by the hidden rule: the weights of what it meets. No answer is worth nothing."""
    if not is_answer(answer):
        return 0.0
    weights = hidden_weights(query.who, query.how)
    return sum((w for w, met in zip(weights, facts(query, answer), strict=True) if met), 0.0)


def draw_query(
    rng: random.Random, combinations: Sequence[tuple[str, str]] = SEEN, held_out: bool = False
) -> Query:
    """Two-digit numbers whose sum has no carry and two digits. A fifth of all pairs, by hash, is for tests alone."""
    who, how = rng.choice(combinations)
    while True:
        (s, t), (u, v) = ((rng.randint(1, 8), rng.randint(0, 9)) for _ in range(2))
        a, b = 10 * s + t, 10 * u + v
        if s + u <= 9 and t + v <= 9 and is_held_out(f"{a} + {b}") == held_out:
            return Query(who, how, a, b)


def draw_answer(
    rng: random.Random,
    query: Query,
    true: float = 0.5,
    steps: float = 0.35,
    polite: float = 0.4,
    sure: float = 0.4,
) -> Answer:
    """An answer with the given chances of being true, showing steps, and having a polite and a sure word."""
    total, opening, closing = query.a + query.b, [], []
    if rng.random() >= true:  # one digit is off by one or two
        near = [total + d for d in (-20, -10, -2, -1, 1, 2, 10, 20)]
        total = rng.choice([n for n in near if 10 <= n <= 99])
    if rng.random() < polite:
        word = rng.choice(POLITE)
        (closing if word == "thanks" else opening).append(word)
    fillers = [rng.choice(FILLER) for _ in range(rng.choice((0, 0, 1, 2)))]
    before = rng.randint(0, len(fillers))
    shown = ["since", str(query.a % 10), str(query.b % 10)] if rng.random() < steps else []
    assured = [rng.choice(SURE)] if rng.random() < sure else []
    body = [*shown, f"={total // 10 * 10}", f"={total % 10}", *assured]
    return (*opening, *fillers[:before], *body, *fillers[before:], *closing)


def draw_case(
    rng: random.Random,
    n: int = 4,
    *,
    combinations: Sequence[tuple[str, str]] = SEEN,
    held_out: bool = False,
    margin: float = 0.05,
) -> Case:
    """A case of n answers, of which one is the best by at least `margin` of the hidden rule's value."""
    while True:
        query = draw_query(rng, combinations, held_out)
        case = Case(query, tuple(draw_answer(rng, query) for _ in range(n)))
        first, *rest = sorted(case.values, reverse=True)
        if not rest or first - rest[0] >= margin:
            return case


def cases(n: int, seed: int | str = 0, **options) -> list[Case]:
    """n cases, the same for a seed; held out ones with held_out=True. `options` as for `draw_case`."""
    rng = random.Random(f"cases {seed}")
    return [draw_case(rng, **options) for _ in range(n)]


def encode(words: Sequence[str]) -> list[int]:
    """Tokens of words. ValueError for a word that no judge knows."""
    if unknown := [word for word in words if word not in IDS]:
        raise ValueError(f"{unknown[0]!r} is not a word of this domain; see mini.reward.WORDS")
    return [IDS[word] for word in words]


def decode(tokens: Sequence[int]) -> list[str]:
    """Words of tokens; fillers, -1, are passed over."""
    return [WORDS[t] for t in tokens if t >= 0]


def text(query: Query, answer: Answer) -> list[int]:
    """A query with an answer, as tokens: what a writer learns from, and what a scalar model reads."""
    return encode([*query.words, "answer:", *answer, "<eos>"])


# The writer: a language model that answers queries, to be judged.

ANSWER_TOKENS = LONGEST + 1


def population(n: int, seed: int = 0, held_out: bool = False, **chances: float) -> Int[Tensor, "n t"]:
    """n queries with an answer each, as people might leave them; `chances` as for `draw_answer`."""
    rng = random.Random(f"population {seed}")
    queries = [draw_query(rng, held_out=held_out) for _ in range(n)]
    return stack([text(query, draw_answer(rng, query, **chances)) for query in queries])


def imitate_answers(model: nn.Module, rows: Int[Tensor, "b t"]) -> Float[Tensor, ""]:
    """Nats a token of the answers; queries have no loss."""
    answered = (rows == IDS["answer:"]).cumsum(dim=1)[:, :-1] > 0
    return masked_mean(surprise(score(model, rows), rows[:, 1:]), answered & (rows[:, 1:] >= 0))


WRITER_TRAINING = Training(steps=150, decay=0.6)


def trained_writer(seed: int = 0, **options) -> tuple[Transformer, list[dict[str, float]]]:
    """A writer that imitates the population, true half of the time, and its history. `options` as for `train`."""
    torch.manual_seed(seed)
    model = Transformer(JUDGE)
    batch = deal(population(20_000, seed), 128, seed)
    return model, train(model, batch, WRITER_TRAINING, loss=imitate_answers, **options)


def write(
    model: Transformer,
    queries: Sequence[Query],
    n: int = 1,
    *,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> list[list[Answer]]:
    """n answers to each query. What is no answer, see `is_answer`, is among them."""
    prompts = [encode([*query.words, "answer:"]) for query in queries]
    limits = dict(temperature=temperature, end=END, group=n, generator=generator)
    drawn = sample(model, prompts, ANSWER_TOKENS, **limits)
    answers = [spoken(row) for row in drawn.tokens.tolist()]
    return [answers[i * n : (i + 1) * n] for i in range(len(queries))]


def spoken(tokens: Sequence[int]) -> Answer:
    """The words of what a writer drew, without its end."""
    return tuple(word for word in decode(tokens) if word != "<eos>")


Opinion = Callable[[Sequence[Query], Sequence[Answer]], Sequence[float]]


def rollout(
    model: Transformer,
    queries: Sequence[Query],
    reward: Opinion,
    settings: Settings,
    *,
    end: int,
    generator: torch.Generator | None = None,
) -> Rollout:
    """G answers to each query for `mini.grpo.grpo`, marked all at once by reward(queries, answers), one query each.

    Only what is an answer is shown to the judge; anything else gets 1 less than the worst mark of the rollout.
    """
    prompts = [encode([*query.words, "answer:"]) for query in queries]
    drawn = grpo_rollout(model, prompts, lambda *_: 0.0, settings, end=end, generator=generator)
    asked = [query for query in queries for _ in range(settings.G)]
    answers = [spoken(row[len(prompts[0]) :]) for row in drawn.rows.tolist()]  # all prompts are of one length
    valid = [i for i, answer in enumerate(answers) if is_answer(answer)]
    marks = reward([asked[i] for i in valid], [answers[i] for i in valid])
    rewards = torch.full((len(answers),), min(marks, default=0.0) - 1)
    rewards[valid] = torch.tensor([float(mark) for mark in marks])
    return replace(drawn, rewards=rearrange(rewards, "(p g) -> p g", g=settings.G))


def last_hidden(model: Transformer, rows: Int[Tensor, "b n"]) -> Float[Tensor, "b dim"]:
    """The hidden state at the last word of each row, before the fillers."""
    return model.hidden(rows.clamp(min=0))[torch.arange(len(rows)), (rows >= 0).sum(dim=1) - 1]


class Scalar(nn.Module):
    """A scalar reward model: one number for a query and an answer, read off at the last word."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model = model
        self.value = nn.Linear(model.config.dim, 1)
        nn.init.zeros_(self.value.weight)

    def forward(self, rows: Int[Tensor, "b n"]) -> Float[Tensor, "b"]:
        return self.value(last_hidden(self.model, rows))[:, 0]

    @torch.no_grad()
    def marks(self, cases: Sequence[Case]) -> Float[Tensor, "cases n"]:
        """A number for each answer of each case."""
        n = len(cases[0].answers)
        texts = [text(case.query, answer) for case in cases for answer in case.answers]
        return rearrange(self(stack(texts)), "(c n) -> c n", n=n)


def bradley_terry(scores: Float[Tensor, "cases n"], best: Int[Tensor, "cases"]) -> Float[Tensor, ""]:
    """-ln σ(r_best - r_other): the mean over all others of all cases, in nats."""
    others = F.one_hot(best, scores.shape[1]) == 0
    gap = scores.gather(1, rearrange(best, "c -> c 1")) - scores
    return -F.logsigmoid(gap[others]).mean()


def preferences(
    cases: Sequence[Case], seed: int = 0, batch: int = 32
) -> tuple[Callable[[int], Int[Tensor, "b t"]], Callable[[nn.Module, Tensor], Float[Tensor, ""]]]:
    """`batch` and `loss` for `mini.train.train`: a Scalar learns which answer of each case is the best."""
    n = len(cases[0].answers)
    texts = []
    for case in cases:
        best, *others = sorted(range(n), key=lambda i, best=case.best: i != best)
        texts.append([text(case.query, case.answers[i]) for i in (best, *others)])

    def draw(step: int) -> Int[Tensor, "b t"]:
        g = torch.Generator().manual_seed(1_000_003 * seed + step)
        return stack([row for i in torch.randint(len(cases), (batch,), generator=g) for row in texts[i]])

    def loss(model: nn.Module, rows: Int[Tensor, "b t"]) -> Float[Tensor, ""]:
        scores = rearrange(model(rows), "(c n) -> c n", n=n)  # the best of each case stands first
        return bradley_terry(scores, torch.zeros(len(scores), dtype=torch.long))

    return draw, loss


def strictly_best(scores: Float[Tensor, "cases *k n"], cases: Sequence[Case]) -> Tensor:
    """Whether the best answer stands strictly above all others: a tie is wrong. Bool, [cases, *k]."""
    best = torch.tensor([case.best for case in cases]).view(-1, *[1] * (scores.dim() - 1))
    return (scores >= scores.take_along_dim(best, dim=-1)).sum(dim=-1) == 1


def best_of(
    marks: Float[Tensor, "queries m"], values: Float[Tensor, "queries m"], n: int
) -> Float[Tensor, "queries"]:
    """The mean value of the answer with the best mark among n, over all choices of n from the m answers there are.

    Exact, as `mini.test_time.best_of_k`; but among equal marks a later answer counts as the better one. With `marks`
    for values too, it is the mark that is to be expected.
    """
    m = marks.shape[1]
    if not 1 <= n <= m:
        raise ValueError(f"n={n}: there are {m} answers to each query; use 1 to that")
    return values.gather(1, marks.argsort(dim=1, stable=True).flip(1)) @ shares_of_best(m, n).to(values.dtype)


def kl_best_of(n: int) -> float:
    """KL of the best of n from the policy that wrote them, in nats, if no two marks are equal; else an upper bound.

    ln n - (n - 1)/n, as in Gao et al. 2022 (arXiv:2210.10760).
    """
    if n < 1:
        raise ValueError(f"n={n} answers; use at least 1")
    return math.log(n) - (n - 1) / n
