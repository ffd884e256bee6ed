"""Runs on SmolLM2's real weights, small enough for a CPU: few training rows, short completions, float32."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.config import Data
from experiments.data import rows as data

ROWS = 4


def settings(folder: Path, data_root: Path) -> list[str]:
    """Return the overrides shared by all runs; quantised bases and tokens are cached in the folder too."""
    return [
        *("task=gsm8k_mawps", "model.dtype=float32", "runtime.device=cpu", f"runtime.data_root={data_root}"),
        *(f"runtime.runs_dir={folder / 'runs'}", f"runtime.cache_dir={folder / 'cache'}"),
        *(f"recipe.batch_size={ROWS}", f"recipe.micro_batch_size={ROWS // 2}", "recipe.warmup_steps=0"),
        *("evaluation.limit=4", "evaluation.batch_size=4", "evaluation.generation.max_new_tokens=4"),
    ]


def keep_shortest_rows(monkeypatch: pytest.MonkeyPatch, count: int = ROWS) -> None:
    """Train on the `count` real rows with the shortest texts only, so that an epoch is one or two steps."""
    everything = data._of_sources

    def shortest(settings: Data, split: str, data_root: str | None) -> list[dict[str, str]]:
        rows = everything(settings, split, data_root)
        size = {id(row): len(row["instruction"] + row["input"] + row["output"]) for row in rows}
        return sorted(rows, key=lambda row: size[id(row)])[:count] if split == "train" else rows

    monkeypatch.setattr(data, "_of_sources", shortest)
