"""Tasks that a program can verify, and documents that show how to think about one. Chapter 10.

A `Task` is all that reinforcement learning and test-time compute ask for: prompts, held-out prompts, words, and a
verifier. Ours are the puzzles of this module; data from elsewhere fits by filling the same fields.
"""

import itertools
import random
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mini.distill import score, stack, surprise
from mini.model import Config, Transformer
from mini.sample import sample
from mini.train import Settings, train


@dataclass(frozen=True)
class Marks:
    """A verifier's verdict on one response, both from 0 to 1 (DeepSeek-R1, arXiv:2501.12948, section 2.2.2)."""

    accuracy: float  # the answer is right
    format: float  # thinking and answer stand in their tags


@dataclass(frozen=True)
class Task:
    """Prompts and a verifier. Prompts and responses are words with spaces between them; a response ends in <eos>."""

    prompts: Sequence[str]  # all of them; `train` and `held_out` are its two parts
    words: Sequence[str]  # all that prompts and responses are made of; a token is a word's place in here
    verify: Callable[[str, str], Marks]  # (prompt, response)
    new_tokens: int  # a response gets no more

    @cached_property
    def train(self) -> list[str]:
        return [p for p in self.prompts if not is_held_out(p)]

    @cached_property
    def held_out(self) -> list[str]:
        return [p for p in self.prompts if is_held_out(p)]

    @cached_property
    def ids(self) -> dict[str, int]:
        return {word: i for i, word in enumerate(self.words)}

    @property
    def end(self) -> int:
        """The token after which a response is over."""
        return self.ids["<eos>"]

    def encode(self, texts: Sequence[str]) -> Int[Tensor, "b n"]:
        """A row of tokens for each text; shorter ones are filled up with -1. ValueError for an unknown word."""
        rows = [text.split() for text in texts]
        if unknown := {word for row in rows for word in row} - self.ids.keys():
            raise ValueError(f"{sorted(unknown)[0]!r} is not a word of this task; see its `words`")
        return stack([[self.ids[word] for word in row] for row in rows])

    def ask(self, n: int, seed: int = 0) -> Callable[[int], list[list[int]]]:
        """`prompts(i)` for `mini.grpo.grpo`: n training prompts, as tokens, for rollout i."""

        def prompts(i: int) -> list[list[int]]:
            chosen = random.Random(f"prompts {seed} {i}").choices(self.train, k=n)
            return [[self.ids[word] for word in prompt.split()] for prompt in chosen]

        return prompts

    def reward(self, format: float = 0.1) -> Callable[[list[int], list[int]], float]:
        """`reward(prompt, answer)` for `mini.grpo.grpo`, of tokens: accuracy + `format` × format."""

        def reward(prompt: list[int], answer: list[int]) -> float:
            marks = self.verify(self.text(prompt), self.text(answer))
            return marks.accuracy + format * marks.format

        return reward

    def text(self, tokens: Iterable[int]) -> str:
        """The words of one prompt or response; fillers, -1, are passed over."""
        return " ".join(self.words[i] for i in tokens if i >= 0)

    def decode(self, rows: Int[Tensor, "b n"]) -> list[str]:
        return [self.text(row) for row in rows.tolist()]


def is_held_out(prompt: str) -> bool:
    """A fifth of all prompts, chosen by their text alone: however data is drawn, no such prompt is ever trained on."""
    return zlib.crc32(prompt.encode()) % 5 == 0


def from_entries(entries: Iterable[dict], score: Callable[[str, dict], float], new_tokens: int) -> Task:
    """A task made of questions from elsewhere, such as a data set of `reasoning-gym`: one token a character.

    entries: each with a "question" and an "answer", and with whatever `score` reads. score(answer, entry): from 0 to
    1, of which 1 alone counts as right, since some verifiers pay a little for any try. The answer is what a response
    has between <answer> and </answer>; a <think> part before it is allowed. ValueError where a question comes twice.
    """
    asked: dict[str, dict] = {}
    for entry in entries:
        prompt = spell(entry["question"])
        if prompt in asked:
            raise ValueError(f"the question {entry['question']!r} comes twice; give each once")
        asked[prompt] = entry

    def verify(prompt: str, response: str) -> Marks:
        match = re.fullmatch(r"(?:<think> [^<>]*</think> )?<answer> ([^<>]+) </answer> <eos>", response)
        if match is None:
            return Marks(0.0, 0.0)
        return Marks(float(score(unspell(match[1]), asked[prompt]) >= 1), 1.0)

    letters = {c for p, entry in asked.items() for c in f"{p} {spell(entry['answer'])}".split()}
    return Task(list(asked), [*sorted(letters), *TAGS], verify, new_tokens)


SPELLING = {" ": "␣", "\n": "⏎", "\t": "⇥"}  # so that spaces can stand between words


def spell(text: str) -> str:
    """`4 - 1` as words of one character each: `4 ␣ - ␣ 1`."""
    return " ".join(SPELLING.get(c, c) for c in text)


def unspell(words: str) -> str:
    back = {word: c for c, word in SPELLING.items()}
    return "".join(back.get(word, word) for word in words.split())


# The puzzle: find the operators a, b and c for which 5 a 7 b 0 c 3 = 8, worked from left to right, last digits only.

OPERATORS = {
    "+": lambda x, y: (x + y) % 10,
    "-": lambda x, y: (x - y) % 10,
    "*": lambda x, y: x * y % 10,
}
GAPS = "abc"
PATHS = list(itertools.product(OPERATORS, repeat=len(GAPS)))  # the 27 answers there are
NAMES = ["", *GAPS.upper()]  # of the values: A6 is the 6 after the gap a; the first value has no name
DIGITS = [str(d) for d in range(10)]
TAGS = ["<think>", "</think>", "<answer>", "</answer>", "<eos>"]
WORDS = [
    # of a prompt: the first value, what follows each gap, the goal
    *(f"{mark}{d}" for mark in ("", *GAPS, "=") for d in DIGITS),
    *(f"{name}{d}" for name in NAMES[1:] for d in DIGITS),  # the value after a gap
    *(f"{gap}{op}" for gap in GAPS for op in OPERATORS),  # the gap a gets a +
    "ok",
    "no",
    "sheet",
    *TAGS,
]
NEW_TOKENS = 160  # the longest search takes 117; one that lost its way may go round again
FORM = re.compile(r"<think> [^<>]*</think> <answer> a([-+*]) b([-+*]) c([-+*]) </answer> <eos>")


def values(prompt: str, path: Sequence[str]) -> list[int]:
    """The value after each gap, if the gaps get these operators."""
    first, *others = (int(word[-1]) for word in prompt.split()[:-1])
    return list(
        itertools.accumulate(range(len(path)), lambda v, i: OPERATORS[path[i]](v, others[i]), initial=first)
    )[1:]


def goal(prompt: str) -> int:
    return int(prompt[-1])


@lru_cache
def puzzles() -> Task:
    """All 10,388 puzzles that have exactly one answer among the 27."""
    prompts = []
    for digits in itertools.product(DIGITS, repeat=len(GAPS) + 1):
        question = " ".join((digits[0], *map("".join, zip(GAPS, digits[1:], strict=True))))
        results = [values(f"{question} =0", path)[-1] for path in PATHS]
        prompts += [f"{question} ={v}" for v in sorted(set(results)) if results.count(v) == 1]
    return Task(prompts, WORDS, verify, new_tokens=NEW_TOKENS)


def answer(response: str) -> tuple[str, ...] | None:
    """The operators that a response answers with; None unless it keeps the form."""
    match = FORM.fullmatch(response)
    return match.groups() if match else None


def verify(prompt: str, response: str) -> Marks:
    """Format: one <think> part, one <answer> of three operators, no more. Accuracy: the answer reaches the goal."""
    path = answer(response)
    return Marks(
        float(path is not None and values(prompt, path)[-1] == goal(prompt)), float(path is not None)
    )


def search(prompt: str, first: tuple[str, ...]) -> Iterator[tuple[list[str], tuple[str, ...], bool]]:
    """Try all paths in order, beginning with `first`: for each its words, the path, and whether it is right.

    The words of an attempt are its steps, `gap-operator result`, then `ok` or `no`; steps that it shares with the
    attempt before are not written again.
    """
    start, before = PATHS.index(first), None
    for path in PATHS[start:] + PATHS[:start]:
        shared = (
            0
            if before is None
            else next(i for i, (x, y) in enumerate(zip(path, before, strict=True)) if x != y)
        )
        results = values(prompt, path)
        words = []
        for i in range(shared, len(GAPS)):
            words += [GAPS[i] + path[i], f"{NAMES[i + 1]}{results[i]}"]
        right = results[-1] == goal(prompt)
        yield [*words, "ok" if right else "no"], path, right
        before = path


def document(prompt: str, rng: random.Random, go_on: float = 0.2, thorough: float = 0.2) -> str:
    """A response as a person might leave it: every step is right, and the answer is the last attempt.

    After a "no" the writer goes on with probability `go_on` and gives up otherwise; a share `thorough` of the
    writers never gives up.
    """
    never_stops = rng.random() < thorough
    thoughts: list[str] = []
    for words, path, right in search(prompt, rng.choice(PATHS)):  # noqa: B007
        thoughts += words
        if right or not (never_stops or rng.random() < go_on):
            break
    return " ".join(
        [
            "<think>",
            *thoughts,
            "</think> <answer>",
            *map("".join, zip(GAPS, path, strict=True)),
            "</answer> <eos>",
        ]
    )


def sheet(prompt: str, rng: random.Random, items: int = 9) -> str:
    """Exercises of a pupil, in any order: a value, one step from it, and at the last gap whether it reaches the goal.

    Half of those at the last gap do. No sheet shows a search.
    """
    due, words = [int(word[-1]) for word in prompt.split()[1:-1]], ["sheet", *prompt.split()]
    for _ in range(items):
        gap = rng.choice([0, 1, 2, 2, 2, 2])
        op, value = rng.choice(list(OPERATORS)), rng.randrange(10)
        if gap == 2 and rng.random() < 0.5:
            value = rng.choice([v for v in range(10) if OPERATORS[op](v, due[2]) == goal(prompt)] or [value])
        result = OPERATORS[op](value, due[gap])
        words += [f"{NAMES[gap]}{value}", f"{GAPS[gap]}{op}", f"{NAMES[gap + 1]}{result}"]
        words += ["ok" if result == goal(prompt) else "no"] if gap == 2 else []
    return " ".join(words)


@dataclass(frozen=True)
class Trace:
    """The anatomy of a response: what it did, whether it did it right."""

    steps: int  # a gap's operator and the value after it
    slips: int  # of them wrong, or worked from a value that is not there
    attempts: int  # steps at the last gap, each with its verdict: a self-check
    misjudged: int  # of them: `ok` or `no` does not fit the result and the goal
    refused: int  # attempts that ended in `no`
    retries: int  # of them: another attempt followed
    repeated: int  # attempts at a path that was tried before
    first: bool  # the first attempt's path is right
    faithful: bool  # the answer is the last attempt's path, which ended in `ok` and was worked without a slip


def read(prompt: str, response: str) -> Trace:
    """Take a response apart, also one that breaks the form."""
    words = response.split("</think>")[0].split()
    due = [word[-1] for word in prompt.split()[:-1]]
    path, results, clean = [""] * len(GAPS), [due[0], *[""] * len(GAPS)], [True] * (len(GAPS) + 1)
    steps = slips = misjudged = 0
    tried: list[tuple[str, ...]] = []
    verdicts: list[str] = []
    for i, word in enumerate(words):
        if len(word) != 2 or word[0] not in GAPS or word[1] not in OPERATORS:
            continue
        gap = GAPS.index(word[0])
        result, verdict = [*words[i + 1 : i + 3], "", ""][:2]
        fine = results[gap] != "" and result == NAMES[gap + 1] + str(
            OPERATORS[word[1]](int(results[gap][-1]), int(due[gap + 1]))
        )
        steps, slips = steps + 1, slips + (not fine)
        known = len(result) == 2 and result[0] == NAMES[gap + 1] and result[1].isdigit()
        path[gap], results[gap + 1], clean[gap + 1] = word[1], result if known else "", clean[gap] and fine
        if gap == len(GAPS) - 1:
            tried.append(tuple(path))
            verdicts.append(verdict)
            misjudged += verdict != ("ok" if result[-1:] == prompt[-1] else "no")
    refused = verdicts.count("no")
    return Trace(
        steps,
        slips,
        len(tried),
        misjudged,
        refused,
        retries=verdicts[:-1].count("no"),
        repeated=len(tried) - len(set(tried)),
        first=bool(tried) and "" not in tried[0] and values(prompt, tried[0])[-1] == goal(prompt),
        faithful=bool(tried) and answer(response) == tried[-1] and verdicts[-1] == "ok" and clean[-1],
    )


REASONER = Config(vocab_size=len(WORDS), dim=64, n_layers=2, n_heads=4, inter_dim=160, max_seq_len=168)
SCHOOL = Settings(steps=1200)
ROWS = 32  # in a batch


def lessons(
    seed: int = 0, sheets: float = 0.3, go_on: float = 0.2, thorough: float = 0.2
) -> Callable[[int], Int[Tensor, "b n"]]:
    """`batch(i)` for `train`: documents, and a share of exercise sheets. Rows of about one length stand together."""
    task = puzzles()

    @lru_cache(maxsize=2)
    def batches(group: int) -> list[Tensor]:
        rng = random.Random(f"lessons {seed} {group}")
        texts = []
        for prompt in rng.choices(task.train, k=8 * ROWS):
            plain = rng.random() >= sheets
            texts.append(
                f"{prompt} {document(prompt, rng, go_on, thorough)}" if plain else sheet(prompt, rng)
            )
        texts.sort(key=lambda text: len(text.split()))
        rows = [task.encode(texts[i : i + ROWS]) for i in range(0, len(texts), ROWS)]
        rng.shuffle(rows)
        return rows

    return lambda i: batches(i // 8)[i % 8]


def imitation(model: nn.Module, rows: Int[Tensor, "b n"]) -> Float[Tensor, ""]:
    """Cross-entropy of what follows the prompt. A sum over a constant, so that a token counts alike in every batch."""
    asked = len(GAPS) + 2
    logits = score(model, rows)[:, asked - 1 :]
    return surprise(logits, rows[:, asked:]).sum() / (15 * len(rows))


def pretrained(
    seed: int = 0,
    go_on: float = 0.2,
    thorough: float = 0.2,
    *,
    config: Config = REASONER,
    settings: Settings = SCHOOL,
    **options,
) -> tuple[Transformer, list[dict[str, float]]]:
    """A base model and its history: what school and documents teach, in about a minute on one core.

    go_on = thorough = 0: no document shows a second attempt. `options` are those of `mini.train.train`.
    """
    torch.manual_seed(seed)
    model = Transformer(config)
    return model, train(
        model, lessons(seed, go_on=go_on, thorough=thorough), settings, loss=imitation, **options
    )


@dataclass(frozen=True)
class Answers:
    """Responses to prompts, with what the verifier and the reader of traces say."""

    prompts: list[str]
    responses: list[str]
    marks: list[Marks]
    traces: list[Trace]

    def summary(self) -> dict[str, float]:
        """Shares and means. retries: of all `no`; slips: of all steps; faithful: of all right answers."""
        n, right = len(self.prompts), sum(m.accuracy for m in self.marks)
        total = {f: sum(getattr(t, f) for t in self.traces) for f in Trace.__dataclass_fields__}
        faithful = sum(m.accuracy * t.faithful for m, t in zip(self.marks, self.traces, strict=True))
        return {
            "accuracy": right / n,
            "format": sum(m.format for m in self.marks) / n,
            "length": sum(len(r.split()) for r in self.responses) / n,
            "attempts": total["attempts"] / n,
            "retries": total["retries"] / max(total["refused"], 1),
            "slips": total["slips"] / max(total["steps"], 1),
            "misjudged": total["misjudged"] / max(total["attempts"], 1),
            "first": total["first"] / n,
            "faithful": faithful / max(right, 1),
        }


def answers(
    model: Transformer, prompts: Sequence[str] | int = 500, temperature: float = 1.0, seed: int = 0
) -> Answers:
    """One response to each prompt; a number asks for as many held-out puzzles, always the same."""
    task = puzzles()
    if isinstance(prompts, int):
        prompts = random.Random("held out").sample(task.held_out, prompts)
    g = torch.Generator().manual_seed(seed)
    drawn = sample(
        model, task.encode(prompts), task.new_tokens, temperature=temperature, end=task.end, generator=g
    )
    pairs = list(zip(prompts, task.decode(drawn.tokens), strict=True))
    return Answers(
        list(prompts), [r for _, r in pairs], [verify(*p) for p in pairs], [read(*p) for p in pairs]
    )
