"""The command line's `key=value` arguments: Hydra's grammar, with sweeps, parsed into single values.

Text in double quotes is read as in the YAML files: backslash and n are a line break, two backslashes are one. In single
quotes a backslash is itself.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
import shlex
from collections.abc import Iterable, Mapping
from typing import Any, cast

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments.errors import UserError, nearest
from experiments.rules import Value
from experiments.settings import SECTIONS, leaves, rule, stored

Config = dict[str, Any]
MOST_RUNS = 100_000  # of one grid
ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}


def sweep(arguments: Iterable[str]) -> list[tuple[Override, ...]]:
    """Return all combinations of the comma-separated values. The last of several overrides of one key counts."""
    choices: dict[str, list[Override]] = {}
    for argument in arguments:
        override = parse(argument)
        key = override.key_or_group
        choices.pop(key, None)
        choices[key] = _values(argument, override)
    if math.prod(map(len, choices.values())) > MOST_RUNS:
        sizes = " × ".join(f"{len(values):,} of {key}" for key, values in choices.items() if len(values) > 1)
        raise UserError(f"{sizes}: more than {MOST_RUNS:,} runs in one grid: give fewer values")
    return list(itertools.product(*choices.values()))


def parse(argument: str) -> Override:
    """Parse one argument, which may be a sweep."""
    try:
        override = OverridesParser.create().parse_override(argument)
    except HydraException as error:
        raise UserError(f"cannot read {argument!r}: {_advice(argument)} ({_line(error)})") from None
    if override.is_delete():
        raise UserError(f"{argument!r}: settings cannot be deleted, set them to null")
    if override.package is not None:
        raise UserError(f"{argument!r}: a key has no @")
    return override


def _advice(argument: str) -> str:
    key, equals, value = argument.partition("=")
    if not equals:
        return "write key=value; a value with blanks in quotes, as in 'key=two words'"
    if value[:1] not in ("[", "{", "'", '"'):
        quoted = f'{key}="{value}"'.replace("\\", "\\\\")
        try:
            OverridesParser.create().parse_override(quoted)
        except HydraException:
            pass
        else:
            return f"write {shlex.quote(quoted)}"
    return "write key=value, with every quote and bracket closed, and quoted for the shell"


def _values(argument: str, override: Override) -> list[Override]:
    """Return the values of a sweep as overrides of one value each."""
    if not override.is_sweep_override():
        return [override]
    if not override.is_discrete_sweep() or "glob(" in argument.partition("=")[2][:6]:
        raise UserError(f"{argument!r}: no list of values: give them with commas, choice(…) or range(from,to,step)")
    prefix = "+" if override.is_add() else ""
    try:
        texts = list(itertools.islice(override.sweep_string_iterator(), MOST_RUNS + 1))
    except (HydraException, ValueError, ArithmeticError) as error:
        raise UserError(f"{argument!r}: no list of values ({_line(error)})") from None
    if not texts:
        raise UserError(f"{argument!r}: no value lies in this range")
    if len(texts) > MOST_RUNS:
        raise UserError(f"{argument!r}: more than {MOST_RUNS:,} values: give fewer")
    return OverridesParser.create().parse_overrides([f"{prefix}{override.key_or_group}={text}" for text in texts])


def value_of(override: Override) -> Any:
    """Return an override's value; escapes in double quotes are interpreted."""

    def read(value: Value | QuotedString) -> Any:
        if isinstance(value, list):
            return [read(part) for part in value]
        if isinstance(value, dict):
            return {read(key): read(part) for key, part in value.items()}
        if isinstance(value, QuotedString):
            return _unescaped(value.text) if value.quote is Quote.double else value.text
        if isinstance(value, str) and re.search(r"\\[ntr]", value):
            raise UserError(
                f"{override.input_line!r}: for a line break put the text into double quotes, for a backslash and a "
                f"letter into single ones, inside those of the shell and not in choice(…)"
            )
        return value

    return read(cast(Any, override._value))  # pyright: ignore[reportPrivateUsage]


def _unescaped(text: str) -> str:
    def character(found: re.Match[str]) -> str:
        return chr(int(found[2], 16)) if found[2] else ESCAPES[found[1]]

    return re.sub(r"\\(?:([ntr\\])|u([0-9a-fA-F]{4}))", character, text)


def checked(overrides: Iterable[Override], files: Mapping[str, Any]) -> list[Override]:
    """Return the overrides with their values as they are stored. UserError if a value is not allowed.

    Values with references are left for later, when they are resolved, and so are keys that no file has.

    Args:
        files: every setting and section of the config files by its dotted name.
    """
    return [_checked(override, files) for override in overrides]


def _checked(override: Override, files: Mapping[str, Any]) -> Override:
    key, given = override.key_or_group, value_of(override)
    if isinstance(files.get(key), dict) and (rule(key) is None or key in SECTIONS):
        names = ", ".join(files[key]) or "(it has none for these choices)"
        raise UserError(f"{override.input_line}: {key} is a section, set one of its settings: {key}.… of {names}")
    if "${" in str(given):
        return override
    value = stored(key, given, files.get(key))
    if repr(value) == repr(given):
        return override
    text = Override._get_value_element_as_str(value)  # pyright: ignore[reportPrivateUsage]
    line = f"{'+' if override.is_add() else ''}{key}={text}"
    return dataclasses.replace(override, _value=value, input_line=line)


def by_name(config: Mapping[str, Any], prefix: str = "") -> Config:
    """Return every setting and section of a config by dotted name."""
    found: Config = {}
    for name, value in config.items():
        found[f"{prefix}{name}"] = value
        if isinstance(value, dict):
            found |= by_name(cast(Config, value), f"{prefix}{name}.")
    return found


def by_name_resolved(config: Config) -> Config:
    """Return `by_name` with resolved references; None for those that lead nowhere."""
    composed = OmegaConf.create(config)
    found = by_name(config)
    for key, value in found.items():
        if isinstance(value, str) and "${" in value:
            try:
                value = OmegaConf.select(composed, key)
            except OmegaConfBaseException:
                value = None
            found[key] = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
    return found


def settle(resolved: Config, files: Config, free: Iterable[str] = ()) -> None:
    """Check every value and store it in its normal form, except for the keys in `free`."""
    free = {key.removeprefix("+") for key in free}
    for key, value in list(leaves(resolved)):
        kept = stored(key, value, files.get(key)) if key not in free else value
        if type(kept) is not type(value) or isinstance(kept, list):
            *parents, last = key.split(".")
            node = resolved
            for part in parents:
                node = node[part]
            node[last] = kept


def set_value(config: Config, override: Override, others: Iterable[str]) -> None:
    """Set one value in place. An unknown key is refused with the nearest known ones.

    Args:
        others: what else could have been meant at the top.
    """
    key, adds = override.key_or_group, override.is_add()
    if adds and not key.startswith("method.adapter."):
        raise UserError(f"+{key}: only method.adapter takes new keys, the fields of the method's own config class")
    *parents, last = key.split(".")
    node: Any = config
    for depth, part in enumerate([*parents, last]):
        where = ".".join(parents[:depth])
        if not isinstance(node, dict):
            raise UserError(f"no setting {key!r}: {where} is {node!r} for these choices")
        section = cast(Config, node)
        if part not in section and not (adds and depth == len(parents)):
            known = {*section, *(() if where else others)}
            hint = _elsewhere(last, config) or nearest(part, known)
            if where == "method.adapter":
                hint += f" (another field of the method's config class is added with a plus: +{key}=…)"
            raise UserError(f"no setting {key!r}: {hint}")
        if depth < len(parents):
            node = section[part]
    node[last] = value_of(override)


def _elsewhere(last: str, config: Config) -> str:
    """Return a hint for a setting that was named without its section, or with a wrong one; empty if there is none.

    The sections of `model` describe how a model is made: a setting of theirs is hardly what was meant.
    """
    names = [name for name, value in by_name(config).items() if not isinstance(value, dict)]
    places = [name for name in names if name.rpartition(".")[2] == last and not name.startswith("model.")]
    return f"did you mean {' or '.join(places)}?" if 1 <= len(places) <= 3 else ""


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
