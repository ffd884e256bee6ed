"""Saves trained adapters as ordinary LoRA: those whose attaching changed the base model, and LoRI's sparse B.

PiSSA, MiLoRA, OLoRA, CorDA and LoRA-GA start at A₀, B₀ and subtract s B₀ A₀ from the base weight W. Their trained
factors belong to that changed base: on W itself they are wrong, and recreating the start needs the same SVD (or
gradient). The update relative to W,

    s (B A - B₀ A₀) = s [B | -B₀] [A ; A₀],

is an ordinary LoRA of rank 2 r, and that is what is written. PEFT's own conversion does this for PiSSA and similar
methods, but it loads a second adapter into the live model, does not support MiLoRA and omits `modules_to_save`.
"""

from __future__ import annotations

import copy
import math
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors.torch import save_file
from torch import Tensor, nn

from diablo.methods.lori import LoriConfig, dense_factors
from diablo.methods.milora import MiloraConfig
from diablo.tied import refuse_shared

ADAPTER = "default"
# Settings that only describe the initialisation; LoraConfig warns about those it would ignore.
START_ONLY = ("corda_config", "eva_config", "lora_ga_config")


def changes_base(config: PeftConfig) -> bool:
    """Return whether attaching the adapter subtracts its initial factors from the base weights.

    LoftQ and KaSA also change the base, but not by the product of their factors, and are not covered here.
    """
    start = getattr(config, "init_lora_weights", None)
    return isinstance(config, MiloraConfig) or (
        isinstance(start, str) and start.lower().startswith(("pissa", "olora", "corda", "lora_ga"))
    )


def check_start(model: nn.Module, config: PeftConfig) -> None:
    """Raise a ValueError if attaching would subtract initial factors from a weight that other modules share."""
    if changes_base(config) and getattr(config, "target_modules", None):
        for name, module in model.named_modules():
            if check_target_module_exists(config, name):
                refuse_shared(model, name, module)


def initial_factors(model: PeftModel) -> dict[str, Tensor]:
    """Return the initial factors; call it right after attaching and keep the result until the adapter is saved.

    Returns:
        A₀ and B₀ on the CPU, keyed by their names in the adapter's file; empty for a method that does not change the
        base.
    """
    if not changes_base(model.peft_config[ADAPTER]):
        return {}
    factors = _adapter_tensors(model)
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in factors.items() if _factor(name)}


def save_adapter(model: PeftModel, directory: Path, initial: dict[str, Tensor] | None) -> None:
    """Write the adapter named "default" as PEFT's two files, `adapter_config.json` and `adapter_model.safetensors`.

    The model does not change. The files always fit the base model as it was before the adapter was attached.

    Args:
        initial: result of `initial_factors`; empty or None for a method that does not change the base.

    Raises:
        ValueError: the method changes the base and `initial` lacks initial factors, or DoRA is on.
    """
    config = model.peft_config[ADAPTER]
    directory.mkdir(parents=True, exist_ok=True)
    if changes_base(config):
        assert isinstance(config, LoraConfig)
        if config.use_dora:
            raise ValueError("use_dora=True and an initialisation that changes the base cannot be saved: unset one")
        tensors = _relative_to_base(_adapter_tensors(model), initial or {})
        _save_plain_lora(model, config, tensors, directory, widening=2)
    elif isinstance(config, LoriConfig):
        tensors = dense_factors(model, _adapter_tensors(model), ADAPTER)
        _save_plain_lora(model, config, tensors, directory, widening=1)
    else:
        model.save_pretrained(str(directory), selected_adapters=[ADAPTER])
    _give_usual_mode(directory / "adapter_model.safetensors")


def _adapter_tensors(model: PeftModel) -> dict[str, Tensor]:
    """Return the adapter's tensors without base weights of embeddings and output layers, which may have changed."""
    return get_peft_model_state_dict(model, adapter_name=ADAPTER, save_embedding_layers=False)


def _factor(name: str) -> str | None:
    return next((factor for factor in ("lora_A", "lora_B") if f".{factor}." in name), None)


def _relative_to_base(trained: dict[str, Tensor], initial: dict[str, Tensor]) -> dict[str, Tensor]:
    expected = {name for name in trained if _factor(name)}
    if initial.keys() != expected:
        raise ValueError(
            f"the initial factors of {len(expected - initial.keys())} of {len(expected)} tensors are missing: "
            "pass what initial_factors(model) returned right after attaching"
        )
    tensors = {}
    for name, tensor in trained.items():
        factor, tensor = _factor(name), tensor.detach()
        if factor is not None:
            start = initial[name].to(tensor)
            # A is (r, in), B is (out, r): the rank is A's first and B's last axis.
            tensor = torch.cat([tensor, start], dim=0) if factor == "lora_A" else torch.cat([tensor, -start], dim=1)
        tensors[name] = tensor
    return tensors


def _save_plain_lora(
    model: PeftModel, config: LoraConfig, tensors: dict[str, Tensor], directory: Path, widening: int
) -> None:
    """Write both files of a `LoraConfig` whose factors have `widening` times the ranks of `config`."""
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    settings: dict[str, Any] = {f.name: copy.deepcopy(getattr(config, f.name)) for f in fields(LoraConfig) if f.init}
    # The scale s = alpha / r, or alpha / sqrt(r) with rank-stabilised LoRA, must not change.
    alpha_factor = math.sqrt(widening) if config.use_rslora else widening
    settings |= dict.fromkeys(START_ONLY)
    settings |= {
        "init_lora_weights": True,
        "inference_mode": True,
        "r": widening * config.r,
        "lora_alpha": alpha_factor * config.lora_alpha,
        "rank_pattern": {name: widening * r for name, r in (config.rank_pattern or {}).items()},
        "alpha_pattern": {name: alpha_factor * alpha for name, alpha in (config.alpha_pattern or {}).items()},
    }
    base = model.get_base_model()
    settings["base_model_name_or_path"] = config.base_model_name_or_path or getattr(base, "name_or_path", None)
    if config.task_type is None:  # without a task, AutoPeftModel needs the class
        settings["auto_mapping"] = {
            "base_model_class": type(base).__name__,
            "parent_library": type(base).__module__,
        }
    LoraConfig(**settings).save_pretrained(str(directory))


def _give_usual_mode(file: Path) -> None:
    """Apply the umask to a file's mode: safetensors 0.8 writes 0600, so a group could not read the adapter."""
    umask = os.umask(0)
    os.umask(umask)
    file.chmod(0o666 & ~umask)
