"""Attention equals PyTorch's own; RoPE equals transformers' Llama (half-split) and DeepSeek-V3 (interleaved)."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import apply_rotary_pos_emb_interleave
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)

from mini.attention import Attention, attend, attention_weights, rope, rope_table


def qkv(h: int, g: int, t: int, s: int, d: int = 16, e: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(2, h, t, d), torch.randn(2, g, s, d), torch.randn(2, g, s, e)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("h", "g"), [(4, 4), (4, 2), (6, 2), (4, 1)])
@pytest.mark.parametrize(("t", "s"), [(9, 9), (1, 9), (4, 9), (1, 1)])
@pytest.mark.parametrize("causal", [True, False])
def test_attend_equals_pytorch(h, g, t, s, causal):
    q, k, v = qkv(h, g, t, s, e=12)
    # An independent mask: the last query sees all s keys, the one before it s - 1, and so on.
    mask = torch.arange(s)[None, :] <= torch.arange(s - t, s)[:, None] if causal else None
    theirs = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    close(attend(q, k, v, causal=causal), theirs)
    if h == g:
        close(attention_weights(q, k, causal=causal) @ v, theirs)


def test_attend_takes_a_mask_of_ones_own():
    q, k, v = qkv(4, 2, 5, 7)
    mask = torch.rand(2, 1, 5, 7) < 0.5
    mask[..., 0] = True  # no query without a key
    close(
        attend(q, k, v, mask=mask), F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    )


def test_gradients_equal_pytorch():
    inputs = [x.requires_grad_() for x in qkv(4, 2, 6, 6)]
    ours = torch.autograd.grad(attend(*inputs).square().sum(), inputs)
    theirs = F.scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=True)
    for a, b in zip(ours, torch.autograd.grad(theirs.square().sum(), inputs), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def llama(**changes) -> LlamaConfig:
    shape = dict(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)
    return LlamaConfig(**shape | changes, attn_implementation="eager")


@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
def test_half_split_rope_equals_llamas(theta):
    q, k, _ = qkv(4, 4, 32, 32)
    config = llama(rope_parameters={"rope_type": "default", "rope_theta": theta})
    cos, sin = LlamaRotaryEmbedding(config)(q, torch.arange(32)[None])
    table = rope_table(16, 32, theta)
    close(torch.cat([table[0]] * 2, dim=-1), cos[0])
    for ours, theirs in zip((q, k), apply_rotary_pos_emb(q, k, cos, sin), strict=True):
        close(rope(ours, *table), theirs)


def test_interleaved_rope_equals_deepseeks():
    """transformers writes its result half-split, so the vectors differ by a permutation; the scores must agree."""
    q, k, _ = qkv(4, 4, 32, 32)
    cos, sin = LlamaRotaryEmbedding(llama())(q, torch.arange(32)[None])
    theirs = apply_rotary_pos_emb_interleave(q, k, cos, sin)
    table = rope_table(16, 32)
    ours = rope(q, *table, interleaved=True), rope(k, *table, interleaved=True)
    close(attention_weights(*ours), attention_weights(*theirs))
    halves = torch.cat((ours[0][..., 0::2], ours[0][..., 1::2]), dim=-1)
    close(halves, theirs[0])
    wrong = rope(q, *table), rope(k, *table)
    assert (attention_weights(*wrong) - attention_weights(*theirs)).abs().max() > 0.1, (
        "the layouts must differ"
    )


@pytest.mark.parametrize("g", [1, 2, 4])
def test_the_whole_layer_equals_llamas(g):
    torch.manual_seed(0)
    config = llama(num_key_value_heads=g)
    theirs = LlamaAttention(config, layer_idx=0).eval()
    ours = Attention(64, 4, n_kv_heads=g)
    parts = ours.wqkv.weight.split([64, 16 * g, 16 * g])
    with torch.no_grad():
        for theirs_w, ours_w in zip((theirs.q_proj, theirs.k_proj, theirs.v_proj), parts, strict=True):
            theirs_w.weight.copy_(ours_w)
        theirs.o_proj.weight.copy_(ours.wo.weight)
        x = torch.randn(2, 10, 64)
        position = LlamaRotaryEmbedding(config)(x, torch.arange(10)[None])
        mask = torch.full((10, 10), float("-inf")).triu(1)[None, None]
        close(ours(x, *rope_table(16, 10)), theirs(x, position_embeddings=position, attention_mask=mask)[0])
