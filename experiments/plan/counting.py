"""Exact trainable parameters of planned runs, from the architecture only: modules on the meta device, no weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from experiments.config import RunConfig
from experiments.errors import UserError
from experiments.plan.cost import Speed, gpu_hours, reasons, rows_trained_on, tokens
from experiments.plan.memory import base_dtype
from experiments.plan.sizes import held
from experiments.runs.differences import differing
from experiments.runs.sizes import counted

GROUPED = "llama3_8b"  # the paper's model with grouped-query attention


@dataclass(frozen=True)
class Count:
    """Parameter counts. `ungrouped` counts key and value projections as if every query head had its own, as do the
    paper's percentages for LLaMA3; None for other models.
    """

    trainable: int
    base: int
    ungrouped: int | None

    @property
    def percent(self) -> float:
        return 100 * self.trainable / self.base


def count(config: RunConfig) -> Count:
    """Return the counts of one run. Percentages are of the base model without the adapter."""
    architecture, method, dtype = (
        dict(config.model.architecture),
        json.dumps(config.mapping["method"]),
        base_dtype(config),
    )
    found = held(json.dumps(architecture), method, dtype)
    ungrouped = None
    if config.model.name == GROUPED and config.method.trains == "adapter":
        full_heads = {**architecture, "num_key_value_heads": architecture["num_attention_heads"]}
        ungrouped = held(json.dumps(full_heads), method, dtype).trained
    return Count(found.trained, found.base, ungrouped)


def print_counts(configs: Sequence[RunConfig], following: Sequence[RunConfig], speed: Speed) -> None:
    """Print one line per run: id, trainable parameters, their share of the base model, tokens and GPU-hours.

    `following` are runs whose learning rate is not chosen yet: they only count in the sums.
    """
    width = max((len(config.run_id) for config in configs), default=0)
    grouped, differ = False, differing(configs, leave_out=("recipe.learning_rate",))
    print(f"{'run':{width}}  {'trainable':>15}  {'of base':>8}  {'rate':>8}  {'rows':>9}  {'tokens':>8}  {'GPU-h':>7}")
    for config in configs:
        result, rows = count(config), rows_trained_on(config)
        if not rows and config.method.trains != "nothing":
            raise UserError(
                f"{config.run_id}: recipe.batch_size={config.recipe.batch_size}: the training rows do not fill one "
                f"batch: give fewer"
            )
        line = f"{config.run_id:{width}}  {result.trainable:>15,}  {result.percent:>7.3f}%  "
        line += f"{config.recipe.learning_rate:>8g}  {rows:>9,.0f}  "
        line += f"{_short(tokens(config, speed)):>8}  {_short(gpu_hours(config, speed)):>7}"
        if config.run_id in differ:
            line += f"   {differ[config.run_id]}"
        if result.ungrouped is not None:
            grouped = True
            line += f"   [* {result.ungrouped:,} = {100 * result.ungrouped / result.base:.3f}%]"
        print(line, flush=True)  # the next may have to tokenise its rows
    everything = [*configs, *following]
    sums: list[str] = []
    for what, cost in (("tokens", tokens), ("GPU-hours of training", gpu_hours)):
        known = [value for value in (cost(config, speed) for config in everything) if value is not None]
        if len(known) == len(everything):
            sums.append(f"{_short(sum(known))} {what}")
    of = f" of all {len(everything)}" if following else ""
    print(", ".join([counted(len(configs), "run"), *(f"{text}{of}" for text in sums)]))
    for reason in reasons(everything, speed):
        print(f"unknown: {reason}")
    if any(config.quantization is not None for config in configs):
        from experiments.models.quantized import print_sizes

        print_sizes([(config, count(config).trainable) for config in configs])
    if grouped:
        print(
            "* as the paper counts LLaMA3's: key and value projections as if it had no grouped-query attention. Its "
            "percentages fit only that; ours are counted from the real shapes."
        )


def _short(number: float | None) -> str:
    """Format a number with three digits and a unit; empty if unknown."""
    if number is None:
        return ""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"
