"""A language model: embed tokens, refine them layer by layer, score the next token. Chapter 02.

The layout of Llama and of DeepSeek's dense layers: RMSNorm before each part, RoPE, SwiGLU, no biases.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from mini.attention import Attention, KVCache, Stacked, rope_table
from mini.latent_attention import LatentAttention, LatentCache, yarn_frequencies, yarn_mscale
from mini.moe import Experts, Gate, MoE

Cache = KVCache | LatentCache


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
    # YaRN, which stretches latent attention's RoPE to a longer context; rope_factor = 1 means without.
    rope_factor: float = 1.0  # how many times as long as original_seq_len
    original_seq_len: int = 0  # the context of training
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    # Mixture of experts (chapter 04); n_routed_experts = 0 means dense layers only.
    n_dense_layers: int = 0  # the first layers, which stay dense
    n_routed_experts: int = 0
    n_shared_experts: int = 0
    n_activated_experts: int = 0
    moe_inter_dim: int = 0
    n_expert_groups: int = 1
    n_limited_groups: int = 1  # a token's experts come from this many groups
    route_scale: float = 1.0  # the gates are multiplied by this
    norm_topk_prob: bool = True  # the gates of the chosen experts sum to one (before route_scale)

    def __post_init__(self) -> None:
        for name in ("vocab_size", "dim", "n_layers", "n_heads", "inter_dim", "max_seq_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.n_routed_experts and not self.moe_inter_dim:
            raise ValueError(
                f"n_routed_experts={self.n_routed_experts} need a moe_inter_dim, the width of each"
            )
        if self.n_activated_experts > self.n_routed_experts:
            raise ValueError(
                f"n_activated_experts={self.n_activated_experts} exceeds n_routed_experts={self.n_routed_experts}"
            )
        if self.kv_lora_rank:
            for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
                if getattr(self, name) < 1:
                    raise ValueError(f"kv_lora_rank={self.kv_lora_rank} needs a {name} of at least 1")
        if self.rope_factor != 1 and not (
            self.kv_lora_rank and self.rope_factor > 1 and self.original_seq_len
        ):
            raise ValueError(
                f"rope_factor={self.rope_factor} (YaRN) needs a kv_lora_rank, a factor above 1, an original_seq_len"
            )


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) · w3 x), with w1 and w3 stacked in one matrix (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, dim: int, inter_dim: int) -> None:
        super().__init__()
        self.w13 = nn.Linear(dim, 2 * inter_dim, bias=False)
        self.w13.weight = Stacked(self.w13.weight, parts=(inter_dim, inter_dim))
        self.w2 = nn.Linear(inter_dim, dim, bias=False)

    def forward(self, x: Float[Tensor, "*b dim"]) -> Float[Tensor, "*b dim"]:
        gate, up = self.w13(x).chunk(2, dim=-1)
        return self.w2(F.silu(gate) * up)


def build_attention(c: Config) -> Attention | LatentAttention:
    """Latent attention if the configuration has a latent, ordinary attention otherwise."""
    if not c.kv_lora_rank:
        return Attention(c.dim, c.n_heads, c.n_kv_heads)
    widths = c.q_lora_rank, c.kv_lora_rank, c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim
    return LatentAttention(c.dim, c.n_heads, *widths, mscale=yarn_mscale(c.rope_factor))


def build_moe(c: Config) -> MoE:
    """Router, routed experts, and the shared ones: these need no router, so all of them are one wider feed-forward."""
    groups = c.n_expert_groups, c.n_limited_groups
    gate = Gate(c.dim, c.n_routed_experts, c.n_activated_experts, *groups, c.route_scale, c.norm_topk_prob)
    shared = FeedForward(c.dim, c.n_shared_experts * c.moe_inter_dim) if c.n_shared_experts else None
    return MoE(gate, Experts(c.n_routed_experts, c.dim, c.moe_inter_dim), shared)


class Block(nn.Module):
    """One layer: each part reads a normalised copy of the stream and adds its result back.

    `experts`: the feed-forward is a mixture of experts.
    """

    def __init__(self, config: Config, experts: bool) -> None:
        super().__init__()
        self.attn_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.attn = build_attention(config)
        self.ffn_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.ffn = build_moe(config) if experts else FeedForward(config.dim, config.inter_dim)

    def forward(
        self,
        x: Float[Tensor, "b t dim"],
        cos: Tensor,
        sin: Tensor,
        cache: Cache | None,
        mask: Tensor | None,
    ) -> Float[Tensor, "b t dim"]:
        x = x + self.attn(self.attn_norm(x), cos, sin, cache, mask)
        return x + self.ffn(self.ffn_norm(x))


def build_rope(c: Config) -> tuple[Float[Tensor, "t half"], Float[Tensor, "t half"]]:
    """cos and sin for the part of a head that RoPE turns: all of it, or latent attention's rotary part."""
    if not c.kv_lora_rank:
        return rope_table(c.dim // c.n_heads, c.max_seq_len, c.rope_theta)
    stretch = c.rope_factor, c.original_seq_len, c.beta_fast, c.beta_slow
    frequency = yarn_frequencies(c.qk_rope_head_dim, c.rope_theta, *stretch) if c.rope_factor > 1 else None
    return rope_table(c.qk_rope_head_dim, c.max_seq_len, c.rope_theta, frequency)


class Transformer(nn.Module):
    """tokens → logits. `hidden` stops before the head, so that sampling scores only the last position."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        dense = config.n_dense_layers if config.n_routed_experts else config.n_layers
        self.layers = nn.ModuleList(Block(config, experts=i >= dense) for i in range(config.n_layers))
        self.norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.head = None if config.tie_embeddings else nn.Linear(config.dim, config.vocab_size, bias=False)
        cos, sin = build_rope(config)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        for p in self.parameters():
            if p.dim() > 1:  # 0.5 / √dim is 0.006 at DeepSeek-V3's width, the value that its report gives
                nn.init.normal_(p, std=0.5 * config.dim**-0.5)

    def new_cache(self, batch: int, max_len: int) -> list[Cache]:
        """One empty cache a layer, for `batch` sequences of up to `max_len` positions."""
        return [layer.attn.new_cache(batch, max_len) for layer in self.layers]

    def hidden(
        self,
        tokens: Int[Tensor, "b t"],
        cache: list[Cache] | None = None,
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
        cache: list[Cache] | None = None,
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
