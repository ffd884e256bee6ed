"""Checks whether a run's quantisation is compatible with its model and method, without weights."""

from __future__ import annotations

from typing import Any

from experiments.config import Quantization
from experiments.errors import UserError
from experiments.settings import section

Config = dict[str, Any]
CALIBRATED = ("gptq", "magr", "apiq")
NOT_PLAIN = ("use_dora", "use_rslora", "init_lora_weights", "rank_pattern", "alpha_pattern")


def name_quantized(config: Config) -> None:
    """Add the quantisation to the method's label after checking compatibility; an empty section is removed.

    Raises:
        UserError: they are not compatible.
    """
    quantization, method = config["quantization"], config["method"]
    if not quantization:
        del config["quantization"]
        return
    name = f"{quantization['method']}{quantization['bits']}"
    _check_grid(config["model"], quantization)
    if quantization["calibration"] is None and quantization["method"] in CALIBRATED:
        raise UserError(
            f"quantization.calibration=null: quantization={quantization['method']} needs calibration text: leave it out"
        )
    if not method["contract"].get("on_quantized", True):
        raise UserError(
            f"method={method['name']} changes the weights or needs their gradients, but quantization="
            f"{quantization['method']} keeps them as packed integers: choose another method, or quantization=none"
        )
    if section(Quantization, quantization, "quantization").with_factors:
        _check_lora(method, quantization)
    method["label"] += f"-{name}"


def _check_grid(model: Config, quantization: Config) -> None:
    """Check what would otherwise fail when a run starts; without torch, to keep planning fast."""
    group = quantization["group_size"]
    widths = {key: model["architecture"].get(key) for key in ("hidden_size", "intermediate_size")}
    for key, width in widths.items():
        if group != -1 and width and (group not in range(1, width + 1) or width % group):
            raise UserError(
                f"quantization.group_size={group} does not divide {key}={width}: give a divisor, or -1 for rows"
            )


def _check_lora(method: Config, quantization: Config) -> None:
    adapter: Config = method["adapter"] or {}
    made = quantization["options"]
    plain = adapter.get("_target_") == "peft.LoraConfig" and "prepare" not in method
    if not plain or any(adapter.get(key) for key in NOT_PLAIN):
        raise UserError(
            f"quantization={quantization['method']} makes a LoRA that training starts from, but {method['name']} "
            f"starts otherwise: give method=lora"
        )
    targets = adapter["target_modules"]
    if not isinstance(targets, list):
        raise UserError(f"method.adapter.target_modules={targets}: quantization={quantization['method']} needs a list")
    for ours, theirs in (("rank", "r"), ("lora_alpha", "lora_alpha")):
        if made[ours] != adapter[theirs]:
            raise UserError(
                f"quantization.options.{ours}={made[ours]}: the LoRA trained from it has "
                f"method.adapter.{theirs}={adapter[theirs]}: give both the same value"
            )
