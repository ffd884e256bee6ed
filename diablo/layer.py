"""A linear layer with trainable diagonal blocks beside its frozen weight."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from peft.tuners.tuners_utils import (
    BaseTunerLayer,
    _get_in_out_features,  # also reads the sizes of quantised layers  # pyright: ignore[reportPrivateUsage]
    check_adapters_to_merge,
)
from peft.utils import quantization_extra_repr, resolve_quantization_backend
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from diablo.blocks import BlockShape, block_diagonal_product, block_shape, delta_weight, diagonal_blocks
from diablo.config import DiabloConfig

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def plain_weight(base_layer: nn.Module) -> Tensor:
    """The weight of an ordinary floating-point layer, detached, in its own layout.

    Raises:
        TypeError: the weight is quantised, sharded or otherwise not the matrix that the layer multiplies with, so that
            adding to it would give a wrong layer without an error.
    """
    weight = getattr(base_layer, "weight", None)
    if weight is None or type(weight.data) is not torch.Tensor or weight.dtype not in FLOAT_DTYPES:
        kind = "no weight" if weight is None else f"a weight of type {type(weight.data).__name__}, {weight.dtype}"
        raise TypeError(
            f"{type(base_layer).__name__} has {kind}, which cannot be changed in place: "
            "load or dequantise the base model in fp16, bf16 or fp32"
        )
    return weight.data


class DiabloLayer(BaseTunerLayer):
    """The adapters of one layer, keyed by adapter name; [`DiabloLinear`] adds the forward pass.

    `diablo_blocks[name]` is the paper's 𝒟: `(num_blocks, d_in, d_out)`, zero at the start.
    """

    adapter_layer_names = ("diablo_blocks",)
    other_param_names = ("diablo_dropout",)

    def __init__(self, base_layer: nn.Module, **quantization: Any) -> None:
        self.base_layer = base_layer
        self.diablo_blocks = nn.ParameterDict()
        self.diablo_dropout = nn.ModuleDict()
        self._disable_adapters = False
        self.merged_adapters = []
        # The base weight's own values where merged adapters changed it, so that unmerging restores every bit.
        self._replaced: dict[str, list[Tensor]] = {}

        base_layer = self.get_base_layer()
        self.quantization_backend = resolve_quantization_backend(base_layer, **quantization)
        # transformers' Conv1D (GPT-2) is a linear layer that keeps its weight as (in, out).
        self.fan_in_fan_out = isinstance(base_layer, Conv1D)
        in_features, out_features = _get_in_out_features(base_layer)
        if in_features is None or out_features is None:
            raise TypeError(f"the sizes of {type(base_layer).__name__} are unknown")
        self.in_features, self.out_features = in_features, out_features

    def update_layer(self, adapter_name: str, config: DiabloConfig) -> None:
        """Adds an adapter, or replaces the one of this name.

        Raises:
            ValueError: `config.num_blocks` does not divide the layer's sides.
        """
        shape = block_shape(self.in_features, self.out_features, config.num_blocks, config.allow_uneven)
        blocks = torch.zeros(shape)
        if not config.init_weights:
            nn.init.normal_(blocks, std=shape.d_in**-0.5)
        self.diablo_blocks[adapter_name] = nn.Parameter(blocks)
        self.diablo_dropout[adapter_name] = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """The adapter's update in the layout of the base layer's weight: `(out, in)`; `(in, out)` for Conv1D."""
        delta = delta_weight(self.diablo_blocks[adapter_name], self.in_features, self.out_features)
        return delta.T.contiguous() if self.fan_in_fan_out else delta

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        # A block-diagonal update has full rank; cutting it to a low rank would lose most of it.
        return False

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Adds the adapters' updates to the base weight.

        Args:
            safe_merge: check the result and leave the weight as it was if it is not finite.
            adapter_names: which adapters to merge; None merges the active ones. Merged ones are skipped.

        Raises:
            ValueError: `safe_merge` found values that are not finite.
            TypeError: the base layer is quantised in a way that cannot be merged.
        """
        for adapter_name in check_adapters_to_merge(self, adapter_names):
            if adapter_name not in self.diablo_blocks:
                continue
            if self.quantization_backend is None:
                self._merge_plain(adapter_name, safe_merge)
            else:
                self._add_quantized(adapter_name, 1, safe_merge)
            self.merged_adapters.append(adapter_name)

    def unmerge(self) -> None:
        """Takes merged adapters out of the base weight: exactly, unless it is quantised (then to its rounding)."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        while self.merged_adapters:
            # Latest first: adapters overlap, and each one's record was taken after the earlier ones were merged.
            adapter_name = self.merged_adapters.pop()
            if adapter_name in self._replaced:
                for part, original in zip(
                    self._weight_parts(adapter_name), self._replaced.pop(adapter_name), strict=True
                ):
                    part.copy_(original)
            else:
                self._add_quantized(adapter_name, -1, check_finite=False)

    def _weight_parts(self, adapter_name: str) -> list[Tensor]:
        """Views of the base weight where this adapter adds to it, `(d_in, d_out)` each."""
        weight = plain_weight(self.get_base_layer())
        shape = BlockShape(*self.diablo_blocks[adapter_name].shape)
        return diagonal_blocks(weight.T if self.fan_in_fan_out else weight, shape)

    def _merge_plain(self, adapter_name: str, check_finite: bool) -> None:
        parts = self._weight_parts(adapter_name)
        blocks = self.diablo_blocks[adapter_name].detach()
        # Added in the wider of the two dtypes and rounded once. Only the blocks' own entries of the weight are touched.
        sums = [
            (part + block[: part.shape[0], : part.shape[1]]).to(part.dtype)
            for part, block in zip(parts, blocks, strict=True)
        ]
        if check_finite and not all(total.isfinite().all() for total in sums):
            raise ValueError(_not_finite(adapter_name))
        self._replaced[adapter_name] = [part.clone() for part in parts]
        for part, total in zip(parts, sums, strict=True):
            part.copy_(total)

    def _add_quantized(self, adapter_name: str, sign: int, check_finite: bool) -> None:
        weight = self.get_base_weight()
        total = (weight + sign * self.get_delta_weight(adapter_name).detach()).to(weight.dtype)
        if check_finite and not total.isfinite().all():
            raise ValueError(_not_finite(adapter_name))
        self.set_base_weight(total)


def _not_finite(adapter_name: str) -> str:
    return f"NaNs detected in the merged weights. The adapter {adapter_name} seems to be broken"


class DiabloLinear(nn.Module, DiabloLayer):
    """`y = base(x) + dropout(x) @ diag(D_1 … D_N)` (arXiv 2506.03230, section 3), without a scaling factor."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: DiabloConfig, **quantization: Any) -> None:
        super().__init__()
        DiabloLayer.__init__(self, base_layer, **quantization)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`x` is `(..., in_features)`, the result `(..., out_features)` in the base layer's output dtype."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        result: Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        if self.quantization_backend is not None:
            result = self.quantization_backend.maybe_clone_base_result(result)
        base_dtype = result.dtype
        for adapter_name in self.active_adapters:
            if adapter_name not in self.diablo_blocks:
                continue
            blocks = self.diablo_blocks[adapter_name]
            # The blocks are fp32 even over a bf16 base (PEFT casts them): their product and the sum are taken in fp32.
            dropped = self.diablo_dropout[adapter_name](self._cast_input_dtype(x, blocks.dtype))
            result = result + block_diagonal_product(dropped, blocks, self.out_features)
        return result.to(base_dtype)

    def extra_repr(self) -> str:
        return quantization_extra_repr(self)

    def __repr__(self) -> str:
        return "diablo." + super().__repr__()
