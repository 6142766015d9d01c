"""GRPO's loss, gradient and advantages equal those of TRL's own GRPOTrainer, on a model of the same weights."""

import itertools
import logging

import pytest
import torch
from einops import rearrange
from torch.testing import assert_close

from mini.distill import masked_mean
from mini.grpo import Settings, advantages, gains, kl_estimate, policy_loss, ratios, token_logprobs
from mini.model import Config, Transformer

trl = pytest.importorskip("trl", reason="TRL is part of the extra [test]")
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
TEMPERATURE, NEW, GROUP, N = 0.7, 9, 4, 8
LOSSES = {"grpo": "sequence", "bnpo": "batch", "dapo": "batch", "dr_grpo": "constant"}
RATIOS = {"token": "token", "sequence-mean": "sequence"}  # ours: TRL's


def small_model() -> Transformer:
    torch.manual_seed(0)
    model = Transformer(
        Config(vocab_size=30, dim=32, n_layers=2, n_heads=4, n_kv_heads=2, inter_dim=48, max_seq_len=32)
    )
    for p in model.parameters():  # larger than a fresh model's, so that no token is as likely as another
        torch.nn.init.uniform_(p, 0.5, 1.5) if p.dim() == 1 else torch.nn.init.normal_(p, std=0.2)
    return model


@pytest.fixture(scope="module")
def trainer():
    """A real GRPOTrainer around transformers' Llama with our weights."""
    from bench.trainer import grpo_trainer

    settings = Settings(G=GROUP, max_new_tokens=NEW, temperature=TEMPERATURE)
    prompts = [[5, 6], [7, 8, 9, 3]]
    made = grpo_trainer(
        small_model(), prompts, lambda prompt, answer: 0.0, settings, 1, per_device_train_batch_size=N
    )
    made.current_gradient_accumulation_steps = 1
    yield made
    logging.disable(logging.NOTSET)


@pytest.fixture
def answers():
    """Answers of 1 to NEW tokens to prompts of 2 to 4, as TRL lays them out: prompts filled on the left."""
    g = torch.Generator().manual_seed(1)
    lengths, starts = torch.tensor([9, 1, 5, 9, 2, 7, 3, 8]), torch.tensor([2, 2, 2, 2, 4, 4, 4, 3])
    return dict(
        prompt_ids=torch.randint(2, 30, (N, 4), generator=g),
        prompt_mask=(torch.arange(4) >= 4 - rearrange(starts, "n -> n 1")).long(),
        completion_ids=torch.randint(2, 30, (N, NEW), generator=g),
        completion_mask=(torch.arange(NEW) < rearrange(lengths, "n -> n 1")).long(),
        advantages=torch.randn(N, generator=g),
        num_items_in_batch=lengths.sum(),
    )


def as_rows(answers: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """The same as our rows and mask: fillers at the end alone."""
    rows = torch.full((N, 4 + NEW), -1)
    mask = torch.zeros(N, 3 + NEW, dtype=torch.bool)
    for i in range(N):
        prompt, answer = (
            answers[k + "_ids"][i][answers[k + "_mask"][i] == 1] for k in ("prompt", "completion")
        )
        text = torch.cat((prompt, answer))
        rows[i, : len(text)] = text
        mask[i, len(prompt) - 1 : len(text) - 1] = True
    return rows, mask


def gradients(model: Transformer, llama) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Pairs of gradients of the same weights, ours and TRL's."""
    theirs = {name: p.grad for name, p in llama.named_parameters()}
    pairs = [(model.embed.weight.grad, theirs["model.embed_tokens.weight"])]
    for i, layer in enumerate(model.layers):
        at = f"model.layers.{i}."
        qkv = torch.cat([theirs[f"{at}self_attn.{name}_proj.weight"] for name in "qkv"])
        pairs += [(layer.attn.wqkv.weight.grad, qkv)]
        pairs += [(layer.attn.wo.weight.grad, theirs[f"{at}self_attn.o_proj.weight"])]
        pairs += [(layer.ffn.w2.weight.grad, theirs[f"{at}mlp.down_proj.weight"])]
        pairs += [(layer.attn_norm.weight.grad, theirs[f"{at}input_layernorm.weight"])]
    return pairs


def to_theirs(values: torch.Tensor, mask: torch.Tensor, answers: dict) -> torch.Tensor:
    """Values at our answers' tokens, where TRL has them."""
    return torch.zeros(N, NEW).masked_scatter(answers["completion_mask"] == 1, values[mask])


@pytest.mark.parametrize(
    ("loss_type", "ratio", "changes"),
    [
        *itertools.product(LOSSES, RATIOS, [dict(), dict(beta=0.04), dict(beta=0.3, kl_times_ratio=True)]),
        ("dapo", "token", dict(epsilon_high=0.28)),
        ("grpo", "token", dict(epsilon_high=10.0, epsilon=0.05)),
    ],
)
def test_trls_own_loss(trainer, answers, monkeypatch, loss_type, ratio, changes):
    model, (rows, mask) = small_model(), as_rows(answers)
    g = torch.Generator().manual_seed(2)
    logprobs, entropy = token_logprobs(model, rows, TEMPERATURE)
    old, ref = (logprobs.detach() + 0.4 * torch.randn(mask.shape, generator=g) for _ in range(2))
    if ratio == "sequence-mean":  # means are closer to 1, and some of them are to be clipped
        old = old + 0.5 * torch.randn(N, 1, generator=g)
    settings = Settings(G=GROUP, max_new_tokens=NEW, ratio=ratio, average=LOSSES[loss_type], **changes)
    ours = policy_loss(logprobs, old, answers["advantages"], mask, settings, ref)
    ours.backward()

    given = dict(old_per_token_logps=old, ref_per_token_logps=ref)
    inputs = answers | {key: to_theirs(value, mask, answers) for key, value in given.items()}
    monkeypatch.setattr(trainer, "loss_type", loss_type)
    monkeypatch.setattr(trainer, "importance_sampling_level", RATIOS[ratio])
    monkeypatch.setattr(trainer, "beta", settings.beta)
    monkeypatch.setattr(trainer, "epsilon_low", settings.epsilon)
    monkeypatch.setattr(trainer, "epsilon_high", settings.epsilon_high or settings.epsilon)
    monkeypatch.setattr(trainer.args, "use_bias_correction_kl", settings.kl_times_ratio)
    trainer._metrics["train"].clear()
    trainer.model.train().zero_grad()
    theirs = trainer._compute_loss(trainer.model, inputs)
    theirs.backward()

    assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    assert abs(ours) > 1e-3
    for mine, reference in gradients(model, trainer.model):
        assert reference.abs().max() > 1e-4
        assert_close(mine, reference, atol=1e-6, rtol=1e-4)
    rho = ratios(logprobs.detach(), old, mask, ratio)
    free, cut = gains(rho, answers["advantages"], settings)
    clipped = (cut < free) & mask
    seen = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    share = masked_mean(clipped.float(), mask) if ratio == "token" else clipped.any(dim=1).float().mean()
    assert share.item() == pytest.approx(seen["clip_ratio/region_mean"])
    assert share > 0
    assert masked_mean(entropy, mask).item() == pytest.approx(seen["entropy"], rel=1e-5)
    if settings.beta:
        kl = kl_estimate(logprobs.detach(), ref) * (rho if settings.kl_times_ratio else 1)
        assert masked_mean(kl, mask).item() == pytest.approx(seen["kl"], rel=1e-4)


@pytest.mark.parametrize("scale", [True, False])
def test_trls_own_advantages(trainer, monkeypatch, scale):
    rewards = torch.tensor([[1.0, 0.0, 0.25, 2.0], [0.5, 0.5, 0.5, 0.5]])
    monkeypatch.setattr(trainer, "reward_funcs", [lambda completions, **_: rewards.flatten().tolist()])
    monkeypatch.setattr(trainer, "scale_rewards", "group" if scale else "none")
    rows = [trainer.train_dataset[i // GROUP] for i in range(N)]
    theirs = trainer._generate_and_score_completions(rows)["advantages"]
    assert_close(rearrange(advantages(rewards, scale), "p g -> (p g)"), theirs, atol=1e-6, rtol=1e-6)
    assert theirs[:GROUP].abs().min() > 0.05


def test_trls_defaults_are_not_the_papers(trainer):
    """What the chapter's table says of them."""
    default = trl.GRPOConfig(output_dir="unused", use_cpu=True, bf16=False)
    assert (default.loss_type, default.beta, default.scale_rewards) == ("dapo", 0.0, "group")
    assert (default.epsilon, default.epsilon_high, default.importance_sampling_level) == (0.2, None, "token")
    assert (default.num_generations, default.num_iterations) == (8, 1)
    assert default.use_bias_correction_kl
