"""Whether a run's quantisation goes with its model and method, as far as that is known without weights."""

from __future__ import annotations

from typing import Any

from experiments.errors import UserError
from experiments.models.quantized import WITH_FACTORS

Config = dict[str, Any]
NOT_PLAIN = ("use_dora", "use_rslora", "init_lora_weights", "rank_pattern", "alpha_pattern")


def name_quantized(config: Config) -> None:
    """Puts the quantisation into the method's label, once the two are seen to go together. An empty section goes.

    Raises:
        UserError: they do not.
    """
    quantization, method = config["quantization"], config["method"]
    if not quantization:
        del config["quantization"]
        return
    name = f"{quantization['method']}{quantization['bits']}"
    _check_grid(config["model"], quantization)
    if not method["contract"].get("on_quantized", True):
        raise UserError(
            f"method={method['name']} changes the weights or needs their gradients, and quantization="
            f"{quantization['method']} keeps them as packed integers: choose another method, or quantization=none"
        )
    if quantization["method"] in WITH_FACTORS:
        _check_lora(method, quantization)
    method["label"] += f"-{name}"


def _check_grid(model: Config, quantization: Config) -> None:
    """What would only be found when a run starts; without torch, so that planning stays quick."""
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
            f"quantization={quantization['method']} makes a LoRA that training starts from, {method['name']} starts "
            f"otherwise: give method=lora"
        )
    targets = adapter["target_modules"]
    if not isinstance(targets, list):
        raise UserError(f"method.adapter.target_modules={targets}: quantization={quantization['method']} needs a list")
    for ours, theirs in (("rank", "r"), ("lora_alpha", "lora_alpha")):
        if made[ours] != adapter[theirs]:
            raise UserError(
                f"quantization.options.{ours}={made[ours]}: the LoRA that is trained from there has "
                f"method.adapter.{theirs}={adapter[theirs]}: give both the same"
            )
