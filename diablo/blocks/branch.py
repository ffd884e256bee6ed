"""The side branch `dropout(x) @ S` of a layer in adapter mode: its product, its part of dX and the gradient of S.

A seed gives the same mask every time, so no mask is kept from the forward to the backward pass. On a GPU, Triton
kernels make the mask where they multiply; elsewhere, PyTorch writes it.
"""

from __future__ import annotations

import warnings
from functools import cache
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from diablo.blocks import positions as at_positions
from diablo.blocks.positions import Positions
from diablo.blocks.products import BlockShape


class Dropout(NamedTuple):
    """Dropout of the branch's input."""

    probability: float = 0.0
    seed: int = 0
    in_kernels: bool = False  # the same in the forward and the backward pass: the two ways give different masks


def draw(probability: float, computed_as: Tensor, is_even: bool) -> Dropout:
    """Draw a seed from PyTorch's default generator, so that its state determines the mask, as for `nn.Dropout`.

    Args:
        computed_as: any tensor with the device and dtype that the branch computes with.
        is_even: whether the blocks are on the diagonal and cover the whole of it.
    """
    if not probability:
        return Dropout()
    suits = is_even and computed_as.is_cuda and computed_as.element_size() == 2 and not torch.compiler.is_compiling()
    return Dropout(
        probability,
        int(torch.randint(2**62, ())),
        suits and _kernels(computed_as.device, computed_as.dtype) is not None,
    )


def mask_of(x: Tensor, dropout: Dropout) -> Tensor | None:
    """Return the mask of the layer's input x, ones and zeros; None if nothing is dropped, or by the kernels."""
    if not dropout.probability or dropout.in_kernels:
        return None
    generator = torch.Generator(x.device).manual_seed(dropout.seed)
    return torch.empty_like(x).bernoulli_(1 - dropout.probability, generator=generator)


def product(x: Tensor, blocks: Tensor, positions: Positions | None, out_features: int, dropout: Dropout) -> Tensor:
    """Return `dropout(x) @ S`, `(tokens, out_features)`.

    Args:
        x: `(tokens, in_features)`.
        blocks: `(num_blocks, d_in, d_out)`, in float32 or the dtype of `x`.
    """
    if dropout.in_kernels:
        return _module(x).product(x, blocks, dropout.probability, dropout.seed)
    dropped = _drop(x, mask_of(x, dropout), dropout)
    return at_positions.product(dropped, blocks.to(x.dtype), positions, out_features)


def add_product_(y: Tensor, x: Tensor, blocks: Tensor, positions: Positions | None, dropout: Dropout) -> Tensor:
    """Compute `y += dropout(x) @ S` in place. Shapes are those of `product`."""
    if dropout.in_kernels:
        return y.add_(product(x, blocks, positions, y.shape[1], dropout))
    return at_positions.add_product_(y, _drop(x, mask_of(x, dropout), dropout), blocks.to(x.dtype), positions)


def input_gradient(
    grad_y: Tensor,
    blocks: Tensor,
    positions: Positions | None,
    in_features: int,
    dropout: Dropout,
    mask: Tensor | None,
) -> Tensor:
    """Return the branch's part of dX, `(tokens, in_features)`. `mask`: `mask_of` the layer's input."""
    transposed = blocks.transpose(1, 2)
    if dropout.in_kernels:
        return _module(grad_y).product(grad_y, transposed, dropout.probability, dropout.seed, drops_input=False)
    back = positions and positions.transposed
    grad_x = at_positions.product(grad_y, transposed.to(grad_y.dtype), back, in_features)
    return _drop(grad_x, mask, dropout)


def gradient(
    x: Tensor,
    grad_y: Tensor,
    blocks: Tensor,
    positions: Positions | None,
    dropout: Dropout,
    mask: Tensor | None,
    gathered: bool = False,
) -> Tensor:
    """Return the gradient of the blocks, in their shape and dtype.

    Args:
        x: `(tokens, in_features)`, or the blocks' inputs alone if `gathered`.
    """
    shape = BlockShape(*blocks.shape)
    if dropout.in_kernels:
        return _module(x).gradient(x, grad_y, shape, dropout.probability, dropout.seed).to(blocks.dtype)
    return at_positions.gradient(_drop(x, mask, dropout), grad_y, shape, positions, blocks.dtype, gathered)


def _drop(x: Tensor, mask: Tensor | None, dropout: Dropout) -> Tensor:
    """Inverted dropout. The scale is kept out of the mask: in 16 bits it would be rounded."""
    return x if mask is None else (x * mask).mul_(1 / (1 - dropout.probability))


@cache
def _kernels(device: torch.device, dtype: torch.dtype) -> ModuleType | None:
    """Return the module of kernels; None, with a warning, where Triton cannot run them."""
    try:
        from diablo.blocks import kernels

        kernels.try_out(device, dtype)
    except Exception as error:
        why = " ".join(str(error).split())[:200] or type(error).__name__
        warnings.warn(
            f"dropout takes longer in {dtype} on {device}, because Triton does not run there: {why}", stacklevel=2
        )
        return None
    return kernels


def _module(x: Tensor) -> ModuleType:
    kernels = _kernels(x.device, x.dtype)
    assert kernels is not None
    return kernels
