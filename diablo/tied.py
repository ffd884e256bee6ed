"""Weights that several modules share, e.g. an output layer tied to the embedding.

An update of such a weight changes the other modules too.
"""

from __future__ import annotations

import copy
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from diablo.blocks.layer import DiabloLayer


def shared_names(model: nn.Module, layer: nn.Module) -> list[str]:
    """Return all names of a layer's weight in the model if it has more than one, else an empty list."""
    base_layer = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
    weight = getattr(base_layer, "weight", None)
    names = [name for name, tensor in model.named_parameters(remove_duplicate=False) if tensor is weight]
    return names if len(names) > 1 else []


def refuse_shared(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Raise a ValueError if a method that subtracts its start from this layer's weight would change other modules."""
    if names := shared_names(model, layer):
        raise ValueError(
            f"{name} shares its weight ({' and '.join(names)}), which this method changes when it is attached: leave "
            f"{name} out of target_modules, or untie the base model"
        )


def untie(model: nn.Module) -> None:
    """Give each adapted layer that shares its weight its own copy, so that it can be merged.

    `merge_and_unload` then sets `tie_word_embeddings=False` in the model's config, so it is saved and loaded untied.
    """
    layers: list[Any] = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        # DiaBlo's layers copy it when they are merged; of nested layers, the innermost holds the base layer.
        nested = isinstance(layer.base_layer, BaseTunerLayer)
        if not nested and not isinstance(layer, DiabloLayer) and shared_names(model, layer):
            layer.base_layer = copy.deepcopy(layer.base_layer)
