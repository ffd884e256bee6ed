"""A linear layer that stores its weight as packed integers and dequantises it at each use.

It is an `nn.Linear`, so PEFT attaches LoRA, DoRA and DiaBlo (in mode "adapter") as to any other. `weight` returns the
dequantised matrix, which is read-only: PEFT's `merge` would add an update to a copy and lose it, so it gets an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from diablo.blocks.functional import compute_dtype
from diablo.quantize.grids import QuantizedWeight, check_bits, dequantize, width_of_groups
from diablo.quantize.packing import pack, packed_words, unpack

READ_ONLY = (
    "the weight is made from quantised codes and cannot be changed: merge an adapter with "
    "diablo.quantize.merge_dequantized or diablo.quantize.merge_to_grid"
)


class DequantizedWeight(Tensor):
    """A matrix made from codes. Results computed from it are ordinary tensors; writing to it raises a TypeError."""

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        written = kwargs.get("out", args[0] if _writes(func) else None)
        if isinstance(written, cls):
            raise TypeError(READ_ONLY)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @property
    def data(self) -> Tensor:
        return self

    @data.setter
    def data(self, _: Tensor) -> None:
        raise TypeError(READ_ONLY)


def _writes(func: Callable[..., Any]) -> bool:
    """Return whether a method of Tensor modifies it: `add_`, `__iadd__`, `__setitem__` and similar."""
    name = func.__name__
    if name.startswith("__"):
        return name == "__setitem__" or (name.startswith("__i") and name not in ("__index__", "__int__", "__invert__"))
    return name.endswith("_") and name != "requires_grad_"


class QuantizedLinear(nn.Linear):
    """`y = x Wᵀ + b` with W on a grid, computed in the dtype of x or autocast's; only x and b get gradients.

    Args:
        group_size: how many weights of a row share a scale; -1 for all.
        normal_float: codes index a table of levels instead of a uniform grid.
    """

    qweight: Tensor  # int32, the codes of W row by row
    scales: Tensor  # (out, groups), float16
    zeros: Tensor | None  # (out, groups), uint8
    levels: Tensor | None  # (2 ** bits,), float32

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bits: int,
        group_size: int = -1,
        bias: bool = False,
        normal_float: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)  # nn.Linear's would create a weight
        check_bits(bits)
        self.in_features, self.out_features, self.bits = in_features, out_features, bits
        self.group_size, self.normal_float = group_size, normal_float
        groups = (out_features, in_features // width_of_groups(in_features, group_size))
        words = packed_words(in_features * out_features, bits)
        self.register_buffer("qweight", torch.zeros(words, dtype=torch.int32, device=device))
        self.register_buffer("scales", torch.zeros(groups, dtype=torch.float16, device=device))
        zeros = None if normal_float else torch.zeros(groups, dtype=torch.uint8, device=device)
        self.register_buffer("zeros", zeros)
        levels = torch.zeros(2**bits, dtype=torch.float32, device=device) if normal_float else None
        self.register_buffer("levels", levels)
        empty = torch.zeros(out_features, device=device, dtype=dtype) if bias else None
        self.register_parameter("bias", None if empty is None else nn.Parameter(empty, requires_grad=False))

    @classmethod
    def from_weight(cls, quantized: QuantizedWeight, bias: Tensor | None = None) -> QuantizedLinear:
        """Create a layer with this weight; the bias is not quantised."""
        out_features, in_features = quantized.codes.shape
        groups = quantized.scales.shape[1]
        layer = cls(
            in_features,
            out_features,
            quantized.bits,
            -1 if groups == 1 else in_features // groups,
            normal_float=quantized.levels is not None,
            device="meta",
        )
        layer.qweight, layer.scales = pack(quantized.codes, quantized.bits), quantized.scales
        layer.zeros, layer.levels = quantized.zeros, quantized.levels
        layer.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        return layer

    @property
    def weight(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """W, `(out, in)`, float32."""
        return self.dequantize().as_subclass(DequantizedWeight)

    def dequantize(self) -> Tensor:
        return self.quantized().dequantize()

    def quantized(self) -> QuantizedWeight:
        """The weight with its codes unpacked."""
        codes = unpack(self.qweight, self.bits, (self.out_features, self.in_features))
        return QuantizedWeight(self.bits, codes, self.scales, self.zeros, self.levels)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight, including scales, zero points and levels."""
        return 8 * sum(buffer.nbytes for buffer in self.buffers()) / (self.in_features * self.out_features)

    def forward(self, input: Tensor) -> Tensor:
        """Map `input` `(..., in_features)` to `(..., out_features)`."""
        x = input.to(compute_dtype(input, input.dtype))
        y: Tensor = _Product.apply(x, self.qweight, self.scales, self.zeros, self.levels, self.bits)  # pyright: ignore
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        exact = {"scales": self.scales, "levels": self.levels}
        super()._apply(fn, recurse)
        for name, before in exact.items():  # casting the model to bf16 must not round these
            after = getattr(self, name)
            if before is not None and after.dtype != before.dtype:
                setattr(self, name, before.to(after.device))
        return self

    def extra_repr(self) -> str:
        grid = ", normal_float=True" if self.normal_float else ""
        return f"{super().extra_repr()}, bits={self.bits}, group_size={self.group_size}{grid}"


class _Product(torch.autograd.Function):
    """`x Wᵀ`. W is computed in the forward and again in the backward pass; only the layer's own buffers are saved."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        qweight: Tensor,
        scales: Tensor,
        zeros: Tensor | None,
        levels: Tensor | None,
        bits: int,
    ) -> Tensor:
        ctx.save_for_backward(qweight, scales, zeros, levels)
        ctx.bits, ctx.in_features = bits, x.shape[-1]
        return x @ _matrix(qweight, scales, zeros, levels, bits, x.shape[-1]).to(x.dtype).T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        qweight, scales, zeros, levels = ctx.saved_tensors
        weight = _matrix(qweight, scales, zeros, levels, ctx.bits, ctx.in_features)
        return grad @ weight.to(grad.dtype), None, None, None, None, None


def _matrix(
    qweight: Tensor, scales: Tensor, zeros: Tensor | None, levels: Tensor | None, bits: int, in_features: int
) -> Tensor:
    return dequantize(unpack(qweight, bits, (scales.shape[0], in_features)), scales, zeros, levels)


def replace_linears(
    model: nn.Module, names: Iterable[str], bits: int, group_size: int = -1, normal_float: bool = False
) -> nn.Module:
    """Replace linear layers by empty quantised layers on the meta device.

    Args:
        names: names as in `model.named_modules()`.

    Raises:
        ValueError: a name is not a linear layer of the model, or the group size does not divide its input features.
    """
    modules = dict(model.named_modules())
    for name in names:
        linear = modules.get(name)
        if not isinstance(linear, nn.Linear):
            raise ValueError(f"{name}: {type(linear).__name__ if linear else 'nothing'} there, not a linear layer")
        try:
            layer = QuantizedLinear(
                linear.in_features,
                linear.out_features,
                bits,
                group_size,
                linear.bias is not None,
                normal_float,
                device="meta",
                dtype=None if linear.bias is None else linear.bias.dtype,
            )
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        set_module(model, name, layer)
    return model


def set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
