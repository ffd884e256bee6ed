"""Grids of quantised weights, and rounding to them: uniform grids and normal-float levels.

A weight `(out, in)` is cut along its input side into groups of `group_size` (-1: a whole row), each with its own scale.
Scales are rounded to float16, in which they are stored, before weights are rounded to the grid, so that a quantizer
computes with exactly the stored numbers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

SMALLEST_SCALE = 2.0**-24  # the smallest positive float16
NORMAL_FLOAT_OFFSET = 0.9677083  # the outermost quantile of QLoRA's levels (LoftQ, utils.py)


class QuantizedWeight(NamedTuple):
    """A weight `(out, in)` as integer codes, with everything needed to decode them."""

    bits: int
    codes: Tensor  # (out, in), uint8
    scales: Tensor  # (out, groups), float16
    zeros: Tensor | None  # (out, groups), uint8: the code of 0 on a uniform grid
    levels: Tensor | None  # (2 ** bits,), float32: the value of each code on any other grid

    def dequantize(self) -> Tensor:
        """Return the weight, `(out, in)`, in float32."""
        return dequantize(self.codes, self.scales, self.zeros, self.levels)


def dequantize(codes: Tensor, scales: Tensor, zeros: Tensor | None, levels: Tensor | None) -> Tensor:
    """Return `scale * (code - zero)`, or `scale * levels[code]`; see `QuantizedWeight` for the shapes."""
    rows, columns = codes.shape
    groups = codes.view(rows, scales.shape[1], -1)
    if levels is not None:
        values = levels[groups.int()]
    else:
        assert zeros is not None
        values = groups.float() - zeros[..., None].float()
    return (values * scales[..., None].float()).view(rows, columns)


def check_bits(bits: int) -> None:
    if bits not in range(2, 9):
        raise ValueError(f"bits={bits} must be from 2 to 8")


def width_of_groups(in_features: int, group_size: int) -> int:
    """Return how many weights share a scale.

    Raises:
        ValueError: the group size does not divide `in_features`.
    """
    if group_size == -1:
        return in_features
    if group_size < 1 or in_features % group_size:
        raise ValueError(
            f"group_size={group_size} does not divide {in_features} input features: choose a divisor, or -1 for rows"
        )
    return group_size


def fit_grid(groups: Tensor, bits: int, sym: bool = False, shrink: float = 1.0) -> tuple[Tensor, Tensor]:
    """Fit a uniform grid from the least to the greatest value of each group, including 0 (GPTQ's quant.py).

    Args:
        groups: `(..., group)`, floating point.
        sym: make the grid symmetric around 0; `zero` is then `2 ** (bits - 1)`.
        shrink: β, a factor on the scale.

    Returns:
        scale and zero, `(...)`, in the dtype of `groups`.
    """
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    if sym:
        high = torch.maximum(-low, high)
        low = -high
    top = 2**bits - 1
    empty = low == high
    scale = shrink * torch.where(empty, torch.ones_like(high), (high - low) / top)
    scale = _stored(scale)
    zero = torch.full_like(scale, 2 ** (bits - 1)) if sym else (-low / scale).round().clamp(max=255)  # fits uint8
    return scale, zero


def to_codes(weight: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Return the nearest code of each weight, in the weight's dtype; all three broadcast."""
    return ((weight / scale).round() + zero).clamp(0, 2**bits - 1)


def round_to_nearest(
    weight: Tensor, bits: int, group_size: int = -1, sym: bool = False, shrink: float = 1.0
) -> QuantizedWeight:
    """Round each weight to the nearest value of its group's grid."""
    check_bits(bits)
    weight = working(weight)
    groups = weight.view(weight.shape[0], -1, width_of_groups(weight.shape[1], group_size))
    scale, zero = fit_grid(groups, bits, sym, shrink)
    codes = to_codes(groups, scale[..., None], zero[..., None], bits)
    return uniform(codes.view_as(weight), scale, zero, bits)


def uniform(codes: Tensor, scale: Tensor, zero: Tensor, bits: int) -> QuantizedWeight:
    """Return a weight on a uniform grid, in the stored dtypes."""
    return QuantizedWeight(bits, codes.to(torch.uint8), scale.to(torch.float16), zero.to(torch.uint8), None)


def normal_float_levels(bits: int) -> Tensor:
    """Return the levels of normal-float, `(2 ** bits,)` from -1 to 1 in float32: quantiles of N(0, 1), and 0.

    With 4 bits, QLoRA's 16 levels; with 2 bits -1, 0, 0.3379, 1 (the same construction, LoftQ's utils.py).
    """
    check_bits(bits)
    half = 2 ** (bits - 1)
    quantiles = [
        torch.special.ndtri(torch.linspace(NORMAL_FLOAT_OFFSET, 0.5, steps, dtype=torch.float64)[:-1])
        for steps in (half + 1, half)
    ]
    levels = torch.cat([quantiles[0], torch.zeros(1, dtype=torch.float64), -quantiles[1]]).sort().values
    return (levels / levels.max()).float()


def normal_float(weight: Tensor, bits: int, group_size: int = 64) -> QuantizedWeight:
    """Round each weight to the nearest normal-float level times the greatest magnitude of its group."""
    check_bits(bits)
    weight = working(weight)
    groups = weight.view(weight.shape[0], -1, width_of_groups(weight.shape[1], group_size))
    scale = _stored(groups.abs().amax(-1))
    levels = normal_float_levels(bits).to(weight.device)
    codes = nearest_levels(groups / scale[..., None], levels)
    return QuantizedWeight(bits, codes.view_as(weight).to(torch.uint8), scale.to(torch.float16), None, levels)


def nearest_levels(values: Tensor, levels: Tensor) -> Tensor:
    """Return the index of the level nearest to each value; `levels` must ascend."""
    return torch.bucketize(values, ((levels[1:] + levels[:-1]) / 2).to(values.dtype))


def working(weight: Tensor) -> Tensor:
    """Return the weight in the quantizers' precision: float32, or float64 if it is float64.

    Raises:
        ValueError: it is not a finite matrix.
    """
    if weight.ndim != 2 or not weight.isfinite().all():
        raise ValueError(f"a weight of shape {tuple(weight.shape)} is not a matrix of finite numbers: it has no grid")
    return weight.detach().to(torch.promote_types(weight.dtype, torch.float32)).contiguous()


def _stored(scale: Tensor) -> Tensor:
    stored = scale.to(torch.float16)
    if stored.isinf().any():
        raise ValueError(f"a scale of {scale.max().item():.3g} does not fit float16: the weights are too large")
    return stored.to(scale.dtype).clamp(min=SMALLEST_SCALE)
