"""The values a setting may have, read from the annotation of its field in `experiments.config`. Standard library only.

`bool` is a flag, `int` a whole number and `float` a number (neither of them negative), `str` text, a `Literal` one of
its words, `tuple[X, ...]` a list, `X | None` also null, `X | Mapping[str, X]` also a map from names to such values.
`Annotated[X, Rule(…)]` gives another rule. Equal numbers are stored alike, so that they give one run id: 8.0 as 8.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, cast, get_args, get_origin

Value = Mapping[str, Any] | list[Any] | str | float | None  # what YAML and JSON hold
NAME = re.compile(r"\w[\w.+=,@-]{0,99}")  # names become folders: no path fits
PATTERNS = {  # of texts, by kind
    "name": NAME,
    "benchmark": re.compile(rf"{NAME.pattern}|(?:[^\0]*/)?{NAME.pattern}\.txt"),
    "share": re.compile(r"1/[1-9]\d*"),
    "device": re.compile(r"auto|cpu|cuda(:\d+)?"),
    "sha256": re.compile(r"[0-9a-f]{64}"),
}
TYPES = {
    "flag": "true or false",
    "whole": "a whole number",
    "number": "a number",
    "text": "text (in quotes if it looks like a number)",
    "name": "a name of letters, digits and _.+=,@-, at most 100 of them",
    "benchmark": "a benchmark's name or the path of a .txt file whose own name has letters, digits and _.+=,@- alone",
    "share": "a share as 1/64 or 0.015625",
    "device": "auto, cpu, cuda or cuda:1",
    "sha256": "64 hexadecimal digits",
    "map": "a map as {key: value}",
}


@dataclass(frozen=True)
class Rule:
    """What a value may be.

    Attributes:
        kind: a key of `TYPES`, or "word".
        least, most: the range of a number; without the first where `above` is set, without the last where `below` is.
        words: what it may be instead, or must be if the kind is "word".
        null: null is allowed too.
        many: "list" for a list of such values, "or list" for one or a list, "map" for a map from names to such values.
        length: of that list.
        mapped: a map from names to such values is allowed too.
    """

    kind: str
    least: float = -math.inf
    most: float = math.inf
    words: tuple[str, ...] = ()
    null: bool = False
    many: str = ""
    length: int | None = None
    mapped: bool = False
    above: bool = False
    below: bool = False

    def stored(self, value: Value) -> Any:
        """Return the value as it is stored; ValueError if it is not allowed."""
        if value is None and self.null:
            return None
        if isinstance(value, Mapping) and (self.mapped or self.many == "map"):
            one = replace(self, mapped=False, many="" if self.many == "map" else self.many)
            if not all(isinstance(key, str) for key in cast(Mapping[Any, Any], value)):
                raise ValueError
            return {key: one.stored(part) for key, part in value.items()}
        if self.many and isinstance(value, list):
            if self.length not in (None, len(value)):
                raise ValueError
            return [self._one(part) for part in value]
        if self.many in ("list", "map"):
            raise ValueError
        return self._one(value)

    def _one(self, value: Any) -> Any:
        if isinstance(value, str) and value in self.words:
            return value
        if self.kind in ("whole", "number") or (self.kind == "share" and not isinstance(value, str)):
            return self._number(value)
        if self.kind in PATTERNS:
            fits = isinstance(value, str) and PATTERNS[self.kind].fullmatch(value) is not None
        else:
            kinds: dict[str, type[Any]] = {"flag": bool, "text": str, "map": dict}
            fits = self.kind in kinds and isinstance(value, kinds[self.kind])
        if not fits:
            raise ValueError
        return cast(Any, value)

    def _number(self, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError
        if value < self.least or value > self.most:
            raise ValueError
        if (self.above and value == self.least) or (self.below and value == self.most):
            raise ValueError
        whole = value == int(value)
        if self.kind == "whole" and not whole:
            raise ValueError
        return int(value) if whole else value

    def __str__(self) -> str:
        words = ", ".join(self.words)
        text = f"one of {words}" if self.kind == "word" else TYPES[self.kind]
        if self.least > -math.inf:
            text += f" {'above' if self.above else 'of at least'} {self.least:.10g}"
        if self.most < math.inf:
            text += (
                f"{' and' if self.least > -math.inf else ''} {'below' if self.below else 'at most'} {self.most:.10g}"
            )
        if self.kind != "word" and words:
            text += f", or {words}"
        if self.many == "map":
            text = f"a map from names to values, each {text}"
        elif self.many:
            count = "" if self.length is None else f"{self.length} values, each "
            text = f"a list of {count}{text}" if self.many == "list" else f"{text}, or a list of such"
        if self.mapped:
            text += ", or a map from names to such"
        return text + (", or null" if self.null else "")


FLAG, TEXT, MAP = Rule("flag"), Rule("text"), Rule("map")
WHOLE, AMOUNT = Rule("whole", 0), Rule("number", 0)
PLAIN = {bool: FLAG, int: WHOLE, float: AMOUNT, str: TEXT}


@cache
def rule_of(annotation: Any) -> Rule | None:
    """Return the rule of an annotation; None for a section of settings: a dataclass, or a mapping to Any."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return next((part for part in parts if isinstance(part, Rule)), None)
    if origin is Literal:
        return Rule("word", words=parts)
    if origin is tuple:
        part = rule_of(parts[0])
        length = None if parts[-1] is ... else len(parts)
        return part and replace(part, many="list", length=length)
    if origin in (Union, UnionType):
        return _rule_of_union(parts)
    if origin is Mapping:
        part = rule_of(parts[1])
        return part and replace(part, many="map")
    return PLAIN.get(annotation)


def _rule_of_union(parts: tuple[Any, ...]) -> Rule | None:
    """Return the rule of the first part, widened by null, a list or a map of such values."""
    first = parts[0]
    rule = rule_of(first) or (MAP if section_of(first) else None)
    if rule is None:
        return None
    for part in parts[1:]:
        origin = get_origin(part)
        if part is NoneType:
            rule = replace(rule, null=True)
        elif origin is Mapping:
            rule = replace(rule, mapped=True)
        elif origin is tuple:
            rule = replace(rule, many="or list")
        elif origin is Literal:
            rule = replace(rule, words=get_args(part))
        else:
            raise TypeError(f"{part}: not a part of a setting's annotation")
    return rule


def rule_of_value(default: Any) -> Rule | None:
    """Return the rule of a setting without an annotation, e.g. a field of a PEFT config: by its value in the files."""
    if isinstance(default, list):
        part = rule_of_value(default[0]) if default else TEXT
        return part and replace(part, many="list")
    if isinstance(default, dict):
        return MAP
    return next((rule for kind, rule in PLAIN.items() if isinstance(default, kind)), None)


@cache
def section_of(annotation: Any) -> type | None:
    """Return the dataclass of a section's annotation, null or not; None if it is not a section."""
    return next(
        (part for part in members(annotation) if isinstance(part, type) and dataclasses.is_dataclass(part)), None
    )


def members(annotation: Any) -> tuple[Any, ...]:
    """Return the members of a union, or the annotation itself."""
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
