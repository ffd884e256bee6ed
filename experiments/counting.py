"""Exact trainable parameters of planned runs, from the architecture alone: modules on the meta device, no weights."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from experiments.cost import Speed, gpu_hours, rows_trained_on, tokens

Config = dict[str, Any]


@dataclass(frozen=True)
class Count:
    """`ungrouped` counts key and value projections as if every query head had its own, as the paper's percentages for
    LLaMA3 do; None where the model has no grouped-query attention.
    """

    trainable: int
    base: int
    ungrouped: int | None

    @property
    def percent(self) -> float:
        return 100 * self.trainable / self.base


def count(config: Config) -> Count:
    """The counts of one run. Percentages are of the base model, the adapter not added."""
    architecture, method = config["model"]["architecture"], config["method"]
    trainable, base = _count(json.dumps(architecture), json.dumps(method))
    ungrouped = None
    if architecture["num_key_value_heads"] < architecture["num_attention_heads"] and method["trains"] == "adapter":
        full_heads = {**architecture, "num_key_value_heads": architecture["num_attention_heads"]}
        ungrouped = _count(json.dumps(full_heads), json.dumps(method))[0]
    return Count(trainable, base, ungrouped)


@functools.cache
def _count(architecture: str, method: str) -> tuple[int, int]:
    from experiments import methods
    from experiments.models import empty_base

    base = empty_base(json.loads(architecture))
    total = base.num_parameters()
    model = methods.attach(json.loads(method), base)
    return sum(tensor.numel() for tensor in methods.trained_tensors(model).values()), total


def print_counts(configs: Sequence[Config], to_come: Sequence[Config], speed: Speed) -> None:
    """One line per run: its id, what it trains, the share of the base model, its tokens and GPU-hours.

    `to_come` are runs whose learning rate is not chosen yet: they only count in the sums.
    """
    from experiments.quantize import print_sizes

    width = max((len(config["run_id"]) for config in configs), default=0)
    grouped = False
    print(f"{'run':{width}}  {'trainable':>15}  {'of base':>8}  {'rate':>8}  {'rows':>9}  {'tokens':>8}  {'GPU-h':>7}")
    for config in configs:
        result = count(config)
        line = f"{config['run_id']:{width}}  {result.trainable:>15,}  {result.percent:>7.3f}%  "
        line += f"{config['recipe']['learning_rate']:>8g}  {rows_trained_on(config):>9,}  "
        line += f"{_short(tokens(config, speed)):>8}  {_short(gpu_hours(config, speed)):>7}"
        if result.ungrouped is not None:
            grouped = True
            line += f"   [* {result.ungrouped:,} = {100 * result.ungrouped / result.base:.3f}%]"
        print(line)
    everything = [*configs, *to_come]
    sums = []
    for what, cost in (("tokens", tokens), ("GPU-hours of training", gpu_hours)):
        known = [value for value in (cost(config, speed) for config in everything) if value is not None]
        if len(known) == len(everything):
            sums.append(f"{_short(sum(known))} {what}")
    print(", ".join([f"{len(configs)} runs" + (f" and {len(to_come)} to come" if to_come else ""), *sums]))
    if any("quantization" in config for config in configs):
        print_sizes([(config, count(config).trainable) for config in configs])
    if grouped:
        print(
            "* as the paper counts: key and value projections as if the model had no grouped-query attention. Its "
            "percentages for LLaMA3 fit only that; ours are counted from the real shapes."
        )


def _short(number: float | None) -> str:
    """Three digits and a unit; nothing for what is unknown."""
    if number is None:
        return ""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"
