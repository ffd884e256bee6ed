"""A quantised base model as a folder.

    config.json              transformers' config of the model
    settings.json            quantisation settings, and the hashes of the base and the calibration tokens; written first
    layers/00000.safetensors …  one decoder layer each, its linear layers packed
    layers/00000.json …      time and errors of quantising that layer
    rest.safetensors         embeddings, last norm, output layer
    quantization.json        every packed layer's grid, bits per weight, the hash of each file and of all; written last
    adapter/                 with LoftQ and ApiQ: the LoRA for these weights, in PEFT's format

Every file is written under a temporary name and renamed, so an existing layer file is complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from diablo.quantize.quantized_linear import QuantizedLinear, replace_linears

RECORD, SETTINGS, REST = "quantization.json", "settings.json", "rest.safetensors"
LAYER = re.compile(r"layers/\d{5}\.safetensors")


def decoder_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Return the name and the list of the decoder layers of a causal language model.

    Raises:
        ValueError: they are not where Llama-like models have them.
    """
    decoder: Any = model.get_decoder()
    layers = getattr(decoder, "layers", None)
    for name, module in model.named_modules():
        if module is layers and isinstance(module, nn.ModuleList):
            return name, module
    raise ValueError(f"{type(model).__name__} has no decoder layers where Llama has them: it cannot be quantised")


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


def sizes(model: nn.Module) -> dict[str, float]:
    """Return bytes and bits per weight of a quantised model; only shapes are read, so it may be on the meta device.

    Returns:
        `quantized_bytes` of the packed layers with scales and zero points, `other_bytes` of all other tensors (each
        counted once), `quantized_weights`, and `bits_per_weight` of the packed layers.
    """
    layers = quantized_layers(model).values()
    packed = {id(buffer): buffer.nbytes for layer in layers for buffer in layer.buffers()}
    everything = {id(tensor): tensor.nbytes for tensor in (*model.parameters(), *model.buffers())}
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    total = sum(packed.values())
    return {
        "quantized_bytes": total,
        "other_bytes": sum(everything.values()) - total,
        "quantized_weights": weights,
        "bits_per_weight": 8 * total / weights if weights else 0.0,
    }


def save_quantized(model: PreTrainedModel, folder: Path, extra: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Write a quantised model.

    Args:
        extra: additional entries for the record.

    Returns:
        The record in `quantization.json`.

    Raises:
        ValueError: no layer of the model is quantised.
    """
    if not quantized_layers(model):
        raise ValueError("no layer of the model is quantised: quantise it first")
    for index, layer in enumerate(decoder_layers(model)[1]):
        write_tensors(layer_file(folder, index), layer.state_dict())
    return finish(model, folder, extra or {})


def finish(model: PreTrainedModel, folder: Path, extra: Mapping[str, Any]) -> dict[str, Any]:
    """Complete a folder that already holds all decoder layers."""
    prefix, layers = decoder_layers(model)
    rest = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(f"{prefix}.")}
    for name in getattr(model, "_tied_weights_keys", None) or ():
        if model.config.tie_word_embeddings:
            rest.pop(name, None)  # the same tensor as the embedding
    write_tensors(folder / REST, rest)
    write_json(folder / "config.json", model.config.to_dict())
    files = [REST, *(str(layer_file(folder, index).relative_to(folder)) for index in range(len(layers)))]
    linears = {
        name: {"bits": layer.bits, "group_size": layer.group_size, "normal_float": layer.normal_float}
        for name, layer in quantized_layers(model).items()
    }
    content = {"files": {file: _file_hash(folder / file) for file in files}, "linears": linears}
    record = {**extra, **sizes(model), **content, "hash": _hash(content)}
    write_json(folder / RECORD, record)
    return record


def read_record(folder: Path) -> dict[str, Any] | None:
    """Return the record of a complete folder; None if there is none.

    Raises:
        ValueError: the file is not such a record.
    """
    path = folder / RECORD
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        _check_record(record)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: no record of a quantised model ({error})") from None
    return record


def _check_record(record: Any) -> None:
    """Check that only files of the folder are named and that grids are complete: the folder may be untrusted."""
    if not isinstance(record["hash"], str):
        raise ValueError("hash is not a string")
    for file in record["files"]:
        if file != REST and not LAYER.fullmatch(file):
            raise ValueError(f"{file!r:.60} is not a file of such a folder")
    for name, grid in record["linears"].items():
        if set(grid) != {"bits", "group_size", "normal_float"} or not all(isinstance(grid[key], int) for key in grid):
            raise ValueError(f"{name} lacks a grid of bits, group_size and normal_float")


def load_quantized(folder: Path, device: torch.device | str = "cpu") -> PreTrainedModel:
    """Load the quantised model in a folder, in evaluation mode, without ever creating a full-precision copy.

    `model.quantization` is its record, whose `hash` identifies the base in runs trained on it.

    Raises:
        ValueError: the folder is incomplete, or a file has changed since it was written.
    """
    record = read_record(folder)
    if record is None:
        raise ValueError(f"{folder}: no {RECORD}: not a quantised model, or unfinished")
    content = {"files": record["files"], "linears": record["linears"]}
    if record["hash"] != _hash(content):
        raise ValueError(f"{folder / RECORD}: changed since it was written: quantise the base again")
    for file, expected in record["files"].items():
        if not (folder / file).is_file() or _file_hash(folder / file) != expected:
            raise ValueError(f"{folder / file}: missing or changed since it was written: quantise the base again")
    model = empty_model(folder)
    layers = [str(layer_file(folder, index).relative_to(folder)) for index in range(len(decoder_layers(model)[1]))]
    if set(record["files"]) != {REST, *layers}:
        raise ValueError(f"{folder / RECORD}: has {len(record['files']) - 1} layers, config.json {len(layers)}")
    try:
        for name, grid in record["linears"].items():
            replace_linears(model, [name], **grid)
        for index, layer in enumerate(decoder_layers(model)[1]):
            layer.load_state_dict(load_file(layer_file(folder, index), device=str(device)), assign=True)
    except (RuntimeError, AttributeError, SafetensorError) as error:
        raise ValueError(f"{folder}: its layers do not fit its config ({error})") from None
    rest = load_file(folder / REST, device=str(device))
    _, unknown = model.load_state_dict(rest, strict=False, assign=True)
    model.tie_weights()
    missing = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    if missing or unknown:
        raise ValueError(f"{folder / REST}: lacks {missing or 'nothing'}, has unknown {unknown or 'nothing'}")
    model = model.to(torch.device(device)).eval().requires_grad_(False)
    model.quantization = record
    return model


def empty_model(folder: Path) -> Any:
    """Create the model of a folder's config: parameters on the meta device, computed buffers (rotary) real."""
    from accelerate import init_empty_weights

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if "/" in str(getattr(config, "_attn_implementation", None)):
        raise ValueError(f"{folder}: its config loads attention code from the hub: quantise the base again")
    with init_empty_weights(include_buffers=False):
        return AutoModelForCausalLM.from_config(config, dtype=config.dtype or torch.float32, trust_remote_code=False)


def layer_file(folder: Path, index: int) -> Path:
    return folder / "layers" / f"{index:05d}.safetensors"


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, aside)
    aside.chmod(0o644)  # safetensors writes 0600 whatever the umask
    os.replace(aside, path)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(aside, path)


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """Return the sha256 of names, shapes, dtypes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
