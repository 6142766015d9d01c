"""Our Transformer as transformers' Llama: same shape, same weights."""

from einops import rearrange
from transformers import LlamaConfig, LlamaForCausalLM

from mini.model import Transformer


def to_llama(model: Transformer) -> LlamaForCausalLM:
    """transformers' model with the same shape and the same weights."""
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
