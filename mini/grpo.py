"""GRPO: a model learns from rewards, each answer measured against other answers to the same question. Chapter 10.

    A_i = (r_i - mean(r)) / std(r)                        r: rewards of a group of G answers to one prompt
    ρ_it = π(o_it | q, o_i,<t) / π_old(o_it | q, o_i,<t)    how much likelier token t of answer i has become
    J = mean over answers and tokens of  min(ρ A, clip(ρ, 1 - ε, 1 + ε) A) - β KL(π || π_ref)

DeepSeekMath (arXiv:2402.03300). DeepSeek-V3 (arXiv:2412.19437, equations 26-28) and R1 (arXiv:2501.12948, equations
1-3) print another ratio and no 1/|o_i|; Dr. GRPO (arXiv:2503.20783), DAPO (arXiv:2503.14476) and GSPO
(arXiv:2507.18071) each change a term, and so does DeepSeek-V3.2. Every such term is a switch of `Settings`.

Not offered: DAPO's dynamic sampling (a group without signal is counted, not drawn again) and its penalty for length
(that is a reward); the other losses of TRL 1.16 (cispo, sapo, luspo, vespo), its second clip `delta`, its bonuses and
masks by entropy.

Shapes: n answers, those of one prompt next to one another; t tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mini import parallel
from mini.distill import masked_mean, score, stack
from mini.model import Transformer
from mini.sample import sample
from mini.train import Evaluate, train
from mini.train import Settings as Training

KLS = ("k1", "k2", "k3")
Prompts = Callable[[int], Sequence]  # of rollout i; lists of tokens, unless `draw` reads something else
Reward = Callable[[list[int], list[int]], float]


@dataclass(frozen=True)
class Settings:
    """The objective and the rollouts, by the papers' names; how to step is `mini.train.Settings`.

    The defaults are DeepSeekMath's objective, but for its β of 0.04. TRL's are others: average="batch", and where β is
    set, kl_times_ratio=True.

    ratio: "token" (DeepSeekMath); "sequence", the whole answer's (as V3 and R1 print it); "sequence-mean", that to the
    power 1/|o| (GSPO).
    average: "sequence", each answer's mean, then the mean of these (TRL's "grpo"); "batch", the mean of all tokens of
    an update (TRL's "bnpo"; DAPO if the rollout is one update); "constant", each answer's sum / max_new_tokens, then
    the mean of these (Dr. GRPO).
    """

    G: int = 8  # answers to each prompt
    max_new_tokens: int = 128
    temperature: float = 1.0
    scale: bool = True  # divide advantages by the group's deviation; Dr. GRPO does not
    epsilon: float = 0.2  # the ratio counts down to 1 - epsilon
    epsilon_high: float | None = None  # and up to 1 + epsilon_high (DAPO: 0.28); None: epsilon
    ratio: str = "token"
    average: str = "sequence"
    beta: float = 0.0  # weight of the KL to the reference
    kl: str = "k3"
    kl_times_ratio: bool = False  # gives k3 the gradient of KL(π || π_ref) (DeepSeek-V3.2, arXiv:2512.02556)
    epochs: int = 1  # how often a rollout is gone through
    minibatches: int = 1  # in how many updates each time
    texts: int = 1  # rows of an answer; a judgement of chapter 13 has one for each thing that it judges

    def __post_init__(self) -> None:
        if self.G < 2:
            raise ValueError(f"G={self.G}: an answer is compared with others; use at least 2")
        if not self.temperature > 0:
            raise ValueError(
                f"temperature={self.temperature} must be above 0: the same answer G times teaches nothing"
            )
        if self.epochs < 1 or self.minibatches < 1:
            raise ValueError(f"epochs={self.epochs}, minibatches={self.minibatches}; both must be at least 1")
        one_of("ratio", self.ratio, ("token", "sequence", "sequence-mean"))
        one_of("average", self.average, ("sequence", "batch", "constant"))
        one_of("kl", self.kl, KLS)


def one_of(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r}; use one of {', '.join(allowed)}")


@dataclass(frozen=True)
class Run(Training):
    """How to step, with what else a run that goes on must have in common with the one that was interrupted."""

    objective: Settings = Settings()
    seed: int = 0


def advantages(rewards: Float[Tensor, "prompts group"], scale: bool = True) -> Float[Tensor, "prompts group"]:
    """How much better each answer is than its group's mean; with `scale`, in deviations of the group.

    The papers do not say which deviation: this is the sample's (over G - 1) plus 1e-4, as in TRL, so that two +1 and
    two -1 give ±0.866. Equal rewards give 0. ValueError for a group of one.
    """
    if rewards.shape[1] < 2:
        raise ValueError(
            f"a group of {rewards.shape[1]} has nothing to be compared with; give 2 rewards or more"
        )
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    return centred / (rewards.std(dim=1, keepdim=True) + 1e-4) if scale else centred


def kl_estimate(
    logprobs: Float[Tensor, "*b"], ref_logprobs: Float[Tensor, "*b"], kind: str = "k3"
) -> Float[Tensor, "*b"]:
    """KL(π || π_ref) from single tokens that π drew, in nats. With r = π_ref / π (Schulman 2020):

    k1 = -ln r, k2 = (ln r)² / 2, k3 = r - ln r - 1 (DeepSeek's). The mean of k1 and of k3 is the KL, that of k2 nearly.
    As losses they differ: on average the gradient of k2 is that of KL(π || π_ref), the gradient of k3 is that of
    KL(π_ref || π), and that of k1 is nothing at all.
    """
    one_of("kind", kind, KLS)
    log_r = ref_logprobs - logprobs
    if kind == "k1":
        return -log_r
    return log_r**2 / 2 if kind == "k2" else log_r.exp() - log_r - 1


def ratios(
    logprobs: Float[Tensor, "n t"],
    old_logprobs: Float[Tensor, "n t"],
    mask: Bool[Tensor, "n t"],
    kind: str = "token",
) -> Float[Tensor, "n t"]:
    """ρ: how many times as likely each token, or its whole answer, is for the policy as for the one that drew it."""
    log_ratio = (logprobs - old_logprobs).masked_fill(~mask, 0.0)
    if kind != "token":
        log_ratio = log_ratio.sum(dim=1, keepdim=True).expand_as(mask)
    if kind == "sequence-mean":
        log_ratio = log_ratio / mask.sum(dim=1, keepdim=True).clamp(min=1)
    return log_ratio.exp()


def gains(
    rho: Float[Tensor, "n t"], advantages: Float[Tensor, "n"], settings: Settings
) -> tuple[Float[Tensor, "n t"], Float[Tensor, "n t"]]:
    """ρ A and clip(ρ) A of each token. Where the second is smaller, the token has no gradient any more."""
    high = settings.epsilon if settings.epsilon_high is None else settings.epsilon_high
    a = rearrange(advantages, "n -> n 1")
    return rho * a, rho.clamp(1 - settings.epsilon, 1 + high) * a


def policy_loss(
    logprobs: Float[Tensor, "n t"],
    old_logprobs: Float[Tensor, "n t"],
    advantages: Float[Tensor, "n"],
    mask: Bool[Tensor, "n t"],
    settings: Settings,
    ref_logprobs: Float[Tensor, "n t"] | None = None,
) -> Float[Tensor, ""]:
    """-J: its gradient makes answers of positive advantage likelier. `Settings` says which J.

    logprobs: of the tokens drawn, by the policy that learns. old_logprobs: by the policy that drew them, at the
    temperature at which it did, without gradient. ref_logprobs: by the reference, for a β above 0. mask: the answers'
    tokens, the end token included; neither prompts nor fillers.

    The KL is taken token by token for every kind of ratio (V3 and R1 print that of the whole answer, too).
    """
    if settings.beta and ref_logprobs is None:
        raise ValueError(f"beta={settings.beta} needs ref_logprobs, the reference's of the same tokens")
    rho = ratios(logprobs, old_logprobs, mask, settings.ratio)
    losses = -torch.minimum(*gains(rho, advantages, settings))
    if settings.beta:
        both = (x.masked_fill(~mask, 0.0) for x in (logprobs, ref_logprobs))
        kl = kl_estimate(*both, settings.kl)
        losses = losses + settings.beta * (kl * rho if settings.kl_times_ratio else kl)
    if settings.average == "batch":
        return masked_mean(losses, mask)
    length = mask.sum(dim=1).clamp(min=1) if settings.average == "sequence" else settings.max_new_tokens
    return (losses.masked_fill(~mask, 0.0).sum(dim=1) / length).mean()


def token_logprobs(
    model: nn.Module, rows: Int[Tensor, "n length"], temperature: float = 1.0, chunk: int = 32
) -> tuple[Float[Tensor, "n t"], Float[Tensor, "n t"]]:
    """Log-probability of each token of the rows but the first, and the entropy there (no gradient); 0 at fillers.

    A few rows of about the same length go through the model at a time: it reads few fillers, and what it computes
    stays in the processor's cache, which made an update of 256 answers four times as fast as in one piece.
    """
    lengths = (rows >= 0).sum(dim=1)
    order = lengths.argsort(stable=True)
    found = []
    for part in order.split(chunk):
        short = rows[part, : int(lengths[part].max())]
        logp = (score(model, short) / temperature).log_softmax(dim=-1)
        drawn = logp.gather(-1, rearrange(short[:, 1:].clamp(min=0), "n t -> n t 1"))[..., 0]
        with torch.no_grad():
            entropy = -(logp.exp() * logp).sum(dim=-1)
        both = torch.stack((drawn, entropy)).masked_fill(short[:, 1:] < 0, 0.0)
        found.append(F.pad(both, (0, rows.shape[1] - short.shape[1])))
    logprobs, entropy = torch.cat(found, dim=1)[:, order.argsort()]
    return logprobs, entropy.detach()


@dataclass(frozen=True)
class Rollout:
    """Answers and what they earned. Row i belongs to answer i // texts; past its end it holds -1."""

    rows: Int[Tensor, "n length"]  # prompt and answer
    mask: Bool[Tensor, "n t"]  # which of rows[:, 1:] are the answer's, its end token included
    logprobs: Float[Tensor, "n t"]  # of these, at the temperature that drew them; 0 elsewhere
    rewards: Float[Tensor, "prompts group"]

    def __post_init__(self) -> None:
        if not (finite := self.rewards.isfinite()).all():
            raise ValueError(f"a reward is {self.rewards[~finite][0]}; give every answer a finite number")


def rollout(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    reward: Reward,
    settings: Settings,
    *,
    end: int,
    generator: torch.Generator | None = None,
) -> Rollout:
    """G answers to each prompt, and `reward(prompt, answer)` of each, both as lists of tokens.

    An answer that found its end has the token `end` last; one that was cut off at max_new_tokens has not.
    """
    limits = dict(temperature=settings.temperature, end=end, group=settings.G, generator=generator)
    drawn = sample(model, prompts, settings.max_new_tokens, **limits)
    device = drawn.tokens.device
    asked = [list(prompt) for prompt in prompts for _ in range(settings.G)]
    answers = [row[:n] for row, n in zip(drawn.tokens.tolist(), drawn.lengths.tolist(), strict=True)]
    pairs = list(zip(asked, answers, strict=True))
    rewards = torch.tensor([float(reward(prompt, answer)) for prompt, answer in pairs])
    rows = stack([prompt + answer for prompt, answer in pairs]).to(device)
    starts = torch.tensor([len(prompt) for prompt in asked], device=device)
    mask = (rows >= 0)[:, 1:] & (
        torch.arange(1, rows.shape[1], device=device) >= rearrange(starts, "n -> n 1")
    )
    if settings.temperature == 1:  # the sampler's own, which differ from one pass over the row by about 1e-6
        logprobs = torch.zeros(mask.shape, device=device).masked_scatter(
            mask, drawn.logprobs[drawn.tokens >= 0]
        )
    else:
        with torch.no_grad():
            logprobs = token_logprobs(model, rows, settings.temperature)[0].masked_fill(~mask, 0.0)
    return Rollout(rows, mask, logprobs, rearrange(rewards, "(p g) -> p g", g=settings.G).to(device))


class Policy(nn.Module):
    """A model with its latest rollout, so that a checkpoint between two updates holds what the second one needs.

    The rollout's tensors are as long as the model reads: the shapes in a checkpoint must not change during a run.
    """

    def __init__(self, model: Transformer, n_prompts: int, group: int, texts: int) -> None:
        super().__init__()
        self.model = model
        n, length, device = n_prompts * group * texts, model.config.max_seq_len, model.embed.weight.device
        self.register_buffer("rows", torch.full((n, length), -1, device=device))
        self.register_buffer("mask", torch.zeros(n, length - 1, dtype=torch.bool, device=device))
        self.register_buffer("logprobs", torch.zeros(n, length - 1, device=device))
        self.register_buffer("ref_logprobs", torch.zeros(n, length - 1, device=device))
        self.register_buffer("rewards", torch.zeros(n_prompts, group, device=device))

    def keep(self, new: Rollout, ref_logprobs: Float[Tensor, "n t"]) -> None:
        rewards = parallel.all_rows(new.rewards)
        if rewards.shape != self.rewards.shape:
            count = f"{len(rewards)} prompts, and {len(self.rewards)} at step 0"
            raise ValueError(f"{count}; give as many at every step")
        more = len(self.rows[0]) - new.rows.shape[1]
        self.rows.copy_(parallel.all_rows(F.pad(new.rows, (0, more), value=-1)))
        self.mask.copy_(parallel.all_rows(F.pad(new.mask, (0, more)).int()))
        self.logprobs.copy_(parallel.all_rows(F.pad(new.logprobs, (0, more))))
        self.ref_logprobs.copy_(parallel.all_rows(F.pad(ref_logprobs, (0, more))))
        self.rewards.copy_(rewards)


def grpo(
    model: Transformer,
    prompts: Prompts,
    reward: Reward,
    settings: Settings,
    training: Training,
    *,
    end: int,
    draw: Callable[..., Rollout] = rollout,
    reference: Transformer | None = None,
    seed: int = 0,
    evaluate: Evaluate | None = None,
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> list[dict[str, float]]:
    """Train `model` in place by GRPO; return the rows of `mini.train.train`, one an update, with the columns below.

    `prompts(i)` are the token lists of rollout i: always as many, and a function of i alone. Each rollout serves for
    epochs × minibatches updates, of which there are training.steps. `draw` makes a rollout of them, as `rollout` does:
    chapters 12 and 13 have prompts, answers and rewards of other kinds. `reference`: a copy of the model as it was at
    first, for a β above 0 or to watch how far the policy goes. `evaluate(model)` runs every training.eval_every.

    Under torchrun (chapter 07) each process draws the answers to its share of the prompts, and all learn from all.

    With `checkpoint`, a run that was interrupted and is called again repeats the unbroken one bit for bit, also from
    between two updates on the same rollout, which is saved with the model. ValueError if it was another run's.

    Columns, of the rollout: reward, its mean; length of the answers, in tokens; ended, the share of answers that found
    their end; silent, the share of groups with equal rewards, which teach nothing; kl from the reference, in nats a
    token (k3). Of the update: entropy, in nats a token; clipped, the share of tokens whose gradient the clip took.
    """
    if settings.beta and reference is None:
        raise ValueError(f"beta={settings.beta} needs a reference; give reference=copy.deepcopy(model)")
    policy = Policy(model, len(prompts(0)), settings.G, settings.texts)
    n, device = len(policy.rows), policy.rows.device
    if len(policy.rewards) % parallel.world_size():
        raise ValueError(
            f"{len(policy.rewards)} prompts cannot be shared evenly by {parallel.world_size()} processes; "
            f"use {parallel.world_size() * -(-len(policy.rewards) // parallel.world_size())}"
        )
    if n % settings.minibatches:
        raise ValueError(
            f"minibatches={settings.minibatches} do not divide the {n} answers of a rollout evenly"
        )
    places = torch.arange(n)
    seen: dict[str, float] = {}

    def batch(step: int) -> Int[Tensor, "b length"]:
        """This update's rows; where the last rollout is used up, the model as it is now makes another."""
        nonlocal places
        number, update = divmod(step, settings.epochs * settings.minibatches)
        epoch, part = divmod(update, settings.minibatches)
        if update == 0:
            # of several processes (chapter 07), each draws for its own prompts
            share = 1_000_003 * seed + number
            g = torch.Generator(device).manual_seed(share * parallel.world_size() + parallel.rank())
            mine = prompts(number)[parallel.rank() :: parallel.world_size()]
            new = draw(model, mine, reward, settings, end=end, generator=g)
            ref_logprobs = new.logprobs
            if reference is not None:
                with torch.no_grad():
                    ref_logprobs = token_logprobs(reference, new.rows, settings.temperature)[0]
            policy.keep(new, ref_logprobs)
        g = torch.Generator().manual_seed(1_000_003 * seed + number * settings.epochs + epoch)
        places = torch.randperm(n, generator=g).chunk(settings.minibatches)[part].to(device)
        seen["step"] = step + 1
        rows = policy.rows[places]
        return rows[:, : int((rows >= 0).sum(dim=1).max())]

    def loss(policy: Policy, rows: Int[Tensor, "b length"]) -> Float[Tensor, ""]:
        own = parallel.my_rows(places)
        parts = policy.mask, policy.logprobs, policy.ref_logprobs
        mask, old, ref = (part[own, : rows.shape[1] - 1] for part in parts)
        a = repeat(advantages(policy.rewards, settings.scale), "p g -> (p g r)", r=settings.texts)[own]
        logprobs, entropy = token_logprobs(policy.model, rows, settings.temperature)
        free, cut = gains(ratios(logprobs.detach(), old, mask, settings.ratio), a, settings)
        seen["entropy"] = masked_mean(entropy, mask).item()
        seen["clipped"] = masked_mean((cut < free).float(), mask).item()
        return policy_loss(logprobs, old, a, mask, settings, ref)

    def columns(policy: Policy) -> dict[str, float]:
        row = dict(reward=policy.rewards.mean().item(), length=policy.mask.sum().item() / n)
        last = (policy.rows >= 0).sum(dim=1, keepdim=True) - 1
        row["ended"] = (policy.rows.gather(1, last) == end).float().mean().item()
        row["silent"] = (policy.rewards == policy.rewards[:, :1]).all(dim=1).float().mean().item()
        if reference is not None:
            row["kl"] = masked_mean(kl_estimate(policy.logprobs, policy.ref_logprobs), policy.mask).item()
        row |= seen
        done = row.pop("step")
        if evaluate is not None and (
            done == training.steps or (training.eval_every and done % training.eval_every == 0)
        ):
            row |= evaluate(model)
        return row

    # each update has the columns above
    run = Run(**{**vars(training), "eval_every": 1}, objective=settings, seed=seed)
    return train(policy, batch, run, loss=loss, evaluate=columns, checkpoint=checkpoint, progress=progress)
