# pyright: reportUnknownMemberType=false
"""GGUF files as base models: converted once into the cache folder and loaded from there like any other folder.

`<cache>/base/<file name>-<16 hex of its sha256>/` has the dequantised weights in float32, the config, the tokenizer
and, written last, `gguf.json` with the hashes of the GGUF file and the other files. A run's config names the file and
its hash in `model.gguf`, so that its id differs from that of a run on the hub's weights.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import yaml

from experiments import CONFIGS
from experiments.config import Gguf, Model
from experiments.errors import UserError
from experiments.rules import Value
from experiments.runs.received import check_file_names
from experiments.runs.records import file_hash, write_atomically
from experiments.settings import section

Config = dict[str, Any]
MANIFEST = "gguf.json"


def settle_weights(model: Config, cache: Path) -> None:
    """Decide which weights a planned run uses, in the mapping of its `model` section.

    A path that ends in .gguf is that file. A model with a `gguf` section uses it if the Python package with the file is
    installed or the converted file is in the cache. Otherwise, and if `model.path` is a folder, the section is removed
    and the weights are those of `model.path`.
    """
    path = str(model["path"])
    if path.endswith(".gguf"):
        model["gguf"] = {"file": path, "sha256": _sha256(path)}
    elif "gguf" in model:
        given = model["gguf"] and section(Gguf, model["gguf"])
        if given is None or Path(path).is_dir() or not (_file(given) or unchecked(given, cache)):
            del model["gguf"]


def is_packaged(model: Model) -> bool:
    """Return whether the model's file in configs/model names a Python package with its weights."""
    path = CONFIGS / "model" / f"{model.name}.yaml"
    return path.is_file() and "gguf" in yaml.safe_load(path.read_text(encoding="utf-8"))


def converted(gguf: Gguf, cache: Path) -> Path:
    """Return the folder with the converted model of a config's `gguf` section; converted first if not in the cache.

    Raises:
        UserError: the file is missing, has changed since planning, or is not a GGUF file that transformers can read; or
            the folder in the cache has changed since it was written.
    """
    folder = _folder(gguf, cache)
    if folder.is_dir():
        _check(gguf, folder)
        return folder
    file = _file(gguf)
    if file is None:
        raise UserError(f"{gguf.file}: no such file, and no converted copy in {cache}: {_remedy(gguf)}")
    digest = _sha256(str(file))
    if digest != gguf.sha256:
        raise UserError(
            f"{file}: its sha256 begins with {digest[:12]}, but the run was planned with {gguf.sha256[:12]}: "
            f"{_remedy(gguf)}"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".making-"))
    try:
        _convert(file, aside)
        files = {path.name: file_hash(path) for path in sorted(aside.iterdir())}
        write_atomically(aside / MANIFEST, json.dumps({"sha256": digest, "file": file.name, "files": files}, indent=1))
        for path in aside.iterdir():
            path.chmod(0o644)  # safetensors writes 0600 whatever the umask
        aside.chmod(0o755)
        os.rename(aside, folder)
    except OSError:
        if not folder.is_dir():  # else another process converted the same file first
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder


def unchecked(gguf: Gguf, cache: Path) -> Path | None:
    """Return the folder of `converted` if it is in the cache, without reading the weights; else None."""
    folder = _folder(gguf, cache)
    return folder if (folder / MANIFEST).is_file() else None


def _folder(gguf: Gguf, cache: Path) -> Path:
    return cache / "base" / f"{Path(gguf.file).stem}-{gguf.sha256[:16]}"


def _file(gguf: Gguf) -> Path | None:
    """Return the GGUF file: a path, or a file inside an installed Python package, which is not imported."""
    path = Path(gguf.file)
    if gguf.package:
        if path.is_absolute() or ".." in path.parts or not path.parts[0].isidentifier():
            raise UserError(
                f"model.gguf.file={path}: not a file in a Python package"
            )  # looking up a dotted name would import its first part
        spec = importlib.util.find_spec(path.parts[0])
        places = spec.submodule_search_locations if spec else None
        path = Path(places[0], *path.parts[1:]) if places else path
    return path if path.is_file() else None


def _remedy(gguf: Gguf) -> str:
    return f"run `make real-model`, which installs {gguf.package}" if gguf.package else "give model.path=FILE.gguf"


def _sha256(path: str) -> str:
    if not Path(path).is_file():
        raise UserError(f"model.path={path}: no such file: give a GGUF file, a folder or a hub id")
    stat = os.stat(path)
    return _hash(path, stat.st_size, stat.st_mtime_ns)


@lru_cache
def _hash(path: str, size: int, modified: int) -> str:
    return file_hash(Path(path))


def _check(gguf: Gguf, folder: Path) -> None:
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        check_file_names(folder / MANIFEST, manifest["files"])
        files = {name: _hash(str(folder / name), *_state(folder / name)) for name in manifest["files"]}
        whole = manifest["sha256"] == gguf.sha256 and files == manifest["files"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise UserError(f"{folder}: changed since it was converted from {Path(gguf.file).name}: delete this folder")


def _state(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def _convert(file: Path, folder: Path) -> None:
    """Write the model and the tokenizer of a GGUF file as a transformers folder."""
    import torch
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    if importlib.util.find_spec("gguf") is None:
        raise UserError(f"{file}: the package gguf, which reads such files, is not installed: run `make real-model`")
    transformers.utils.logging.disable_progress_bar()
    where: Config = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name, "trust_remote_code": False}
    print(f"converting {file.name}: half a minute per 100 MB, once", flush=True)
    try:
        dequantised: Any = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
        tokenizer = cast(Any, AutoTokenizer.from_pretrained(**where))
    except Exception as error:  # from the reader, from NumPy on a truncated file, from transformers' tables
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{file}: not a complete GGUF file that transformers can read: {reason}") from None
    settings = dequantised.config.to_dict()
    for key in ("quantization_config", "_name_or_path"):  # transformers refuses to save the first
        settings.pop(key, None)
    config = AutoConfig.for_model(settings.pop("model_type"), **_shortest(settings))
    plain = cast(Any, AutoModelForCausalLM.from_config(config, dtype=torch.float32))
    plain.load_state_dict(dequantised.state_dict())
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _shortest(value: Value) -> Any:
    """Restore numbers to their values before GGUF stored them in float32: 1e-5, not 9.999999747378752e-06."""
    import numpy as np

    if isinstance(value, dict):
        return {key: _shortest(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_shortest(part) for part in value]
    return float(str(np.float32(value))) if isinstance(value, float) else value
