# pyright: reportUnknownMemberType=false
"""The cost of planned runs: training tokens, and GPU-hours at a measured speed, which a budget counts.

Tokens are counted if the task's rows and the model's tokenizer are on this machine. Otherwise `--tokens-per-row` is
used; without it they stay blank. GPU-hours are of training only; scoring is extra.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from experiments.config import Data, Model, Protocol, RunConfig, Runtime, Task
from experiments.data import hub
from experiments.errors import UserError
from experiments.models.gguf import unchecked
from experiments.settings import section

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Speed:
    """Measured speeds: tokens per second and GPU by model ("" for all models), and tokens per row."""

    tokens_per_second: dict[str, float]
    tokens_per_row: float | None = None


def read_speed(speeds: Sequence[str], tokens_per_row: float | None) -> Speed:
    """Parse speeds such as `3000` or `llama2_7b=3000`."""
    found: dict[str, float] = {}
    for text in speeds:
        model, _, number = text.rpartition("=")
        try:
            found[model] = float(number)
        except ValueError:
            found[model] = 0.0
        if found[model] <= 0:
            raise UserError(f"--tokens-per-second {text}: give a number, or MODEL=number")
    return Speed(found, tokens_per_row)


def rows_trained_on(config: RunConfig) -> float:
    """Return the number of rows in all steps of a run together; 0 if nothing is trained."""
    if config.method.trains == "nothing":
        return 0
    recipe = config.recipe
    steps = _rows(json.dumps(config.mapping["task"]["data"])) // recipe.batch_size * recipe.epochs
    return min(steps, recipe.max_steps or steps) * recipe.batch_size


def tokens(config: RunConfig, speed: Speed) -> float | None:
    """Return the tokens a run trains on, with prompts but without padding; None if the rows' length is unknown."""
    rows = rows_trained_on(config)
    if not rows:
        return 0.0
    lengths = _lengths(config)
    mean = speed.tokens_per_row if lengths is None else float(lengths.mean())
    return None if mean is None else rows * mean


def longest_row(config: RunConfig) -> int:
    """Return the tokens of the longest row; without rows or tokenizer, the most that the protocol keeps."""
    lengths = _lengths(config)
    return int(lengths.max()) if lengths is not None and len(lengths) else config.protocol.max_length


def _lengths(config: RunConfig) -> np.ndarray | None:
    """Return the tokens of every training row."""
    return _row_lengths(_about(config, "model", "task", "protocol", "runtime"))


def _about(config: RunConfig, *sections: str) -> str:
    """Return sections of a config as text, which is hashable."""
    return json.dumps({key: config.mapping[key] for key in sections})


def gpu_hours(config: RunConfig, speed: Speed) -> float | None:
    if not rows_trained_on(config):
        return 0.0
    per_second = _speed_of(config, speed)
    count = tokens(config, speed)
    return None if per_second is None or count is None else count / per_second / 3600


def read_budget(text: str) -> float:
    """Parse GPU-hours such as `200gpuh`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*gpuh", text)
    if match is None:
        raise UserError(f"--budget {text}: write GPU-hours as 200gpuh")
    return float(match[1])


def known_hours(config: RunConfig, speed: Speed) -> float:
    """Return `gpu_hours`; UserError if they are unknown."""
    hours = gpu_hours(config, speed)
    if hours is None:
        model, task = config.model.name, config.task.name
        raise UserError(
            f"--budget: the GPU-hours of {model} on {task} are unknown: give --tokens-per-second {model}=…"
            + ("" if tokens(config, speed) is not None else " and --tokens-per-row …")
        )
    return hours


def reasons(configs: Sequence[RunConfig], speed: Speed) -> list[str]:
    """Return a line for each reason why tokens or GPU-hours are unknown, with the option to give."""
    uncounted: dict[tuple[str, str], dict[str, None]] = {}
    without_speed: dict[str, None] = {}
    for config in configs:
        model, task = config.model.name, config.task.name
        if not rows_trained_on(config):
            continue
        if tokens(config, speed) is None:
            lacking = "no tokenizer" if _tokenizer(_about(config, "model", "runtime")) is None else "no rows"
            uncounted.setdefault((task, lacking), {})[model] = None
        if _speed_of(config, speed) is None:
            without_speed[model] = None
    lines = [
        f"tokens of {', '.join(models)} on {task}: {lacking} on this machine: give --tokens-per-row N"
        for (task, lacking), models in uncounted.items()
    ]
    if without_speed:
        names, one = list(without_speed), next(iter(without_speed)) if len(without_speed) == 1 else "MODEL"
        lines.append(f"GPU-hours of {', '.join(names)}: no speed was given: give --tokens-per-second {one}=N")
    return lines


def _speed_of(config: RunConfig, speed: Speed) -> float | None:
    return speed.tokens_per_second.get(config.model.name, speed.tokens_per_second.get(""))


@functools.cache
def _rows(data: str) -> int:
    """Return the training rows of a `task.data` section: counted if they are local, else the source's number."""
    from experiments.data.rows import load_rows
    from experiments.data.sources import SOURCES

    content = section(Data, json.loads(data))
    try:
        with hub.offline():
            return len(load_rows(content, "train", None))
    except UserError:
        if content.source == "arith":  # needs no file: what is wrong is its size
            raise
        names = [content.source] if isinstance(content.source, str) else content.source
        return sum(max(SOURCES[name]["train"].rows) for name in names) - content.heldout


@functools.cache
def _row_lengths(about: str) -> np.ndarray | None:
    from experiments.data.prompts import select_rows
    from experiments.data.rows import load_rows
    from experiments.data.tokens import tokenised

    config = json.loads(about)
    runtime, protocol = section(Runtime, config["runtime"]), section(Protocol, config["protocol"])
    tokenizer = _tokenizer(json.dumps({key: config[key] for key in ("model", "runtime")}))
    if tokenizer is None:
        return None
    try:
        with hub.offline():
            rows = load_rows(section(Task, config["task"]).data, "train", runtime.data_root)
    except UserError:
        return None
    return tokenised(protocol, tokenizer, select_rows(protocol, rows), Path(runtime.cache_dir)).lengths


@functools.cache
def _tokenizer(about: str) -> PreTrainedTokenizerBase | None:
    """Return the model's tokenizer if it is on this machine, else None."""
    from transformers import AutoTokenizer

    config = json.loads(about)
    model, runtime = section(Model, config["model"]), section(Runtime, config["runtime"])
    if model.pretraining is not None:
        from experiments.models.tiny import make_tokenizer

        return make_tokenizer(model.architecture["vocab_size"], model.pretraining.seed)
    path, cache = model.path, Path(runtime.cache_dir)
    if gguf := model.gguf:
        path = unchecked(gguf, cache)
        if path is None:
            return None
    try:
        return cast(
            "PreTrainedTokenizerBase",
            AutoTokenizer.from_pretrained(str(path), revision=model.revision, local_files_only=True),
        )
    except (OSError, ValueError):
        return None
