"""Checks of a composed run: settings that are each allowed, but not together, or not for the data that there is."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from experiments.config import RunConfig
from experiments.data.sources import SOURCES
from experiments.errors import UserError, nearest
from experiments.models.shapes import check_architecture
from experiments.plan.experiment_files import GROUPS, read_experiment

Config = dict[str, Any]
LONGEST_SIZE = 60  # characters of a size in a label


def check_together(settings: Config) -> None:
    """Raise a UserError if a resolved config contradicts itself."""
    _check_data(settings)
    _check_trained(settings["method"])
    if isinstance(settings["method"]["adapter"], dict):
        _check_adapter(settings["method"]["adapter"])
    _check_batch(settings["recipe"])
    check_architecture(settings["model"]["architecture"])


def check_reference(name: str, others: Sequence[str], runs: Iterable[RunConfig]) -> None:
    """Refuse a reference that no run has, unless the command line chooses other runs than the file."""
    reference, labels = read_experiment(name).get("reference"), {config.method.label for config in runs}
    chooses = any(argument.lstrip("+").startswith((*GROUPS, "cells")) for argument in others)
    if reference is not None and reference not in labels and not chooses:
        raise UserError(
            f"experiment {name}: reference: {reference}: no run has this label: {nearest(reference, labels)}"
        )


def size_label(size: Any) -> str:
    """Return a method's size as it is written in labels: a map from layers to sizes as q8+v16."""
    if not isinstance(size, Mapping):
        return str(size)
    items = cast("Mapping[str, Any]", size).items()
    text = "+".join(re.sub(r"[^\w.-]", "_", f"{name.removesuffix('_proj')}{part}") for name, part in items)
    return text if len(text) <= LONGEST_SIZE else f"{len(items)}sizes"


def _check_batch(recipe: Config) -> None:
    """Refuse a micro-batch that does not divide the batch: training would do so hours later, on a GPU."""
    batch, micro_batch = recipe["batch_size"], recipe["micro_batch_size"]
    if batch % micro_batch:
        known = ", ".join(str(size) for size in range(1, batch + 1) if batch % size == 0)
        raise UserError(
            f"recipe.batch_size={batch} is not a multiple of recipe.micro_batch_size={micro_batch}: give one of {known}"
        )


def _check_data(settings: Config) -> None:
    data = settings["task"]["data"]
    given = data["source"]
    if not given:
        raise UserError("task.data.source=[]: no data set: give one or several of those in experiments/data/sources.py")
    if settings["model"]["path"] is None and settings["model"]["pretraining"] is None:
        raise UserError("model.path=null and model.pretraining=null: there are no weights: give model.path")
    sources = [given] if isinstance(given, str) else given
    for source in sources:
        if source not in SOURCES and source != "arith":
            raise UserError(f"task.data.source={source}: no such data set: {nearest(source, [*SOURCES, 'arith'])}")
    if "arith" in sources and len(sources) > 1:
        raise UserError(f"task.data.source={given}: arith is generated and cannot be joined with other data sets")
    if "arith" in sources:
        for key in ("seed", "train", "test"):
            if data.get(key) is None:
                raise UserError(f"task.data.{key}=null: arith is generated: give a number")
        return
    rows = sum(max(SOURCES[source]["train"].rows) for source in sources)
    if data.get("heldout", 0) >= rows:
        raise UserError(f"task.data.heldout={data['heldout']}: {given} has {rows:,} training rows: give fewer")


def _check_trained(method: Config) -> None:
    trains, adapter = method["trains"], method["adapter"]
    if trains == "adapter" and adapter is None:
        raise UserError("method.trains=adapter and method.adapter=null exclude each other: name its config class")
    if trains != "adapter" and isinstance(adapter, dict):
        name = cast(Config, adapter).get("_target_")
        raise UserError(
            f"method.trains={trains} and method.adapter={name} exclude each other: say trains: adapter or adapter: null"
        )


def _check_adapter(adapter: Config) -> None:
    """Refuse names of layers that PEFT would take for something else, or for nothing."""
    for key in ("target_modules", "exclude_modules"):
        given = adapter.get(key)
        if given == [] and key == "target_modules":
            raise UserError("method.adapter.target_modules=[]: no layer: name some, as in [q_proj,v_proj]")
        if isinstance(given, str) and re.fullmatch(r"\w+", given):
            raise UserError(
                f"method.adapter.{key}={given!r}: text is all-linear or an expression for whole names such as "
                f".*\\.q_proj: write [{given}] for the layers of this name"
            )
