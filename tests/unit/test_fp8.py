"""FP8: formats against PyTorch's and against brute force, scales by hand, products against explicit ones."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mini.fp8 import (
    BF16,
    E4M3,
    E5M2,
    FP8Experts,
    FP8Linear,
    Product,
    Quantized,
    Recipe,
    cut,
    decode,
    dequantize,
    encode,
    matmul,
    quantize,
    to_fp8,
)
from mini.model import Config, Transformer, cross_entropy
from mini.train import Settings, optimizers, train

FP8 = pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=lambda fmt: fmt.name)
MOE = Config(
    vocab_size=40,
    dim=32,
    n_layers=2,
    n_heads=2,
    inter_dim=48,
    n_dense_layers=1,
    n_routed_experts=4,
    n_shared_experts=1,
    n_activated_experts=2,
    moe_inter_dim=16,
)
finite = st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-1e6, max_value=1e6)


def grid(fmt):
    """All finite numbers of a format, from PyTorch's own reading of its codes."""
    values = torch.arange(256, dtype=torch.uint8).view(fmt.dtype).float()
    return values[values.isfinite()]


# --- formats


@pytest.mark.parametrize(
    ("fmt", "largest", "normal", "subnormal"),
    [
        (E4M3, 448.0, 2**-6, 2**-9),
        (E5M2, 57344.0, 2**-14, 2**-16),
        (BF16, torch.finfo(torch.bfloat16).max, 2.0**-126, 2.0**-133),
    ],
)
def test_range(fmt, largest, normal, subnormal):
    assert (fmt.largest, fmt.smallest_normal, fmt.smallest_subnormal) == (largest, normal, subnormal)


@FP8
def test_all_codes_mean_what_pytorch_says(fmt):
    codes = torch.arange(256)
    expected = codes.to(torch.uint8).view(fmt.dtype).float()
    ours = decode(codes, fmt)
    assert ours.isnan().equal(expected.isnan())
    assert ours.signbit()[~ours.isnan()].equal(expected.signbit()[~ours.isnan()])  # both zeros
    torch.testing.assert_close(ours, expected, rtol=0, atol=0, equal_nan=True)


@FP8
def test_every_number_of_a_format_keeps_its_code(fmt):
    codes = torch.arange(256)
    codes = codes[~decode(codes, fmt).isnan()]
    assert encode(decode(codes, fmt), fmt).equal(codes)


@FP8
def test_edges(fmt):
    big, small = fmt.largest, fmt.smallest_subnormal
    beyond = math.inf if fmt.infinities else big
    last = big - decode(torch.tensor(fmt.top - fmt.infinities - 1), fmt).item()  # the last step of the grid
    cases = {
        0.0: 0.0,
        big: big,
        big + last / 2 - 1: big,
        big + last / 2: beyond,  # the tie goes to even, which is the next
        1e30: beyond,
        math.inf: beyond,
        small: small,
        small / 2: 0.0,  # a tie, and zero is even
        small * 0.51: small,
        small * 1.5: 2 * small,
        small * 2.5: 2 * small,
    }
    x = torch.tensor(list(cases))
    expected = torch.tensor(list(cases.values()))
    assert decode(encode(x, fmt), fmt).equal(expected)
    assert decode(encode(-x, fmt), fmt).equal(-expected)
    assert decode(encode(torch.tensor([math.nan]), fmt), fmt).isnan().all()


@FP8
@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(width=32), min_size=1, max_size=40))
def test_codes_are_those_of_pytorchs_cast(fmt, values):
    x = torch.tensor(values)
    x = x[~x.isnan() & (fmt.infinities | (x.abs() < 464))]  # before torch 2.12, E4M3 did not saturate
    assert encode(x, fmt).equal(x.to(fmt.dtype).view(torch.uint8).long())


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=40))
def test_bfloat16_is_a_format_like_others(values):
    x = torch.tensor(values)
    assert encode(x, BF16).equal(x.bfloat16().view(torch.uint16).long())
    torch.testing.assert_close(decode(encode(x, BF16), BF16), x.bfloat16().float(), rtol=0, atol=0)


@FP8
@settings(max_examples=200, deadline=None)
@given(finite)
def test_nearest_and_even(fmt, value):
    """By brute force over all numbers of the format."""
    x = torch.tensor(value).clamp(-fmt.largest, fmt.largest)
    got = decode(encode(x, fmt), fmt)
    distance = (grid(fmt).double() - x.double()).abs()
    assert (got.double() - x.double()).abs() == distance.min()
    nearest = grid(fmt)[distance == distance.min()].unique()
    if len(nearest) == 2:
        assert encode(got, fmt) % 2 == 0


@FP8
@settings(max_examples=100, deadline=None)
@given(finite, finite)
def test_monotone(fmt, a, b):
    low, high = decode(encode(torch.tensor(sorted((a, b))), fmt), fmt)
    assert low <= high


# --- scales and tiles


def test_scales_by_hand():
    x = torch.tensor([[1.0, -4.0, 0.5, 0.0], [2.0, 0.0, 0.0, -7.0]])
    scales = {
        None: [[7.0]],
        (1, 2): [[4.0, 0.5], [2.0, 7.0]],
        (2, 1): [[2.0, 4.0, 0.5, 7.0]],
        (1, 3): [[4.0, 0.0], [2.0, 7.0]],  # the last tile reaches over the edge
        (2, 3): [[4.0, 7.0]],
        (128, 128): [[7.0]],
    }
    for tile, amax in scales.items():
        expected = torch.tensor(amax).clamp(min=1e-12) / 448
        assert quantize(x, tile).scale.equal(expected), tile
    q = quantize(torch.tensor([[3.0, 6.0, -1.0]]), None)
    assert q.values.float().tolist() == [[224.0, 448.0, -72.0]]  # -74.67 lies between 72 and 80
    torch.testing.assert_close(dequantize(q), torch.tensor([[3.0, 6.0, -72 * 6 / 448]]))


@FP8
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (128, 256), (130, 257), (2, 40, 30), (0, 7)])
@pytest.mark.parametrize("tile", [None, (1, 128), (128, 128), (128, 1), (7, 3)])
def test_tile_by_tile(fmt, shape, tile):
    """Each tile cut out by hand and rounded by itself; sizes that are no multiple of the tile too."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    q = quantize(x, tile, fmt)
    got = dequantize(q)
    assert q.values.shape == got.shape == x.shape
    assert q.values.dtype == fmt.dtype
    rows, columns = tile or (max(1, shape[-2]), shape[-1])
    for i in range(0, shape[-2], rows):
        for j in range(0, shape[-1], columns):
            part = x[..., i : i + rows, j : j + columns]
            scale = part.abs().amax(dim=(-2, -1), keepdim=True) / fmt.largest
            expected = decode(encode(part / scale, fmt), fmt) * scale
            assert got[..., i : i + rows, j : j + columns].equal(expected)
            assert q.scale[..., i // rows, j // columns].equal(scale[..., 0, 0])


@FP8
def test_nothing_is_further_than_half_a_step(fmt):
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(1))
    q = quantize(x, (1, 128), fmt)
    error = (dequantize(q) - x).abs()
    scale = q.scale.repeat_interleave(128, dim=1)
    half = torch.maximum(x.abs() * 2.0 ** -(fmt.mantissa_bits + 1), scale * fmt.smallest_subnormal / 2)
    assert (error <= half * 1.0001).all()
    assert (error > half * 0.85).any()  # the bound is no wider than it has to be


def test_a_token_of_zeros_and_one_beside_an_outlier():
    x = torch.zeros(2, 256)
    x[1, :128], x[1, 200] = 1.0, 1e7
    assert dequantize(quantize(x, (1, 128)))[0].equal(x[0])
    kept = dequantize(quantize(x, (1, 128)))[1]
    assert kept.allclose(x[1])
    lost = dequantize(quantize(x, None))[1]
    assert (lost[:128] == 0).all()


def test_nan_is_not_hidden():
    x = torch.ones(2, 4)
    x[0, 1] = torch.nan
    assert dequantize(quantize(x, (1, 2)))[0, :2].isnan().all()
    assert dequantize(quantize(x, (1, 2)))[1].isfinite().all()


@pytest.mark.parametrize("tile", [(0, 128), (1, -1)])
def test_a_tile_without_size_is_refused(tile):
    with pytest.raises(ValueError, match="rows, columns"):
        quantize(torch.ones(2, 2), tile)


# --- accumulation


@settings(max_examples=100, deadline=None)
@given(finite, st.integers(1, 24))
def test_cut_keeps_the_first_bits(value, bits):
    x = torch.tensor(value)
    mantissa, exponent = math.frexp(x.item())
    expected = math.ldexp(math.trunc(mantissa * 2**bits), exponent - bits)
    if x == 0 or x.abs() > 1e-37:  # below, float32 itself has fewer bits
        assert cut(x, bits).item() == expected


@pytest.mark.parametrize("promote", [None, 32, 64, 128])
@pytest.mark.parametrize("k", [32, 100, 128, 300])
def test_accumulator_step_by_step(promote, k):
    g = torch.Generator().manual_seed(k)
    a, b = torch.randn(5, k, generator=g), torch.randn(4, k, generator=g)
    expected = torch.zeros(5, 4)
    for m in range(5):
        for n in range(4):
            total = torch.tensor(0.0)
            accumulator = torch.tensor(0.0)
            for i in range(0, k, 32):
                accumulator = cut(accumulator + a[m, i : i + 32] @ b[n, i : i + 32], 8)
                if promote and (i + 32) % promote == 0:
                    total, accumulator = total + accumulator, torch.tensor(0.0)
            expected[m, n] = total + accumulator
    # a sum in another order may fall on the other side of a cut, which is one part in 128 of a partial sum
    difference = (matmul(a, b, 8, promote) - expected).abs()
    assert (difference < 1e-4).float().mean() > 0.8
    assert difference.max() < 0.2
    torch.testing.assert_close(matmul(a, b), a @ b.T)


def test_promotion_keeps_the_error_from_growing():
    g = torch.Generator().manual_seed(0)
    a, b = torch.rand(16, 4096, generator=g), torch.rand(16, 4096, generator=g)
    exact = a.double() @ b.double().T

    def error(bits, promote):
        return ((matmul(a, b, bits, promote) - exact) / exact).abs().max().item()

    assert 1e-3 < error(14, None) < 1e-2
    assert error(14, 128) < 3e-4
    assert error(24, None) < 1e-5


@pytest.mark.parametrize("wrong", [dict(bits=0), dict(bits=25), dict(bits=14, promote=16), dict(promote=100)])
def test_accumulators_that_are_none_are_refused(wrong):
    with pytest.raises(ValueError, match=r"bits=|promote="):
        matmul(torch.ones(2, 32), torch.ones(2, 32), **wrong)


# --- layers


def twins(i=40, o=30, recipe=None):
    torch.manual_seed(0)
    linear = nn.Linear(i, o, bias=False)
    return linear, FP8Linear(linear, recipe or Recipe())


RECIPES = {
    "V3": Recipe(),
    "V3 with tiles that do not fit": Recipe(activations=(1, 16), weights=(16, 16), gradients=(1, 16)),
    "per tensor": Recipe(activations=None, weights=None, gradients=None),
    "E5M2 backward": Recipe(backward=E5M2),
    "blocks of gradients": Recipe(gradients=(8, 8)),
    "bfloat16": Recipe(BF16, BF16),
    "14 bits": Recipe(accumulator_bits=14, promote=None),
}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_three_products(recipe):
    """Forward, the input's gradient and the weight's are products of explicitly rounded operands.

    In the same layout: an accumulator of 14 bits shows in which order a product is summed.
    """
    linear, layer = twins(recipe=recipe)
    x, grad = torch.randn(9, 40, requires_grad=True), torch.randn(9, 30)

    def rounded(t, tile, fmt):
        return dequantize(quantize(t, tile, fmt))

    def turn(tile):
        return tile and (tile[1], tile[0])

    y = layer(x)
    y.backward(grad)
    sums = recipe.accumulator_bits, recipe.promote
    x8 = rounded(x.detach(), recipe.activations, recipe.forward)
    w8 = rounded(linear.weight.detach(), recipe.weights, recipe.forward)
    torch.testing.assert_close(y.detach(), matmul(x8, w8, *sums))
    g_rows = rounded(grad, recipe.gradients, recipe.backward)
    torch.testing.assert_close(x.grad, matmul(g_rows, w8.mT, *sums))
    g_columns = rounded(grad, turn(recipe.gradients), recipe.backward)
    again = rounded(x8, turn(recipe.activations), recipe.forward)
    torch.testing.assert_close(linear.weight.grad, matmul(g_columns.mT, again.mT, *sums))


def test_recipes_differ():
    """Each switch of the recipe changes a result; else the test above could compare nothing with nothing."""
    seen = []
    for recipe in RECIPES.values():
        linear, layer = twins(i=64, recipe=recipe)
        x = torch.randn(9, 64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y = layer(x)
        y.square().sum().backward()
        seen.append(torch.cat([y.detach().flatten(), x.grad.flatten(), linear.weight.grad.flatten()]))
    for i, a in enumerate(seen):
        assert not any(a.equal(b) for b in seen[:i])


def test_gradients_are_near_the_true_ones_and_backward_keeps_eight_bits():
    linear, layer = twins(256, 128)
    x = torch.randn(64, 256)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        loss = layer(x).square().sum()
    large = sum(t.numel() * t.element_size() for t in kept if t.numel() in (x.numel(), layer.weight.numel()))
    assert large == x.numel() + layer.weight.numel()
    loss.backward()
    ours = linear.weight.grad.clone()
    linear.weight.grad = None
    linear(x).square().sum().backward()
    error = (ours - linear.weight.grad).norm() / linear.weight.grad.norm()
    assert 0.005 < error < 0.1


def test_what_is_not_said_is_as_in_v3():
    assert Recipe() == Recipe(E4M3, E4M3, (1, 128), (128, 128), (1, 128), 24, 128, True)
    g = torch.Generator().manual_seed(0)
    a, b = torch.rand(3, 512, generator=g), torch.rand(4, 512, generator=g)
    assert quantize(a).scale.equal(quantize(a, (1, 128), E4M3).scale)
    assert matmul(a, b, 10).equal(matmul(a, b, 10, 128))
    assert not matmul(a, b, 10).equal(matmul(a, b, 10, None))


def test_bias_and_leading_dimensions():
    torch.manual_seed(0)
    linear = nn.Linear(8, 6)
    layer = FP8Linear(linear, Recipe())
    x = torch.randn(2, 3, 8)
    expected = Product.apply(x.view(6, 8), linear.weight, Recipe()).view(2, 3, 6) + linear.bias
    assert layer(x).equal(expected)


def test_what_becomes_fp8_and_what_stays():
    torch.manual_seed(0)
    model = Transformer(MOE)
    names, parts = (
        list(model.state_dict()),
        {n: getattr(p, "parts", None) for n, p in model.named_parameters()},
    )
    before = [p.data_ptr() for p in model.parameters()]
    to_fp8(model)
    assert list(model.state_dict()) == names
    assert {n: getattr(p, "parts", None) for n, p in model.named_parameters()} == parts
    assert [p.data_ptr() for p in model.parameters()] == before
    kinds = {name: type(m).__name__ for name, m in model.named_modules()}
    eight = {name for name, kind in kinds.items() if kind.startswith("FP8")}
    assert eight == {
        *(f"layers.{i}.attn.{m}" for i in (0, 1) for m in ("wqkv", "wo")),
        *("layers.0.ffn.w13", "layers.0.ffn.w2", "layers.1.ffn.experts"),
        *("layers.1.ffn.shared.w13", "layers.1.ffn.shared.w2"),
    }
    assert kinds["layers.1.ffn.gate"] == "Gate"
    plain = Transformer(MOE)
    plain.load_state_dict(model.state_dict())  # weights load both ways
    groups = [[len(g["params"]) for g in o.param_groups] for o in optimizers(model, Settings(steps=1))]
    assert groups == [
        [len(g["params"]) for g in o.param_groups] for o in optimizers(plain, Settings(steps=1))
    ]


def test_a_second_recipe_replaces_nothing():
    model = to_fp8(Transformer(MOE))
    layers = [m for m in model.modules() if isinstance(m, FP8Linear)]
    to_fp8(model, Recipe(E5M2, E5M2))
    assert [m for m in model.modules() if isinstance(m, FP8Linear)] == layers


def test_experts_are_products_of_their_own():
    """Also one that no token goes to."""
    torch.manual_seed(0)
    plain = Transformer(MOE).layers[1].ffn.experts
    layer = FP8Experts(copy.deepcopy(plain), Recipe(BF16, BF16))
    x = torch.randn(7, 32, requires_grad=True)
    indices, weights = torch.tensor([[0, 2]] * 7), torch.rand(7, 2)
    torch.testing.assert_close(layer(x, indices, weights), plain(x, indices, weights), atol=2e-2, rtol=2e-2)
    layer(x, indices, weights).sum().backward()
    plain(x, indices, weights).sum().backward()
    assert (layer.w13.grad[1] == 0).all()
    torch.testing.assert_close(layer.w13.grad, plain.w13.grad, atol=3e-2, rtol=3e-2)
    eight = FP8Experts(copy.deepcopy(plain), Recipe())
    difference = (eight(x, indices, weights) - plain(x, indices, weights)).abs().max()
    assert difference > 1e-4


@pytest.mark.parametrize("master", [True, False])
def test_small_steps_survive_in_master_weights_alone(master):
    linear, layer = twins(32, 32, Recipe(master_weights=master))
    layer(torch.randn(4, 32))
    start = linear.weight.detach().clone()
    largest = start.abs() == start.abs().max()  # stands still, and the scale with it
    for _ in range(50):
        with torch.no_grad():
            # far below half a step, which is 3% or more
            linear.weight += 1e-3 * start.masked_fill(largest, 0.0)
        layer(torch.randn(4, 32))
    moved = (linear.weight.detach() / start)[(start != 0) & ~largest]
    if master:
        torch.testing.assert_close(moved, torch.full_like(moved, 1.05), atol=1e-4, rtol=0)
    else:
        torch.testing.assert_close(moved, torch.ones_like(moved), atol=1e-5, rtol=0)


def test_evaluation_never_changes_weights():
    linear, layer = twins(32, 32, Recipe(master_weights=False))
    layer.eval()
    before = linear.weight.detach().clone()
    layer(torch.randn(4, 32))
    assert linear.weight.equal(before)
    layer.train()(torch.randn(4, 32))
    assert not linear.weight.equal(before)


def test_a_model_in_evaluation_stays_in_evaluation():
    model = to_fp8(Transformer(MOE).eval(), Recipe(master_weights=False))
    before = copy.deepcopy(model.state_dict())
    model(torch.randint(MOE.vocab_size, (2, 8)))
    assert all(t.equal(before[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize("recipe", [Recipe(), Recipe(accumulator_bits=14), Recipe(master_weights=False)])
def test_it_trains(recipe):
    def data(step):
        return torch.arange(40).repeat(2)[None].expand(4, -1)[:, step % 7 : step % 7 + 33]

    torch.manual_seed(0)
    model = to_fp8(Transformer(MOE), recipe)
    history = train(model, data, Settings(steps=30, warmup=2), progress=False)
    assert history[-1]["loss"] < 0.5 * history[0]["loss"]
    assert cross_entropy(model, data(0)).isfinite()


def test_one_tile_for_all_is_the_same_as_per_tensor():
    x = torch.randn(20, 30)
    a, b = quantize(x, None), quantize(x, (20, 30))
    assert a.scale.equal(b.scale)
    assert dequantize(a).equal(dequantize(b))
    assert dequantize(replace(a, scale=2 * a.scale)).equal(2 * dequantize(a))
    assert isinstance(a, Quantized)
