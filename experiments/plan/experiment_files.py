"""Experiment files, `configs/experiment/<name>.yaml`: the runs of one table or figure as a list of grids."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from experiments import CONFIGS
from experiments.errors import UserError, nearest
from experiments.rules import Value

PAPER = "cells=paper"  # next to experiment=…: only the paper's own cells
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


def _split(experiment: str, line: Any) -> list[str]:
    try:
        return shlex.split(line)
    except (ValueError, AttributeError, TypeError) as error:
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
        raise UserError(f"no experiment {name!r}: {nearest(name, options('experiment'))}")
    try:
        content: Value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: an experiment must be a map with title and grids")
    unknown = set(content) - {"title", "common", "grids", "paper", "notes", "learning_rate_by", "reference"}
    if unknown or not (content.get("grids") or content.get("paper")):
        raise UserError(
            f"{path}: an experiment has title, common, paper, grids, learning_rate_by, reference and notes, "
            f"not {sorted(unknown) or 'no grids'}"
        )
    return content
