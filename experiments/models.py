"""Base models: from the hub, from a folder, made here (`tiny`), or on the meta device for counting."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from experiments.errors import UserError
from experiments.records import RunPaths, TrainRecord

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

Config = dict[str, Any]


def leave_out_sklearn() -> None:
    """For a command's start: it is not there for this process.

    transformers imports it where it is installed, and pandas and scipy with it, for a way of generating that is not
    used here: one of the six seconds that a start takes.
    """
    sys.modules.setdefault("sklearn", cast(Any, None))


def load_base(
    config: Config, device: str = "cpu", trained_on: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The base model of a run, in evaluation mode, and its tokenizer.

    Full fine-tuning gets float32 weights whatever the config's dtype: they are their own master copy.

    Args:
        trained_on: the hash of the base that a finished run names; a quantised one is looked for by it.
    """
    if "quantization" in config:
        from experiments.quantize import load_quantized_base

        return load_quantized_base(config, device, trained_on)
    return load_full_precision(config, device)


def load_checked_base(
    config: Config, run: RunPaths, trained: TrainRecord
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The base that the run was trained on, and its tokenizer. Another base is refused."""
    base, tokenizer = load_base(config, str(resolve_device(config["runtime"]["device"])), trained.base_hash)
    found = base_hash(base)
    if found != trained.base_hash:
        same = (
            "runtime.cache_dir with its quantised base"
            if "quantization" in config
            else "weights (model.path, model.revision)"
        )
        raise UserError(
            f"{run.root.name} was trained on a base model with hash {trained.base_hash[:12]}, the one at hand has "
            f"{found[:12]}: give the same {same} or train again"
        )
    return base, tokenizer


def load_full_precision(config: Config, device: str = "cpu") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The base model of a run before any quantising."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM

    model, path = config["model"], base_path(config)
    transformers.utils.logging.disable_progress_bar()  # a bar for loading weights on top of ours
    dtype = torch.float32 if config["method"]["trains"] == "all" else getattr(torch, model["dtype"])
    try:
        tokenizer = load_tokenizer(model, path)
        base: Any = AutoModelForCausalLM.from_pretrained(path, revision=model["revision"], dtype=dtype)
    except OSError as error:
        raise cannot_load(model, error) from None
    _check_architecture(model, base)
    base.config.use_cache = True
    return base.to(device).eval(), tokenizer


def cannot_load(model: Config, error: OSError) -> UserError:
    return UserError(
        f"model {model['name']}: cannot load {model['path']} ({str(error).splitlines()[0]}): give a local folder with "
        f"model.path=…, or a hub id and access to it (huggingface-cli login)"
    )


def base_path(config: Config) -> str | Path:
    """Where the base model is: a folder, which is made here if the model is, or a hub id."""
    model = config["model"]
    if model["pretraining"] is None:
        return model["path"]
    from experiments.tiny import make_base

    return make_base(model, Path(config["runtime"]["cache_dir"]))


def load_tokenizer(model: Config, path: str | Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path, revision=model["revision"])
    if tokenizer.pad_token_id is None:
        # Padding is masked in training and in generation, so any token serves; a new one would resize the embedding.
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


def base_hash(base: PreTrainedModel) -> str:
    """What names a base's weights in records: their hash; of a quantised base that of its folder's content."""
    record: Any = getattr(base, "quantization", None)
    return record["hash"] if record else weights_hash(base.state_dict())


def count_parameters(base: PreTrainedModel) -> int:
    """As many as before quantising: packed weights are no parameters to PyTorch."""
    record: Any = getattr(base, "quantization", None)
    return base.num_parameters() + (record["quantized_weights"] if record else 0)


def empty_base(architecture: Config) -> PreTrainedModel:
    """The model's structure on the meta device: shapes and names, no weights."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(build_config(architecture))


def build_config(architecture: Config) -> PretrainedConfig:
    """transformers' config of a `model.architecture` section."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    settings = dict(architecture)
    try:
        return AutoConfig.for_model(settings.pop("model_type"), **settings)
    except (ValueError, KeyError, StrictDataclassError) as error:
        raise UserError(f"model.architecture: {error}") from None


def weights_hash(tensors: Mapping[str, torch.Tensor]) -> str:
    """sha256 over names, shapes, dtypes and bytes. About a gigabyte per second."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _check_architecture(model: Config, base: PreTrainedModel) -> None:
    """What was planned and counted from the config must be what was loaded."""
    for field, planned in model["architecture"].items():
        loaded = getattr(base.config, field, None)
        if loaded != planned:
            raise UserError(
                f"model {model['name']}: the loaded weights have {field}={loaded}, the config says {planned}: "
                f"correct model.path or model.architecture.{field}"
            )


def resolve_device(name: str) -> torch.device:
    """The device of `runtime.device`: `auto` is this process's GPU if there is one, else the CPU."""
    import os

    import torch

    if name == "auto":
        name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    elif name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"runtime.device={name}: no CUDA device is visible to PyTorch here; use cpu or auto")
    return torch.device(name)
