"""Merging an adapter that was trained on a quantised base.

Into ordinary layers of full precision, which is exact, or back to the grid, which costs what the report says. The
adapter must never be folded into the weights that the base had before it was quantised: those are other weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from diablo.quantize.grids import nearest_levels, to_codes
from diablo.quantize.linear import QuantizedLinear, set_module


@dataclass(frozen=True)
class GridMerge:
    """A merged model on the grid of its base, and what the rounding cost.

    `errors[layer]` is `||Q - M|| / ||M - W||`: M is the merged, W the base's and Q the rounded weight. 0: nothing was
    lost; 1: as much as leaving the adapter out.
    """

    model: PreTrainedModel
    errors: dict[str, float]

    def __str__(self) -> str:
        if not self.errors:
            return "merged to the grid: the adapter changed no quantised layer"
        worst = max(self.errors, key=lambda name: self.errors[name])
        mean = sum(self.errors.values()) / len(self.errors)
        return (
            f"merged to the grid of {len(self.errors)} layers: rounding lost {mean:.1%} of the adapter's update on "
            f"average, {self.errors[worst]:.1%} in {worst} (100 % is as much as leaving the adapter out)"
        )


def merge_dequantized(model: PeftModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model with ordinary linear layers that hold the dequantised weights plus the active adapters' updates.

    Args:
        dtype: of these layers; None for that of the rest of the model. The sum is taken in float32.
    """
    base: Any = model.get_base_model()
    chosen: torch.dtype = base.dtype if dtype is None else dtype

    def replace(_: str, quantized: QuantizedLinear, merged: Tensor | None) -> nn.Linear:
        return _linear(quantized, quantized.dequantize() if merged is None else merged, chosen)

    return _merge(model, replace)


def dequantize_model(model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model, without adapters, with ordinary linear layers that hold the dequantised weights; it is changed.

    Args:
        dtype: of these layers; None for that of the rest of the model.
    """
    chosen: torch.dtype = model.dtype if dtype is None else dtype
    for name, layer in [(n, m) for n, m in model.named_modules() if isinstance(m, QuantizedLinear)]:
        set_module(model, name, _linear(layer, layer.dequantize(), chosen))
    return model


def merge_to_grid(model: PeftModel) -> GridMerge:
    """The model with every merged weight rounded to the grid that its layer has; prints what that cost.

    Scales stay as they are, so weights that the adapter did not change keep their codes.
    """
    errors: dict[str, float] = {}

    def replace(name: str, quantized: QuantizedLinear, merged: Tensor | None) -> nn.Linear:
        if merged is None:
            return quantized
        layer = QuantizedLinear.from_weight(_rounded(quantized, merged), quantized.bias)
        update = (merged - quantized.dequantize()).norm().item()
        if update:
            errors[name] = (layer.dequantize() - merged).norm().item() / update
        return layer

    result = GridMerge(_merge(model, replace), errors)
    print(result)
    return result


def _merge(model: PeftModel, replace: Callable[[str, QuantizedLinear, Tensor | None], nn.Linear]) -> PreTrainedModel:
    """Merges layer by layer, one weight of full precision at a time; what is not quantised is PEFT's to merge.

    Args:
        replace: gives the layer to put at a name for a quantised layer, and its merged weight if it has an adapter.
    """
    base: Any = model.get_base_model()
    for name, module in list(base.named_modules()):
        if isinstance(module, BaseTunerLayer) and isinstance(module.get_base_layer(), QuantizedLinear):
            set_module(base, name, _merged(name, module, replace))
        elif isinstance(module, QuantizedLinear) and not name.endswith(".base_layer"):
            set_module(base, name, replace(name, module, None))
    tuner: Any = model.base_model
    return tuner.merge_and_unload(safe_merge=True)


def _merged(name: str, tuner: Any, replace: Callable[[str, QuantizedLinear, Tensor | None], nn.Linear]) -> nn.Linear:
    if tuner.merged:
        raise ValueError(f"{name}: adapters are merged already: unmerge them first")
    quantized: QuantizedLinear = tuner.base_layer
    tuner.base_layer = _linear(quantized, quantized.dequantize(), torch.float32)
    try:
        tuner.merge(safe_merge=True)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    plain: nn.Linear = tuner.base_layer
    layer = replace(name, quantized, plain.weight.detach())
    if plain.bias is not None:  # an adapter may change it (lora_bias)
        layer.bias = nn.Parameter(plain.bias.detach().to(layer.bias.dtype), requires_grad=False)
    return layer


def _rounded(quantized: QuantizedLinear, weight: Tensor) -> Any:
    old = quantized.quantized()
    groups = weight.view(weight.shape[0], old.scales.shape[1], -1)
    scales = old.scales[..., None].float()
    if old.levels is not None:
        codes = nearest_levels(groups / scales, old.levels)
    else:
        assert old.zeros is not None
        codes = to_codes(groups, scales, old.zeros[..., None].float(), old.bits)
    return old._replace(codes=codes.view_as(weight).to(torch.uint8))


def _linear(quantized: QuantizedLinear, weight: Tensor, dtype: torch.dtype) -> nn.Linear:
    layer = nn.Linear(
        quantized.in_features, quantized.out_features, quantized.bias is not None, device="meta", dtype=dtype
    )
    layer.weight = nn.Parameter(weight.detach().to(dtype), requires_grad=False)
    if quantized.bias is not None:
        layer.bias = nn.Parameter(quantized.bias.detach().clone(), requires_grad=False)
    return layer
