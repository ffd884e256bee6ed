"""Attaches blocks to the linear layers of a model."""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import get_quantization_kwargs, resolve_quantization_backend
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from diablo.blocks.config import DIABLO, BlockConfig, DiabloConfig
from diablo.blocks.layer import DiabloLayer
from diablo.blocks.linear import DiabloLinear
from diablo.blocks.mixed_batches import MixedBatches
from diablo.blocks.positions import Positions
from diablo.register import register
from diablo.targets import CheckedTuner
from diablo.tied import shared_names

# The paper's choice for LLaMA (section 4): neither the output projection nor the gate.
PAPER_TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]


class DiabloModel(CheckedTuner, MixedBatches, BaseTuner):
    """A model whose target layers compute `Y = X W0 + X D` with a trainable block-diagonal D (arXiv 2506.03230).

    Block sizes are chosen per layer, so the narrow key and value projections of grouped-query attention get
    rectangular blocks. Usually created by `get_peft_model(model, DiabloConfig(...))`.
    """

    prefix = "diablo_"
    tuner_layer_cls = DiabloLayer
    target_module_mapping = dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), PAPER_TARGETS)

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,  # part of PEFT's signature; set only for targets that are parameters
    ) -> None:
        assert isinstance(peft_config, BlockConfig)
        try:
            quantization = get_quantization_kwargs(self)
            base_layer = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
            backend = resolve_quantization_backend(base_layer, **quantization)
            if not isinstance(base_layer, nn.Linear | Conv1D) and (backend is None or backend.layer_type != "linear"):
                raise ValueError(
                    f"DiaBlo adapts linear layers, not {type(base_layer).__name__}: remove it from target_modules"
                )
            positions = self._positions(peft_config, current_key, base_layer)
            if positions is not None and 0 in positions.shape:
                return  # no entry of this layer is trained
            is_shared = bool(shared_names(self.model, target))
            if isinstance(target, DiabloLayer):
                target.update_layer(adapter_name, peft_config, current_key, is_shared, positions)
                return
            layer = DiabloLinear(target, adapter_name, peft_config, current_key, is_shared, positions, **quantization)
        except ValueError as error:
            raise ValueError(f"{current_key}: {error}") from None
        self._replace_module(parent, target_name, layer, target)

    def _positions(self, config: BlockConfig, name: str, base_layer: nn.Module) -> Positions | None:
        """Return the positions of the blocks in the layer of this name; None for the diagonal."""
        return None

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        names = [adapter_name] if isinstance(adapter_name, str) else adapter_name
        forced = [name for name in names if getattr(self.peft_config.get(name), "mode", None) == "in_place"]
        if forced and len(names) > 1:
            raise ValueError(
                f"adapters {', '.join(names)} cannot be active at once: mode='in_place' of {forced[0]} allows one; "
                "use mode='adapter' or 'auto'"
            )
        super().set_adapter(adapter_name, inference_mode=inference_mode)

    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, combination_type: str = "linear"
    ) -> None:
        """Add an adapter whose update is the weighted sum of other adapters', which must train the same entries.

        The new adapter is frozen and inactive, as in PEFT's LoRA.

        Raises:
            ValueError: an adapter is unknown, the adapters train different entries, or the combination is not "linear".
        """
        if combination_type != "linear":
            raise ValueError(f"combination_type={combination_type!r}: only 'linear' is possible for blocks")
        if len(adapters) != len(weights) or not adapters:
            raise ValueError(f"{len(adapters)} adapters and {len(weights)} weights: give one weight for each adapter")
        if unknown := [name for name in adapters if name not in self.peft_config]:
            raise ValueError(f"no adapter {', '.join(unknown)}: choose from {', '.join(self.peft_config)}")
        if adapter_name in self.peft_config:
            raise ValueError(f"adapter_name={adapter_name!r} is taken")
        layers = {name: layer for name, layer in self.model.named_modules() if isinstance(layer, DiabloLayer)}
        layers = {name: layer for name, layer in layers.items() if any(one in layer.diablo_blocks for one in adapters)}
        sums = {name: _weighted_sum(name, layer, adapters, weights) for name, layer in layers.items()}
        self.peft_config[adapter_name] = copy.deepcopy(self.peft_config[adapters[0]])
        self.inject_adapter(self.model, adapter_name)
        for name, total in sums.items():
            layers[name].diablo_blocks[adapter_name].data = total
            layers[name].diablo_blocks[adapter_name].requires_grad_(False)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if isinstance(new_module, DiabloLayer):
            super()._replace_module(parent, child_name, new_module, child)
        else:
            if isinstance(child, DiabloLayer):
                child.prepare_unloading()
            # Put back the complete base layer. PEFT's version would copy `weight`, which HQQ's layers lack.
            setattr(parent, child_name, new_module)


def _weighted_sum(name: str, layer: DiabloLayer, adapters: list[str], weights: list[float]) -> Tensor:
    same = all(one in layer.diablo_blocks for one in adapters)
    if same:
        shapes = {layer.diablo_blocks[one].shape for one in adapters}
        first, *others = (layer.positions(one) for one in adapters)
        same = len(shapes) == 1 and all(
            (other is None) == (first is None)
            and (other is None or all(torch.equal(*pair) for pair in zip(first or (), other, strict=True)))
            for other in others
        )
    if not same:
        raise ValueError(f"{name}: adapters {', '.join(adapters)} train different entries: their blocks have no sum")
    blocks = [weight * layer.diablo_blocks[one].detach() for one, weight in zip(adapters, weights, strict=True)]
    return torch.stack(blocks).sum(0)


def fit_shards(model: nn.Module, shards: int) -> None:
    """Choose the forward modes of a model that FSDP2 will shard by rows over `shards` processes.

    Layers of mode "auto" that would train in place, but whose shards would not hold whole blocks, switch to "adapter".

    Raises:
        ValueError: such a layer has `mode="in_place"`.
    """
    if shards == 1:
        return
    for name, layer in model.named_modules():
        if not isinstance(layer, DiabloLayer):
            continue
        for adapter, mode in layer.forward_mode.items():
            count, d_in, d_out = layer.diablo_blocks[adapter].shape
            even = (count * d_in, count * d_out) == (layer.in_features, layer.out_features)
            if mode == "adapter" or (layer.positions(adapter) is None and even and count % shards == 0):
                continue
            config: Any = getattr(model, "peft_config", {}).get(adapter)
            if config is not None and config.mode == "in_place":
                raise ValueError(
                    f"{name}: mode='in_place' is impossible where {shards} processes shard a weight of {count} blocks "
                    f"by rows: use mode='auto', or diagonal blocks with a num_blocks divisible by {shards}"
                )
            layer.forward_mode[adapter] = "adapter"
            layer.refresh()


register(DIABLO, DiabloConfig, DiabloModel)
