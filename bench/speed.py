"""Training, cached decoding and steps of GRPO, ours against transformers, torchao and TRL: same weights, same inputs.

    python -m bench.speed [llama] [deepseek] [moe] [grpo] [fp8] [peak]

All sides take turns within one run, so that a slow spell of the machine meets all of them. Printed are medians and, for
ratios, the middle half of the rounds in brackets. A run of all parts also writes its tables into docs/BENCH.md, which
has the method; a run of some of them leaves that file as it is.
"""

import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
import transformers
from einops import rearrange
from torch import Tensor, nn
from transformers import DeepseekV3ForCausalLM

from bench.llama import to_llama
from bench.report import REPORT, method, said, say, setting, write
from mini import budget, hf
from mini.attention import KVCache, attend
from mini.fp8 import E4M3, dequantize, quantize
from mini.latent_attention import LatentAttention
from mini.model import Config, Transformer, cross_entropy
from mini.sample import sample

HEADS = {"4 heads": 4, "4 heads on 1 key-value head": 1}
DEEPSEEK = Config(
    vocab_size=1024,
    dim=128,
    n_layers=4,
    n_heads=4,
    inter_dim=256,
    max_seq_len=512,
    tie_embeddings=False,
    q_lora_rank=64,
    kv_lora_rank=32,
    qk_nope_head_dim=32,
    qk_rope_head_dim=16,
    v_head_dim=32,
    n_dense_layers=1,
    n_routed_experts=16,
    n_shared_experts=1,
    n_activated_experts=4,
    moe_inter_dim=64,
    route_scale=2.5,
)
Run = Callable[[], object]


def llama_config(n_kv_heads: int) -> Config:
    """The width of chapter 02's model; Llama 3 has four heads on each key-value head."""
    return Config(1024, dim=128, n_layers=3, n_heads=4, n_kv_heads=n_kv_heads, inter_dim=336, max_seq_len=256)


def race(runs: list[Run], rounds: int) -> list[list[float]]:
    """Seconds of each run in each round, in turn, after one warm-up."""
    times: list[list[float]] = [[] for _ in runs]
    for i in range(rounds + 1):
        for run, taken in zip(runs, times, strict=True):
            start = time.perf_counter()
            run()
            if i > 0:
                taken.append(time.perf_counter() - start)
    return times


def versus(ours: list[float], theirs: list[float]) -> str:
    """How many times as fast ours is: the median over the rounds, and their middle half."""
    ratios = [t / o for o, t in zip(ours, theirs, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return f"{middle:.2f} ({low:.2f}–{high:.2f})"


def trainer(net: nn.Module, loss: Callable[[], Tensor]) -> Run:
    """One step: forward, backward, clipping, AdamW."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=True)

    def run() -> None:
        loss().backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return run


def training(
    model: Transformer, theirs: nn.Module, batch: int, length: int, rounds: int
) -> list[list[float]]:
    """Seconds of a training step, ours and theirs."""
    model, theirs = model.train(), theirs.train()
    tokens = torch.randint(model.config.vocab_size, (batch, length + 1))

    def their_loss() -> Tensor:
        logits = theirs(tokens[:, :-1], use_cache=False).logits
        return F.cross_entropy(
            rearrange(logits, "b t v -> (b t) v"), rearrange(tokens[:, 1:], "b t -> (b t)")
        )

    return race([trainer(model, lambda: cross_entropy(model, tokens)), trainer(theirs, their_loss)], rounds)


def decoding(
    ours: list[Transformer], theirs: nn.Module, batch: int, new: int, rounds: int
) -> list[list[float]]:
    """Seconds to continue a prompt of 16 tokens greedily by `new` tokens: each of ours, then theirs."""
    prompts = torch.randint(ours[0].config.vocab_size, (batch, 16))
    mask = torch.ones_like(prompts)
    fixed = dict(max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)

    def write(model: Transformer) -> Tensor:
        return sample(model.eval(), prompts, new, temperature=0).tokens

    def they_write() -> Tensor:
        return theirs.eval().generate(prompts, attention_mask=mask, **fixed)[:, 16:]

    expected = they_write()
    for model in ours:  # a near tie may fall either way, and then the rest of that text differs
        same = (write(model) == expected).all(dim=1)
        assert same.float().mean() >= 0.9, f"{(~same).sum()} of {batch} texts differ"
    return race([*(lambda model=model: write(model) for model in ours), they_write], rounds)


def to_deepseek(model: Transformer) -> DeepseekV3ForCausalLM:
    """transformers' model with the same shape and the same weights."""
    with tempfile.TemporaryDirectory() as folder:
        hf.save(model, folder)
        theirs = DeepseekV3ForCausalLM.from_pretrained(folder)
    theirs.generation_config.eos_token_id = None
    return theirs


class ExpandEveryStep(LatentAttention):
    """Cache the latents, and make all heads' keys and values from them at every step, as transformers does."""

    def absorbs(self, t: int) -> bool:
        return False


class KeepKeysAndValues(LatentAttention):
    """Cache all heads' keys and values, as ordinary attention does."""

    def new_cache(self, batch: int, max_len: int) -> "FullCache":
        return FullCache(self, batch, max_len)

    def forward(self, x, cos, sin, cache=None, mask=None):
        q, ckv = self.project(x, cos, sin)
        k, v = self.keys_values(ckv)
        if cache is not None:
            k, v = cache.append(k, v)
        return self.wo(
            rearrange(attend(q, k, v, mask=mask, scale=self.softmax_scale), "b h t v -> b t (h v)")
        )


class FullCache(KVCache):
    """Keys and values of different widths."""

    def __init__(self, attn: LatentAttention, batch: int, max_len: int) -> None:
        super().__init__(batch, attn.n_heads, max_len, attn.qk_nope_head_dim + attn.qk_rope_head_dim)
        self.v = torch.empty(batch, attn.n_heads, max_len, attn.v_head_dim)


def variant(model: Transformer, kind: type[LatentAttention]) -> Transformer:
    """The same model with another way to decode."""
    other = Transformer(model.config)
    other.load_state_dict(model.state_dict())
    for layer in other.layers:
        layer.attn.__class__ = kind
    return other


def llama() -> None:
    say("\n## Ordinary attention, against transformers' Llama\n")
    say("| | mini, tok/s | transformers, tok/s | ratio |\n|---|---|---|---|")
    for name, n_kv_heads in HEADS.items():
        torch.manual_seed(0)
        model = Transformer(llama_config(n_kv_heads))
        theirs = to_llama(model)
        rows = {
            "training step, 16 × 128": (16 * 128, training(model, theirs, 16, 128, rounds=15)),
            "decoding, batch 1": (200, decoding([model], theirs, 1, 200, rounds=5)),
            "decoding, batch 64": (64 * 200, decoding([model], theirs, 64, 200, rounds=5)),
        }
        for row, (tokens, times) in rows.items():
            rates = " | ".join(f"{tokens / statistics.median(t):,.0f}" for t in times)
            say(f"| {name}: {row} | {rates} | {versus(*times)} |")


def deepseek() -> None:
    say("\n## Latent attention and experts, against transformers' DeepseekV3ForCausalLM\n")
    torch.manual_seed(0)
    model = Transformer(DEEPSEEK)
    theirs = to_deepseek(model)
    say("| | mini, tok/s | transformers, tok/s | ratio |\n|---|---|---|---|")
    times = training(model, theirs, 16, 128, rounds=15)
    rates = " | ".join(f"{16 * 128 / statistics.median(t):,.0f}" for t in times)
    say(f"| training step, 16 × 128 | {rates} | {versus(*times)} |")
    kinds = {"absorbed": model, "expanded at every step": variant(model, ExpandEveryStep)}
    kinds["all keys and values kept"] = variant(model, KeepKeysAndValues)
    for batch, new in ((1, 200), (64, 200), (64, 480)):
        *ours, reference = decoding(list(kinds.values()), theirs, batch, new, rounds=5)
        for name, taken in zip(kinds, ours, strict=True):
            rates = " | ".join(f"{batch * new / statistics.median(t):,.0f}" for t in (taken, reference))
            say(f"| decoding {new}, batch {batch}, {name} | {rates} | {versus(taken, reference)} |")


def moe() -> None:
    say("\n## The experts' block alone, against transformers' DeepseekV3MoE\n")
    torch.manual_seed(0)
    model = Transformer(DEEPSEEK)
    ours, theirs = model.layers[1].ffn, to_deepseek(model).model.layers[1].mlp
    say(
        "| tokens | forward: mini, µs | transformers, µs | ratio | with backward: ratio |\n|---|---|---|---|---|"
    )
    for n in (1, 4, 16, 64, 256, 1024, 4096):
        x = torch.randn(1, n, DEEPSEEK.dim)
        torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=0)
        repeats = max(1, 400 // n)

        def forward(block: nn.Module, x=x, repeats=repeats) -> None:
            with torch.inference_mode():
                for _ in range(repeats):
                    block(x)

        def both(block: nn.Module, x=x, repeats=repeats) -> None:
            for _ in range(max(1, repeats // 4)):
                block(x).sum().backward()

        once = race([lambda: forward(ours), lambda: forward(theirs)], 21)
        micro = " | ".join(f"{1e6 * statistics.median(t) / repeats:,.0f}" for t in once)
        back = versus(*race([lambda: both(ours), lambda: both(theirs)], 15))
        say(f"| {n} | {micro} | {versus(*once)} | {back} |")


def grpo() -> None:
    say("\n## One step of GRPO, rollout and update, against TRL's GRPOTrainer around transformers' Llama\n")
    from bench.trainer import grpo_steps

    say("| answers | mini, s | TRL, s | ratio | mini, answers' tokens/s |\n|---|---|---|---|---|")
    config = Config(32, dim=64, n_layers=3, n_heads=2, inter_dim=176, max_seq_len=256)
    for n_prompts, new, ends in ((32, 100, True), (32, 100, False), (8, 200, True)):
        torch.manual_seed(0)
        model = Transformer(config)
        prompts = torch.randint(2, 32, (n_prompts, 8)).tolist()
        ours, theirs, length = grpo_steps(model, prompts, new, ends, rounds=6)
        seconds = " | ".join(f"{statistics.median(t):.2f}" for t in (ours, theirs))
        rate = n_prompts * 8 * length / statistics.median(ours)
        name = f"{n_prompts} × 8, {'up to' if ends else 'all of'} {new} tokens (mean {length:.0f})"
        say(f"| {name} | {seconds} | {versus(ours, theirs)} | {rate:,.0f} |")


def fp8() -> None:
    say("\n## Into FP8 (E4M3) and back, against torchao and PyTorch's bare cast without any scale\n")
    logging.disable(logging.WARNING)  # torchao tells that its GPU kernels cannot be loaded
    from torchao.quantization import quant_primitives as torchao

    x = torch.randn(2048, 2048)
    size = 5 * x.numel() / 1e9  # four bytes on one side, one on the other
    say(
        "| tile | | mini, GB/s | torchao, GB/s | bare cast, GB/s | mini / torchao |\n|---|---|---|---|---|---|"
    )
    for tile in (None, (1, 128), (128, 128), (128, 1)):

        def theirs(block: tuple[int, ...] = tile or x.shape) -> tuple[Tensor, Tensor]:
            scale = torchao._choose_scale_float8(x, list(block))
            return torchao._quantize_affine_float8(x, scale), scale

        q, pair = quantize(x, tile), theirs()
        into = [partial(quantize, x, tile), theirs, partial(x.to, E4M3.dtype)]
        back = [
            partial(dequantize, q),
            partial(torchao._dequantize_affine_float8, *pair),
            partial(pair[0].to, torch.float32),
        ]
        for way, runs in (("into", into), ("back", back)):
            times = race(runs, 15)
            rates = " | ".join(f"{size / statistics.median(t):.2f}" for t in times)
            say(f"| {tile or 'whole'} | {way} | {rates} | {versus(*times[:2])} |")


def peak() -> None:
    say("\n## Share of this machine's matrix-multiply peak that a training step reaches\n")
    a = torch.randn(2048, 2048)
    best = 2 * 2048**3 / min(race([lambda: a @ a], 15)[0])
    say(f"peak {best / 1e9:,.0f} GFLOP/s\n\n| width | model | GFLOP/s | share |\n|---|---|---|---|")
    for dim in (128, 256):
        dense = Config(1024, dim, n_layers=4, n_heads=dim // 64, inter_dim=dim * 8 // 3, max_seq_len=128)
        latent = replace(DEEPSEEK, dim=dim, n_heads=dim // 32, inter_dim=2 * dim, moe_inter_dim=dim // 2)
        for name, config in (("dense", dense), ("latent attention and experts", latent)):
            torch.manual_seed(0)
            model = Transformer(config)
            tokens = torch.randint(1024, (32, 129))
            taken = race([trainer(model, lambda m=model, t=tokens: cross_entropy(m, t))], 9)[0]
            rate = 32 * 128 * budget.training_flops(config, 128) / statistics.median(taken)
            say(f"| {dim} | {name} | {rate / 1e9:,.0f} | {rate / best:.2f} |")


PARTS = {"llama": llama, "deepseek": deepseek, "moe": moe, "grpo": grpo, "fp8": fp8, "peak": peak}


def main(names: list[str]) -> None:
    if unknown := [name for name in names if name not in PARTS]:
        sys.exit(f"there is no part {unknown[0]!r}; choose from {', '.join(PARTS)}")
    method(REPORT)  # if the tables have no place there, say so before measuring
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    said.clear()
    say(setting(torch.get_num_threads()))
    for name in names or PARTS:
        PARTS[name]()
    if not names:
        write(REPORT, "\n".join(said))
        print(f"\n{REPORT.name} written")


if __name__ == "__main__":
    main(sys.argv[1:])
