"""The memory of planned runs as a table, a line per setting, and its error where a peak was measured."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from experiments import ROOT
from experiments.config import RunConfig
from experiments.plan.choose import follow, setting_label, stages_of
from experiments.plan.compose import plan, run_paths
from experiments.plan.fit import with_sharding
from experiments.plan.memory import estimate
from experiments.plan.selection import Selection, select
from experiments.progress import WAIT, Bar
from experiments.runs.config_files import group_hash, read_config
from experiments.runs.differences import differing
from experiments.runs.records import TrainRecord, content_hash, read_record
from experiments.runs.sizes import counted, gibibytes

Column = tuple[str, Callable[[RunConfig, int], str]]  # title, and text for a setting with this many runs
MEASURED = ROOT / "results" / "gpu_h200" / "peaks.json"
LEFT_OUT = ("recipe.learning_rate", "seed")  # settings in which the runs of one line differ


def settings(configs: Sequence[RunConfig]) -> list[tuple[RunConfig, int]]:
    """Return one run of every trained setting, ignoring learning rate and seed, and its number of runs."""
    groups: dict[str, list[RunConfig]] = {}
    for config in configs:
        if config.method.trains != "nothing":
            groups.setdefault(group_hash(config.mapping), []).append(config)
    return [(group[0], len(group)) for group in groups.values()]


def memory_table(
    configs: Sequence[RunConfig], gpus: Callable[[RunConfig], int] = lambda config: 1, more: Sequence[Column] = ()
) -> list[str]:
    """Return a line per setting: runs, GPUs per run, memory per GPU, and further columns."""
    bar = Bar(settings(configs), desc="memory", unit="setting", leave=False, delay=WAIT)
    found = [(config, count, estimate(config, max(1, gpus(config)))) for config, count in bar]
    differ = differing([config for config, _, _ in found], LEFT_OUT)
    several = len({config.task.name for config, _, _ in found}) > 1
    unit, size = ("GiB", 2**30) if any(memory.peak >= 2**30 for *_, memory in found) else ("MiB", 2**20)
    titles = [
        f"{unit} per GPU",
        "runs",
        "GPUs",
        "micro-batch",
        "weights",
        "gradients",
        "optimizer",
        "activations",
        "peak",
    ]
    rows = [[*titles, *(title for title, _ in more)]]
    for config, count, memory in found:
        label = f"{config.model.name} {config.method.label}"
        label += f" {config.task.name}" if several else ""
        parts = (memory.weights, memory.gradients + memory.buckets, memory.optimizer, memory.activations, memory.peak)
        sharded = " sharded" if config.runtime.sharding == "full" else ""
        row = [
            label,
            str(count),
            f"{gpus(config)}{sharded}",
            f"{config.recipe.micro_batch_size} × {memory.length}",
        ]
        row += [f"{part / size:.1f}" if part >= 0.05 * size or not part else f"{part / size:.2f}" for part in parts]
        row[-1] += "*" if memory.preparation > memory.training else " "
        rows.append([*row, *(text(config, count) for _, text in more), differ.get(config.run_id, "")])
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(part.rjust(w) for part, w in zip(row[1:], widths[1:], strict=False))])
        + ("  " + row[-1] if len(row) > len(widths) and row[-1] else "")
        for row in rows
    ]
    if any(memory.preparation > memory.training for *_, memory in found):
        lines.append("* while gradients of the whole base are taken, before the adapter is attached")
    return [*(line.rstrip() for line in lines), *off_by(configs)]


def dry_run(arguments: Sequence[str], selection: Selection) -> None:
    """Print a summary of a plan: runs, parameters, tokens, GPU-hours, and the memory of a run on one GPU."""
    from experiments.plan.counting import print_counts

    selected = select(arguments, selection)
    found = stages_of(selected.configs, selected.by)
    configs, following = found.known(), found.following()
    print_counts(configs, following, selection.speed)
    if settings(configs):
        print(*memory_table(configs), sep="\n")
    if following:
        print(follow(len(following)))
    print(*selected.lines(), sep="\n", end="\n" if selected.lines() else "")


def off_by(configs: Sequence[RunConfig]) -> list[str]:
    """Return the error of the estimates, for every setting with a measured peak, else for the runs on record."""
    lines: list[str] = []
    for config, _ in settings(configs):
        for where, count, peak, trained in _measured(config, configs):
            guess = estimate(trained, count).peak
            lines.append(
                f"measured: {setting_label(config)}: {gibibytes(peak)} on {where}, estimated {gibibytes(guess)} "
                f"({100 * guess / peak - 100:+.1f} %)"
            )
    return lines or _off_by_on_record()


def _off_by_on_record() -> list[str]:
    if not MEASURED.is_file():
        return []
    entries = json.loads(MEASURED.read_text(encoding="utf-8"))["runs"]
    off = [100 * entry["estimated_bytes"] / entry["peak_bytes"] - 100 for entry in entries]
    models = ", ".join(dict.fromkeys(f"{entry['model']} on one {entry['device']}" for entry in entries))
    return [
        f"estimates: {min(off):+.1f} to {max(off):+.1f} % off the measured peaks of {counted(len(off), 'run')} of "
        f"{models}; sharded memory was measured on CPUs only"
    ]


def _measured(config: RunConfig, configs: Sequence[RunConfig]) -> Iterator[tuple[str, int, int, RunConfig]]:
    """Yield device, number of GPUs, peak bytes and config, of a finished run of the setting, else from the record."""
    for run in (run_paths(other) for other in configs if group_hash(other.mapping) == group_hash(config.mapping)):
        if run.train_record.is_file():
            record = read_record(run.train_record, TrainRecord)
            device = str(record.environment.get("device", ""))
            if not device.endswith("threads"):  # a CPU's peak is that of the whole process
                trained = with_sharding(read_config(run), record.sharding)
                yield device, record.world_size, record.peak_memory_bytes, trained
                return
    if (known := _on_record().get(_memory_hash(config))) is not None:
        yield known["device"], 1, known["peak_bytes"], config


@functools.cache
def _on_record() -> dict[str, Any]:
    if not MEASURED.is_file():
        return {}
    entries = json.loads(MEASURED.read_text(encoding="utf-8"))["runs"]
    return {_memory_hash(plan(entry["overrides"])[0]): entry for entry in entries}


def _memory_hash(config: RunConfig) -> str:
    """Return the hash of what determines the memory of a run."""
    settings, method = config.mapping, config.mapping["method"]
    recipe = {key: settings["recipe"][key] for key in ("micro_batch_size", "batch_size", "optimizer")}
    lengths = {key: value for key, value in settings["protocol"].items() if key.startswith("max_")}
    return content_hash(
        [
            [settings["model"]["architecture"], config.model.dtype, method["adapter"], config.method.trains],
            [settings.get("quantization"), config.task.name, recipe, lengths],
            config.runtime.gradient_checkpointing,
        ]
    )
