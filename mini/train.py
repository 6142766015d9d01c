"""The training loop: warm-up and decay, clipping, progress, checkpoints that resume bit for bit. Chapter 02."""

import json
import math
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import safetensors.torch
import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from tqdm.auto import tqdm

from mini.model import cross_entropy


@dataclass(frozen=True)
class Settings:
    """How to train. Matrices inside the layers take Muon's steps (Jordan et al. 2024), all else takes AdamW's."""

    steps: int
    lr: float = 8e-3  # AdamW's peak: embedding, head, norms
    matrix_lr: float = 0.02  # Muon's peak: the matrices of the layers; 0 gives them to AdamW as well
    warmup: int = 20  # steps from 0 to the peak
    decay: float = 1.0  # the share of steps, at the end, over which the rate falls to 0
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1  # of the matrices of the layers, as a share of their learning rate
    clip: float = 1.0  # the gradient's norm is cut to this
    eval_every: int = 0  # 0: evaluate at the end only
    save_every: int = 200

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps={self.steps} must be at least 1")
        if not 0 <= self.decay <= 1:
            raise ValueError(f"decay={self.decay} is a share of the steps; use 0 to 1")

    def rate(self, step: int) -> float:
        """The share of the peak learning rate at this step: up in a line, level, down in a line to 0."""
        up = (step + 1) / max(self.warmup, 1)
        down = (self.steps - step) / max(self.decay * self.steps, 1)
        return min(1.0, up, down)


ROW = ("step", "tokens", "loss", "grad_norm", "seconds", "lr")
SHOWN = ("loss", "grad_norm")  # the progress bar shows these, and whatever `evaluate` adds
Batch = Callable[[int], Tensor]
Loss = Callable[[nn.Module, Tensor], Tensor]
Evaluate = Callable[[nn.Module], dict[str, float]]


class Muon(torch.optim.Optimizer):
    """Momentum whose step is made orthogonal, so that every direction of a matrix learns at one speed.

    Jordan et al. 2024, "Muon", with Nesterov momentum; a matrix with more rows than columns takes steps longer by
    √(rows / columns). Matrices stacked in one parameter (its `parts`: their numbers of rows) are treated each by
    itself. Otherwise the same as torch.optim.Muon, but for its bfloat16, which most laptops have to emulate: this
    one computes in the parameters' own precision, and all matrices of a shape at once.
    """

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float, weight_decay: float = 0.0, momentum: float = 0.95
    ) -> None:
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
            for p in group["params"]:
                mean = self.state[p].setdefault("momentum", torch.zeros_like(p))
                mean.lerp_(p.grad, 1 - group["momentum"])
                p.mul_(1 - group["lr"] * group["weight_decay"])
                parts = getattr(p, "parts", p.shape[-2])
                steps = p.grad.lerp(mean, group["momentum"])
                for pair in zip(p.split(parts, dim=-2), steps.split(parts, dim=-2), strict=True):
                    matrices, step = (x.view(-1, *x.shape[-2:]) for x in pair)
                    by_shape.setdefault(matrices.shape[1:], []).append((matrices, step))
            for (rows, columns), same in by_shape.items():
                length = group["lr"] * max(1, rows / columns) ** 0.5
                made = orthogonal(torch.cat([step for _, step in same]))
                for (matrices, _), step in zip(same, made.split([len(m) for m, _ in same]), strict=True):
                    matrices.add_(step, alpha=-length)


def orthogonal(g: Float[Tensor, "n r c"], steps: int = 5) -> Float[Tensor, "n r c"]:
    """Each matrix with its singular values pushed to between about 0.7 and 1.2, by a Newton–Schulz iteration.

    x → a x + (b A + c A²) x with A = x xᵀ acts on the singular values alone, and is all matrix products.
    """
    a, b, c = 3.4445, -4.7750, 2.0315  # Jordan's: steep at 0, which matters more than landing on 1
    tall = g.shape[1] > g.shape[2]
    x = g.mT if tall else g
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


def optimizers(model: nn.Module, settings: Settings) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside `layers`, AdamW for the rest; AdamW alone with matrix_lr=0."""
    matrices, rest = [], []
    for name, p in model.named_parameters():
        inner = p.dim() > 1 and "layers." in name
        (matrices if inner else rest).append(p)
    groups = [{"params": rest, "weight_decay": 0.0}]
    if settings.matrix_lr == 0:
        groups.append({"params": matrices, "weight_decay": settings.weight_decay})
    chosen: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, fused=True)
    ]
    if settings.matrix_lr > 0:
        chosen.append(Muon(matrices, lr=settings.matrix_lr, weight_decay=settings.weight_decay))
    for optimizer in chosen:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return chosen


def train(
    model: nn.Module,
    batch: Batch,
    settings: Settings,
    *,
    loss: Loss = cross_entropy,
    evaluate: Evaluate | None = None,
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> list[dict[str, float]]:
    """Train `model` in place; return one row a step: step, tokens, loss, grad_norm, lr, seconds, and evaluate's values.

    `batch(step)` must depend on the step alone, so that a resumed run sees what an unbroken one would have
    seen. `loss(model, batch)` is a scalar, by default nats a token. `seconds` counts training, not evaluation.
    With `checkpoint`, the run is saved there every `save_every` steps and on an interrupt, and a second call
    goes on from it with the same result, bit for bit, as if nothing had happened.

    Raises FloatingPointError at the first loss that is not finite, ValueError for a checkpoint of another run.
    """
    opts = optimizers(model, settings)
    history: list[dict[str, float]] = []
    if checkpoint is not None and Path(checkpoint).exists():
        history = resume(checkpoint, model, opts, settings)
    device = next(model.parameters()).device
    tokens, seconds = (history[-1]["tokens"], history[-1]["seconds"]) if history else (0, 0.0)
    shown: dict[str, str] = {}  # in the progress bar
    bar = tqdm(total=settings.steps, initial=len(history), desc="training", unit="step", disable=not progress)
    with bar, finish_step_on_interrupt() as interrupted:
        for step in range(len(history), settings.steps):
            start = time.perf_counter()
            model.train()
            data = batch(step).to(device)
            value = loss(model, data)
            value.backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
            if not math.isfinite(value.item()):
                raise FloatingPointError(
                    f"loss {value.item()} at step {step}; lower lr={settings.lr} and matrix_lr={settings.matrix_lr}"
                )
            for optimizer in opts:
                for group in optimizer.param_groups:
                    group["lr"] = group["peak"] * settings.rate(step)
                optimizer.step()
                optimizer.zero_grad()
            seconds += time.perf_counter() - start
            tokens += data[:, 1:].numel()  # a row's first token is only read
            row = dict(step=step + 1, tokens=tokens, loss=value.item(), grad_norm=norm.item())
            row |= dict(lr=settings.lr * settings.rate(step), seconds=seconds)
            last = step + 1 == settings.steps
            if evaluate is not None and (
                last or (settings.eval_every and (step + 1) % settings.eval_every == 0)
            ):
                model.eval()
                row |= evaluate(model)
            history.append(row)
            bar.update()
            shown |= {k: f"{v:.3f}" for k, v in row.items() if k in SHOWN or k not in ROW}
            bar.set_postfix(shown, refresh=False)
            if checkpoint is not None and (last or interrupted or (step + 1) % settings.save_every == 0):
                save_run(checkpoint, model, opts, settings, history)
            if interrupted:
                kept = (
                    f"saved; run this again to go on from {checkpoint}" if checkpoint else "nothing was saved"
                )
                raise KeyboardInterrupt(f"stopped after step {step + 1} of {settings.steps}: {kept}")
    model.eval()
    return history


@contextmanager
def finish_step_on_interrupt() -> Iterator[list[bool]]:
    """Hold Ctrl-C (Jupyter's stop button) back until the step is whole: the yielded list then has an entry.

    A second Ctrl-C acts at once. Outside the main thread Python delivers no signals, and nothing changes.
    """
    asked: list[bool] = []
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def note(signum: int, frame: object) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(True)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)


def save_run(path, model: nn.Module, opts, settings: Settings, history: list[dict[str, float]]) -> None:
    """Everything that the next step depends on: weights, optimiser state, history."""
    tensors = {f"model.{name}": t for name, t in model.state_dict().items()}
    for i, optimizer in enumerate(opts):
        for j, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{j}.{key}": t for key, t in state.items()}
    save(path, tensors, {"kind": "training run", "settings": asdict(settings), "history": history})


def resume(path, model: nn.Module, opts, settings: Settings) -> list[dict[str, float]]:
    """Put a saved run's weights and optimiser state in place; return its history."""
    tensors, facts = load(path)
    if facts.get("kind") != "training run":
        raise ValueError(f"{path} holds no training run; name another checkpoint or remove the file")
    ours, theirs = json.loads(json.dumps(asdict(settings))), facts["settings"]
    for name in ours:
        if ours[name] != theirs.get(name):
            raise ValueError(
                f"{path} was saved with {name}={theirs.get(name)}, this run has {name}={ours[name]}; "
                "use the same settings, or another checkpoint file for a new run"
            )
    load_weights(
        model, {k.removeprefix("model."): t for k, t in tensors.items() if k.startswith("model.")}, path
    )
    for i, optimizer in enumerate(opts):
        whole = optimizer.state_dict()
        for key, t in tensors.items():
            if key.startswith(f"optimizer.{i}."):
                _, _, j, name = key.split(".")
                whole["state"].setdefault(int(j), {})[name] = t
        optimizer.load_state_dict(whole)
    return facts["history"]


def load_weights(model: nn.Module, tensors: dict[str, Tensor], source: str | Path) -> None:
    """Copy `tensors` into the model; ValueError names the first that is missing, unknown or of another shape."""
    own = model.state_dict()
    for name in own.keys() | tensors.keys():
        if name not in own or name not in tensors or own[name].shape != tensors[name].shape:
            there = tuple(tensors[name].shape) if name in tensors else "missing"
            here = tuple(own[name].shape) if name in own else "missing"
            raise ValueError(f"{source} does not fit this model: {name} is {there} there and {here} here")
    model.load_state_dict(tensors)


def save(path: str | Path, tensors: dict[str, Tensor], facts: dict) -> None:
    """Write tensors and JSON facts to one safetensors file, whole or not at all (see `write`)."""
    whole = {k: t.contiguous() for k, t in tensors.items()}
    write(path, safetensors.torch.save(whole, {"facts": json.dumps(facts)}))


def write(path: str | Path, data: bytes) -> None:
    """Write a file that appears under its name only when complete: a crash or a full disk leaves the old one.

    Raises OSError that says how much room is missing.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        free = shutil.disk_usage(path.parent).free if path.parent.exists() else 0
        raise OSError(
            error.errno,
            f"could not save {len(data) / 1e6:.1f} MB to {path} ({error.strerror}; {free / 1e6:.1f} MB free there); "
            "what was saved before is untouched, make room or name another folder",
        ) from error


def load(path: str | Path) -> tuple[dict[str, Tensor], dict]:
    """The tensors and facts that `save` wrote. Raises ValueError for a broken or foreign file."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no file {path}; check the name, or train and save first")
    try:
        with safe_open(path, framework="pt") as f:
            facts = json.loads((f.metadata() or {})["facts"])
            return {name: f.get_tensor(name) for name in f.keys()}, facts  # noqa: SIM118 (not a dict)
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path} is damaged or was not saved by mini ({error}); remove it and train again"
        ) from error
