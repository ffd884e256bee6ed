"""LoRI: LoRA with a frozen random A, and a B trained in full or in a few entries (arXiv 2504.07448).

LoRI-D trains all of B. LoRI-S restarts at B = 0 and trains only the entries of B that were largest after LoRI-D. Once
trained, both are ordinary LoRA. Formulas and constants are those of the authors' code, juzhengz/LoRI.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, LoraModel, PeftConfig
from peft.tuners.lora import LoraLayer
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file
from torch import Tensor, nn

from diablo.field_help import documented
from diablo.methods.milora import refuse_other_starts
from diablo.register import peft_type, register
from diablo.targets import CheckedTuner, check_targets

LORI = peft_type("LORI")
CHOSEN = "_lori_entries"  # set on a base layer from `choose_entries` until attaching: indices into its flattened B


@documented
@dataclass
class LoriConfig(LoraConfig):
    """`LoraConfig` with A frozen at LoRA's random initialisation, uniform in ±1/sqrt(in).

    `LoraConfig` options that select another initialisation or another layer are refused.

    Args:
        sparsity: Share of the entries of B that are not trained, chosen by `choose_entries`. 0 trains all.
        entries: Layer name -> number of trained entries, set by `choose_entries`; needed for loading.

    Raises:
        ValueError: such an option is set, or `sparsity` is not in [0, 1).
    """

    sparsity: float = 0.0
    entries: dict[str, int] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = LORI
        refuse_other_starts(self, "LoRI")
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity={self.sparsity} must be a share of B's entries: at least 0 and below 1")


class SparseB(nn.Module):
    """A matrix B `(out, r)` with few nonzero entries: `values` are trained, `entries` are their positions.

    Args:
        entries: indices into the flattened B; an int gives only their number, for positions that are loaded later.
    """

    entries: Tensor

    def __init__(self, shape: tuple[int, int], entries: Tensor | int, like: Tensor) -> None:
        super().__init__()
        self.shape, self.is_loaded = shape, not isinstance(entries, int)
        if isinstance(entries, int):
            entries = torch.zeros(entries, dtype=torch.long, device=like.device)
        self.values = nn.Parameter(torch.zeros(entries.shape, dtype=like.dtype, device=like.device))
        self.register_buffer("entries", entries.to(like.device))

    @property
    def weight(self) -> Tensor:
        """B as a dense matrix, which LoRA's layers read to merge.

        Raises:
            RuntimeError: the positions of the entries were not loaded; the config gives only their number.
        """
        out, r = self.shape
        if not self.is_loaded:
            raise RuntimeError("the trained entries of B are unknown: load the adapter, or call choose_entries")
        return self.values.new_zeros(out * r).index_put((self.entries,), self.values).view(out, r)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self.is_loaded = self.is_loaded or f"{prefix}entries" in state_dict


def largest_entries(factors: dict[str, Tensor], sparsity: float) -> dict[str, Tensor]:
    """Return, for each B, the flat indices of the entries that are largest over all B together.

    The threshold is the k-th largest of all N magnitudes, k = int((1 - sparsity) N); all entries equal to it are kept.

    Raises:
        ValueError: the threshold is zero, so that untrained entries would be kept, or a value is not finite.
    """
    sizes = torch.cat([factor.detach().abs().flatten().cpu() for factor in factors.values()])
    count = int((1 - sparsity) * sizes.numel())
    if count < 1:
        raise ValueError(f"sparsity={sparsity} leaves none of {sizes.numel()} entries of B: lower it")
    if not sizes.isfinite().all():
        raise ValueError("B of the first run's adapter has values that are NaN or infinite: train it again")
    threshold = sizes.kthvalue(sizes.numel() - count + 1).values
    if threshold == 0:
        raise ValueError(
            f"only {int((sizes > 0).sum())} of {sizes.numel()} entries of B differ from zero, sparsity={sparsity} "
            f"keeps {count}: train the first run longer"
        )
    return {name: (factor.abs().flatten() >= threshold).nonzero().flatten() for name, factor in factors.items()}


def choose_entries(model: nn.Module, config: PeftConfig, backward: object, prerequisite: Path | None) -> PeftConfig:
    """Store on the base's layers which entries of B to train: the largest of a LoRI-D adapter for the same base.

    Args:
        backward: not used.
        prerequisite: folder of that adapter. Not needed on the meta device, where only the number of entries is set.

    Raises:
        ValueError: the adapter is missing, has another rank, or is for other layers.
    """
    assert isinstance(config, LoriConfig)
    check_targets(model, config)
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and LoraModel._check_target_module_exists(config, name)
    }
    if not layers:
        raise ValueError(f"target_modules={config.target_modules!r} matches no linear layer of the model")
    shapes = {name: (layer.out_features, _rank(config, name)) for name, layer in layers.items()}
    if next(model.parameters()).is_meta:
        chosen = _as_many(shapes, config.sparsity)
    elif prerequisite is None:
        raise ValueError(f"sparsity={config.sparsity} takes its entries from a trained LoRI-D adapter: pass one")
    else:
        chosen = largest_entries(_trained_factors(prerequisite, shapes), config.sparsity)
    config.entries = {name: len(entries) for name, entries in chosen.items()}
    for name, layer in layers.items():
        setattr(layer, CHOSEN, chosen[name])
    return config


def _rank(config: LoraConfig, name: str) -> int:
    pattern = config.rank_pattern or {}
    return pattern.get(get_pattern_key(list(pattern), name), config.r)


def _as_many(shapes: dict[str, tuple[int, int]], sparsity: float) -> dict[str, Tensor]:
    """Return the right total number of entries on the meta device, filling the layers in order."""
    left = int((1 - sparsity) * sum(out * r for out, r in shapes.values()))
    chosen = {}
    for name, (out, r) in shapes.items():
        chosen[name] = torch.empty(min(left, out * r), dtype=torch.long, device="meta")
        left -= len(chosen[name])
    return chosen


def _trained_factors(prerequisite: Path, shapes: dict[str, tuple[int, int]]) -> dict[str, Tensor]:
    tensors = load_file(prerequisite / "adapter_model.safetensors")
    prefix, suffix = "base_model.model.", ".lora_B.weight"
    factors = {
        name.removeprefix(prefix).removesuffix(suffix): tensor
        for name, tensor in tensors.items()
        if name.endswith(suffix)
    }
    for name in sorted(factors.keys() | shapes.keys()):
        found = tuple(factors[name].shape) if name in factors else "none"
        if found != shapes.get(name, "none"):
            raise ValueError(
                f"{name}: B is {shapes.get(name, 'none')}, and {found} in the first run's adapter, {prerequisite}: "
                "give both the same rank and the same target modules"
            )
    return {name: factors[name].float() for name in shapes}


class LoriModel(CheckedTuner, LoraModel):
    """PEFT's LoRA with A frozen and, if entries were chosen, a sparse B.

    `save_pretrained` writes the trained values and their positions; `diablo.methods.residual.save_adapter` writes a
    plain LoRA, which loads without DiaBlo.
    """

    def _create_and_replace(
        self,
        lora_config: LoriConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        *,
        parameter_name: str | None = None,
    ) -> None:
        super()._create_and_replace(
            lora_config, adapter_name, target, target_name, parent, current_key, parameter_name=parameter_name
        )
        layer: LoraLayer = getattr(parent, target_name)
        if adapter_name not in layer.lora_B:
            raise ValueError(f"{current_key}: LoRI adapts linear layers, not {type(layer.get_base_layer()).__name__}")
        if lora_config.sparsity:
            self._make_sparse(layer, adapter_name, current_key, lora_config)
        # As PEFT's own variants freeze a factor; the freeze survives switching adapters.
        layer.frozen_peft_weight_names = {**layer.frozen_peft_weight_names, adapter_name: ("lora_A",)}
        layer._freeze_non_trainable_peft_weights(adapter_name)

    @staticmethod
    def _make_sparse(layer: LoraLayer, adapter_name: str, key: str, config: LoriConfig) -> None:
        base_layer = layer.get_base_layer()
        entries = getattr(base_layer, CHOSEN, (config.entries or {}).get(key))
        if entries is None:
            raise ValueError(
                f"{key}: sparsity={config.sparsity} but no entries are chosen: call diablo.lori.choose_entries first"
            )
        if hasattr(base_layer, CHOSEN):
            delattr(base_layer, CHOSEN)
        dense = layer.lora_B[adapter_name]
        assert isinstance(dense, nn.Linear)
        shape = (dense.out_features, dense.in_features)
        layer.lora_B[adapter_name] = SparseB(shape, entries, dense.weight)


def dense_factors(model: nn.Module, tensors: dict[str, Tensor], adapter_name: str) -> dict[str, Tensor]:
    """Rename a LoRI adapter's tensors as in plain LoRA: `lora_B.weight` `(out, r)` for each sparse `lora_B.values`."""
    dense = {}
    for name, tensor in tensors.items():
        if name.endswith(".lora_B.values"):
            layer = model.get_submodule(name.removesuffix(".lora_B.values"))
            assert isinstance(layer, LoraLayer)
            sparse = layer.lora_B[adapter_name]
            assert isinstance(sparse, SparseB)
            dense[name.removesuffix("values") + "weight"] = sparse.weight.detach()
        elif not name.endswith(".lora_B.entries"):
            dense[name] = tensor
    return dense


register(LORI, LoriConfig, LoriModel)
