"""A language model: embed tokens, refine them layer by layer, score the next token. Chapter 02.

The layout of Llama and of DeepSeek's dense layers: RMSNorm before each part, RoPE, SwiGLU, no biases.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from mini.attention import Attention, KVCache, rope_table


@dataclass(frozen=True)
class Config:
    """The shape of a model. Names are those of DeepSeek-V3's published inference code."""

    vocab_size: int
    dim: int  # width of the residual stream
    n_layers: int
    n_heads: int
    inter_dim: int  # hidden width of a dense feed-forward
    max_seq_len: int = 256  # context, in tokens
    n_kv_heads: int = 0  # 0: as many as n_heads; 1: multi-query; between: grouped-query
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    tie_embeddings: bool = True  # the output head reuses the embedding matrix
    # Latent attention (chapter 03); kv_lora_rank = 0 means ordinary attention.
    q_lora_rank: int = 0
    kv_lora_rank: int = 0
    qk_nope_head_dim: int = 0
    qk_rope_head_dim: int = 0
    v_head_dim: int = 0
    # Mixture of experts (chapter 04); n_routed_experts = 0 means dense layers only.
    n_dense_layers: int = 0  # the first layers, which stay dense
    n_routed_experts: int = 0
    n_shared_experts: int = 0
    n_activated_experts: int = 0
    moe_inter_dim: int = 0

    def __post_init__(self) -> None:
        for name in ("vocab_size", "dim", "n_layers", "n_heads", "inter_dim", "max_seq_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.n_activated_experts > self.n_routed_experts:
            raise ValueError(
                f"n_activated_experts={self.n_activated_experts} exceeds n_routed_experts={self.n_routed_experts}"
            )


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) · w3 x), with w1 and w3 stacked in one matrix (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, dim: int, inter_dim: int) -> None:
        super().__init__()
        self.w13 = nn.Linear(dim, 2 * inter_dim, bias=False)
        self.w13.weight.parts = (inter_dim, inter_dim)  # the optimiser treats stacked matrices each by itself
        self.w2 = nn.Linear(inter_dim, dim, bias=False)

    def forward(self, x: Float[Tensor, "*b dim"]) -> Float[Tensor, "*b dim"]:
        gate, up = self.w13(x).chunk(2, dim=-1)
        return self.w2(F.silu(gate) * up)


class Block(nn.Module):
    """One layer: each part reads a normalised copy of the stream and adds its result back."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.attn_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.attn = Attention(config.dim, config.n_heads, config.n_kv_heads)
        self.ffn_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.ffn = FeedForward(config.dim, config.inter_dim)

    def forward(
        self,
        x: Float[Tensor, "b t dim"],
        cos: Tensor,
        sin: Tensor,
        cache: KVCache | None,
        mask: Tensor | None,
    ) -> Float[Tensor, "b t dim"]:
        x = x + self.attn(self.attn_norm(x), cos, sin, cache, mask)
        return x + self.ffn(self.ffn_norm(x))


class Transformer(nn.Module):
    """tokens → logits. `hidden` stops before the head, so that sampling scores only the last position.

    Raises ValueError for a configuration that it does not build.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        for name, chapter in (("kv_lora_rank", "03"), ("n_routed_experts", "04")):
            if value := getattr(config, name):
                raise ValueError(
                    f"{name}={value}: Transformer does not build this yet (chapter {chapter}); set it to 0"
                )
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.head = None if config.tie_embeddings else nn.Linear(config.dim, config.vocab_size, bias=False)
        cos, sin = rope_table(config.dim // config.n_heads, config.max_seq_len, config.rope_theta)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        for p in self.parameters():
            if p.dim() == 2:  # 0.5 / √dim is 0.006 at DeepSeek-V3's width, the value that its report gives
                nn.init.normal_(p, std=0.5 * config.dim**-0.5)

    def new_cache(self, batch: int, max_len: int) -> list[KVCache]:
        """One empty cache a layer, for `batch` sequences of up to `max_len` positions."""
        attn = self.layers[0].attn
        return [
            KVCache(batch, attn.n_kv_heads, max_len, attn.head_dim, self.embed.weight.device)
            for _ in self.layers
        ]

    def hidden(
        self,
        tokens: Int[Tensor, "b t"],
        cache: list[KVCache] | None = None,
        pad: Int[Tensor, "b"] | None = None,
    ) -> Float[Tensor, "b t dim"]:
        """The stream after the last layer and norm. `pad[b]` leading slots of row b are filler and never read.

        Filler shifts a row's positions, which RoPE does not notice: it sees distances only.
        """
        t = tokens.shape[1]
        start = cache[0].length if cache else 0
        if t == 0 or start + t > self.config.max_seq_len:
            raise ValueError(
                f"{start + t} positions, but this model reads 1 to max_seq_len={self.config.max_seq_len}; "
                "give it a shorter text or build it with a larger max_seq_len"
            )
        mask = None if pad is None else padded_mask(t, start + t, pad)
        cos, sin = self.cos[start : start + t], self.sin[start : start + t]
        x = self.embed(tokens)
        for i, layer in enumerate(self.layers):
            x = layer(x, cos, sin, cache[i] if cache else None, mask)
        return self.norm(x)

    def logits(self, x: Float[Tensor, "*b dim"]) -> Float[Tensor, "*b vocab"]:
        """A score for each token of the vocabulary; softmax makes them probabilities."""
        return F.linear(x, self.embed.weight if self.head is None else self.head.weight)

    def forward(
        self,
        tokens: Int[Tensor, "b t"],
        cache: list[KVCache] | None = None,
        pad: Int[Tensor, "b"] | None = None,
    ) -> Float[Tensor, "b t vocab"]:
        return self.logits(self.hidden(tokens, cache, pad))


def padded_mask(t: int, s: int, pad: Int[Tensor, "b"]) -> Tensor:
    """The causal mask without the first pad[b] keys of row b. Shape [b, 1, t, s].

    A filler query still sees itself: a row of the softmax with nothing in it would be NaN, and NaN spreads.
    """
    key = torch.arange(s, device=pad.device)
    query = rearrange(key[s - t :], "t -> t 1")
    real = key >= rearrange(pad, "b -> b 1 1 1")
    return (key <= query) & (real | (key == query))


def cross_entropy(model: nn.Module, tokens: Int[Tensor, "b n"]) -> Float[Tensor, ""]:
    """Mean surprise, in nats a token, of predicting each token from those before it."""
    logits = model(tokens[:, :-1])
    return F.cross_entropy(rearrange(logits, "b t v -> (b t) v"), rearrange(tokens[:, 1:], "b t -> (b t)"))
