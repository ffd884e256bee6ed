"""Least squares with diagonal blocks: each statement of analysis/theory.py is checked numerically."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis.plots_theory import least_squares_map, sign
from analysis.theory import (
    Problem,
    block_ranks,
    condition,
    diablo_loss,
    diablo_optimum,
    equal_budget_rank,
    full_gradient,
    full_loss,
    lora_gradients,
    lora_loss,
    make_problem,
    sweep,
)


def loss(problem: Problem, update: np.ndarray) -> float:
    return float(np.sum((problem.residual - problem.x @ update) ** 2))


@pytest.mark.parametrize("blocks", [2, 4, 8, 16])
def test_the_boundary_is_where_the_rank_passes_the_block_width(blocks: int) -> None:
    """m1 = 64: exact up to rank 64 / N, and not at the next rank."""
    exact = []
    for rank in range(1, 64 // blocks + 4):
        problem = make_problem(96, 64, 48, rank, 48, seed=rank)
        exact.append(diablo_loss(problem, blocks) == pytest.approx(full_loss(problem), rel=1e-9))
        assert condition(problem.x, blocks) == exact[-1]
    assert exact == [True] * (64 // blocks) + [False] * 3


def test_block_ranks_by_hand() -> None:
    """Two blocks of two columns; the second is the first column twice."""
    x = np.array([[1.0, 0, 1, 1], [0, 1, 0, 0], [0, 0, 0, 0]])
    assert block_ranks(x, 2) == [2, 1]
    assert not condition(x, 2)
    assert condition(x[:, [0, 1, 1, 0]], 2)


def test_the_losses_by_hand() -> None:
    """X is the 4 × 4 identity: W fits everything, blocks fit their entries, rank one fits the largest direction."""
    residual = np.array([[3.0, 0, 0, 0], [0, 2, 0, 0], [0, 0, 1, 0], [5, 0, 0, 1]])
    problem = Problem(np.eye(4), residual)
    assert full_loss(problem) == pytest.approx(0)
    assert diablo_loss(problem, 2) == pytest.approx(25)  # from the 5 outside the blocks
    assert lora_loss(Problem(np.eye(4), np.diag([3.0, 2, 1, 1])), 1) == pytest.approx(4 + 1 + 1)


def test_the_diablo_optimum_has_its_loss_and_its_form() -> None:
    problem = make_problem(40, 24, 12, rank=20, update_rank=12, seed=0)
    update = diablo_optimum(problem, 3)
    assert loss(problem, update) == pytest.approx(diablo_loss(problem, 3))
    mask = np.kron(np.eye(3), np.ones((8, 4)))
    assert not update[mask == 0].any()
    generator = np.random.default_rng(1)
    for _ in range(20):  # convex: any other blocks have a larger loss
        assert loss(problem, update + 0.1 * mask * generator.normal(size=update.shape)) > diablo_loss(problem, 3)


def test_the_lora_optimum_is_reached_by_a_product_and_by_no_other() -> None:
    problem = make_problem(40, 16, 12, rank=10, update_rank=8, seed=0)
    fitted = np.linalg.lstsq(problem.x, problem.residual)[0]
    left, singular, right = np.linalg.svd(problem.x @ fitted, full_matrices=False)
    a = np.linalg.lstsq(problem.x, left[:, :3] * singular[:3])[0]
    assert loss(problem, a @ right[:3]) == pytest.approx(lora_loss(problem, 3))
    generator = np.random.default_rng(1)
    for _ in range(20):
        a, b = generator.normal(size=(16, 3)), generator.normal(size=(3, 12))
        assert loss(problem, a @ b) > lora_loss(problem, 3)


def test_within_the_condition_lora_at_equal_budget_is_never_better() -> None:
    for row in sweep([2, 4, 8, 16], [4, 8], m=64, b=96, update_rank=64):
        if row["rank"] * row["num_blocks"] <= 64:
            assert row["diablo"] == 0 <= row["lora"]
        assert (row["lora"] > 0) == (row["rank"] > row["lora_rank"])


def test_outside_the_condition_lora_can_be_better() -> None:
    """rank(X) = 64 > m1 / N = 8: the paper's claim needs its condition."""
    (row,) = sweep([64], [16], m=128, b=192)
    assert 0 < row["lora"] < row["diablo"]
    (low,) = sweep([64], [16], m=128, b=192, update_rank=2)
    assert low["lora"] < row["lora"]  # the more so, the lower the rank of the target


@given(seed=st.integers(0, 10_000), rank=st.integers(1, 12))
def test_stationary_for_the_blocks_is_stationary_for_all_of_w(seed: int, rank: int) -> None:
    """For any loss, X_i^T g_i = 0 for every block implies X^T g_Y = 0 if rank(X_i) = rank(X), here ≤ 24 / 3 = 8."""
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(30, rank)) @ generator.normal(size=(rank, 24))
    blocks = []
    for block in np.split(x, 3, axis=1):
        basis = np.linalg.svd(block, full_matrices=False)[0][:, : min(rank, 8)]
        g = generator.normal(size=(30, 5))
        blocks.append(g - basis @ (basis.T @ g))
        assert np.abs(block.T @ blocks[-1]).max() < 1e-8
    gradient = np.abs(x.T @ np.hstack(blocks)).max()
    assert (gradient < 1e-8) == condition(x, 3) == (rank <= 8)


def test_at_the_optimum_of_the_blocks_the_full_gradient_vanishes_or_not() -> None:
    for rank, vanishes in ((8, True), (12, False)):
        problem = make_problem(40, 24, 24, rank, 24, seed=0)
        gradient = full_gradient(problem, diablo_optimum(problem, 3))
        assert np.abs(gradient[:8, :8]).max() < 1e-8  # the blocks' own
        assert (np.abs(gradient).max() < 1e-8) == vanishes


def test_the_gradient_of_a_vanishes_at_b_zero() -> None:
    problem = make_problem(30, 12, 10, 6, 4, seed=0)
    a = np.random.default_rng(0).normal(size=(12, 3))
    of_a, of_b = lora_gradients(problem, a, np.zeros((3, 10)))
    assert not of_a.any()
    assert np.abs(of_b).max() > 0.1


def test_lora_gradients_are_differences_of_the_loss() -> None:
    problem = make_problem(30, 12, 10, 6, 4, seed=0)
    generator = np.random.default_rng(0)
    a, b = generator.normal(size=(12, 3)), generator.normal(size=(3, 10))
    along_a, along_b = generator.normal(size=a.shape), generator.normal(size=b.shape)
    of_a, of_b = lora_gradients(problem, a, b)
    step = 1e-5
    for gradient, along, at in (
        (of_a, along_a, lambda s: (a + s * along_a) @ b),
        (of_b, along_b, lambda s: a @ (b + s * along_b)),
    ):
        slope = (loss(problem, at(step)) - loss(problem, at(-step))) / (4 * step)  # the derivative of half the loss
        assert np.sum(gradient * along) == pytest.approx(slope, rel=1e-5)


@pytest.mark.parametrize(
    ("m1", "m2", "blocks", "rank"), [(4096, 4096, 64, 32), (4096, 11008, 64, 46), (128, 128, 16, 4)]
)
def test_equal_budget(m1: int, m2: int, blocks: int, rank: int) -> None:
    assert equal_budget_rank(m1, m2, blocks) == rank
    assert rank * (m1 + m2) <= m1 * m2 // blocks < (rank + 1) * (m1 + m2)


def test_blocks_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="10 columns cannot be cut into 3"):
        diablo_loss(make_problem(20, 10, 9, 4, 4, seed=0), 3)


def test_the_map_says_in_signs_what_the_losses_are() -> None:
    """Width 16, N = 4: DiaBlo is exact up to rank 4, LoRA of rank 2 up to rank 2."""
    rows = sweep([2, 4, 16], [4], m=16, b=32, update_rank=16)
    assert [(row["diablo"] == 0, row["lora"] == 0) for row in rows] == [(True, True), (True, False), (False, False)]
    picture = least_squares_map("map", 16, [("a", rows), ("b", rows)])
    for axes in picture.figure.axes[:2]:
        assert [text.get_text() for text in axes.texts] == [
            "=",
            "D=",
            "D" if rows[2]["diablo"] < rows[2]["lora"] else "L",
        ]
        assert np.asarray(axes.get_lines()[0].get_xdata()).tolist() == [1.5, 1.5]  # after the second of three ranks
    assert [sign(0.1, 0), sign(0.1, 0.2), sign(0.2, 0.1)] == ["L=", "D", "L"]


def test_numpy_is_all_it_needs() -> None:
    program = "import sys, analysis.theory; assert not {'scipy', 'pandas', 'torch', 'matplotlib'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=240)


@pytest.mark.parametrize("rank", [1, 4, 5, 9])
def test_the_mirrored_condition_on_the_gradient_is_enough_too(rank: int) -> None:
    """X_i^T g_Y_i = 0 for every block of 4 columns implies X^T g_Y = 0 if rank(g_Y) ≤ 4, for any rank of X."""
    generator = np.random.default_rng(0)
    gradient = generator.normal(size=(40, rank)) @ generator.normal(size=(rank, 12))
    blocks = []
    for part in np.split(gradient, 3, axis=1):
        x = generator.normal(size=(40, 8))
        blocks.append(x - part @ np.linalg.lstsq(part, x, rcond=None)[0])
    for x, part in zip(blocks, np.split(gradient, 3, axis=1), strict=True):
        assert np.abs(x.T @ part).max() < 1e-9
    assert (np.abs(np.hstack(blocks).T @ gradient).max() < 1e-9) == (rank <= 4)
