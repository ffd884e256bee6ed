"""Chooses N for a budget of parameters; the paper leaves this choice open (see its limitations)."""

from __future__ import annotations

import math
import warnings
from collections import Counter

from peft.tuners.tuners_utils import (
    _maybe_include_all_linear_layers,  # expands "all-linear"  # pyright: ignore[reportPrivateUsage]
    check_target_module_exists,
)
from torch import nn

from diablo.blocks.config import DiabloConfig
from diablo.blocks.model import DiabloModel
from diablo.targets import check_targets


def suggest_num_blocks(
    model: nn.Module,
    budget: float = 0.005,
    multiple_of: int = 16,
    target_modules: list[str] | str | None = None,
) -> dict[str, int]:
    """Return the smallest N per layer name that keeps the blocks within a budget and suits the hardware.

    All layers get the same N if it fits their shape, else the next larger N that does. The sides of the blocks are
    multiples of `multiple_of`, as matrix units need. If no such N meets the budget, `multiple_of` is halved until one
    does, with a warning: LLaMA2's 11008 = 2⁸ · 43 allows at most 16 blocks with sides in multiples of 16.

    Args:
        model: the base model, possibly on the meta device.
        budget: largest trainable share of the base model's parameters.
        target_modules: as in `DiabloConfig`; None uses the paper's choice for known architectures.

    Returns:
        N by the last part of a layer's name, or by its whole name if layers with the same last part differ in shape, as
        `DiabloConfig(num_blocks=…)` takes it.

    Raises:
        ValueError: no layer is targeted, or the budget is below that of the finest split.
    """
    shapes = _shapes(model, target_modules)
    total = sum(parameter.numel() for parameter in model.parameters())
    smallest = math.inf
    side = multiple_of
    while side >= 1:
        options = {key: _splits(*shape, side) for key, (shape, _) in shapes.items()}
        if all(options.values()):
            for n in sorted({n for values in options.values() for n in values}):
                chosen = {key: min((o for o in fits if o >= n), default=fits[-1]) for key, fits in options.items()}
                trained = sum(count * shape[0] * shape[1] // chosen[key] for key, (shape, count) in shapes.items())
                smallest = min(smallest, trained)
                if trained <= budget * total:
                    if side < multiple_of:
                        warnings.warn(
                            f"block sides are multiples of {side}, not of {multiple_of}: "
                            f"no such N stays within {budget:.3%} of {total:,} parameters",
                            stacklevel=2,
                        )
                    return chosen
        side //= 2
    raise ValueError(
        f"budget={budget} is {budget * total:,.0f} of {total:,} parameters; the finest split of these layers trains "
        f"{smallest:,} ({smallest / total:.3%}): raise the budget or target fewer layers"
    )


def _shapes(model: nn.Module, target_modules: list[str] | str | None) -> dict[str, tuple[tuple[int, int], int]]:
    """Return `(in_features, out_features)` of the targeted layers and their number, by the key of N."""
    if target_modules is None:
        target_modules = DiabloModel.target_module_mapping.get(
            getattr(getattr(model, "config", None), "model_type", "")
        )
        if target_modules is None:
            raise ValueError("target_modules is required for an architecture that the paper does not name")
    # This task type leaves the classifier's head out of "all-linear", as output embeddings always are.
    config = DiabloConfig(target_modules=target_modules, task_type="SEQ_CLS")
    check_targets(model, config)
    config = _maybe_include_all_linear_layers(config, model)
    layers = {
        name: (module.in_features, module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and check_target_module_exists(config, name)
    }
    if not layers:
        raise ValueError(f"target_modules={target_modules!r} matches no linear layer of {type(model).__name__}")
    kinds = Counter(name.rpartition(".")[2] for name, _ in {(n.rpartition(".")[2], s): None for n, s in layers.items()})
    result: dict[str, tuple[tuple[int, int], int]] = {}
    for name, shape in layers.items():
        last = name.rpartition(".")[2]
        key = last if kinds[last] == 1 else name
        result[key] = (shape, result.get(key, (shape, 0))[1] + 1)
    return result


def _splits(in_features: int, out_features: int, side: int) -> list[int]:
    """Return every N that cuts the layer evenly into blocks whose sides are multiples of `side`."""
    if in_features % side or out_features % side:
        return []
    common = math.gcd(in_features // side, out_features // side)
    return [n for n in range(1, common + 1) if common % n == 0]
