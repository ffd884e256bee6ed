"""Training entries of a frozen weight in place.

The trained tensor D stays a separate float32 parameter. The frozen weight W holds round(W0 + D) at the trained entries,
so the layer is one matrix product; the original values of these entries are kept and restored bit for bit. W is
rewritten when D has changed: after an optimizer step, on loading, on switching adapters, on moving to another device or
dtype. It is never written inside a forward or backward pass.

One process-wide hook watches all optimizers, so a training loop needs no extra line. At its next forward pass a layer
also detects a D that was replaced, or changed visibly to autograd (transformers loads adapters this way). Inside a
torch.compile graph it cannot rewrite W, and raises instead. Writes that autograd does not see, through `.data` or by
DeepSpeed's partitioned optimizers, need `refresh(model)`.
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, library, nn
from torch.distributed.tensor import DTensor, Shard
from torch.optim.optimizer import register_optimizer_step_post_hook


class Part(Protocol):
    """Some entries of a weight: a view of it, or entries gathered and scattered by an index."""

    def clone(self) -> Tensor: ...

    def copy_(self, values: Tensor, /) -> Any: ...

    @property
    def dtype(self) -> torch.dtype: ...


class Overwrite:
    """Overwrites parts of a weight and keeps the original values, to restore them.

    `parts` are passed to every call, because the weight may have moved since the last one.
    `version` counts changes of the values; a backward pass compares it with that of its forward pass.
    """

    def __init__(self) -> None:
        self.version = 0
        self.originals: list[Tensor] | None = None

    @property
    def is_written(self) -> bool:
        return self.originals is not None

    @torch.no_grad()
    def add(self, parts: Sequence[Part], update: Sequence[Tensor], check_finite: bool = False) -> bool:
        """Write original + update, added in the wider of the two dtypes and rounded once, to nearest.

        Returns:
            Whether all values are finite; with `check_finite`, the weight is left unchanged if they are not.
        """
        originals = self.originals or [part.clone() for part in parts]
        # The weight's dtype may have changed since they were saved: a write through `.data` is not noticed.
        originals = [original.to(part.dtype) for original, part in zip(originals, parts, strict=True)]
        both = list(zip(originals, update, strict=True))
        if check_finite and not all(bool((old + values).to(old.dtype).isfinite().all()) for old, values in both):
            return False
        self.originals = originals
        for part, (original, values) in zip(parts, both, strict=True):
            if isinstance(part, Tensor):
                torch.add(original, values, out=part)  # one pass; a sum apart and its rounding take two more
            else:
                part.copy_(original + values)
        return True

    @torch.no_grad()
    def restore(self, parts: Sequence[Part]) -> None:
        """Restore the original values of the weight."""
        if self.originals is not None:
            self.put_originals(parts)
        self.originals = None

    @torch.no_grad()
    def put_originals(self, parts: Sequence[Part]) -> None:
        """Write the original values into `parts`, which may belong to a copy of the weight."""
        assert self.originals is not None
        for part, original in zip(parts, self.originals, strict=True):
            part.copy_(original)


class InPlaceLayer(ABC):
    """A layer that may train entries of its weight in place."""

    @abstractmethod
    def trained_in_place(self) -> Tensor | None:
        """Return the parameter trained in place, whether or not the adapter is enabled; None if there is none."""

    @abstractmethod
    def refresh(self, changed: bool = True) -> None:
        """Update the weight to what the layer computes now. `changed`: the trained tensor may have new values."""


def mark_of(trained: Tensor) -> list[int]:
    """Return a mark that changes with the tensor's memory, and with its values if autograd sees the change."""
    return [trained.data_ptr(), trained._version]


@library.custom_op("diablo::check_written", mutates_args=("mark",))
def check_written(mark: Tensor, trained: Tensor) -> None:
    """Raise a RuntimeError in a torch.compile graph if the trained tensor is not the one `mark` was taken from.

    The mark is declared as mutated, although it is not, so that the compiler does not remove the check.
    """
    if mark.tolist() != mark_of(trained):
        raise RuntimeError(
            "blocks trained in place were changed outside an optimizer's step (LBFGS does so within one), and a "
            "compiled forward pass cannot write them into the weight: call diablo.refresh(model) after the change, or "
            "use mode='adapter'"
        )


@check_written.register_fake
def _(mark: Tensor, trained: Tensor) -> None:
    return None


_watched: weakref.WeakSet[InPlaceLayer] = weakref.WeakSet()


def watch(layer: InPlaceLayer) -> None:
    """Refresh `layer` after every step of an optimizer that holds its trained tensor, from now on."""
    _watched.add(layer)


def unwatch(layer: InPlaceLayer) -> None:
    """Stop refreshing `layer`: it was removed from its model and must not write to the weight."""
    _watched.discard(layer)


def refresh(model: nn.Module) -> None:
    """Rewrite the weights that `model` trains in place, after the trained tensors were changed by hand."""
    for module in model.modules():
        if isinstance(module, InPlaceLayer):
            module.refresh()


def _after_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    if not _watched:
        return
    stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for layer in list(_watched):
        if id(layer.trained_in_place()) in stepped:
            layer.refresh()


register_optimizer_step_post_hook(_after_step)


def local_shard(weight: Tensor, num_blocks: int) -> tuple[Tensor, int, int]:
    """Return this process's rows of a weight that FSDP2 shards by rows, and which blocks they hold.

    Returns:
        The rows, the index of the first block and the number of blocks; unsharded, the whole weight and all blocks.

    Raises:
        RuntimeError: a shard does not hold whole blocks.
    """
    if not isinstance(weight, DTensor):
        return weight, 0, num_blocks
    world, rank = weight.device_mesh.size(), weight.device_mesh.get_local_rank()
    if weight.device_mesh.ndim != 1 or weight.placements != (Shard(0),) or num_blocks % world:
        raise RuntimeError(
            f"a weight sharded as {weight.placements} over {world} processes does not hold whole blocks of "
            f"num_blocks={num_blocks} on each process: use mode='adapter', or a num_blocks divisible by the number of "
            "processes"
        )
    return weight.to_local(), rank * num_blocks // world, num_blocks // world
