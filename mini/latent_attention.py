"""Latent attention (MLA): keys and values made from one small vector a token, which is all that the cache keeps.
Chapter 03.

    c_t = norm(W_a x_t)              the latent, `kv_lora_rank` numbers, shared by all heads
    k_t = [W_uk c_t ; RoPE(k'_t)]    a head's key: a part from the latent, and a rotary part shared by all heads
    v_t = W_uv c_t                   a head's value

DeepSeek-V2 (arXiv:2405.04434 §2.1), DeepSeek-V3 (arXiv:2412.19437, equations 1-11); names are those of V3's inference
code. Shapes: b batch, t queries, s positions so far, h heads, r width of the latent, p of the rotary key.
"""

import math

import torch
from einops import einsum, rearrange, repeat
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mini.attention import Stacked, attend, room, rope, rope_frequencies


def yarn_frequencies(
    head_dim: int,
    theta: float,
    factor: float,
    original_seq_len: int,
    beta_fast: float = 32,
    beta_slow: float = 1,
) -> Float[Tensor, "half"]:
    """RoPE's frequencies for a context `factor` times as long as the `original_seq_len` of training.

    A pair that turns more than `beta_fast` times within the original context tells neighbours apart and keeps its
    frequency; one that turns less than `beta_slow` times is slowed by `factor`; a line leads from one to the other.
    YaRN, Peng et al. 2023, arXiv:2309.00071 §3.2.
    """
    frequency = rope_frequencies(head_dim, theta)

    def pair_that_turns(times: float) -> float:
        return head_dim * math.log(original_seq_len / (times * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_that_turns(beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(beta_slow)), head_dim - 1)
    pair = torch.arange(head_dim // 2, dtype=torch.float32)
    slowed = ((pair - low) / max(high - low, 1e-3)).clamp(0, 1)
    return frequency * (1 - slowed) + frequency / factor * slowed


def yarn_mscale(factor: float) -> float:
    """0.1 ln(factor) + 1: queries and keys are both lengthened by this, so scores by its square (YaRN §3.4)."""
    return 0.1 * math.log(factor) + 1 if factor > 1 else 1.0


class LatentCache:
    """Latent and rotary key of the positions seen so far, r + p numbers each, in memory set aside once.

    `length` is the number of positions filled. Bytes: b · max_len · (r + p) · (4 in float32), whatever the heads.
    """

    def __init__(self, batch: int, max_len: int, width: int, device: torch.device | str = "cpu") -> None:
        self.ckv = torch.empty(batch, max_len, width, device=device)
        self.length = 0

    def append(self, ckv: Float[Tensor, "b t w"]) -> Float[Tensor, "b s w"]:
        """Write t new positions; return all s so far."""
        end = room(self.length + ckv.shape[1], self.ckv.shape[1])
        self.ckv[:, self.length : end] = ckv
        self.length = end
        return self.ckv[:, :end]

    def keep(self, rows: Tensor) -> None:
        """Keep only these rows of the batch (indices or a mask), as when the other sequences are finished."""
        self.ckv = self.ckv[rows]


class LatentAttention(nn.Module):
    """Multi-head latent attention. `q_lora_rank=0` makes the queries from the stream directly.

    Two ways to the same result: *expanded* makes every head's keys and values from the latents, as training does;
    *absorbed* moves W_uk to the queries and W_uv behind the weights, and attends to the latents themselves, as if
    all heads shared one key of width r + p. The second does not touch h·(keys and values) per position, which is
    what makes decoding fast; per query it multiplies more, so many queries at once are expanded.
    """

    def __init__(
        self,
        dim: int,
        n_heads: int,
        q_lora_rank: int,
        kv_lora_rank: int,
        qk_nope_head_dim: int,
        qk_rope_head_dim: int,
        v_head_dim: int,
        mscale: float = 1.0,
    ) -> None:
        super().__init__()
        self.n_heads, self.kv_lora_rank = n_heads, kv_lora_rank
        self.qk_nope_head_dim, self.qk_rope_head_dim, self.v_head_dim = (
            qk_nope_head_dim,
            qk_rope_head_dim,
            v_head_dim,
        )
        qk_head_dim = qk_nope_head_dim + qk_rope_head_dim
        self.softmax_scale = qk_head_dim**-0.5 * mscale**2
        down = [q_lora_rank or n_heads * qk_head_dim, kv_lora_rank + qk_rope_head_dim]
        self.wqkv_a = nn.Linear(dim, sum(down), bias=False)
        self.wqkv_a.weight = Stacked(self.wqkv_a.weight, parts=down)
        self.q_norm = nn.RMSNorm(q_lora_rank, eps=1e-6) if q_lora_rank else None
        self.wq_b = nn.Linear(q_lora_rank, n_heads * qk_head_dim, bias=False) if q_lora_rank else None
        self.kv_norm = nn.RMSNorm(kv_lora_rank, eps=1e-6)
        self.wkv_b = nn.Linear(kv_lora_rank, n_heads * (qk_nope_head_dim + v_head_dim), bias=False)
        self.wo = nn.Linear(n_heads * v_head_dim, dim, bias=False)

    def new_cache(self, batch: int, max_len: int) -> LatentCache:
        width = self.kv_lora_rank + self.qk_rope_head_dim
        return LatentCache(batch, max_len, width, self.wo.weight.device)

    def forward(
        self,
        x: Float[Tensor, "b t dim"],
        cos: Float[Tensor, "t half"],
        sin: Float[Tensor, "t half"],
        cache: LatentCache | None = None,
        mask: Bool[Tensor, "b 1 t s"] | None = None,
    ) -> Float[Tensor, "b t dim"]:
        """cos and sin are the table's rows for these t positions; a cache holds the positions before them."""
        q, ckv = self.project(x, cos, sin)
        if cache is not None:
            ckv = cache.append(ckv)
        way = self.absorbed if cache is not None and self.absorbs(q.shape[2]) else self.expanded
        return self.wo(rearrange(way(q, ckv, mask), "b h t v -> b t (h v)"))

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Queries [b, h, t, nope + p] and what the cache keeps [b, t, r + p], rotary parts turned."""
        q, ckv = self.wqkv_a(x).split(self.wqkv_a.weight.parts, dim=-1)
        c, k_rope = ckv.split([self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)
        if self.wq_b is not None:
            q = self.wq_b(self.q_norm(q))
        q = rearrange(q, "b t (h d) -> b h t d", h=self.n_heads)
        q_nope, q_rope = q.split([self.qk_nope_head_dim, self.qk_rope_head_dim], dim=-1)
        turned = torch.cat((q_rope, rearrange(k_rope, "b t p -> b 1 t p")), dim=1)
        q_rope, k_rope = rope(turned, cos, sin, interleaved=True).split([self.n_heads, 1], dim=1)
        ckv = torch.cat((self.kv_norm(c), rearrange(k_rope, "b 1 t p -> b t p")), dim=-1)
        return torch.cat((q_nope, q_rope), dim=-1), ckv

    def absorbs(self, t: int) -> bool:
        """Whether t queries are cheaper absorbed: expanding costs r(n + v) a position and head, once; absorbing
        costs 2r - n - v more a position and head, for each query (n, v: widths of a head's key and value)."""
        r, kv = self.kv_lora_rank, self.qk_nope_head_dim + self.v_head_dim
        return t * (2 * r - kv) < r * kv

    def expanded(
        self, q: Float[Tensor, "b h t d"], ckv: Float[Tensor, "b s w"], mask: Tensor | None = None
    ) -> Float[Tensor, "b h t v"]:
        """Attention over every head's own keys and values."""
        return attend(q, *self.keys_values(ckv), mask=mask, scale=self.softmax_scale)

    def keys_values(
        self, ckv: Float[Tensor, "b s w"]
    ) -> tuple[Float[Tensor, "b h s d"], Float[Tensor, "b h s v"]]:
        """Every head's keys and values, made from the latents; the rotary key is the same for all heads."""
        c, k_rope = ckv.split([self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)
        kv = rearrange(self.wkv_b(c), "b s (h d) -> b h s d", h=self.n_heads)
        k_nope, v = kv.split([self.qk_nope_head_dim, self.v_head_dim], dim=-1)
        return torch.cat((k_nope, repeat(k_rope, "b s p -> b h s p", h=self.n_heads)), dim=-1), v

    def absorbed(
        self, q: Float[Tensor, "b h t d"], ckv: Float[Tensor, "b s w"], mask: Tensor | None = None
    ) -> Float[Tensor, "b h t v"]:
        """The same, over the latents: qᵀ(W_uk c) = (W_ukᵀ q)ᵀ c, and Σ p W_uv c = W_uv Σ p c."""
        wkv_b = rearrange(self.wkv_b.weight, "(h d) r -> h d r", h=self.n_heads)
        w_uk, w_uv = wkv_b.split([self.qk_nope_head_dim, self.v_head_dim], dim=1)
        q_nope, q_rope = q.split([self.qk_nope_head_dim, self.qk_rope_head_dim], dim=-1)
        q = torch.cat((einsum(q_nope, w_uk, "b h t n, h n r -> b h t r"), q_rope), dim=-1)
        # values are the keys' first r numbers; attending to all r + p reads the cache once, as one tensor
        k = rearrange(ckv, "b s w -> b 1 s w")
        o = attend(q, k, k, mask=mask, scale=self.softmax_scale)[..., : self.kv_lora_rank]
        return einsum(o, w_uv, "b h t r, h v r -> b h t v")
