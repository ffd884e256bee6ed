"""What is computed from shapes is kept on disk, and computed again when anything that determines it changes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from experiments.plan import fake_pass, sizes
from experiments.plan.compose import plan


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("DIABLO_CACHE", str(tmp_path))
    forget()
    yield tmp_path / "planned"
    forget()


def forget() -> None:
    """As in a new process."""
    for function in (sizes.held, sizes.pass_bytes, sizes._code):
        function.cache_clear()


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of what was computed, in order."""
    names: list[str] = []

    def noted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            names.append(function.__name__)
            return function(*arguments)

        return call

    for function in (fake_pass.sizes, fake_pass.peaks):
        monkeypatch.setattr(fake_pass, function.__name__, noted(function))
    return names


def ask(*changes: str) -> tuple[Any, ...]:
    (config,) = plan(["model=tiny", "task=arith", "method=diablo", *changes])
    shapes = json.dumps(config.mapping["model"]["architecture"]), json.dumps(config.mapping["method"])
    return sizes.held(*shapes, "float32"), sizes.pass_bytes(*shapes, "float32", False, 2, 32, False)


def test_a_new_process_reads_what_an_earlier_one_computed(folder: Path, computed: list[str]) -> None:
    first = ask()
    assert computed == ["sizes", "peaks"]
    assert len(list(folder.iterdir())) == 2
    forget()
    assert ask() == first
    assert computed == ["sizes", "peaks"]


def test_other_settings_code_or_versions_are_computed(
    folder: Path, computed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = ask()
    assert ask("method.adapter.num_blocks=4") != first
    assert len(computed) == 4
    for name in ("training_code", "version", "file_hash"):
        forget()
        monkeypatch.setattr(sizes, name, lambda _=None: "another")
        assert ask() == first
    assert len(computed) == 10


@pytest.mark.parametrize("text", ["", "[1, 2", "{}", "[1]", '["1", 2]', "[1, 2]x"])
def test_a_damaged_file_is_computed_again(folder: Path, computed: list[str], text: str) -> None:
    first = ask()
    for path in folder.iterdir():
        path.write_text(text, encoding="utf-8")
    forget()
    assert ask() == first
    assert len(computed) == 4
    forget()
    assert ask() == first
    assert len(computed) == 4
