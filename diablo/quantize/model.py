"""Quantises a causal language model one decoder layer at a time, with the layers' real inputs.

Each layer is fitted to the outputs of the quantised layers before it. Finished layers are kept in the folder, and the
same call resumes after the last of them.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, TaskType
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from diablo.quantize import storage
from diablo.quantize.activations import Activations, Factors
from diablo.quantize.apiq import Block, gets_factors, train_block
from diablo.quantize.grids import QuantizedWeight, width_of_groups
from diablo.quantize.quantized_linear import QuantizedLinear, replace_linears, set_module
from diablo.quantize.settings import DATA_FREE, NORMAL_FLOAT, WITH_FACTORS, QuantizationSettings


@torch.no_grad()
def quantize_model(
    model: PreTrainedModel,
    settings: QuantizationSettings,
    folder: Path,
    calibration: Tensor | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Quantise the linear layers in the model's decoder layers, in place, and write the result to a folder.

    Args:
        calibration: token ids, `(sequences, length)`, required by gptq, magr and apiq. Sequences pass through the model
            one at a time.
        device: device to which each decoder layer is moved while it is quantised; None: not moved.

    Returns:
        The record of the quantised model; `load_quantized(folder)` loads the model.

    Raises:
        ValueError: the calibration set is empty, activations are not finite (the message names the layer), a group size
            does not divide, a target module is missing, or the folder was started with other settings. Finished layers
            are kept.
    """
    prefix, layers = storage.decoder_layers(model)
    if storage.quantized_layers(model):
        raise ValueError("the model is already quantised: pass it in full precision")
    if calibration is None and settings.method not in DATA_FREE:
        raise ValueError(f"calibration: {settings.method} needs token ids, (sequences, length)")
    if calibration is not None and (calibration.ndim != 2 or not calibration.numel()):
        raise ValueError(f"calibration: ids of shape {tuple(calibration.shape)} are empty or not (sequences, length)")
    absent = [
        target
        for target in settings.target_modules or ()
        if not any(gets_factors(name, [target]) for name in _linears(layers))
    ]
    if absent:
        raise ValueError(f"target_modules: no linear layer is named {', '.join(absent)}")
    for name, linear in _linears(layers).items():  # check before hours of work
        try:
            width_of_groups(linear.in_features, settings.group_size)
        except ValueError as error:
            raise ValueError(f"{prefix}.{name}: {error}") from None
    _begin(folder, settings, model, calibration)
    model.eval()
    activations = None if calibration is None else Activations(model, layers, calibration)
    every = 0.1 if sys.stderr.isatty() else 60  # seconds: each update is a line of a log
    title = f"quantising to {settings.bits} bits"
    bar = tqdm(layers, desc=title, unit="layer", disable=not progress, mininterval=every)
    for index, layer in enumerate(bar):
        home = next(layer.parameters()).device
        layer.to(device or home)
        _quantize_layer(f"{prefix}.{index}", layer, storage.layer_file(folder, index), settings, activations)
        layer.to(home)
    if settings.method in WITH_FACTORS:
        _write_adapter(folder, prefix, len(layers), settings)
    costs = [
        json.loads(storage.layer_file(folder, i).with_suffix(".json").read_text(encoding="utf-8"))
        for i in range(len(layers))
    ]
    record = storage.finish(model, folder, {"settings": asdict(settings), "layers": costs})
    model.quantization = record  # pyright: ignore[reportArgumentType]
    return record


def _quantize_layer(
    name: str, layer: nn.Module, file: Path, settings: QuantizationSettings, activations: Activations | None
) -> None:
    """Quantise a decoder layer in place, or load it from its file, and pass the hidden states through it."""
    full: list[Tensor] = []
    if activations and settings.method == "apiq":
        full = activations.through(name, layer, activations.full)
    if file.is_file():
        factors = _restore(layer, file, settings)
    else:
        began = time.monotonic()
        linears = _linears(layer)
        grams = activations.gram_matrices(name, layer) if activations else {}
        if activations and settings.method == "apiq":
            block = _train(name, layer, full, settings, activations)
        else:
            block = _quantize_each(name, linears, grams, settings)
        errors = {n: _errors(linear.weight, block.weights[n], grams.get(n)) for n, linear in linears.items()}
        for n, linear in linears.items():
            set_module(layer, n, QuantizedLinear.from_weight(block.weights[n], linear.bias))
        factors = block.factors
        if factors:
            storage.write_tensors(_factors_file(file), _by_name(factors))
        cost = {"name": name, "seconds": time.monotonic() - began, "linears": errors, "losses": block.losses}
        storage.write_json(file.with_suffix(".json"), cost)
        storage.write_tensors(file, layer.state_dict())  # last: this file marks the layer as finished
    if activations:
        rank, lora_alpha = settings.lora
        activations.quantized = activations.through(name, layer, activations.quantized, factors, lora_alpha / rank)
        activations.full = full


def _quantize_each(
    name: str, linears: dict[str, nn.Linear], grams: dict[str, Tensor], settings: QuantizationSettings
) -> Block:
    block = Block({}, {}, [])
    for n, linear in linears.items():
        try:
            block.weights[n], factors = settings.quantize(n, linear.weight, grams.get(n))
        except ValueError as error:
            raise ValueError(f"{name}.{n}: {error}") from None
        if factors is not None:
            block.factors[n] = factors
    return block


def _train(
    name: str, layer: nn.Module, full: list[Tensor], settings: QuantizationSettings, activations: Activations
) -> Block:
    """Return ApiQ's weights and factors of one decoder layer."""
    beside = activations.through(name, layer, activations.quantized)
    return train_block(
        layer,
        activations.quantized,
        activations.kwargs,
        [[one, other] for one, other in zip(full, beside, strict=True)],
        settings.bits,
        settings.group_size,
        target_modules=settings.target_modules,
        **settings.options,
    )


def _restore(layer: nn.Module, file: Path, settings: QuantizationSettings) -> Factors:
    """Replace the full-precision tensors by those of a finished layer."""
    linears = _linears(layer)
    device = next(layer.parameters()).device
    replace_linears(layer, linears, settings.bits, settings.group_size, settings.method in NORMAL_FLOAT)
    layer.load_state_dict(load_file(file, device=str(device)), assign=True)
    if settings.method not in WITH_FACTORS:
        return {}
    stored = load_file(_factors_file(file), device=str(device))
    return {n: (stored[f"{n}.lora_A"], stored[f"{n}.lora_B"]) for n in linears if f"{n}.lora_A" in stored}


def _errors(weight: Tensor, quantized: QuantizedWeight, gram: Tensor | None) -> dict[str, float]:
    """Return the relative squared errors of the weight, and of the layer's outputs on the calibration inputs."""
    weight = weight.float()
    difference = quantized.dequantize() - weight
    errors = {"weight": (difference.square().sum() / weight.square().sum()).item()}
    if gram is not None:
        errors["output"] = (((difference @ gram) * difference).sum() / ((weight @ gram) * weight).sum()).item()
    return errors


def _begin(folder: Path, settings: QuantizationSettings, model: PreTrainedModel, calibration: Tensor | None) -> None:
    """Write everything the result depends on, or compare it with what the folder was started with."""
    wanted = {
        **asdict(settings),
        "base": storage.tensors_hash(model.state_dict()),
        "calibration": None if calibration is None else storage.tensors_hash({"tokens": calibration}),
    }
    path = folder / storage.SETTINGS
    if not path.is_file():
        storage.write_json(path, wanted)
    begun = json.loads(path.read_text(encoding="utf-8"))
    for key, value in wanted.items():
        if begun.get(key) != value:
            raise ValueError(
                f"{folder}: started with {key}={begun.get(key)}, now {key}={value}: use another folder; "
                "the finished layers are kept"
            )


def _write_adapter(folder: Path, prefix: str, layers: int, settings: QuantizationSettings) -> None:
    """Write the factors of the weights as a LoRA adapter in PEFT's format."""
    tensors = {
        f"base_model.model.{prefix}.{index}.{name}.weight": tensor
        for index in range(layers)
        for name, tensor in load_file(_factors_file(storage.layer_file(folder, index))).items()
    }
    rank, lora_alpha = settings.lora
    config = LoraConfig(
        r=rank,
        lora_alpha=lora_alpha,  # pyright: ignore[reportArgumentType]
        target_modules=sorted({name.split(".")[-3] for name in tensors}),  # the part before lora_A.weight
        task_type=TaskType.CAUSAL_LM,
    )
    config.save_pretrained(str(folder / "adapter"))
    storage.write_tensors(folder / "adapter" / "adapter_model.safetensors", tensors)


def _linears(module: nn.Module) -> dict[str, nn.Linear]:
    return {name: child for name, child in module.named_modules() if isinstance(child, nn.Linear)}


def _factors_file(file: Path) -> Path:
    return file.with_suffix(".factors.safetensors")


def _by_name(factors: Factors) -> dict[str, Tensor]:
    return {f"{name}.lora_{key}": pair[index] for name, pair in factors.items() for index, key in enumerate("AB")}
