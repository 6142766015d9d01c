"""Mixture of experts: many small feed-forwards, of which each token passes through a few. Chapter 04.

A *router* scores every expert for every token; the best k are *activated*, and their outputs are added up with
weights. *Shared* experts serve every token. After DeepSeekMoE (arXiv:2401.06066) and DeepSeek-V3
(arXiv:2412.19437, equations 12-20); names are those of V3's inference code.

Shapes: n tokens, d width of the stream, f hidden width of an expert, e routed experts, k activated ones.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange, reduce
from jaxtyping import Float, Int
from torch import Tensor, nn

from mini.attention import Stacked


@dataclass(frozen=True)
class Routing:
    """What a router decided for n tokens."""

    scores: Float[Tensor, "n e"]  # affinity s of each expert, from 0 to 1
    indices: Int[Tensor, "n k"]  # the experts chosen
    weights: Float[Tensor, "n k"]  # the gates g: what their outputs are multiplied by

    def load(self) -> Int[Tensor, "e"]:
        """Tokens that each expert received."""
        return torch.bincount(rearrange(self.indices, "n k -> (n k)"), minlength=self.scores.shape[1])


def choose_experts(
    scores: Float[Tensor, "n e"],
    n_activated: int,
    n_groups: int = 1,
    n_limited_groups: int = 1,
) -> Int[Tensor, "n k"]:
    """The `n_activated` best-scored experts of each token, from its `n_limited_groups` best groups alone.

    A group (the experts of one machine) is as good as its two best experts together: V3's code, and §2.1.2 of the
    report at V3's sizes. Groups that lose are put at minus infinity; zero would beat a score below zero.
    """
    if n_groups > 1:
        by_group = rearrange(scores, "n (group e) -> n group e", group=n_groups)
        best = by_group.topk(2, dim=-1).values.sum(dim=-1).topk(n_limited_groups, dim=-1).indices
        loses = torch.ones_like(by_group[..., 0], dtype=torch.bool).scatter(1, best, False)
        scores = rearrange(by_group.masked_fill(loses[..., None], -torch.inf), "n group e -> n (group e)")
    return scores.topk(n_activated, dim=-1, sorted=False).indices


class Gate(nn.Module):
    """The router: sigmoid affinities, a bias that takes part in the choice only, gates from the chosen alone.

    s = σ(W x); the k largest of s + b are chosen; g = s / Σ s over the chosen, times `route_scale`. With
    `norm_topk_prob=False`, g = s: one expert's share of itself is always 1, and a constant teaches W nothing.
    """

    def __init__(
        self,
        dim: int,
        n_routed_experts: int,
        n_activated_experts: int,
        n_expert_groups: int = 1,
        n_limited_groups: int = 1,
        route_scale: float = 1.0,
        norm_topk_prob: bool = True,
    ) -> None:
        super().__init__()
        if not 1 <= n_activated_experts <= n_routed_experts:
            raise ValueError(
                f"n_activated_experts={n_activated_experts} is not from 1 to n_routed_experts={n_routed_experts}"
            )
        if n_activated_experts == 1 and norm_topk_prob:
            raise ValueError(
                "n_activated_experts=1 with norm_topk_prob=True: the one gate is always 1, and the router gets "
                "no gradient; set norm_topk_prob=False"
            )
        if n_expert_groups > 1:
            size, rest = divmod(n_routed_experts, n_expert_groups)
            if rest or size < 2:
                raise ValueError(
                    f"n_expert_groups={n_expert_groups} must divide n_routed_experts={n_routed_experts} into groups "
                    "of two or more"
                )
            if not 1 <= n_limited_groups <= n_expert_groups or n_limited_groups * size < n_activated_experts:
                raise ValueError(
                    f"n_limited_groups={n_limited_groups} of {n_expert_groups} groups with {size} experts each cannot "
                    f"give {n_activated_experts} experts; raise n_limited_groups or lower n_activated_experts"
                )
        self.k, self.groups = n_activated_experts, (n_expert_groups, n_limited_groups)
        self.route_scale, self.norm_topk_prob = route_scale, norm_topk_prob
        self.weight = nn.Parameter(torch.empty(n_routed_experts, dim).normal_(std=0.5 * dim**-0.5))
        self.register_buffer("bias", torch.zeros(n_routed_experts))

    def forward(self, x: Float[Tensor, "n d"]) -> Routing:
        # in float32 whatever the model's precision: near a tie, a rounded score is another expert
        scores = F.linear(x.float(), self.weight.float()).sigmoid()
        indices = choose_experts(scores.detach() + self.bias, self.k, *self.groups)
        weights = scores.gather(1, indices)
        if self.norm_topk_prob:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        return Routing(scores, indices, (weights * self.route_scale).type_as(x))


class Experts(nn.Module):
    """`n_experts` SwiGLU feed-forwards, their matrices stacked: w13 [e, 2f, d] (gate, then up), w2 [e, d, f]."""

    def __init__(self, n_experts: int, dim: int, inter_dim: int) -> None:
        super().__init__()
        for name, width in (("dim", dim), ("moe_inter_dim", inter_dim)):
            if width % 8:  # PyTorch's grouped products want rows of whole 16 bytes, in bfloat16 too
                raise ValueError(
                    f"{name}={width} is not a multiple of 8; with experts, use {width + 8 - width % 8}"
                )
        w13 = torch.empty(n_experts, 2 * inter_dim, dim).normal_(std=0.5 * dim**-0.5)
        self.w13 = Stacked(w13, parts=(inter_dim, inter_dim))
        self.w2 = nn.Parameter(torch.empty(n_experts, dim, inter_dim).normal_(std=0.5 * dim**-0.5))

    def forward(
        self, x: Float[Tensor, "n d"], indices: Int[Tensor, "n k"], weights: Float[Tensor, "n k"]
    ) -> Float[Tensor, "n d"]:
        """Σ over a token's k experts of weight · expert(x). No token is dropped, however uneven the load.

        Rows are copied k times and sorted by expert, so that each expert multiplies one block of rows. The weight
        goes in before w2, where rows are narrower; w2 is linear, so that is the same.
        """
        expert, order = rearrange(indices, "n k -> (n k)").sort(stable=True)
        token = order // indices.shape[1]
        each = torch.arange(len(self.w2), device=x.device)
        ends = torch.searchsorted(expert, each, right=True, out_int32=True)  # of each expert's block of rows
        gate, up = self.product(x.index_select(0, token), self.w13, ends).chunk(2, dim=-1)
        h = F.silu(gate) * up * rearrange(weights, "n k -> (n k) 1").index_select(0, order)
        return torch.zeros_like(x).index_add(0, token, self.product(h, self.w2, ends))

    def product(self, x: Float[Tensor, "n i"], w: Float[Tensor, "e o i"], ends: Int[Tensor, "e"]) -> Tensor:
        """x wᵀ, each expert's block of rows with its own matrix; `ends` says where the blocks end."""
        return F.grouped_mm(x, w.mT, offs=ends)


class MoE(nn.Module):
    """Shared experts + routed experts, in the place of a feed-forward (arXiv:2412.19437 equation 12).

    Shared experts see every token and need no gate, so all of them are one wider feed-forward.
    """

    def __init__(self, gate: Gate, experts: Experts, shared: nn.Module | None) -> None:
        super().__init__()
        self.gate, self.experts, self.shared = gate, experts, shared

    def forward(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        rows = rearrange(x, "... d -> (...) d")
        routing = self.gate(rows)
        y = self.experts(rows, routing.indices, routing.weights)
        if self.shared is not None:
            y = y + self.shared(rows)
        return y.view_as(x)


@contextmanager
def watch(model: nn.Module) -> Iterator[list[Routing]]:
    """Collect every routing that happens inside the `with`, in the order of the layers."""
    seen: list[Routing] = []
    hooks = [
        m.register_forward_hook(lambda gate, args, routing: seen.append(routing))
        for m in model.modules()
        if isinstance(m, Gate)
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def load_violation(load: Int[Tensor, "e"]) -> float:
    """MaxVio: by how much the busiest expert exceeds the mean load, as a share of it. 0 is perfect balance.

    Wang et al. 2024, arXiv:2408.15664.
    """
    mean = load.float().mean()
    return ((load.max() - mean) / mean).item()


def balance_loss(routing: Routing, sequences: int = 1) -> Float[Tensor, ""]:
    """Σ f·P over the experts, the mean over sequences of equal length; 1 when balanced, more when not.

    f is an expert's share of the tokens, P its mean normalised affinity; equations 17-20 of arXiv:2412.19437
    (without α). f counts what was chosen and carries no gradient; P does. `sequences=1` takes the whole batch as one:
    the batch-wise loss of §4.5.3. The report's f counts the choice that affinities alone would make, and so does
    this: bias and groups do not enter.
    """
    e, k = routing.scores.shape[1], routing.indices.shape[1]
    chosen = torch.zeros_like(routing.scores).scatter(1, routing.scores.topk(k, dim=-1).indices, 1.0)
    share = routing.scores / routing.scores.sum(dim=-1, keepdim=True)
    f = reduce(chosen, "(s t) e -> s e", "mean", s=sequences) * (e / k)
    p = reduce(share, "(s t) e -> s e", "mean", s=sequences)
    return (f.detach() * p).sum(dim=-1).mean()


@torch.no_grad()
def update_bias(gate: Gate, load: Int[Tensor, "e"], speed: float) -> None:
    """One step of aux-loss-free balancing: down by `speed` where the load is above its mean, up where below.

    Loads of several processes (chapter 07) are added up first: the bias answers to the whole batch. arXiv:2412.19437
    §2.1.2; the sign rule is that of arXiv:2408.15664, algorithm 1.
    """
    if dist.is_initialized():
        load = load.clone()
        dist.all_reduce(load)
    load = load.float()
    gate.bias += speed * (load.mean() - load).sign()


def balanced(
    loss: Callable[[nn.Module, Tensor], Tensor],
    *,
    bias_speed: float = 1e-3,
    alpha: float = 1e-4,
    scope: str = "sequence",
) -> Callable[[nn.Module, Tensor], Tensor]:
    """`loss(model, tokens [b, t])` with balance: the auxiliary loss added, and each router's bias moved.

    The defaults are V3's γ = `bias_speed` and α = `alpha`; 0 switches either off. `scope`: "sequence" or "batch".
    The bias moves in training alone; it counts the whole batch, and acts from the next step on.
    """
    if scope not in ("sequence", "batch"):
        raise ValueError(f'scope={scope!r}; use "sequence" or "batch"')

    def total(model: nn.Module, tokens: Tensor) -> Tensor:
        with watch(model) as routings:
            value = loss(model, tokens)
        if not model.training:
            return value
        if alpha:
            sequences = len(tokens) if scope == "sequence" else 1
            value = value + alpha * sum(balance_loss(r, sequences) for r in routings)
        if bias_speed:
            gates = [m for m in model.modules() if isinstance(m, Gate)]
            for gate, routing in zip(gates, routings, strict=True):
                update_bias(gate, routing.load(), bias_speed)
        return value

    return total
