# pyright: reportUnknownMemberType=false
"""A base model without its weights: config, shapes, dtype and device; and the hash that identifies weights."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from experiments.config import Model, RunConfig
from experiments.errors import UserError, nearest
from experiments.settings import with_values

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

# Fields that the configs of these models have; a misspelt one is none of them.
USUAL_TYPES = {"llama", "mistral", "qwen2", "qwen3", "gemma3_text"}
USUAL = {
    *("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "max_position_embeddings", "tie_word_embeddings"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
}


def resolve_device(name: str) -> torch.device:
    """Return the device for `runtime.device`: `auto` is this process's GPU if there is one, else the CPU."""
    import torch

    if name == "auto":
        name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    elif name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"runtime.device={name}: no CUDA device is visible to PyTorch here; use cpu or auto")
    return torch.device(name)


def weights_dtype(model: Model, device: str) -> torch.dtype:
    """Return the dtype for `model.dtype`; `auto` is bfloat16 on a GPU that supports it, and float32 elsewhere.

    A CPU without bfloat16 instructions is 25 times as slow with it (SmolLM2-135M, forward and backward pass).
    """
    import torch

    name = model.dtype
    if name == "auto":
        on_gpu = device.startswith("cuda")
        return torch.bfloat16 if on_gpu and torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    return getattr(torch, name)


def with_dtype(config: RunConfig, device: str) -> RunConfig:
    """Return the config with `auto` replaced by the name of the dtype on this device."""
    name = str(weights_dtype(config.model, device)).removeprefix("torch.")
    return with_values(config, {"model.dtype": name})


def check_architecture(architecture: Mapping[str, Any]) -> None:
    """Raise a UserError if a `model.architecture` section is not one, as far as this is quickly known.

    Importing transformers takes seconds, so the usual fields of the usual models are not looked up here;
    `build_config` looks up all.
    """
    if not architecture.get("model_type"):
        raise UserError("model.architecture.model_type is missing: name transformers' model type, e.g. llama")
    if architecture["model_type"] not in USUAL_TYPES or set(architecture) - USUAL:
        _check_fields(architecture)
    heads, groups = architecture.get("num_attention_heads"), architecture.get("num_key_value_heads")
    if not isinstance(heads, int):  # also n_head and the like
        return
    if groups and heads % groups:
        raise UserError(
            f"model.architecture.num_key_value_heads={groups}: it does not divide num_attention_heads={heads}"
        )
    hidden = architecture.get("hidden_size")
    if isinstance(hidden, int) and hidden % heads and not architecture.get("head_dim"):
        raise UserError(
            f"model.architecture.num_attention_heads={heads}: it does not divide hidden_size={hidden}: give a divisor, "
            f"or head_dim if the model has one of its own"
        )


def _check_fields(architecture: Mapping[str, Any]) -> None:
    """Refuse fields that the transformers config class of this `model_type` does not have: it takes any keyword."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    name = architecture["model_type"]
    if name not in CONFIG_MAPPING:
        raise UserError(
            f"model.architecture.model_type={name}: no model type of transformers: {nearest(name, CONFIG_MAPPING)}"
        )
    kind: Any = CONFIG_MAPPING[name]
    known = {field.name for field in dataclasses.fields(kind)} | set(kind.attribute_map) | {"model_type", "torch_dtype"}
    if "rope_parameters" in known:
        known |= {"rope_theta", "rope_scaling", "partial_rotary_factor"}  # their names in older files, still read
    for key in architecture:
        if key not in known:
            raise UserError(f"model.architecture.{key}: {kind.__name__} has no such field: {nearest(key, known)}")


def build_config(architecture: Mapping[str, Any]) -> PretrainedConfig:
    """Return transformers' config for a `model.architecture` section."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    check_architecture(architecture)
    _check_fields(architecture)
    settings = dict(architecture)
    try:
        return AutoConfig.for_model(settings.pop("model_type"), **settings)
    except (ValueError, TypeError, KeyError, ZeroDivisionError, StrictDataclassError) as error:
        raise UserError(f"model.architecture: {' '.join(str(error).split())}") from None


def empty_base(architecture: Mapping[str, Any]) -> PreTrainedModel:
    """Return the model's structure on the meta device: shapes and names, no weights."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config = build_config(architecture)
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UserError(
            f"model.architecture.model_type={config.model_type}: transformers has no causal language model of this "
            f"type: only those can be trained"
        )
    with torch.device("meta"):
        return cast("PreTrainedModel", AutoModelForCausalLM.from_config(config))


def context_length(config: PretrainedConfig) -> int:
    """Return the most tokens a model takes. Multimodal configs nest this number, and older ones use other names."""
    settings = config.get_text_config(decoder=True)
    for name in ("max_position_embeddings", "n_positions", "seq_length", "max_seq_len"):
        length = getattr(settings, name, None)
        if isinstance(length, int) and length > 0:
            return length
    raise UserError(
        f"model of type {config.model_type}: its config has no length (max_position_embeddings), so prompts "
        f"cannot be fitted: add it to config.json in a local copy and give model.path=FOLDER"
    )


def count_parameters(base: PreTrainedModel) -> int:
    """Count parameters as before quantisation: PyTorch does not count packed weights as parameters."""
    record: Any = getattr(base, "quantization", None)
    return base.num_parameters() + (record["quantized_weights"] if record else 0)


def weights_hash(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return the sha256 of names, shapes, dtypes and bytes. About a gigabyte per second."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
