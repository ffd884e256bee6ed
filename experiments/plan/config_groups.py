"""What the files of configs/ may hold: the sections of a run's config, and tables that only serve to choose values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, cast

from experiments.config import Benchmark, Method, Model, Name, Task
from experiments.errors import UserError, nearest
from experiments.plan.experiment_files import options
from experiments.rules import section_of
from experiments.runs.received import check_target
from experiments.settings import SECTIONS, annotation_of, section, shown, stored

Config = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class ModelFile(Model):
    """The base model."""

    adapter_size: Mapping[str, Any]
    """Sizes that the methods' files refer to."""


@dataclass(frozen=True, kw_only=True)
class Contract:
    """What a method promises, and what it cannot do; the tests hold every method to it."""

    starts_at_base: bool
    """Attached, it changes no output of the base model."""
    merges: bool
    """It can be folded into the base's weights."""
    changes_base_at_start: bool
    """Attaching it changes the base's weights, which then are part of what is saved."""
    gradient_checkpointing: bool = True
    compile: bool = True
    ddp: bool = True
    fsdp2: bool = True
    on_quantized: bool = True
    """It trains on a base whose weights are packed integers."""


@dataclass(frozen=True, kw_only=True)
class MethodFile(Method):
    """What is trained."""

    contract: Contract
    learning_rate: Mapping[str, Any] | None = None
    """By task; used where recipe.learning_rate is not given."""
    prerequisite: Name | None = None  # pyright: ignore[reportIncompatibleVariableOverride]
    """The method that is trained before, with its own learning rate, and whose adapter `prepare` reads."""


@dataclass(frozen=True, kw_only=True)
class TaskFile(Task):
    """What the run trains on."""

    benchmarks: tuple[Benchmark, ...]
    """What evaluation.benchmarks is unless it is given."""


FILES: dict[str, type[Any]] = {"model": ModelFile, "method": MethodFile, "task": TaskFile}


def kind_of_section(name: str) -> type[Any]:
    """Return the dataclass of a section as the files of configs/ hold it."""
    kind = FILES.get(name) or section_of(annotation_of(name))
    assert kind is not None
    return kind


def check_sections(settings: Config) -> None:
    """Raise a UserError if a composed section is not one. Settings are not looked at: references are not resolved."""
    for name in SECTIONS:
        value = settings.get(name)
        if not isinstance(value, Mapping) and not (name == "quantization" and value is None):
            raise UserError(f"{name}={shown(value)}: it must be a section of settings")


def check_shape(settings: Config) -> None:
    """Raise a UserError if a resolved config lacks a setting, has an unknown one, or names code that is no method's."""
    _check_keys(settings, "")
    for name in settings:
        if name not in (*SECTIONS, "seed"):
            raise UserError(f"no setting {name}: {nearest(name, (*SECTIONS, 'seed'))}")
    for name in SECTIONS:
        if settings[name] or name != "quantization":  # quantization=none has none
            section(kind_of_section(name), settings[name], name)
    method = settings["method"]
    for table in ("adapter", "prepare"):
        if method.get(table) is not None:
            check_target(f"method.{table}._target_", method[table].get("_target_"))
    stored("method.prerequisite", method.get("prerequisite"))
    rates: Config = method.get("learning_rate") or {}
    for task in rates:
        if task not in options("task"):
            raise UserError(f"method.learning_rate.{task}: no such task: {nearest(task, options('task'))}")


def only_to_choose(name: str) -> list[str]:
    """Return the settings of a section that choose values of others and are not part of a run's config."""
    own = section_of(annotation_of(name))
    assert own is not None
    return [part.name for part in fields(kind_of_section(name)) if part.name not in {each.name for each in fields(own)}]


def _check_keys(mapping: Config, prefix: str) -> None:
    for key, value in cast(dict[Any, Any], mapping).items():
        if not isinstance(key, str):
            raise UserError(f"{prefix}{key}: a setting's name must be text, in quotes")
        if isinstance(value, dict):
            _check_keys(cast(Config, value), f"{prefix}{key}.")
