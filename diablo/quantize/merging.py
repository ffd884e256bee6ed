"""Merging an adapter that was trained on a quantised base.

Merge into full-precision layers, which is exact, or back to the grid, which loses what the printed report says. Never
merge the adapter into the weights from before quantisation: those are different weights.
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
from diablo.quantize.quantized_linear import QuantizedLinear, set_module
from diablo.tied import untie


@dataclass(frozen=True)
class GridMerge:
    """A model merged to the grid of its base, and the rounding error.

    `errors[layer]` is `||Q - M|| / ||M - W||`, with the merged weight M, the base's W and the rounded Q. 0: nothing was
    lost; 1: as much as without the adapter.
    """

    model: PreTrainedModel
    errors: dict[str, float]


def merge_dequantized(model: PeftModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Return the model with ordinary linear layers: dequantised weights plus the active adapters' updates.

    In float32 this is exact to rounding; with a shorter dtype it prints how much of the updates the rounding lost.

    Args:
        dtype: dtype of these layers; None for that of the rest of the model. The sum is computed in float32.
    """
    base: Any = model.get_base_model()
    chosen: torch.dtype = base.dtype if dtype is None else dtype
    errors: dict[str, float] = {}

    def replace(name: str, quantized: QuantizedLinear, merged: Tensor | None) -> nn.Linear:
        if merged is None:
            return _linear(quantized, quantized.dequantize(), chosen)
        layer = _linear(quantized, merged, chosen)
        _add_error(errors, name, quantized, merged, layer.weight.detach().float())
        return layer

    result = _merge(model, replace)
    if chosen != torch.float32:
        print(_cost(errors, f"into {str(chosen).removeprefix('torch.')}"))
    return result


def dequantize_model(model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Replace the quantised layers of a model without adapters, in place, by linear layers with dequantised weights.

    Args:
        dtype: dtype of these layers; None for that of the rest of the model.
    """
    chosen: torch.dtype = model.dtype if dtype is None else dtype
    for name, layer in [(n, m) for n, m in model.named_modules() if isinstance(m, QuantizedLinear)]:
        set_module(model, name, _linear(layer, layer.dequantize(), chosen))
    return model


def merge_to_grid(model: PeftModel) -> GridMerge:
    """Return the model with every merged weight rounded to its layer's grid; prints the rounding error.

    Scales do not change, so weights that the adapter did not change keep their codes.
    """
    errors: dict[str, float] = {}

    def replace(name: str, quantized: QuantizedLinear, merged: Tensor | None) -> nn.Linear:
        if merged is None:
            return quantized
        layer = QuantizedLinear.from_weight(_rounded(quantized, merged), quantized.bias)
        _add_error(errors, name, quantized, merged, layer.dequantize())
        return layer

    if not any(isinstance(module, QuantizedLinear) for module in model.modules()):
        raise ValueError("no layer of the model is quantised, so there is no grid to merge to")
    result = GridMerge(_merge(model, replace), errors)
    print(_cost(errors, "to the grid"))
    return result


def _add_error(
    errors: dict[str, float], name: str, quantized: QuantizedLinear, merged: Tensor, rounded: Tensor
) -> None:
    """Record the rounding error of a merged weight relative to its update; nothing if there is no update."""
    update = (merged - quantized.dequantize()).norm().item()
    if update:
        errors[name] = (rounded - merged).norm().item() / update


def _cost(errors: dict[str, float], where: str) -> str:
    if not errors:
        return f"merged {where}: the adapter changed no quantised layer"
    worst = max(errors, key=errors.__getitem__)
    mean = sum(errors.values()) / len(errors)
    return (
        f"merged {where} in {len(errors)} layers: rounding lost {mean:.1%} of the adapter's update on average, "
        f"{errors[worst]:.1%} in {worst} (100 % is as much as without the adapter)"
    )


def _merge(model: PeftModel, replace: Callable[[str, QuantizedLinear, Tensor | None], nn.Linear]) -> PreTrainedModel:
    """Merge layer by layer, one full-precision weight at a time; PEFT merges what is not quantised.

    Args:
        replace: returns the replacement of a quantised layer from its name, the layer and its merged weight, if any.
    """
    base: Any = model.get_base_model()
    for name, module in list(base.named_modules()):
        if isinstance(module, BaseTunerLayer) and isinstance(module.get_base_layer(), QuantizedLinear):
            set_module(base, name, _merged(name, module, replace))
        elif isinstance(module, QuantizedLinear) and not name.endswith(".base_layer"):
            set_module(base, name, replace(name, module, None))
    untie(base)
    tuner: Any = model.base_model
    return tuner.merge_and_unload(safe_merge=True)


def _merged(name: str, tuner: Any, replace: Callable[[str, QuantizedLinear, Tensor | None], nn.Linear]) -> nn.Linear:
    if tuner.merged:
        raise ValueError(f"{name}: adapters are already merged: unmerge them first")
    quantized: QuantizedLinear = tuner.base_layer
    tuner.base_layer = _linear(quantized, quantized.dequantize(), torch.float32)
    try:
        tuner.merge(safe_merge=True)
    except (ValueError, TypeError, NotImplementedError) as error:  # NotImplementedError: tuners without a merge
        tuner.base_layer = quantized
        raise ValueError(f"{name}: {type(tuner).__name__} cannot be merged: {error}") from None
    plain: nn.Linear = tuner.base_layer
    layer = replace(name, quantized, plain.weight.detach())
    if plain.bias is not None:  # lora_bias changes it
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
