import math

import pytest
import torch
from einops import rearrange

from mini.model import Config, Transformer, cross_entropy

SMALL = dict(vocab_size=50, dim=32, n_layers=2, n_heads=4, inter_dim=48, max_seq_len=24)
LATENT = dict(kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=4)


def random_model(seed: int = 0, **changes) -> Transformer:
    """Norms are drawn as well: at their starting value of one, half the mistakes in a model do not show."""
    torch.manual_seed(seed)
    model = Transformer(Config(**SMALL | changes)).eval()
    for p in model.parameters():
        if p.dim() == 1:
            torch.nn.init.uniform_(p, 0.5, 1.5)
    return model


@pytest.mark.parametrize("n_kv_heads", [0, 1, 2])
@pytest.mark.parametrize("cuts", [[24], [1] * 24, [7, 1, 16], [23, 1]])
def test_cached_reading_gives_the_same_logits(n_kv_heads, cuts):
    model = random_model(n_kv_heads=n_kv_heads)
    tokens = torch.randint(50, (3, 24))
    cache = model.new_cache(3, 24)
    parts = [model(part, cache) for part in tokens.split(cuts, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(tokens), atol=1e-5, rtol=0)


def test_padding_on_the_left_changes_nothing():
    model = random_model()
    tokens = torch.randint(50, (3, 10))
    pad = torch.tensor([0, 3, 9])
    padded = model(tokens, pad=pad)
    for row, p in enumerate(pad.tolist()):
        alone = model(tokens[row : row + 1, p:])
        torch.testing.assert_close(padded[row : row + 1, p:], alone, atol=1e-5, rtol=0)
    other = tokens.masked_fill(torch.arange(10) < rearrange(pad, "b -> b 1"), 49)
    assert torch.equal(model(other, pad=pad)[1, 3:], padded[1, 3:]), "filler tokens are read"


def test_the_future_is_not_read():
    model = random_model()
    tokens = torch.randint(50, (1, 12))
    changed = tokens.clone()
    changed[0, 6] = (tokens[0, 6] + 1) % 50
    moved = (model(tokens) - model(changed)).abs().amax(dim=(0, 2)) > 0
    assert moved.tolist() == [False] * 6 + [True] * 6


def test_cross_entropy_by_hand():
    model = random_model()
    tokens = torch.randint(50, (2, 5))
    logprobs = model(tokens[:, :-1]).log_softmax(-1)
    by_hand = -sum(logprobs[b, t, tokens[b, t + 1]] for b in range(2) for t in range(4)) / 8
    torch.testing.assert_close(cross_entropy(model, tokens), by_hand)


def test_an_untrained_model_knows_nothing():
    loss = cross_entropy(random_model(), torch.randint(50, (8, 24)))
    assert abs(loss.item() - math.log(50)) < 0.3


def test_every_parameter_has_a_gradient():
    model = random_model(tie_embeddings=False)
    cross_entropy(model, torch.randint(50, (4, 20))).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_tied_embeddings_share_one_matrix():
    assert "head.weight" not in Transformer(Config(**SMALL)).state_dict()
    untied = Transformer(Config(**SMALL, tie_embeddings=False))
    assert untied.head.weight.shape == (50, 32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(n_heads=6), r"n_heads=6 does not divide dim=32; try 4 or 8"),
        (dict(n_kv_heads=3), r"n_kv_heads=3 does not divide n_heads=4; use a divisor of 4"),
        (dict(vocab_size=0), r"vocab_size=0 must be at least 1"),
        (dict(kv_lora_rank=8), r"kv_lora_rank=8 needs a qk_nope_head_dim of at least 1"),
        (LATENT | dict(v_head_dim=0), r"kv_lora_rank=8 needs a v_head_dim of at least 1"),
        (LATENT | dict(rope_factor=0.5, original_seq_len=8), r"rope_factor=0.5 \(YaRN\) needs .* above 1"),
        (dict(rope_factor=4.0), r"rope_factor=4.0 \(YaRN\) needs a kv_lora_rank"),
        (dict(n_routed_experts=8, n_activated_experts=2), r"n_routed_experts=8 need a moe_inter_dim"),
        (dict(n_activated_experts=2), r"n_activated_experts=2 exceeds n_routed_experts=0"),
    ],
)
def test_a_bad_config_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        Transformer(Config(**SMALL | changes))


@pytest.mark.parametrize("t", [0, 25])
def test_a_text_past_the_context_is_refused(t):
    with pytest.raises(ValueError, match=rf"{t} positions.*max_seq_len=24"):
        random_model()(torch.zeros(1, t, dtype=torch.long))


def test_a_cache_longer_than_the_context_does_not_lengthen_it():
    model = random_model()
    cache = model.new_cache(1, 30)
    model(torch.zeros(1, 24, dtype=torch.long), cache)
    with pytest.raises(ValueError, match=r"25 positions.*max_seq_len=24"):
        model(torch.zeros(1, 1, dtype=torch.long), cache)


def test_weights_fit_a_model_of_another_context():
    short, long = random_model(), random_model(seed=1, max_seq_len=48)
    long.load_state_dict(short.state_dict())
    tokens = torch.randint(50, (2, 24))
    torch.testing.assert_close(long(tokens), short(tokens))


def test_a_cache_past_its_end_is_refused():
    model = random_model()
    cache = model.new_cache(1, 4)
    with pytest.raises(ValueError, match="position 5 is past the cache's 4"):
        model(torch.zeros(1, 5, dtype=torch.long), cache)
