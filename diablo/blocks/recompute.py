"""A layer's input, computed again in the backward pass instead of kept for it.

The gradient of the blocks needs the layer's input x, which a frozen layer does not keep. Often autograd keeps what x
was computed from, for the operations that computed it: both factors of `silu(gate) * up`, the input of `down_proj` in
Llama-like models, and of `x * rsqrt(…)` in RMSNorm, whose output is the input of q, k, v and up. From these, the same
elementwise operations give the same x, bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class RecomputedInput:
    """The input of one or more layers (q, k and v share one): computed for the first, dropped after the last."""

    layers: int = 0
    waiting: int = 0
    value: Tensor | None = None

    def take(self, node: Any) -> Tensor:
        """Return the output of `node`, the autograd node that computed it."""
        if self.value is None:
            self.value, self.waiting = output_of(node), self.layers
        value = self.value
        self.waiting -= 1
        if self.waiting == 0:
            self.value = None
        return value


def recomputed_input(x: Tensor) -> RecomputedInput | None:
    """Return what gives `x` in the backward pass, counting one more layer that will ask; None if `x` must be kept.

    It must be kept where autograd does not keep what it was computed from, in a torch.compile graph, and under hooks on
    saved tensors (gradient checkpointing, offloading), which may let a saved tensor be read only once.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return None
    if _hooks_on_saved_tensors() or not _is_kept(x.grad_fn):
        return None
    metadata: dict[str, Any] = x.grad_fn.metadata  # pyright: ignore
    shared = metadata.setdefault("diablo_input", RecomputedInput())
    shared.layers += 1
    return shared


def output_of(node: Any) -> Tensor:
    """Compute the output of an autograd node, for which `_is_kept` holds, from the tensors that autograd keeps."""
    if node.name() == "ToCopyBackward0":
        (metadata,) = node._input_metadata
        return output_of(node.next_functions[0][0]).to(metadata.device, metadata.dtype)
    left, right = node._saved_self, node._saved_other
    left = output_of(node.next_functions[0][0]) if left is None else left
    right = output_of(node.next_functions[1][0]) if right is None else right
    return left * right


def _is_kept(node: Any) -> bool:
    """Return whether autograd keeps what the node's output was computed from."""
    if node is None or node.name() not in ("ToCopyBackward0", "MulBackward0"):
        return False
    operands = [operand for operand, _ in node.next_functions]
    # A product keeps a factor if the other one needs a gradient: both, or only the frozen one.
    needs_gradient = [operand for operand in operands if operand is not None]
    return len(needs_gradient) == 2 or _is_kept(needs_gradient[0])


def _hooks_on_saved_tensors() -> bool:
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None  # pyright: ignore
