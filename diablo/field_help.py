"""One text for every field of a config class: the `Args:` section of its docstring, which editors and Sphinx show.

PEFT's config classes have such texts in `field(metadata={"help": …})`, where argument parsers find them and `help()`
does not.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from types import MappingProxyType
from typing import TypeVar

Config = TypeVar("Config")
SECTION = re.compile(r"^Args:\n((?:(?:    .*)?\n?)*)", re.MULTILINE)
ENTRY = re.compile(r"^    (\w+): (.*(?:\n {8}.*)*)", re.MULTILINE)


def documented(config_class: type[Config]) -> type[Config]:
    """Take the help of a dataclass's own fields from its docstring, and add the inherited fields to the docstring.

    Inherited are the fields of other classes with this decorator; PEFT's own fields keep PEFT's texts. A class without
    a docstring stays as it is.
    """
    fields = {field.name: field for field in dataclasses.fields(config_class)}  # pyright: ignore[reportArgumentType]
    for name, text in field_texts(config_class).items():
        if name in inspect.get_annotations(config_class):  # a base class's Field object is shared with that class
            fields[name].metadata = MappingProxyType({**fields[name].metadata, "help": " ".join(text.split())})
    inherited: dict[str, str] = {}
    for base in config_class.__mro__[1:]:
        if base.__module__.startswith("diablo."):
            inherited = field_texts(base) | inherited
    own = field_texts(config_class)
    added = "".join(f"    {name}: {text}\n" for name, text in inherited.items() if name not in own)
    text = inspect.cleandoc(config_class.__doc__ or "")
    if section := SECTION.search(text):
        before, after = text[: section.end()].rstrip(), text[section.end() :].lstrip()
        config_class.__doc__ = f"{before}\n{added}\n{after}".rstrip() + "\n"
    return config_class


def field_texts(config_class: type) -> dict[str, str]:
    """Return the entries of a docstring's `Args:` section, each with its line breaks."""
    section = SECTION.search(inspect.cleandoc(config_class.__dict__.get("__doc__") or ""))
    return dict(ENTRY.findall(section[1])) if section else {}
