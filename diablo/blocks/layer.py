"""The adapters of one linear layer: diagonal or other blocks next to its frozen weight, or inside it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import (
    BaseTunerLayer,
    _get_in_out_features,  # pyright: ignore[reportPrivateUsage]
    check_adapters_to_merge,
)
from peft.utils import resolve_quantization_backend
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from diablo.blocks import positions as at_positions
from diablo.blocks.config import BlockConfig, DiabloConfig
from diablo.blocks.in_place import InPlaceLayer, Overwrite, Part, check_written, local_shard, mark_of, unwatch
from diablo.blocks.positions import ChosenEntries, Positions
from diablo.blocks.products import BlockShape, block_shape, covered, delta_weight, diagonal_blocks, is_even

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SMALLEST_SIDE = 16  # of a block that `auto` trains in place: below, a batched product wastes most of each tile


def plain_weight(base_layer: nn.Module) -> Tensor:
    """Return the weight of a floating-point layer, detached, in its own layout; autograd sees writes to it.

    Raises:
        TypeError: the weight is quantised or otherwise not the matrix that the layer multiplies by; adding to it would
            silently give a wrong layer.
    """
    weight = getattr(base_layer, "weight", None)
    if weight is None or type(weight.data) not in (torch.Tensor, DTensor) or weight.dtype not in FLOAT_DTYPES:
        kind = "no weight" if weight is None else f"a weight of type {type(weight.data).__name__}, {weight.dtype}"
        raise TypeError(
            f"{type(base_layer).__name__} has {kind}, which cannot be changed in place: "
            "load or dequantise the base model in fp16, bf16 or fp32"
        )
    return weight.detach()


def obstacle_to_in_place(layer: nn.Module, dropout: float) -> str | None:
    """Return why blocks cannot be trained inside a base layer's weight; None if they can."""
    if dropout:
        return f"dropout={dropout}, which would also drop the base layer's input"
    if type(layer) is not nn.Linear:  # first, because reading another layer's weight may compute it
        return f"a base layer that is quantised or no plain nn.Linear ({type(layer).__name__})"
    if type(layer.weight.data) is not torch.Tensor or layer.weight.dtype not in FLOAT_DTYPES:
        return f"a base layer that is quantised (with {layer.weight.dtype})"
    if layer.weight.is_meta:
        return "a base weight on the meta device, which holds no values to write"
    if layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer):
        return "hooks on the base layer, which would not be called"
    return None


def layer_sides(base_layer: nn.Module) -> tuple[int, int]:
    """Return in_features and out_features, also for quantised layers."""
    in_features, out_features = _get_in_out_features(base_layer)
    if in_features is None or out_features is None:
        raise TypeError(f"the sizes of {type(base_layer).__name__} are unknown")
    return in_features, out_features


class DiabloLayer(BaseTunerLayer, InPlaceLayer):
    """The adapters of one layer, keyed by adapter name; `DiabloLinear` adds the forward pass.

    `diablo_blocks[name]` is the paper's 𝒟: `(num_blocks, d_in, d_out)`, zero at the start. `diablo_inputs[name]` and
    `diablo_outputs[name]`, saved with the blocks, hold the positions of blocks that are not on the diagonal.
    `forward_mode[name]` is "in_place" or "adapter". The base weight holds W0, or W0 plus the update of the adapter
    named by `in_weight`, or of the merged adapters.
    """

    adapter_layer_names = ("diablo_blocks",)
    other_param_names = ("diablo_inputs", "diablo_outputs", "diablo_dropout")

    def __init__(self, base_layer: nn.Module, **quantization: Any) -> None:
        self.base_layer = base_layer
        self.diablo_blocks = nn.ParameterDict()
        self.diablo_inputs = BufferDict(persistent=True)
        self.diablo_outputs = BufferDict(persistent=True)
        self.diablo_dropout = nn.ModuleDict()
        self._disable_adapters = False
        self.merged_adapters = []
        self.forward_mode: dict[str, str] = {}
        self.recompute_inputs: dict[str, bool] = {}
        self.in_weight: str | None = None
        self.weight_is_shared = False
        self._overwrites: dict[str, Overwrite] = {}
        self._written: Tensor | None = None  # `mark_of` the blocks in the weight

        base_layer = self.get_base_layer()
        self.quantization_backend = resolve_quantization_backend(base_layer, **quantization)
        # transformers' Conv1D (GPT-2) is a linear layer that keeps its weight as (in, out).
        self.fan_in_fan_out = isinstance(base_layer, Conv1D)
        self.in_features, self.out_features = layer_sides(base_layer)

    def update_layer(
        self,
        adapter_name: str,
        config: BlockConfig,
        name: str = "",
        weight_is_shared: bool = False,
        positions: Positions | None = None,
    ) -> None:
        """Add an adapter, or replace the one of this name.

        Args:
            name: name of the layer in the model; selects N if `config.num_blocks` is a dictionary.
            weight_is_shared: whether another module uses the same weight, which must then not be changed.
            positions: positions of the blocks; None for the diagonal, with a `DiabloConfig` as `config`.

        Raises:
            ValueError: N does not divide the layer's sides, or `config.mode` is "in_place" but that is impossible.
        """
        self._leave_weight()
        self.weight_is_shared = weight_is_shared
        shape, suits = self._diagonal(config, name) if positions is None else (positions.shape, True)
        obstacle = obstacle_to_in_place(self.base_layer, config.dropout)
        obstacle = obstacle or ("a base weight that other modules share" if weight_is_shared else None)
        if config.mode == "in_place" and obstacle:
            raise ValueError(f"mode='in_place' cannot be used with {obstacle}: use mode='adapter'")
        in_place = config.mode == "in_place" or (config.mode == "auto" and suits and not obstacle)
        self.forward_mode[adapter_name] = "in_place" if in_place else "adapter"
        self.recompute_inputs[adapter_name] = config.recompute_inputs
        self._overwrites[adapter_name] = Overwrite()

        # In the base's dtype, as PEFT expects; get_peft_model casts it to float32 unless told otherwise.
        dtype = getattr(getattr(self.get_base_layer(), "weight", None), "dtype", torch.float32)
        blocks = torch.zeros(shape, dtype=dtype if dtype in FLOAT_DTYPES else torch.float32)
        if not config.init_weights:
            nn.init.normal_(blocks, std=shape.d_in**-0.5)
        self.diablo_blocks[adapter_name] = nn.Parameter(blocks)
        for index in (self.diablo_inputs, self.diablo_outputs):
            if adapter_name in index:
                del index[adapter_name]
        if positions is not None:
            self.diablo_inputs[adapter_name], self.diablo_outputs[adapter_name] = positions
        self.diablo_dropout[adapter_name] = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _diagonal(self, config: BlockConfig, name: str) -> tuple[BlockShape, bool]:
        """Return the shape of the diagonal blocks, and whether it suits in-place training."""
        assert isinstance(config, DiabloConfig)
        shape = block_shape(self.in_features, self.out_features, config.blocks_of(name), config.allow_uneven)
        even = is_even(shape, self.in_features, self.out_features)
        return shape, even and min(shape.d_in, shape.d_out) >= SMALLEST_SIDE

    def positions(self, adapter_name: str) -> Positions | None:
        """Return the positions of the adapter's blocks; None for the diagonal."""
        if adapter_name not in self.diablo_inputs:
            return None
        inputs, outputs = self.diablo_inputs[adapter_name], self.diablo_outputs[adapter_name]
        return Positions(inputs, outputs)  # pyright: ignore[reportArgumentType]

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """Return the adapter's update in the layout of the base weight: `(out, in)`; `(in, out)` for Conv1D."""
        blocks, positions = self.diablo_blocks[adapter_name], self.positions(adapter_name)
        if positions is None:
            delta = delta_weight(blocks, self.in_features, self.out_features)
        else:
            delta = at_positions.delta_weight(blocks, positions, self.in_features, self.out_features)
        return delta.T.contiguous() if self.fan_in_fan_out else delta

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        # Most of these updates have full rank; a low-rank approximation would lose most of them.
        return False

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapters' updates to the base weight. A weight that other modules share is copied first.

        Args:
            safe_merge: check the result, and leave the weight unchanged if it is not finite.
            adapter_names: the adapters to merge; None for the active ones. Adapters already merged are skipped.

        Raises:
            ValueError: `safe_merge` found non-finite values.
            TypeError: the base layer is quantised in a way that does not allow merging.
        """
        for adapter_name in check_adapters_to_merge(self, adapter_names):
            if adapter_name not in self.diablo_blocks:
                continue
            if self.weight_is_shared:
                self.base_layer = copy.deepcopy(self.base_layer)
                self.weight_is_shared = False
            if self.quantization_backend is not None:
                self._add_quantized(adapter_name, 1, safe_merge)
            else:
                if self.in_weight != adapter_name:
                    self._leave_weight()
                    self._values_changed()
                # In place, this rewrites the values the weight already holds: merging only changes the bookkeeping.
                if not self._write(adapter_name, check_finite=safe_merge):
                    raise ValueError(_not_finite(adapter_name))
                self.in_weight = None
            self.merged_adapters.append(adapter_name)

    def unmerge(self) -> None:
        """Remove merged adapters from the base weight: exactly, or up to rounding if the weight is quantised.

        The weight is W0 afterwards, also in mode "in_place": the blocks act from the side until the next optimizer
        step, or until another adapter is set.
        """
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        self._values_changed()
        while self.merged_adapters:
            # In reverse order: adapters overlap, and each saved its originals after the earlier ones were merged.
            adapter_name = self.merged_adapters.pop()
            if self._overwrites[adapter_name].is_written:
                self._overwrites[adapter_name].restore(self._weight_parts(adapter_name))
            else:
                self._add_quantized(adapter_name, -1, check_finite=False)

    # The blocks inside the weight

    def trained_in_place(self) -> Tensor | None:
        name = self._sole_adapter()
        return self.diablo_blocks[name] if name is not None else None

    def refresh(self, changed: bool = True) -> None:
        """Write W0 + D into the base weight if the active adapter is trained in place, else restore W0.

        Merged adapters are left alone. `changed`: the blocks may have new values.
        """
        if changed:
            self._values_changed()
        if self.merged:
            return
        name = None if self.disable_adapters else self._sole_adapter()
        if name is not None and (self.diablo_blocks[name].is_meta or self.base_layer.weight.is_meta):
            if self.in_weight is not None:
                raise RuntimeError("the base weight was moved to the meta device with blocks in it: use mode='adapter'")
            name = None  # the values are not loaded yet
        if self.in_weight != name:
            self._leave_weight()
        if name is None:
            return
        self._write(name)
        self.in_weight = name
        blocks, weight = self.diablo_blocks[name], self.base_layer.weight
        # FSDP2 uses other tensors inside the forward pass than outside it, so the mark would say nothing about values.
        sharded = isinstance(blocks, DTensor) or isinstance(weight, DTensor)
        self._written = None if sharded else torch.tensor(mark_of(blocks), device="cpu")

    def prepare_unloading(self) -> None:
        """Prepare the base layer for the permanent removal of its adapters; merged ones stay in the weight."""
        if not self.merged:
            self._leave_weight()
        unwatch(self)

    def _values_changed(self) -> None:
        """Invalidate the weight for backward passes that are still pending."""
        for overwrite in self._overwrites.values():
            overwrite.version += 1

    def _check_weight(self) -> None:
        """Check, before an in-place forward pass, that the weight holds the current blocks.

        A torch.compile graph cannot rewrite the weight; it checks at every run instead.

        Raises:
            RuntimeError: the base layer got hooks, or lost its values, since the adapter was attached; in a graph, the
                blocks have changed.
        """
        name = self.in_weight
        assert name is not None
        blocks = self.diablo_blocks[name]
        if self._written is not None and torch.compiler.is_compiling():
            check_written(self._written, blocks)
        elif self._written is not None and self._written.tolist() != mark_of(blocks):
            self.refresh()  # the blocks were replaced on loading, or changed by hand
        if obstacle := obstacle_to_in_place(self.base_layer, 0.0):
            raise RuntimeError(f"the layer trains in place but has since got {obstacle}: use mode='adapter'")

    def _sole_adapter(self) -> str | None:
        """Return the active adapter if it is the only one and trained in place, else None."""
        names = [name for name in self.active_adapters if name in self.diablo_blocks]
        return names[0] if len(names) == 1 and self.forward_mode[names[0]] == "in_place" else None

    def _write(self, adapter_name: str, check_finite: bool = False) -> bool:
        parts = self._weight_parts(adapter_name)
        blocks = self.diablo_blocks[adapter_name].detach()
        if adapter_name in self.diablo_inputs:
            update = [blocks]
        elif isinstance(blocks, DTensor) or isinstance(self.get_base_layer().weight, DTensor):
            _, first, count = local_shard(plain_weight(self.get_base_layer()), self._shape(adapter_name).num_blocks)
            update = [blocks.to_local() if isinstance(blocks, DTensor) else blocks[first : first + count]]
        else:
            update = covered(blocks, self.in_features, self.out_features)
        return self._overwrites[adapter_name].add(parts, update, check_finite)

    def _leave_weight(self) -> None:
        """Restore W0 if an adapter is in the weight."""
        if self.in_weight is not None:
            self._overwrites[self.in_weight].restore(self._weight_parts(self.in_weight))
            self.in_weight = None

    def _shape(self, adapter_name: str) -> BlockShape:
        return BlockShape(*self.diablo_blocks[adapter_name].shape)

    def _weight_parts(self, adapter_name: str, weight: Tensor | None = None) -> Sequence[Part]:
        """Return the entries of the base weight (or a copy of it) this adapter adds to, matching `covered`."""
        weight = plain_weight(self.get_base_layer()) if weight is None else weight
        shape, positions = self._shape(adapter_name), self.positions(adapter_name)
        if positions is not None:
            if isinstance(weight, DTensor):
                raise RuntimeError("blocks off the diagonal cannot be in a sharded weight: use mode='adapter'")
            return [ChosenEntries(weight.T if self.fan_in_fan_out else weight, positions)]
        if not isinstance(weight, DTensor):
            return diagonal_blocks(weight.T if self.fan_in_fan_out else weight, shape)
        rows, first, count = local_shard(weight, shape.num_blocks)
        overwrite = self._overwrites[adapter_name]
        if overwrite.originals is not None and overwrite.originals[0].shape[0] != count:
            overwrite.originals = [overwrite.originals[0][first : first + count].clone()]  # saved before sharding
        columns = rows[:, first * shape.d_in : (first + count) * shape.d_in]
        return diagonal_blocks(columns, BlockShape(count, shape.d_in, shape.d_out))

    def _add_quantized(self, adapter_name: str, sign: int, check_finite: bool) -> None:
        weight = self.get_base_weight()
        total = (weight + sign * self.get_delta_weight(adapter_name).detach()).to(weight.dtype)
        if check_finite and not total.isfinite().all():
            raise ValueError(_not_finite(adapter_name))
        self.set_base_weight(total)


def _not_finite(adapter_name: str) -> str:
    return f"NaNs detected in the merged weights. The adapter {adapter_name} seems to be broken"
