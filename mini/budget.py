"""From a model's configuration to parameters, FLOPs, bytes, GPU hours, dollars and energy. Chapter 00.

Pure arithmetic: nothing here builds a model. Four conventions, each worth some per cent of an answer:

* A parameter is a trained number. DeepSeek's router bias is moved by a rule, not by gradients: not counted.
* A multiplication with its addition is 2 FLOPs. Only matrix products count, not norms, softmax, activations.
* The embedding is a look-up: no FLOPs. The output head is a product, also where it shares those weights.
* Training costs 3 forward passes: the backward pass makes two products of each one. No recomputation.
"""

from dataclasses import dataclass, replace

from mini.model import Config

Number = int | float

# arXiv:2412.19437 §4.2 and inference/configs/config_671B.json of DeepSeek-V3, without multi-token prediction
V3 = Config(
    vocab_size=129_280,
    dim=7168,
    n_layers=61,
    n_heads=128,
    inter_dim=18_432,
    max_seq_len=4096,
    tie_embeddings=False,
    q_lora_rank=1536,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    n_dense_layers=3,
    n_routed_experts=256,
    n_shared_experts=1,
    n_activated_experts=8,
    moe_inter_dim=2048,
    n_expert_groups=8,
    n_limited_groups=4,
    route_scale=2.5,
)
# arXiv:2407.21783 Table 3: a dense model of which the GPU hours are published
LLAMA_405B = Config(
    vocab_size=128_256,
    dim=16_384,
    n_layers=126,
    n_heads=128,
    n_kv_heads=8,
    inter_dim=53_248,
    max_seq_len=8192,
    rope_theta=500_000.0,
    tie_embeddings=False,
)


@dataclass(frozen=True)
class GPU:
    """Peak FLOP/s (without sparsity), board power in watts, NVLink in bytes/s, both directions together."""

    name: str
    bf16: Number
    fp8: Number
    watts: Number
    nvlink: Number


# NVIDIA's H100 SXM data sheet. The H800 keeps its low-precision rates; NVLink falls from 900 to 400 GB/s
# (arXiv:2505.09343 §4.1, whose Table 4 has 385 TFLOP/s as 38.94% of peak: the same 989 TFLOP/s).
H100 = GPU("H100 SXM", bf16=989.4e12, fp8=1978.9e12, watts=700, nvlink=900e9)
H800 = GPU("H800 SXM", bf16=989.4e12, fp8=1978.9e12, watts=700, nvlink=400e9)


def parameters(config: Config, active: bool = False) -> dict[str, int]:
    """Trained parameters by part; `active=True` counts only those that one token passes through.

    Parts: embedding, attention, dense (feed-forward), routed and shared (experts), router, norms, head.
    A tied head is 0, its weights are the embedding's. The active embedding counts whole: publications differ
    in just this, see chapter 00.
    """
    c = config
    n_moe = n_moe_layers(c)
    expert = 3 * c.dim * c.moe_inter_dim  # SwiGLU: gate, up and down
    n_experts = c.n_activated_experts if active else c.n_routed_experts
    latent_norms = c.q_lora_rank + c.kv_lora_rank  # latent attention normalises both of its latents
    return {
        "embedding": c.vocab_size * c.dim,
        "attention": c.n_layers * _attention(c),
        "dense": (c.n_layers - n_moe) * 3 * c.dim * c.inter_dim,
        "routed": n_moe * n_experts * expert,
        "shared": n_moe * c.n_shared_experts * expert,
        "router": n_moe * c.n_routed_experts * c.dim,
        "norms": c.n_layers * (2 * c.dim + latent_norms) + c.dim,
        "head": 0 if c.tie_embeddings else c.vocab_size * c.dim,
    }


def n_moe_layers(config: Config) -> int:
    """Layers with experts: all after the first `n_dense_layers`, or none without routed experts."""
    return config.n_layers - config.n_dense_layers if config.n_routed_experts else 0


def _attention(c: Config) -> int:
    """Weights of one attention layer: latent (arXiv:2412.19437 Eq. 1-11), or multi-head and grouped-query."""
    if not c.kv_lora_rank:
        return 2 * c.dim * _head_dim(c) * (c.n_heads + _kv_heads(c))
    query_width = c.n_heads * (c.qk_nope_head_dim + c.qk_rope_head_dim)
    queries = c.q_lora_rank * (c.dim + query_width) if c.q_lora_rank else c.dim * query_width
    down = c.dim * (c.kv_lora_rank + c.qk_rope_head_dim)
    up = c.kv_lora_rank * c.n_heads * (c.qk_nope_head_dim + c.v_head_dim)
    return queries + down + up + c.n_heads * c.v_head_dim * c.dim


def _head_dim(c: Config) -> int:
    return c.dim // c.n_heads


def _kv_heads(c: Config) -> int:
    return c.n_kv_heads or c.n_heads


def dense_twin(config: Config) -> Config:
    """The same model without experts: its feed-forward is widened until the total is as near as it gets."""
    no_experts = dict.fromkeys(
        ("n_dense_layers", "n_routed_experts", "n_shared_experts", "n_activated_experts", "moe_inter_dim"), 0
    )
    twin = replace(config, **no_experts)
    gap = sum(parameters(config).values()) - sum(parameters(twin).values())
    return replace(twin, inter_dim=config.inter_dim + round(gap / (3 * config.dim * config.n_layers)))


def attention_flops(config: Config, seq_len: int, causal: bool = True) -> Number:
    """Forward FLOPs per token of the two products QKᵀ and PV, the mean over a sequence of `seq_len` tokens.

    A causal token sees (seq_len + 1) / 2 keys in the mean; `causal=False` charges all, as many reports do.
    """
    _positive(seq_len=seq_len)
    c = config
    keys = (seq_len + 1) / 2 if causal else seq_len
    latent = c.qk_nope_head_dim + c.qk_rope_head_dim + c.v_head_dim
    return 2 * c.n_layers * c.n_heads * (latent if c.kv_lora_rank else 2 * _head_dim(c)) * keys


def forward_flops(config: Config, seq_len: int | None = None, causal: bool = True) -> Number:
    """FLOPs per token of a forward pass: 2 a weight ("2N"); with `seq_len`, `attention_flops` on top."""
    counts = parameters(config, active=True)
    weights = sum(counts[part] for part in ("attention", "dense", "routed", "shared", "router"))
    weights += config.vocab_size * config.dim  # the head
    return 2 * weights + (0 if seq_len is None else attention_flops(config, seq_len, causal))


def training_flops(config: Config, seq_len: int | None = None, causal: bool = True) -> Number:
    """FLOPs per token of a training step: 6 a weight ("6N"); with `seq_len`, the attention term on top."""
    return 3 * forward_flops(config, seq_len, causal)


def weight_bytes(config: Config, bytes_per_parameter: Number = 2) -> Number:
    """Bytes of all parameters: 2 each in BF16, 1 in FP8 (its scales not counted)."""
    _positive(bytes_per_parameter=bytes_per_parameter)
    return sum(parameters(config).values()) * bytes_per_parameter


def kv_cache_bytes(config: Config, tokens: int = 1, bytes_per_number: Number = 2) -> Number:
    """Bytes that attention keeps of `tokens` tokens: keys and values, or latent and rotary key (MLA)."""
    _positive(tokens=tokens, bytes_per_number=bytes_per_number)
    c = config
    numbers = c.kv_lora_rank + c.qk_rope_head_dim if c.kv_lora_rank else 2 * _kv_heads(c) * _head_dim(c)
    return numbers * c.n_layers * tokens * bytes_per_number


def all_to_all_bytes(config: Config, copies: int, dispatch: Number = 1, combine: Number = 2) -> Number:
    """Bytes that one token sends and gets back in one MoE layer, forward, if it goes out in `copies` copies.

    V3 dispatches FP8 (1 byte a number) and combines BF16 (2): arXiv:2505.09343 §2.3.2.
    """
    _positive(copies=copies)
    return copies * config.dim * (dispatch + combine)


def gpu_hours(flops: Number, utilisation: Number, peak: Number = H800.bf16) -> Number:
    """Hours of one GPU that does `flops` at a share `utilisation` (above 0, up to 1) of `peak` FLOP/s."""
    _positive(flops=flops, peak=peak)
    if not 0 < utilisation <= 1:
        raise ValueError(f"utilisation={utilisation} is not a share above 0 and up to 1; write 35% as 0.35")
    return flops / (utilisation * peak * 3600)


def utilisation(flops: Number, gpu_hours: Number, peak: Number = H800.bf16) -> Number:
    """Share of `peak` FLOP/s that `flops` in `gpu_hours` is. Above 1, the inputs contradict each other."""
    _positive(flops=flops, gpu_hours=gpu_hours, peak=peak)
    return flops / (gpu_hours * 3600 * peak)


def energy_kwh(gpu_hours: Number, watts: Number = H800.watts, pue: Number = 1) -> Number:
    """kWh at `watts` per GPU throughout. `pue`: energy of the whole site over that of its computers."""
    _positive(gpu_hours=gpu_hours, watts=watts)
    if not pue >= 1:
        raise ValueError(f"pue={pue} is below 1, but a site uses what its computers use, and more; try 1.1")
    return gpu_hours * watts / 1000 * pue


@dataclass(frozen=True)
class Bill:
    """What a training run comes to: `dollars` is the rent of GPUs alone, `kwh` follows the watts assumed."""

    flops: Number
    gpu_hours: Number
    dollars: Number
    kwh: Number


def cost(
    config: Config,
    tokens: Number,
    utilisation: Number,
    *,
    seq_len: int | None = None,
    gpu: GPU = H800,
    dollars_per_gpu_hour: Number = 2,
    watts: Number | None = None,
    pue: Number = 1,
) -> Bill:
    """The bill for training on `tokens` tokens at a share `utilisation` of the GPU's BF16 peak.

    `seq_len` adds the attention term. `watts` defaults to the GPU's board power; a whole server draws more.
    """
    _positive(tokens=tokens)
    flops = training_flops(config, seq_len) * tokens
    hours = gpu_hours(flops, utilisation, gpu.bf16)
    kwh = energy_kwh(hours, gpu.watts if watts is None else watts, pue)
    return Bill(flops, hours, hours * dollars_per_gpu_hour, kwh)


def _positive(**values: Number) -> None:
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{name}={value} must be above 0")
