"""mini.budget counts the parameters that transformers' DeepseekV3ForCausalLM and LlamaForCausalLM hold."""

from dataclasses import replace

import pytest
import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from bench.llama import to_llama
from mini import budget, hf
from mini.budget import LLAMA_405B, V3
from mini.model import Transformer

TINY = replace(
    V3,
    vocab_size=97,
    dim=48,
    n_layers=4,
    n_heads=6,
    inter_dim=80,
    q_lora_rank=20,
    kv_lora_rank=16,
    qk_nope_head_dim=10,
    qk_rope_head_dim=4,
    v_head_dim=12,
    n_dense_layers=1,
    n_routed_experts=8,
    n_activated_experts=3,
    moe_inter_dim=16,
    n_expert_groups=1,
    n_limited_groups=1,
)
CONFIGS = {
    "V3": V3,
    "tiny": TINY,
    "no query compression": replace(TINY, q_lora_rank=0),
    "two shared experts": replace(TINY, n_shared_experts=2),
    "experts from the first layer": replace(TINY, n_dense_layers=0),
    "dense layers only": replace(TINY, n_dense_layers=4),
    "tied": replace(TINY, tie_embeddings=True),
}


def deepseek(c):
    with torch.device("meta"):
        return DeepseekV3ForCausalLM(DeepseekV3Config(**hf.write_config(c)))


def part_of(name):
    if "norm" in name:
        return "norms"
    for key, part in (
        ("embed_tokens", "embedding"),
        ("lm_head", "head"),
        ("self_attn", "attention"),
        ("shared_experts", "shared"),
        (".experts", "routed"),
        ("mlp.gate.", "router"),
        ("mlp", "dense"),
    ):
        if key in name:
            return part
    raise KeyError(name)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_part_holds_as_many_parameters_as_in_transformers(name):
    config = CONFIGS[name]
    theirs = dict.fromkeys(budget.parameters(config), 0)
    for key, p in deepseek(config).named_parameters():
        theirs[part_of(key)] += p.numel()
    assert budget.parameters(config) == theirs


def test_transformers_default_is_v3():
    ours, default = deepseek(V3).config.to_dict(), DeepseekV3Config().to_dict()
    ours |= {"architectures": None, "dtype": default["dtype"]}
    assert {k: (v, ours[k]) for k, v in default.items() if v != ours[k]} == {}


def test_a_llama_with_grouped_queries():
    c = replace(LLAMA_405B, vocab_size=101, dim=32, n_layers=3, n_heads=8, n_kv_heads=2, inter_dim=56)
    for tied in (False, True):
        shape = replace(c, tie_embeddings=tied)
        model = to_llama(Transformer(shape))
        ours = sum(budget.parameters(shape).values())
        assert ours == sum(p.numel() for p in model.parameters())
