"""Loads the base model of a run, quantised or not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from experiments.config import RunConfig
from experiments.errors import UserError
from experiments.models.full_precision import load_full_precision
from experiments.models.quantized import load_quantized_base
from experiments.models.shapes import resolve_device, weights_hash
from experiments.runs.records import RunPaths, TrainRecord
from experiments.settings import stored, with_values

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_base(
    config: RunConfig, device: str = "cpu", trained: TrainRecord | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the base model of a run, in evaluation mode, and its tokenizer.

    Full fine-tuning gets at least float32 weights, whatever the config's dtype: they are their own master copy.

    Args:
        trained: the record of a finished run, whose base is loaded as it was: in the same dtype, and a quantised one by
            its hash.
    """
    if trained is not None and trained.dtype is not None:
        config = with_values(config, {"model.dtype": stored("model.dtype", trained.dtype)})
    if config.quantization is not None:
        return load_quantized_base(config, device, trained and trained.base_hash)
    return load_full_precision(config, device)


def load_checked_base(
    config: RunConfig, run: RunPaths, trained: TrainRecord
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the base that the run was trained on, and its tokenizer. UserError for another base."""
    base, tokenizer = load_base(config, str(resolve_device(config.runtime.device)), trained)
    found = base_hash(base)
    if found != trained.base_hash:
        same = (
            "runtime.cache_dir with its quantised base"
            if config.quantization is not None
            else "weights (model.path, model.revision)"
        )
        raise UserError(
            f"{run.root.name} was trained on a base model with hash {trained.base_hash[:12]}, the loaded one has "
            f"{found[:12]}: give the same {same} or train again"
        )
    return base, tokenizer


def base_hash(base: PreTrainedModel) -> str:
    """Return the id of a base's weights in records: their hash; for a quantised base, that of its folder's content."""
    record: Any = getattr(base, "quantization", None)
    return record["hash"] if record else weights_hash(base.state_dict())
