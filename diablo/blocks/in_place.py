"""Training entries of a frozen weight where they lie.

The trained tensor stays a float32 parameter of its own. The frozen weight W holds round(W0 + D) at the trained entries,
so that the layer is one matrix product, and its own values there are kept to be put back bit for bit. W is rewritten
when D has changed: after an optimizer's step, on loading, on switching adapters, on moving to another device or dtype.
It is never written inside a forward or backward pass.

Optimizers are watched by one hook for the whole process, so a training loop needs no line for it. At its next forward
pass a layer also notices a D that was replaced, or changed in sight of autograd: transformers loads adapters like that.
Inside a graph of torch.compile it cannot rewrite W then, and raises instead. What is in nobody's sight, a write through
`.data` or by DeepSpeed's partitioned optimizers, needs `refresh(model)`.
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
    """Some entries of a weight: a view of it, or entries that an index gathers and scatters."""

    def clone(self) -> Tensor: ...

    def copy_(self, values: Tensor, /) -> Any: ...

    @property
    def dtype(self) -> torch.dtype: ...


class Overwrite:
    """Other values in parts of a weight, and the weight's own values to put back.

    `parts` are given at every call: the weight may have moved since the last one.
    `version` counts changes of the values. A backward pass needs the weight as its forward pass saw it, and compares.
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
            Whether all values are finite; with `check_finite` the weight is left as it was if they are not.
        """
        originals = self.originals or [part.clone() for part in parts]
        # The weight's dtype may be another since they were taken: `.data` is in nobody's sight.
        originals = [original.to(part.dtype) for original, part in zip(originals, parts, strict=True)]
        sums = [(original + values).to(original.dtype) for original, values in zip(originals, update, strict=True)]
        if check_finite and not all(bool(total.isfinite().all()) for total in sums):
            return False
        self.originals = originals
        for part, total in zip(parts, sums, strict=True):
            part.copy_(total)
        return True

    @torch.no_grad()
    def restore(self, parts: Sequence[Part]) -> None:
        """Put the weight's own values back."""
        if self.originals is not None:
            self.put_originals(parts)
        self.originals = None

    @torch.no_grad()
    def put_originals(self, parts: Sequence[Part]) -> None:
        """The weight's own values into `parts`, which may belong to a copy of the weight."""
        assert self.originals is not None
        for part, original in zip(parts, self.originals, strict=True):
            part.copy_(original)


class InPlaceLayer(ABC):
    """A layer that may train entries of its weight in place: which tensor is trained, and how to write it."""

    @abstractmethod
    def trained_in_place(self) -> Tensor | None:
        """The parameter whose update is in the weight, or would be were the adapter enabled; None if there is none."""

    @abstractmethod
    def refresh(self, changed: bool = True) -> None:
        """Bring the weight to what the layer computes with now. `changed`: the trained tensor may have new values."""


def mark_of(trained: Tensor) -> list[int]:
    """Changes with the tensor's memory, and with its values where autograd sees that."""
    return [trained.data_ptr(), trained._version]


@library.custom_op("diablo::check_written", mutates_args=("mark",))
def check_written(mark: Tensor, trained: Tensor) -> None:
    """For graphs of torch.compile: RuntimeError if the trained tensor is not the one that `mark` was taken of.

    The mark is declared as changed, which it is not, so that the check is not optimised away.
    """
    if mark.tolist() != mark_of(trained):
        raise RuntimeError(
            "blocks trained in place were changed outside an optimizer's step (LBFGS does so within one), which a "
            "compiled forward pass cannot write into the weight: call diablo.refresh(model) after it, or use "
            "mode='adapter'"
        )


@check_written.register_fake
def _(mark: Tensor, trained: Tensor) -> None:
    return None


_watched: weakref.WeakSet[InPlaceLayer] = weakref.WeakSet()


def watch(layer: InPlaceLayer) -> None:
    """From now on `layer` is refreshed after every step of an optimizer that holds its trained tensor."""
    _watched.add(layer)


def unwatch(layer: InPlaceLayer) -> None:
    """The layer is taken out of its model and must not write to the weight any more."""
    _watched.discard(layer)


def refresh(model: nn.Module) -> None:
    """Rewrite the weights that `model` trains in place, after their trained tensors were changed by hand."""
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
    """This process's rows of a weight that FSDP2 shards by rows, and which blocks they hold.

    Returns:
        The rows, the first block and the number of blocks: the whole weight and all blocks where nothing is sharded.

    Raises:
        RuntimeError: the shards do not hold whole blocks.
    """
    if not isinstance(weight, DTensor):
        return weight, 0, num_blocks
    world, rank = weight.device_mesh.size(), weight.device_mesh.get_local_rank()
    if weight.device_mesh.ndim != 1 or weight.placements != (Shard(0),) or num_blocks % world:
        raise RuntimeError(
            f"a weight sharded as {weight.placements} over {world} processes does not hold whole blocks of "
            f"num_blocks={num_blocks} on each: use mode='adapter', or an N that the number of processes divides"
        )
    return weight.to_local(), rank * num_blocks // world, num_blocks // world
