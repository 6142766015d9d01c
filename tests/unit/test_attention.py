import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mini.attention import Attention, KVCache, attend, attention_weights, causal_mask, rope, rope_table

seeds = st.integers(0, 2**31 - 1)
even = st.integers(1, 16).map(lambda n: 2 * n)
layouts = st.booleans()
shapes = st.sampled_from([(1, 1), (4, 4), (4, 2), (4, 1), (6, 3)])  # query heads, key-value heads
few = settings(max_examples=40, deadline=None)


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer(heads: tuple[int, int], seed: int) -> Attention:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Attention(24, *heads)


def read(attention: Attention, x: torch.Tensor) -> torch.Tensor:
    return attention(x, *rope_table(attention.head_dim, x.shape[1]))


@few
@given(seeds, even, layouts, st.integers(0, 40), st.integers(0, 40), st.integers(0, 200))
def test_a_rope_score_depends_on_the_distance_alone(seed, d, interleaved, m, n, shift):
    q, k = normal(seed, 2, d)
    cos, sin = rope_table(d, 300)

    def score(i: int, j: int) -> torch.Tensor:
        at = [slice(i, i + 1), slice(j, j + 1)]
        turned = [rope(x[None], cos[a], sin[a], interleaved) for x, a in zip((q, k), at, strict=True)]
        return (turned[0] * turned[1]).sum()

    torch.testing.assert_close(score(m + shift, n + shift), score(m, n), atol=2e-4, rtol=1e-4)


@few
@given(seeds, even, layouts)
def test_rope_turns_and_keeps_lengths(seed, d, interleaved):
    x, table = normal(seed, 3, 20, d), rope_table(d, 20)
    turned = rope(x, *table, interleaved)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(turned[:, 0], x[:, 0])  # position 0: no turn
    back = rope(turned, table[0], -table[1], interleaved)
    torch.testing.assert_close(back, x, atol=1e-5, rtol=1e-5)


@few
@given(seeds, even)
def test_the_two_layouts_differ_by_a_permutation(seed, d):
    x, table = normal(seed, 2, 12, d), rope_table(d, 12)
    to_halves = torch.cat((torch.arange(0, d, 2), torch.arange(1, d, 2)))
    torch.testing.assert_close(
        rope(x[..., to_halves], *table), rope(x, *table, interleaved=True)[..., to_halves]
    )


@few
@given(seeds, shapes, st.integers(2, 12), st.data())
def test_the_future_is_not_read(seed, heads, t, data):
    cut = data.draw(st.integers(1, t - 1))
    attention = layer(heads, seed)
    x = normal(seed, 2, t, attention.wo.in_features)
    changed = x.clone()
    changed[:, cut:] = normal(seed + 1, *changed[:, cut:].shape)
    before, after = read(attention, x), read(attention, changed)
    # exact up to the order in which a matrix product of another size may sum
    torch.testing.assert_close(before[:, :cut], after[:, :cut], atol=1e-6, rtol=0)
    assert (before[:, cut:] - after[:, cut:]).abs().max() > 1e-4


@few
@given(seeds, shapes, st.lists(st.integers(1, 6), min_size=1, max_size=6))
def test_reading_in_parts_with_a_cache_changes_nothing(seed, heads, parts):
    attention = layer(heads, seed)
    t = sum(parts)
    x = normal(seed, 2, t, attention.wo.in_features)
    cos, sin = rope_table(attention.head_dim, t)
    cache = KVCache(2, attention.n_kv_heads, t, attention.head_dim)
    outputs = []
    for part in x.split(parts, dim=1):
        now = slice(cache.length, cache.length + part.shape[1])
        outputs.append(attention(part, cos[now], sin[now], cache))
    torch.testing.assert_close(torch.cat(outputs, dim=1), attention(x, cos, sin), atol=1e-5, rtol=1e-5)


@few
@given(seeds, st.integers(1, 8), st.integers(0, 8), st.booleans())
def test_weights_are_shares_of_the_visible_keys(seed, t, earlier, causal):
    q, k = normal(seed, 2, 3, t, 4), normal(seed + 1, 2, 3, t + earlier, 4)
    weights = attention_weights(q, k, causal)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, t))
    assert (weights >= 0).all()
    hidden = ~causal_mask(t, t + earlier)
    assert (weights[..., hidden] == 0).all() == (causal or not hidden.any())


@few
@given(seeds, shapes, st.integers(1, 6))
def test_attend_is_the_weighted_mean_of_the_values(seed, heads, t):
    h, g = heads
    q, k, v = normal(seed, 2, h, t, 4), normal(seed + 1, 2, g, t, 4), normal(seed + 2, 2, g, t, 5)
    for head in range(h):  # query head i reads key-value head i // (h / g)
        kv = head // (h // g)
        weights = attention_weights(q[:, head : head + 1], k[:, kv : kv + 1])
        torch.testing.assert_close(
            attend(q, k, v)[:, head : head + 1], weights @ v[:, kv : kv + 1], atol=1e-5, rtol=1e-5
        )


def test_the_mask_is_aligned_to_the_right():
    assert causal_mask(2, 4).tolist() == [[True, True, True, False], [True, True, True, True]]


def test_the_cache_keeps_rows_and_counts_positions():
    cache = KVCache(3, 2, 5, 4)
    k, v = normal(0, 3, 2, 2, 4), normal(1, 3, 2, 2, 4)
    assert all(torch.equal(a, b) for a, b in zip(cache.append(k, v), (k, v), strict=True))
    cache.keep(torch.tensor([2, 0]))
    keys, _ = cache.append(k[:2], v[:2])
    assert cache.length == 4
    assert torch.equal(keys, torch.cat((k[[2, 0]], k[:2]), dim=2))


def test_bad_input_is_refused_by_name():
    with pytest.raises(ValueError, match="n_heads=6 does not divide dim=128; try 4 or 8"):
        Attention(128, 6)
    with pytest.raises(ValueError, match="try 3 or 6"):  # 4 divides 12, but into heads of odd width
        Attention(12, 5)
    with pytest.raises(ValueError, match="n_kv_heads=3 does not divide n_heads=4; use a divisor of 4"):
        Attention(32, 4, 3)
    with pytest.raises(ValueError, match="head_dim=5 is odd"):
        rope_table(5, 8)
    with pytest.raises(ValueError, match="3 key-value heads do not divide 4 query heads"):
        attend(torch.zeros(1, 4, 2, 2), torch.zeros(1, 3, 2, 2), torch.zeros(1, 3, 2, 2))
    with pytest.raises(ValueError, match="3 queries but only 2 keys"):
        attend(torch.zeros(1, 1, 3, 2), torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2))
    with pytest.raises(ValueError, match="position 3 is past the cache's 2"):
        KVCache(1, 1, 2, 4).append(torch.zeros(1, 1, 3, 4), torch.zeros(1, 1, 3, 4))


def test_a_copied_layer_is_as_frozen_as_its_original_and_its_own():
    frozen = layer((4, 2), seed=0).requires_grad_(False)
    copied = copy.deepcopy(frozen)
    assert not any(p.requires_grad for p in copied.parameters())
    assert copied.wqkv.weight.parts == frozen.wqkv.weight.parts == (24, 12, 12)
    copied.wqkv.weight.zero_()
    assert frozen.wqkv.weight.any()
