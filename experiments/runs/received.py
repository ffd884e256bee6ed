"""Checks run directories that come from elsewhere. Standard library only.

Reading a checked directory runs no code, does not leave its folder and never blocks: links out of it, pipes and names
that contain a path are refused, and so is a config that names code outside `diablo` and `peft`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, cast

from experiments.errors import UserError
from experiments.rules import Value

CODE = re.compile(r"(diablo|peft)(\.[^\W\d]\w*)+")
FILE_NAME = re.compile(r"[\w-][\w.-]*")
MOST_LEVELS = 100
MOST_ENTRIES = 50_000  # in a config: YAML's references can expand a few lines to billions
# Fields of PEFT's config classes that name modules to import, or other files and models to load.
FOREIGN = (
    *("megatron_config", "megatron_core", "tokenizer_kwargs", "prompt_tuning_init_state_dict_path"),
    *("cache_file", "covariance_file", "adapters", "shadow_model"),
)


def check_folder(root: Path) -> None:
    """Raise a UserError if a folder contains anything but plain files and folders, or a link out of it."""
    home, folders = root.resolve(), [str(root)]
    while folders:
        try:
            entries = list(os.scandir(folders.pop()))
        except FileNotFoundError:  # another process may be working there
            continue
        for entry in entries:
            if entry.is_symlink():
                if not Path(os.path.realpath(entry.path)).is_relative_to(home):
                    raise UserError(f"{entry.path}: a link out of {root}: put the file itself there")
            elif entry.is_dir(follow_symlinks=False):
                if entry.name != "wandb":  # wandb makes its own links, and its folder is never read here
                    folders.append(entry.path)
            elif not entry.is_file(follow_symlinks=False) and os.path.lexists(entry.path):
                raise UserError(f"{entry.path}: neither a file nor a folder: remove it")


def check_depth(text: str, parse: Callable[[], Iterable[Any]]) -> None:
    """Raise a UserError if YAML is nested so deeply that reading it would crash the process.

    Args:
        parse: returns its events; only called if the text could be nested that deeply.
    """
    if len(re.findall(r"[\[{]|[-?]\s", text)) < MOST_LEVELS:
        return
    depth = 0
    for event in parse():
        name = type(event).__name__
        depth += name.endswith("StartEvent") - name.endswith("EndEvent")
        if depth > MOST_LEVELS:
            raise UserError(f"nested more than {MOST_LEVELS} times: not a run's config")


def check_config(config: Value) -> None:
    """Raise a UserError if a config is too large, or names code that does not belong to a method."""
    left: list[tuple[str, Any]] = [("", config)]
    value: Value
    for count in range(MOST_ENTRIES):
        if not left:
            return
        key, value = left.pop()
        if key == "_target_":
            check_target("_target_", value)
        if count + len(left) > MOST_ENTRIES:
            break
        if isinstance(value, dict):
            left += value.items()
        elif isinstance(value, list):
            left += [("", part) for part in value]
    raise UserError(f"more than {MOST_ENTRIES:,} entries: not a run's config")


def check_target(where: str, target: Any) -> None:
    """Raise a UserError unless a name is in `diablo` or `peft`. Nothing is imported."""
    if not isinstance(target, str) or not CODE.fullmatch(target):
        raise UserError(f"{where}={target}: only names in diablo and peft, e.g. diablo.DiabloConfig, may be imported")


def check_fields(where: str, fields: dict[str, Any]) -> None:
    """Raise a UserError if an adapter's settings name other modules or files."""
    left = [fields]
    value: Value
    while left:
        for key, value in left.pop().items():
            if key in FOREIGN and value and not (key == "megatron_core" and value == "megatron.core"):
                raise UserError(f"{where}.{key}={value!r:.60}: names code or files outside the adapter: leave it out")
            if isinstance(value, dict):
                left.append(value)


def check_file_names(where: Path, names: Any) -> None:
    """Raise a UserError unless all are names of files in one folder."""
    for name in names:
        if not isinstance(name, str) or not FILE_NAME.fullmatch(name):
            raise UserError(f"{where}: {name!r:.60} is not the name of a file next to it")


def read_settings(path: Path) -> dict[str, Any]:
    """Return the content of a config.yaml under today's names, without checking it against its run id."""
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        text = path.read_text(encoding="utf-8")
        check_depth(text, lambda: cast(Any, yaml).parse(text, loader))
        config: Value = yaml.load(text, loader)
        check_config(config)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: not a run's config ({error}): plan the run again") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: not a run's config: plan the run again")
    method: Value = config.get("method")
    if isinstance(method, dict) and "first" in method:  # its name in earlier configs
        config["method"] = {"prerequisite" if key == "first" else key: value for key, value in method.items()}
    return config


def has_type(value: Value, kind: str) -> bool:
    """Return whether a JSON value has the type of a record's field, written as in experiments/runs/records.py."""
    if kind.endswith(" | None"):
        return value is None or has_type(value, kind.removesuffix(" | None"))
    if kind.startswith("list["):
        types = _types(kind[5:-1])
        return isinstance(value, list) and all(type(part) in types for part in value)
    if kind.startswith("dict["):
        types = _types(kind[5:-1].partition(", ")[2])
        return isinstance(value, dict) and all(type(part) in types for part in value.values())
    return type(value) in _types(kind)


def _types(kind: str) -> tuple[type, ...]:
    known: dict[str, tuple[type, ...]] = {"int": (int,), "float": (float, int), "str": (str,), "bool": (bool,)}
    return known.get(kind, (dict, list, str, int, float, bool, type(None)))
