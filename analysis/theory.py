"""DiaBlo in least squares: when diagonal blocks of W reach the same optimum as all of W. numpy only.

Fit Y by X (W0 + ΔW), in the paper's convention Y = X W: X is (b, m1), W is (m1, m2), and X = [X_1 … X_N] is cut into N
column blocks of m1 / N. With block-diagonal ΔW the problem splits into one least-squares problem per block, and the
column spaces decide: if rank(X_i) = rank(X) for every i, every block spans the whole column space of X and fits its
columns of Y as well as a free ΔW does. In general position rank(X_i) = min(rank(X), m1 / N), so the condition is
rank(X) ≤ m1 / N. Conversely, for any loss: if every block of the gradient g_Y has the column space of g_Y, then the
gradient of W vanishes wherever those of all blocks do. experiments/train/spectra.py measures both. The paper's theorems
are not fully public; these statements are derived here.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]
TOLERANCE = 1e-9  # on relative losses: the rounding error of an exact fit in double precision


@dataclass(frozen=True)
class Problem:
    """Minimise ||residual - X ΔW||² over ΔW; `residual` is Y - X W0."""

    x: Matrix  # (b, m1)
    residual: Matrix  # (b, m2)


def make_problem(b: int, m1: int, m2: int, rank: int, update_rank: int, seed: int, noise: float = 0.5) -> Problem:
    """Draw X in general position with this rank; the residual is X times an update of `update_rank`, plus noise."""
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(b, rank)) @ generator.normal(size=(rank, m1)) / np.sqrt(rank)
    update = generator.normal(size=(m1, update_rank)) @ generator.normal(size=(update_rank, m2))
    exact = x @ update
    scale = np.sqrt(np.mean(exact**2)) if update_rank else 1.0
    return Problem(x, exact / scale + noise * generator.normal(size=(b, m2)))


def full_loss(problem: Problem) -> float:
    """Return the smallest loss of a free ΔW: the part of the residual outside the column space of X."""
    return _outside(problem.x, problem.residual)


def diablo_loss(problem: Problem, num_blocks: int) -> float:
    """Return the smallest loss of a block-diagonal ΔW: N independent, convex least-squares problems, solved exactly."""
    blocks = zip(_columns(problem.x, num_blocks), _columns(problem.residual, num_blocks), strict=True)
    return sum(_outside(x, residual) for x, residual in blocks)


def lora_loss(problem: Problem, rank: int) -> float:
    """Return the smallest loss of ΔW = A B with inner size `rank`: reduced-rank regression (Izenman 1975).

    Besides the part outside the column space of X, the fit loses the singular values of the fitted part beyond the
    first `rank` (Eckart and Young). It is the global optimum, which gradient descent on A and B need not find.
    """
    fitted = _basis(problem.x).T @ problem.residual
    singular = np.linalg.svd(fitted, compute_uv=False)
    return full_loss(problem) + float(np.sum(singular[rank:] ** 2))


def diablo_optimum(problem: Problem, num_blocks: int) -> Matrix:
    """Return the block-diagonal ΔW of smallest loss (and least norm, if there are several), an (m1, m2) matrix."""
    d1, d2 = problem.x.shape[1] // num_blocks, problem.residual.shape[1] // num_blocks
    update = np.zeros((problem.x.shape[1], problem.residual.shape[1]))
    pairs = zip(_columns(problem.x, num_blocks), _columns(problem.residual, num_blocks), strict=True)
    for place, (x, residual) in enumerate(pairs):
        block = np.linalg.lstsq(x, residual)[0]
        update[place * d1 : (place + 1) * d1, place * d2 : (place + 1) * d2] = block
    return update


def full_gradient(problem: Problem, update: Matrix) -> Matrix:
    """Return the gradient of half the loss over all of W at ΔW = `update`, (m1, m2): X^T g_Y, g_Y = X ΔW - residual."""
    return problem.x.T @ (problem.x @ update - problem.residual)


def lora_gradients(problem: Problem, a: Matrix, b: Matrix) -> tuple[Matrix, Matrix]:
    """Return the gradients of half the loss over A (m1, r) and B (r, m2) of ΔW = A B: g_W B^T and A^T g_W."""
    gradient = full_gradient(problem, a @ b)
    return gradient @ b.T, a.T @ gradient


def block_ranks(x: Matrix, num_blocks: int) -> list[int]:
    """Return the ranks of X_1 … X_N."""
    return [int(np.linalg.matrix_rank(block)) for block in _columns(x, num_blocks)]


def condition(x: Matrix, num_blocks: int) -> bool:
    """Return whether rank(X_i) = rank(X) for every block."""
    return set(block_ranks(x, num_blocks)) == {int(np.linalg.matrix_rank(x))}


def equal_budget_rank(m1: int, m2: int, num_blocks: int) -> int:
    """Return the largest LoRA rank with no more parameters than N blocks: r (m1 + m2) ≤ m1 m2 / N."""
    return m1 * m2 // num_blocks // (m1 + m2)


def sweep(
    ranks: list[int], num_blocks: list[int], *, b: int = 192, m: int = 128, update_rank: int = 128, seeds: int = 3
) -> list[dict[str, float]]:
    """Return losses over rank(X) and N for square matrices (m, m), averaged over `seeds` draws of `make_problem`.

    One row per pair: `rank`, `num_blocks`, `budget` (trained share of W), `lora_rank` at equal budget, and the losses
    above the full optimum relative to the loss before training: `diablo`, `lora`. Zero means that the full optimum is
    reached.
    """
    rows = []
    for rank in ranks:
        problems = [make_problem(b, m, m, rank, update_rank, seed) for seed in range(seeds)]
        before = [float(np.sum(problem.residual**2)) for problem in problems]
        best = [full_loss(problem) for problem in problems]
        for blocks in num_blocks:
            lora_rank = equal_budget_rank(m, m, blocks)
            diablo = [diablo_loss(problem, blocks) for problem in problems]
            lora = [lora_loss(problem, lora_rank) for problem in problems]
            excess = [np.mean((np.array(loss) - best) / before) for loss in (diablo, lora)]
            gaps = [0.0 if gap < TOLERANCE else float(gap) for gap in excess]
            row = {"rank": rank, "num_blocks": blocks, "budget": 1 / blocks, "lora_rank": lora_rank}
            rows.append(row | dict(zip(("diablo", "lora"), gaps, strict=True)))
    return rows


def _columns(matrix: Matrix, parts: int) -> list[Matrix]:
    if matrix.shape[1] % parts:
        raise ValueError(f"{matrix.shape[1]} columns cannot be cut into {parts} equal blocks")
    return np.split(matrix, parts, axis=1)


def _basis(x: Matrix) -> Matrix:
    """Return an orthonormal basis of the column space of X, (b, rank)."""
    left, singular, _ = np.linalg.svd(x, full_matrices=False)
    return left[:, singular > singular[0] * max(x.shape) * np.finfo(np.float64).eps]


def _outside(x: Matrix, residual: Matrix) -> float:
    basis = _basis(x)
    return float(np.sum((residual - basis @ (basis.T @ residual)) ** 2))
