"""The gradients that PEFT's LoRA-GA starts from (arXiv 2407.05000).

PEFT has the method, `LoraConfig(init_lora_weights="lora_ga")`, and reads the gradients from the target layers when it
is attached. This puts them there. PEFT's own `preprocess_loraga` sums them in the weights' dtype and divides by the
number of backward passes, which is the number of micro-batches, not of steps.
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
    first: object = None,
    *,
    iterations: int,
) -> PeftConfig:
    """Leaves on every target layer the mean gradient over so many steps, in float32, for attaching to take its SVD.

    The weights are not changed. On the meta device there is nothing to estimate.

    Args:
        backward: called once a step, it adds the gradient of a batch's mean loss to the parameters' `grad`.
        first: not used.

    Raises:
        ValueError: there is no `backward`, or 2 r exceeds the rank a weight can have.
    """
    assert isinstance(config, LoraConfig)
    check_targets(model, config)
    if next(model.parameters()).is_meta:
        return config
    if backward is None or iterations < 1:
        given = "none are given" if backward is None else "it needs one at least"
        raise ValueError(f"LoRA-GA estimates gradients on {iterations} batches of training examples: {given}")
    layers = dict(get_target_modules(model, config))
    for name, layer in layers.items():
        weight: Any = layer.weight
        if not isinstance(weight, nn.Parameter) or not weight.is_floating_point():
            raise ValueError(f"{name} is quantised: its weights have no gradients for LoRA-GA to start from")
        shape = tuple(weight.shape)
        if 2 * config.r > min(shape):
            raise ValueError(f"{name}: LoRA-GA takes 2 r = {2 * config.r} triplets of a {shape} gradient")
    for layer, gradient in zip(layers.values(), _summed(model, layers, backward, iterations), strict=True):
        layer._peft_loraga_grad = gradient / iterations  # what PEFT's start reads, and removes
    return config


def _summed(
    model: nn.Module, layers: Mapping[str, nn.Module], backward: Callable[[], None], iterations: int
) -> list[Tensor]:
    """Of every layer's weight, in float32. The model's flags and mode are afterwards as before."""
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
