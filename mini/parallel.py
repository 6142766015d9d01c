"""Several processes, one model: the batch, the weights or the experts spread over them. Chapter 07.

torchrun starts one program several times. Each copy is a *process* with a number, its *rank*; their number is the
*world size*. They meet in collective operations of torch.distributed, which all of them have to call: gloo between
CPUs, nccl between GPUs. In a program that torchrun did not start there is one process, and the functions here that
serve training leave everything as it is.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from einops import rearrange
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from mini.moe import Experts


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def processes(seconds: float = 300) -> Iterator[torch.device]:
    """Meet the other processes of this torchrun; yields the device of this one.

    A process that waits longer than `seconds` for another gives up with a RuntimeError; when the other has died, at
    once.
    """
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if "WORLD_SIZE" not in os.environ:  # torchrun sets it
        yield device
        return
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(seconds=seconds))
    try:
        yield device
    finally:
        dist.destroy_process_group()


def lost_another(error: Exception) -> bool:
    """Whether an error says that another process is gone, or silent for too long: the fault is not in this one."""
    return isinstance(error, RuntimeError) and any(word in str(error) for word in ("gloo", "NCCL"))


# Data parallelism: every process has the whole model and a share of the batch.


def my_rows(batch: Int[Tensor, "b *t"]) -> Int[Tensor, "b_mine *t"]:
    """This process's share of a batch. Shares are equal, so that the mean of their means is the mean of all."""
    if len(batch) % world_size():
        raise ValueError(
            f"a batch of {len(batch)} rows cannot be shared evenly by {world_size()} processes; "
            f"use {world_size() * -(-len(batch) // world_size())} rows"
        )
    return batch[rank() :: world_size()]


def all_rows(mine: Shaped[Tensor, "n_mine *_"]) -> Shaped[Tensor, "n *_"]:
    """The rows of all processes, those of process 0 first; each has as many."""
    if world_size() == 1:
        return mine
    found = [torch.empty_like(mine) for _ in range(world_size())]
    dist.all_gather(found, mine.contiguous())
    return torch.cat(found)


def average_gradients(model: nn.Module) -> None:
    """Give every process the mean of all processes' gradients: those of the whole batch.

    Two kinds are of the whole batch already. FSDP averages its own. An expert that lives on one process alone has met
    all processes' tokens, and has the sum.
    """
    if world_size() == 1:
        return
    gradients = []
    for p in model.parameters():
        if getattr(p, "spread", False):
            p.grad /= world_size()
        elif p.grad is not None and not is_sliced(p.grad):
            gradients.append(p.grad)
    if not gradients:
        return
    flat = torch.cat([g.flatten() for g in gradients])  # one long message is quicker than many short ones
    dist.all_reduce(flat)
    flat /= world_size()
    for g, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        g.copy_(mean.view_as(g))


def average(value: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """The mean of the processes' values, without gradient."""
    value = value.detach().clone()
    if world_size() > 1:
        dist.all_reduce(value)
    return value / world_size()


def anywhere(flag: bool, device: torch.device | str = "cpu") -> bool:
    """Whether the flag is set in any process: what all of them have to do together, they decide together."""
    if world_size() == 1:
        return flag
    count = torch.tensor(int(flag), device=device)
    dist.all_reduce(count)
    return count.item() > 0


def same_start(model: nn.Module, steps: int) -> None:
    """Give all processes the weights of process 0. ValueError if they have not all done `steps` steps so far.

    Models whose experts are spread are refused: `train` would clip and save a part for the whole.
    """
    if world_size() == 1:
        return
    if any(isinstance(m, ParallelExperts) for m in model.modules()):
        raise ValueError(
            "train() saves whole models, this one has ParallelExperts; train it unspread, or shard it"
        )
    device = next(model.parameters()).device
    first = torch.tensor(steps, device=device)
    dist.broadcast(first, 0)
    if anywhere(first.item() != steps, device):
        raise ValueError(
            f"process {rank()} has a checkpoint of {steps} steps, process 0 one of {first.item()}; "
            "put the checkpoint into a folder that all machines share"
        )
    for tensor in model.state_dict().values():
        if not is_sliced(tensor):
            dist.broadcast(tensor, 0)


# Sharding (FSDP2): every process keeps a slice of each weight, and of what the optimiser knows of it. A layer's slices
# are gathered when its turn comes.


def shard(model: nn.Module) -> nn.Module:
    """Slice the parameters of `model.layers` and of the rest over all processes, in place. Needs `processes`."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard  # here, since they take a second to import

    mesh = init_device_mesh(next(model.parameters()).device.type, (world_size(),))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def is_sliced(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")  # a DTensor


def whole(tensor: Tensor) -> Tensor:
    """A sliced tensor put together, in every process; another one as it is."""
    return tensor.full_tensor() if is_sliced(tensor) else tensor


def sliced(tensor: Tensor, like: Tensor) -> Tensor:
    """Undo `whole`: the slice that this process keeps of a whole tensor, if `like` is sliced."""
    if not is_sliced(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.detach().to(like.device), like.device_mesh, like.placements)


# Expert parallelism: every process has a share of the experts, and tokens travel to them and back.


class AllToAll(torch.autograd.Function):
    """Send `send[r]` rows to process r and get `receive[r]` rows from it. The gradient travels the same way back."""

    @staticmethod
    def forward(ctx, rows: Float[Tensor, "n d"], send: list[int], receive: list[int]) -> Float[Tensor, "m d"]:
        ctx.send, ctx.receive = send, receive
        return exchange(rows, send, receive)

    @staticmethod
    def backward(ctx, grad: Float[Tensor, "m d"]) -> tuple[Tensor, None, None]:
        return exchange(grad, ctx.receive, ctx.send), None, None


def exchange(rows: Float[Tensor, "n d"], send: list[int], receive: list[int]) -> Float[Tensor, "m d"]:
    """Rows for process 0 come first, then those for process 1, and so on; what arrives is in the senders' order."""
    arrived = rows.new_empty(sum(receive), rows.shape[1])
    dist.all_to_all_single(arrived, rows.contiguous(), receive, send)
    return arrived


class ParallelExperts(Experts):
    """The experts of chapter 04, spread over the processes: of e experts, process r of w has e/w from r·e/w on.

    The same outputs as `experts` in one process, for each process's own tokens (DeepSeek-V3, arXiv:2412.19437 §3.2).
    """

    def __init__(self, experts: Experts) -> None:
        nn.Module.__init__(self)
        each, rest = divmod(len(experts.w2), world_size())
        if rest:
            raise ValueError(
                f"n_routed_experts={len(experts.w2)} cannot be shared evenly by {world_size()} processes; "
                "use a number of processes that divides it"
            )
        mine = slice(rank() * each, (rank() + 1) * each)
        self.w13 = nn.Parameter(experts.w13.detach()[mine].clone())
        self.w2 = nn.Parameter(experts.w2.detach()[mine].clone())
        self.w13.spread = self.w2.spread = True

    def forward(
        self, x: Float[Tensor, "n d"], indices: Int[Tensor, "n k"], weights: Float[Tensor, "n k"]
    ) -> Float[Tensor, "n d"]:
        k, each = indices.shape[1], len(self.w2)
        expert, order = rearrange(indices, "n k -> (n k)").sort(stable=True)
        token = order // k
        mine = torch.bincount(expert, minlength=world_size() * each)  # copies that I send to each expert
        theirs = torch.empty_like(mine)  # copies that each process sends to each of my experts
        dist.all_to_all_single(theirs, mine)
        send, receive = (
            rearrange(count, "(w each) -> w each", each=each).sum(dim=1).tolist() for count in (mine, theirs)
        )
        dispatched = AllToAll.apply(x.index_select(0, token), send, receive)
        # which of my experts each arrived row is for; as a choice of one expert, it is chapter 04's own computation
        local = torch.arange(each, device=x.device).repeat(world_size()).repeat_interleave(theirs)
        one = rearrange(local, "m -> m 1")
        done = super().forward(dispatched, one, torch.ones_like(one, dtype=x.dtype))
        combined = AllToAll.apply(done, receive, send)
        gate = rearrange(weights, "n k -> (n k) 1").index_select(0, order)
        return torch.zeros_like(x).index_add(0, token, combined * gate)


def spread_experts(model: nn.Module) -> nn.Module:
    """Replace every Experts in `model` by this process's share of it, in place."""
    for name, module in list(model.named_modules()):
        if type(module) is Experts:
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, ParallelExperts(module))
    return model


def destinations(indices: Int[Tensor, "n k"], n_experts: int, n_nodes: int) -> Int[Tensor, "n"]:
    """On how many machines (nodes) the experts of each token lie: the copies of it that cross the slow network."""
    if n_experts % n_nodes:
        raise ValueError(f"n_nodes={n_nodes} does not divide n_experts={n_experts}")
    node = indices // (n_experts // n_nodes)
    there = torch.zeros(len(indices), n_nodes, dtype=torch.long, device=indices.device)
    return there.scatter(1, node, 1).sum(dim=1)


# Redundant experts: the busy ones get copies, and all are packed onto GPUs of nearly equal load. The plan of
# DeepSeek's EPLB (arXiv:2412.19437 §3.4).


def pack(loads: Sequence[float], n_bins: int) -> list[int]:
    """Put items into bins, equally many in each, so that sums of loads are alike; the bin of each item.

    Greedy: heavy ones first, each into the lightest bin that has room.
    """
    size, rest = divmod(len(loads), n_bins)
    if rest:
        raise ValueError(f"{len(loads)} items do not fill {n_bins} bins evenly; use a multiple of {n_bins}")
    bins, sums, filled = [0] * len(loads), [0.0] * n_bins, [0] * n_bins
    for item in sorted(range(len(loads)), key=lambda i: -loads[i]):
        b = min((b for b in range(n_bins) if filled[b] < size), key=lambda b: sums[b])
        bins[item] = b
        sums[b] += loads[item]
        filled[b] += 1
    return bins


def replicate(loads: Sequence[float], n_slots: int) -> list[int]:
    """The expert in each of `n_slots` slots: each once, then again and again the one whose copies are busiest."""
    if n_slots < len(loads):
        raise ValueError(f"n_slots={n_slots} cannot hold {len(loads)} experts; use at least {len(loads)}")
    slots, copies = list(range(len(loads))), [1] * len(loads)
    while len(slots) < n_slots:
        busiest = max(range(len(loads)), key=lambda e: loads[e] / copies[e])
        slots.append(busiest)
        copies[busiest] += 1
    return slots


def place_experts(
    loads: Sequence[float], n_slots: int, n_gpus: int, n_groups: int = 1, n_nodes: int = 1
) -> list[list[int]]:
    """The experts on each GPU: groups packed onto nodes, then copies made, and packed onto the node's GPUs.

    n_slots counts all places for experts; n_groups: groups of experts that node-limited routing chooses among.
    """
    for name, n, parts, of in (
        ("n_groups", n_groups, len(loads), "the experts"),
        ("n_nodes", n_nodes, n_groups, "n_groups"),
        ("n_nodes", n_nodes, n_gpus, "n_gpus"),
        ("n_gpus", n_gpus, n_slots, "n_slots"),
    ):
        if parts % n:
            raise ValueError(f"{name}={n} does not divide {of}, {parts}; choose a divisor")
    size, gpus, slots = len(loads) // n_groups, n_gpus // n_nodes, n_slots // n_nodes
    node_of = pack([sum(loads[g * size : (g + 1) * size]) for g in range(n_groups)], n_nodes)
    placed: list[list[int]] = [[] for _ in range(n_gpus)]
    for node in range(n_nodes):
        experts = [g * size + i for g in range(n_groups) if node_of[g] == node for i in range(size)]
        own = [loads[e] for e in experts]
        slot = replicate(own, slots)
        shares = [own[i] / slot.count(i) for i in slot]
        for i, gpu in zip(slot, pack(shares, gpus), strict=True):
            placed[node * gpus + gpu].append(experts[i])
    return placed


def gpu_loads(placed: Sequence[Sequence[int]], loads: Sequence[float]) -> list[float]:
    """The load of each GPU when an expert's copies share its tokens evenly."""
    copies = [sum(gpu.count(e) for gpu in placed) for e in range(len(loads))]
    return [sum(loads[e] / copies[e] for e in gpu) for gpu in placed]
