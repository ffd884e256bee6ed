"""Sizes of models with an attached method, and what their passes allocate: computed from shapes, and kept.

An entry takes half a second (experiments/plan/fake_pass.py), so results are kept in `$DIABLO_CACHE/planned` (default
~/.cache/diablo), one file each, which can be deleted at any time. A file's name is the hash of everything that
determines its numbers: arguments, code and versions of libraries (methods come from `diablo` and `peft` only).
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import astuple, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

from experiments import cache_folder
from experiments.runs.environment import training_code
from experiments.runs.records import content_hash, file_hash, write_atomically


@dataclass(frozen=True)
class Held:
    """Sizes of a whole model with an attached method, in entries, except `frozen_bytes`."""

    frozen_bytes: int
    trained: int
    base: int
    layer: int  # the largest decoder layer, including the adapter
    root: int  # outside the decoder layers: embedding, output layer
    linear: int  # the largest linear layer
    targets: int  # the adapted linear layers
    in_place: int  # entries trained inside a weight, whose original values are kept


@functools.cache
def held(architecture: str, method: str, dtype: str) -> Held:
    """Return the sizes. `architecture` and `method` are JSON; `dtype` is the base's."""

    def compute() -> tuple[int, ...]:
        from experiments.plan.fake_pass import sizes

        return astuple(Held(**sizes(architecture, method, dtype)))

    return Held(*_kept([architecture, method, dtype], len(fields(Held)), compute))


@functools.cache
def pass_bytes(
    architecture: str, method: str, dtype: str, autocast: bool, rows: int, length: int, checkpointing: bool
) -> tuple[int, int]:
    """Return the peak bytes of a forward and backward pass beyond the model's tensors, with gradients not kept.

    Two peaks: until the end of the last decoder layer's backward pass, and after it.
    """
    arguments = (architecture, method, dtype, autocast, rows, length, checkpointing)

    def compute() -> tuple[int, int]:
        from experiments.plan.fake_pass import peaks

        return peaks(*arguments)

    early, late = _kept(arguments, 2, compute)
    return early, late


def _kept(arguments: Sequence[Any], count: int, compute: Callable[[], Sequence[int]]) -> Sequence[int]:
    """Return what `compute` returns, `count` numbers, from its file if it was computed before."""
    path = cache_folder() / "planned" / f"{content_hash([list(arguments), _code()])[:32]}.json"
    with suppress(OSError, ValueError):
        found = json.loads(path.read_text(encoding="utf-8"))
        numbers = cast("list[Any]", found) if isinstance(found, list) else []
        if len(numbers) == count and all(isinstance(number, int) for number in numbers):
            return numbers
    numbers = compute()
    with suppress(OSError):  # a full or read-only disk costs only time
        write_atomically(path, json.dumps(numbers) + "\n")
    return numbers


@functools.cache
def _code() -> list[str]:
    versions = [version(package) for package in ("torch", "transformers", "peft")]
    return [training_code(), file_hash(Path(__file__).with_name("fake_pass.py")), *versions]
