"""GPTQ (arXiv 2210.17323): quantises a weight column by column; later columns compensate each column's error."""

from __future__ import annotations

import torch
from torch import Tensor

from diablo.quantize.grids import QuantizedWeight, check_bits, fit_grid, to_codes, uniform, width_of_groups, working

BLOCK = 128  # columns whose errors are applied together to the rest of the weight


def gptq(
    weight: Tensor,
    gram: Tensor,
    bits: int,
    group_size: int = -1,
    sym: bool = False,
    damp_percent: float = 0.01,
    shrink: float = 1.0,
) -> QuantizedWeight:
    """Minimise `||X (Q - W)ᵀ||` over Q on the grid, greedily.

    A group's grid is fitted when its first column is reached, to weights corrected for the errors of all earlier blocks
    of columns. The authors' code and gptqmodel do the same; gptqmodel gives the same codes if scales are kept in
    float32 (tests/diablo/quantize/test_gptqmodel.py). Scales stored in float16, as here, move some codes by one.

    Args:
        weight: `(out, in)`. Columns whose inputs are always 0 are set to 0.
        gram: `XᵀX`, `(in, in)`, over the calibration inputs; its scale does not matter, unless inputs are always 0.
        damp_percent: share of the mean of its diagonal that is added to the diagonal; a fraction, despite GPTQ's name.
        shrink: β, a factor on the grid's scale.

    Raises:
        ValueError: the inputs are not finite, or so dependent that they need more damping.
    """
    check_bits(bits)
    weight = working(weight)
    rows, columns = weight.shape
    group = width_of_groups(columns, group_size)
    factor, dead = inverse_factor(gram.to(weight), damp_percent)
    weight = weight.masked_fill(dead, 0)  # a copy, which takes the corrections
    codes = torch.empty_like(weight)
    scales, zeros = weight.new_empty(rows, columns // group), weight.new_empty(rows, columns // group)
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        block, upper = weight[:, start:stop].clone(), factor[start:stop, start:stop]
        errors = torch.empty_like(block)
        for j in range(stop - start):
            index, offset = divmod(start + j, group)
            if offset == 0:
                grid = fit_grid(weight[:, start + j : start + j + group], bits, sym, shrink)
                scales[:, index], zeros[:, index] = grid
            scale, zero = scales[:, index], zeros[:, index]
            code = to_codes(block[:, j], scale, zero, bits)
            error = (block[:, j] - scale * (code - zero)) / upper[j, j]
            block[:, j + 1 :].addr_(error, upper[j, j + 1 :], alpha=-1)
            codes[:, start + j], errors[:, j] = code, error
        weight[:, stop:] -= errors @ factor[start:stop, stop:]
    return uniform(codes, scales, zeros, bits)


def inverse_factor(gram: Tensor, damp_percent: float) -> tuple[Tensor, Tensor]:
    """Return the upper Cholesky factor of the inverse of the damped Gram matrix, and which inputs are always 0.

    Row j of the factor, divided by its diagonal, distributes an error in column j over the later columns.
    """
    if not gram.isfinite().all():
        raise ValueError("the inputs of the layer are not finite")
    gram = gram.clone()
    diagonal = gram.diagonal()
    dead = diagonal == 0
    diagonal[dead] = 1
    diagonal += damp_percent * diagonal.mean()
    try:
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
        return torch.linalg.cholesky(inverse, upper=True), dead
    except torch.linalg.LinAlgError:  # pyright: ignore[reportPrivateImportUsage]
        raise ValueError(f"damp_percent={damp_percent} is too small for these inputs: raise it") from None
