"""The memory of planned runs as a table, a line per setting, and how far off it is where a peak was measured."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from experiments import ROOT
from experiments.plan.choose import named
from experiments.plan.compose import plan, run_paths
from experiments.plan.memory import estimate
from experiments.runs.differences import differing
from experiments.runs.records import TrainRecord, content_hash, group_hash, read_record
from experiments.runs.sizes import gibibytes

Config = dict[str, Any]
Column = tuple[str, Callable[[Config, int], str]]  # its title, and its text of a setting with so many runs
MEASURED = ROOT / "results" / "gpu_h200" / "peaks.json"
LEFT_OUT = ("recipe.learning_rate", "seed")  # in which the runs of one line differ


def settings(configs: Sequence[Config]) -> list[tuple[Config, int]]:
    """One run of every setting that is trained, whatever its learning rate and seed, and how many it has."""
    groups: dict[str, list[Config]] = {}
    for config in configs:
        if config["method"]["trains"] != "nothing":
            groups.setdefault(group_hash(config), []).append(config)
    return [(group[0], len(group)) for group in groups.values()]


def memory_table(
    configs: Sequence[Config], gpus: Callable[[Config], int] = lambda config: 1, more: Sequence[Column] = ()
) -> list[str]:
    """A line per setting: runs, GPUs of each, GiB per GPU, and further columns."""
    found = settings(configs)
    differ = differing([config for config, _ in found], LEFT_OUT)
    several = len({config["task"]["name"] for config, _ in found}) > 1
    titles = ["GiB per GPU", "runs", "GPUs", "micro-batch", "weights", "gradients", "optimizer", "activations", "peak"]
    rows = [[*titles, *(title for title, _ in more)]]
    for config, count in found:
        memory = estimate(config, max(1, gpus(config)))
        label = f"{config['model']['name']} {config['method']['label']}"
        label += f" {config['task']['name']}" if several else ""
        parts = (memory.weights, memory.gradients, memory.optimizer, memory.activations, memory.peak)
        sharded = " sharded" if config["runtime"].get("sharding") == "full" else ""
        row = [
            label,
            str(count),
            f"{gpus(config)}{sharded}",
            f"{config['recipe']['micro_batch_size']} × {memory.length}",
        ]
        row += [f"{part / 2**30:.{1 if part >= 0.95 * 2**30 else 2}f}" for part in parts]
        row[-1] += "*" if memory.preparation > memory.training else ""
        rows.append([*row, *(text(config, count) for _, text in more), differ.get(config["run_id"], "")])
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(part.rjust(w) for part, w in zip(row[1:], widths[1:], strict=False))])
        + ("  " + row[-1] if len(row) > len(widths) and row[-1] else "")
        for row in rows
    ]
    if any("*" in line for line in lines[1:]):
        lines.append("* while gradients of the whole base are looked at, before the adapter is attached")
    return lines


def print_memory(configs: Sequence[Config]) -> None:
    """For a run on one GPU each, with the measured peaks that are on record."""
    if settings(configs):
        print(*memory_table(configs), *off_by(configs), sep="\n")


def off_by(configs: Sequence[Config]) -> Iterator[str]:
    """A line for every setting whose peak was measured: how far off the estimate is."""
    for config, _ in settings(configs):
        for where, count, peak in _measured(config, configs):
            guess = estimate(config, count).peak
            yield (
                f"measured: {named(config)}: {gibibytes(peak)} on {where}, estimated {gibibytes(guess)} "
                f"({100 * guess / peak - 100:+.1f} %)"
            )


def _measured(config: Config, configs: Sequence[Config]) -> Iterator[tuple[str, int, int]]:
    """Device, number of GPUs and peak bytes: of a finished run of the setting, else of those that came along."""
    for run in (run_paths(other) for other in configs if group_hash(other) == group_hash(config)):
        if run.train_record.is_file():
            record = read_record(run.train_record, TrainRecord)
            device = str(record.environment.get("device", ""))
            if not device.endswith("threads"):  # of a CPU: the peak is that of the process
                yield device, record.world_size, record.peak_memory_bytes
                return
    if (known := _came_along().get(_memory_hash(config))) is not None:
        yield known["device"], 1, known["peak_bytes"]


@functools.cache
def _came_along() -> dict[str, Any]:
    if not MEASURED.is_file():
        return {}
    entries = json.loads(MEASURED.read_text(encoding="utf-8"))["runs"]
    return {_memory_hash(plan(entry["overrides"])[0]): entry for entry in entries}


def _memory_hash(config: Config) -> str:
    """Of what decides the memory of a run."""
    method, recipe = config["method"], config["recipe"]
    keys = ("micro_batch_size", "batch_size", "optimizer")
    lengths = {key: value for key, value in config["protocol"].items() if key.startswith("max_")}
    return content_hash(
        [
            [config["model"]["architecture"], config["model"]["dtype"], method["adapter"], method["trains"]],
            [config.get("quantization"), config["task"]["name"], {key: recipe[key] for key in keys}, lengths],
            config["runtime"]["gradient_checkpointing"],
        ]
    )
