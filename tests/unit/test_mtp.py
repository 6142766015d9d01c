import inspect
import itertools
import math

import pytest
import torch

from mini.model import Config, Transformer, cross_entropy
from mini.moe import balanced
from mini.mtp import MTP, mtp_loss, mtp_losses, probabilities, speculate, verify
from mini.sample import sample
from mini.train import Settings, optimizers, train

SMALL = dict(vocab_size=50, dim=32, n_layers=2, n_heads=4, inter_dim=48, max_seq_len=24)
LATENT = dict(q_lora_rank=12, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8)
EXPERTS = dict(
    n_dense_layers=1, n_routed_experts=4, n_shared_experts=1, n_activated_experts=2, moe_inter_dim=16
)
KINDS = [dict(), dict(n_kv_heads=1, tie_embeddings=False), LATENT | EXPERTS]


def random_mtp(n_depths: int = 1, seed: int = 0, **changes) -> MTP:
    """Everything drawn, and widely: norms at one and a timid head hide half the mistakes."""
    torch.manual_seed(seed)
    mtp = MTP(Transformer(Config(**SMALL | changes)), n_depths).eval()
    for p in mtp.parameters():
        torch.nn.init.uniform_(p, 0.5, 1.5) if p.dim() == 1 else torch.nn.init.normal_(
            p, std=p.shape[-1] ** -0.5
        )
    return mtp


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- the module and its loss, equations 21 to 25


def rms(x, norm):
    return x / (x.square().mean() + norm.eps).sqrt() * norm.weight


@pytest.mark.parametrize("kind", KINDS)
def test_depths_by_the_equations(kind):
    """Position by position, counted from 1 as the report does."""
    mtp, tokens = random_mtp(n_depths=2, **kind), torch.randint(50, (2, 9))
    model, T = mtp.model, 8
    head = model.embed.weight if model.head is None else model.head.weight
    expected = [0.0, 0.0]
    for row in tokens:
        t = dict(enumerate(row, start=1))  # t_1 ... t_{T+1}
        h = dict(enumerate(model.hidden(row[None, :T])[0], start=1))
        for k, depth in enumerate(mtp.layers, start=1):
            x = [
                depth.eh_proj.weight
                @ torch.cat((rms(h[i], depth.hnorm), rms(model.embed(t[i + k]), depth.enorm)))
                for i in range(1, T - k + 1)
            ]
            y = depth.block(torch.stack(x)[None], model.cos[: T - k], model.sin[: T - k], None, None)[0]
            h = {i: rms(y[i - 1], depth.norm) for i in range(1, T - k + 1)}
            for i in range(1, T - k + 1):
                logits = head @ h[i]
                expected[k - 1] -= (logits - logits.logsumexp(0))[t[i + k + 1]] / (2 * T)
    main, *ahead = mtp_losses(mtp, tokens)
    torch.testing.assert_close(main, cross_entropy(model, tokens))
    torch.testing.assert_close(torch.stack(ahead), torch.stack(expected))
    torch.testing.assert_close(mtp_loss(0.3)(mtp, tokens), main + 0.15 * sum(ahead))
    torch.testing.assert_close(mtp_loss()(mtp, tokens), main + 0.15 * sum(ahead))


def test_depth_k_has_k_positions_less():
    logits = random_mtp(n_depths=3)(torch.randint(50, (2, 10)))
    assert [list(x.shape) for x in logits] == [[2, 10 - k, 50] for k in range(4)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("depth", [1, 2])
def test_depth_k_reads_up_to_k_tokens_on_and_no_further(kind, depth):
    mtp, tokens = random_mtp(n_depths=2, **kind), torch.randint(50, (1, 12))
    changed = tokens.clone()
    changed[0, 6] = (tokens[0, 6] + 1) % 50
    moved = (mtp(tokens)[depth] - mtp(changed)[depth]).abs().amax(dim=(0, 2)) > 1e-6
    assert moved.tolist() == [i + depth >= 6 for i in range(12 - depth)]


def test_embedding_and_head_are_the_main_models():
    mtp = random_mtp()
    own = {name for name, _ in mtp.named_parameters() if not name.startswith("model.")}
    assert not any("embed" in name or "head" in name for name in own)
    assert mtp.layers[0].eh_proj.weight.shape == (32, 64)


def test_matrices_begin_as_small_as_the_main_models():
    torch.manual_seed(0)
    mtp = MTP(Transformer(Config(**SMALL)))
    for weight in (
        mtp.model.layers[0].attn.wo.weight,
        mtp.layers[0].eh_proj.weight,
        mtp.layers[0].block.attn.wo.weight,
    ):
        assert weight.std().item() == pytest.approx(0.5 * 32**-0.5, rel=0.08)


@pytest.mark.parametrize("kind", KINDS)
def test_weight_0_leaves_the_main_gradient_alone(kind):
    mtp, tokens = random_mtp(**kind), torch.randint(50, (4, 20))
    cross_entropy(mtp.model, tokens).backward()
    alone = [p.grad.clone() for p in mtp.model.parameters()]
    mtp.zero_grad()
    mtp_loss(0.0)(mtp, tokens).backward()
    for p, grad in zip(mtp.model.parameters(), alone, strict=True):
        torch.testing.assert_close(p.grad, grad)
    mtp.zero_grad()
    mtp_loss(0.3)(mtp, tokens).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in mtp.parameters())


def test_training_lowers_both_losses_and_gives_the_matrices_to_muon():
    torch.manual_seed(0)
    mtp = MTP(Transformer(Config(**SMALL)))
    tokens = torch.randint(50, (1, 21)).repeat(4, 1)
    before = mtp_losses(mtp, tokens)
    train(mtp, lambda step: tokens, Settings(steps=30, warmup=3), loss=mtp_loss(), progress=False)
    for old, new in zip(before, mtp_losses(mtp, tokens), strict=True):
        assert new < 0.5 * old
    muon = {id(p) for p in optimizers(mtp, Settings(steps=1))[1].param_groups[0]["params"]}
    assert {id(mtp.layers[0].eh_proj.weight), id(mtp.layers[0].block.attn.wqkv.weight)} <= muon
    assert id(mtp.model.embed.weight) not in muon


def test_balance_reaches_the_experts_of_the_depth():
    mtp, tokens = random_mtp(**EXPERTS).train(), torch.randint(50, (4, 20))
    value = balanced(mtp_loss(), bias_speed=0.01, alpha=0.1)(mtp, tokens)
    assert value > mtp_loss()(mtp, tokens)
    assert mtp.layers[0].block.ffn.gate.bias.abs().sum() > 0


# --- verification


def wrong_accept_greedily(p, q, draft, generator=None):
    return (
        draft if p[draft] >= q[draft] else torch.multinomial((p - q).clamp(min=0), 1, generator=generator)[0]
    )


def wrong_resample_from_p(p, q, draft, generator=None):
    if torch.rand((), generator=generator) * q[draft] < p[draft]:
        return draft
    return torch.multinomial(p, 1, generator=generator)[0]


def wrong_way_round(p, q, draft, generator=None):
    if torch.rand((), generator=generator) * p[draft] < q[draft]:
        return draft
    return torch.multinomial((p - q).clamp(min=0), 1, generator=generator)[0]


def chi_square_p_value(seen: torch.Tensor, probs: torch.Tensor) -> float:
    """P(a chi-square variable exceeds what was seen), with rare outcomes put together until 5 of them are expected."""
    expected = probs.double() / probs.double().sum() * seen.sum()
    order = expected.argsort(descending=True)
    seen, expected = seen[order].double(), expected[order]
    common = max(1, int((expected >= 5).sum()))
    seen = torch.cat((seen[:common], seen[common:].sum()[None]))
    expected = torch.cat((expected[:common], expected[common:].sum()[None]))
    if expected[-1] < 5:  # the rest is rare even together: it joins the rarest that is not
        seen = torch.cat((seen[:-2], seen[-2:].sum()[None]))
        expected = torch.cat((expected[:-2], expected[-2:].sum()[None]))
    statistic = ((seen - expected) ** 2 / expected).sum()
    freedom = torch.tensor((len(seen) - 1) / 2, dtype=torch.float64)
    return torch.special.gammaincc(freedom, statistic / 2).item()


def test_the_p_value_is_that_of_the_tables():
    """A chi-square of 3.841 with 1 degree of freedom, of 18.307 with 10: 5% exceed them."""
    for freedom, statistic in ((1, 3.841), (10, 18.307)):
        n = freedom + 1
        off = math.sqrt(statistic * 1000 / 2)  # two outcomes that are off by this much give the statistic
        seen = torch.full((n,), 1000.0)
        seen[0], seen[1] = 1000 + off, 1000 - off
        assert chi_square_p_value(seen, torch.ones(n)) == pytest.approx(0.05, abs=1e-4)


P, Q = torch.tensor([0.5, 0.3, 0.15, 0.05, 0.0]), torch.tensor([0.2, 0.5, 0.1, 0.1, 0.1])


def verified(rule, n=4000):
    generator = seeded()
    drafts = torch.multinomial(Q, n, replacement=True, generator=generator)
    tokens = torch.stack([rule(P, Q, draft, generator) for draft in drafts])
    return tokens, (tokens == drafts).double().mean().item()


def test_a_verified_draft_is_distributed_as_p_and_kept_as_often_as_the_two_overlap():
    tokens, kept = verified(verify)
    assert chi_square_p_value(torch.bincount(tokens, minlength=5), P) > 1e-3
    assert kept == pytest.approx(torch.minimum(P, Q).sum().item(), abs=0.03)


@pytest.mark.parametrize("rule", [wrong_accept_greedily, wrong_resample_from_p, wrong_way_round])
def test_the_test_finds_wrong_rules(rule):
    tokens, _ = verified(rule)
    assert chi_square_p_value(torch.bincount(tokens, minlength=5), P) < 1e-3


def test_a_draft_from_p_itself_is_always_kept():
    generator = seeded()
    drafts = torch.multinomial(P, 500, replacement=True, generator=generator)
    assert all(verify(P, P.clone(), draft, generator) == draft for draft in drafts)
    nearly = P - torch.tensor([1e-7, 0, 0, 0, 0])  # all that rounding leaves: no residual at all
    assert all(verify(nearly, P, draft, generator) in (0, 1, 2, 3) for draft in drafts)


def test_probabilities():
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    assert probabilities(logits, 0).tolist() == [[0.0, 1.0, 0.0]]
    torch.testing.assert_close(probabilities(logits, 2.0), (logits / 2).softmax(-1))


# --- speculation


@torch.inference_mode()
def joint(model: Transformer, prompt: list[int], n: int, temperature: float) -> torch.Tensor:
    """The probability of every continuation by n tokens, one after the other, each read without a cache."""
    vocab = model.config.vocab_size
    probs = torch.ones(vocab**n, dtype=torch.float64)
    for i, text in enumerate(itertools.product(range(vocab), repeat=n)):
        logits = model(torch.tensor([[*prompt, *text]]))[0]
        each = (logits.double() / temperature).softmax(-1)
        for j, token in enumerate(text):
            probs[i] *= each[len(prompt) - 1 + j, token]
    return probs


def counts(mtp: MTP, n: int, draws: int, temperature: float = 1.0) -> torch.Tensor:
    vocab, generator = mtp.model.config.vocab_size, seeded(1)
    place = vocab ** torch.arange(n - 1, -1, -1)
    seen = [
        speculate(mtp, [1, 2], n, temperature=temperature, generator=generator).tokens @ place
        for _ in range(draws)
    ]
    return torch.bincount(torch.stack(seen), minlength=vocab**n)


TINY = dict(vocab_size=3, dim=16, n_layers=1, n_heads=2, inter_dim=16)


@pytest.mark.parametrize(("kind", "temperature"), [*((kind, 1.0) for kind in KINDS), (dict(), 0.6)])
def test_speculation_draws_from_the_models_own_distribution(kind, temperature):
    """Three tokens: one of the prompt's pass, a draft kept or replaced, and one after it, by either way."""
    mtp = random_mtp(**kind | TINY | ({"n_dense_layers": 0} if "n_dense_layers" in kind else {}))
    probs = joint(mtp.model, [1, 2], 3, temperature)
    assert probs.sum().item() == pytest.approx(1)
    assert chi_square_p_value(counts(mtp, 3, 700, temperature), probs) > 1e-3
    plain = sample(mtp.model, [[1, 2]] * 700, 3, temperature=temperature, generator=seeded())
    plain = torch.bincount(plain.tokens @ torch.tensor([9, 3, 1]), minlength=27)
    assert chi_square_p_value(plain, probs) > 1e-3


@pytest.mark.parametrize("rule", [wrong_accept_greedily, wrong_resample_from_p, wrong_way_round])
def test_a_wrong_rule_is_found_in_the_text(rule, monkeypatch):
    monkeypatch.setattr("mini.mtp.verify", rule)
    # its drafter differs enough from its main model for 700 texts to show it
    mtp = random_mtp(seed=2, **TINY)
    probs = joint(mtp.model, [1, 2], 3, 1.0)
    assert chi_square_p_value(counts(mtp, 3, 700), probs) < 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_at_temperature_0_the_text_is_that_of_sample(kind):
    kept = 0
    for seed in range(8):
        mtp = random_mtp(seed=seed, vocab_size=8, **kind)
        prompt = torch.randint(8, (5,), generator=seeded(seed))
        # up to the context's very end
        plain = sample(mtp.model, [prompt.tolist()], 19, temperature=0).tokens[0]
        drawn = speculate(mtp, prompt, 19, temperature=0)
        assert torch.equal(drawn.tokens, plain)
        assert drawn.steps == 19 - drawn.accepted
        kept += drawn.accepted
    assert kept > 4, "no draft was ever kept, so this tested little"


def test_a_perfect_drafter_halves_the_passes(monkeypatch):
    mtp = random_mtp(vocab_size=16)
    truth = sample(mtp.model, [[1, 2, 3]], 21, temperature=0).tokens[0]
    said = iter(truth[1::2])  # the first pass writes one token, each later one a draft and its follower
    # of which the head makes logits that single one token out
    score = torch.linalg.pinv(mtp.model.embed.weight)
    monkeypatch.setattr(mtp.layers[0], "forward", lambda h, *rest: score[:, next(said)].expand_as(h))
    drawn = speculate(mtp, [1, 2, 3], 21, temperature=0)
    assert torch.equal(drawn.tokens, truth)
    assert (drawn.steps, drawn.drafts, drawn.accepted) == (11, 10, 10)


@pytest.mark.parametrize("kind", KINDS)
def test_caches_hold_the_kept_text_and_nothing_else(kind, monkeypatch):
    """Whatever was struck out, each pass begins where the settled text ends."""
    mtp = random_mtp(**kind)
    passes, hidden = [], mtp.model.hidden

    def spy(tokens, cache):
        passes.append((cache[0].length, tokens[0].tolist()))
        return hidden(tokens, cache)

    monkeypatch.setattr(mtp.model, "hidden", spy)
    drawn = speculate(mtp, [1, 2, 3], 21, generator=seeded(3))
    text = [1, 2, 3, *drawn.tokens.tolist()]
    assert len(text) == 24
    assert passes[0] == (0, [1, 2, 3])
    for start, tokens in passes[1:]:
        assert tokens[0] == text[start]
        assert start + len(tokens) < 24
    assert drawn.drafts == sum(len(tokens) == 2 for _, tokens in passes[1:])
    assert 0 < drawn.accepted < drawn.drafts
    assert drawn.steps == len(passes)


@pytest.mark.parametrize("kind", KINDS)
def test_drafts_are_those_of_depth_1_over_the_whole_text(kind, monkeypatch):
    """A slip here would leave the text as it should be, and only cost acceptance."""
    mtp = random_mtp(**kind)
    drafted, depth = {}, mtp.layers[0].forward

    def spy(h, embedded, cos, sin, cache):
        ahead = depth(h, embedded, cos, sin, cache)
        drafted[cache.length - 1] = mtp.model.logits(ahead[0, -1])
        return ahead

    monkeypatch.setattr(mtp.layers[0], "forward", spy)
    drawn = speculate(mtp, [1, 2, 3], 21, generator=seeded(3))
    monkeypatch.undo()
    whole = mtp(torch.tensor([[1, 2, 3, *drawn.tokens.tolist()]]))[1][0]
    assert len(drafted) == drawn.drafts > 5
    assert 0 < drawn.accepted < drawn.drafts
    for position, logits in drafted.items():
        torch.testing.assert_close(logits, whole[position], atol=1e-4, rtol=1e-4)


def test_one_new_token_needs_no_draft():
    drawn = speculate(random_mtp(), [1, 2, 3], 1, generator=seeded())
    assert (len(drawn.tokens), drawn.steps, drawn.drafts) == (1, 1, 0)


def test_the_end_token_ends_the_text_wherever_it_comes():
    for seed in range(10):
        mtp = random_mtp(seed=seed, vocab_size=8)
        free = speculate(mtp, [1, 2], 20, generator=seeded(seed)).tokens
        for end in free.unique().tolist():
            n = (free == end).nonzero()[0].item() + 1
            stopped = speculate(mtp, [1, 2], 20, end=end, generator=seeded(seed))
            assert torch.equal(stopped.tokens, free[:n])


def test_the_same_seed_writes_the_same_text():
    a, b, c = (speculate(random_mtp(), [1, 2], 20, generator=seeded(s)).tokens for s in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


# --- bad input


def test_impossible_depths_and_weights_are_refused():
    with pytest.raises(ValueError, match="n_depths=0 must be at least 1"):
        random_mtp(n_depths=0)
    with pytest.raises(ValueError, match="2 tokens leave depth 2 nothing to read; give at least 3"):
        random_mtp(n_depths=2)(torch.tensor([[1, 2]]))
    with pytest.raises(ValueError, match=r"weight=-0.1 is below 0"):
        mtp_loss(-0.1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(temperature=-0.1), r"temperature=-0.1 is below 0; use 0"),
        (dict(temperature=float("nan")), r"temperature=nan"),
        (dict(max_new_tokens=0), r"max_new_tokens=0 must be at least 1"),
        (dict(max_new_tokens=22), r"3 tokens and 22 new ones make 25, past max_seq_len=24.*at most 21"),
        (dict(prompt=[]), r"is empty; give it at least one token"),
        (dict(prompt=[50]), r"token 50, outside this model's vocabulary of 50"),
    ],
)
def test_bad_input_is_refused_with_the_fix(changes, message):
    call = dict(prompt=[1, 2, 3], max_new_tokens=5) | changes
    with pytest.raises(ValueError, match=message):
        speculate(random_mtp(), **call)


def test_a_batch_is_refused():
    without_type_checks = inspect.unwrap(speculate)  # as it runs in a notebook
    with pytest.raises(ValueError, match=r"the shape \[2, 3\], but one sequence"):
        without_type_checks(random_mtp(), torch.ones(2, 3, dtype=torch.long), 5)
