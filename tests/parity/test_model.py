"""The same weights give the same logits and the same greedy text as transformers' Llama."""

import pytest
import torch
from einops import rearrange
from transformers import LlamaConfig, LlamaForCausalLM

from mini.model import Config, Transformer
from mini.sample import sample


def to_llama(model: Transformer) -> LlamaForCausalLM:
    c = model.config
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=c.vocab_size,
            hidden_size=c.dim,
            intermediate_size=c.inter_dim,
            num_hidden_layers=c.n_layers,
            num_attention_heads=c.n_heads,
            num_key_value_heads=c.n_kv_heads or c.n_heads,
            max_position_embeddings=c.max_seq_len,
            rms_norm_eps=c.norm_eps,
            tie_word_embeddings=c.tie_embeddings,
            rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
            bos_token_id=None,
            eos_token_id=None,
        )
    ).eval()
    weights = {"model.embed_tokens.weight": model.embed.weight, "model.norm.weight": model.norm.weight}
    weights["lm_head.weight"] = model.embed.weight if model.head is None else model.head.weight
    for i, layer in enumerate(model.layers):
        to, attn = f"model.layers.{i}.", layer.attn
        sizes = [n * attn.head_dim for n in (attn.n_heads, attn.n_kv_heads, attn.n_kv_heads)]
        for name, w in zip("qkv", attn.wqkv.weight.split(sizes), strict=True):
            weights[f"{to}self_attn.{name}_proj.weight"] = w
        gate, up = rearrange(layer.ffn.w13.weight, "(two f) d -> two f d", two=2)
        weights[f"{to}mlp.gate_proj.weight"], weights[f"{to}mlp.up_proj.weight"] = gate, up
        weights[f"{to}mlp.down_proj.weight"] = layer.ffn.w2.weight
        weights[f"{to}self_attn.o_proj.weight"] = attn.wo.weight
        weights[f"{to}input_layernorm.weight"] = layer.attn_norm.weight
        weights[f"{to}post_attention_layernorm.weight"] = layer.ffn_norm.weight
    llama.load_state_dict(weights, strict=True)
    return llama


@pytest.fixture(
    params=[dict(), dict(n_kv_heads=2), dict(n_kv_heads=1, tie_embeddings=False, rope_theta=500.0)]
)
def pair(request):
    torch.manual_seed(0)
    model = Transformer(
        Config(vocab_size=60, dim=48, n_layers=3, n_heads=4, inter_dim=80, max_seq_len=40, **request.param)
    ).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, mean=1.0 if p.dim() == 1 else 0.0, std=0.1)
    return model, to_llama(model)


def test_logits(pair):
    model, llama = pair
    tokens = torch.randint(60, (3, 40))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), llama(tokens).logits, atol=1e-5, rtol=1e-5)


def test_gradients(pair):
    model, llama = pair
    tokens = torch.randint(60, (3, 20))
    model(tokens).square().mean().backward()
    llama(tokens).logits.square().mean().backward()
    torch.testing.assert_close(
        model.embed.weight.grad, llama.model.embed_tokens.weight.grad, atol=1e-5, rtol=1e-4
    )
    theirs = llama.model.layers[0].self_attn.q_proj.weight.grad
    torch.testing.assert_close(model.layers[0].attn.wqkv.weight.grad[:48], theirs, atol=1e-5, rtol=1e-4)


def test_greedy_text(pair):
    model, llama = pair
    prompts = torch.randint(60, (4, 5))
    ours = sample(model, prompts, 30, temperature=0).tokens
    theirs = llama.generate(prompts, max_new_tokens=30, do_sample=False, pad_token_id=0)[:, 5:]
    assert torch.equal(ours, theirs)
