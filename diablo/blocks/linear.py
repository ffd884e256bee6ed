"""The adapted linear layer as a module: its forward pass, saving, loading, copying and moving."""

from __future__ import annotations

from typing import Any

import torch
from peft.utils import quantization_extra_repr
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks  # pyright: ignore[reportPrivateUsage]

from diablo.blocks.config import BlockConfig
from diablo.blocks.functional import add_blocks, block_linear
from diablo.blocks.in_place import watch
from diablo.blocks.layer import DiabloLayer, obstacle_to_in_place
from diablo.blocks.mixed_batches import rows_by_adapter
from diablo.blocks.positions import Positions


class DiabloLinear(nn.Module, DiabloLayer):
    """`y = x W0 + dropout(x) diag(D_1 … D_N)` (arXiv 2506.03230, section 3), without a scaling factor.

    `positions` puts the blocks elsewhere than on the diagonal. Mode "in_place" uses one product, with a weight that
    holds W0 + D; mode "adapter" uses two. Saving, copying and moving always act on W0 and D separately.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: BlockConfig,
        name: str = "",
        weight_is_shared: bool = False,
        positions: Positions | None = None,
        **quantization: Any,
    ) -> None:
        super().__init__()
        DiabloLayer.__init__(self, base_layer, **quantization)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config, name, weight_is_shared, positions)
        self.register_load_state_dict_post_hook(_after_loading)
        watch(self)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Map `x` `(..., in_features)` to `(..., out_features)` in the base layer's output dtype."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is not None and not self.disable_adapters:
            return self._mixed(x, adapter_names, *args, **kwargs)
        if self.in_weight is not None:
            self._check_weight()
        names = [] if self.disable_adapters or self.merged else self.active_adapters
        names = [name for name in names if name in self.diablo_blocks]
        if not names or (self.in_weight is not None and not torch.is_grad_enabled()):
            return self.base_layer(x, *args, **kwargs)
        first, *others = names
        base: Any = self.base_layer
        blocks, dropout, positions = self.diablo_blocks[first], self._dropout(first), self.positions(first)
        recompute = self.recompute_inputs[first]
        if blocks.is_meta and not x.is_meta:
            raise RuntimeError(
                "the adapter's blocks are on the meta device: offload the base model before attaching it"
            )
        if self.in_weight is not None:
            return block_linear(x, base.weight, base.bias, blocks, self._overwrites[first], 0.0, positions, recompute)
        if obstacle_to_in_place(base, 0.0) is None:
            result = block_linear(x, base.weight, base.bias, blocks, None, dropout, positions, recompute)
        else:
            result = base(x, *args, **kwargs)
            if self.quantization_backend is not None:
                result = self.quantization_backend.maybe_clone_base_result(result)
            if _is_seen(base):
                result = result.clone()
            result = add_blocks(result, x, blocks, dropout, positions, recompute)
        for name in others:
            blocks, dropout, positions = self.diablo_blocks[name], self._dropout(name), self.positions(name)
            result = add_blocks(result, x, blocks, dropout, positions, self.recompute_inputs[name])
        return result

    def _mixed(self, x: Tensor, adapter_names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        """Apply to each row its own adapter."""
        rows_of = rows_by_adapter(x, adapter_names, self.merged)
        in_place = self.in_weight is not None
        self._leave_weight()
        try:
            result = self.base_layer(x, *args, **kwargs)
        finally:
            if in_place:
                self.refresh(changed=False)
        for name, rows in rows_of.items():
            if name in self.diablo_blocks:
                blocks, positions = self.diablo_blocks[name], self.positions(name)
                result = result.index_copy(0, rows, add_blocks(result[rows], x[rows], blocks, 0.0, positions))
        return result

    def _dropout(self, adapter_name: str) -> float:
        module = self.diablo_dropout[adapter_name]
        return module.p if self.training and isinstance(module, nn.Dropout) else 0.0

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT casts to the base's dtype here, even what it has just loaded: saved blocks would lose precision.
        exact = self.diablo_blocks[adapter_name].detach()
        super()._move_adapter_to_device_of_base_layer(adapter_name, device)
        self._keep_width({adapter_name: exact})
        self.refresh()

    def _keep_width(self, exact: dict[str, Tensor]) -> None:
        """Keep blocks in float32 whatever the base is cast to: in 16 bits they would lose most of their updates."""
        for name, before in exact.items():
            blocks = self.diablo_blocks[name]
            if blocks.dtype.itemsize < 4 <= before.dtype.itemsize:
                blocks.data = before.to(blocks.device)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_names, inference_mode)
        self.refresh(changed=False)

    def enable_adapters(self, enabled: bool) -> None:
        super().enable_adapters(enabled)
        self.refresh(changed=False)

    def delete_adapter(self, adapter_name: str) -> None:
        self._leave_weight()
        super().delete_adapter(adapter_name)
        self.forward_mode.pop(adapter_name, None)
        self.recompute_inputs.pop(adapter_name, None)
        self._overwrites.pop(adapter_name, None)
        self.refresh(changed=False)

    def _apply(self, fn: Any, recurse: bool = True) -> DiabloLinear:
        # Move W0 and D separately, because W0 + D would be rounded twice; a merged weight moves with its originals.
        self._leave_weight()
        exact = {name: blocks.detach() for name, blocks in self.diablo_blocks.items()}
        super()._apply(fn, recurse)
        self._keep_width(exact)
        for overwrite in self._overwrites.values():
            overwrite.originals = overwrite.originals and [fn(original) for original in overwrite.originals]
        self.refresh()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # called for a copy and for an unpickled layer
        watch(self)
        self.refresh()  # the copied mark belongs to the tensors of the original

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return W0 and D, even if the weight holds W0 + D.

        Such a weight is copied to insert W0's values, so the adapted weights briefly take twice their memory.
        """
        result = super().state_dict(*args, **kwargs)
        if self.in_weight is not None:
            key = kwargs.get("prefix", args[1] if len(args) > 1 else "") + "base_layer.weight"
            weight = result[key].detach().clone()
            self._overwrites[self.in_weight].put_originals(self._weight_parts(self.in_weight, weight))
            result[key] = nn.Parameter(weight, requires_grad=False) if kwargs.get("keep_vars") else weight
        return result

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._leave_weight()  # the base layer's weight is loaded next and replaces W0
        super()._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        return quantization_extra_repr(self)

    def __repr__(self) -> str:
        return "diablo." + super().__repr__()


def _is_seen(base_layer: nn.Module) -> bool:
    """Return whether hooks see the output of a module in the layer, so that it must not be modified in place."""
    return bool(_global_forward_hooks) or any(module._forward_hooks for module in base_layer.modules())


def _after_loading(layer: DiabloLinear, _: Any) -> None:
    layer.refresh()
