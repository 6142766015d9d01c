"""Attention, from the dot product to the key-value cache. Chapter 01.

A sequence is a matrix of vectors, one row a token. Attention lets each row read from the rows before it:
it compares its *query* q with every earlier *key* k, turns the scores into weights that sum to one, and
takes the weighted mean of the *values* v:

    attend(q, k, v) = softmax(q kᵀ / √d) v            (Vaswani et al. 2017, arXiv:1706.03762, equation 1)

Shapes are written with einops letters: b batch, t query positions, s key positions, h query heads,
g key-value heads, d width of one head's key, e width of one head's value.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Bool, Float
from torch import Tensor, nn


def causal_mask(t: int, s: int, device: torch.device | str = "cpu") -> Bool[Tensor, "t s"]:
    """True where a query may look: query i of the *last* t of s positions sees keys 0 … s - t + i."""
    return torch.ones(t, s, dtype=torch.bool, device=device).tril(diagonal=s - t)


def attention_weights(
    q: Float[Tensor, "b h t d"], k: Float[Tensor, "b h s d"], causal: bool = True
) -> Float[Tensor, "b h t s"]:
    """softmax(q kᵀ / √d): how much each query reads from each key. Rows sum to one."""
    scores = torch.einsum("bhtd,bhsd->bhts", q, k) * q.shape[-1] ** -0.5
    if causal:
        scores = scores.masked_fill(~causal_mask(*scores.shape[-2:], scores.device), float("-inf"))
    return scores.softmax(dim=-1)


def attend(
    q: Float[Tensor, "b h t d"],
    k: Float[Tensor, "b g s d"],
    v: Float[Tensor, "b g s e"],
    causal: bool = True,
    mask: Bool[Tensor, "#b 1 t s"] | None = None,
    scale: float | None = None,
) -> Float[Tensor, "b h t e"]:
    """Scaled dot-product attention, equal to `attention_weights(q, k) @ v` without storing the weights.

    The queries are the last t of the s positions, as when a cache holds the earlier ones. With fewer
    key-value heads than query heads (g < h), each key-value head serves h / g neighbouring query heads
    (grouped-query attention, Ainslie et al. 2023, arXiv:2305.13245). `mask` (True: may look) replaces the
    causal rule, `scale` the factor 1/√d.

    Raises ValueError if g does not divide h, or if a causal call has more queries than keys.
    """
    (h, t), (g, s) = q.shape[1:3], k.shape[1:3]
    if h % g:
        raise ValueError(f"{g} key-value heads do not divide {h} query heads; use a divisor of {h}")
    if causal and t > s:
        raise ValueError(
            f"{t} queries but only {s} keys: a causal query needs its own key; pass causal=False"
        )
    if mask is None and causal and 1 < t < s:
        mask = rearrange(causal_mask(t, s, q.device), "t s -> 1 1 t s")
    if g != h and (mask is not None or t == 1):  # the heads of a group become their key head's queries
        mask = None if mask is None else repeat(mask, "b 1 t s -> b 1 (r t) s", r=h // g)
        q = rearrange(q, "b (g r) t d -> b g (r t) d", g=g)
        grouped = attend(q, k, v, causal=False, mask=mask, scale=scale)
        return rearrange(grouped, "b g (r t) e -> b (g r) t e", t=t)
    if g != h:  # without a mask to repeat, repeating the keys leaves the causal rule to a faster routine
        k, v = (repeat(x, "b g s d -> b (g r) s d", r=h // g) for x in (k, v))
    e = v.shape[-1]
    if t > 1 and e < q.shape[-1]:  # PyTorch's fused routine wants values as wide as keys, and zeros are cheap
        v = F.pad(v, (0, q.shape[-1] - e))
    # One query that is the last position sees everything, so it needs no mask at all.
    is_causal = causal and mask is None and t > 1
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, scale=scale)[..., :e]


def rope_frequencies(head_dim: int, theta: float = 10_000.0) -> Float[Tensor, "half"]:
    """θ_i = theta^(-2i / head_dim) for i < head_dim / 2: how far pair i turns from one position to the next."""
    if head_dim % 2:
        raise ValueError(f"head_dim={head_dim} is odd; RoPE rotates pairs, use an even head width")
    return theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)


def rope_table(
    head_dim: int, max_seq_len: int, theta: float = 10_000.0, frequency: Float[Tensor, "half"] | None = None
) -> tuple[Float[Tensor, "t half"], Float[Tensor, "t half"]]:
    """cos and sin of m·θ_i for position m and frequency θ_i, by default those of `rope_frequencies`.

    Rotary position embedding, Su et al. 2021, arXiv:2104.09864, equation 15.
    """
    if frequency is None:
        frequency = rope_frequencies(head_dim, theta)
    angle = torch.outer(torch.arange(max_seq_len, dtype=torch.float32), frequency)
    return angle.cos(), angle.sin()


def rope(
    x: Float[Tensor, "*b t d"],
    cos: Float[Tensor, "t half"],
    sin: Float[Tensor, "t half"],
    interleaved: bool = False,
) -> Float[Tensor, "*b t d"]:
    """Turn each pair of numbers of x by its position's angle: (x₁, x₂) → (x₁ cos - x₂ sin, x₂ cos + x₁ sin).

    Which numbers form a pair is a convention that weights are trained for: `interleaved` pairs neighbours
    (x₀, x₁), (x₂, x₃) … as DeepSeek-V3 and the paper do; otherwise number i of the first half goes with
    number i of the second, as Llama's weights in transformers have it. Mixing them up is silent and wrong.
    """
    if interleaved:  # a pair is a complex number, and turning it is multiplying it by cos + i sin
        pairs = rearrange(x.float(), "... (half pair) -> ... half pair", pair=2).contiguous()
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.complex(cos, sin))
        return rearrange(turned, "... half pair -> ... (half pair)").type_as(x)
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)


def room(end: int, max_len: int) -> int:
    """`end`, if a cache of `max_len` positions reaches that far; ValueError otherwise."""
    if end > max_len:
        raise ValueError(f"position {end} is past the cache's {max_len}; make it longer or stop earlier")
    return end


class KVCache:
    """Keys and values of the positions seen so far, in memory set aside once for `max_len` positions.

    `length` is the number of positions filled. Bytes: 2 · b · g · max_len · d · (4 in float32).
    """

    def __init__(
        self, batch: int, n_kv_heads: int, max_len: int, head_dim: int, device: torch.device | str = "cpu"
    ) -> None:
        self.k = torch.empty(batch, n_kv_heads, max_len, head_dim, device=device)
        self.v = torch.empty_like(self.k)
        self.length = 0

    def append(
        self, k: Float[Tensor, "b g t d"], v: Float[Tensor, "b g t d"]
    ) -> tuple[Float[Tensor, "b g s d"], Float[Tensor, "b g s d"]]:
        """Write the keys and values of t new positions; return those of all s positions so far."""
        end = room(self.length + k.shape[2], self.k.shape[2])
        self.k[:, :, self.length : end] = k
        self.v[:, :, self.length : end] = v
        self.length = end
        return self.k[:, :, :end], self.v[:, :, :end]

    def keep(self, rows: Tensor) -> None:
        """Keep only these rows of the batch (indices or a mask), as when the other sequences are finished."""
        self.k, self.v = self.k[rows], self.v[rows]


class Attention(nn.Module):
    """Multi-head attention with RoPE; grouped-query or multi-query when `n_kv_heads` is below `n_heads`.

    One matrix makes all queries, keys and values, because one large product is faster than three small ones.
    """

    def __init__(self, dim: int, n_heads: int, n_kv_heads: int = 0) -> None:
        super().__init__()
        if dim % n_heads:
            fits = [n for n in range(1, dim + 1) if dim % n == 0 and (dim // n) % 2 == 0]
            near = sorted(sorted(fits, key=lambda n: abs(n - n_heads))[:2])
            raise ValueError(
                f"n_heads={n_heads} does not divide dim={dim}; try {' or '.join(map(str, near))}"
            )
        self.n_heads, self.n_kv_heads, self.head_dim = n_heads, n_kv_heads or n_heads, dim // n_heads
        if n_heads % self.n_kv_heads:
            raise ValueError(
                f"n_kv_heads={n_kv_heads} does not divide n_heads={n_heads}; use a divisor of {n_heads}"
            )
        rows = [n * self.head_dim for n in (n_heads, self.n_kv_heads, self.n_kv_heads)]
        self.wqkv = nn.Linear(dim, sum(rows), bias=False)
        self.wqkv.weight = Stacked(self.wqkv.weight, parts=rows)
        self.wo = nn.Linear(dim, dim, bias=False)

    def new_cache(self, batch: int, max_len: int) -> KVCache:
        return KVCache(batch, self.n_kv_heads, max_len, self.head_dim, self.wo.weight.device)

    def forward(
        self,
        x: Float[Tensor, "b t dim"],
        cos: Float[Tensor, "t half"],
        sin: Float[Tensor, "t half"],
        cache: KVCache | None = None,
        mask: Bool[Tensor, "b 1 t s"] | None = None,
    ) -> Float[Tensor, "b t dim"]:
        """cos and sin are the table's rows for these t positions; a cache holds the positions before them."""
        qkv = rearrange(self.wqkv(x), "b t (n d) -> b n t d", d=self.head_dim)
        qk, v = qkv.split([self.n_heads + self.n_kv_heads, self.n_kv_heads], dim=1)
        q, k = rope(qk, cos, sin).split([self.n_heads, self.n_kv_heads], dim=1)
        if cache is not None:
            k, v = cache.append(k, v)
        return self.wo(rearrange(attend(q, k, v, mask=mask), "b h t d -> b t (h d)"))


class Stacked(nn.Parameter):
    """Matrices one above another in one parameter, since one large product is faster than several small ones.

    `parts`, their numbers of rows, tells the optimiser to treat each by itself; a copy of a model keeps them.
    """

    def __new__(cls, data: Tensor, requires_grad: bool = True, *, parts: Sequence[int]) -> "Stacked":
        self = super().__new__(cls, data.detach(), requires_grad)
        self.parts = tuple(parts)
        return self

    def __deepcopy__(self, memo: dict) -> "Stacked":
        if id(self) not in memo:
            memo[id(self)] = Stacked(self.data.clone(), self.requires_grad, parts=self.parts)
        return memo[id(self)]
