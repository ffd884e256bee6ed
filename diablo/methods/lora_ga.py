"""Gradients for PEFT's LoRA-GA initialisation (arXiv 2407.05000).

PEFT has the method, `LoraConfig(init_lora_weights="lora_ga")`, and reads the gradients from the target layers when it
is attached; this module puts them there. PEFT's own `preprocess_loraga` sums them in the weights' dtype and divides by
the number of backward passes, i.e. of micro-batches instead of steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from peft.tuners.lora.loraga import get_target_modules
from torch import Tensor, nn
from transformers import PreTrainedModel

from diablo.targets import check_targets


def estimate_gradients(
    model: PreTrainedModel,
    config: PeftConfig,
    backward: Callable[[], None] | None,
    prerequisite: object = None,
    *,
    iterations: int,
) -> PeftConfig:
    """Store on every target layer its mean gradient over `iterations` steps, in float32; attaching takes its SVD.

    The weights do not change. On the meta device nothing is estimated.

    Args:
        backward: called once a step; adds the gradient of a batch's mean loss to the parameters' `grad`.
        prerequisite: not used.

    Raises:
        ValueError: `backward` is missing, or 2 r exceeds the largest possible rank of a weight.
    """
    assert isinstance(config, LoraConfig)
    check_targets(model, config)
    if next(model.parameters()).is_meta:
        return config
    if backward is None or iterations < 1:
        given = "none are given" if backward is None else "at least one is needed"
        raise ValueError(f"LoRA-GA estimates gradients on {iterations} batches of training examples: {given}")
    layers = dict(get_target_modules(model, config))
    for name, layer in layers.items():
        weight: Any = layer.weight
        if not isinstance(weight, nn.Parameter) or not weight.is_floating_point():
            raise ValueError(f"{name} is quantised: LoRA-GA needs gradients, which quantised weights lack")
        shape = tuple(weight.shape)
        if 2 * config.r > min(shape):
            raise ValueError(f"{name}: LoRA-GA takes 2 r = {2 * config.r} triplets of a {shape} gradient")
    for layer, gradient in zip(layers.values(), _summed(model, layers, backward, iterations), strict=True):
        layer._peft_loraga_grad = gradient / iterations  # PEFT's initialisation reads and removes it
    return config


def _summed(
    model: nn.Module, layers: Mapping[str, nn.Module], backward: Callable[[], None], iterations: int
) -> list[Tensor]:
    """Return the summed gradient of every layer's weight, in float32; restores the model's flags and mode."""
    weights: list[nn.Parameter] = [layer.weight for layer in layers.values()]  # pyright: ignore[reportAssignmentType]
    sums = {weight: torch.zeros_like(weight, dtype=torch.float32) for weight in weights}
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    modes = {module: module.training for module in model.modules()}

    def move(weight: Tensor) -> None:
        assert weight.grad is not None
        sums[weight] += weight.grad  # pyright: ignore[reportArgumentType]
        weight.grad = None

    model.requires_grad_(False).train()
    hooks = [weight.requires_grad_(True).register_post_accumulate_grad_hook(move) for weight in weights]
    try:
        with torch.enable_grad():
            for _ in range(iterations):
                backward()
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
        for module, mode in modes.items():
            module.training = mode
    return [sums[weight] for weight in weights]
