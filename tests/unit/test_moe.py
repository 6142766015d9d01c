"""Routing and experts: by hand, by brute force, and what has to hold whatever the numbers are."""

from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mini.model import Config, FeedForward, Transformer, cross_entropy
from mini.moe import (
    Experts,
    Gate,
    MoE,
    Routing,
    balance_loss,
    balanced,
    choose_experts,
    load_violation,
    update_bias,
    watch,
)

SHAPE = dict(vocab_size=40, dim=16, n_layers=3, n_heads=2, inter_dim=24, max_seq_len=16, n_dense_layers=1)
SHAPE |= dict(n_routed_experts=6, n_activated_experts=2, n_shared_experts=1, moe_inter_dim=8)


def moe_model(seed: int = 0, **changes) -> Transformer:
    torch.manual_seed(seed)
    return Transformer(Config(**SHAPE | changes))


def gate(n_experts=6, k=2, seed=0, **options) -> Gate:
    torch.manual_seed(seed)
    made = Gate(16, n_experts, k, **options)
    made.weight.data.normal_(std=0.5)
    made.bias.normal_(std=0.3)
    return made


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(2, 4), st.integers(1, 4), st.data())
def test_the_choice_is_the_best_that_the_groups_allow(seed, n_groups, size, limited, data):
    limited = min(limited, n_groups)
    k = data.draw(st.integers(1, limited * size))
    scores = torch.randn(1, n_groups * size, generator=torch.Generator().manual_seed(seed))  # also below zero
    chosen = set(choose_experts(scores, k, n_groups, limited)[0].tolist())
    values = scores[0].tolist()
    groups = [range(g * size, (g + 1) * size) for g in range(n_groups)]

    def worth(group):
        return sum(sorted((values[e] for e in group), reverse=True)[:2])

    allowed = [e for group in sorted(groups, key=worth)[-limited:] for e in group]
    best = max(combinations(allowed, k), key=lambda experts: sum(values[e] for e in experts))
    assert chosen == set(best)


@pytest.mark.parametrize("k", [2, 3, 6])
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_gates_are_shares_of_the_chosen_affinities_and_the_bias_only_chooses(k, scale):
    router, x = gate(k=k, route_scale=scale), torch.randn(50, 16)
    routing = router(x)
    s = (x @ router.weight.T).sigmoid()
    torch.testing.assert_close(routing.scores, s)
    for token in range(50):
        chosen = routing.indices[token].tolist()
        assert set(chosen) == set((s[token] + router.bias).argsort()[-k:].tolist())
        of_all = sum(s[token, e].item() for e in chosen)
        for e, weight in zip(chosen, routing.weights[token].tolist(), strict=True):
            assert weight == pytest.approx(scale * s[token, e].item() / of_all, rel=1e-5)
    if k < 6:
        router.bias.zero_()
        assert not torch.equal(router(x).load(), routing.load()), "the bias of this test should matter"


@pytest.mark.parametrize(("k", "norm"), [(1, False), (2, False), (2, True), (5, True)])
def test_the_router_always_learns(k, norm):
    router = gate(k=k, norm_topk_prob=norm)
    out = Experts(6, 16, 8)
    x = torch.randn(20, 16)
    routing = router(x)
    out(x, routing.indices, routing.weights).square().sum().backward()
    used = routing.load() > 0
    assert (router.weight.grad[used].norm(dim=1) > 1e-4).all()


def test_a_fresh_router_and_fresh_experts_have_the_spread_of_a_model_s_matrices():
    for matrix in (Gate(256, 64, 2).weight, Experts(4, 256, 64).w13, Experts(4, 256, 64).w2):
        assert matrix.std().item() == pytest.approx(0.5 * 256**-0.5, rel=0.03)


def test_one_group_may_be_all_that_a_token_gets():
    gate = Gate(16, 6, 2, n_expert_groups=3, n_limited_groups=1)
    chosen = gate(torch.randn(20, 16)).indices // 2  # the group of each expert
    assert (chosen[:, 0] == chosen[:, 1]).all()


def test_one_normalised_gate_would_teach_the_router_nothing_and_is_refused():
    with pytest.raises(
        ValueError, match=r"n_activated_experts=1 with norm_topk_prob=True.*norm_topk_prob=False"
    ):
        Gate(16, 6, 1)
    scores = torch.randn(9, 6, requires_grad=True)
    s = scores.sigmoid()
    one = s.gather(1, choose_experts(s.detach(), 1))
    (one / one.sum(-1, keepdim=True) * torch.randn(9, 1)).sum().backward()
    assert scores.grad.abs().max() < 1e-7


@pytest.mark.parametrize(
    ("sizes", "options", "message"),
    [
        ((6, 7), {}, r"n_activated_experts=7 is not from 1 to n_routed_experts=6"),
        ((6, 0), {}, r"n_activated_experts=0 is not from 1"),
        ((6, 2), dict(n_expert_groups=4), r"n_expert_groups=4 must divide n_routed_experts=6"),
        ((6, 2), dict(n_expert_groups=6), r"groups of two or more"),
        (
            (6, 3),
            dict(n_expert_groups=3, n_limited_groups=1),
            r"n_limited_groups=1 of 3 groups with 2 experts",
        ),
        ((6, 2), dict(n_expert_groups=3, n_limited_groups=4), r"n_limited_groups=4 of 3 groups"),
    ],
)
def test_a_router_that_cannot_be_is_refused_by_name(sizes, options, message):
    with pytest.raises(ValueError, match=message):
        Gate(16, *sizes, **options)


def one_by_one(experts: Experts, x, indices, weights):
    rows = []
    for token in range(len(x)):
        parts = []
        for e, weight in zip(indices[token], weights[token], strict=True):
            w1, w3 = experts.w13[e].chunk(2)
            h = torch.nn.functional.silu(w1 @ x[token]) * (w3 @ x[token])
            parts.append(weight * (experts.w2[e] @ h))
        rows.append(sum(parts))
    return torch.stack(rows)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 30), st.integers(1, 5), st.integers(1, 5))
def test_experts_equal_a_loop_over_tokens_and_so_do_their_gradients(seed, n, n_experts, k):
    torch.manual_seed(seed)
    k = min(k, n_experts)
    experts = Experts(n_experts, 16, 8)
    x, weights = torch.randn(n, 16, requires_grad=True), torch.rand(n, k, requires_grad=True)
    indices = torch.stack([torch.randperm(n_experts)[:k] for _ in range(n)])
    parameters = [x, weights, experts.w13, experts.w2]
    fast, slow = experts(x, indices, weights), one_by_one(experts, x, indices, weights)
    torch.testing.assert_close(fast, slow, atol=1e-5, rtol=1e-4)
    aim = torch.randn_like(fast)
    for mine, by_hand in zip(
        torch.autograd.grad((fast * aim).sum(), parameters),
        torch.autograd.grad((slow * aim).sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(mine, by_hand, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("dim", "inter_dim", "message"),
    [(20, 8, r"dim=20 is not a multiple of 8; .*use 24"), (16, 30, r"moe_inter_dim=30 is not .*use 32")],
)
def test_widths_that_grouped_products_cannot_take_are_refused(dim, inter_dim, message):
    with pytest.raises(ValueError, match=message):
        Experts(4, dim, inter_dim)


def test_no_token_is_dropped_when_all_want_one_expert():
    experts, x = Experts(4, 16, 8), torch.randn(100, 16)
    indices, weights = torch.full((100, 1), 2), torch.ones(100, 1)
    out = experts(x, indices, weights)
    torch.testing.assert_close(out, one_by_one(experts, x, indices, weights), atol=1e-5, rtol=1e-4)
    assert (out.norm(dim=1) > 0).all()


def test_a_token_does_not_depend_on_its_neighbours():
    model = moe_model().layers[1].ffn
    x = torch.randn(2, 7, 16)
    whole = model(x)
    torch.testing.assert_close(model(x[1:, 3:5]), whole[1:, 3:5], atol=1e-6, rtol=1e-5)


def test_experts_that_are_all_alike_are_one_feed_forward():
    torch.manual_seed(0)
    alone = FeedForward(16, 8)
    experts = Experts(6, 16, 8)
    experts.w13.data[:], experts.w2.data[:] = alone.w13.weight.data, alone.w2.weight.data
    x = torch.randn(3, 5, 16)
    torch.testing.assert_close(MoE(gate(), experts, None)(x), alone(x), atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(
        MoE(gate(route_scale=2.0), experts, alone)(x), 3 * alone(x), atol=1e-6, rtol=1e-4
    )


def test_load_and_its_violation_by_hand():
    routing = Routing(torch.rand(4, 3), torch.tensor([[0, 1], [0, 2], [0, 1], [1, 0]]), torch.rand(4, 2))
    assert routing.load().tolist() == [4, 3, 1]
    assert load_violation(routing.load()) == pytest.approx(4 / (8 / 3) - 1)
    assert load_violation(torch.tensor([5, 5, 5])) == 0
    idle = Routing(torch.rand(2, 4), torch.tensor([[0, 1], [1, 0]]), torch.rand(2, 2))
    assert idle.load().tolist() == [2, 2, 0, 0]


def test_the_balance_loss_by_hand():
    # two sequences of two tokens, three experts, one activated
    s = torch.tensor([[0.6, 0.3, 0.1], [0.5, 0.4, 0.1], [0.2, 0.2, 0.6], [0.8, 0.1, 0.1]])
    # the choice under a bias: not used
    routing = Routing(s, torch.zeros(4, 1, dtype=torch.long), torch.ones(4, 1))
    # first: f = 3/2 · (2, 0, 0), P = (.55, .35, .1); second: f = 3/2 · (1, 0, 1), P = (.5, .15, .35)
    assert balance_loss(routing, sequences=2).item() == pytest.approx((3 * 0.55 + 1.5 * 0.85) / 2)
    # together: f = 3/4 · (3, 0, 1), P = (.525, .25, .225)
    assert balance_loss(routing, sequences=1).item() == pytest.approx(2.25 * 0.525 + 0.75 * 0.225)


def test_balance_is_worth_one_and_imbalance_more():
    n, e = 60, 6
    even = torch.full((n, e), 0.1)
    even[torch.arange(n), torch.arange(n) % e] = 0.9
    uneven = torch.full((n, e), 0.1)
    uneven[:, 0] = 0.9
    none = torch.zeros(n, 1, dtype=torch.long)
    assert balance_loss(Routing(even, none, none.float())).item() == pytest.approx(1)
    assert balance_loss(Routing(uneven, none, none.float())).item() > 3


def test_the_balance_loss_pulls_affinities_of_busy_experts_down():
    logits = torch.zeros(8, 4, requires_grad=True)
    s = (logits + torch.tensor([1.0, 0, 0, 0])).sigmoid()
    balance_loss(Routing(s, torch.zeros(8, 1, dtype=torch.long), torch.ones(8, 1))).backward()
    assert (logits.grad[:, 0] > 0).all()  # a step against the gradient lowers it
    assert (logits.grad[:, 1:] < 0).all()


def test_the_bias_moves_by_its_speed_towards_balance():
    router = gate(n_experts=4)
    router.bias.zero_()
    update_bias(router, torch.tensor([9, 5, 1, 5]), speed=0.25)
    assert router.bias.tolist() == [-0.25, 0.0, 0.25, 0.0]


def test_the_bias_balances_a_router_that_is_not():
    router, x = gate(n_experts=8), torch.randn(400, 16) + 0.5
    router.bias.zero_()
    before = load_violation(router(x).load())
    for _ in range(300):
        update_bias(router, router(x).load(), speed=0.003)
    assert before > 0.5
    assert load_violation(router(x).load()) < 0.15


def test_watch_sees_every_layer_in_order_and_leaves_nothing_behind():
    model, tokens = moe_model(), torch.randint(40, (2, 5))
    with watch(model) as seen:
        model(tokens)
    assert len(seen) == 2
    with pytest.raises(ValueError, match="positions"), watch(model):
        model(tokens[:, :0])
    model(tokens)
    assert len(seen) == 2
    assert not any(module._forward_hooks for module in model.modules())
    x = model.layers[1].ffn_norm(torch.randn(2, 5, 16))
    with watch(model) as one:
        model.layers[1].ffn(x)
    assert torch.equal(one[0].scores, model.layers[1].ffn.gate(x.flatten(0, 1)).scores)


def gates(model: Transformer) -> list[Gate]:
    return [m for m in model.modules() if isinstance(m, Gate)]


@pytest.mark.parametrize("scope", ["sequence", "batch"])
def test_the_balanced_loss_is_the_loss_and_the_auxiliary_ones(scope):
    model, tokens = moe_model(), torch.randint(40, (3, 6))
    plain = cross_entropy(model, tokens)
    with watch(model) as routings:
        cross_entropy(model, tokens)
    extra = sum(balance_loss(r, 3 if scope == "sequence" else 1) for r in routings)
    value = balanced(cross_entropy, bias_speed=0.0, alpha=0.1, scope=scope)(model, tokens)
    torch.testing.assert_close(value, plain + 0.1 * extra)
    assert all((g.bias == 0).all() for g in gates(model))
    assert balanced(cross_entropy, bias_speed=0.0, alpha=0.0)(model, tokens).item() == plain.item()


def test_the_bias_moves_in_training_only_and_has_no_gradient():
    model, tokens = moe_model(), torch.randint(40, (3, 6))
    loss = balanced(cross_entropy, bias_speed=0.01, alpha=0.0)
    assert loss(model.eval(), tokens).item() == cross_entropy(model, tokens).item()
    assert all((g.bias == 0).all() for g in gates(model))
    with watch(model) as routings:
        cross_entropy(model, tokens)
    loss(model.train(), tokens).backward()
    for g, routing in zip(gates(model), routings, strict=True):
        load = routing.load().float()
        torch.testing.assert_close(g.bias, 0.01 * (load.mean() - load).sign())
        assert not g.bias.requires_grad
    assert {name for name in model.state_dict() if name.endswith("gate.bias")} == {
        f"layers.{i}.ffn.gate.bias" for i in (1, 2)
    }


def test_an_unknown_scope_is_refused():
    with pytest.raises(ValueError, match=r"scope='token'; use \"sequence\" or \"batch\""):
        balanced(cross_entropy, scope="token")


def test_the_first_layers_stay_dense_and_shared_experts_are_one_wide_one():
    model = moe_model(n_shared_experts=3)
    assert [isinstance(layer.ffn, MoE) for layer in model.layers] == [False, True, True]
    assert model.layers[1].ffn.shared.w2.weight.shape == (16, 24)
    assert moe_model(n_shared_experts=0).layers[1].ffn.shared is None


def test_a_router_in_bfloat16_scores_in_float32():
    router, x = gate().bfloat16(), torch.randn(50, 16).bfloat16()
    routing = router(x)
    exact = (x.float() @ router.weight.float().T).sigmoid()
    torch.testing.assert_close(routing.scores, exact)  # of the same type as well
    assert routing.weights.dtype == torch.bfloat16


def test_balance_has_the_strength_of_v3_unless_told_otherwise():
    model, tokens = moe_model(), torch.randint(40, (3, 6))
    with watch(model) as routings:
        model(tokens[:, :-1])
    expected = 1e-4 * sum(balance_loss(r, sequences=3) for r in routings)
    value = balanced(lambda model, tokens: 0 * cross_entropy(model, tokens))(model, tokens)
    torch.testing.assert_close(value, expected, atol=0, rtol=1e-5)
    for g, routing in zip(gates(model), routings, strict=True):
        load = routing.load().float()
        torch.testing.assert_close(g.bias, 1e-3 * (load.mean() - load).sign())
