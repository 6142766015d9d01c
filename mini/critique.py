"""A judge that says why: principles, a critique of each answer, a mark. Chapters 12 and 13.

    boss quickly +40 +1 +30 +3          the query
    principles: brief x6 sure x3        what shall count, written by the judge; the weights sum to 9
    answer: dear =70 =4 surely          each answer by itself, under the same principles
    critique: brief four yes sure surely yes 10/10

The form of DeepSeek-GRM (Liu et al. 2025, arXiv:2504.02495): principles, then a critique, from which the score is read
off by rule. There, one text judges all answers; here, each answer has a text of its own, so that a judge cannot
compare, and the order of the answers cannot matter.

Shapes: k judgements of a case, n answers in it.
"""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from mini.distill import score
from mini.model import Transformer
from mini.reward import (
    BRIEF,
    COUNTS,
    CRITERIA,
    DIGITS,
    END,
    FILLER,
    POLITE,
    SCORES,
    SURE,
    TENS,
    WEIGHTS,
    Answer,
    Case,
    Query,
    claim_place,
    claimed,
    decode,
    encode,
    facts,
    stack,
    true_sum,
)
from mini.sample import sample

Principles = tuple[tuple[str, int], tuple[str, int]]  # two criteria with their weights, which sum to 9
PRINCIPLE_TOKENS = 4
CRITIQUE_TOKENS = 11  # of the longest: truth 70 70 4 3 no steps since yes 4/10 <eos>


def draw_principles(rng: random.Random, odds: Sequence[float]) -> Principles:
    """Two criteria, drawn by these odds; the first gets 5 to 8 of the 9 points."""
    first = rng.choices(CRITERIA, odds)[0]
    second = rng.choices(CRITERIA, [0 if c == first else p for c, p in zip(CRITERIA, odds, strict=True)])[0]
    w = rng.randint(5, 8)
    return (first, w), (second, 9 - w)


def write_principles(principles: Principles) -> list[str]:
    return [word for criterion, weight in principles for word in (criterion, f"x{weight}")]


def check(query: Query, answer: Answer, criterion: str) -> list[str]:
    """The words of a correct check: the criterion, what is to be seen in the answer, and whether it meets it.

    For truth: the tens of the sum and the claimed tens, and if they agree the units as well. The verdict then hangs on
    the last two words; a judge this small took far longer to learn one that hangs on four.
    """
    if criterion == "truth":
        (tens, units), (said_tens, said_units) = true_sum(query), claimed(answer)
        evidence = [tens, said_tens, *([units, said_units] if tens == said_tens else [])]
    elif criterion == "brief":
        evidence = [COUNTS[len(answer) - 2]]
    else:
        wanted = {"steps": ("since",), "polite": POLITE, "sure": SURE}[criterion]
        evidence = [next((word for word in answer if word in wanted), "none")]
    met = facts(query, answer)[CRITERIA.index(criterion)]
    return [criterion, *evidence, "yes" if met else "no"]


def write_critique(query: Query, answer: Answer, principles: Principles) -> list[str]:
    """The words of a correct critique: a check for each principle, then 1 + the weights of those met."""
    checks = [check(query, answer, criterion) for criterion, _ in principles]
    met = sum(w for (_, w), words in zip(principles, checks, strict=True) if words[-1] == "yes")
    return [*(word for words in checks for word in words), SCORES[met], "<eos>"]


def transcript(
    query: Query, principles: Sequence[str], answer: Answer, critique: Sequence[str] = ()
) -> list[int]:
    """The tokens of a judge's text of one answer, as far as it is known."""
    return encode([*query.words, "principles:", *principles, "answer:", *answer, "critique:", *critique])


def read_principles(words: Sequence[str]) -> Principles | None:
    """Two criteria and their weights; None where it is not that."""
    if len(words) != 4 or words[0] not in CRITERIA or words[2] not in CRITERIA:
        return None
    if words[1] not in WEIGHTS or words[3] not in WEIGHTS:
        return None
    first, second = WEIGHTS.index(words[1]) + 1, WEIGHTS.index(words[3]) + 1
    return ((words[0], first), (words[2], second)) if first + second == 9 and words[0] != words[2] else None


EVIDENCE = {  # the words that a check may show; one of these forms
    "truth": ((TENS, TENS), (TENS, TENS, DIGITS, DIGITS)),
    "brief": ((COUNTS,),),
    "steps": ((("since", "none"),),),
    "polite": (((*POLITE, "none"),),),
    "sure": (((*SURE, "none"),),),
}


@dataclass(frozen=True)
class Critique:
    """What a critique says."""

    verdicts: tuple[tuple[str, bool], ...]  # criterion, met or not
    score: int  # 1 to 10


def read_critique(words: Sequence[str], criteria: Sequence[str] | None = None) -> Critique | None:
    """Take a critique apart; None where it is not two checks and a score, or the checks of other criteria."""
    rest, verdicts = list(words), []
    for i in range(2):
        criterion = rest[0] if rest else ""
        if criterion not in (CRITERIA if criteria is None else (criteria[i],)):
            return None
        for form in EVIDENCE[criterion]:
            part = rest[1 : len(form) + 2]
            fits = all(w in allowed for w, allowed in zip(part, (*form, ("yes", "no")), strict=False))
            if fits and len(part) == len(form) + 1:
                break
        else:
            return None
        verdicts.append((criterion, part[-1] == "yes"))
        rest = rest[len(part) + 1 :]
    if len(rest) != 2 or rest[0] not in SCORES or rest[1] != "<eos>":
        return None
    return Critique(tuple(verdicts), SCORES.index(rest[0]) + 1)


@dataclass(frozen=True)
class Judgement:
    """Principles, and a critique of each answer of a case, as words."""

    principles: tuple[str, ...]
    critiques: tuple[tuple[str, ...], ...]

    def read(self) -> list[Critique] | None:
        """The critiques; None if the principles or any critique cannot be read."""
        criteria = None
        if self.principles:
            principles = read_principles(self.principles)
            if principles is None:
                return None
            criteria = [criterion for criterion, _ in principles]
        found = [read_critique(words, criteria) for words in self.critiques]
        return None if None in found else found

    @property
    def scores(self) -> tuple[int, ...]:
        """1 to 10 for each answer; all 0 if the judgement cannot be read: it prefers nothing."""
        found = self.read()
        return tuple(0 if found is None else c.score for c in found or self.critiques)


def state_principles(
    model: Transformer,
    cases: Sequence[Case],
    k: int,
    temperature: float,
    given: Callable[[Case], Principles] | None,
    generator: torch.Generator | None,
) -> tuple[list[list[tuple[str, ...]]], Float[Tensor, "cases k"]]:
    """The words of k principles for each case, drawn or given, and their log-probability in nats; 0 for given ones."""
    if given is not None:
        told = [[tuple(write_principles(given(case))) for _ in range(k)] for case in cases]
        return told, torch.zeros(len(cases), k)
    prompts = [encode([*case.query.words, "principles:"]) for case in cases]
    drawn = sample(model, prompts, PRINCIPLE_TOKENS, temperature=temperature, group=k, generator=generator)
    words = [tuple(decode(row)) for row in drawn.tokens.tolist()]
    stated = [words[i * k : (i + 1) * k] for i in range(len(cases))]
    return stated, rearrange(drawn.logprobs.sum(dim=1), "(c k) -> c k", k=k)


@torch.no_grad()
def judge(
    model: Transformer,
    cases: Sequence[Case],
    k: int = 1,
    *,
    temperature: float = 1.0,
    given: Callable[[Case], Principles] | None = None,
    principled: bool = True,
    generator: torch.Generator | None = None,
    batch: int = 512,
) -> list[list[Judgement]]:
    """k judgements of each case. given(case): principles put into the judge's mouth; principled=False: none at all.

    Principles are drawn once a judgement; the answers are then judged apart, `batch` texts at a time.
    """
    if principled:
        principles, _ = state_principles(model, cases, k, temperature, given, generator)
    else:
        principles = [[()] * k for _ in cases]
    limits = dict(temperature=temperature, end=END, generator=generator)
    prompts = [
        transcript(case.query, p, answer)
        for case, own in zip(cases, principles, strict=True)
        for p in own
        for answer in case.answers
    ]
    critiques = []
    for start in range(0, len(prompts), batch):
        drawn = sample(model, prompts[start : start + batch], CRITIQUE_TOKENS, **limits)
        critiques += [tuple(decode(row)) for row in drawn.tokens.tolist()]
    found = iter(critiques)
    return [
        [Judgement(p, tuple(next(found) for _ in case.answers)) for p in own]
        for case, own in zip(cases, principles, strict=True)
    ]


def marks(judgements: Sequence[Sequence[Judgement]]) -> Float[Tensor, "cases k n"]:
    return torch.tensor([[j.scores for j in row] for row in judgements]).float()


Text = tuple[Query, tuple[str, ...], Answer]  # with the principles that are stated


@torch.no_grad()
def judge_fast(
    model: Transformer,
    cases: Sequence[Case],
    k: int,
    *,
    given: Callable[[Case], Principles] | None = None,
    generator: torch.Generator | None = None,
) -> tuple[list[list[Judgement]], Float[Tensor, "cases k"]]:
    """What `judge` draws at temperature 1, in less time; and the log-probability of its principles, in nats.

    Speculative decoding (Leviathan et al. 2023, arXiv:2211.17192; chapter 05) with the right critique as its draft:
    token t of the draft is kept with the probability that the judge gives it; at the first that is not, another token
    is drawn from what is left of the judge's probabilities, and the rest is sampled. So what comes out has the judge's
    own distribution, whatever the draft is.

    given(case): principles put into the judge's mouth, asked for anew for each judgement; their log-probability is 0.
    """
    principles, logprobs = state_principles(model, cases, k, 1.0, given, generator)
    wanted = Counter(
        (case.query, p, a)
        for case, own in zip(cases, principles, strict=True)
        for p in own
        for a in case.answers
    )
    texts = sorted(wanted, key=lambda text: len(text[2]))  # rows of about the same length read few fillers
    drawn: dict[Text, list[tuple[str, ...]]] = {text: [] for text in texts}
    # drafts that were left, by how many tokens may follow
    broken: dict[int, list[tuple[Text, list[int]]]] = {}
    for start in range(0, len(texts), 128):
        part = texts[start : start + 128]
        followed = follow(model, part, [wanted[text] for text in part], generator)
        for text, kept in zip(part, followed, strict=True):
            for tokens in kept:
                if len(tokens) == CRITIQUE_TOKENS or tokens[-1:] == [END]:
                    drawn[text].append(tuple(decode(tokens)))
                else:
                    broken.setdefault(CRITIQUE_TOKENS - len(tokens), []).append((text, tokens))
    for left, rows in broken.items():
        prompts = [transcript(*text) + tokens for text, tokens in rows]
        ends = sample(model, prompts, left, end=END, generator=generator).tokens.tolist()
        for (text, tokens), end in zip(rows, ends, strict=True):
            drawn[text].append(tuple(decode(tokens + end)))
    # those left early stand last, and must not come together in a judgement
    for text, found in drawn.items():
        order = torch.randperm(len(found), generator=generator).tolist()
        drawn[text] = [found[i] for i in order]
    judged = [
        [Judgement(p, tuple(drawn[case.query, p, a].pop() for a in case.answers)) for p in own]
        for case, own in zip(cases, principles, strict=True)
    ]
    return judged, logprobs


def follow(
    model: Transformer, texts: Sequence[Text], times: Sequence[int], generator: torch.Generator | None
) -> list[list[list[int]]]:
    """So many beginnings of critiques of each text: its draft as far as the judge follows it, and one word more."""
    prompts, drafts = [transcript(*text) for text in texts], []
    for query, stated, answer in texts:
        principles = read_principles(stated)
        drafts.append(encode(write_critique(query, answer, principles)) if principles else [])
    logits = score(model, stack([p + d for p, d in zip(prompts, drafts, strict=True)]))
    found = []
    for prompt, draft, own, n in zip(prompts, drafts, logits, times, strict=True):
        odds = own[len(prompt) - 1 :][: len(draft)].softmax(dim=-1)
        kept = odds[torch.arange(len(draft)), draft]
        follows = torch.rand(n, len(draft), generator=generator) < kept
        found.append([])
        for upto in follows.int().cumprod(dim=1).sum(dim=1).tolist():
            tokens = draft[:upto]
            if upto < len(draft):
                rest = odds[upto].index_fill(0, torch.tensor(draft[upto]), 0.0)
                tokens = [*tokens, int(torch.multinomial(rest, 1, generator=generator))]
            found[-1].append(tokens)
    return found


# Critique and revise (Saunders et al. 2022, arXiv:2206.05802; Bai et al. 2022, arXiv:2212.08073).


def corrected(answer: Answer, critique: Sequence[str]) -> Answer:
    """The answer with what the critique's check of truth has computed in the place of what was claimed.

    The check reads `truth, tens, claimed tens` and, if these agree, `units, claimed units`: where the tens were wrong,
    the units stay as claimed. Without a check of truth, the whole answer stays.
    """
    if "truth" not in critique:
        return answer
    i = critique.index("truth")
    at = claim_place(answer)
    units = f"={critique[i + 3]}" if critique[i + 3] in DIGITS else answer[at + 1]
    return (*answer[:at], f"={critique[i + 1]}", units, *answer[at + 2 :])


def revised(query: Query, answer: Answer, critique: Sequence[str]) -> Answer:
    """Repair what the critique says no to, and nothing else; an unreadable critique changes nothing.

    The repairs are ours: put in the critique's own digits, show the steps, add a polite or a sure word, leave out
    fillers (and, if that is not brief enough, the steps).
    """
    read = read_critique(critique)
    if read is None:
        return answer
    for criterion in [c for c, met in read.verdicts if not met]:
        at = claim_place(answer)
        if criterion == "truth":
            answer = corrected(answer, critique)
        elif criterion == "steps":
            answer = (*answer[:at], "since", str(query.a % 10), str(query.b % 10), *answer[at:])
        elif criterion == "polite":
            answer = ("dear", *answer)
        elif criterion == "sure":
            answer = (*answer[: at + 2], "surely", *answer[at + 2 :])
        else:
            answer = tuple(word for word in answer if word not in FILLER)
            if len(answer) > BRIEF and "since" in answer:
                since = answer.index("since")
                answer = (*answer[:since], *answer[since + 3 :])
    return answer
