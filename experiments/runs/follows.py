"""Checks that a record follows from the files next to it, before a number is reported. Standard library only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from experiments.config import RunConfig
from experiments.errors import UserError
from experiments.runs.config_files import config_hash
from experiments.runs.records import (
    NLL,
    EvalPaths,
    EvalRecord,
    RunPaths,
    TrainRecord,
    file_hash,
    read_json,
    read_lines,
    read_record,
)

Config = dict[str, Any]
FROM_HEADER = ("cut_prompts", "dtype", "seconds", "identity", "environment")  # of samples.jsonl's first line
DAMAGED = (KeyError, TypeError, AttributeError, IndexError, ValueError, ZeroDivisionError, OverflowError)


def read_score(paths: EvalPaths) -> EvalRecord:
    """Return the score of an evaluation after checking that it follows from its plan and completions."""
    for path in (paths.plan, paths.samples):
        if not path.is_file():
            raise UserError(f"{path}: missing, so {paths.score.name} cannot be checked: delete {paths.root}")
    record = read_record(paths.score, EvalRecord)
    check_score(paths, record)
    return record


def check_score(paths: EvalPaths, record: EvalRecord) -> None:
    """Raise a UserError unless a score is consistent and follows from its existing files (a committed run has none)."""
    anew = f"delete {paths.score.name} and evaluate the run again, which scores the existing completions"
    most = math.inf if record.metric == NLL else 1
    if record.n == 0 or len(record.items) != record.n or not all(0 <= item <= most for item in record.items):
        raise UserError(f"{paths.score}: n does not fit its items: {anew}")
    adds_up = {"accuracy": fmean(record.items)}
    if record.metric != NLL:  # the error of an NLL also depends on the lengths of the rows
        adds_up["standard_error"] = standard_error(record.items)
    for name, value in adds_up.items():
        if not math.isclose(getattr(record, name), value, abs_tol=1e-9):
            raise UserError(f"{paths.score}: {name} does not follow from its items: {anew}")
    for name in ("unparsed", "fallback"):
        if not 0 <= getattr(record, name) <= record.n * record.samples:
            raise UserError(f"{paths.score}: {name} is more than its completions: {anew}")
    expected: Config = {}
    if paths.plan.is_file():
        plan = read_json(paths.plan)
        expected |= planned_fields(paths.plan, plan)
    if paths.samples.is_file():
        if file_hash(paths.samples) != record.samples_hash:
            raise UserError(
                f"{paths.samples}: not the completions that {paths.score.name} was made from: restore them, or delete "
                f"{paths.root} and evaluate the run again"
            )
        header = next(read_lines(paths.samples), Config())
        expected |= {name: header.get(name) for name in FROM_HEADER}
    if record.judgements_hash and paths.judgements.is_file():
        expected["judgements_hash"] = file_hash(paths.judgements)
    for name, value in expected.items():
        if getattr(record, name) != value:
            raise UserError(f"{paths.score}: its {name} does not follow from the files next to it: {anew}")


def planned_fields(path: Path, plan: Config) -> dict[str, Any]:
    """Return a score's fields that come from its plan. `path` names the plan in errors."""
    try:
        asked, read = plan["settings"]["asked"], plan["settings"]["read"]
        kept = len(plan["order"])
        if read["full_batches_of"] is not None:
            kept -= kept % read["full_batches_of"]
        same = (
            *("run_id", "benchmark", "benchmark_version", "protocol", "protocol_version"),
            *("batch_size", "base_hash", "adapter_files", "data_hash"),
        )
        return {
            **{key: plan[key] for key in same},
            **{key: read[key] for key in ("searched", "parser", "equality", "judge")},
            "n": kept,
            "samples": _samples(asked),
            "dropped": plan["rows"] - kept,
            "generation": asked,
            "backend": asked["backend"],
        }
    except DAMAGED as error:
        raise UserError(f"{path}: not the plan of an evaluation ({error!r}): delete {path.parent}") from None


def check_samples(paths: EvalPaths, plan: Config, lines: list[Config]) -> None:
    """Raise a UserError unless there is one completion for every row and sample of the plan."""
    asked = plan["settings"]["asked"]
    repeats = range(_samples(asked))
    found = [(line.get("index"), line.get("repeat", 0)) for line in lines]
    if found != [(index, repeat) for index in sorted(plan["order"]) for repeat in repeats]:
        raise UserError(f"{paths.samples}: does not have the completions of its plan: delete it and evaluate again")
    texts, numbers = (
        (("prompt", "completion", "answer"), ()) if "generation" in asked else ((), ("nll", "targets", "exact"))
    )
    for line in lines:
        if not all(isinstance(line.get(key), str) for key in texts) or not all(
            isinstance(line.get(key), int | float) for key in numbers
        ):
            raise UserError(f"{paths.samples}: row {line['index']} is incomplete: delete it and evaluate again")


def _samples(asked: Config) -> int:
    """Return completions per row; likelihood benchmarks have none, and one line per row."""
    return asked["generation"]["samples"] if "generation" in asked else 1


def standard_error(items: Sequence[float]) -> float:
    """Return the standard error of the mean over rows. For right and wrong only, it is sqrt(p (1 - p) / n)."""
    mean, n = fmean(items), len(items)
    if set(items) <= {0.0, 1.0}:
        return (mean * (1 - mean) / n) ** 0.5
    return stdev(items) / n**0.5 if n > 1 else 0.0


def check_training(run: RunPaths, config: RunConfig, record: TrainRecord) -> None:
    """Raise a UserError unless a training record is the run's own and its held-out score follows from the rows'."""
    if (record.run_id, record.config_hash) != (config.run_id, config_hash(config.mapping)):
        raise UserError(f"{run.train_record}: the record of {record.run_id}, not of this config: train the run again")
    if record.held_out is None or not run.held_out.is_file():
        return
    try:
        rows = read_json(run.held_out)
        nll, targets, exact = rows["nll"], sum(rows["targets"]), rows["exact"]
        loss = sum(nll) / targets if targets and None not in nll else None
        expected = {"rows": len(nll), "loss": loss, "exact_match": fmean(exact)}
        same = all(_close(record.held_out[key], value) for key, value in expected.items())
    except DAMAGED as error:
        raise UserError(
            f"{run.held_out}: not the scores of the held-out rows ({error!r}): train the run again"
        ) from None
    if not same or len(exact) != len(nll):
        raise UserError(f"{run.train_record}: held_out does not follow from {run.held_out.name}: train the run again")


def _close(one: float | None, other: float | None) -> bool:
    """Compare up to rounding: each row's loss is written with seven digits."""
    return one == other if one is None or other is None else math.isclose(one, other, rel_tol=1e-5, abs_tol=1e-9)
