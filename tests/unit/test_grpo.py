import copy
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch.testing import assert_close

from mini import grpo as module
from mini.distill import masked_mean
from mini.grpo import (
    Settings,
    advantages,
    gains,
    grpo,
    kl_estimate,
    policy_loss,
    ratios,
    rollout,
    token_logprobs,
)
from mini.sample import sample
from mini.train import Settings as Training

from .test_model import random_model

END = 0
MASK = torch.tensor([[True, True, False, False], [True, True, True, True]])  # answers of 2 and of 4 tokens
A = torch.tensor([1.0, -1.0])


def logprobs_like(mask: torch.Tensor, seed: int = 0) -> torch.Tensor:
    return -torch.rand(mask.shape, generator=torch.Generator().manual_seed(seed)) * 3


# --- advantages


def test_advantages_by_hand():
    rewards = torch.tensor([[1.0, 1.0, -1.0, -1.0], [1.0, 0.0, 0.0, 0.0], [3.0, 3.0, 3.0, 3.0]])
    deviation = math.sqrt(4 / 3)  # of the first: four squares of 1, over G - 1 = 3
    assert_close(advantages(rewards)[0], torch.tensor([1.0, 1.0, -1.0, -1.0]) / (deviation + 1e-4))
    assert advantages(rewards)[0, 0].item() == pytest.approx(0.866, abs=1e-3)
    assert_close(advantages(rewards)[1], torch.tensor([0.75, -0.25, -0.25, -0.25]) / (0.5 + 1e-4))
    assert (advantages(rewards)[2] == 0).all()
    assert_close(advantages(rewards, scale=False)[1], torch.tensor([0.75, -0.25, -0.25, -0.25]))
    pair = advantages(torch.tensor([[1.0, 0.0]]))  # the smallest group there is
    assert_close(pair, torch.tensor([[0.5, -0.5]]) / (0.5**0.5 + 1e-4))


rewards_of_groups = st.lists(st.lists(st.floats(-10, 10), min_size=4, max_size=4), min_size=1, max_size=5)


@given(rewards=rewards_of_groups, shift=st.floats(-5, 5), factor=st.floats(0.1, 5), scale=st.booleans())
@hypothesis_settings(max_examples=60, deadline=None)
def test_a_group_is_measured_by_itself(rewards, shift, factor, scale):
    """Advantages sum to 0 in each group; shifting the rewards changes nothing; other groups do not matter."""
    r = torch.tensor(rewards, dtype=torch.float64)
    a = advantages(r, scale)
    assert_close(a.sum(dim=1), torch.zeros(len(r), dtype=a.dtype), atol=1e-9, rtol=0)
    assert_close(advantages(r + shift, scale), a, atol=1e-6, rtol=1e-6)
    for i in range(len(r)):
        assert_close(advantages(r[i : i + 1], scale)[0], a[i])
    if not scale:
        assert_close(advantages(factor * r, scale), factor * a)


@pytest.mark.parametrize("p", [0.25, 0.5, 0.875])
def test_scaled_advantages_of_right_and_wrong(p):
    """√((1 - p) / p) for a right answer and -√(p / (1 - p)) for a wrong one, at a share p of right ones."""
    rewards = (torch.arange(800) < 800 * p).float()[None]
    a = advantages(rewards)[0]
    assert a[0].item() == pytest.approx(math.sqrt((1 - p) / p), rel=2e-3)
    assert a[-1].item() == pytest.approx(-math.sqrt(p / (1 - p)), rel=2e-3)


# --- the KL


def distributions() -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    scores, reference = torch.randn(2, 6, generator=g, dtype=torch.float64)
    return scores.requires_grad_(), reference.log_softmax(-1)


def kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return (p.exp() * (p - q)).sum()


def expected(kind: str, logp: torch.Tensor, ref: torch.Tensor, times_ratio: bool = False) -> torch.Tensor:
    """The mean over tokens that π draws, all of them: the draw has no gradient, the estimate has."""
    rho = (logp - logp.detach()).exp() if times_ratio else 1
    return (logp.detach().exp() * kl_estimate(logp, ref, kind) * rho).sum()


def test_what_the_estimates_are_on_average():
    scores, ref = distributions()
    logp = scores.log_softmax(-1)
    true = kl(logp, ref)
    assert_close(expected("k1", logp, ref), true)
    assert_close(expected("k3", logp, ref), true)
    assert abs(expected("k2", logp, ref) - true) > 0.01
    assert abs(kl(ref, logp) - true) > 0.01  # with π and π_ref swapped, another number
    assert (kl_estimate(logp, ref, "k1") < 0).any()
    assert (kl_estimate(logp, ref, "k2") > 0).all()
    assert (kl_estimate(logp, ref, "k3") > 0).all()


@pytest.mark.parametrize(
    ("kind", "times_ratio", "true"),
    [
        ("k1", False, lambda logp, ref: 0 * logp.sum()),
        ("k2", False, lambda logp, ref: kl(logp, ref)),
        ("k3", False, lambda logp, ref: kl(ref, logp)),
        ("k3", True, lambda logp, ref: kl(logp, ref)),
    ],
)
def test_whose_gradient_the_estimates_have(kind, times_ratio, true):
    scores, ref = distributions()
    ours = torch.autograd.grad(expected(kind, scores.log_softmax(-1), ref, times_ratio), scores)[0]
    theirs = torch.autograd.grad(true(scores.log_softmax(-1), ref), scores)[0]
    assert_close(ours, theirs, atol=1e-12, rtol=1e-9)


def test_the_kl_by_hand():
    """π gives the token 1/2, the reference 1/4: ln r = -ln 2."""
    half, quarter = torch.tensor(0.5).log(), torch.tensor(0.25).log()
    two = math.log(2)
    assert kl_estimate(half, quarter, "k1").item() == pytest.approx(two)
    assert kl_estimate(half, quarter, "k2").item() == pytest.approx(two**2 / 2)
    assert kl_estimate(half, quarter, "k3").item() == pytest.approx(0.5 + two - 1)


# --- the loss


@pytest.mark.parametrize(
    ("average", "weights"),  # of a token of the answer of 2 tokens, and of that of 4; max_new_tokens is 10
    [("sequence", (1 / 4, 1 / 8)), ("batch", (1 / 6, 1 / 6)), ("constant", (1 / 20, 1 / 20))],
)
@pytest.mark.parametrize("ratio", ["token", "sequence-mean"])
def test_the_gradient_of_the_first_update_by_hand(average, weights, ratio):
    """The ratio is 1 in value, and each token's log-probability has the gradient -A × its weight."""
    logprobs = logprobs_like(MASK).requires_grad_()
    settings = Settings(average=average, ratio=ratio, max_new_tokens=10)
    loss = policy_loss(logprobs, logprobs.detach(), A, MASK, settings)
    gradient = torch.autograd.grad(loss, logprobs)[0]
    each = torch.tensor(weights)[:, None] * -A[:, None]
    assert_close(gradient, (each * MASK).float())
    value = {"sequence": 0.0, "batch": (4 - 2) / 6, "constant": (0.4 - 0.2) / 2}[average]
    assert loss.item() == pytest.approx(value, abs=1e-6)


def test_the_loss_by_hand_with_ratios():
    """Ratios 1.5 and 0.9 with A = 1, then 0.5, 1.1, 1, 1 with A = -1; the clip takes 1.5 to 1.2 and 0.5 to 0.8."""
    rho = torch.tensor([[1.5, 0.9, 7.0, 7.0], [0.5, 1.1, 1.0, 1.0]])
    old = logprobs_like(MASK)
    loss = partial(policy_loss, old + rho.log(), old, A, MASK)
    assert loss(Settings()).item() == pytest.approx(-((1.2 + 0.9) / 2 - (0.8 + 1.1 + 1 + 1) / 4) / 2)
    assert loss(Settings(average="batch")).item() == pytest.approx(-(2.1 - 3.9) / 6)
    assert loss(Settings(epsilon_high=0.4)).item() == pytest.approx(-((1.4 + 0.9) / 2 - 3.9 / 4) / 2)
    whole = 1.35, 0.55  # products; the first is clipped to 1.2, the second to 0.8
    assert loss(Settings(ratio="sequence", epsilon=10.0)).item() == pytest.approx(-(whole[0] - whole[1]) / 2)
    assert loss(Settings(ratio="sequence")).item() == pytest.approx(-(1.2 - 0.8) / 2)
    means = 1.35**0.5, 0.55**0.25
    gspo = Settings(ratio="sequence-mean")
    assert loss(gspo).item() == pytest.approx(-(means[0] - means[1]) / 2)
    assert_close(ratios(old + rho.log(), old, MASK)[MASK], rho[MASK])


@pytest.mark.parametrize(
    ("rho", "a", "learns"),
    [(1.3, 1.0, False), (0.7, -1.0, False), (1.3, -1.0, True), (0.7, 1.0, True), (1.1, 1.0, True)],
)
def test_the_clip_stops_what_has_gone_far_enough_and_nothing_else(rho, a, learns):
    old = torch.zeros(1, 1)
    logprobs = torch.full((1, 1), math.log(rho), requires_grad=True)
    mask, a = torch.ones(1, 1, dtype=torch.bool), torch.tensor([a])
    gradient = torch.autograd.grad(policy_loss(logprobs, old, a, mask, Settings()), logprobs)[0]
    assert (gradient != 0).item() == learns
    free, cut = gains(ratios(logprobs, old, mask), a, Settings())
    assert (cut < free).item() != learns


@pytest.mark.parametrize("average", ["sequence", "batch", "constant"])
@pytest.mark.parametrize("ratio", ["token", "sequence", "sequence-mean"])
def test_what_is_not_of_the_answers_does_not_count(average, ratio):
    settings = Settings(average=average, ratio=ratio, beta=0.1, kl_times_ratio=True)
    values, gradients = [], []
    for other in (-1.0, -500.0, 90.0):
        logprobs = logprobs_like(MASK).masked_fill(~MASK, other).requires_grad_()
        old, ref = logprobs_like(MASK, 1), logprobs_like(MASK, 2)
        values.append(policy_loss(logprobs, old, A, MASK, settings, ref))
        gradients.append(torch.autograd.grad(values[-1], logprobs)[0])
        assert (gradients[-1][~MASK] == 0).all()
    assert values[0] == values[1] == values[2]
    assert gradients[0].equal(gradients[1])


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_the_kl_is_added_token_by_token(kind):
    logprobs, ref = logprobs_like(MASK), logprobs_like(MASK, 1)
    without, with_kl = (
        policy_loss(logprobs, logprobs, A, MASK, Settings(average="batch", beta=beta, kl=kind), ref)
        for beta in (0, 0.5)
    )
    assert_close(with_kl - without, 0.5 * kl_estimate(logprobs, ref, kind)[MASK].mean())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Settings(G=1), "G=1: an answer is compared with others"),
        (lambda: Settings(temperature=0.0), "temperature=0.0 must be above 0"),
        (lambda: Settings(epochs=0), "epochs=0"),
        (lambda: Settings(minibatches=0), "minibatches=0"),
        (lambda: Settings(ratio="gspo"), "ratio='gspo'; use one of token, sequence, sequence-mean"),
        (lambda: Settings(average="dapo"), "average='dapo'; use one of sequence, batch, constant"),
        (lambda: Settings(kl="k4"), "kl='k4'; use one of k1, k2, k3"),
        (lambda: kl_estimate(A, A, "reverse"), "kind='reverse'; use one of k1"),
        (lambda: advantages(torch.ones(3, 1)), "a group of 1 has nothing to be compared with"),
        (
            lambda: policy_loss(logprobs_like(MASK), logprobs_like(MASK), A, MASK, Settings(beta=0.1)),
            "beta=0.1 needs ref_logprobs",
        ),
    ],
)
def test_bad_settings_are_refused_with_the_fix(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --- log-probabilities and rollouts


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probabilities_are_those_of_each_row_alone(temperature):
    model, g = random_model(), torch.Generator().manual_seed(0)
    rows = torch.randint(50, (11, 20), generator=g)
    lengths = torch.randint(2, 21, (11,), generator=g)
    rows = rows.masked_fill(torch.arange(20) >= lengths[:, None], -1)
    logprobs, entropy = token_logprobs(model, rows, temperature, chunk=4)
    for row, n, ours, spread in zip(rows, lengths, logprobs, entropy, strict=True):
        logp = (model(row[None, : n - 1])[0] / temperature).log_softmax(-1)
        assert_close(ours[: n - 1], logp.gather(1, row[1:n, None])[:, 0], atol=1e-5, rtol=0)
        assert_close(spread[: n - 1], -(logp.exp() * logp).sum(-1), atol=1e-5, rtol=0)
        assert (ours[n - 1 :] == 0).all()
        assert (spread[n - 1 :] == 0).all()
    assert logprobs.requires_grad
    assert not entropy.requires_grad


PROMPTS = [[1, 2, 3, 4], [5], [6, 7]]


def answered(temperature: float) -> tuple[module.Rollout, list, torch.nn.Module]:
    """A rollout of a model that soon ends its answers, what the reward was asked, and the model."""
    model, asked = random_model(), []
    with torch.no_grad():
        model.embed.weight[END] *= 3

    def reward(prompt: list[int], answer: list[int]) -> float:
        asked.append((prompt, answer))
        return len(answer) + prompt[0] / 10

    settings = Settings(G=4, max_new_tokens=12, temperature=temperature)
    g = torch.Generator().manual_seed(3)
    return rollout(model, PROMPTS, reward, settings, end=END, generator=g), asked, model


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_a_rollout_holds_answers_their_places_and_their_rewards(temperature):
    new, asked, model = answered(temperature)
    assert [prompt for prompt, _ in asked] == [p for p in PROMPTS for _ in range(4)]
    assert new.rewards.flatten().tolist() == pytest.approx([len(a) + p[0] / 10 for p, a in asked])
    logprobs = token_logprobs(model, new.rows, temperature)[0]
    ended = 0
    for row, mask, own, again, (prompt, answer) in zip(
        new.rows, new.mask, new.logprobs, logprobs, asked, strict=True
    ):
        assert row[row >= 0].tolist() == prompt + answer
        assert row[1:][mask].tolist() == answer
        assert END not in answer[:-1]
        assert answer[-1] == END or len(answer) == 12
        ended += answer[-1] == END
        assert_close(own[mask], again[mask], atol=1e-5, rtol=0)  # of the policy that drew them, as it drew
        assert (own[~mask] == 0).all()
    assert ended > 0
    assert new.mask.sum(dim=1).unique().numel() > 2


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_reward_that_is_no_finite_number_is_refused(bad):
    with pytest.raises(ValueError, match=f"a reward is {bad}"):
        rollout(random_model(), PROMPTS, lambda p, a: bad, Settings(max_new_tokens=2), end=END)


# --- the loop


def prompts(i: int) -> list[list[int]]:
    return torch.randint(1, 50, (4, 3), generator=torch.Generator().manual_seed(i)).tolist()


def sevens(prompt: list[int], answer: list[int]) -> float:
    return answer.count(7) / len(answer)


SHORT = Settings(G=4, max_new_tokens=8)
PLAN = Training(steps=6, lr=0.01, matrix_lr=0.0, warmup=1, decay=0.0, weight_decay=0.0)


def run(model, settings=SHORT, plan=PLAN, reward=sevens, **more) -> list[dict]:
    return grpo(model, prompts, reward, settings, plan, end=END, progress=False, **more)


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(map(torch.equal, a.state_dict().values(), b.state_dict().values()))


def test_a_model_learns_what_is_rewarded():
    model = random_model()
    rows = run(model, plan=replace(PLAN, steps=30))
    assert rows[0]["reward"] < 0.1
    assert rows[-1]["reward"] > 0.5
    drawn = sample(model, prompts(1000), 8, generator=torch.Generator().manual_seed(0)).tokens
    assert (drawn == 7).float().mean() > 0.5  # on prompts that it has not seen
    assert rows[-1]["entropy"] < rows[0]["entropy"]


def test_equal_rewards_teach_nothing():
    model = random_model()
    before = copy.deepcopy(model)
    rows = run(model, reward=lambda p, a: 1.0)
    assert same(model, before)
    assert all(row["silent"] == 1 and row["grad_norm"] == 0 for row in rows)


def test_all_texts_of_an_answer_have_its_advantage():
    """An answer that comes twice over, as two texts, is learned from as if it came once."""

    def twice(*args, **options):
        once = rollout(*args, **options)
        rows, mask, logprobs = (x.repeat_interleave(2, dim=0) for x in (once.rows, once.mask, once.logprobs))
        return replace(once, rows=rows, mask=mask, logprobs=logprobs)

    one, two = random_model(), random_model()
    expected = run(one)
    found = run(two, replace(SHORT, texts=2), draw=twice)
    assert [row["reward"] for row in found] == pytest.approx([row["reward"] for row in expected])
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_the_columns_are_those_of_the_rollout_and_the_update():
    model = random_model()
    with torch.no_grad():
        model.embed.weight[END] *= 3
    start = copy.deepcopy(model)
    settings = replace(SHORT, epochs=2, minibatches=2)
    rows = run(model, settings, replace(PLAN, steps=8), reference=start)
    g = torch.Generator().manual_seed(0)
    first = rollout(start, prompts(0), sevens, settings, end=END, generator=g)
    assert [row["reward"] for row in rows[:4]] == pytest.approx([first.rewards.mean().item()] * 4)
    assert rows[0]["length"] == pytest.approx(first.mask.sum(dim=1).float().mean().item())
    ended = [END in row[row >= 0].tolist() for row in first.rows]
    assert rows[0]["ended"] == pytest.approx(sum(ended) / 16)
    silent = (first.rewards == first.rewards[:, :1]).all(dim=1).float().mean().item()
    assert rows[0]["silent"] == pytest.approx(silent)
    assert abs(rows[0]["kl"]) < 1e-5 < 1e-3 < rows[4]["kl"]
    assert rows[4]["reward"] != rows[3]["reward"]
    assert rows[0]["clipped"] == 0  # nothing has moved yet
    assert max(row["clipped"] for row in rows[1:4]) > 0
    assert rows[0]["entropy"] != rows[1]["entropy"]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_first_update_is_on_the_policys_own_answers(temperature):
    """At the temperature at which they were drawn, all ratios are 1: the loss is minus the mean of advantages, 0."""
    settings = replace(SHORT, temperature=temperature, epsilon=1e-4)
    model = random_model()
    row = run(model, settings, replace(PLAN, steps=1), reference=copy.deepcopy(model))[0]
    assert row["grad_norm"] > 0.01
    assert abs(row["loss"]) < 1e-5
    assert abs(row["kl"]) < 1e-5
    assert row["clipped"] == 0


def test_every_rollout_draws_anew():
    """Nothing is learned here, and the prompts stay the same."""
    still = replace(PLAN, lr=0.0, steps=4)

    def total(prompt: list[int], answer: list[int]) -> float:
        return float(sum(answer))

    runs = [
        grpo(random_model(), lambda i: prompts(0), total, SHORT, still, end=END, seed=seed, progress=False)
        for seed in (0, 0, 1)
    ]
    rewards = [[row["reward"] for row in rows] for rows in runs]
    assert len(set(rewards[0])) == 4
    assert rewards[0] == rewards[1]
    assert not set(rewards[0]) & set(rewards[2])


def test_clipped_is_the_share_of_tokens_without_gradient(monkeypatch):
    shares = []
    original = module.policy_loss

    def spy(logprobs, old, a, mask, *rest):
        loss = original(logprobs, old, a, mask, *rest)
        gradient = torch.autograd.grad(loss, logprobs, retain_graph=True)[0]
        assert (a != 0).all()  # otherwise they would have no gradient anyway
        shares.append((gradient[mask] == 0).float().mean().item())
        return loss

    monkeypatch.setattr(module, "policy_loss", spy)
    rows = run(
        random_model(),
        replace(SHORT, epochs=4, epsilon=0.05),
        replace(PLAN, steps=4),
        reward=lambda prompt, answer: sum(answer) / 7 + prompt[0],
    )
    assert [row["clipped"] for row in rows] == pytest.approx(shares)
    assert 0 < shares[-1] < 1


def test_the_loss_gets_what_the_settings_and_the_reference_say(monkeypatch):
    """Unscaled advantages and another model's log-probabilities, in whatever order the answers come."""
    drawn, seen, reference = [], [], random_model(1)
    original = module.policy_loss

    def draw(*args, **options):
        drawn.append(rollout(*args, **options))
        return drawn[-1]

    def spy(logprobs, old, a, mask, settings, ref):
        seen.append((a, (ref * mask).sum(dim=1)))
        return original(logprobs, old, a, mask, settings, ref)

    monkeypatch.setattr(module, "policy_loss", spy)
    settings = replace(SHORT, scale=False, beta=0.1)
    row = run(random_model(), settings, replace(PLAN, steps=1), reference=reference, draw=draw)[0]
    (new,), ((a, refs),) = drawn, seen
    assert_close(a.sort().values, advantages(new.rewards, scale=False).flatten().sort().values)
    known = token_logprobs(reference, new.rows)[0].detach()
    assert_close(refs.sort().values, (known * new.mask).sum(dim=1).sort().values)
    assert row["kl"] == pytest.approx(masked_mean(kl_estimate(new.logprobs, known), new.mask).item())


@pytest.mark.parametrize("stop", [3, 4, 6], ids=lambda n: f"update {n}")
def test_a_resumed_run_repeats_itself_from_between_two_updates_too(tmp_path, stop):
    """Four updates a rollout, saved after each, and a power cut before update number `stop`."""
    settings = replace(SHORT, epochs=2, minibatches=2, beta=0.05)
    plan = replace(PLAN, steps=10, save_every=1, decay=0.5)
    start = random_model()
    whole, broken, resumed = (copy.deepcopy(start) for _ in range(3))
    history = run(whole, settings, plan, reference=start)
    path = tmp_path / "run.safetensors"

    calls = []

    def cut(model):
        calls.append(1)
        if len(calls) == stop:
            raise RuntimeError("power cut")
        return {}

    with pytest.raises(RuntimeError, match="power cut"):
        run(broken, settings, replace(plan, eval_every=1), reference=start, checkpoint=path, evaluate=cut)
    again = run(resumed, settings, plan, reference=start, checkpoint=path)
    assert same(whole, resumed)
    for ours, theirs in zip(again, history, strict=True):
        assert {k: v for k, v in ours.items() if k != "seconds"} == {
            k: v for k, v in theirs.items() if k != "seconds"
        }


@pytest.mark.parametrize(
    ("other", "name"), [({"beta": 0.1}, "objective"), ({"epsilon": 0.1}, "objective"), ({}, "seed")]
)
def test_a_run_does_not_go_on_under_another_objective_or_seed(tmp_path, other, name):
    start, path = random_model(), tmp_path / "run.safetensors"
    run(copy.deepcopy(start), SHORT, replace(PLAN, steps=2), checkpoint=path)
    with pytest.raises(ValueError, match=f"was saved with {name}="):
        run(
            start,
            replace(SHORT, **other),
            replace(PLAN, steps=2),
            reference=start,
            checkpoint=path,
            seed=0 if other else 1,
        )


def test_minibatches_together_are_the_rollout(monkeypatch):
    """In each epoch every answer is learned from once, in another order."""
    seen = []
    original = module.policy_loss

    def spy(logprobs, old, a, mask, *rest):
        seen.append(old.sum(dim=1).tolist())
        return original(logprobs, old, a, mask, *rest)

    monkeypatch.setattr(module, "policy_loss", spy)
    run(random_model(), replace(SHORT, epochs=2, minibatches=4), replace(PLAN, steps=8))
    epochs = [[x for part in seen[at : at + 4] for x in part] for at in (0, 4)]
    assert sorted(epochs[0]) == pytest.approx(sorted(epochs[1]))
    assert epochs[0] != pytest.approx(epochs[1])
    assert len(set(epochs[0])) == 16


def test_evaluation_runs_when_asked_and_at_the_end():
    rows = run(random_model(), plan=replace(PLAN, eval_every=4), evaluate=lambda model: {"score": 1.0})
    assert [row["step"] for row in rows if "score" in row] == [4, 6]


def test_a_call_that_cannot_work_is_refused():
    model = random_model()
    with pytest.raises(
        ValueError, match=r"beta=0.1 needs a reference; give reference=copy.deepcopy\(model\)"
    ):
        run(model, replace(SHORT, beta=0.1))
    with pytest.raises(ValueError, match="minibatches=3 do not divide the 16 answers"):
        run(model, replace(SHORT, minibatches=3))
    with pytest.raises(ValueError, match="3 prompts, and 4 at step 0; give as many at every step"):
        grpo(model, lambda i: prompts(i)[i:], sevens, SHORT, PLAN, end=END, progress=False)
