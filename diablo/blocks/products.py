"""The maths of DiaBlo on plain tensors: block shapes, products, gradient and dense update.

The paper (arXiv 2506.03230, section 3) writes ``Y = X W0 + X D`` with weights that map in → out and
``D = diag(D_1 … D_N)``; the blocks are kept together as 𝒟, here ``blocks`` of shape ``(num_blocks, d_in, d_out)``.
``nn.Linear.weight`` is ``(out_features, in_features)``, the transpose of the paper's W. The transpose happens in two
functions of this file and nowhere else: ``delta_weight`` and ``diagonal_blocks``.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

LARGEST_GROUP = 512  # side of a group of blocks; measured to pay at 344, and to cost half as much again at 1,032
TINY_SIDE = 20  # of a block: below it one more copy is faster on the CPU (measured at 512 tokens, sides 4 to 24)


class BlockShape(NamedTuple):
    """Shape of ``blocks``: N blocks that map ``d_in`` inputs to ``d_out`` outputs each."""

    num_blocks: int
    d_in: int
    d_out: int


def block_shape(in_features: int, out_features: int, num_blocks: int, allow_uneven: bool = False) -> BlockShape:
    """Return the shape of the blocks of one linear layer.

    ``allow_uneven`` applies the authors' rule (ziyangjoy/DiaBlo, ``diablo/block_linear.py``): both sides of a block are
    rounded up, and N becomes the number of such blocks that covers the longer side. It may then be smaller than the
    requested N: 10 × 10 with N = 7 gives 5 blocks of 2 × 2.

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
    """Return the trainable parameters of a layer: in · out / N if N divides both sides, else including the padding."""
    return math.prod(block_shape(in_features, out_features, num_blocks, allow_uneven))


def whole_blocks(shape: BlockShape, in_features: int, out_features: int) -> tuple[int, int, int]:
    """Return the number of blocks that lie inside the layer, and the sides of the block that its edge cuts.

    An even split cuts none: `(N, 0, 0)`. In an uneven one, the block after the whole ones is cut to `(rows, columns)`;
    either may be 0. Later blocks lie outside, since no input or no output is left for them.
    """
    num_blocks, d_in, d_out = shape
    whole = min(num_blocks, in_features // d_in, out_features // d_out)
    if whole == num_blocks:
        return whole, 0, 0
    return whole, min(d_in, in_features - whole * d_in), min(d_out, out_features - whole * d_out)


def is_even(shape: tuple[int, ...], in_features: int, out_features: int) -> bool:
    """Return whether blocks of this shape cover the whole diagonal of a layer, without padding."""
    num_blocks, d_in, d_out = shape
    return (num_blocks * d_in, num_blocks * d_out) == (in_features, out_features)


def covered(blocks: Tensor, in_features: int, out_features: int) -> list[Tensor]:
    """Return the entries of ``blocks`` that lie inside the layer, as one view or, in an uneven split, two.

    Returns:
        ``(whole, d_in, d_out)`` and, if a block is cut, ``(1, rows, columns)``.
    """
    whole, rows, columns = whole_blocks(BlockShape(*blocks.shape), in_features, out_features)
    parts = [blocks[:whole]]
    if rows and columns:
        parts.append(blocks[whole : whole + 1, :rows, :columns])
    return parts


def neighbours(num_blocks: int, d_in: int, d_out: int, x: Tensor) -> int:
    """Return how many neighbouring blocks to multiply as one block that is zero off its own diagonal; 1 for each alone.

    cuBLAS takes up to twice as long where a block's rows in 16 bits are not aligned to 16 bytes: in LLaMA2-7B with
    N = 64, sides of 172. Two of them are aligned, and the products with zeros take less time than that saves as long as
    the blocks are small.
    """
    group = 8 // math.gcd(8, d_in, d_out) if x.is_cuda and x.element_size() == 2 else 1
    pays = num_blocks % group == 0 and group * max(d_in, d_out) <= LARGEST_GROUP
    return group if pays else 1


def block_product(x: Tensor, blocks: Tensor, out_features: int) -> Tensor:
    """Compute ``x @ diag(D_1 … D_N)``, the second term of the paper's forward pass, as a new tensor.

    One strided batched product reads ``x`` and writes the result, without padding, permuting or copying either.
    With ``blocks`` transposed to ``(num_blocks, d_out, d_in)`` it computes the branch's part of dX.

    Args:
        x: ``(tokens, in_features)``.
        blocks: ``(num_blocks, d_in, d_out)``, same dtype as ``x``.

    Returns:
        ``(tokens, out_features)``.
    """
    _, d_in, d_out = blocks.shape
    if not is_even(blocks.shape, x.shape[1], out_features):
        return add_block_product_(x.new_zeros(x.shape[0], out_features), x, blocks)
    blocks = _grouped(blocks, x)
    x_blocks = x.unflatten(1, blocks.shape[:2]).transpose(0, 1)
    if _is_copied(x, d_in, d_out):
        return torch.bmm(x_blocks, blocks).transpose(0, 1).flatten(1)
    y = x.new_empty(x.shape[0], out_features)
    torch.bmm(x_blocks, blocks, out=y.unflatten(1, (blocks.shape[0], blocks.shape[2])).transpose(0, 1))
    return y


def add_block_product_(y: Tensor, x: Tensor, blocks: Tensor) -> Tensor:
    """Compute ``y += x @ diag(D_1 … D_N)`` in place. Like ``block_product``, it copies neither ``x`` nor ``y``.

    Args:
        y: ``(tokens, out_features)``.
        x: ``(tokens, in_features)``, same dtype as ``y``.
        blocks: ``(num_blocks, d_in, d_out)``, same dtype as ``y``.

    Raises:
        ValueError: the blocks are too small for ``x`` or for ``y``.
    """
    num_blocks, d_in, d_out = blocks.shape
    in_features, out_features = x.shape[1], y.shape[1]
    if num_blocks * d_in < in_features or num_blocks * d_out < out_features:
        raise ValueError(
            f"blocks of shape {tuple(blocks.shape)} cover {num_blocks * d_in} inputs and {num_blocks * d_out} outputs, "
            f"but x has {in_features} and y has {out_features}"
        )
    whole, *cut = covered(blocks, in_features, out_features)
    n = whole.shape[0]
    if n:
        whole = _grouped(whole, x)
        x_blocks = x[:, : n * d_in].unflatten(1, whole.shape[:2]).transpose(0, 1)
        into = y[:, : n * d_out].unflatten(1, (whole.shape[0], whole.shape[2]))
        if _is_copied(y, d_in, d_out):
            into += torch.bmm(x_blocks, whole).transpose(0, 1)
        else:
            into.transpose(0, 1).baddbmm_(x_blocks, whole)
    for block in cut:
        rows, columns = block.shape[1:]
        part = y[:, n * d_out : n * d_out + columns]
        part.addmm_(x[:, n * d_in : n * d_in + rows], block[0])
    return y


def _is_copied(y: Tensor, d_in: int, d_out: int) -> bool:
    """Return whether a batched product is computed apart and copied to its place.

    The compiler does not support a product into a permuted view, and fuses the copy itself. On the CPU such a product
    runs block by block, which is slower than a copy if the blocks are tiny.
    """
    return torch.compiler.is_compiling() or (y.device.type == "cpu" and min(d_in, d_out) < TINY_SIDE)


def _grouped(blocks: Tensor, x: Tensor) -> Tensor:
    """Return the blocks as fewer, larger ones if `neighbours` says so."""
    num_blocks, d_in, d_out = blocks.shape
    group = neighbours(num_blocks, d_in, d_out, x)
    if group == 1:
        return blocks
    larger = blocks.new_zeros(num_blocks // group, group, d_in, group, d_out)
    larger.diagonal(dim1=1, dim2=3).copy_(blocks.unflatten(0, (-1, group)).permute(0, 2, 3, 1))
    return larger.view(num_blocks // group, group * d_in, group * d_out)


def block_gradient(x: Tensor, grad_y: Tensor, shape: BlockShape, dtype: torch.dtype) -> Tensor:
    """Compute ``dD_i = X_iᵀ dY_i``, the paper's gradient: exactly the diagonal blocks of the full gradient of W.

    Sums over tokens are computed in float32 (float64 for float64 inputs) and not rounded to the inputs' dtype.

    Args:
        x: ``(tokens, in_features)``.
        grad_y: ``(tokens, out_features)``, same dtype as ``x``.
        dtype: dtype of the result.

    Returns:
        ``(num_blocks, d_in, d_out)``, zero for entries outside the layer (uneven split).
    """
    whole, rows, columns = whole_blocks(shape, x.shape[1], grad_y.shape[1])
    num_blocks, d_in, d_out = shape
    narrow = x.dtype in (torch.float16, torch.bfloat16)
    if narrow and x.device.type != "cuda":
        x, grad_y, narrow = x.float(), grad_y.float(), False  # only CUDA can return float32 for 16-bit inputs
    wide: dict[str, Any] = {"out_dtype": torch.float32} if narrow else {}
    group = neighbours(whole, d_in, d_out, x)
    x_blocks = _columns(x, whole // group, group * d_in)
    y_blocks = _columns(grad_y, whole // group, group * d_out)
    # On the CPU, multiplying with the shorter side first takes half the time.
    if d_in <= d_out:
        gradient = torch.bmm(x_blocks.permute(1, 2, 0), y_blocks.transpose(0, 1), **wide)
    else:
        gradient = torch.bmm(y_blocks.permute(1, 2, 0), x_blocks.transpose(0, 1), **wide).transpose(1, 2)
    if group > 1:
        gradient = gradient.unflatten(2, (group, d_out)).unflatten(1, (group, d_in)).diagonal(dim1=1, dim2=3)
        gradient = gradient.permute(0, 3, 1, 2).flatten(0, 1)
    if whole == num_blocks:
        return gradient.to(dtype)
    result = gradient.new_zeros(shape, dtype=dtype)
    result[:whole] = gradient
    if rows and columns:
        x_cut = x[:, whole * d_in :][:, :rows].T[None]
        y_cut = grad_y[:, whole * d_out :][None, :, :columns]
        result[whole, :rows, :columns] = torch.bmm(x_cut, y_cut, **wide)[0]
    return result


def _columns(x: Tensor, num_blocks: int, width: int) -> Tensor:
    """Return the features of the first blocks as ``(tokens, num_blocks, width)``."""
    if num_blocks == 0:
        return x.new_zeros(x.shape[0], 0, width)
    return x[:, : num_blocks * width].unflatten(1, (num_blocks, width))


def delta_weight(blocks: Tensor, in_features: int, out_features: int) -> Tensor:
    """Return the update as a dense matrix in the layout of ``nn.Linear.weight``.

    Args:
        blocks: ``(num_blocks, d_in, d_out)``.

    Returns:
        ``(out_features, in_features)``, zero outside the diagonal blocks, each of which holds ``D_i`` transposed.
    """
    return torch.block_diag(*blocks)[:in_features, :out_features].T.contiguous()


def diagonal_blocks(weight: Tensor, shape: BlockShape) -> list[Tensor]:
    """Return the entries of a weight that the blocks change, as views that match the parts of ``covered``.

    Args:
        weight: ``(out_features, in_features)``, with any strides.

    Returns:
        In the paper's orientation: ``(whole, d_in, d_out)`` and, if an uneven split cuts a block,
        ``(1, rows, columns)``.
    """
    (out_features, in_features), (row, column) = weight.shape, weight.stride()
    whole, rows, columns = whole_blocks(shape, in_features, out_features)
    _, d_in, d_out = shape
    step = d_out * row + d_in * column  # from one block's first entry to the next one's
    strides, start = (step, column, row), weight.storage_offset()
    parts = [weight.as_strided((whole, d_in, d_out), strides, start)]
    if rows and columns:
        parts.append(weight.as_strided((1, rows, columns), strides, start + whole * step))
    return parts
