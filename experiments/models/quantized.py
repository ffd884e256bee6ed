# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
"""Quantised base models: made once, cached, and loaded by every run that trains on them.

A run makes its base if it is missing; `python -m experiments.quantize` makes it in advance. An interrupted quantisation
resumes after the last finished layer. The folder's name is the hash of everything that determines the weights: the
base's files, the settings, the calibration tokens and the code in diablo/quantize.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import peft
import pyarrow.compute
import safetensors.torch
import torch
from transformers.utils import hub

from diablo import quantize
from diablo.quantize import (
    QuantizationSettings,
    calibration_windows,
    load_quantized,
    quantize_model,
    replace_linears,
    sizes,
)
from diablo.quantize.settings import NORMAL_FLOAT
from diablo.quantize.storage import RECORD, decoder_layers, read_record, tensors_hash
from experiments.config import RunConfig
from experiments.data.prompts import select_rows
from experiments.data.rows import load_rows
from experiments.data.tokens import tokenised
from experiments.errors import UserError
from experiments.models.full_precision import base_path, cannot_load, load_full_precision, load_tokenizer
from experiments.models.shapes import empty_base, resolve_device, weights_dtype, with_dtype
from experiments.runs.attempts import Heartbeat
from experiments.runs.lock import locked
from experiments.runs.received import check_folder
from experiments.runs.records import RunPaths, content_hash, file_hash

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


NOT_THE_WEIGHTS = ("__init__.py", "merging.py")  # files in diablo/quantize that do not affect the weights


def load_quantized_base(
    config: RunConfig, device: str, trained_on: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the quantised base of a run, made first if it is not in the cache, and its tokenizer.

    A finished run's base is found by its hash, `trained_on`, even if the code that made it has changed since.
    `base.quantization` is its record; `base.start_adapter` is the folder of its LoRA, if it has one.
    """
    folder = (trained_on and _with_hash(config, trained_on)) or make_quantized(config, device)
    try:
        check_folder(folder)
        base: Any = load_quantized(folder, device)
    except ValueError as error:
        raise UserError(f"{error}: delete {folder}") from None
    base.config.use_cache = True
    if config.quantization and config.quantization.with_factors:
        base.start_adapter = folder / "adapter"
    return base, load_tokenizer(config.model, base_path(config))


def _with_hash(config: RunConfig, digest: str) -> Path | None:
    folders = sorted(path.parent for path in _home(config).glob(f"*/{RECORD}"))
    for folder in folders:
        try:
            found = (read_record(folder) or {}).get("hash")
        except ValueError:  # of another run's base; whoever loads that one gets the error
            continue
        if found == digest:
            return folder
    return None


def _home(config: RunConfig) -> Path:
    return Path(config.runtime.cache_dir) / "quantized"


def make_quantized(config: RunConfig, device: str, progress: bool = True) -> Path:
    """Return the complete folder of a run's quantised base. Other processes that need the same one wait for it."""
    config, settings = with_dtype(config, device), _settings(config)
    try:
        tokens = calibration_tokens(config)
        folder = _folder(config, settings, tokens)
    except OSError as error:
        raise cannot_load(config.model, error) from None
    if read_record(folder) is None:
        with _alone(folder):
            if read_record(folder) is None:  # else another process has made it meanwhile
                base, _ = load_full_precision(config)
                try:
                    quantize_model(base, settings, folder, tokens, device, progress)
                except ValueError as error:
                    raise UserError(f"quantization={settings.method} of {config.model.name}: {error}") from None
    return folder


def start_from(model: Any, folder: Path, label: str) -> None:
    """Load into an attached LoRA the factors made with its base."""
    try:
        factors = safetensors.torch.load_file(folder / "adapter_model.safetensors")
        result = cast(Any, peft.set_peft_model_state_dict(model, factors))
    except RuntimeError as error:
        raise UserError(f"{label}: {folder} does not fit: {error}") from None
    lacking = [name for name in result.missing_keys if ".lora_" in name]
    if lacking or result.unexpected_keys:
        differ = ", ".join([*lacking, *result.unexpected_keys][:3])
        raise UserError(f"{label}: {folder} has factors for other modules ({differ}): do not change target_modules")


def planned_sizes(config: RunConfig, dtype: torch.dtype | None = None) -> dict[str, float]:
    """Return `diablo.quantize.sizes` of a run's base and its `full_bytes` in full precision, computed from shapes.

    Args:
        dtype: dtype of the tensors that are not quantised; default: that of a run on this machine.
    """
    settings = _settings(config)
    base: Any = empty_base(config.model.architecture)
    base = base.to(dtype or weights_dtype(config.model, str(resolve_device(config.runtime.device))))
    full_bytes = sizes(base)["other_bytes"]
    prefix, layers = decoder_layers(base)
    modules = cast("Iterator[tuple[str, torch.nn.Module]]", layers.named_modules())
    names = [f"{prefix}.{name}" for name, module in modules if isinstance(module, torch.nn.Linear)]
    try:
        replace_linears(base, names, settings.bits, settings.group_size, settings.method in NORMAL_FLOAT)
    except ValueError as error:
        raise UserError(f"quantization of {config.model.name}: {error}") from None
    return {**sizes(base), "full_bytes": full_bytes}


def print_sizes(counted: Sequence[tuple[RunConfig, int]]) -> None:
    """Print a line for each quantised base and its training: bytes, computed from shapes.

    Args:
        counted: runs with their numbers of trainable parameters.
    """
    known = {
        content_hash([config.mapping[key] for key in ("model", "method", "quantization")]): (config, trainable)
        for config, trainable in counted
        if config.quantization is not None
    }
    for config, trainable in known.values():
        found = planned_sizes(config)
        base = found["quantized_bytes"] + found["other_bytes"]
        print(
            f"{config.model.name}, {config.method.label}: base {base:,.0f} bytes "
            f"({found['bits_per_weight']:.3f} bits per quantised weight; {found['full_bytes']:,.0f} before), "
            f"adapter {4 * trainable:,}, gradients and AdamW's state {12 * trainable:,}"
        )


def _settings(config: RunConfig) -> QuantizationSettings:
    given = {key: value for key, value in config.mapping["quantization"].items() if key != "calibration"}
    try:
        return QuantizationSettings(**given)
    except ValueError as error:
        raise UserError(f"quantization: {error}") from None


def calibration_tokens(config: RunConfig) -> Tensor | None:
    """Return token ids, `(samples, length)`: windows of a text, or of the run's concatenated training rows."""
    wanted = config.quantization and config.quantization.calibration
    if wanted is None:
        return None
    tokenizer = load_tokenizer(config.model, base_path(config))
    if wanted.text is not None:
        if not Path(wanted.text).is_file():
            raise UserError(f"quantization.calibration.text={wanted.text}: no such file")
        tokens = torch.tensor(tokenizer(Path(wanted.text).read_text(encoding="utf-8"), verbose=False)["input_ids"])
    else:
        rows = load_rows(config.task.data, "train", config.runtime.data_root)
        cache = Path(config.runtime.cache_dir)
        examples = tokenised(config.protocol, tokenizer, select_rows(config.protocol, rows), cache)
        flat = cast(Any, pyarrow.compute).call_function("list_flatten", [examples.table["input_ids"]])
        tokens = torch.tensor(flat.to_numpy(), dtype=torch.int64)
    try:
        return calibration_windows(tokens, wanted.samples, wanted.length, wanted.seed)
    except ValueError as error:
        raise UserError(f"quantization.calibration: {error}, or fewer quantization.calibration.length") from None


def _folder(config: RunConfig, settings: QuantizationSettings, tokens: Tensor | None) -> Path:
    model = config.model
    code = {path.name: file_hash(path) for path in sorted(Path(quantize.__file__).parent.glob("*.py"))}
    decides = [
        _files(config),
        model.dtype,
        asdict(settings),
        None if tokens is None else tensors_hash({"tokens": tokens}),
        {name: digest for name, digest in code.items() if name not in NOT_THE_WEIGHTS},
    ]
    name = f"{model.name}-{settings.method}{settings.bits}-{content_hash(decides)[:16]}"
    return _home(config) / name


def _files(config: RunConfig) -> Any:
    """Return what identifies the full-precision base: the hashes of its files, or a hub id and commit."""
    path = base_path(config)
    if Path(path).is_dir():
        kept = [file for file in sorted(Path(path).iterdir()) if file.suffix in (".safetensors", ".bin")]
        return {file.name: file_hash(file) for file in [*kept, Path(path) / "config.json"]}
    found = hub.cached_file(str(path), "config.json", revision=config.model.revision)
    assert found is not None
    return [str(path), Path(found).parent.name]


@contextmanager
def _alone(folder: Path) -> Generator[None, None, None]:
    """Hold the folder's lock, like that of a run; wait for a process that is working there."""
    folder.mkdir(parents=True, exist_ok=True)
    home = RunPaths(folder)
    with locked(home, wait_for_holder=True) as lock:
        heart = Heartbeat(home, "quantize")
        heart.start(lock)
        try:
            yield
        finally:
            heart.stop()
