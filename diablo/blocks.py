"""The maths of DiaBlo on plain tensors: shapes, product, dense update.

The paper (arXiv 2506.03230, section 3) writes ``Y = X W0 + X D`` with weights that map in → out and
``D = diag(D_1 … D_N)``; the blocks are kept together as 𝒟, here ``blocks`` of shape ``(num_blocks, d_in, d_out)``.
``nn.Linear.weight`` is ``(out_features, in_features)``, the transpose of the paper's W. The transpose happens in two
functions of this file and nowhere else: ``delta_weight`` and ``diagonal_blocks``.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class BlockShape(NamedTuple):
    """Shape of ``blocks``: N blocks that map ``d_in`` inputs to ``d_out`` outputs each."""

    num_blocks: int
    d_in: int
    d_out: int


def block_shape(in_features: int, out_features: int, num_blocks: int, allow_uneven: bool = False) -> BlockShape:
    """Shape of the blocks of one linear layer.

    With ``allow_uneven`` the authors' rule holds (ziyangjoy/DiaBlo, ``diablo/block_linear.py``): both sides of a block
    are rounded up, and N becomes the number of such blocks that covers the longer side. It may then be smaller than
    the N that was asked for: 10 × 10 with N = 7 makes 5 blocks of 2 × 2.

    Raises:
        ValueError: N < 1, or N does not divide both sides and ``allow_uneven`` is False.
    """
    if num_blocks < 1:
        raise ValueError(f"num_blocks={num_blocks} must be at least 1")
    if in_features % num_blocks == 0 and out_features % num_blocks == 0:
        return BlockShape(num_blocks, in_features // num_blocks, out_features // num_blocks)
    if not allow_uneven:
        common = math.gcd(in_features, out_features)
        divisors = [n for n in range(1, common + 1) if common % n == 0]
        nearest = [max(n for n in divisors if n < num_blocks), *[n for n in divisors if n > num_blocks][:1]]
        raise ValueError(
            f"num_blocks={num_blocks} does not divide in_features={in_features} and out_features={out_features}; "
            f"nearest values that divide both: {' and '.join(map(str, nearest))} (or set allow_uneven=True)"
        )
    d_in, d_out = math.ceil(in_features / num_blocks), math.ceil(out_features / num_blocks)
    return BlockShape(max(math.ceil(in_features / d_in), math.ceil(out_features / d_out)), d_in, d_out)


def num_parameters(in_features: int, out_features: int, num_blocks: int, allow_uneven: bool = False) -> int:
    """Trainable parameters of one layer: in · out / N when N divides both sides, padding included when it does not."""
    return math.prod(block_shape(in_features, out_features, num_blocks, allow_uneven))


def block_diagonal_product(x: Tensor, blocks: Tensor, out_features: int) -> Tensor:
    """``x @ diag(D_1 … D_N)``, the second term of the paper's forward pass.

    Args:
        x: ``(..., in_features)``, any number of leading dimensions, which may be empty.
        blocks: ``(num_blocks, d_in, d_out)``. ``x`` is padded with zeros to ``num_blocks * d_in``.
        out_features: the product is cut to this length.

    Returns:
        ``(..., out_features)``.

    Raises:
        ValueError: the blocks are too small for ``x`` or for ``out_features``.
    """
    num_blocks, d_in, d_out = blocks.shape
    padding = num_blocks * d_in - x.shape[-1]
    if padding < 0 or out_features > num_blocks * d_out:
        raise ValueError(
            f"blocks of shape {tuple(blocks.shape)} cover {num_blocks * d_in} inputs and {num_blocks * d_out} outputs, "
            f"but x has {x.shape[-1]} and out_features={out_features}"
        )
    leading = x.shape[:-1]
    if padding:
        x = F.pad(x, (0, padding))
    # (N, tokens, d_in) is a strided view: the batched product reads it as it is. Only its result is copied, back to
    # (tokens, N, d_out).
    y = torch.bmm(x.reshape(-1, num_blocks, d_in).transpose(0, 1), blocks)
    y = y.transpose(0, 1).reshape(*leading, num_blocks * d_out)
    return y if out_features == num_blocks * d_out else y[..., :out_features]


def delta_weight(blocks: Tensor, in_features: int, out_features: int) -> Tensor:
    """The update as a dense matrix in the layout of ``nn.Linear.weight``.

    Args:
        blocks: ``(num_blocks, d_in, d_out)``.

    Returns:
        ``(out_features, in_features)``, zero outside the diagonal blocks, each of which holds ``D_i`` transposed.
    """
    return torch.block_diag(*blocks)[:in_features, :out_features].T.contiguous()


def diagonal_blocks(weight: Tensor, shape: BlockShape) -> list[Tensor]:
    """The parts of a weight that the blocks change, as views into it.

    Args:
        weight: ``(out_features, in_features)``.

    Returns:
        N views in the paper's orientation, ``(d_in, d_out)`` each. In an uneven split the last ones are smaller, down
        to empty: the rest of such a block lies outside the weight.
    """
    num_blocks, d_in, d_out = shape
    return [weight[i * d_out : (i + 1) * d_out, i * d_in : (i + 1) * d_in].T for i in range(num_blocks)]
