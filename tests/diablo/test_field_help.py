"""Every field of the config classes is documented once, for `help()` and for argument parsers."""

from __future__ import annotations

import dataclasses
import inspect

import peft
import pytest
from transformers import HfArgumentParser

import diablo
from diablo.blocks.config import BlockConfig
from diablo.blocks.patterns import PATTERNS
from diablo.field_help import documented, field_texts

CONFIGS = [value for name in diablo.__all__ if name.endswith("Config") for value in [getattr(diablo, name)]]


def own_fields(config: type) -> list[dataclasses.Field]:
    """The fields that are not PEFT's."""
    parent = peft.LoraConfig if issubclass(config, peft.LoraConfig) else peft.PeftConfig
    theirs = {field.name for field in dataclasses.fields(parent)}
    return [field for field in dataclasses.fields(config) if field.name not in theirs]


@pytest.mark.parametrize("config", [BlockConfig, *CONFIGS])
def test_help_and_argument_parsers_find_the_same_text_of_every_field(config: type) -> None:
    shown = " ".join((inspect.getdoc(config) or "").split())  # what help() prints
    fields = own_fields(config)
    assert len(fields) >= (0 if config is diablo.MiloraConfig else 2)
    for field in fields:
        assert f"{field.name}: {field.metadata['help']}" in shown, field.name
    names = {field.name for field in dataclasses.fields(config)}
    assert set(field_texts(config)) <= names, "a text of a field that does not exist"


def test_peft_s_own_fields_are_left_as_they_are() -> None:
    theirs = {field.name: field.metadata.get("help") for field in dataclasses.fields(peft.LoraConfig)}
    ours = {field.name: field.metadata.get("help") for field in dataclasses.fields(diablo.LoriConfig)}
    assert theirs.items() <= ours.items()


def test_an_argument_parser_shows_the_texts() -> None:
    parser = HfArgumentParser(diablo.BottleneckConfig)  # pyright: ignore[reportArgumentType]
    assert "Width of the network between W_down and W_up." in " ".join(parser.format_help().split())


def test_the_patterns_are_all_named() -> None:
    text = field_texts(diablo.SparseConfig)["pattern"]
    assert " ".join(text.split()).startswith(f"One of {', '.join(PATTERNS)};")


def test_classes_without_docstrings_stay_as_they_are() -> None:
    @dataclasses.dataclass
    class Plain(BlockConfig):
        extra: int = 0

    before = Plain.__doc__
    assert documented(Plain).__doc__ == before
    assert Plain(extra=1).extra == 1
