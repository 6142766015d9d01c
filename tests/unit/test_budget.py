"""mini.budget: exact cases by hand, properties over random configurations, agreement with our model."""

from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from mini import budget
from mini.budget import LLAMA_405B, V3
from mini.model import Config, Transformer

SMALL = st.integers(1, 9)


@st.composite
def dense_configs(draw):
    n_heads = draw(st.sampled_from([1, 2, 3, 4, 6]))
    return Config(
        vocab_size=draw(st.integers(2, 40)),
        dim=n_heads * 2 * draw(SMALL),
        n_layers=draw(st.integers(1, 4)),
        n_heads=n_heads,
        inter_dim=draw(st.integers(1, 30)),
        max_seq_len=16,
        n_kv_heads=draw(st.sampled_from([0] + [n for n in (1, 2, 3) if n_heads % n == 0])),
        tie_embeddings=draw(st.booleans()),
    )


@st.composite
def moe_configs(draw):
    n_routed = draw(st.integers(1, 16))
    config = replace(
        draw(dense_configs()),
        kv_lora_rank=draw(SMALL),
        q_lora_rank=draw(st.integers(0, 9)),
        qk_nope_head_dim=draw(SMALL),
        qk_rope_head_dim=2 * draw(SMALL),
        v_head_dim=draw(SMALL),
        n_routed_experts=n_routed,
        n_activated_experts=draw(st.integers(1, n_routed)),
        n_shared_experts=draw(st.integers(0, 2)),
        moe_inter_dim=draw(SMALL),
    )
    return replace(config, n_dense_layers=draw(st.integers(0, config.n_layers)))


def total(config, active=False):
    return sum(budget.parameters(config, active).values())


# By hand


def test_v3_has_671026404352_parameters():
    assert total(V3) == 671_026_404_352


def test_the_three_published_ways_to_count_v3s_active_parameters():
    counts = budget.parameters(V3, active=True)
    assert sum(counts.values()) == 37_552_282_624
    assert sum(counts.values()) - counts["embedding"] == 36_625_603_584
    assert sum(counts.values()) - counts["embedding"] - counts["head"] == 35_698_924_544


def test_a_dense_model_by_hand():
    c = Config(vocab_size=10, dim=4, n_layers=2, n_heads=2, inter_dim=3, n_kv_heads=1, tie_embeddings=False)
    assert budget.parameters(c) == {
        "embedding": 40,
        "attention": 2 * (16 + 8 + 8 + 16),  # queries, keys, values, output
        "dense": 2 * 36,
        "routed": 0,
        "shared": 0,
        "router": 0,
        "norms": 2 * 8 + 4,
        "head": 40,
    }
    # weights of matrices: 96 + 72 + 40; scores and mixtures over 3 tokens: 2 keys in the mean, 4 numbers each
    assert budget.forward_flops(c) == 2 * 208
    assert budget.attention_flops(c, seq_len=3) == 2 * 2 * 2 * (2 + 2) * 2
    assert budget.training_flops(c, seq_len=3) == 3 * (2 * 208 + 64)


def test_a_latent_attention_layer_of_v3_by_hand():
    down_queries, up_queries = 7168 * 1536, 1536 * 128 * 192
    down_keys, up_keys, out = 7168 * 576, 512 * 128 * 256, 128 * 128 * 7168
    assert budget.parameters(V3)["attention"] == 61 * (down_queries + up_queries + down_keys + up_keys + out)


def test_llama_405b_is_405b():
    assert total(LLAMA_405B) == 405_853_388_800


def test_flops_per_token_of_training_are_those_that_deepseek_published():
    """arXiv:2505.09343 Table 2 (4,096 tokens): 250 and 2,448 GFLOP a token."""
    assert budget.training_flops(V3, 4096) == pytest.approx(250e9, rel=0.005)
    assert budget.training_flops(LLAMA_405B, 4096) == pytest.approx(2448e9, rel=0.02)


def test_utilisation_is_the_one_that_deepseek_published():
    """arXiv:2505.09343 Table 4: 272.80e9 tokens a day on 2,048 GPUs; 38.94% of peak causal, else 43.73%."""
    for causal, published in ((True, 0.3894), (False, 0.4373)):
        flops = budget.training_flops(V3, 4096, causal) * 272.80e9
        assert budget.utilisation(flops, gpu_hours=2048 * 24) == pytest.approx(published, rel=0.005)


def test_cache_sizes_are_those_that_deepseek_published():
    """arXiv:2505.09343 Table 1, in BF16."""
    assert budget.kv_cache_bytes(V3) == 70_272
    assert budget.kv_cache_bytes(LLAMA_405B) == 516_096


def test_a_cache_grows_with_its_tokens_and_the_bytes_of_a_number():
    assert budget.kv_cache_bytes(V3, tokens=1000, bytes_per_number=1) == 70_272 * 1000 // 2


def test_a_bill_takes_the_power_and_the_peak_of_its_gpu():
    gpu = budget.GPU("another", bf16=1e15, fp8=2e15, watts=500, nvlink=1)
    bill = budget.cost(V3, 1e12, 0.5, gpu=gpu, dollars_per_gpu_hour=3)
    assert bill.gpu_hours == pytest.approx(budget.training_flops(V3) * 1e12 / 5e14 / 3600)
    assert bill.kwh == pytest.approx(bill.gpu_hours / 2)
    assert bill.dollars == pytest.approx(bill.gpu_hours * 3)


def test_the_bill_of_v3():
    """arXiv:2412.19437 Table 1: 2,664 K GPU hours for 14.8e12 tokens, $5.328 M at $2."""
    share = budget.utilisation(budget.training_flops(V3, 4096) * 14.8e12, 2.664e6)
    bill = budget.cost(V3, 14.8e12, share, seq_len=4096, watts=1000, pue=1.5)
    assert bill.gpu_hours == pytest.approx(2.664e6)
    assert bill.dollars == pytest.approx(5.328e6)
    assert bill.kwh == pytest.approx(2.664e6 * 1.5)


def test_all_to_all_bytes_by_hand():
    assert budget.all_to_all_bytes(V3, copies=4) == 4 * 7168 * 3


def test_weight_bytes_by_hand():
    assert budget.weight_bytes(V3, bytes_per_parameter=1) == 671_026_404_352
    assert budget.weight_bytes(V3) == 2 * 671_026_404_352  # BF16


# Properties


@settings(max_examples=30, deadline=None)
@given(dense_configs())
def test_counts_what_our_transformer_holds(config):
    with torch.device("meta"):
        model = Transformer(config)
    assert total(config) == sum(p.numel() for p in model.parameters())
    assert total(config) == total(config, active=True)


@settings(max_examples=15, deadline=None)
@given(dense_configs(), st.integers(1, 12))
def test_counts_the_flops_that_torch_counts_in_our_transformer(config, seq_len):
    """torch charges every key, mask or not; so `causal=False`. It counts no look-ups, norms or softmax."""
    with torch.device("meta"):
        model = Transformer(config)
        tokens = torch.zeros(3, seq_len, dtype=torch.long)
        with (
            FlopCounterMode(display=False) as counter,
            torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
        ):
            model(tokens)
    assert counter.get_total_flops() == 3 * seq_len * budget.forward_flops(config, seq_len, causal=False)


@given(moe_configs())
def test_active_is_part_of_the_whole(config):
    every, active = budget.parameters(config), budget.parameters(config, active=True)
    assert all(0 <= active[part] <= every[part] for part in every)
    assert {part for part in every if active[part] != every[part]} <= {"routed"}
    all_on = replace(config, n_activated_experts=config.n_routed_experts)
    assert budget.parameters(all_on, active=True) == budget.parameters(all_on)


@given(moe_configs())
def test_all_layers_dense_is_a_dense_model(config):
    first = replace(config, n_dense_layers=config.n_layers)
    no_experts = replace(config, n_dense_layers=0, n_routed_experts=0, n_activated_experts=0)
    assert budget.parameters(first) == budget.parameters(no_experts)


@given(moe_configs(), st.integers(1, 10_000))
def test_flops_grow_with_length_and_the_mask_halves_attention(config, seq_len):
    assert budget.forward_flops(config) < budget.forward_flops(config, seq_len)
    assert budget.attention_flops(config, seq_len + 1) > budget.attention_flops(config, seq_len)
    ratio = budget.attention_flops(config, seq_len) / budget.attention_flops(config, seq_len, causal=False)
    assert ratio == pytest.approx((seq_len + 1) / (2 * seq_len))


@given(moe_configs())
def test_dense_twin_is_as_large_to_half_a_unit_of_width(config):
    assume(budget.n_moe_layers(config))
    try:
        twin = budget.dense_twin(config)
    except ValueError:  # experts smaller than the dense layers that they replace, and no width left
        assume(False)
    assert budget.n_moe_layers(twin) == 0
    assert abs(total(twin) - total(config)) <= 1.5 * config.dim * config.n_layers


@given(st.floats(1e3, 1e30), st.floats(1e-6, 1), st.floats(1e6, 1e18))
def test_gpu_hours_and_utilisation_undo_each_other(flops, share, peak):
    assert budget.utilisation(flops, budget.gpu_hours(flops, share, peak), peak) == pytest.approx(share)


@given(st.floats(1, 1e15), st.floats(0.01, 1), st.floats(1.1, 50))
def test_the_bill_is_linear_in_tokens_and_inverse_in_utilisation(tokens, share, factor):
    one, more = budget.cost(V3, tokens, share), budget.cost(V3, tokens * factor, share)
    slower = budget.cost(V3, tokens, share / factor)
    for name in ("gpu_hours", "dollars", "kwh"):
        assert getattr(more, name) == pytest.approx(getattr(one, name) * factor)
        assert getattr(slower, name) == pytest.approx(getattr(one, name) * factor)


# Bad input


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: budget.gpu_hours(1e20, 35), "utilisation=35 is not a share.*0.35"),
        (lambda: budget.gpu_hours(1e20, 0.0), "utilisation=0.0 is not a share"),
        (lambda: budget.gpu_hours(-1.0, 0.5), "flops=-1.0 must be above 0"),
        (lambda: budget.utilisation(1e20, 0), "gpu_hours=0 must be above 0"),
        (lambda: budget.energy_kwh(10, pue=0.9), "pue=0.9 is below 1.*try 1.1"),
        (lambda: budget.energy_kwh(10, pue=float("nan")), "pue=nan"),
        (lambda: budget.cost(V3, float("nan"), 0.4), "tokens=nan must be above 0"),
        (lambda: budget.attention_flops(V3, 0), "seq_len=0 must be above 0"),
        (lambda: budget.kv_cache_bytes(V3, tokens=-1), "tokens=-1 must be above 0"),
        (lambda: budget.weight_bytes(V3, 0), "bytes_per_parameter=0 must be above 0"),
        (lambda: budget.all_to_all_bytes(V3, copies=0), "copies=0 must be above 0"),
    ],
)
def test_bad_input_names_the_value(call, message):
    with pytest.raises(ValueError, match=message):
        call()
