"""Scales, casts and products equal torchao's and torch._scaled_mm's, where these run on a CPU."""

import logging

import pytest
import torch

from mini.fp8 import E4M3, E5M2, dequantize, matmul, quantize

logging.disable(logging.WARNING)  # torchao tells that its GPU kernels cannot be loaded
from torchao.float8.config import ScalingGranularity  # noqa: E402
from torchao.float8.float8_utils import tensor_to_scale, to_fp8_saturated  # noqa: E402
from torchao.quantization.quant_primitives import (  # noqa: E402
    _choose_scale_float8,
    _dequantize_affine_float8,
    _quantize_affine_float8,
)

logging.disable(logging.NOTSET)

FP8 = pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=lambda fmt: fmt.name)


def matrix(*shape, seed=0):
    """Rows of sizes from 1e-3 to 1e3, so that a scale in the wrong place shows."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g) * torch.logspace(-3, 3, shape[0])[:, None]


@FP8
@pytest.mark.parametrize("tile", [None, (1, 128), (128, 128), (128, 1), (1, 512), (8, 32)])
def test_torchaos_blocks(fmt, tile):
    x = matrix(256, 512)
    block = list(tile or x.shape)
    scale = _choose_scale_float8(x, block, fmt.dtype)
    values = _quantize_affine_float8(x, scale, fmt.dtype)
    ours = quantize(x, tile, fmt)
    assert ours.scale.equal(scale)
    assert ours.values.view(torch.uint8).equal(values.view(torch.uint8))
    assert dequantize(ours).equal(_dequantize_affine_float8(values, scale))


@FP8
@pytest.mark.parametrize("rowwise", [False, True])
def test_torchaos_training_scales(fmt, rowwise):
    """torchao.float8 multiplies by largest / amax, where we divide by amax / largest."""
    x = matrix(64, 96)
    how = (
        dict(scaling_granularity=ScalingGranularity.AXISWISE, axiswise_dim=-1)
        if rowwise
        else dict(scaling_granularity=ScalingGranularity.TENSORWISE)
    )
    scale = tensor_to_scale(x, fmt.dtype, **how)
    values = to_fp8_saturated(x * scale, fmt.dtype)
    ours = quantize(x, (1, 96) if rowwise else None, fmt)
    torch.testing.assert_close(ours.scale.flatten(), 1 / scale.flatten(), rtol=3e-7, atol=0)
    differ = ours.values.view(torch.uint8) != values.view(torch.uint8)
    assert differ.float().mean() < 1e-3  # a tie that rounding of the scale decides


@pytest.mark.parametrize("rowwise", [False, True])
def test_scaled_mm(rowwise):
    a, b = (
        quantize(matrix(32, 64), (1, 64) if rowwise else None),
        quantize(matrix(48, 64, seed=1), (1, 64) if rowwise else None),
    )
    theirs = torch._scaled_mm(
        a.values,
        b.values.t(),
        scale_a=a.scale if rowwise else a.scale[0, 0],
        scale_b=b.scale.t() if rowwise else b.scale[0, 0],
        out_dtype=torch.float32,
    )
    ours = matmul(dequantize(a), dequantize(b))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * theirs.abs().max().item())
