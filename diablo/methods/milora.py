"""MiLoRA: LoRA initialised with the smallest singular triplets of the weight (arXiv 2406.09044).

PEFT has PiSSA, the same construction with the largest triplets, but not MiLoRA. All but the initialisation is PEFT's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from peft import LoraConfig, LoraModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import resolve_quantization_backend
from torch import Tensor, nn

from diablo.blocks.layer import plain_weight
from diablo.card import WithCard
from diablo.register import peft_type, register
from diablo.targets import CheckedTuner
from diablo.tied import refuse_shared

MILORA = peft_type("MILORA")


@dataclass
class MiloraConfig(WithCard, LoraConfig):
    """`LoraConfig` whose factors start at the r smallest singular triplets, which are subtracted from the base weight.

    The paper sets `lora_alpha = r`. `LoraConfig` options that select another initialisation or layer are refused.

    Raises:
        ValueError: such an option is set.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = MILORA
        refuse_other_starts(self, "MiLoRA")


def refuse_other_starts(config: LoraConfig, method: str) -> None:
    """Raise a ValueError if an option of `LoraConfig` selects another initialisation or layer than the method's own."""
    for name, plain in (("init_lora_weights", True), ("use_dora", False), ("lora_bias", False)):
        if getattr(config, name) != plain:
            raise ValueError(f"{method} has its own initialisation: {name}={getattr(config, name)!r} must be {plain}")
    if config.target_parameters:
        raise ValueError(f"{method} adapts linear layers: target_parameters={config.target_parameters!r} must be unset")


def smallest_triplets(weight: Tensor, r: int, scaling: float) -> tuple[Tensor, Tensor]:
    """Return MiLoRA's factors of the last r triplets, fp32: A `(r, in)` = sqrt(S/s) Vᵀ, B `(out, r)` = U sqrt(S/s).

    Args:
        weight: `(out, in)`.
        scaling: s, the factor by which LoRA scales B A, so that s B A is the part of the weight that they span.

    Raises:
        ValueError: the weight has fewer than r triplets.
    """
    if r > min(weight.shape):
        raise ValueError(
            f"r={r} exceeds the {min(weight.shape)} singular values of a {tuple(weight.shape)} weight: lower r"
        )
    u, s, vt = torch.linalg.svd(weight.float(), full_matrices=False)
    root = (s[-r:] / scaling).sqrt()
    return root[:, None] * vt[-r:], u[:, -r:] * root


def _decomposable_weight(base_layer: nn.Module) -> Tensor:
    try:
        weight = plain_weight(base_layer)
        if isinstance(base_layer, nn.Linear) and resolve_quantization_backend(base_layer) is None:
            return weight
    except TypeError:
        pass
    raise ValueError(
        f"MiLoRA needs an nn.Linear that is not quantised, not {type(base_layer).__name__}: "
        "load the base model in fp16, bf16 or fp32, or change target_modules"
    )


class MiloraModel(CheckedTuner, LoraModel):
    """PEFT's LoRA with MiLoRA's initialisation.

    Attaching changes the base weights to W - s B A, as PiSSA does, so unloading does not restore W. Save with
    `diablo.methods.residual.save_adapter`, which writes an ordinary LoRA for the original W.
    """

    def _create_and_replace(
        self,
        lora_config: MiloraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        *,
        parameter_name: str | None = None,
    ) -> None:
        refuse_shared(self.model, current_key, target)
        try:
            weight = _decomposable_weight(target.get_base_layer() if isinstance(target, BaseTunerLayer) else target)
            super()._create_and_replace(
                lora_config, adapter_name, target, target_name, parent, current_key, parameter_name=parameter_name
            )
            self._start_at_smallest(getattr(parent, target_name), weight, adapter_name)
        except ValueError as error:
            raise ValueError(f"{current_key}: {error}") from None

    @staticmethod
    def _start_at_smallest(layer: LoraLayer, weight: Tensor, adapter_name: str) -> None:
        if weight.device.type == "meta":
            return  # only the structure is needed: there is nothing to decompose
        a, b = smallest_triplets(weight, layer.r[adapter_name], layer.scaling[adapter_name])
        factor_a: Tensor = layer.lora_A[adapter_name].weight.data  # pyright: ignore[reportAssignmentType]
        factor_b: Tensor = layer.lora_B[adapter_name].weight.data  # pyright: ignore[reportAssignmentType]
        # Subtract the factors as rounded to their dtype, so that the sum stays W.
        a, b = a.to(factor_a.dtype), b.to(factor_b.dtype)
        weight.copy_(weight.float() - layer.scaling[adapter_name] * (b.float() @ a.float()))
        if factor_a.device.type != "meta":  # meta with low_cpu_mem_usage: the saved factors are loaded later
            factor_a.copy_(a)
            factor_b.copy_(b)


register(MILORA, MiloraConfig, MiloraModel)
