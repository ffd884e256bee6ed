"""The maths of blocks at given positions of a weight: rows, columns, blocks or single entries, in one form.

Names follow the paper's Y = X W, where W is (in, out): a row of W is an input feature and so a column of
`nn.Linear.weight`, which is (out, in); a column of W is an output feature and so a row of `nn.Linear.weight`.

`blocks` is `(n, d_in, d_out)` as in diablo/blocks/products.py. Block b trains the entries of W where the inputs
`inputs[b]` meet the outputs `outputs[b]`: k rows are one block of k inputs and all outputs; single entries are 1 × 1
blocks. `positions` is None for blocks on the diagonal, which need no index.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from diablo.blocks.products import BlockShape, add_block_product_, block_gradient, block_product

# Share of entries below which the CPU is faster without the dense product; measured at 1/8 and 1/64.
SAMPLED_BELOW = 1 / 16
CHUNK = 1024  # entries whose products over all tokens are held at once


class Positions(NamedTuple):
    """Which inputs and outputs each block trains, as int32. Within a block both ascend; no entry occurs twice."""

    inputs: Tensor  # (n, d_in)
    outputs: Tensor  # (n, d_out)

    @property
    def shape(self) -> BlockShape:
        num_blocks, d_in = self.inputs.shape
        return BlockShape(num_blocks, d_in, self.outputs.shape[1])

    @property
    def transposed(self) -> Positions:
        return Positions(self.outputs, self.inputs)


def product(x: Tensor, blocks: Tensor, positions: Positions | None, out_features: int) -> Tensor:
    """Compute `x @ S`, `(tokens, out_features)`, where S holds the blocks at their positions and is zero elsewhere."""
    if positions is None:
        return block_product(x, blocks, out_features)
    return add_product_(x.new_zeros(x.shape[0], out_features), x, blocks, positions)


def add_product_(y: Tensor, x: Tensor, blocks: Tensor, positions: Positions | None) -> Tensor:
    """Compute `y += x @ S` in place.

    Args:
        y: `(tokens, out_features)`.
        x: `(tokens, in_features)`, same dtype as `y`.
        blocks: `(n, d_in, d_out)`, same dtype as `y`.
    """
    if positions is None:
        return add_block_product_(y, x, blocks)
    if blocks.shape[1:] == (1, 1):  # at these densities a dense product is faster than any sparse one
        return y.addmm_(x, delta_weight(blocks, positions, x.shape[1], y.shape[1]).T)
    x = gather(x, positions.inputs)
    if _is_all(positions.outputs, y.shape[1]):
        return add_block_product_(y, x, blocks)
    columns = positions.outputs.flatten()
    return y.index_add_(1, columns, block_product(x, blocks, len(columns)))


def gradient(
    x: Tensor,
    grad_y: Tensor,
    shape: BlockShape,
    positions: Positions | None,
    dtype: torch.dtype,
    gathered: bool = False,
) -> Tensor:
    """Return the gradient of the blocks: the entries of W's gradient at their positions.

    Args:
        x: `(tokens, in_features)`, or the result of `gather` if `gathered`.
        grad_y: `(tokens, out_features)`, same dtype as `x`.
        dtype: dtype of the result; sums over tokens are computed in float32 (float64 for float64 inputs).

    Returns:
        `(n, d_in, d_out)`.
    """
    if positions is None:
        return block_gradient(x, grad_y, shape, dtype)
    if (shape.d_in, shape.d_out) == (1, 1) and not gathered:
        return _entries_gradient(x, grad_y, positions, dtype).view(shape)
    x = x if gathered else gather(x, positions.inputs)
    return block_gradient(x, gather(grad_y, positions.outputs), shape, dtype)


def gather(x: Tensor, index: Tensor) -> Tensor:
    """Select the features in `index` `(n, d)` as `(tokens, n · d)`; returns `x` itself if these are all, in order."""
    return x if _is_all(index, x.shape[1]) else x.index_select(1, index.flatten())


def is_smaller_gathered(positions: Positions, in_features: int) -> bool:
    """Return whether saving only the blocks' inputs for the backward pass takes less memory than saving x."""
    return positions.inputs.numel() < in_features


def delta_weight(blocks: Tensor, positions: Positions, in_features: int, out_features: int) -> Tensor:
    """Return S as a dense matrix in the layout of `nn.Linear.weight`, `(out_features, in_features)`."""
    delta = blocks.new_zeros(out_features, in_features)
    delta[positions.outputs[:, None, :], positions.inputs[:, :, None]] = blocks
    return delta


class ChosenEntries:
    """The entries of a weight at given positions, with the `Part` interface that `Overwrite` needs.

    Args:
        weight: `(out_features, in_features)`, with any strides.
    """

    def __init__(self, weight: Tensor, positions: Positions) -> None:
        self.weight = weight
        self.index = (positions.outputs[:, None, :], positions.inputs[:, :, None])

    def clone(self) -> Tensor:
        """Return the entries as `(n, d_in, d_out)`."""
        return self.weight[self.index]

    def copy_(self, values: Tensor) -> None:
        self.weight[self.index] = values.to(self.weight.dtype)

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype


def _is_all(index: Tensor, features: int) -> bool:
    return index.shape == (1, features)  # a block's features ascend and are distinct


def _entries_gradient(x: Tensor, grad_y: Tensor, positions: Positions, dtype: torch.dtype) -> Tensor:
    (in_features, out_features), (inputs, outputs) = (
        (x.shape[1], grad_y.shape[1]),
        (part.flatten() for part in positions),
    )
    if x.device.type != "cpu" or inputs.numel() > SAMPLED_BELOW * in_features * out_features:
        return block_gradient(x, grad_y, BlockShape(1, in_features, out_features), dtype)[0][inputs, outputs]
    if x.dtype in (torch.float16, torch.bfloat16):
        x, grad_y = x.float(), grad_y.float()
    by_input, by_output = x.T.contiguous(), grad_y.T.contiguous()  # makes the tokens of a feature contiguous
    chunks = zip(inputs.split(CHUNK), outputs.split(CHUNK), strict=True)
    sums = [(by_input.index_select(0, i) * by_output.index_select(0, j)).sum(1) for i, j in chunks]
    return torch.cat(sums).to(dtype)
