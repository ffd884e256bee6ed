"""Which entries of a weight a sparse pattern trains: their number, and how they are drawn.

Rows and columns are those of the paper's W, which is (in, out): see `diablo.blocks.positions`. At one density, all
patterns train the same number of entries, density · in · out. With N = 1 / density the grid of blocks has N × N cells;
a pattern of blocks takes N of them.
"""

from __future__ import annotations

import hashlib
from fractions import Fraction

import torch
from torch import Tensor

from diablo.blocks.positions import Positions
from diablo.blocks.products import BlockShape

BLOCK_PATTERNS = ("diagonal", "random_block", "permuted_block", "shuffled_diagonal")
PATTERNS = (*BLOCK_PATTERNS, "random_row", "random_column", "random_entry", "banded")


def pattern_shape(
    pattern: str, in_features: int, out_features: int, density: Fraction, count: int | None = None
) -> BlockShape:
    """Return the number and sides of the blocks that a pattern trains in one layer.

    Args:
        density: share of the entries that are trained.
        count: number of rows or columns, instead of a density.

    Raises:
        ValueError: the density does not give whole rows, columns, blocks or entries of this layer, or the pattern is
            unknown.
    """

    def share_of(total: int, what: str) -> int:
        number = density * total
        if number.denominator > 1 or not 1 <= number <= total:
            raise ValueError(
                f"pattern={pattern}: density={density} of in_features={in_features} × out_features={out_features} "
                f"makes {float(number):g} of {total:,} {what}, which must be a whole number of at least 1"
            )
        return int(number)

    if pattern in ("random_row", "random_column"):
        side, what = (in_features, "rows") if pattern == "random_row" else (out_features, "columns")
        if count is not None and not 1 <= count <= side:
            raise ValueError(f"count={count} must be between 1 and the layer's {side} {what}")
        number = share_of(side, what) if count is None else count
        return BlockShape(1, number, out_features) if pattern == "random_row" else BlockShape(1, in_features, number)
    if pattern == "random_entry":
        return BlockShape(share_of(in_features * out_features, "entries"), 1, 1)
    if pattern == "banded":
        return BlockShape(in_features * share_of(out_features, "entries per row"), 1, 1)
    if pattern not in BLOCK_PATTERNS:
        raise _unknown(pattern)
    if density.numerator != 1:
        raise ValueError(f"pattern={pattern}: density={density} must be 1/N with an integer N, the side of the grid")
    d_in, d_out = (share_of(side, "features per block") for side in (in_features, out_features))
    return BlockShape(density.denominator, d_in, d_out)


def draw(pattern: str, shape: BlockShape, in_features: int, out_features: int, generator: torch.Generator) -> Positions:
    """Draw the positions of blocks of this shape.

    - `diagonal`: DiaBlo's own positions.
    - `random_block`: distinct cells of the grid, uniformly drawn.
    - `permuted_block`: one block in each row and column of blocks, a random permutation.
    - `shuffled_diagonal`: diagonal blocks of a W whose rows are randomly permuted.
    - `random_row`, `random_column`, `random_entry`: distinct ones, uniformly drawn.
    - `banded`: the same number of entries in every row, around the diagonal (scaled if W is not square); the band is
      shifted at both ends to lie inside W.

    Raises:
        ValueError: the pattern is unknown.
    """
    num_blocks, d_in, d_out = shape
    if pattern == "random_row":
        return _positions(draw_distinct(in_features, d_in, generator)[None], _all(out_features)[None])
    if pattern == "random_column":
        return _positions(_all(in_features)[None], draw_distinct(out_features, d_out, generator)[None])
    if pattern == "random_entry":
        entries = draw_distinct(in_features * out_features, num_blocks, generator)[:, None]
        return _positions(entries // out_features, entries % out_features)
    if pattern == "banded":
        width = num_blocks // in_features
        middle = (2 * _all(in_features) + 1) * out_features // (2 * in_features)
        start = (middle - width // 2).clamp(0, out_features - width)
        outputs = start[:, None] + _all(width)
        return _positions(_all(in_features)[:, None].expand_as(outputs).reshape(-1, 1), outputs.reshape(-1, 1))
    if pattern == "shuffled_diagonal":
        shuffled = torch.randperm(in_features, generator=generator, device="cpu").view(num_blocks, d_in)
        return _positions(shuffled.sort(1).values, _all(out_features).view(num_blocks, d_out))
    if pattern == "random_block":
        cells = draw_distinct(num_blocks**2, num_blocks, generator)
        return grid_positions(cells // num_blocks, cells % num_blocks, d_in, d_out)
    if pattern == "permuted_block":
        columns = torch.randperm(num_blocks, generator=generator, device="cpu")
        return grid_positions(_all(num_blocks), columns, d_in, d_out)
    if pattern == "diagonal":
        return grid_positions(_all(num_blocks), _all(num_blocks), d_in, d_out)
    raise _unknown(pattern)


def _unknown(pattern: str) -> ValueError:
    return ValueError(f"pattern={pattern!r} is unknown to diablo.blocks.patterns: choose one of {', '.join(PATTERNS)}")


def grid_positions(rows: Tensor, columns: Tensor, d_in: int, d_out: int) -> Positions:
    """Blocks of `d_in` × `d_out` in the cells `(rows[b], columns[b])` of a grid."""
    return _positions(rows[:, None] * d_in + _all(d_in), columns[:, None] * d_out + _all(d_out))


def generator_for(seed: int, name: str) -> torch.Generator:
    """Return a CPU generator that depends only on the seed and a name, e.g. that of a layer."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:7]))


def draw_distinct(total: int, count: int, generator: torch.Generator) -> Tensor:
    """Draw `count` distinct numbers below `total`, ascending; if they are few, without a list of all numbers."""
    if count * 4 > total:
        return torch.randperm(total, generator=generator, device="cpu")[:count].sort().values
    drawn = torch.empty(0, dtype=torch.int64, device="cpu")
    while len(drawn) < count:
        drawn = torch.cat([drawn, torch.randint(total, (count,), generator=generator, device="cpu")]).unique()
    return drawn[torch.randperm(len(drawn), generator=generator, device="cpu")[:count]].sort().values


def _all(number: int) -> Tensor:
    return torch.arange(number, device="cpu")


def _positions(inputs: Tensor, outputs: Tensor) -> Positions:
    return Positions(inputs.to(torch.int32), outputs.to(torch.int32))
