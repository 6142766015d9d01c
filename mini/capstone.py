"""The whole line: a small V3, from it a small R1 and a judge that teaches it, and a student. Chapter 15.

    base      reads documents: latent attention, experts, a second token ahead, eight bits if wanted     (03 to 06)
    r1        base, shown a few worked answers, then paid by GRPO for true sums                          (10)
    judge     base as a judge that states principles: demonstrations, its own best, RL by rule           (13)
    aligned   r1, paid by GRPO for true sums and by the judge's marks                                    (12, 14)
    student   a tenth of the size, on aligned's answers                                                  (08)

    python -m mini.capstone --folder line             all of it, or what is missing there
    torchrun --nproc-per-node 2 -m mini.capstone      in two processes (07)

The answers, queries and judgements are those of chapters 12 to 14 (`mini.reward`, `mini.critique`).
"""

import argparse
import copy
import math
import random
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor, nn

from mini import parallel, reward, spct
from mini.audit import generative, opinion_of
from mini.budget import forward_flops
from mini.critique import judge, marks
from mini.distill import deal, stack, surprise
from mini.fp8 import to_fp8
from mini.grpo import Settings as Objective
from mini.grpo import grpo
from mini.model import Config, Transformer, cross_entropy
from mini.moe import balanced
from mini.mtp import MTP, mtp_loss
from mini.reward import (
    ANSWER_TOKENS,
    END,
    WORDS,
    Answer,
    Opinion,
    Query,
    draw_answer,
    draw_query,
    facts,
    imitate_answers,
    is_answer,
    population,
    text,
    value,
    write,
)
from mini.train import Settings, add_options, from_options, load, run_program, save, train

V3_MINI = Config(
    vocab_size=len(WORDS),
    dim=96,
    n_layers=3,
    n_heads=4,
    inter_dim=264,
    max_seq_len=64,
    kv_lora_rank=32,
    qk_nope_head_dim=16,
    qk_rope_head_dim=8,
    v_head_dim=24,
    n_dense_layers=1,
    n_routed_experts=8,
    n_shared_experts=1,
    n_activated_experts=2,
    moe_inter_dim=88,
)
STUDENT = Config(vocab_size=len(WORDS), dim=48, n_layers=2, n_heads=2, inter_dim=128, max_seq_len=64)


@dataclass(frozen=True)
class Plan:
    """Which pieces the line has, and how long its stages train."""

    mla: bool = True  # latent attention; without, multi-head attention
    moe: bool = True  # experts; without, one feed-forward as wide as what a token passes through
    mtp: bool = True  # a second token ahead
    fp8: bool = False  # the base in V3's eight bits; simulated, therefore slower
    cold_start: bool = True  # worked answers before RL; without, R1-Zero
    seed: int = 0
    base_steps: int = 300
    r1_steps: int = 30
    judge_steps: int = 20
    aligned_steps: int = 40
    student_steps: int = 300


# Each stage: those that it starts from, and the fields of Plan that concern it besides theirs.
STAGES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "base": ((), ("mla", "moe", "mtp", "fp8", "seed", "base_steps")),
    "r1": (("base",), ("cold_start", "r1_steps")),
    "sft": (("base",), ()),
    "rft": (("sft",), ()),
    "judge": (("rft",), ("judge_steps",)),
    "aligned": (("r1", "judge"), ("aligned_steps",)),
    "student": (("aligned",), ("student_steps",)),
}
DOCUMENTS, BATCH = 20_000, 48  # of each kind; rows a step
COLD = 64  # worked answers
TEXTS = 6_000  # answers that the student learns from


def concerns(stage: str, plan: Plan) -> dict[str, int | bool]:
    """The fields of the plan that the result of a stage depends on."""
    if stage not in STAGES:
        raise ValueError(f"stage={stage!r}; use one of {', '.join(STAGES)}")
    before, own = STAGES[stage]
    found = {name: getattr(plan, name) for name in own}
    for earlier in before:
        found = concerns(earlier, plan) | found
    return found


def config(plan: Plan, stage: str = "base") -> Config:
    """The model of a stage. What is switched off is replaced by its dense, multi-head forerunner of the same work."""
    if stage == "student":
        return STUDENT
    off = () if plan.mla else ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    if not plan.moe:
        off += (
            "n_dense_layers",
            "n_routed_experts",
            "n_shared_experts",
            "n_activated_experts",
            "moe_inter_dim",
        )
    return replace(V3_MINI, **dict.fromkeys(off, 0))


def documents(n: int, seed: int, held_out: bool = False) -> list[list[int]]:
    """n answers as people leave them, half of them false, and n pages of a checker's school, shuffled."""
    pages = spct.lessons(n, seed, spct.any_principles, plain=0.1, held_out=held_out)
    rows = pages.tolist() + population(n, seed, held_out).tolist()
    found = [[token for token in row if token >= 0] for row in rows]
    random.Random(seed).shuffle(found)
    return found


def pack(documents: Sequence[Sequence[int]], length: int) -> Int[Tensor, "n length"]:
    """Rows of whole documents one after another, the last of each cut off where the row is full; no fillers."""
    rows, row = [], []
    for document in documents:
        row += document
        if len(row) >= length:
            rows.append(row[:length])
            row = []
    if not rows:
        raise ValueError(f"{len(documents)} documents fill no row of {length} tokens; give more")
    return torch.tensor(rows)


@lru_cache(maxsize=1)
def reading(seed: int, length: int) -> Int[Tensor, "n length"]:
    """The base's documents, packed; plans that are compared read the same ones."""
    return pack(documents(DOCUMENTS, seed), length)


def pretrained(
    plan: Plan, config: Config, batch: int = BATCH, **options
) -> tuple[nn.Module, list[dict[str, float]]]:
    """A base, inside its MTP if the plan has one, and its history. `config`: `config(plan)`, or another to compare."""
    torch.manual_seed(plan.seed)
    model = Transformer(config)
    net = MTP(model) if plan.mtp else model
    if plan.fp8:
        to_fp8(net)
    loss = mtp_loss() if plan.mtp else cross_entropy
    loss = balanced(loss) if config.n_routed_experts else loss
    rows = reading(plan.seed, config.max_seq_len + 1)
    settings = Settings(steps=plan.base_steps, decay=0.6)
    return net, train(net, deal(rows, batch, plan.seed), settings, loss=loss, **options)


RL = Settings(steps=1, lr=1e-3, matrix_lr=0.0, warmup=5, decay=0.5, weight_decay=0.0)
OBJECTIVE = Objective(max_new_tokens=ANSWER_TOKENS, average="batch", beta=0.05)
QUERIES = 32  # a rollout


def practise(
    model: Transformer, opinion: Opinion, steps: int, seed: int, **options
) -> list[dict[str, float]]:
    """GRPO in place on queries to which `opinion` marks the answers."""

    def queries(i: int) -> list[Query]:
        rng = random.Random(f"practise {seed} {i}")
        return [draw_query(rng) for _ in range(QUERIES)]

    options |= dict(end=END, draw=reward.rollout, reference=copy.deepcopy(model), seed=seed)
    return grpo(model, queries, opinion, OBJECTIVE, replace(RL, steps=steps), **options)


def warm_up(model: Transformer, seed: int) -> None:
    """R1's cold start in place: a few worked answers, with their steps, all true."""
    rng = random.Random(f"cold {seed}")
    queries = [draw_query(rng) for _ in range(COLD)]
    rows = stack([text(query, draw_answer(rng, query, true=1.0, steps=1.0)) for query in queries])
    settings = replace(RL, steps=20, lr=1.5e-3)
    train(model, deal(rows, 32, seed), settings, loss=imitate_answers, progress=False)


def true_sums(queries: Sequence[Query], answers: Sequence[Answer]) -> list[float]:
    """A verifier's marks: 1 for a true sum, 0 for another."""
    return [float(facts(query, answer)[0]) for query, answer in zip(queries, answers, strict=True)]


def both(grm: Transformer, k: int = 2) -> Opinion:
    """A true sum is worth 1, and the judge's mean mark of k a tenth of it: no mark makes up for a false sum."""

    def opinion(queries: Sequence[Query], answers: Sequence[Answer]) -> list[float]:
        # from what is judged, so that a resumed run hears the same judgements
        seed = zlib.crc32(repr((queries, answers)).encode())
        said = opinion_of(generative("judge", grm), k, seed)(queries, answers)
        return [true + mark / 10 for true, mark in zip(true_sums(queries, answers), said, strict=True)]

    return opinion


def texts_of(model: Transformer, n: int, seed: int) -> Int[Tensor, "n t"]:
    """n answers of the model to queries of its own, two to each; the few that are no answers are left out."""
    rng, g = random.Random(f"texts {seed}"), torch.Generator().manual_seed(seed)
    pairs = answered(model, [draw_query(rng) for _ in range(n // 2)], 2, g)
    return stack([text(query, answer) for query, answer in pairs if is_answer(answer)])


def answered(
    model: Transformer, queries: Sequence[Query], each: int, generator: torch.Generator
) -> list[tuple[Query, Answer]]:
    """Each query with each of its answers, drawn for 500 queries at a time."""
    parts = [queries[i : i + 500] for i in range(0, len(queries), 500)]
    drawn = [own for part in parts for own in write(model, part, each, generator=generator)]
    return [(query, answer) for query, own in zip(queries, drawn, strict=True) for answer in own]


def imitator(
    rows: Int[Tensor, "n t"], steps: int, seed: int, **options
) -> tuple[Transformer, list[dict[str, float]]]:
    """A student that learns the answers in the rows, and its history."""
    torch.manual_seed(seed)
    model = Transformer(STUDENT)
    return model, train(
        model, deal(rows, 64, seed), Settings(steps=steps, decay=0.6), loss=imitate_answers, **options
    )


Made = tuple[dict[str, Tensor], dict]
Before = Callable[[str], Transformer]  # the model of an earlier stage


def make(
    stage: str, plan: Plan, before: Before, checkpoint: Path | None = None, progress: bool = True
) -> Made:
    """A stage's tensors, and facts: its training's `history`, the `tokens` that went through models, and `measured`.

    tokens: `trained` (forward and backward), `drawn` by this stage's own model (forward alone: sampling, reference),
    and `other`, through the judge or the teacher. With `checkpoint`, an interrupted stage goes on.
    """
    concerns(stage, plan)
    done = load(checkpoint)[1]["history"][-1]["step"] if checkpoint and checkpoint.exists() else 0
    options, seed = dict(checkpoint=checkpoint, progress=progress), plan.seed
    others = {"aligned": "judge", "student": "aligned"}
    other = before(others[stage]) if stage in others else None
    with metered(other) as elsewhere, metered(start := start_of(stage, before)) as tokens:
        if stage == "base":
            net, history = pretrained(plan, config(plan), **options)
        elif stage == "student":
            net, history = imitator(texts_of(other, TEXTS, seed), plan.student_steps, seed, **options)
        else:
            net, history = start, taught(stage, start, other, plan, **options)
    again = len(history) / max(1, len(history) - done)  # an interrupted run's counts are lost: as many a step
    counted = {name: round(n * again) for name, n in (tokens | {"other": elsewhere["drawn"]}).items()}
    if start is None:
        counted["trained"] = history[-1]["tokens"]
    measured = judging(net) if stage in ("sft", "rft", "judge") else writing(plain(net))
    return net.state_dict(), dict(history=history, tokens=counted, measured=measured)


def start_of(stage: str, before: Before) -> Transformer | None:
    """A copy of the model that a stage goes on from; None where it begins with a new one."""
    return None if stage in ("base", "student") else copy.deepcopy(before(STAGES[stage][0][0]))


def taught(
    stage: str, model: Transformer, other: Transformer | None, plan: Plan, **options
) -> list[dict[str, float]]:
    """Take a model through a stage, in place; its history. `other`: the judge, where one gives marks."""
    if stage == "sft":
        return spct.supervised(model, plan.seed, **options)
    if stage == "rft":
        return spct.rejective(model, plan.seed, **options)[1]
    if stage == "judge":
        return spct.reinforced(model, plan.seed, steps=plan.judge_steps, **options)
    if stage == "aligned":
        return practise(model, both(other), plan.aligned_steps, plan.seed, **options)
    if plan.cold_start:
        warm_up(model, plan.seed)
    return practise(model, true_sums, plan.r1_steps, plan.seed, **options)


def built(stage: str, plan: Plan, tensors: dict[str, Tensor]) -> nn.Module:
    """The model of a stage from its tensors; the base comes inside its MTP, if the plan has one."""
    model = Transformer(config(plan, stage))
    net = MTP(model) if stage == "base" and plan.mtp else model
    net.load_state_dict(tensors)
    return net.eval()


@contextmanager
def metered(model: Transformer | None) -> Iterator[dict[str, int]]:
    """Count the tokens that go through a model and the copies made of it: `trained` with gradients, `drawn` without."""
    counts = dict(trained=0, drawn=0)

    def count(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        counts["trained" if torch.is_grad_enabled() else "drawn"] += output.numel() // output.shape[-1]

    hook = model.norm.register_forward_hook(count) if model is not None else None
    try:
        yield counts
    finally:
        if hook is not None:
            hook.remove()


def flops(stage: str, plan: Plan, tokens: dict[str, int]) -> float:
    """What a stage computed, by chapter 00's rules: one forward pass a token, three where it is trained on."""
    own, other = (forward_flops(config(plan, name), seq_len=32) for name in (stage, "base"))
    if stage == "base" and plan.mtp:
        own += mtp_flops(config(plan))
    return own * (3 * tokens["trained"] + tokens["drawn"]) + other * tokens["other"]


def mtp_flops(c: Config) -> float:
    """Of a further depth of prediction, a token: one layer more, two vectors made one, the head again."""
    layer = forward_flops(replace(c, n_layers=c.n_layers + 1)) - forward_flops(c)
    return layer + 4 * c.dim**2 + 2 * c.vocab_size * c.dim


def writing(model: Transformer, n: int = 200, seed: int = 0, each: int = 2) -> dict[str, float]:
    """The answers to n held-out queries: shares that are answers and that meet each criterion, value, words."""
    rng, g = random.Random(f"writing {seed}"), torch.Generator().manual_seed(seed)
    pairs = answered(model, [draw_query(rng, held_out=True) for _ in range(n)], each, g)
    met = (
        torch.tensor([facts(*pair) if is_answer(pair[1]) else (False,) * 5 for pair in pairs])
        .float()
        .mean(dim=0)
    )
    found = dict(zip(reward.CRITERIA, met.tolist(), strict=True))
    found |= dict(answers=sum(is_answer(answer) for _, answer in pairs) / len(pairs))
    found |= dict(words=sum(len(answer) for _, answer in pairs) / len(pairs))
    return found | dict(value=sum(value(*pair) for pair in pairs) / len(pairs))


def judging(model: Transformer, n: int = 100, k: int = 16, seed: int = 0) -> dict[str, float]:
    """How often judgements of n held-out cases are right, singly and with 4 and k votes; the shares of `audit`."""
    cases = reward.cases(n, f"judging {seed}", held_out=True)
    drawn = judge(model, cases, k, generator=torch.Generator().manual_seed(seed))
    scores = marks(drawn)
    found = {f"right at {votes}": spct.vote(scores, cases, votes).mean().item() for votes in (1, 4, k)}
    return found | spct.audit(cases, drawn)


@torch.no_grad()
def bits(model: Transformer, n: int = 400) -> float:
    """Bits a word of held-out documents."""
    rows = pack(documents(n, seed=0, held_out=True), V3_MINI.max_seq_len + 1)
    return surprise(model(rows[:, :-1]), rows[:, 1:]).mean().item() / math.log(2)


class Folder:
    """Keeps stages in files of one folder; a stage that is there is loaded."""

    def __init__(self, path: str | Path, plan: Plan) -> None:
        self.path, self.plan = Path(path), plan
        self.here: dict[str, tuple[nn.Module, dict]] = {}

    def stage(self, name: str) -> tuple[nn.Module, dict]:
        """The model and the facts of a stage, made now, with all that it starts from, if they are not there."""
        if name not in self.here:
            path = self.path / f"{name}.safetensors"
            missing = parallel.anywhere(not path.exists())  # all processes make it, or none
            tensors, facts = self.made(name, path) if missing else self.kept(name, path)
            self.here[name] = built(name, self.plan, tensors), facts
        return self.here[name]

    def made(self, name: str, path: Path) -> Made:
        partial_run = path.with_suffix(".partial")
        tensors, facts = make(name, self.plan, lambda earlier: plain(self.stage(earlier)[0]), partial_run)
        facts |= dict(kind="capstone", plan=concerns(name, self.plan))
        if parallel.rank() == 0:
            save(path, tensors, facts)
            partial_run.unlink(missing_ok=True)
        return tensors, facts

    def kept(self, name: str, path: Path) -> Made:
        tensors, facts = load(path)
        for field, ours in concerns(name, self.plan).items():
            theirs = facts.get("plan", {}).get(field)
            if theirs != ours:
                raise ValueError(
                    f"{path} was made with {field}={theirs}, this plan has {field}={ours}; "
                    "name another --folder, or remove the file"
                )
        return tensors, facts


def plain(net: nn.Module) -> Transformer:
    """The model without the depths that look further ahead."""
    return net.model if isinstance(net, MTP) else net


def main(arguments: list[str] | None = None) -> int:
    """Make the line, or the rest of it; 0 when done, 1 with a sentence on stderr when not."""
    parser = argparse.ArgumentParser(
        prog="python -m mini.capstone",
        description="A small V3, an R1 and a judge made from it, and a student. What is in the folder is kept; "
        "the same command goes on where an interrupted one stopped. Under torchrun, all processes make it together.",
    )
    parser.add_argument("--folder", default="line", help="where the stages are kept (default: %(default)s)")
    parser.add_argument(
        "--until", choices=STAGES, default="student", help="the last stage (default: %(default)s)"
    )
    add_options(parser, Plan())
    options = parser.parse_args(arguments)
    return run_program(
        lambda _: report(Folder(options.folder, from_options(Plan, options)), options.until),
        f"The same command goes on from {options.folder}",
    )


def report(line: Folder, until: str) -> None:
    """Make each stage up to `until`, and print a line of what it cost and what it can do."""
    for name in list(STAGES)[: list(STAGES).index(until) + 1]:
        _, facts = line.stage(name)
        if parallel.rank():
            continue
        seconds, work = facts["history"][-1]["seconds"], flops(name, line.plan, facts["tokens"])
        m = facts["measured"]
        said = (
            f"right at 1 {m['right at 1']:.2f}, at 16 {m['right at 16']:.2f}"
            if "right at 1" in m
            else f"true {m['truth']:.2f}, value {m['value']:.2f}"
        )
        print(f"{name:8} {seconds:5.0f} s  {work / 1e9:7.0f} GFLOP  {said}")


if __name__ == "__main__":
    sys.exit(main())
