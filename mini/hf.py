"""DeepSeek-V3's published file layout: `load` reads a folder of it into a Transformer, `save` writes one.

A folder holds config.json and safetensors, in one file or in shards with an index, as transformers'
`DeepseekV3ForCausalLM.save_pretrained` leaves it and as DeepSeek publishes it. Weights are float32 in `mini`.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mini.latent_attention import LatentAttention
from mini.model import Config, Transformer
from mini.moe import MoE
from mini.train import write

# our name of a setting: theirs
SETTINGS = {
    "vocab_size": "vocab_size",
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "inter_dim": "intermediate_size",
    "max_seq_len": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
    "q_lora_rank": "q_lora_rank",
    "kv_lora_rank": "kv_lora_rank",
    "qk_nope_head_dim": "qk_nope_head_dim",
    "qk_rope_head_dim": "qk_rope_head_dim",
    "v_head_dim": "v_head_dim",
    "n_dense_layers": "first_k_dense_replace",
    "n_routed_experts": "n_routed_experts",
    "n_shared_experts": "n_shared_experts",
    "n_activated_experts": "num_experts_per_tok",
    "moe_inter_dim": "moe_intermediate_size",
    "n_expert_groups": "n_group",
    "n_limited_groups": "topk_group",
    "route_scale": "routed_scaling_factor",
    "norm_topk_prob": "norm_topk_prob",
}
# what we build of settings that we have no name for; a file that says otherwise is refused
FIXED = {
    "model_type": "deepseek_v3",
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "rope_interleave": True,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "moe_layer_freq": 1,
    "quantization_config": None,
}
YARN = {"rope_factor": "factor", "original_seq_len": "original_max_position_embeddings"}
YARN |= {"beta_fast": "beta_fast", "beta_slow": "beta_slow"}
FIXED_YARN = {"mscale": 1.0, "mscale_all_dim": 1.0, "attention_factor": None, "truncate": True}


def load(folder: str | Path) -> Transformer:
    """The model in a folder, on the CPU, in evaluation mode. Weights of multi-token prediction are passed over.

    Raises FileNotFoundError for a file that is missing, ValueError that names a setting that `mini` does not build,
    or a tensor that is missing, unknown or of another shape.
    """
    folder = Path(folder)
    model = Transformer(read_config(folder / "config.json"))
    weights = dict(published(model))
    for file in weight_files(folder):
        try:
            with safe_open(file, framework="pt") as f:
                for name in f.keys():  # noqa: SIM118 (not a dict)
                    if not is_mtp(name, model.config.n_layers):
                        put(weights, name, f.get_tensor(name), file)
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged ({error}); get it again") from error
    if weights:
        raise ValueError(f"{folder} lacks {len(weights)} tensors, the first is {next(iter(weights))}")
    return model.eval()


def save(model: Transformer, folder: str | Path) -> None:
    """Write a model with latent attention as a folder that `load` and transformers read.

    Raises ValueError for a model that the layout cannot express, OSError if the disk is full.
    """
    folder = Path(folder)
    settings = json.dumps(write_config(model.config), indent=2)
    weights = {name: t.detach().cpu().contiguous() for name, t in published(model)}
    write(folder / "model.safetensors", safetensors.torch.save(weights, {"format": "pt"}))
    write(folder / "config.json", settings.encode())


def put(weights: dict[str, Tensor], name: str, tensor: Tensor, file: Path) -> None:
    """Copy one tensor to its place, and take the place off the list of those still empty."""
    if name not in weights:
        raise ValueError(f"{file} holds {name}, for which this model has no place")
    place = weights.pop(name)
    if place.shape != tensor.shape:
        raise ValueError(
            f"{name} in {file} is {tuple(tensor.shape)}, config.json makes it {tuple(place.shape)}"
        )
    with torch.no_grad():
        place.copy_(tensor)


def is_mtp(name: str, n_layers: int) -> bool:
    """Published files number the multi-token prediction module as one more layer."""
    parts = name.split(".")
    return parts[:2] == ["model", "layers"] and int(parts[2]) >= n_layers


def published(model: Transformer) -> Iterator[tuple[str, Tensor]]:
    """Every weight under its published name, as a view into ours: reading saves it, copying into it loads it."""
    yield "model.embed_tokens.weight", model.embed.weight
    yield "model.norm.weight", model.norm.weight
    if model.head is not None:
        yield "lm_head.weight", model.head.weight
    for i, layer in enumerate(model.layers):
        to = f"model.layers.{i}."
        yield to + "input_layernorm.weight", layer.attn_norm.weight
        yield to + "post_attention_layernorm.weight", layer.ffn_norm.weight
        yield from attention(layer.attn, to + "self_attn.")
        if isinstance(layer.ffn, MoE):
            yield to + "mlp.gate.weight", layer.ffn.gate.weight
            yield to + "mlp.gate.e_score_correction_bias", layer.ffn.gate.bias
            yield from swiglu(
                layer.ffn.shared.w13.weight, layer.ffn.shared.w2.weight, to + "mlp.shared_experts."
            )
            for e, (w13, w2) in enumerate(zip(layer.ffn.experts.w13, layer.ffn.experts.w2, strict=True)):
                yield from swiglu(w13, w2, f"{to}mlp.experts.{e}.")
        else:
            yield from swiglu(layer.ffn.w13.weight, layer.ffn.w2.weight, to + "mlp.")


def attention(attn: LatentAttention, to: str) -> Iterator[tuple[str, Tensor]]:
    q_a, kv_a = attn.wqkv_a.weight.split(attn.wqkv_a.weight.parts)
    yield to + ("q_proj.weight" if attn.wq_b is None else "q_a_proj.weight"), q_a
    if attn.wq_b is not None:
        yield to + "q_a_layernorm.weight", attn.q_norm.weight
        yield to + "q_b_proj.weight", attn.wq_b.weight
    yield to + "kv_a_proj_with_mqa.weight", kv_a
    yield to + "kv_a_layernorm.weight", attn.kv_norm.weight
    yield to + "kv_b_proj.weight", attn.wkv_b.weight
    yield to + "o_proj.weight", attn.wo.weight


def swiglu(w13: Tensor, w2: Tensor, to: str) -> Iterator[tuple[str, Tensor]]:
    gate, up = w13.chunk(2)
    yield to + "gate_proj.weight", gate
    yield to + "up_proj.weight", up
    yield to + "down_proj.weight", w2


def weight_files(folder: Path) -> list[Path]:
    """model.safetensors, or the shards that its index names."""
    index = folder / "model.safetensors.index.json"
    names = {"model.safetensors"}
    if index.exists():
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    for name in sorted(names):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} has no {name}; check the folder, or get the file again")
    return [folder / name for name in sorted(names)]


def read_config(path: Path) -> Config:
    """config.json as our Config; ValueError names the first setting that `mini` does not build."""
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}; name a folder that holds config.json and safetensors")
    theirs = json.loads(path.read_text(encoding="utf-8"))
    # the second: before transformers 5
    rope = theirs.get("rope_parameters") or theirs.get("rope_scaling") or {}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    refuse(theirs, FIXED)
    for key in SETTINGS.values():
        if key not in theirs and key != "tie_word_embeddings":
            raise ValueError(f"{path} lacks {key}")
    refuse(theirs, {"num_key_value_heads": theirs["num_attention_heads"]})
    refuse({"rope_type": kind}, {"rope_type": "yarn" if kind == "yarn" else "default"})
    ours = {name: theirs[key] for name, key in SETTINGS.items() if theirs.get(key) is not None}
    ours.setdefault("tie_embeddings", False)  # as transformers has it
    ours["rope_theta"] = rope.get("rope_theta") or theirs.get("rope_theta") or 10_000.0
    if kind == "yarn":
        refuse({**dict.fromkeys(("mscale", "mscale_all_dim")), **rope}, FIXED_YARN, "rope_parameters.")
        ours |= {name: rope[key] for name, key in YARN.items() if key in rope}
    if ours["n_dense_layers"] >= ours["n_layers"]:  # no layer has experts
        ours |= {
            name: getattr(Config, name) for name in SETTINGS if "experts" in name or name == "moe_inter_dim"
        }
        ours["n_dense_layers"] = 0
    elif not ours.get("n_shared_experts"):
        raise ValueError("n_shared_experts=0 is not supported by this layout; it always has a shared expert")
    return Config(**ours)


def refuse(theirs: dict[str, Any], fixed: dict[str, Any], where: str = "") -> None:
    for name, only in fixed.items():
        if (value := theirs.get(name, only)) != only:
            raise ValueError(f"{where}{name}={value!r} is not supported; mini builds {name}={only!r}")


def write_config(c: Config) -> dict[str, Any]:
    """Our Config as the settings of config.json; ValueError for what the layout cannot express."""
    if not c.kv_lora_rank:
        raise ValueError("kv_lora_rank=0: DeepSeek-V3's layout has latent attention only")
    if c.n_routed_experts and not c.n_shared_experts:
        raise ValueError("n_shared_experts=0: DeepSeek-V3's layout always has a shared expert; use 1 or more")
    theirs = {key: getattr(c, name) for name, key in SETTINGS.items()}
    theirs["q_lora_rank"] = c.q_lora_rank or None
    if not c.n_routed_experts:
        theirs["first_k_dense_replace"] = c.n_layers
    rope = {"rope_type": "default", "rope_theta": c.rope_theta}
    if c.rope_factor > 1:
        rope |= {"rope_type": "yarn", "mscale": 1.0, "mscale_all_dim": 1.0}
        rope |= {key: getattr(c, name) for name, key in YARN.items()}
    theirs |= {name: only for name, only in FIXED.items() if only is not None}
    theirs |= {"num_key_value_heads": c.n_heads, "rope_parameters": rope}
    return theirs | {"architectures": ["DeepseekV3ForCausalLM"], "dtype": "float32"}
