"""Checkpoints that are complete or absent: safetensors and JSON in a folder that appears by one rename.

A checkpoint is `checkpoints/step-00000200/` with the trained tensors and the optimizer's state, the random states of
every process, Trainer's own counters and, last, `manifest.json` with the size and hash of each file. Readers use
the newest folder whose files match its manifest and skip others. In a sharded training every process has its own files
for its parts of the tensors, so the same number of processes must resume it.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from experiments.errors import UserError
from experiments.runs.records import file_hash, write_atomically
from experiments.train.sharding import local, sharded_like

if TYPE_CHECKING:
    pass

KEEP = 2  # the newest, and the one before it in case the newest is damaged
MANIFEST = "manifest.json"


def folder(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"step-{step:08d}"


def publish(aside: Path, final: Path, meta: dict[str, Any]) -> None:
    """Turn a written folder into a checkpoint: flush its files, add the manifest, rename it, and delete the oldest."""
    paths = sorted(aside.iterdir())
    files = {path.name: [path.stat().st_size, digest] for path, digest in zip(paths, _hashes(paths), strict=True)}
    for name in files:
        _flush(aside / name)
    write_atomically(aside / MANIFEST, json.dumps({"files": files, **meta}))
    _flush(aside)
    shutil.rmtree(final, ignore_errors=True)
    os.rename(aside, final)
    _flush(final.parent)
    others = sorted(set(final.parent.glob("step-*")) - {final})  # may include damaged or later ones, or of other data
    for old in others[: 1 - KEEP]:
        shutil.rmtree(old, ignore_errors=True)


def newest(checkpoints: Path, meta: dict[str, Any]) -> Path | None:
    """Return the newest complete checkpoint with the same `meta` (hashes of config, base and data)."""
    for candidate in sorted(checkpoints.glob("step-*"), reverse=True):
        try:
            manifest = json.loads((candidate / MANIFEST).read_text(encoding="utf-8"))
            present = {path.name for path in candidate.iterdir() if path.is_file() and not path.is_symlink()}
            whole = present == {MANIFEST, *manifest["files"]}
            whole = whole and all(
                (candidate / name).stat().st_size == size for name, (size, _) in manifest["files"].items()
            )
            found = _hashes([candidate / name for name in manifest["files"]]) if whole else []
            whole = whole and found == [digest for _, digest in manifest["files"].values()]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue
        if whole and all(manifest.get(key) == value for key, value in meta.items()):
            return candidate
    return None


def check_layout(checkpoint: Path, layout: dict[str, Any]) -> None:
    """Raise a UserError unless the checkpoint was written by the same number of processes with the same sharding."""
    manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
    if "processes" not in manifest:  # from an earlier version
        manifest |= {"processes": len(list(checkpoint.glob("random-*.json"))), "sharding": "none"}
    written = {key: manifest[key] for key in layout}
    if written != layout:
        told = [f"{each['processes']} processes with runtime.sharding={each['sharding']}" for each in (written, layout)]
        raise UserError(
            f"{checkpoint} was written by {told[0]}, but these are {told[1]}: plan the run again with "
            f"runtime.sharding={written['sharding']} and start it with {written['processes']} processes, or delete "
            f"{checkpoint.parent} to train from the start"
        )


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def flatten_optimizer(state: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Split an optimizer's state dict into tensors for safetensors (`<parameter>.<key>`) and the rest for JSON.

    Sharded tensors are reduced to this process's part.
    """
    tensors: dict[str, torch.Tensor] = {}
    values: dict[str, dict[str, Any]] = {}
    for index, entries in state["state"].items():
        for key, value in entries.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{index}.{key}"] = local(value.detach()).cpu().contiguous().clone()
            else:
                values.setdefault(str(index), {})[key] = value
    return tensors, {"param_groups": state["param_groups"], "values": values}


def unflatten_optimizer(
    tensors: dict[str, torch.Tensor], rest: dict[str, Any], parameters: Sequence[torch.Tensor]
) -> dict[str, Any]:
    """Rebuild the state dict. `parameters` are the optimizer's, in order: state is sharded like its parameter."""
    state: dict[int, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        index, _, key = name.partition(".")
        parameter = parameters[int(index)]
        of_entries = tensor.shape == local(parameter).shape and tensor.dim() > 0  # else a step count
        state.setdefault(int(index), {})[key] = sharded_like(tensor, parameter) if of_entries else tensor
    for index, entries in rest["values"].items():
        state.setdefault(int(index), {}).update(entries)
    return {"state": state, "param_groups": rest["param_groups"]}


def random_state() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the states of torch's generators (uint8 tensors) and of Python's and NumPy's (JSON)."""
    tensors = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors |= {f"cuda.{index}": state for index, state in enumerate(torch.cuda.get_rng_state_all())}
    version, internal, gauss = random.getstate()
    kind, keys, *position = cast(Any, np.random.get_state(legacy=True))
    return tensors, {"python": [version, list(internal), gauss], "numpy": [kind, keys.tolist(), *position]}


def restore_random_state(tensors: dict[str, torch.Tensor], rest: dict[str, Any]) -> None:
    torch.set_rng_state(tensors["cpu"])
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            if f"cuda.{index}" in tensors:
                torch.cuda.set_rng_state(tensors[f"cuda.{index}"], index)
    version, internal, gauss = rest["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *position = rest["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *position))


def _hashes(paths: Sequence[Path]) -> list[str]:
    """Hash files in parallel: a sharded 7B model and its optimizer have 80 GB."""
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(file_hash, paths))


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
