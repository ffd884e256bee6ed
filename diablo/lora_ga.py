"""The gradients that PEFT's LoRA-GA starts from (arXiv 2407.05000).

PEFT has the method, `LoraConfig(init_lora_weights="lora_ga")`, and a function that estimates the gradients with a step
of ours. This is that step, over a run's own examples.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import torch
from peft import LoraConfig, PeftConfig
from peft.tuners.lora.loraga import preprocess_loraga
from torch import Tensor
from transformers import PreTrainedModel

from diablo.targets import check_targets


def estimate_gradients(
    model: PreTrainedModel,
    config: PeftConfig,
    batches: Iterator[dict[str, Tensor]] | None,
    first: object = None,
    *,
    iterations: int,
) -> PeftConfig:
    """Leaves on every target layer the gradient of the mean loss over so many batches, for attaching to take its SVD.

    The weights are not changed. On the meta device there is nothing to estimate.

    Raises:
        ValueError: there are no batches, or 2 r exceeds the rank a weight can have.
    """
    assert isinstance(config, LoraConfig)
    check_targets(model, config)
    if next(model.parameters()).is_meta:
        return config
    if batches is None or iterations < 1:
        given = "none are given" if batches is None else "it needs one at least"
        raise ValueError(f"LoRA-GA estimates gradients on {iterations} batches of training examples: {given}")

    def step() -> None:
        for _, batch in zip(range(iterations), batches, strict=False):
            with torch.autocast(batch["labels"].device.type, torch.bfloat16, enabled=model.dtype == torch.bfloat16):
                loss = model(**batch).loss
            loss.backward()

    with warnings.catch_warnings():
        # PEFT counts backward passes with hooks; those of the first layers see inputs that need no gradient.
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        preprocess_loraga(model, config, step)
    for name, layer in model.named_modules():
        gradient = getattr(layer, "_peft_loraga_grad", None)
        if gradient is not None and 2 * config.r > min(gradient.shape):
            raise ValueError(
                f"{name}: LoRA-GA takes 2 r = {2 * config.r} triplets of a {tuple(gradient.shape)} gradient"
            )
    return config
