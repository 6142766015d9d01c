"""One training step and cached decoding, ours against transformers' Llama, on the same weights and inputs.

    python -m bench.speed

Both sides take turns within one run, so that a slow spell of the machine meets both; medians are printed.
"""

import statistics
import time
from collections.abc import Callable

import torch
from einops import rearrange

from bench.llama import to_llama
from mini.model import Config, Transformer, cross_entropy
from mini.sample import sample

CONFIG = Config(vocab_size=2048, dim=128, n_layers=4, n_heads=4, inter_dim=336, max_seq_len=256)


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


def training(batch: int, length: int, rounds: int = 15) -> tuple[float, float]:
    """Seconds of one step: forward, backward, clipping, AdamW."""
    torch.manual_seed(0)
    model = Transformer(CONFIG)
    llama = to_llama(model).train()
    tokens = torch.randint(CONFIG.vocab_size, (batch, length + 1))

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


def decoding(batch: int, new: int, rounds: int = 5) -> tuple[float, float]:
    """Seconds to continue a prompt of 16 tokens greedily by `new` tokens."""
    torch.manual_seed(0)
    model = Transformer(CONFIG).eval()
    llama = to_llama(model)
    prompts = torch.randint(CONFIG.vocab_size, (batch, 16))

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
    parameters = sum(p.numel() for p in Transformer(CONFIG).parameters())
    print(
        f"{parameters / 1e6:.2f} M parameters, float32, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    print(f"\n| {'':26} | mini, tok/s | transformers, tok/s | ratio |\n|---|---|---|---|")
    rows = [
        ("training step, 16 × 128", 16 * 128, training(16, 128)),
        ("decoding, batch 1", 200, decoding(1, 200)),
        ("decoding, batch 64", 64 * 200, decoding(64, 200)),
    ]
    for name, tokens, (ours, theirs) in rows:
        print(f"| {name:26} | {tokens / ours:11,.0f} | {tokens / theirs:19,.0f} | {theirs / ours:5.2f} |")


if __name__ == "__main__":
    main()
