"""FP8: numbers of eight bits, scales that make them fit, and matrix products that train with them. Chapter 06.

After DeepSeek-V3 (arXiv:2412.19437 §3.3). A tensor is cut into *tiles*. Each tile is divided by a *scale* which takes
its largest magnitude to the largest number of the format, and is then rounded:

    s = amax / largest,   x_q = round(x / s),   x ≈ s x_q

The three products of a linear layer read such tensors; all else stays in higher precision: the weights' own (master)
copy, gradients, optimiser, embedding, head, router, norms and attention itself.

Here products are *simulated*: the numbers are those of FP8, the arithmetic is float32. It shows what FP8 does to a
model, and what it does to memory, but it is slower than no FP8 at all.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from mini.moe import Experts

Tile = tuple[int, int] | None  # rows × columns that share a scale; None: the whole matrix


@dataclass(frozen=True)
class Format:
    """A floating-point format: a sign, then exponent and mantissa bits.

    With infinities, the last exponent is kept for them and for NaN (IEEE 754); without, only its last code is NaN.
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    dtype: torch.dtype
    infinities: bool

    @property
    def bias(self) -> int:
        """What is subtracted from the stored exponent."""
        return 2 ** (self.exponent_bits - 1) - 1

    @property
    def top(self) -> int:
        """The code of infinity or, without infinities, of the largest number. What overflows becomes this."""
        last = 2 ** (self.exponent_bits + self.mantissa_bits)
        return last - 2**self.mantissa_bits if self.infinities else last - 2

    @property
    def largest(self) -> float:
        last = 1 if self.infinities else 2  # the mantissa of all ones belongs to NaN
        return (2 - last * 2.0**-self.mantissa_bits) * 2.0 ** (self.bias + last - 1)

    @property
    def smallest_normal(self) -> float:
        return 2.0 ** (1 - self.bias)

    @property
    def smallest_subnormal(self) -> float:
        return 2.0 ** (1 - self.bias - self.mantissa_bits)


def decode(codes: Int[Tensor, "*n"], fmt: Format) -> Float[Tensor, "*n"]:
    """The numbers that these codes stand for: (-1)^sign · 1.mantissa · 2^(exponent - bias).

    Exponent 0 has no leading 1 and the exponent of the next (subnormal), so that the grid goes on evenly to zero.
    """
    unit = 2**fmt.mantissa_bits
    mantissa = codes % unit
    exponent = codes // unit % 2**fmt.exponent_bits
    sign = codes // (unit * 2**fmt.exponent_bits)
    whole = mantissa + unit * (exponent > 0)
    power = (exponent.clamp(min=1) - fmt.bias - fmt.mantissa_bits).double()
    value = torch.ldexp(whole.double(), power)
    magnitude = codes % (unit * 2**fmt.exponent_bits)
    value = value.masked_fill(magnitude > fmt.top, torch.nan)
    if fmt.infinities:
        value = value.masked_fill(magnitude == fmt.top, torch.inf)
    return torch.where(sign > 0, -value, value).float()


def encode(x: Float[Tensor, "*n"], fmt: Format) -> Int[Tensor, "*n"]:
    """The code of the nearest number of the format, on a tie the one with an even mantissa.

    What is too large saturates or, in a format with infinities, becomes one. NaN gives the last code.
    """
    unit = 2**fmt.mantissa_bits
    magnitude = x.double().abs().nan_to_num(nan=0.0).clamp(max=2.0 ** (fmt.bias + 2))
    exponent = torch.frexp(magnitude.clamp(min=fmt.smallest_normal)).exponent - 1
    steps = torch.ldexp(magnitude, fmt.mantissa_bits - exponent).round()  # torch rounds half to even
    # a number of 2·unit steps is the first of the next exponent, and the code comes out as just that
    code = ((exponent + fmt.bias - 1) * unit + steps.to(exponent.dtype)).clamp(max=fmt.top)
    code = code.masked_fill(x.isnan(), unit * 2**fmt.exponent_bits - 1)
    return code + x.signbit() * (unit * 2**fmt.exponent_bits)


E4M3 = Format("E4M3", 4, 3, torch.float8_e4m3fn, infinities=False)
E5M2 = Format("E5M2", 5, 2, torch.float8_e5m2, infinities=True)
BF16 = Format("BF16", 8, 7, torch.bfloat16, infinities=True)


@cache
def table(dtype: torch.dtype, device: torch.device) -> Float[Tensor, "256"]:
    """The 256 numbers of an FP8 format. Looking them up is several times as fast as PyTorch's own cast."""
    return torch.arange(256, dtype=torch.uint8, device=device).view(dtype).float()


@dataclass(frozen=True)
class Quantized:
    """A matrix (or several, stacked) in few bits."""

    values: Float[Tensor, "*b r c"]  # in the format's dtype
    scale: Float[Tensor, "*b R C"]  # of each tile; a value times its tile's scale is the number
    tile: tuple[int, int]


def in_tiles(x: Tensor, tile: tuple[int, int]) -> Tensor:
    """[… r c] → [… R rows C columns], filled up with zeros where tiles reach over the edge."""
    rows, columns = tile
    below, right = -x.shape[-2] % rows, -x.shape[-1] % columns
    x = F.pad(x, (0, right, 0, below)) if below or right else x
    return rearrange(x, "... (R r) (C c) -> ... R r C c", r=rows, c=columns)


def from_tiles(tiles: Tensor, like: Tensor) -> Tensor:
    """Undo `in_tiles` for a tensor of the shape of `like`."""
    whole = rearrange(tiles, "... R r C c -> ... (R r) (C c)")
    return whole if whole.shape == like.shape else whole[..., : like.shape[-2], : like.shape[-1]]


def largest_magnitude(tiles: Float[Tensor, "*b R r C c"]) -> Float[Tensor, "*b R C"]:
    """amax. Without abs(), whose copy costs more than a second look, and along contiguous memory first."""

    def extreme(of: Callable[..., Tensor]) -> Tensor:
        return of(tiles[..., 0] if tiles.shape[-1] == 1 else of(tiles, dim=-1), dim=-2)

    return torch.maximum(extreme(torch.amax), -extreme(torch.amin))


def quantize(x: Float[Tensor, "*b r c"], tile: Tile = (1, 128), fmt: Format = E4M3) -> Quantized:
    """x in the format, with a scale for each tile: that of its own largest magnitude ("online" scaling).

    BF16 has float32's range, needs no scale, and gets 1.
    """
    if tile is not None and (len(tile) != 2 or min(tile) < 1):
        raise ValueError(f"tile={tile} is not (rows, columns); use such as (1, 128), or None for the whole")
    shape = x.shape[-2:]
    rows, columns = (max(1, min(pair)) for pair in zip(shape, tile or shape, strict=True))
    tiles = in_tiles(x, (rows, columns))
    amax = largest_magnitude(tiles).clamp(min=1e-12)  # a tile of zeros has to have a scale, too
    scale = torch.ones_like(amax) if fmt == BF16 else amax / fmt.largest
    values = (tiles / scale[..., None, :, None]).to(fmt.dtype)
    return Quantized(from_tiles(values, x), scale, (rows, columns))


def dequantize(q: Quantized) -> Float[Tensor, "*b r c"]:
    """The numbers that `q` stands for, in float32."""
    if q.values.element_size() > 1:
        return q.values.float()
    codes = q.values.contiguous().view(torch.uint8)
    numbers = table(q.values.dtype, q.values.device).index_select(0, codes.view(-1).int()).view(codes.shape)
    tiles = in_tiles(numbers, q.tile).mul_(q.scale[..., None, :, None])
    return from_tiles(tiles, numbers)


def cut(x: Float[Tensor, "*n"], bits: int) -> Float[Tensor, "*n"]:
    """x with the first `bits` significant bits, the rest cut off (towards zero). float32 has 24."""
    return (x.contiguous().view(torch.int32) & -(1 << (24 - bits))).view(torch.float32)


def matmul(
    a: Float[Tensor, "m k"], b: Float[Tensor, "n k"], bits: int = 24, promote: int | None = 128
) -> Float[Tensor, "m n"]:
    """a bᵀ, added up in an accumulator of `bits` significant bits, which is emptied into a float32 sum every
    `promote` products (V3: every 128, with about 14 bits; None: never). bits=24 is float32 throughout.

    As on the H800, 32 products are added at a time. Here these 32 are added exactly and the accumulator is cut after
    each 32; a tensor core also cuts the products themselves, at the place of the largest (§3.5.2). Operands carry
    their scales already, where V3 multiplies each 128 products' sum by its scales: equal but for rounding.
    """
    if not 1 <= bits <= 24:
        raise ValueError(f"bits={bits} is not from 1 to 24, the bits of float32")
    if promote is not None and (promote < 32 or promote % 32):
        raise ValueError(f"promote={promote} is no multiple of 32, the products that are added at a time")
    if bits == 24:
        return a @ b.mT
    total = accumulator = a.new_zeros(len(a), len(b))
    for i, (left, right) in enumerate(zip(a.split(32, dim=1), b.split(32, dim=1), strict=True), start=1):
        accumulator = cut(torch.addmm(accumulator, left, right.mT), bits)
        if promote is not None and i % (promote // 32) == 0:
            total, accumulator = total + accumulator, torch.zeros_like(total)
    return total + accumulator


@dataclass(frozen=True)
class Recipe:
    """How a linear layer computes. The defaults are V3's (§3.3.2), but for the accumulator.

    V3's adds with 14 bits and promotes: `accumulator_bits=14`. That is slow to simulate.
    """

    forward: Format = E4M3
    backward: Format = E4M3  # of the output's gradients
    activations: Tile = (1, 128)
    weights: Tile = (128, 128)
    gradients: Tile = (1, 128)
    accumulator_bits: int = 24
    promote: int | None = 128
    master_weights: bool = True  # False: nothing but the rounded weight is kept from step to step


class Product(torch.autograd.Function):
    """x wᵀ and its two gradients, all three from quantised operands. What is kept for backward is quantised too."""

    @staticmethod
    def forward(ctx, x: Float[Tensor, "n i"], weight: Float[Tensor, "o i"], recipe: Recipe) -> Tensor:
        x8 = quantize(x, recipe.activations, recipe.forward)
        w8 = quantize(weight, recipe.weights, recipe.forward)
        ctx.save_for_backward(x8.values, x8.scale, w8.values, w8.scale)
        ctx.tiles, ctx.recipe = (x8.tile, w8.tile), recipe
        return matmul(dequantize(x8), dequantize(w8), recipe.accumulator_bits, recipe.promote)

    @staticmethod
    def backward(ctx, grad: Float[Tensor, "n o"]) -> tuple[Tensor, Tensor, None]:
        recipe, kept = ctx.recipe, ctx.saved_tensors
        x, w = (dequantize(Quantized(*kept[2 * i : 2 * i + 2], ctx.tiles[i])) for i in (0, 1))
        rows = dequantize(quantize(grad, recipe.gradients, recipe.backward))
        dx = matmul(rows, w.mT, recipe.accumulator_bits, recipe.promote)
        # the weight's gradient sums over tokens, so its tiles lie along them: 128 × 1
        columns = dequantize(quantize(grad, turned(recipe.gradients), recipe.backward))
        x = dequantize(quantize(x, turned(recipe.activations), recipe.forward))
        dw = matmul(columns.mT, x.mT, recipe.accumulator_bits, recipe.promote)
        return dx, dw, None


def turned(tile: Tile) -> Tile:
    return None if tile is None else tile[::-1]


class FP8Linear(nn.Linear):
    """nn.Linear with the products of a recipe, around the same parameters: names, `parts` and optimiser stay."""

    def __init__(self, linear: nn.Linear, recipe: Recipe) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias, self.recipe = linear.weight, linear.bias, recipe
        self.training = linear.training

    def forward(self, x: Float[Tensor, "*b i"]) -> Float[Tensor, "*b o"]:
        forget(self.weight, self)
        y = Product.apply(rearrange(x, "... i -> (...) i"), self.weight, self.recipe)
        y = y.view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


class FP8Experts(Experts):
    """The stacked experts of chapter 04 with the products of a recipe, expert by expert."""

    def __init__(self, experts: Experts, recipe: Recipe) -> None:
        nn.Module.__init__(self)
        self.w13, self.w2, self.recipe = experts.w13, experts.w2, recipe
        self.training = experts.training

    def product(self, x: Float[Tensor, "n i"], w: Float[Tensor, "e o i"], ends: Int[Tensor, "e"]) -> Tensor:
        forget(w, self)
        rows = x.tensor_split(ends.tolist()[:-1])
        return torch.cat([Product.apply(r, each, self.recipe) for r, each in zip(rows, w, strict=True)])


@torch.no_grad()
def forget(weight: nn.Parameter, module: FP8Linear | FP8Experts) -> None:
    """Without master weights, what the last step added beyond the format's precision is lost."""
    if module.training and not module.recipe.master_weights:
        weight.copy_(dequantize(quantize(weight, module.recipe.weights, module.recipe.forward)))


def to_fp8(model: nn.Module, recipe: Recipe | None = None) -> nn.Module:
    """Give the linear layers and experts inside `layers` the recipe's products (V3's by default), in place.

    Embedding, head, router, norms and attention itself stay as they are, as in V3.
    """
    recipe = recipe or Recipe()
    for name, module in list(model.named_modules()):
        kind = {nn.Linear: FP8Linear, Experts: FP8Experts}.get(type(module))
        if kind and "layers." in name:
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, kind(module, recipe))
    return model
