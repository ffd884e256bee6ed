"""Forward and backward pass of a linear layer with diagonal or other blocks, as autograd functions.

`block_linear` is the layer itself, for a plain weight: one product forward and one for dX, whether the blocks are in
the weight (in place) or added from the side. `add_blocks` adds the side branch to a layer that computes its own
product, e.g. a quantised one. Both save only x for the backward pass; in place, only the blocks' inputs if these are
fewer. With `recompute`, x itself is computed again in the backward pass where that is possible.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from diablo.blocks import branch
from diablo.blocks.branch import Dropout
from diablo.blocks.in_place import Overwrite
from diablo.blocks.positions import Positions, gather, is_smaller_gathered
from diablo.blocks.products import is_even
from diablo.blocks.recompute import RecomputedInput, recomputed_input


def block_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    blocks: Tensor,
    in_weight: Overwrite | None = None,
    dropout: float = 0.0,
    positions: Positions | None = None,
    recompute: bool = False,
) -> Tensor:
    """Compute `x @ (W0 + D)` with gradients for x and the blocks; weight and bias are frozen.

    The product uses the weight's dtype, or autocast's; the gradient of the blocks is summed in float32.

    Args:
        x: `(..., in_features)`.
        weight: `(out_features, in_features)`; holds W0 + D if `in_weight` is given, else W0.
        blocks: `(num_blocks, d_in, d_out)`.
        in_weight: the `Overwrite` that wrote the blocks into the weight.
        dropout: dropout probability of the side branch's input; must be 0 with `in_weight`.
        positions: positions of the blocks; None for the diagonal.
        recompute: compute x again in the backward pass where autograd keeps what it was computed from.

    Returns:
        `(..., out_features)`.
    """
    dtype = compute_dtype(x, weight.dtype)
    if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
        return F.linear(x, weight, bias)  # raises the same error as the frozen layer
    bias = None if bias is None else bias.to(dtype)
    where = positions or (None, None)
    recomputed = recomputed_input(x) if recompute and not _is_gathered(x, in_weight, positions) else None
    weight = weight.to(dtype)
    drawn = branch.draw(dropout, weight, _is_even(x, blocks, positions, weight.shape[0]))
    return _BlockLinear.apply(  # pyright: ignore
        x, weight, bias, blocks, *where, in_weight, drawn, recomputed
    )


def add_blocks(
    result: Tensor,
    x: Tensor,
    blocks: Tensor,
    dropout: float = 0.0,
    positions: Positions | None = None,
    recompute: bool = False,
) -> Tensor:
    """Compute `result + dropout(x) @ D` for a layer that has computed `result` from `x`.

    Args:
        result: `(..., out_features)`; overwritten with the sum if nothing else refers to it.
        x: `(..., in_features)`.
    """
    if result._base is not None or not (result.requires_grad and result.grad_fn is not None):
        result = result.clone(memory_format=torch.contiguous_format)  # a view, or a tensor that others use
    elif not result.is_contiguous():
        result = result.contiguous()  # so that its rows are a view of it
    where, recomputed = positions or (None, None), recomputed_input(x) if recompute else None
    drawn = branch.draw(dropout, result, _is_even(x, blocks, positions, result.shape[-1]))
    return _AddBlocks.apply(result, x, blocks, *where, drawn, recomputed)  # pyright: ignore


def compute_dtype(x: Tensor, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of a matrix product: autocast's if autocast applies, else the weight's."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and torch.float64 not in (x.dtype, dtype):
        return torch.get_autocast_dtype(device)
    return dtype


class _BlockLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        blocks: Tensor,
        inputs: Tensor | None,
        outputs: Tensor | None,
        in_weight: Overwrite | None,
        dropout: Dropout,
        recomputed: RecomputedInput | None,
    ) -> Tensor:
        positions = _positions(inputs, outputs)
        with _without_autocast(x):
            # Save x uncast, so that layers with one input (q, k and v) share one saved x, even if it is cast here.
            narrow = x.to(weight.dtype)
            if in_weight is not None:
                y = F.linear(narrow, weight, bias)
            elif bias is not None:
                y = F.linear(narrow, weight, bias)
                y = branch.add_product_(_rows(y), _rows(narrow), blocks, positions, dropout).view(y.shape)
            else:  # the branch first: then the large product adds to it on its way out
                rows = _rows(narrow)
                y = branch.product(rows, blocks, positions, weight.shape[0], dropout).addmm_(rows, weight.T)
                y = y.view(*x.shape[:-1], weight.shape[0])
        ctx.dropout, ctx.in_weight, ctx.x_dtype = dropout, in_weight, x.dtype
        ctx.gathered, ctx.recomputed = False, recomputed
        kept = x if recomputed is None else None
        if positions is not None and _is_gathered(x, in_weight, positions):
            kept, ctx.gathered = gather(_rows(x), positions.inputs), True
        if in_weight is None or torch.compiler.is_compiling():
            ctx.save_for_backward(kept, blocks, inputs, outputs, weight)
        else:
            # A reference pass with the adapter disabled may run between forward and backward (as in preference
            # training). It writes the weight twice and restores the same bits, but autograd's version check would
            # still fail: so check the version of the values instead.
            ctx.save_for_backward(kept, blocks, inputs, outputs)
            ctx.weight, ctx.version = weight, in_weight.version
        return y

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        (grad_y,) = grad_outputs
        x, blocks, inputs, outputs, *saved = ctx.saved_tensors
        positions = _positions(inputs, outputs)
        weight = saved[0] if saved else ctx.weight
        if not saved and not (ctx.in_weight.is_written and ctx.in_weight.version == ctx.version):
            raise RuntimeError(
                "the blocks in the weight have changed since the forward pass: an optimizer stepped or adapters "
                "were switched in between; use mode='adapter' for that"
            )
        x = x if ctx.recomputed is None else ctx.recomputed.take(ctx.next_functions[0][0])
        rows, grad_rows = _rows(x).to(weight.dtype), _rows(grad_y)
        mask = branch.mask_of(rows, ctx.dropout)
        grad_x = grad_blocks = None
        with _without_autocast(x):
            if ctx.needs_input_grad[0]:
                if ctx.in_weight is None:
                    grad_x = branch.input_gradient(grad_rows, blocks, positions, weight.shape[1], ctx.dropout, mask)
                    grad_x.addmm_(grad_rows, weight)
                else:
                    grad_x = grad_rows @ weight
                grad_x = grad_x.view(*grad_y.shape[:-1], weight.shape[1]).to(ctx.x_dtype)
            if ctx.needs_input_grad[3]:
                grad_blocks = branch.gradient(rows, grad_rows, blocks, positions, ctx.dropout, mask, ctx.gathered)
        return grad_x, None, None, grad_blocks, None, None, None, None, None


class _AddBlocks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        result: Tensor,
        x: Tensor,
        blocks: Tensor,
        inputs: Tensor | None,
        outputs: Tensor | None,
        dropout: Dropout,
        recomputed: RecomputedInput | None,
    ) -> Tensor:
        with _without_autocast(x):
            rows = _rows(x).to(result.dtype)
            branch.add_product_(_rows(result), rows, blocks, _positions(inputs, outputs), dropout)
        ctx.dropout, ctx.recomputed = dropout, recomputed
        ctx.save_for_backward(x if recomputed is None else None, blocks, inputs, outputs)
        ctx.mark_dirty(result)
        return result

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        (grad_y,) = grad_outputs
        x, blocks, inputs, outputs = ctx.saved_tensors
        x = x if ctx.recomputed is None else ctx.recomputed.take(ctx.next_functions[1][0])
        positions = _positions(inputs, outputs)
        rows, grad_rows = _rows(x).to(grad_y.dtype), _rows(grad_y)
        mask = branch.mask_of(rows, ctx.dropout)
        grad_x = grad_blocks = None
        with _without_autocast(x):
            if ctx.needs_input_grad[1]:
                grad_x = branch.input_gradient(grad_rows, blocks, positions, rows.shape[1], ctx.dropout, mask)
                grad_x = grad_x.view(x.shape).to(x.dtype)
            if ctx.needs_input_grad[2]:
                grad_blocks = branch.gradient(rows, grad_rows, blocks, positions, ctx.dropout, mask)
        return grad_y, grad_x, grad_blocks, None, None, None, None


def _is_gathered(x: Tensor, in_weight: Overwrite | None, positions: Positions | None) -> bool:
    """Return whether the blocks' inputs alone are saved, because they are fewer than x."""
    return in_weight is not None and positions is not None and is_smaller_gathered(positions, x.shape[-1])


def _is_even(x: Tensor, blocks: Tensor, positions: Positions | None, out_features: int) -> bool:
    return positions is None and is_even(blocks.shape, x.shape[-1], out_features)


def _positions(inputs: Tensor | None, outputs: Tensor | None) -> Positions | None:
    return None if inputs is None or outputs is None else Positions(inputs, outputs)


def _rows(x: Tensor) -> Tensor:
    """Reshape `(..., features)` to `(tokens, features)`, as a view when possible."""
    return x.reshape(-1, x.shape[-1]) if x.numel() else x.reshape(0, x.shape[-1])


def _without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Return a context in which operations keep their operands' dtype."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
