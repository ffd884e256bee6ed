"""From configs to runs: compose with Hydra, sweep, resolve, freeze.

Arguments are Hydra overrides, and a comma makes a sweep. An experiment file is a list of such lines, its grids; its
runs are their union. A run's `config.yaml` is resolved and frozen.
"""

from __future__ import annotations

import copy
import operator
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments import CONFIGS
from experiments.config import RunConfig
from experiments.errors import UserError, nearest
from experiments.models.gguf import settle_weights
from experiments.plan.checks import check_reference, check_together, size_label
from experiments.plan.config_groups import FILES, check_sections, check_shape, only_to_choose
from experiments.plan.experiment_files import (
    GROUPS,
    expand_experiment,
    options,
    split_experiment,
    yaml_line,
)
from experiments.plan.overrides import by_name, by_name_resolved, checked, set_value, settle, sweep
from experiments.plan.quantization import name_quantized
from experiments.rules import Value
from experiments.runs.config_files import freeze_config, run_id
from experiments.runs.evaluations import check_evaluation
from experiments.runs.prerequisite import freeze_prerequisite
from experiments.runs.records import RunPaths
from experiments.settings import typed

TOP = (*GROUPS, "experiment")  # what may be said beside settings
CHOSEN_LEARNING_RATE = "${method.learning_rate.${task.name}}"  # what run.yaml says where nobody gives one
Config = dict[str, Any]

OmegaConf.register_new_resolver("times", operator.mul, replace=True)
OmegaConf.register_new_resolver("size", size_label, replace=True)


def plan(arguments: Sequence[str]) -> list[RunConfig]:
    """Return the configs of all runs that the arguments describe, in order, each run once."""
    runs: dict[str, RunConfig] = {}
    name, others = split_experiment(arguments)
    for grid in expand_experiment(arguments):
        try:
            for overrides in sweep(grid):
                config = resolve(overrides)
                if config.run_id not in runs:
                    check_evaluation(config)
                    runs[config.run_id] = config
        except UserError as error:
            own = " ".join(argument for argument in grid if argument not in others)
            raise UserError(f"experiment {name}, {own}: {error}" if name and own else str(error)) from None
    if name:
        check_reference(name, others, runs.values())
    return list(runs.values())


def resolve(overrides: Iterable[Override]) -> RunConfig:
    """Resolve one run's config. Files are composed once per choice of groups; single values are merged in."""
    groups: list[Override] = []
    values: list[Override] = []
    overrides = list(overrides)
    for override in overrides:
        (groups if override.key_or_group in GROUPS else values).append(override)
    lines = _lines(groups)
    values = checked(values, _files(lines))
    last = len(values)  # what follows is set after the references are resolved, which is done once for many runs
    while last and _nothing_refers_to(values[last - 1], lines):
        last -= 1
    settled, free = (tuple(str(override.input_line) for override in part) for part in (values[:last], values[last:]))
    keys = tuple(line.partition("=")[0] for line in free)
    resolved = copy.deepcopy(_resolved(lines, settled, keys))
    for override in values[last:]:
        set_value(resolved, override, TOP)
    return _finalize(freeze_prerequisite(resolved, overrides, resolve))


def resolve_with_hydra(overrides: Iterable[Override]) -> RunConfig:
    """Do the same as `resolve` with everything composed by Hydra: ten times slower, the reference for `resolve`."""
    groups = [override for override in overrides if override.key_or_group in GROUPS]
    values = [override for override in overrides if override.key_or_group not in GROUPS]
    overrides = [*groups, *checked(values, _files(_lines(groups)))]
    resolved = _resolve_references(_compose.__wrapped__(_lines(overrides)))
    settle(resolved, _files(_lines(groups)))
    return _finalize(freeze_prerequisite(resolved, overrides, resolve_with_hydra))


def protocol_evaluation(task: str, protocol: str) -> Config:
    """Return the mapping of the `evaluation` section for another protocol of a task."""
    overrides, *more = sweep([f"task={task}", f"protocol={protocol}", "recipe.learning_rate=0"])
    if more:
        raise UserError(f"protocol={protocol}: name one")
    return resolve(overrides).mapping["evaluation"]


def set_values(config: RunConfig, overrides: Iterable[str]) -> RunConfig:
    """Return a config with single values replaced; unknown keys are refused."""
    changed = copy.deepcopy(dict(config.mapping))
    overrides = list(overrides)
    choices, *more = sweep(overrides)
    if more:
        raise UserError(f"{' '.join(overrides)}: a run has one value of each setting, a comma makes several")
    for override in checked(choices, by_name(changed)):
        set_value(changed, override, TOP)
    return typed(changed)


@lru_cache
def protocols(task: str) -> list[str]:
    """Return the names of a task's protocols, its default first."""
    family, _, own = _own_protocol(task).partition("/")
    names = [name.split("/")[1] for name in options("protocol") if name.startswith(f"{family}/")]
    return [own, *(name for name in names if name != own)]


def _own_protocol(task: str) -> str:
    """Return the protocol in a task file's defaults: `<family>/<protocol>`."""
    if task not in options("task"):
        raise UserError(f"no task {task!r}: {nearest(task, options('task'))}")
    return _default(f"task/{task}", "override /protocol")


@lru_cache
def _default(file: str, key: str) -> str:
    """Return the entry for a group in a config file's defaults list."""
    defaults = yaml.safe_load((CONFIGS / f"{file}.yaml").read_text(encoding="utf-8"))["defaults"]
    return next(entry[key] for entry in defaults if key in entry)


def _lines(overrides: Iterable[Override]) -> tuple[str, ...]:
    """Return overrides as Hydra accepts them; `protocol=diablo` is the `diablo` of the task's family."""
    overrides = list(overrides)
    chosen = {override.key_or_group: override for override in overrides}
    lines: list[str] = []
    for override in overrides:
        line = str(override.input_line)
        if override.key_or_group == "protocol":
            task = str(chosen["task"].value()) if "task" in chosen else _default("run", "task")
            name = str(override.value())
            if name not in protocols(task):
                raise UserError(f"task {task} has no protocol {name!r}: it has {', '.join(protocols(task))}")
            line = f"protocol={_own_protocol(task).split('/')[0]}/{name}"
        lines.append(line)
    return tuple(lines)


@lru_cache(maxsize=256)
def _compose(overrides: tuple[str, ...]) -> Config:
    """Merge the config files of a choice of groups with Hydra; references are not resolved yet."""
    for override in overrides:
        group, _, name = override.partition("=")
        if group in GROUPS and name not in options(group):
            raise UserError(f"no {group} {name!r}: {nearest(name, options(group))}")
    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(CONFIGS)):
            composed = OmegaConf.to_container(compose("run", overrides=list(overrides)), resolve=False)
    except (HydraException, yaml.YAMLError, OmegaConfBaseException, ValueError, RecursionError) as error:
        raise UserError(f"the files of {' '.join(overrides)} do not fit together: {_reason(error)}") from None
    check_sections(cast(Config, composed))
    return cast(Config, composed)


def _reason(error: BaseException) -> str:
    """Return what Hydra or its YAML reader says about a config file, as one line."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return yaml_line(error, error.problem_mark.name)
    if isinstance(error, OmegaConfBaseException) and error.full_key:
        return f"{error.full_key}: {_wrong_reference(error)}"
    text = " ".join(str(error).partition("\nConfig search path")[0].split())
    if text or error.__cause__ is None:
        return text or type(error).__name__
    return _reason(error.__cause__)


@lru_cache(maxsize=256)
def _resolved(groups: tuple[str, ...], values: tuple[str, ...], free: tuple[str, ...]) -> Config:
    """Return the config of these choices with resolved references, and null for each free value."""
    composed = copy.deepcopy(_compose(groups))
    for override in OverridesParser.create().parse_overrides([*values, *(f"{key}=null" for key in free)]):
        set_value(composed, override, TOP)
    resolved = _resolve_references(composed)
    settle(resolved, _files(groups), free)
    return resolved


@lru_cache(maxsize=256)
def _files(groups: tuple[str, ...]) -> Config:
    """Return every setting and section in the files of these choices, by dotted name."""
    return by_name_resolved(_compose(groups))


def _nothing_refers_to(override: Override, groups: tuple[str, ...]) -> bool:
    """Return whether a value can be set after references are resolved: no reference leads to or from it."""
    value, key = override.value(), override.key_or_group
    if isinstance(value, dict | list) or (isinstance(value, str) and re.search(r"[$\\]", value)):
        return False
    return not any(f"{name}.".startswith(f"{key}.") or f"{key}.".startswith(f"{name}.") for name in _references(groups))


@lru_cache(maxsize=256)
def _references(groups: tuple[str, ...]) -> frozenset[str]:
    """Return every dotted name, or prefix of one, in the references of a choice's config files."""

    def names(value: Value, *path: str) -> Iterator[str]:
        if isinstance(value, dict | list):
            for key, part in value.items() if isinstance(value, dict) else enumerate(value):
                yield from names(part, *path, str(key))
        elif isinstance(value, str) and "${" in value:
            for dots, name in re.findall(r"(\.*)(\w[\w.]*)", value):
                # A name with dots before it begins so many levels above the value that refers to it.
                yield ".".join([*(path[: -len(dots)] if dots else ()), name.rstrip(".")])

    return frozenset(names(_compose(groups)))


def _resolve_references(composed: Config) -> Config:
    """Resolve all references."""
    method, task = (composed[name].get("name") for name in ("method", "task"))
    rates = composed["method"].get("learning_rate")
    is_recorded = isinstance(rates, dict) and task in rates
    if composed["recipe"].get("learning_rate") == CHOSEN_LEARNING_RATE and not is_recorded:
        raise UserError(f"no learning rate is recorded for {method} on {task}: give recipe.learning_rate=…")
    try:
        resolved = cast(Config, OmegaConf.to_container(OmegaConf.create(composed), resolve=True))
    except OmegaConfBaseException as error:
        check_shape(composed)  # a reference to what is missing: the file with the mistake is the better message
        raise UserError(f"{error.full_key}, of method {method} on task {task}: {_wrong_reference(error)}") from None
    check_shape(resolved)
    return resolved


def _wrong_reference(error: OmegaConfBaseException) -> str:
    """Return what is wrong with a reference, and how to write one."""
    text = str(error).splitlines()[0]
    if found := re.search(r"Interpolation key '(.*)' not found", text):
        return f"${{{found[1]}}} refers to no setting: name one from the top, e.g. ${{task.name}}"
    if found := re.search(r"Environment variable '(.*)' not found", text):
        return f"the environment variable {found[1]} is not set: set it, or give a value: ${{oc.env:{found[1]},…}}"
    if found := re.search(r"Unsupported interpolation type (\S+)", text):
        return f"${{{found[1]}:…}} is no reference: those with a colon are times, size and oc.env"
    return f"not a reference such as ${{task.name}} ({text})"


def _finalize(settings: Config) -> RunConfig:
    """Drop the tables that only serve to choose a value, name the run and type its config."""
    check_together(settings)
    settle_weights(settings["model"], Path(settings["runtime"]["cache_dir"]))
    name_quantized(settings)
    if settings["spectra"]["every"] is None:
        del settings["spectra"]
    for section in FILES:
        for table in only_to_choose(section):
            settings[section].pop(table, None)
    return typed({"run_id": run_id(settings), **settings})


def run_paths(config: RunConfig) -> RunPaths:
    return RunPaths(Path(config.runtime.runs_dir) / config.run_id)


def write_runs(configs: Iterable[RunConfig]) -> list[RunPaths]:
    """Create the run directories; existing ones are checked (`freeze_config`)."""
    runs: list[RunPaths] = []
    for config in configs:
        run = run_paths(config)
        freeze_config(run, config)
        runs.append(run)
    return runs
