"""Sparse fine-tuning by pattern: DiaBlo's layer with blocks elsewhere than on the diagonal.

The patterns are those of the paper's ablation (arXiv 2506.03230: random rows, columns, blocks and entries), and some
that isolate why the diagonal works. `random_row` with a `count` is PaCA (arXiv 2503.01905).
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import partial

import torch
from torch import nn

from diablo.blocks.config import BlockConfig
from diablo.blocks.layer import layer_sides
from diablo.blocks.model import DiabloModel
from diablo.blocks.patterns import BLOCK_PATTERNS, PATTERNS, draw, generator_for, pattern_shape
from diablo.blocks.positions import Positions
from diablo.field_help import documented
from diablo.register import peft_type, register

SPARSE = peft_type("SPARSE")
LARGEST_DENOMINATOR = 10**6  # of a density given as a decimal number


@documented
@dataclass
class SparseConfig(BlockConfig):
    """Configuration of [`SparseModel`]: which entries of each target layer are trained; their updates start at zero.

    Example:

        config = SparseConfig(pattern="random_block", density="1/64", target_modules=["q_proj", "v_proj"])

    Args:
        pattern: One of diagonal, random_block, permuted_block, shuffled_diagonal, random_row, random_column,
            random_entry, banded; see diablo.blocks.patterns.draw. Rows are input features.
        density: Share of a layer's entries that are trained, e.g. '1/64' or 0.015625.
        count: Rows or columns per layer instead of a density, for random_row and random_column.
        seed: Seed of the draw, which also depends on the layer's name.

    Raises:
        ValueError: the pattern is unknown, or does not allow this density or count.
    """

    pattern: str = "random_entry"
    density: float | str = "1/64"
    count: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = SPARSE
        if self.pattern not in PATTERNS:
            raise ValueError(f"pattern={self.pattern!r}: choose one of {', '.join(PATTERNS)}")
        if self.count is not None and self.pattern not in ("random_row", "random_column"):
            raise ValueError(f"count={self.count} is for random_row and random_column: give {self.pattern} a density")
        if not 0 < self.fraction <= 1:
            raise ValueError(f"density={self.density!r} must be above 0 and at most 1")
        if self.pattern in BLOCK_PATTERNS and self.fraction.numerator != 1:
            raise ValueError(f"density={self.density!r} of pattern={self.pattern} must be 1/N with an integer N")

    @property
    def fraction(self) -> Fraction:
        """The density as an exact fraction."""
        try:
            return Fraction(self.density).limit_denominator(LARGEST_DENOMINATOR)
        except (ValueError, TypeError, ZeroDivisionError, OverflowError):
            raise ValueError(f"density={self.density!r} is not a share: write e.g. '1/64' or 0.015625") from None


class SparseModel(DiabloModel):
    """A model whose target layers train the entries of a pattern."""

    def _positions(self, config: BlockConfig, name: str, base_layer: nn.Module) -> Positions:
        assert isinstance(config, SparseConfig)
        in_features, out_features = layer_sides(base_layer)
        shape = pattern_shape(config.pattern, in_features, out_features, config.fraction, config.count)
        if all(tensor.is_meta for tensor in (*base_layer.parameters(), *base_layer.buffers())):
            # Only the number of parameters is needed, and a draw takes a second per large layer.
            inputs, outputs = ((shape.num_blocks, side) for side in (shape.d_in, shape.d_out))
            on_meta = partial(torch.empty, dtype=torch.int32, device="meta")
            return Positions(on_meta(inputs), on_meta(outputs))
        return draw(config.pattern, shape, in_features, out_features, generator_for(config.seed, name))


register(SPARSE, SparseConfig, SparseModel)
