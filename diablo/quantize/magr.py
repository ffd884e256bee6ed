"""MagR (arXiv 2406.00800): reduces a layer's largest weights without changing its outputs, then quantises it.

Three steps: a proximal descent that shrinks the largest magnitudes, GPTQ on a grid slightly narrower than the weights,
and a coordinate descent against the original weights. The settings are those of the authors' code (AozhongZhang/MagR),
with three differences. It shrinks with only the last calibration sequence, here all are used. It adds 0.1 to a
denominator that is about 1e5 with its 262,144 calibration tokens, but much smaller with few; here nothing is added. It
keeps the result of the descent's last pass; here each row keeps the result with the smallest output error, GPTQ's or a
pass's, so no row gets worse. Passes over groups need that: each refits the grids, β times as wide as the quantised
weights, so that with β = 0.95 the 30 passes at 2 bits end at a fifth of the width, far worse than GPTQ alone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from diablo.quantize.gptq import BLOCK, gptq
from diablo.quantize.grids import QuantizedWeight, fit_grid, to_codes, uniform, width_of_groups, working


def magr(
    weight: Tensor,
    gram: Tensor,
    bits: int,
    group_size: int = -1,
    sym: bool = False,
    damp_percent: float = 0.01,
    alpha: float | None = None,
    iterations: int = 200,
    passes: int | None = None,
) -> QuantizedWeight:
    """Quantise a weight `(out, in)` with the Gram matrix `XᵀX` of its inputs.

    Args:
        alpha: penalty on the largest magnitudes; None is 1e-3 per row and 1e-4 per group.
        iterations: iterations of the proximal descent.
        passes: passes of the coordinate descent; None is 30 at 2 bits, else 1.

    Raises:
        ValueError: as for `gptq`.
    """
    original = working(weight)
    gram = gram.to(original)
    if not gram.isfinite().all():
        raise ValueError("the inputs of the layer are not finite")
    if group_size == original.shape[1]:
        group_size = -1
    alpha = alpha if alpha is not None else (1e-3 if group_size == -1 else 1e-4)
    smaller = shrink_magnitudes(original, gram, alpha, iterations, group_size)
    beta = grid_factor(bits, group_size)
    quantized = gptq(smaller, gram, bits, group_size, sym, damp_percent, beta)
    refit = None if group_size == -1 else partial(fit_grid, bits=bits, sym=sym, shrink=beta)
    passes = passes if passes is not None else (30 if bits == 2 else 1)
    return coordinate_descent(original, quantized, gram, passes, refit)


def grid_factor(bits: int, group_size: int) -> float:
    """Return β, the factor on the grid's scale: the authors' values for whole rows and for groups of 64 and 128.

    They have no values for other groups; those above 128 use that of 128, the others 1.
    """
    if group_size == -1:
        return {2: 0.8, 3: 0.9}.get(bits, 1.0)
    return 0.95 if group_size >= 128 else 1.0


def shrink_magnitudes(weight: Tensor, gram: Tensor, alpha: float, iterations: int, group_size: int = -1) -> Tensor:
    """Run proximal gradient descent, step 1, on `1/2 ||X (V - W)ᵀ||² + alpha * sum of ||v||∞ over rows or groups`.

    X is scaled to spectral norm 1, so no step increases the objective.

    Args:
        weight: W, `(out, in)`.
        gram: `XᵀX`, `(in, in)`, unscaled.

    Returns:
        V, `(out, in)`.
    """
    group = width_of_groups(weight.shape[1], group_size)
    largest = torch.linalg.eigvalsh(gram)[-1]
    if largest <= 0:
        return weight.clone()
    scaled = gram / largest
    smaller = weight.clone()
    for _ in range(iterations):
        smaller = smaller - (smaller - weight) @ scaled
        smaller = prox_max(smaller.view(-1, group), alpha).view_as(weight)
    return smaller


def prox_max(rows: Tensor, alpha: float) -> Tensor:
    """Proximal map of `alpha * ||row||∞` (Moreau): the row minus its projection onto the l1 ball of radius alpha."""
    return rows - project_on_l1_ball(rows, alpha)


def project_on_l1_ball(rows: Tensor, radius: float) -> Tensor:
    """Return the nearest point with `||row||₁ <= radius` for each row (Duchi et al., ICML 2008, by sorting)."""
    magnitudes = rows.abs()
    ordered = magnitudes.sort(-1, descending=True).values
    excess = ordered.cumsum(-1) - radius
    counts = torch.arange(1, rows.shape[-1] + 1, device=rows.device, dtype=rows.dtype)
    support = (ordered * counts > excess).sum(-1, keepdim=True).clamp(min=1)
    threshold = (excess.gather(-1, support - 1) / support).clamp(min=0)  # 0: the row is inside the ball
    return rows.sign() * (magnitudes - threshold).clamp(min=0)


def coordinate_descent(
    weight: Tensor,
    quantized: QuantizedWeight,
    gram: Tensor,
    passes: int,
    refit: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None,
) -> QuantizedWeight:
    """Set each column in turn to the best code given all others.

    A pass minimises `tr (W - Q) Σ (W - Q)ᵀ` where Σ is `XᵀX` with 0.75 of its mean diagonal added to the diagonal. A
    column without input returns to its weight. Every row keeps, of the start and all passes, the result with the
    smallest output error, `||X (w - q)||²`.

    Args:
        refit: maps a group's quantised weights `(out, group)` to its grid, scale and zero `(out,)`, whenever its first
            column is reached, which may increase the objective. None keeps the grids, and then no step increases it.
    """
    assert quantized.zeros is not None
    if not gram.any():
        return quantized
    sigma = gram.clone()
    diagonal = sigma.diagonal()
    diagonal += 0.75 * diagonal.mean()
    rows, columns = weight.shape
    group = columns // quantized.scales.shape[1]
    scales, zeros = quantized.scales.to(weight).clone(), quantized.zeros.to(weight).clone()
    current = quantized.dequantize().to(weight)
    pull = (weight - current) @ sigma
    judge = gram + torch.diag(diagonal.masked_fill(gram.diagonal() > 0, 0))  # columns without input must count too
    least = (((weight - current) @ judge) * (weight - current)).sum(1)
    best = (current.clone(), scales.clone(), zeros.clone())
    for _ in range(passes):
        for start in range(0, columns, BLOCK):
            stop = min(start + BLOCK, columns)
            change, local = torch.zeros_like(current[:, start:stop]), pull[:, start:stop].clone()
            for j in range(stop - start):
                column = start + j
                if refit and column % group == 0:
                    grid = refit(current[:, column : column + group])
                    scales[:, column // group], zeros[:, column // group] = grid
                scale, zero = scales[:, column // group], zeros[:, column // group]
                wanted = local[:, j] / diagonal[column] + current[:, column]
                value = scale * (to_codes(wanted, scale, zero, quantized.bits) - zero)
                change[:, j] = value - current[:, column]
                local.addr_(change[:, j], sigma[column, start:stop], alpha=-1)
            current[:, start:stop] += change
            pull -= change @ sigma[start:stop]
        total = (((weight - current) @ judge) * (weight - current)).sum(1)
        better = total <= least
        least = torch.where(better, total, least)
        for kept, found in zip(best, (current, scales, zeros), strict=True):
            kept[better] = found[better]
    current, scales, zeros = best
    grouped = current.view(rows, -1, group)
    codes = to_codes(grouped, scales[..., None], zeros[..., None], quantized.bits)
    return uniform(codes.view_as(weight), scales, zeros, quantized.bits)
