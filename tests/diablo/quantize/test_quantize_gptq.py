"""GPTQ and MagR against their definitions, in float64."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
from torch import Tensor

from diablo.quantize import gptq, magr, round_to_nearest
from diablo.quantize.grids import fit_grid, to_codes
from diablo.quantize.magr import coordinate_descent, grid_factor, project_on_l1_ball, prox_max, shrink_magnitudes

ROWS, COLUMNS = 12, 192  # more columns than GPTQ's block


def problem(seed: int = 0, samples: int = 500) -> tuple[Tensor, Tensor, Tensor]:
    """Return a weight, correlated inputs and their Gram matrix."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(ROWS, COLUMNS, generator=generator, dtype=torch.float64)
    mixing = torch.randn(COLUMNS, COLUMNS, generator=generator, dtype=torch.float64) / COLUMNS**0.5
    x = torch.randn(samples, COLUMNS, generator=generator, dtype=torch.float64) @ mixing
    return weight, x, x.T @ x


def column_by_column(weight: Tensor, gram: Tensor, bits: int, group: int, sym: bool, damp: float = 0.01) -> Tensor:
    """GPTQ without Cholesky factor and blocks: each error is spread by the inverse of the remaining Hessian."""
    weight, gram = weight.clone(), gram.clone()
    dead = gram.diagonal() == 0
    gram[dead, dead] = 1
    weight[:, dead] = 0
    inverse = torch.linalg.inv(gram + damp * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype))
    codes = torch.empty_like(weight)
    scale = zero = weight[:, 0]
    for j in range(weight.shape[1]):
        if j % 128 == 0:
            corrected = weight.clone()  # grids are fitted to this until the next block of columns
        if j % group == 0:
            scale, zero = fit_grid(corrected[:, j : j + group], bits, sym)  # pyright: ignore
        codes[:, j] = to_codes(weight[:, j], scale, zero, bits)
        error = (weight[:, j] - scale * (codes[:, j] - zero)) / inverse[j, j]
        weight -= error[:, None] * inverse[j]
        inverse -= torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return codes.to(torch.uint8)


def output_error(x: Tensor, weight: Tensor, quantized: Tensor) -> float:
    return (x @ (quantized.to(weight) - weight).T).norm().item()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [-1, 32])
@pytest.mark.parametrize("sym", [False, True])
def test_gptq_equals_its_definition(bits: int, group_size: int, sym: bool) -> None:
    weight, _, gram = problem()
    gram[:, 5] = gram[5] = 0  # an input that is always 0
    expected = column_by_column(weight, gram, bits, COLUMNS if group_size == -1 else group_size, sym)
    assert torch.equal(gptq(weight, gram, bits, group_size, sym).codes, expected)


def test_in_float32_hardly_a_code_differs() -> None:
    weight, _, gram = problem()
    one, other = gptq(weight, gram, 3), gptq(weight.float(), gram.float(), 3)
    assert (one.codes != other.codes).float().mean() < 0.01


def test_a_group_as_wide_as_the_row_is_the_row() -> None:
    weight, _, gram = problem()
    one, other = gptq(weight, gram, 3, COLUMNS), gptq(weight, gram, 3, -1)
    assert torch.equal(one.codes, other.codes)
    assert torch.equal(one.scales, other.scales)


def test_the_scale_of_the_inputs_does_not_matter() -> None:
    weight, _, gram = problem()
    assert torch.equal(gptq(weight, gram, 3).codes, gptq(weight, 2 * gram, 3).codes)


def test_with_independent_inputs_gptq_is_rounding() -> None:
    weight, _, _ = problem()
    gram = 7 * torch.eye(COLUMNS, dtype=torch.float64)
    assert torch.equal(gptq(weight, gram, 3, 32).codes, round_to_nearest(weight, 3, 32).codes)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("group_size", [-1, 64])
def test_gptq_leaves_a_smaller_error_in_the_outputs_than_rounding(bits: int, group_size: int) -> None:
    weight, x, gram = problem()
    rounded = output_error(x, weight, round_to_nearest(weight, bits, group_size).dequantize())
    assert output_error(x, weight, gptq(weight, gram, bits, group_size).dequantize()) < 0.8 * rounded


def test_columns_without_input_become_zero() -> None:
    weight, _, gram = problem()
    gram[:, 7] = gram[7] = 0
    assert (gptq(weight, gram, 4, 32).dequantize()[:, 7] == 0).all()


def test_inputs_gptq_cannot_use_are_refused() -> None:
    weight, _, gram = problem()
    with pytest.raises(ValueError, match="group_size=100 does not divide 192"):
        gptq(weight, gram, 4, 100)
    with pytest.raises(ValueError, match="not finite"):
        gptq(weight, gram.fill_diagonal_(torch.nan), 4)
    with pytest.raises(ValueError, match=r"damp_percent=0\.0 is too small"):
        gptq(weight, torch.ones_like(gram), 4, damp_percent=0.0)


def test_the_projection_on_the_l1_ball_is_the_nearest_point() -> None:
    # By hand: (3, 1) on radius 2 loses 1 from each side; (0.5, -0.25) is inside; (-4, 0, 0) keeps its direction.
    rows = torch.tensor([[3.0, 1.0], [0.5, -0.25], [-4.0, 0.0]], dtype=torch.float64)
    assert project_on_l1_ball(rows, 2.0).tolist() == [[2.0, 0.0], [0.5, -0.25], [-2.0, 0.0]]


def test_the_proximal_map_minimises_its_objective() -> None:
    row, alpha = problem()[0][:1, :20], 0.7

    def objective(v: Tensor) -> float:
        return (0.5 * (v - row).square().sum() + alpha * v.abs().max()).item()

    best = prox_max(row, alpha)
    assert objective(best) < objective(row)
    for seed in range(50):
        nudge = torch.randn(1, 20, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        assert objective(best + 1e-3 * nudge) > objective(best)


@pytest.mark.parametrize("group_size", [-1, 32])
def test_each_proximal_step_lowers_the_objective_and_the_magnitudes_shrink(group_size: int) -> None:
    weight, x, gram = problem(samples=100)  # fewer inputs than columns: some directions have no cost
    scaled = x / torch.linalg.matrix_norm(x, 2)
    alpha = 0.02

    def objective(v: Tensor) -> float:
        largest = v.view(ROWS, -1, COLUMNS if group_size == -1 else group_size).abs().amax(-1)
        return (0.5 * (scaled @ (v - weight).T).square().sum() + alpha * largest.sum()).item()

    iterates = [shrink_magnitudes(weight, gram, alpha, steps, group_size) for steps in range(30)]
    values = [objective(iterate) for iterate in iterates]
    assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(values))
    assert values[-1] < 0.95 * values[0]
    smaller = shrink_magnitudes(weight, gram, alpha, 200, group_size)
    assert (smaller.abs().amax(1) < weight.abs().amax(1)).all()
    assert smaller.abs().max() < 0.8 * weight.abs().max()
    assert output_error(x, weight, smaller) < 0.1 * (x @ weight.T).norm()


@pytest.mark.parametrize("group_size", [-1, 32])
def test_each_pass_of_coordinate_descent_lowers_the_error_of_every_rows_outputs(group_size: int) -> None:
    weight, x, gram = problem()
    start = round_to_nearest(weight, 2, group_size)
    results = [start, *(coordinate_descent(weight, start, gram, passes) for passes in (1, 2, 5))]
    errors = [(x @ (weight - result.dequantize()).T).square().sum(0) for result in results]
    assert errors[1].sum() < 0.9 * errors[0].sum()
    for one, other in itertools.pairwise(errors):
        assert (other <= one * (1 + 1e-9)).all()
    assert torch.equal(results[-1].scales, start.scales)


@pytest.mark.parametrize(("bits", "group_size"), [(2, 128), (2, 64), (2, -1), (3, 128), (4, 64)])
def test_magr_ends_no_worse_than_it_began(bits: int, group_size: int) -> None:
    """Regression: at 2 bits in groups of 128 the 30 passes ended at twice GPTQ's error."""
    torch.manual_seed(0)
    weight = 0.02 * torch.randn(64, 256)
    x = torch.randn(1024, 256) @ (torch.randn(256, 256) / 16 + 0.3 * torch.eye(256))
    gram = x.T @ x
    alpha = 1e-3 if group_size == -1 else 1e-4
    smaller = shrink_magnitudes(weight, gram, alpha, 200, group_size)
    begun = gptq(smaller, gram, bits, group_size, shrink=grid_factor(bits, group_size))
    before = output_error(x, weight, begun.dequantize())
    errors = [output_error(x, weight, magr(weight, gram, bits, group_size, passes=n).dequantize()) for n in (0, 1, 5)]
    errors.append(output_error(x, weight, magr(weight, gram, bits, group_size).dequantize()))
    assert errors[0] == before
    assert all(other <= 1.001 * one for one, other in itertools.pairwise(errors[:3]))  # scales are stored in float16
    assert errors[3] <= 1.001 * before
    if bits == 2 and group_size != -1:
        assert errors[3] < 0.9 * output_error(x, weight, gptq(weight, gram, bits, group_size).dequantize())


@pytest.mark.parametrize("refits", [False, True])
def test_coordinate_descent_equals_its_definition(refits: bool) -> None:
    weight, _, gram = problem()
    start = round_to_nearest(weight, 3, 32)
    refit = partial(fit_grid, bits=3, shrink=0.9) if refits else None
    sigma = gram + 0.75 * gram.diagonal().mean() * torch.eye(COLUMNS, dtype=torch.float64)
    q = start.dequantize().double()
    assert start.zeros is not None
    kept, least = q.clone(), ((weight - q) @ gram * (weight - q)).sum(1)
    for _ in range(2):
        for j in range(COLUMNS):
            scale, zero = start.scales[:, j // 32].double(), start.zeros[:, j // 32].double()
            if refit and j % 32 == 0:
                grid = refit(q[:, j : j + 32])
            if refit:
                scale, zero = grid  # pyright: ignore[reportPossiblyUnboundVariable]
            others = torch.arange(COLUMNS) != j
            best = (weight @ sigma[:, j] - q[:, others] @ sigma[others, j]) / sigma[j, j]
            q[:, j] = scale * (to_codes(best, scale, zero, 3) - zero)
        error = ((weight - q) @ gram * (weight - q)).sum(1)
        kept = torch.where((error <= least)[:, None], q, kept)
        least = torch.minimum(least, error)
    torch.testing.assert_close(coordinate_descent(weight, start, gram, 2, refit).dequantize().double(), kept)


def test_magr_of_a_group_as_wide_as_the_row_is_that_of_the_row() -> None:
    weight, _, gram = problem()
    for part, other in zip(magr(weight, gram, 2, COLUMNS), magr(weight, gram, 2, -1), strict=True):
        assert part is other is None or torch.equal(torch.as_tensor(part), torch.as_tensor(other))


@pytest.mark.parametrize("group_size", [-1, 32])
def test_the_scale_of_the_inputs_does_not_matter_to_magr(group_size: int) -> None:
    weight, _, gram = problem()
    expected = magr(weight, gram, 4, group_size)
    found = magr(weight, 2.0**-30 * gram, 4, group_size)
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.scales, expected.scales)


def test_magr_without_input_rounds_the_weight() -> None:
    weight, _, gram = problem()
    gram[:, 5] = gram[5] = 0
    found = magr(weight, gram, 4, -1).dequantize()
    assert (found[:, 5] - weight[:, 5]).abs().max() < 0.5
    assert torch.isfinite(magr(weight, torch.zeros_like(gram), 4, 32).dequantize()).all()
    with pytest.raises(ValueError, match="not finite"):
        magr(weight, gram.fill_diagonal_(torch.nan), 4)


@pytest.mark.parametrize(("bits", "group_size", "beta"), [(2, -1, 0.8), (3, -1, 0.9), (4, -1, 1.0), (2, 64, 1.0)])
def test_magr_quantises_on_a_narrower_grid(bits: int, group_size: int, beta: float) -> None:
    weight, x, gram = problem()
    result = magr(weight, gram, bits, group_size)
    alpha = 1e-3 if group_size == -1 else 1e-4
    smaller = shrink_magnitudes(weight, gram, alpha, 200, group_size)
    scale, _ = fit_grid(smaller.view(ROWS, -1, COLUMNS if group_size == -1 else group_size)[:, 0], bits, shrink=beta)
    first = result.scales[
        :, 0
    ].double()  # GPTQ gets the first group unchanged; its grid is refitted to the quantised weights
    assert torch.equal(first, scale) if group_size == -1 else (first <= 1.01 * scale).all()
    assert output_error(x, weight, result.dequantize()) < output_error(
        x, weight, round_to_nearest(weight, bits, group_size).dequantize()
    )
