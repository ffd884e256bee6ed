# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
"""Quantised base models: made once, kept in the cache folder, and loaded by every run that trains on them.

A run makes its base when it finds none; `python -m experiments.quantize` makes it ahead. It goes on after the last
finished layer when it was stopped. The folder's name is the hash of all that decides the weights: the base's
files, the settings, the calibration tokens and the code of diablo/quantize.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from experiments.config import RunConfig
from experiments.errors import UserError
from experiments.runs.received import check_folder
from experiments.runs.records import RunPaths, content_hash, file_hash

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from diablo.quantize import QuantizationSettings

WITH_FACTORS = ("loftq", "apiq")  # whose LoRA belongs to the weights
NOT_THE_WEIGHTS = ("__init__.py", "merging.py")  # files of diablo/quantize that do not decide them


def load_quantized_base(
    config: RunConfig, device: str, trained_on: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The quantised base of a run, made first if the cache does not hold it, and its tokenizer.

    That of a finished run is found by its hash, `trained_on`, whatever became of the code that made it.
    `base.quantization` is its record; `base.start_adapter` the folder of the LoRA that belongs to it, if one does.
    """
    from diablo.quantize import load_quantized
    from experiments.models.full_precision import base_path, load_tokenizer

    folder = (trained_on and _with_hash(config, trained_on)) or make_quantized(config, device)
    try:
        check_folder(folder)
        base: Any = load_quantized(folder, device)
    except ValueError as error:
        raise UserError(f"{error}: delete {folder}") from None
    base.config.use_cache = True
    if config.quantization and config.quantization.method in WITH_FACTORS:
        base.start_adapter = folder / "adapter"
    return base, load_tokenizer(config.model, base_path(config))


def _with_hash(config: RunConfig, digest: str) -> Path | None:
    from diablo.quantize.storage import RECORD, read_record

    folders = sorted(path.parent for path in _home(config).glob(f"*/{RECORD}"))
    for folder in folders:
        try:
            found = (read_record(folder) or {}).get("hash")
        except ValueError:  # of another run's base: those who want it are told
            continue
        if found == digest:
            return folder
    return None


def _home(config: RunConfig) -> Path:
    return Path(config.runtime.cache_dir) / "quantized"


def make_quantized(config: RunConfig, device: str, progress: bool = True) -> Path:
    """The folder of a run's quantised base, complete. Other processes that want the same one wait for it."""
    from diablo.quantize import quantize_model
    from diablo.quantize.storage import read_record
    from experiments.models.full_precision import cannot_load, load_full_precision
    from experiments.models.shapes import with_dtype

    config, settings = with_dtype(config, device), _settings(config)
    try:
        tokens = calibration_tokens(config)
        folder = _folder(config, settings, tokens)
    except OSError as error:
        raise cannot_load(config.model, error) from None
    if read_record(folder) is None:
        with _alone(folder):
            if read_record(folder) is None:  # else another process made it meanwhile
                base, _ = load_full_precision(config)
                try:
                    quantize_model(base, settings, folder, tokens, device, progress)
                except ValueError as error:
                    raise UserError(f"quantization={settings.method} of {config.model.name}: {error}") from None
    return folder


def start_from(model: Any, folder: Path, label: str) -> None:
    """Gives an attached LoRA the factors that belong to its base."""
    import peft
    import safetensors.torch

    try:
        factors = safetensors.torch.load_file(folder / "adapter_model.safetensors")
        result = cast(Any, peft.set_peft_model_state_dict(model, factors))
    except RuntimeError as error:
        raise UserError(f"{label}: {folder} does not fit: {error}") from None
    lacking = [name for name in result.missing_keys if ".lora_" in name]
    if lacking or result.unexpected_keys:
        differ = ", ".join([*lacking, *result.unexpected_keys][:3])
        raise UserError(f"{label}: {folder} has factors for other modules ({differ}): leave target_modules as it is")


def planned_sizes(config: RunConfig, dtype: torch.dtype | None = None) -> dict[str, float]:
    """`diablo.quantize.sizes` of a run's base and `full_bytes` of it in full precision, from shapes alone.

    Args:
        dtype: of what is not quantised; default: that of a run on this machine.
    """
    import torch

    from diablo.quantize import replace_linears, sizes
    from diablo.quantize.settings import NORMAL_FLOAT
    from diablo.quantize.storage import decoder_layers
    from experiments.models.shapes import empty_base, resolve_device, weights_dtype

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
    """A line for each quantised base and what is trained on it: bytes from shapes alone.

    Args:
        counted: runs and the numbers of their trainable parameters.
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
    from diablo.quantize import QuantizationSettings

    given = {key: value for key, value in config.mapping["quantization"].items() if key != "calibration"}
    try:
        return QuantizationSettings(**given)
    except ValueError as error:
        raise UserError(f"quantization: {error}") from None


def calibration_tokens(config: RunConfig) -> Tensor | None:
    """Token ids, `(samples, length)`: stretches of a text or of the run's training rows, one after the other."""
    import pyarrow.compute
    import torch

    from diablo.quantize import calibration_windows
    from experiments.data.prompts import select_rows
    from experiments.data.rows import load_rows
    from experiments.data.tokens import tokenised
    from experiments.models.full_precision import base_path, load_tokenizer

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
    from diablo import quantize
    from diablo.quantize.storage import tensors_hash

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
    """What the full-precision base is: the hashes of its files, or a hub's id and commit."""
    from transformers.utils import hub

    from experiments.models.full_precision import base_path

    path = base_path(config)
    if Path(path).is_dir():
        kept = [file for file in sorted(Path(path).iterdir()) if file.suffix in (".safetensors", ".bin")]
        return {file.name: file_hash(file) for file in [*kept, Path(path) / "config.json"]}
    found = hub.cached_file(str(path), "config.json", revision=config.model.revision)
    assert found is not None
    return [str(path), Path(found).parent.name]


@contextmanager
def _alone(folder: Path) -> Generator[None, None, None]:
    """Hold the folder's lock, as a run's; a process that is at work there is waited for."""
    from experiments.runs.attempts import Heartbeat
    from experiments.runs.lock import locked

    folder.mkdir(parents=True, exist_ok=True)
    home = RunPaths(folder)
    with locked(home, wait_for_holder=True) as lock:
        heart = Heartbeat(home, "quantize")
        heart.start(lock)
        try:
            yield
        finally:
            heart.stop()
