"""Experiment files, `configs/experiment/<name>.yaml`: the runs of one table or figure as a list of grids."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import yaml

from experiments import CONFIGS
from experiments.errors import UserError, nearest
from experiments.rules import Value

GROUPS = ("model", "method", "quantization", "task", "protocol")
PAPER = "cells=paper"  # next to experiment=…: only the paper's own cells
PARTS = {  # of an experiment file, with their types
    **{"title": str, "common": str, "learning_rate_by": str, "reference": str},
    **{"grids": list, "paper": list, "notes": list},
}
Config = dict[str, Any]


def options(group: str) -> list[str]:
    """Return the names in a group: its files. Those of a protocol are `<family>/<protocol>`."""
    folder = CONFIGS / group
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))


def expand_experiment(arguments: Sequence[str]) -> list[list[str]]:
    """Return the grids of `experiment=…`, each followed by the other arguments; without it, only the arguments."""
    name, others = split_experiment(arguments)
    experiment = read_experiment(name) if name else {}
    grids = [*experiment.get("paper", []), *experiment.get("grids", [])]
    if PAPER in others:
        others = [argument for argument in others if argument != PAPER]
        grids = experiment.get("paper")
        if not grids:
            raise UserError(f"--paper ({PAPER}): experiment {name or '…'} has no cells of the paper, no `paper`")
    if not name:
        return [others]
    common = _split(name, experiment.get("common", ""))
    return [[*common, *_split(name, grid), *others] for grid in grids]


def _split(experiment: str, line: str) -> list[str]:
    try:
        return shlex.split(line)
    except ValueError as error:
        raise UserError(f"experiment {experiment}: {line!r} is not a line of key=value ({error})") from None


def split_experiment(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """Return the name in `experiment=…`, if given, and the other arguments."""
    names = [argument.removeprefix("experiment=") for argument in arguments if argument.startswith("experiment=")]
    if len(names) > 1:
        raise UserError(f"experiment is given {len(names)} times ({', '.join(names)}): plan one at a time")
    return next(iter(names), None), [argument for argument in arguments if not argument.startswith("experiment=")]


def read_experiment(name: str) -> Config:
    """Return the content of `configs/experiment/<name>.yaml`, or of the file `name` if that is a path ending in .yaml.

    `title`, `common` (overrides of all runs), `grids`, `paper` (the grids that are the paper's own cells, run first),
    `learning_rate_by` (see experiments/plan/choose.py), `notes`, and `reference`, the label to compare with.
    """
    path = Path(name) if name.endswith(".yaml") else CONFIGS / "experiment" / f"{name}.yaml"
    if not path.is_file():
        of_file = "give the path of an experiment's YAML file" if name.endswith(".yaml") or "/" in name else ""
        raise UserError(f"no experiment {name!r}: {of_file or nearest(name, options('experiment'))}")
    try:
        content: Value = yaml.load(path.read_text(encoding="utf-8"), _EachKeyOnce)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(yaml_line(error, path)) from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: an experiment must be a map with title and grids")
    for key, value in content.items():
        if key not in PARTS:
            raise UserError(f"{path}: {key}: an experiment has no such part: {nearest(str(key), PARTS)}")
        _check_part(f"{path}: {key}", value, PARTS[key])
    if not content.get("title"):
        raise UserError(f"{path}: title is missing: say in a line what the experiment is")
    if not (content.get("grids") or content.get("paper")):
        raise UserError(f"{path}: grids is missing: give a list of lines such as method=lora,diablo seed=0,1")
    return content


def _check_part(where: str, value: Any, kind: type) -> None:
    """Raise a UserError unless a part of an experiment is text, or a list of different lines of text."""
    if kind is str:
        if not isinstance(value, str):
            raise UserError(f"{where}: {value!r:.60} is not text: put it in quotes")
        return
    if not isinstance(value, list):
        raise UserError(f"{where}: {value!r:.60} is not a list: write each line behind a -")
    lines = cast("list[Any]", value)
    for line in lines:
        if not isinstance(line, str):
            raise UserError(f"{where}: {line!r:.60} is not a line of text: put it in quotes")
        if lines.count(line) > 1:
            raise UserError(f"{where}: {line!r} is given twice: remove one")


class _EachKeyOnce(yaml.SafeLoader):
    """Reads YAML and refuses a key that is given twice, of which only the last would count."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys: set[Any] = set()
        for key, _ in node.value:
            if key.value in keys:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} is given twice", key.start_mark)
            keys.add(key.value)
        return super().construct_mapping(node, deep)


def yaml_line(error: Exception, path: Path | str) -> str:
    """Return one line about a file that is not YAML: where, and what is wrong."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark, context = error.problem_mark, f"{error.context}: " if error.context else ""
        return f"{path}, line {mark.line + 1}: {context}{error.problem}"
    return f"{path}: not YAML ({' '.join(str(error).split())})"
