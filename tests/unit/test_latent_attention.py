"""Latent attention: the paper's equations one number at a time, and two ways to one result."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mini.attention import rope_frequencies, rope_table
from mini.latent_attention import LatentAttention, LatentCache, yarn_frequencies, yarn_mscale
from mini.model import Config, Transformer
from mini.sample import sample

SHAPE = dict(vocab_size=40, dim=16, n_layers=2, n_heads=3, inter_dim=24, max_seq_len=32)
SHAPE |= dict(q_lora_rank=10, kv_lora_rank=8, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=5)


def layer(seed: int = 0, dim=16, n_heads=3, q=10, r=8, nope=6, p=4, v=5) -> LatentAttention:
    torch.manual_seed(seed)
    attn = LatentAttention(dim, n_heads, q, r, nope, p, v)
    for weight in attn.parameters():  # norms as well: at one, a norm in the wrong place would not show
        torch.nn.init.uniform_(weight, 0.5, 1.5) if weight.dim() == 1 else torch.nn.init.normal_(
            weight, std=0.3
        )
    return attn


def turn(x: list[float], position: int) -> list[float]:
    """RoPE of one vector of neighbouring pairs, with complex numbers."""
    out = []
    for i in range(0, len(x), 2):
        z = complex(x[i], x[i + 1]) * complex(math.cos(a := position * 10_000 ** (-i / len(x))), math.sin(a))
        out += [z.real, z.imag]
    return out


def by_the_paper(attn: LatentAttention, x: torch.Tensor) -> torch.Tensor:
    """arXiv:2412.19437, equations 1 to 11, for one sequence x [t, dim], head by head and pair by pair."""
    down_q, down_kv = attn.wqkv_a.weight.split(attn.wqkv_a.weight.parts)
    w_dkv, w_kr = down_kv[: attn.kv_lora_rank], down_kv[attn.kv_lora_rank :]

    def norm(c, weight):
        return c / (c.square().mean() + 1e-6).sqrt() * weight

    nope, v, h = attn.qk_nope_head_dim, attn.v_head_dim, attn.n_heads
    latents = [norm(w_dkv @ row, attn.kv_norm.weight) for row in x]
    k_rope = [turn((w_kr @ row).tolist(), t) for t, row in enumerate(x)]
    rows = []
    for t, row in enumerate(x):
        q = down_q @ row if attn.wq_b is None else attn.wq_b.weight @ norm(down_q @ row, attn.q_norm.weight)
        heads = []
        for i, q_head in enumerate(q.chunk(h)):
            w_uk, w_uv = attn.wkv_b.weight.chunk(h)[i].split([nope, v])
            query = torch.tensor(q_head[:nope].tolist() + turn(q_head[nope:].tolist(), t))
            keys = [torch.tensor([*(w_uk @ latents[j]).tolist(), *k_rope[j]]) for j in range(t + 1)]
            scores = torch.stack([query @ key for key in keys]) / math.sqrt(len(query))
            heads.append(sum(s * (w_uv @ latents[j]) for j, s in enumerate(scores.softmax(0))))
        rows.append(attn.wo.weight @ torch.cat(heads))
    return torch.stack(rows)


@pytest.mark.parametrize("q", [0, 10])
def test_the_papers_equations_one_head_and_pair_at_a_time(q):
    attn = layer(q=q)
    x = torch.randn(2, 7, 16)
    with torch.no_grad():
        torch.testing.assert_close(
            attn(x, *rope_table(4, 7)),
            torch.stack([by_the_paper(attn, row) for row in x]),
            atol=1e-5,
            rtol=1e-4,
        )


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 1000),
    st.integers(1, 6),
    st.integers(0, 9),
    st.integers(1, 4),
    st.booleans(),
    st.integers(0, 1),
)
def test_absorbed_equals_expanded(seed, t, before, n_heads, padded, odd):
    attn = layer(seed, n_heads=n_heads, nope=6 + odd, v=5 - odd)
    s = before + t
    torch.manual_seed(seed)
    x, (cos, sin) = torch.randn(2, s, 16), rope_table(4, s)
    mask = None
    if padded and s > 1:
        mask = torch.ones(2, 1, t, s, dtype=torch.bool).tril(before)
        mask[1, ..., : min(1, before)] = False
    with torch.no_grad():
        q, ckv = attn.project(x, cos, sin)
        q = q[:, :, before:]
        torch.testing.assert_close(
            attn.absorbed(q, ckv, mask), attn.expanded(q, ckv, mask), atol=2e-6, rtol=1e-4
        )


@pytest.mark.parametrize("cuts", [[20], [1] * 20, [7, 1, 12], [2] * 10])
def test_cached_reading_gives_the_same_result(cuts):
    attn, x = layer(), torch.randn(3, 20, 16)
    cos, sin = rope_table(4, 20)
    cache = attn.new_cache(3, 20)
    parts = zip(x.split(cuts, dim=1), cos.split(cuts), sin.split(cuts), strict=True)
    torch.testing.assert_close(
        torch.cat([attn(*part, cache) for part in parts], dim=1), attn(x, cos, sin), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("n_heads", [1, 3, 8])
def test_the_cache_does_not_grow_with_the_heads(n_heads):
    cache = layer(n_heads=n_heads).new_cache(2, 10)
    assert cache.ckv.shape == (2, 10, 8 + 4)


def test_a_cache_past_its_end_is_refused_and_rows_can_be_kept():
    cache = LatentCache(3, 4, 2)
    whole = torch.randn(3, 4, 2)
    cache.append(whole)
    cache.keep(torch.tensor([True, False, True]))
    assert torch.equal(cache.ckv, whole[[0, 2]])
    with pytest.raises(ValueError, match="position 5 is past the cache's 4"):
        cache.append(torch.randn(2, 1, 2))


def test_the_future_does_not_matter_and_only_distances_do():
    attn, x = layer(), torch.randn(1, 9, 16)
    cos, sin = rope_table(4, 40)
    full = attn(x, cos[:9], sin[:9])
    other = torch.cat((x[:, :5], torch.randn(1, 4, 16)), dim=1)
    torch.testing.assert_close(attn(other, cos[:9], sin[:9])[:, :5], full[:, :5], atol=1e-6, rtol=0)
    torch.testing.assert_close(attn(x, cos[30:39], sin[30:39]), full, atol=1e-5, rtol=0)
    assert (attn(x, cos[:9] * 0 + 1, sin[:9] * 0) - full).abs().max() > 1e-2, "positions should matter at all"


def flops(attn: LatentAttention, t: int, s: int) -> tuple[int, int]:
    """Multiplications, expanded and absorbed, of t queries over s positions, a head."""
    r, p, n, v = attn.kv_lora_rank, attn.qk_rope_head_dim, attn.qk_nope_head_dim, attn.v_head_dim
    return s * r * (n + v) + t * s * (n + p + v), t * r * (n + v) + t * s * (2 * r + p)


@pytest.mark.parametrize(
    ("r", "n", "v", "p"), [(512, 128, 128, 64), (32, 24, 24, 8), (8, 6, 5, 4), (16, 40, 40, 8)]
)
def test_the_cheaper_way_is_taken(r, n, v, p):
    attn = layer(r=r, nope=n, v=v, p=p)
    s = 10**7  # so long that what does not grow with s no longer counts
    for t in range(1, 400):
        expanded, absorbed = flops(attn, t, s)
        if abs(expanded - absorbed) > t * r * (n + v):
            assert attn.absorbs(t) == (absorbed < expanded)


def test_v3_absorbs_up_to_170_queries():
    attn = layer(r=512, nope=128, v=128, p=64)
    assert attn.absorbs(170)
    assert not attn.absorbs(171)


def test_yarn_keeps_fast_pairs_and_slows_slow_ones():
    plain, slowed = rope_frequencies(64), yarn_frequencies(64, 10_000.0, 40.0, 4096)
    turns = plain * 4096 / (2 * math.pi)
    assert torch.equal(slowed[turns > 40], plain[turns > 40])
    torch.testing.assert_close(slowed[turns < 0.8], plain[turns < 0.8] / 40)
    between = (turns < 25) & (turns > 1.3)
    assert between.any()
    assert ((slowed < plain) & (slowed > plain / 40))[between].all()
    torch.testing.assert_close(yarn_frequencies(64, 10_000.0, 1.0, 4096), plain)
    assert yarn_mscale(1.0) == 1.0
    assert yarn_mscale(40.0) == pytest.approx(1.36889, abs=1e-5)


def model(**changes) -> Transformer:
    torch.manual_seed(0)
    made = Transformer(Config(**SHAPE | changes)).eval()
    for p in made.parameters():
        torch.nn.init.uniform_(p, 0.5, 1.5) if p.dim() == 1 else torch.nn.init.normal_(p, std=0.2)
    return made


def test_prompts_of_different_lengths_are_continued_as_each_alone():
    net = model()
    prompts = [[1, 2, 3, 4, 5], [6], [7, 8, 9]]
    together = sample(net, prompts, 12, temperature=0).tokens
    for row, prompt in zip(together, prompts, strict=True):
        assert torch.equal(row, sample(net, [prompt], 12, temperature=0).tokens[0])


def test_yarn_changes_the_model_and_its_scale():
    plain = model()
    stretched = Transformer(replace(plain.config, rope_factor=4.0, original_seq_len=8)).eval()
    stretched.load_state_dict(plain.state_dict())
    assert stretched.layers[0].attn.softmax_scale == pytest.approx(10**-0.5 * (0.1 * math.log(4) + 1) ** 2)
    tokens = torch.randint(40, (1, 30))
    assert (plain(tokens) - stretched(tokens)).abs().max() > 1e-2
