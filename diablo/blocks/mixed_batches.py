"""Several adapters and the base in one batch: `model(..., adapter_names=["a", "__base__", …])`, as in PEFT's LoRA."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn

BASE = "__base__"  # PEFT's name for rows without an adapter


class MixedBatches:
    """Mixin before PEFT's tuner: passes `adapter_names`, one for each input row, to the layers."""

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        tuner = cast(BaseTuner, self)
        if tuner.training:
            raise ValueError("adapter_names is for inference: call model.eval() first")
        layers = [module for module in tuner.modules() if isinstance(module, BaseTunerLayer)]
        known = {name for layer in layers for part in layer.adapter_layer_names for name in getattr(layer, part)}
        if unknown := sorted(set(names) - known - {BASE}):
            raise ValueError(f"adapter_names: no adapter {', '.join(unknown)}: choose from {', '.join(sorted(known))}")
        beams = kwargs.get("num_beams") or 1  # generation repeats every row for each beam
        hook = partial(_give_names, adapter_names=[name for name in names for _ in range(beams)])
        wrapped = [
            module for module in tuner.modules() if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)
        ]
        handles = [cast(nn.Module, module).register_forward_pre_hook(hook, with_kwargs=True) for module in wrapped]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def rows_by_adapter(x: Tensor, adapter_names: Sequence[str], merged: bool) -> dict[str, Tensor]:
    """Return the row indices of `x` for each adapter; rows of the base are left out.

    Raises:
        ValueError: the number of names is not the number of rows, or adapters are merged into the shared weight.
    """
    if len(x) != len(adapter_names):
        raise ValueError(f"adapter_names: {len(adapter_names)} names for {len(x)} rows: give one name for each row")
    if merged:
        raise ValueError("adapter_names cannot be used while adapters are merged: call model.unmerge_adapter() first")
    found: dict[str, list[int]] = {}
    for row, name in enumerate(adapter_names):
        found.setdefault(name, []).append(row)
    return {name: torch.tensor(rows, device=x.device) for name, rows in found.items() if name != BASE}


def _give_names(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], adapter_names: list[str]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, {**kwargs, "adapter_names": adapter_names}
