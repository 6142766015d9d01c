"""The training loop: warm-up and decay, clipping, progress, checkpoints that resume bit for bit. Chapter 02.

As a program, `python -m mini.train` trains chapter 02's language model, and `torchrun --nproc-per-node 2 -m mini.train`
does the same with several processes, as chapter 07 explains; `--help` lists the options.
"""

import argparse
import json
import math
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from tqdm.auto import tqdm

from mini import parallel
from mini.data import batches, bits_per_character, corpus, train_bpe, validation_sample
from mini.model import Config, Transformer, cross_entropy
from mini.moe import balanced


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
                if p.grad is None:  # frozen, or not used in this step's loss
                    continue
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
    if settings.matrix_lr > 0 and any(map(parallel.is_sliced, model.parameters())):
        raise ValueError(
            f"matrix_lr={settings.matrix_lr}: Muon needs whole matrices, and this model's are sliced over processes; "
            "use matrix_lr=0, AdamW for all"
        )
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

    Under torchrun (chapter 07) every process makes the same call: each takes its rows of the batch, and what is
    learned, returned and saved is that of the whole batch.

    Raises FloatingPointError at the first loss that is not finite, ValueError for a checkpoint of another run.
    """
    opts = optimizers(model, settings)
    history: list[dict[str, float]] = []
    if checkpoint is not None and Path(checkpoint).exists():
        history = resume(checkpoint, model, opts, settings)
    parallel.same_start(model, len(history))
    device = next(model.parameters()).device
    tokens, seconds = (history[-1]["tokens"], history[-1]["seconds"]) if history else (0, 0.0)
    shown: dict[str, str] = {}  # in the progress bar
    quiet = not progress or parallel.rank() > 0
    bar = tqdm(total=settings.steps, initial=len(history), desc="training", unit="step", disable=quiet)
    with bar, finish_step_on_interrupt() as interrupted:
        for step in range(len(history), settings.steps):
            start = time.perf_counter()
            model.train()
            data = parallel.my_rows(batch(step)).to(device)
            value = loss(model, data)
            value.backward()
            parallel.average_gradients(model)
            norm = parallel.whole(nn.utils.clip_grad_norm_(model.parameters(), settings.clip))
            value = parallel.average(value)
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
            tokens += data[:, 1:].numel() * parallel.world_size()  # a row's first token is only read
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
            stop = parallel.anywhere(bool(interrupted), device)
            if checkpoint is not None and (last or stop or (step + 1) % settings.save_every == 0):
                save_run(checkpoint, model, opts, settings, history)
            if stop:
                kept = (
                    f"saved; run this again to go on from {checkpoint}" if checkpoint else "nothing was saved"
                )
                raise KeyboardInterrupt(f"stopped after step {step + 1} of {settings.steps}: {kept}")
    model.eval()
    return history


@contextmanager
def finish_step_on_interrupt() -> Iterator[list[float]]:
    """Hold Ctrl-C (Jupyter's stop button) back until the step is whole: the yielded list then has an entry.

    A second Ctrl-C acts at once, unless it comes in the same second: torchrun passes on what the terminal has already
    sent. Outside the main thread Python delivers no signals, and nothing changes.
    """
    asked: list[float] = []
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def note(signum: int, frame: object) -> None:
        if asked and time.monotonic() > asked[0] + 1:
            raise KeyboardInterrupt
        asked.append(time.monotonic())

    before = signal.signal(signal.SIGINT, note)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)


def save_run(path, model: nn.Module, opts, settings: Settings, history: list[dict[str, float]]) -> None:
    """Everything that the next step depends on: weights, optimiser state, history. Sliced tensors are put together."""
    tensors = {f"model.{name}": t for name, t in model.state_dict().items()}
    for i, optimizer in enumerate(opts):
        for j, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{j}.{key}": t for key, t in state.items()}
    tensors = {name: parallel.whole(t) for name, t in tensors.items()}
    if parallel.rank() == 0:
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
        state = optimizer.state_dict()
        params = [p for group in optimizer.param_groups for p in group["params"]]
        for key, t in tensors.items():
            if key.startswith(f"optimizer.{i}."):
                _, _, j, name = key.split(".")
                same_shape = t.shape == params[int(j)].shape  # all but the step counter
                t = parallel.sliced(t, params[int(j)]) if same_shape else t
                state["state"].setdefault(int(j), {})[name] = t
        optimizer.load_state_dict(state)
    return facts["history"]


def load_weights(model: nn.Module, tensors: dict[str, Tensor], source: str | Path) -> None:
    """Copy `tensors` into the model; ValueError names the first that is missing, unknown or of another shape."""
    own = model.state_dict()
    for name in own.keys() | tensors.keys():
        if name not in own or name not in tensors or own[name].shape != tensors[name].shape:
            there = tuple(tensors[name].shape) if name in tensors else "missing"
            here = tuple(own[name].shape) if name in own else "missing"
            raise ValueError(f"{source} does not fit this model: {name} is {there} there and {here} here")
    model.load_state_dict({name: parallel.sliced(t, own[name]) for name, t in tensors.items()})


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


# Chapter 02's language model, which this module trains as a program.
LANGUAGE_MODEL = Config(vocab_size=1024, dim=128, n_layers=3, n_heads=2, inter_dim=336, max_seq_len=128)
LANGUAGE_TRAINING = Settings(steps=1800, eval_every=200)
LANGUAGE_BATCH = 8


def add_options(parser: argparse.ArgumentParser, defaults: Any) -> None:
    """An option for each plain field of a dataclass: `n_layers` becomes --n-layers."""
    group = parser.add_argument_group(type(defaults).__name__)
    for field in fields(defaults):
        value = getattr(defaults, field.name)
        name = f"--{field.name.replace('_', '-')}"
        if isinstance(value, bool):
            group.add_argument(name, action=argparse.BooleanOptionalAction, default=value)
        elif isinstance(value, int | float):
            group.add_argument(name, type=field.type, default=value, help=f"(default: {value})")


def from_options(kind: type, options: argparse.Namespace) -> Any:
    return kind(**{f.name: getattr(options, f.name) for f in fields(kind) if hasattr(options, f.name)})


def main(arguments: list[str] | None = None) -> int:
    """Train on Shakespeare's plays; 0 when done, 1 with a sentence on stderr when not."""
    parser = argparse.ArgumentParser(
        prog="python -m mini.train",
        description="Train a language model on Shakespeare's plays; chapter 02's, unless options say otherwise. "
        "Under torchrun, all processes train it together. The same command goes on where an interrupted one stopped.",
    )
    parser.add_argument("--checkpoint", default="language-model.safetensors", help="(default: %(default)s)")
    parser.add_argument(
        "--batch-size", type=int, default=LANGUAGE_BATCH, help="rows, of all processes together"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--shard",
        action="store_true",
        help="slice weights and optimiser over the processes (FSDP2); AdamW alone",
    )
    add_options(parser, LANGUAGE_MODEL)
    add_options(parser, LANGUAGE_TRAINING)
    options = parser.parse_args(arguments)
    if options.shard:
        options.matrix_lr = 0.0
    return run_program(
        lambda device: train_language_model(options, device),
        f"The run was saved every save_every={options.save_every} steps; the same command goes on from "
        f"{options.checkpoint}",
    )


def run_program(run: Callable[[torch.device], None], after_a_loss: str) -> int:
    """`run(device)` in each process; 0, or 1 with a sentence on stderr. `after_a_loss`: what to do if one is lost."""
    rank = os.environ.get("RANK", "0")  # torchrun's; by the time of an error the processes have parted
    try:
        with parallel.processes() as device:
            run(device)
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"process {rank}: {error}", file=sys.stderr)
    except KeyboardInterrupt as error:
        print(error, file=sys.stderr)
    except RuntimeError as error:
        if not parallel.lost_another(error):
            raise
        print(
            f"process {rank} stops, for it lost another one ({str(error).splitlines()[0]}). {after_a_loss}",
            file=sys.stderr,
        )
    else:
        return 0
    return 1


def train_language_model(options: argparse.Namespace, device: torch.device) -> None:
    """What `main` does in each process."""
    config, settings = from_options(Config, options), from_options(Settings, options)
    text, _ = corpus()
    sample = validation_sample()
    tokenizer = train_bpe(text, config.vocab_size)
    torch.manual_seed(options.seed)
    model = Transformer(config).to(device)
    if options.shard:
        parallel.shard(model)
    history = train(
        model,
        batches(tokenizer.encode(text), options.batch_size, config.max_seq_len, options.seed),
        settings,
        loss=balanced(cross_entropy) if config.n_routed_experts else cross_entropy,
        evaluate=lambda model: {"bits": bits_per_character(model, tokenizer, sample)},
        checkpoint=options.checkpoint,
    )
    if parallel.rank() == 0:
        last = history[-1]
        speed = last["tokens"] / last["seconds"]
        print(
            f"{last['step']} steps, {last['tokens']:,} tokens, {last['seconds']:.1f} s ({speed:,.0f} tokens/s, "
            f"{parallel.world_size()} processes); {last['bits']:.3f} bits per character; in {options.checkpoint}"
        )


if __name__ == "__main__":
    sys.exit(main())
