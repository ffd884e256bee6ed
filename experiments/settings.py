"""Settings by dotted name: checked against `experiments.config`, read into a `RunConfig`. Standard library only."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields
from functools import cache
from types import NoneType
from typing import Any, TypeVar, cast, get_args, get_origin, get_type_hints

from experiments.config import RunConfig
from experiments.errors import UserError, nearest
from experiments.open_fields import OPEN
from experiments.rules import Rule, Value, members, rule_of, rule_of_value, section_of

Config = dict[str, Any]
Section = TypeVar("Section")
PATHS = ("runtime.runs_dir", "runtime.data_root", "runtime.cache_dir")
SECTIONS = ("model", "method", "quantization", "task", "recipe", "spectra", "protocol", "evaluation", "runtime")


@cache
def annotation_of(key: str) -> Any:
    """Return the annotation of a setting or section; None if `experiments.config` does not have it."""
    kind: Any = RunConfig
    for part in _own(key).split("."):
        section = section_of(kind)
        kind = _hints(section).get(part) if section else None
    return kind


@cache
def rule(key: str) -> Rule | None:
    """Return the rule of a setting; None for a section, and for a setting that `experiments.config` does not have."""
    annotation = annotation_of(key)
    return OPEN.get(_own(key)) if annotation is None else rule_of(annotation)


def stored(key: str, value: Any, default: Any = None) -> Any:
    """Return a setting's value as it is stored in a run's config. UserError if the value is not allowed.

    Args:
        default: the setting's value in the config files, whose type counts if `experiments.config` has no rule.
    """
    allowed = rule(key) or rule_of_value(default)
    try:
        kept = _finite(value) if allowed is None else allowed.stored(value)
        return default if kept == default and kept is not True and kept is not False else kept
    except (ValueError, OverflowError):
        raise UserError(f"{key}={shown(value)}: it must be {allowed or 'finite'}") from None


def check(config: Mapping[str, Any]) -> None:
    """Raise a UserError if a value in a run's config is not allowed. Missing settings are not reported."""
    for name in SECTIONS:
        if not isinstance(config.get(name, {}), dict):
            raise UserError(f"{name}={shown(config[name])}: it must be a section of settings")
    for key, value in leaves(config):
        if not (value is None and key in PATHS):  # committed runs have none
            stored(key, value)


def typed(mapping: Mapping[str, Any]) -> RunConfig:
    """Build a run's config from the content of its config.yaml, whose values have been checked.

    Raises:
        UserError: a setting is missing or unknown.
    """
    kept = copy.deepcopy(dict(mapping))
    if "mapping" in kept:
        raise UserError(f"no setting mapping: known: {', '.join(SECTIONS)}")
    return _section(RunConfig, {**kept, "mapping": kept}, "")


def with_values(config: RunConfig, values: Mapping[str, Any]) -> RunConfig:
    """Return a config with other values, by dotted name. Its run id is not recomputed."""
    changed = copy.deepcopy(dict(config.mapping))
    for key, value in values.items():
        *parents, last = key.split(".")
        node = changed
        for part in parents:
            node = node[part]
        node[last] = value
    return typed(changed)


def section(kind: type[Section], mapping: Mapping[str, Any], name: str = "") -> Section:
    """Build one section of a run's config, e.g. a `Protocol`, from its mapping; errors give its `name`."""
    return _section(kind, mapping, f"{name}." if name else "")


def _section(kind: type[Any], mapping: Mapping[str, Any], prefix: str) -> Any:
    hints = _hints(kind)
    for name in mapping:
        if name not in hints:
            raise UserError(f"no setting {prefix}{name}: {nearest(name, hints)}")
    for part in fields(kind):
        if part.name not in mapping and part.default is MISSING and part.default_factory is MISSING:
            raise UserError(f"the setting {prefix}{part.name} is missing")
    return kind(**{name: _value(hints[name], value, f"{prefix}{name}.") for name, value in mapping.items()})


def _value(annotation: Any, value: Value, prefix: str) -> Any:
    kind = section_of(annotation)
    is_section = kind is not None or _is_open(annotation)
    if is_section and not isinstance(value, Mapping) and (value is not None or NoneType not in members(annotation)):
        raise UserError(f"{prefix[:-1]}={shown(value)}: it must be a section of settings")
    if kind is not None and isinstance(value, Mapping):
        return _section(kind, value, prefix)
    if isinstance(value, list) and _is_typed(annotation):
        return tuple(value)
    if isinstance(value, Mapping) and _is_typed(annotation):
        return {key: tuple(cast(list[Any], part)) if isinstance(part, list) else part for key, part in value.items()}
    return value


@cache
def _is_open(annotation: Any) -> bool:
    """Return whether an annotation is an open mapping, null or not."""
    first = members(annotation)[0]
    return get_origin(first) is Mapping and get_args(first)[1] is Any


@cache
def _is_typed(annotation: Any) -> bool:
    """Return whether lists become tuples: not in open mappings, which go to other libraries' classes."""
    parts = get_args(annotation)
    return get_origin(annotation) is tuple or any(get_origin(part) is tuple or _is_typed(part) for part in parts)


def leaves(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every setting by its dotted name; a map that is one setting is yielded as a whole."""
    for name, value in config.items():
        key = f"{prefix}{name}"
        own = rule(key)
        whole = own is not None and section_of(annotation_of(key)) is None
        if not isinstance(value, dict) or whole:
            yield key, value
        if isinstance(value, dict) and not whole:
            yield from leaves(cast(Config, value), f"{key}.")


def shown(value: Any) -> str:
    """Format a value as it is written on the command line."""
    if value is None or isinstance(value, bool):
        return str(value).lower().replace("none", "null")
    return str(value) if isinstance(value, int | float) else repr(value)


@cache
def _hints(kind: type[Any]) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def _own(key: str) -> str:
    """Return the name of a prerequisite's setting in that run's own config."""
    key = key.removeprefix("method.prerequisite.")
    return "recipe.learning_rate" if key == "learning_rate" else key


def _finite(value: Value) -> Any:
    """Check a value of unknown type; whole numbers lose their `.0`."""
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_finite(part) for part in value]
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError
        return int(value) if value.is_integer() else value
    return value
