"""One training step and cached decoding, ours against transformers' Llama, on the same weights and inputs.

    python -m bench.speed

Both sides take turns within one run, so that a slow spell of the machine meets both; medians are printed.
"""

import statistics
import time
from collections.abc import Callable

import torch
import transformers
from einops import rearrange

from bench.llama import to_llama
from mini.model import Config, Transformer, cross_entropy
from mini.sample import sample

HEADS = {"4 heads": 4, "4 heads on 1 key-value head": 1}


def config(n_kv_heads: int) -> Config:
    """The width of chapter 02's model; Llama 3 has four heads on each key-value head."""
    return Config(1024, dim=128, n_layers=3, n_heads=4, n_kv_heads=n_kv_heads, inter_dim=336, max_seq_len=256)


def race(ours: Callable[[], object], theirs: Callable[[], object], rounds: int) -> tuple[float, float]:
    """Median seconds of each, run in turn after one warm-up."""
    times: tuple[list[float], list[float]] = ([], [])
    for i in range(rounds + 1):
        for run, taken in zip((ours, theirs), times, strict=True):
            start = time.perf_counter()
            run()
            if i > 0:
                taken.append(time.perf_counter() - start)
    return statistics.median(times[0]), statistics.median(times[1])


def training(shape: Config, batch: int, length: int, rounds: int = 15) -> tuple[float, float]:
    """Seconds of one step: forward, backward, clipping, AdamW."""
    torch.manual_seed(0)
    model = Transformer(shape)
    llama = to_llama(model).train()
    tokens = torch.randint(shape.vocab_size, (batch, length + 1))

    def step(net: torch.nn.Module, loss: Callable[[], torch.Tensor]) -> Callable[[], None]:
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=True)

        def run() -> None:
            loss().backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

        return run

    def llama_loss() -> torch.Tensor:
        logits = llama(tokens[:, :-1], use_cache=False).logits
        return torch.nn.functional.cross_entropy(
            rearrange(logits, "b t v -> (b t) v"), rearrange(tokens[:, 1:], "b t -> (b t)")
        )

    return race(step(model, lambda: cross_entropy(model, tokens)), step(llama, llama_loss), rounds)


def decoding(shape: Config, batch: int, new: int, rounds: int = 5) -> tuple[float, float]:
    """Seconds to continue a prompt of 16 tokens greedily by `new` tokens."""
    torch.manual_seed(0)
    model = Transformer(shape).eval()
    llama = to_llama(model)
    prompts = torch.randint(shape.vocab_size, (batch, 16))

    def ours() -> torch.Tensor:
        return sample(model, prompts, new, temperature=0).tokens

    def theirs() -> torch.Tensor:
        mask = torch.ones_like(prompts)
        return llama.generate(
            prompts,
            attention_mask=mask,
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
        )[:, 16:]

    assert torch.equal(ours(), theirs()), "the two sides do not write the same text"
    return race(ours, theirs, rounds)


def main() -> None:
    print(f"float32, {torch.get_num_threads()} threads")
    print(f"torch {torch.__version__}, transformers {transformers.__version__}")
    print("\n| | mini, tok/s | transformers, tok/s | ratio |\n|---|---|---|---|")
    for name, n_kv_heads in HEADS.items():
        shape = config(n_kv_heads)
        rows = {
            "training step, 16 × 128": (16 * 128, training(shape, 16, 128)),
            "decoding, batch 1": (200, decoding(shape, 1, 200)),
            "decoding, batch 64": (64 * 200, decoding(shape, 64, 200)),
        }
        for row, (tokens, (ours, theirs)) in rows.items():
            print(f"| {name}: {row} | {tokens / ours:,.0f} | {tokens / theirs:,.0f} | {theirs / ours:.2f} |")


if __name__ == "__main__":
    main()
