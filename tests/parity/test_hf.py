"""DeepSeek-V3 in miniature is DeepSeek-V3: the same weights give what transformers' own code gives, both ways round.

What starts at zero or one (router bias, norms) is drawn at random throughout: otherwise half the mistakes that one can
make here would not show.
"""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3Attention,
    DeepseekV3MoE,
    DeepseekV3RotaryEmbedding,
)

from mini import hf
from mini.attention import rope
from mini.latent_attention import LatentAttention, yarn_frequencies, yarn_mscale
from mini.model import Config, Transformer, cross_entropy
from mini.moe import watch
from mini.sample import sample

YARN = dict(rope_type="yarn", factor=4.0, mscale=1.0, mscale_all_dim=1.0, beta_fast=32, beta_slow=1)
YARN |= dict(original_max_position_embeddings=16, rope_theta=10_000.0)
SIZES = dict(
    vocab_size=90,
    hidden_size=32,
    intermediate_size=44,
    moe_intermediate_size=24,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=4,
    n_shared_experts=1,
    n_routed_experts=8,
    num_experts_per_tok=3,
    first_k_dense_replace=1,
    n_group=1,
    topk_group=1,
    kv_lora_rank=16,
    q_lora_rank=24,
    qk_nope_head_dim=12,
    qk_rope_head_dim=8,
    v_head_dim=10,
    max_position_embeddings=64,
    initializer_range=0.1,
    attn_implementation="eager",
    pad_token_id=None,
    bos_token_id=None,
    eos_token_id=None,
)
VARIANTS = {
    "V3 in miniature": {},
    "no q-LoRA": dict(q_lora_rank=None),
    "no dense layer": dict(first_k_dense_replace=0),
    "two dense layers": dict(first_k_dense_replace=2),
    "dense only": dict(first_k_dense_replace=3),
    "groups": dict(n_group=4, topk_group=2),
    "groups, no scale": dict(n_group=2, topk_group=1, routed_scaling_factor=1.0),
    "gates not normalised": dict(norm_topk_prob=False),
    "one expert a token": dict(num_experts_per_tok=1, norm_topk_prob=False),
    "two shared experts": dict(n_shared_experts=2),
    "YaRN": dict(rope_parameters=YARN),
    "YaRN, other ramp": dict(
        rope_parameters=YARN
        | dict(
            factor=40.0, original_max_position_embeddings=64, beta_fast=2, beta_slow=0.25, rope_theta=500.0
        )
    ),
    "other base and epsilon": dict(
        rms_norm_eps=0.1, rope_parameters=dict(rope_type="default", rope_theta=500.0)
    ),
    "tied embeddings": dict(tie_word_embeddings=True),
    "wide latent": dict(kv_lora_rank=40, qk_nope_head_dim=7, v_head_dim=9),
}
every_variant = pytest.mark.parametrize("variant", VARIANTS)


def theirs(variant: str = "V3 in miniature", seed: int = 0) -> DeepseekV3ForCausalLM:
    torch.manual_seed(seed)
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**SIZES | VARIANTS[variant])).eval()
    with torch.no_grad():
        for name, t in [*model.named_parameters(), *model.named_buffers()]:
            if "norm" in name:
                t.uniform_(0.5, 1.5)
            if "correction_bias" in name:
                t.normal_(std=0.3)
    return model


@pytest.fixture(scope="module")
def text() -> torch.Tensor:
    return torch.randint(90, (3, 40), generator=torch.Generator().manual_seed(1))


@every_variant
@pytest.mark.parametrize("shards", [1, 2])
def test_their_folder_gives_our_model_the_same_logits(tmp_path, text, variant, shards):
    model = theirs(variant)
    model.save_pretrained(tmp_path, max_shard_size="20KB" if shards > 1 else "1GB")
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shards > 1)
    ours = hf.load(tmp_path)
    assert not ours.training
    with torch.no_grad():
        expected = model(text).logits
        torch.testing.assert_close(ours(text), expected, atol=1e-5, rtol=0)
    assert expected.std() > 0.3, "logits near zero agree too easily"


def test_a_folder_that_does_not_speak_of_tying_has_a_head_of_its_own(tmp_path, text):
    model = theirs("V3 in miniature")
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    settings = json.loads(path.read_text())
    settings.pop("tie_word_embeddings", None)
    path.write_text(json.dumps(settings))
    with torch.no_grad():
        torch.testing.assert_close(hf.load(tmp_path)(text), model(text).logits, atol=1e-5, rtol=0)


@every_variant
def test_the_same_experts_are_chosen(tmp_path, text, variant):
    model = theirs(variant)
    model.save_pretrained(tmp_path)
    chosen = []
    for layer in model.model.layers:
        if isinstance(layer.mlp, DeepseekV3MoE):
            layer.mlp.gate.register_forward_hook(lambda gate, args, out: chosen.append(out))
    with torch.no_grad(), watch(ours := hf.load(tmp_path)) as routings:
        model(text)
        ours(text)
    assert len(routings) == len(chosen) == max(0, 3 - model.config.first_k_dense_replace)
    for routing, (_, weights, indices) in zip(routings, chosen, strict=True):
        order, order_theirs = routing.indices.argsort(-1), indices.argsort(-1)
        assert torch.equal(routing.indices.gather(1, order), indices.gather(1, order_theirs))
        torch.testing.assert_close(routing.weights.gather(1, order), weights.gather(1, order_theirs))


@every_variant
def test_our_folder_is_read_by_transformers(tmp_path, text, variant):
    theirs(variant).save_pretrained(tmp_path / "theirs")
    ours = hf.load(tmp_path / "theirs")
    hf.save(ours, tmp_path / "ours")
    model, info = DeepseekV3ForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(text).logits, ours(text), atol=1e-5, rtol=0)
    again = hf.load(tmp_path / "ours")
    assert again.config == ours.config
    assert all(
        torch.equal(a, b)
        for a, b in zip(again.state_dict().values(), ours.state_dict().values(), strict=True)
    )


@every_variant
@pytest.mark.parametrize("batch", [1, 3])
def test_cached_decoding_writes_the_same_text(tmp_path, text, variant, batch):
    model = theirs(variant)
    model.save_pretrained(tmp_path)
    prompt = text[:batch, :9]
    expected = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=40, do_sample=False, pad_token_id=0
    )
    assert torch.equal(sample(hf.load(tmp_path), prompt, 40, temperature=0).tokens, expected[:, 9:])


@pytest.mark.parametrize("variant", ["V3 in miniature", "no q-LoRA", "groups"])
def test_gradients_are_the_same(tmp_path, text, variant):
    model = theirs(variant)
    model.save_pretrained(tmp_path)
    ours = hf.load(tmp_path)
    cross_entropy(ours, text).backward()
    logits = model(text[:, :-1]).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten()).backward()
    weights = {name: p.grad for name, p in model.named_parameters()}
    for i in range(3):  # transformers stacks the experts' matrices, as we do
        for old, new in (("gate_up_proj", "w13"), ("down_proj", "w2")):
            if f"model.layers.{i}.mlp.experts.{old}" in weights:
                mine = getattr(ours.layers[i].ffn.experts, new).grad
                torch.testing.assert_close(
                    mine, weights[f"model.layers.{i}.mlp.experts.{old}"], atol=1e-6, rtol=1e-4
                )
    attn = ours.layers[2].attn
    kv_a = attn.wqkv_a.weight.grad.split(attn.wqkv_a.weight.parts)[1]
    torch.testing.assert_close(
        kv_a, weights["model.layers.2.self_attn.kv_a_proj_with_mqa.weight"], atol=1e-6, rtol=1e-4
    )
    gate = weights["model.layers.2.mlp.gate.weight"]
    torch.testing.assert_close(ours.layers[2].ffn.gate.weight.grad, gate, atol=1e-6, rtol=1e-4)
    assert gate.abs().max() > 1e-4


def attention_pair(**changes) -> tuple[LatentAttention, DeepseekV3Attention, tuple]:
    """One layer of ours with the weights of theirs, and its inputs: states, cos, sin."""
    torch.manual_seed(0)
    config = DeepseekV3Config(**SIZES | changes)
    attn = DeepseekV3Attention(config, 0)
    for p in attn.parameters():
        torch.nn.init.uniform_(p, 0.5, 1.5) if p.dim() == 1 else torch.nn.init.normal_(p, std=0.2)
    ours = LatentAttention(32, 4, 24, 16, 12, 8, 10)
    for (name, mine), (_, yours) in zip(
        sorted(hf.attention(ours, "")), sorted((n, p) for n, p in attn.named_parameters()), strict=True
    ):
        assert mine.shape == yours.shape, name
        mine.data.copy_(yours)
    angle = torch.outer(torch.arange(11.0), 10_000 ** (-torch.arange(0, 8, 2) / 8))
    return ours, attn, (torch.randn(2, 11, 32), angle.cos(), angle.sin())


@pytest.mark.parametrize("way", ["expanded", "absorbed"])
def test_attention_alone(way):
    ours, attn, (x, cos, sin) = attention_pair()
    both = tuple(torch.cat((part, part), dim=-1)[None] for part in (cos, sin))
    hidden = torch.full((11, 11), -torch.inf).triu(1)[None, None]
    with torch.no_grad():
        expected = attn(x, both, hidden)[0]
        q, ckv = ours.project(x, cos, sin)
        mine = ours.wo(getattr(ours, way)(q, ckv).transpose(1, 2).flatten(2))
    torch.testing.assert_close(mine, expected, atol=1e-5, rtol=0)


def test_a_wrong_rotation_or_scale_would_show(monkeypatch):
    ours, attn, (x, cos, sin) = attention_pair()
    both = tuple(torch.cat((part, part), dim=-1)[None] for part in (cos, sin))
    hidden = torch.full((11, 11), -torch.inf).triu(1)[None, None]
    with torch.no_grad():
        expected = attn(x, both, hidden)[0]
        ours.softmax_scale = 12**-0.5
        assert (ours(x, cos, sin) - expected).abs().max() > 0.01
        ours.softmax_scale = 20**-0.5
        assert (ours(x, cos, sin) - expected).abs().max() < 1e-5
        monkeypatch.setattr("mini.latent_attention.rope", lambda x, cos, sin, interleaved: rope(x, cos, sin))
        assert (ours(x, cos, sin) - expected).abs().max() > 0.01


def test_the_scale_under_yarn_is_that_of_v3():
    _, attn, _ = attention_pair(rope_parameters=YARN | dict(factor=40.0))
    assert attn.scaling == pytest.approx(20**-0.5 * yarn_mscale(40.0) ** 2, rel=1e-12)
    assert yarn_mscale(40.0) ** 2 == pytest.approx(1.87386, abs=1e-5)


@pytest.mark.parametrize("original", [4, 16, 1_000, 1_000_000])
def test_yarn_at_contexts_where_the_ramp_leaves_the_pairs(original):
    """At 4 it has no length; at a million it ends beyond the last pair."""
    rope_parameters = YARN | dict(original_max_position_embeddings=original)
    config = DeepseekV3Config(
        **SIZES | dict(rope_parameters=rope_parameters, max_position_embeddings=4 * original)
    )
    expected = DeepseekV3RotaryEmbedding(config).inv_freq
    torch.testing.assert_close(yarn_frequencies(8, 10_000.0, 4.0, original), expected)


def edit(folder, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(model_type="deepseek_v2"), r"model_type='deepseek_v2' is not supported.*'deepseek_v3'"),
        (dict(attention_bias=True), r"attention_bias=True is not supported"),
        (dict(hidden_act="gelu"), r"hidden_act='gelu' is not supported; mini builds hidden_act='silu'"),
        (dict(rope_interleave=False), r"rope_interleave=False is not supported"),
        (dict(scoring_func="softmax"), r"scoring_func='softmax' is not supported"),
        (dict(topk_method="greedy"), r"topk_method='greedy' is not supported"),
        (
            dict(rope_parameters=YARN | dict(truncate=False)),
            r"rope_parameters.truncate=False is not supported",
        ),
        (dict(quantization_config={"quant_method": "fp8"}), r"quantization_config=.*fp8.*is not supported"),
        (dict(num_key_value_heads=1), r"num_key_value_heads=1 is not supported"),
        (dict(n_shared_experts=0), r"n_shared_experts=0 is not supported"),
        (dict(num_experts_per_tok=1), r"n_activated_experts=1 with norm_topk_prob=True"),
        (dict(rope_parameters=dict(rope_type="linear", factor=2.0)), r"rope_type='linear' is not supported"),
        (dict(rope_parameters=YARN | dict(mscale=0.7)), r"rope_parameters.mscale=0.7 is not supported"),
        (
            dict(rope_parameters={k: v for k, v in YARN.items() if k != "mscale"}),
            r"rope_parameters.mscale=None",
        ),
    ],
)
def test_a_setting_that_mini_does_not_build_is_refused_by_name(tmp_path, changes, message):
    hf.save(hf_model(), tmp_path)
    edit(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        hf.load(tmp_path)


def hf_model(**changes) -> Transformer:
    torch.manual_seed(0)
    latent = dict(q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=4)
    experts = dict(
        n_routed_experts=4, n_activated_experts=2, n_shared_experts=1, moe_inter_dim=8, n_dense_layers=1
    )
    return Transformer(Config(30, 16, 2, 2, 24, **latent | experts | changes))


def test_the_published_form_of_the_rope_settings_is_read(tmp_path):
    hf.save(hf_model(rope_factor=4.0, original_seq_len=64, rope_theta=5000.0), tmp_path)
    expected = hf.load(tmp_path).config
    settings = json.loads((tmp_path / "config.json").read_text())
    rope_scaling = settings.pop("rope_parameters")
    settings |= {"rope_theta": rope_scaling.pop("rope_theta")}
    settings["rope_scaling"] = {"type": rope_scaling.pop("rope_type"), **rope_scaling}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert hf.load(tmp_path).config == expected
    assert expected.rope_factor == 4.0


def test_bfloat16_weights_are_read_as_float32(tmp_path, text):
    theirs().to(torch.bfloat16).save_pretrained(tmp_path)
    model = DeepseekV3ForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    ours = hf.load(tmp_path)
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    with torch.no_grad():
        torch.testing.assert_close(ours(text), model(text).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dict(kv_lora_rank=0, q_lora_rank=0), "kv_lora_rank=0"),
        (dict(n_shared_experts=0), "n_shared_experts=0"),
    ],
)
def test_a_model_that_the_layout_cannot_express_is_not_written(tmp_path, config, message):
    with pytest.raises(ValueError, match=message):
        hf.save(hf_model(**config), tmp_path)
    assert not list(tmp_path.iterdir())


def test_broken_folders_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        hf.load(tmp_path)
    hf.save(hf_model(), tmp_path)
    file = tmp_path / "model.safetensors"
    whole = load_file(file)

    def rewrite(tensors):
        save_file(tensors, file, {"format": "pt"})

    rewrite({k: v for k, v in whole.items() if k != "model.norm.weight"})
    with pytest.raises(ValueError, match=r"lacks 1 tensors, the first is model.norm.weight"):
        hf.load(tmp_path)
    rewrite(whole | {"model.norm.weight": torch.ones(3)})
    with pytest.raises(ValueError, match=r"model.norm.weight in .* is \(3,\), config.json makes it \(16,\)"):
        hf.load(tmp_path)
    rewrite(whole | {"model.extra": torch.ones(3)})
    with pytest.raises(ValueError, match=r"holds model.extra, for which this model has no place"):
        hf.load(tmp_path)
    rewrite(whole | {"model.layers.2.eh_proj.weight": torch.ones(3)})  # multi-token prediction, as published
    hf.load(tmp_path)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match="is damaged"):
        hf.load(tmp_path)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"has no model.safetensors"):
        hf.load(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    settings.pop("kv_lora_rank")
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"lacks kv_lora_rank"):
        hf.load(tmp_path)
