"""What `--help-config` prints of a section: every setting with its value in the config files, its meaning and range."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import fields
from functools import cache
from typing import Any, cast, get_type_hints

from experiments.errors import UserError, nearest
from experiments.open_fields import OPEN
from experiments.plan.config_groups import kind_of_section
from experiments.rules import Value, section_of
from experiments.settings import SECTIONS, rule, shown

WIDTH = 100


def explain(name: str, config: Mapping[str, Any]) -> Iterator[str]:
    """Lines about a section of a run's config.

    Args:
        config: a planned run's config, whose values are shown.
    """
    if name not in SECTIONS:
        raise UserError(f"no section {name!r}: {nearest(name, SECTIONS)}")
    yield from _section(name, kind_of_section(name), config.get(name) or {})


def _section(name: str, kind: type[Any], values: Mapping[str, Any]) -> Iterator[str]:
    for paragraph in (inspect.getdoc(kind) or "").split("\n\n"):
        yield from textwrap.wrap(paragraph, WIDTH)
    yield ""
    texts = {name: text for each in reversed(kind.__mro__[:-1]) for name, text in _texts(each).items()}
    hints = get_type_hints(kind, include_extras=True)
    for part in fields(kind):
        key = f"{name}.{part.name}"
        value: Value = values.get(part.name)
        if part.name == "prerequisite" and isinstance(value, Mapping):
            value = value["method"]["name"]
        nested = section_of(hints[part.name])
        is_open: Mapping[str, Any] = value if isinstance(value, Mapping) and nested is None else {}
        given = part.name in values and not is_open and not (nested and value)
        yield key + (f" = {shown(value)}" if given else "")
        yield from _about(key, texts.get(part.name, ""))
        for field in [field for field in is_open if f"{key}.{field}" not in OPEN]:
            yield f"  {key}.{field} = {shown(is_open[field])}"
        for other in [other for other in OPEN if other.rpartition(".")[0] == key]:
            field = other.rpartition(".")[2]
            if is_open and field not in is_open:  # another method's
                continue
            yield f"  {other}" + (f" = {shown(is_open[field])}" if field in is_open else "")
            yield from (f"  {line}" for line in _about(other, ""))
        if nested is not None:
            lines = _section(key, nested, cast(Mapping[str, Any], value or {}))
            yield from (f"  {line}".rstrip() for line in lines)


def _about(key: str, text: str) -> list[str]:
    allowed = rule(key)
    told = "" if allowed is None else str(allowed)
    sentences = [text, f"{told[0].upper()}{told[1:]}." if told else ""]
    return textwrap.wrap(" ".join(filter(None, sentences)), WIDTH, initial_indent="    ", subsequent_indent="    ")


@cache
def _texts(kind: type[Any]) -> dict[str, str]:
    """The text under each field of a dataclass."""
    body = ast.parse(inspect.getsource(kind)).body[0]
    assert isinstance(body, ast.ClassDef)
    found: dict[str, str] = {}
    for before, after in zip(body.body, body.body[1:], strict=False):
        if not (isinstance(before, ast.AnnAssign) and isinstance(before.target, ast.Name)):
            continue
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) and isinstance(after.value.value, str):
            found[before.target.id] = " ".join(after.value.value.split())
    return found
