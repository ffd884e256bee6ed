"""GPU memory of training a run, from shapes alone: weights, gradients, optimizer state and activations per GPU.

Bytes of weights, gradients and optimizer state are sums over the tensors of the whole model. Activations are measured
on fake tensors (experiments/plan/fake_pass.py): the first decoder layers run, and the rest is extrapolated, since each
layer adds the same. The micro-batch is full, every position has a label, and all rows are as long as the longest one
(without rows or tokenizer: as the protocol allows). So the estimate is for the largest step. CUDA's context, NCCL's
buffers and the allocator's fragmentation are extra: `USABLE` in experiments/plan/fit.py.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from experiments.config import RunConfig
from experiments.plan.cost import longest_row
from experiments.plan.sizes import Held, held, pass_bytes

LENGTH = 2048  # tokens per row if neither the rows nor the protocol determine it
PREFETCHED = 2  # decoder layers whose sharded weights are gathered on a GPU at the same time


@dataclass(frozen=True)
class Memory:
    """Bytes on each of `gpus` GPUs while a run trains on rows of `length` tokens.

    `weights` are those of the base and the adapter, plus the base's original values under an in-place adapter.
    `activations` is the peak of a forward and backward pass beyond weights, gradients and optimizer state.
    `preparation` is the peak while a method uses gradients before it is attached; 0 for most methods.
    """

    gpus: int
    length: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    buckets: int  # in which DDP sums the gradients of all GPUs, from the first step on
    accumulates: bool  # whether gradients of earlier micro-batches exist during a forward pass
    preparation: int = 0

    @property
    def training(self) -> int:
        """The peak of a step. Without accumulation, gradients are allocated as activations are freed."""
        both = self.gradients + self.activations
        passes = both if self.accumulates else max(self.gradients, self.activations)
        return self.weights + self.optimizer + self.buckets + passes

    @property
    def peak(self) -> int:
        return max(self.training, self.preparation)


def estimate(config: RunConfig, gpus: int = 1) -> Memory:
    """Estimate the memory of a run on each of `gpus` GPUs.

    With `runtime.sharding=full` they share all but activations; else each holds everything (DDP), and gradients twice.
    """
    shards = gpus if config.runtime.sharding == "full" else 1
    recipe, method, checkpointing = config.recipe, config.method, config.runtime.gradient_checkpointing
    rows, length = recipe.micro_batch_size, longest_row(config)
    dtype, autocast = base_dtype(config), _name_of_dtype(config) == "bfloat16"
    shapes = json.dumps(config.mapping["model"]["architecture"]), json.dumps(config.mapping["method"])
    found = held(*shapes, dtype)
    trained = found.trained if method.trains != "nothing" else 0
    size = {"float64": 8, "float32": 4}.get(dtype, 2)  # bytes of a base entry
    # PEFT and full fine-tuning keep trained tensors in float32.
    weights = found.frozen_bytes + max(4, size) * trained + size * found.in_place
    activations = 0
    if config.quantization is not None:
        import torch

        from experiments.models.quantized import planned_sizes

        base = planned_sizes(config, getattr(torch, dtype))  # with the dtype on the planned GPU, not on this machine
        weights += int(base["quantized_bytes"] + base["other_bytes"] - base["full_bytes"])
        activations += size * found.linear  # one layer's weight, dequantised
    if trained:
        # Sharded weights are gathered in the compute dtype; unsharded, autocast would keep casts of all of them.
        computes = "bfloat16" if shards > 1 and autocast else dtype
        peaks = pass_bytes(*shapes, computes, autocast, rows, length, checkpointing)
        activations += _with_gathered(
            peaks, found, shards, method.trains == "all", 2 if computes == "bfloat16" else size
        )
    return Memory(
        gpus=gpus,
        length=length,
        weights=-(-weights // shards),
        gradients=-(-4 * trained // shards),
        optimizer=-(-_state_bytes(recipe.optimizer) * trained // shards),
        activations=activations,
        buckets=4 * trained if gpus > shards else 0,
        accumulates=recipe.batch_size > rows * gpus,
        preparation=_preparation(config, found, rows, length, shards),
    )


def _name_of_dtype(config: RunConfig) -> str:
    """Return `model.dtype`; `auto` is bfloat16, which all recent GPUs support, and float32 on the CPU."""
    name = config.model.dtype
    return ("float32" if config.runtime.device == "cpu" else "bfloat16") if name == "auto" else name


def base_dtype(config: RunConfig) -> str:
    """Return the dtype of the base's weights, which full fine-tuning trains in float32."""
    return "float32" if config.method.trains == "all" else _name_of_dtype(config)


def _state_bytes(optimizer: str) -> int:
    """Return bytes per trained entry. Unknown optimizers count as Adam, which has the most."""
    return 0 if optimizer == "sgd" else 8


def _with_gathered(peaks: tuple[int, int], found: Held, shards: int, all_trained: bool, size: int) -> int:
    """Return the larger of a pass's peaks, including what a GPU gathers from the others' shards.

    This is the weights of `PREFETCHED` layers and of everything outside the layers. If everything is trained, the later
    part of the backward pass also holds unreduced gradients, one layer's with a float32 copy.

    Args:
        size: bytes of an entry in the compute dtype.
    """
    early, late = peaks
    if shards == 1:
        return max(peaks)
    gradients = size * (found.layer + found.root) + 4 * found.layer if all_trained else 0
    return size * (PREFETCHED * found.layer + found.root) + max(early, late + gradients)


def _preparation(config: RunConfig, found: Held, rows: int, length: int, shards: int) -> int:
    """Return the peak while `method.prepare` runs; 0 if it needs no gradients."""
    target = (config.method.prepare or {}).get("_target_")
    if target == "diablo.smt.choose_blocks":  # the original base; weights, gradients and Adam in float32; gradient sums
        total, dtype = found.frozen_bytes + 16 * found.base + 4 * found.targets, "float32"
    elif target == "diablo.lora_ga.estimate_gradients":  # sums and means of the targets' gradients in float32
        total, dtype = found.frozen_bytes + 8 * found.targets, base_dtype(config)
    else:
        return 0
    everything = json.dumps({"name": "full", "label": "full", "trains": "all", "adapter": None})
    autocast = _name_of_dtype(config) == "bfloat16"
    dtype = "bfloat16" if shards > 1 and autocast else dtype
    peaks = pass_bytes(
        json.dumps(config.mapping["model"]["architecture"]), everything, dtype, autocast, rows, length, False
    )
    return -(-total // shards) + _with_gathered(peaks, found, shards, True, 2 if dtype == "bfloat16" else 4)
