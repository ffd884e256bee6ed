"""Reads and writes the authors' checkpoints (ziyangjoy/DiaBlo, `adapter.chkpt`); `diablo.convert` is the command.

Theirs is a pickled state dict with one `<layer>.block_A` of shape (N, d_in, d_out) per layer and nothing else: no N, no
targets, no base model. It is read with `weights_only=True`, which runs no code from the file.
"""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, get_session
from packaging.version import Version
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from diablo.blocks.config import DIABLO, DiabloConfig
from diablo.blocks.products import BlockShape, block_shape

THEIRS, OURS, PREFIX = ".block_A", ".diablo_blocks", "base_model.model."
SAFE_TORCH = "2.10"  # CVE-2026-24747: in older versions, a file read with `weights_only` could corrupt memory


def from_authors(checkpoint: Path, out: Path, base: str) -> DiabloConfig:
    """Write `adapter_config.json` and `adapter_model.safetensors` into `out`, with blocks in float32.

    Args:
        base: hub id or folder of the base model; only its config is read.

    Raises:
        ValueError: the file is not such a checkpoint, or does not fit the base model; the message names the tensor. Or
            `out` exists already.
    """
    if Version(torch.__version__) < Version(SAFE_TORCH):
        raise ValueError(
            f"reading a pickled file safely needs torch {SAFE_TORCH}, this is {torch.__version__}: update it"
        )
    check_new(out)
    if not checkpoint.is_file():
        raise ValueError(f"{checkpoint}: {_missing(checkpoint)}: give the authors' adapter.chkpt")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch asks for reports of files that it cannot read
            state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # the unpickler may raise anything on arbitrary bytes
        raise ValueError(
            f"{checkpoint}: not a file of tensors only, which is all that is read: {_not_tensors(error)}"
        ) from None
    if not isinstance(state, dict) or not state:
        raise ValueError(f"{checkpoint}: holds a {type(state).__name__}, not a state dict with {THEIRS} tensors")
    model = empty_model(base)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    tensors, asked = {}, {}
    for key, blocks in state.items():
        name = str(key).removeprefix("module.").removesuffix(THEIRS)  # DistributedDataParallel's prefix
        if not str(key).endswith(THEIRS) or not isinstance(blocks, Tensor):
            raise ValueError(f"{checkpoint}: {key} is no {THEIRS} tensor: only diagonal blocks can be converted")
        if name not in layers:
            raise ValueError(f"{checkpoint}: {key}: {base} has no linear layer {name}: give the base it was trained on")
        if name in asked:
            raise ValueError(f"{checkpoint}: {key}: {name} has blocks twice, with and without the prefix module.")
        asked[name] = _num_blocks(layers[name], blocks, f"{checkpoint}: {key}")
        tensors[f"{PREFIX}{name}{OURS}"] = _as_float32(blocks, f"{checkpoint}: {key}")
    targets = sorted({name.rpartition(".")[2] for name in asked})
    indices = _layer_indices(checkpoint, targets, set(asked), layers)
    all_layers = not indices or len(indices) == model.config.num_hidden_layers
    by_target = {target: {n for name, n in asked.items() if name.rpartition(".")[2] == target} for target in targets}
    if any(len(values) > 1 for values in by_target.values()):
        raise ValueError(f"{checkpoint}: layers of one name have different N: {by_target}")
    numbers = {target: values.pop() for target, values in by_target.items()}
    uneven = any(_is_uneven(layers[name], n) for name, n in asked.items())
    config = DiabloConfig(
        num_blocks=numbers.popitem()[1] if len(set(numbers.values())) == 1 else numbers,
        target_modules=targets,
        layers_to_transform=None if all_layers else indices,
        layers_pattern=None if all_layers else "layers",
        allow_uneven=uneven,
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        inference_mode=True,
    )
    config.save_pretrained(str(out))
    save_file(tensors, out / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    return config


def to_authors(adapter: Path, checkpoint: Path) -> int:
    """Write our adapter as the authors' pickled state dict and return the number of layers.

    Raises:
        ValueError: the folder has no DiaBlo adapter, the adapter has other tensors than blocks, or `checkpoint` exists.
    """
    check_new(checkpoint)
    kind = read_config(adapter)["peft_type"]
    if kind != DIABLO:
        raise ValueError(f"{adapter}: an adapter of type {kind}, not DIABLO")
    state, tensors = {}, read_tensors(adapter)
    for key, blocks in tensors.items():
        if not key.endswith(OURS):
            raise ValueError(f"{adapter}: {key}: the authors' format holds diagonal blocks only")
        state[key.removeprefix(PREFIX).removesuffix(OURS) + THEIRS] = blocks
    torch.save(state, checkpoint)
    return len(state)


def one_line(error: Exception) -> str:
    """Return the line that a command prints for an error: of the operating system's, the file and what is wrong."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())


def check_new(out: Path) -> None:
    """Raise a ValueError if a file or folder that is to be written exists already."""
    if out.exists():
        raise ValueError(f"{out} already exists: name a new one, or delete it first")


def read_config(adapter: Path) -> dict[str, Any]:
    """Return an adapter's config as it is in the file: whether its type is registered does not matter here."""
    path = _file_of(adapter, CONFIG_NAME)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        return config if config["peft_type"] else {}
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path}: not the config of a PEFT adapter") from None


def read_tensors(adapter: Path) -> dict[str, Tensor]:
    path = _file_of(adapter, SAFETENSORS_WEIGHTS_NAME)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{adapter}: {path.name} is not a complete safetensors file ({error})") from None


def _file_of(adapter: Path, name: str) -> Path:
    if not adapter.is_dir():
        raise ValueError(f"{adapter}: {_missing(adapter)}: give the folder of an adapter, which has {CONFIG_NAME}")
    if not (adapter / name).is_file():
        raise ValueError(f"{adapter}: has no {name}: give the folder of an adapter, which has one")
    return adapter / name


def _missing(path: Path) -> str:
    return "a folder" if path.is_dir() else "a file" if path.exists() else "does not exist"


def _not_tensors(error: Exception) -> str:
    """Return why a file was not read. Torch's message advises to run code from the file, which nobody should do."""
    text = str(error).strip()
    if found := re.search(r"Unsupported \w+: ?(?:GLOBAL )?([\w.]+)", text):
        return f"it holds {found[1]}"
    return "it holds other objects" if "weights_only" in text else (text or type(error).__name__).splitlines()[0]


def empty_model(base: str) -> PreTrainedModel:
    """Return the base model on the meta device, from its config alone: modules and shapes without weights."""
    try:
        config = AutoConfig.from_pretrained(base, local_files_only=not _reached(base))
    except (OSError, ValueError):
        raise ValueError(
            f"base model {base}: neither a folder with a config.json nor a hub id whose config can be loaded"
        ) from None
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def _as_float32(blocks: Tensor, where: str) -> Tensor:
    ordinary = blocks.layout == torch.strided and not (blocks.is_meta or blocks.is_quantized or blocks.is_nested)
    if not ordinary or not blocks.is_floating_point():
        kind = "without values" if blocks.is_meta else f"of {blocks.dtype} and {blocks.layout}"
        raise ValueError(f"{where} is a tensor {kind}: blocks must be dense floating-point tensors")
    values = blocks.detach().float().contiguous()
    if not values.isfinite().all():
        raise ValueError(f"{where} has values that are NaN or infinite in float32: the training failed")
    return values


def _num_blocks(layer: nn.Linear, blocks: Tensor, where: str) -> int:
    """Return the N that gives blocks of this shape; in an uneven split the tensor may have fewer blocks than N."""
    longest = max(layer.in_features, layer.out_features)
    if blocks.ndim == 3:
        for n in range(max(1, blocks.shape[0]), longest + 1):
            if block_shape(layer.in_features, layer.out_features, n, allow_uneven=True) == BlockShape(*blocks.shape):
                return n
    raise ValueError(
        f"{where} has shape {tuple(blocks.shape)}, which no N gives for a layer {layer.in_features} → "
        f"{layer.out_features}: give the base it was trained on"
    )


def _is_uneven(layer: nn.Linear, n: int) -> bool:
    return bool(layer.in_features % n or layer.out_features % n)


def _layer_indices(checkpoint: Path, targets: list[str], found: set[str], layers: dict[str, nn.Linear]) -> list[int]:
    """Return the decoder layers that have blocks: by default, the authors' script skips layers above 31."""
    indices = {name: int(match[1]) for name in layers if (match := re.search(r"\.layers\.(\d+)\.", name))}
    chosen = {indices[name] for name in found if name in indices}
    for name in layers:
        if name.rpartition(".")[2] in targets and name not in found and indices.get(name, -1) in {*chosen, -1}:
            raise ValueError(f"{checkpoint}: {name} has no blocks, but others of its layer or name do: not convertible")
    return sorted(chosen)


def _reached(base: str) -> bool:
    """Return whether the hub answers for this model; if not, transformers would retry for half a minute."""
    if constants.HF_HUB_OFFLINE or Path(base).is_dir():
        return False
    try:
        url = f"{constants.ENDPOINT}/{base}/resolve/main/config.json"
        return get_session().head(url, timeout=5).status_code < 500
    except Exception:  # each HTTP client raises its own exceptions, and proxies cause others
        return False
