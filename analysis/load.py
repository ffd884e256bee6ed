"""Run directories → data frames. Only reads records: no torch, no model, no recomputation.

Unreadable files are skipped and reported in one line each, on standard error and in `Runs.problems`. Missing values
stay missing (NaN, None); they never become zero.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import re
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from os.path import isfile
from pathlib import Path
from statistics import fmean
from typing import Any, cast

import pandas as pd

from analysis import rows
from analysis.rows import COLUMNS, TYPES, UNREADABLE, line_of, read_run
from experiments.errors import UserError
from experiments.progress import WAIT, Bar
from experiments.runs import evaluations
from experiments.runs import records as run_records
from experiments.runs.received import read_settings
from experiments.runs.records import RunPaths, TrainRecord, content_hash, file_hash, read_json, read_lines, read_record

SCALARS = dict.fromkeys(("loss", "learning_rate", "gradient_norm", "seconds"), "float64")  # of metrics.jsonl
MANY = 200  # from this many runs on, reading is parallel and cached


@dataclass(frozen=True)
class Runs:
    """The rows read from run directories.

    `frame` has a row per run and evaluation, with the columns `COLUMNS`: `setting` is a hash of the config without the
    seed, so rows of one setting differ only in the seed; `group` is one that also leaves out the learning rate;
    `loss_on` is "answer" or "prompt and answer"; `limit` is the number of rows scored, None if all were; `rate_chosen`
    says in words how an experiment chose the learning rate and `rate_by` by which rule, both None if the config set it;
    `train_protocol` is the training protocol, `pattern` the sparse pattern of methods that have one, `quantizer` and
    `bits` the quantisation of the base; `final_loss` is the mean training loss at the end (infinite or NaN if training
    diverged); `held_out_loss` and `held_out_exact_match` are measured on the held-out rows, if at all; `evaluation` is
    the folder under `eval/`, which names benchmark, protocol and settings; `place` is the benchmark's index in the
    task's order, with the mean last; `commits` are the code versions that trained and scored; `items` is an (n,) array
    of 1 and 0, or of shares if a row has several completions, and a list of such arrays for the mean over a task's
    benchmarks; `percent_of_base` is in percent, `accuracy` in [0, 1], `train_seconds` in seconds. A planned evaluation
    without a score has a row with only `benchmark`.

    `likelihood` has the evaluations of likelihood benchmarks (eval/likelihood.py), with the same columns but `nll`
    instead of `accuracy`: nats per target token, lower is better; `items` is a row's NLL divided by the mean number of
    targets per row. NLL is not an accuracy, so `frame`, and every table, figure and comparison of accuracies, excludes
    it; a run with only likelihood evaluations has one row in `frame`, without a benchmark.

    `problems` has a line for everything that is unreadable or missing.
    """

    frame: pd.DataFrame
    likelihood: pd.DataFrame
    problems: list[str]


@dataclass(frozen=True)
class StepTimes:
    """Step times relative to the frozen model's, one row of `ratios` per method label.

    `ratios` is indexed by label, with the columns `median`, `low`, `high` (25 % and 75 % of the rounds) and `rounds`;
    `batch` is [rows, tokens per row].
    """

    model: str
    device: str
    batch: list[int]
    ratios: pd.DataFrame


def load_runs(directories: Iterable[Path], quiet: bool = False) -> Runs:
    """Read run directories, in the given order. A directory without a readable config is a problem, not an error.

    From `MANY` directories on, reading is parallel and cached (analysis/cache.py). `quiet`: return problems without
    printing them. UserError if two directories with one run id have different configs.
    """
    seen: dict[str, Path] = {}
    problems: list[str] = []
    for directory in directories:
        first = seen.setdefault(directory.name, directory)
        if first is not directory and first.resolve() != directory.resolve():  # else it would count as another seed
            _check_same_config(first, directory)
            problems.append(f"{directory}: the same run as {first}, left out")
    chosen = list(seen.values())
    if len(chosen) < MANY:
        frame = _frame([row for directory in chosen for row in read_run(directory)])
    else:
        from analysis.cache import cached_rows

        sources = [Path(str(module.__file__)) for module in (sys.modules[__name__], rows, run_records, evaluations)]
        version = content_hash([*map(file_hash, sources), pd.__version__])
        frame = cached_rows(chosen, _read_in_parallel, _frame, version)
    told = frame.drop_duplicates("path")["problems"]
    problems = [line for lines in told for line in lines] + problems
    for problem in [] if quiet else problems:
        print(problem, file=sys.stderr)
    frame = frame.loc[frame["run_id"].notna()].drop(columns="problems")
    is_nll = frame["metric"] == run_records.NLL
    likelihood = frame.loc[is_nll].rename(columns={"accuracy": "nll"})
    return Runs(frame.loc[~is_nll].reset_index(drop=True), likelihood.reset_index(drop=True), problems)


def _read_in_parallel(directories: Sequence[Path]) -> list[list[dict[str, Any]]]:
    if len(directories) < MANY:
        return [read_run(directory) for directory in directories]
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("fork")) as pool:
        read = pool.map(read_run, directories, chunksize=100)
        return list(Bar(read, desc="reading runs", total=len(directories), unit="run", leave=False, delay=WAIT))


def _frame(found: Sequence[dict[str, Any]]) -> pd.DataFrame:
    return pd.DataFrame(found, columns=pd.Index([*COLUMNS, "problems"])).astype(TYPES)


def _check_same_config(first: Path, second: Path) -> None:
    """Raise a UserError with the difference if two directories with one run id have different configs."""
    try:
        ours, theirs = (_flat(read_settings(run / "config.yaml")) for run in (first, second))
    except (OSError, UserError):
        return  # not a config: reading the run reports it
    keys = [key for key in sorted(ours.keys() | theirs.keys()) if not key.startswith("runtime.")]
    differ = [f"{key} is {ours.get(key)!r} and {theirs.get(key)!r}" for key in keys if ours.get(key) != theirs.get(key)]
    if differ:
        raise UserError(f"{first} and {second} have one run id but different configs: {'; '.join(differ[:5])}")


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the settings keyed by their dotted names."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def load_metrics(directory: Path) -> pd.DataFrame:
    """Return a run's training metrics, one row per optimizer step, indexed by `step` (from 1).

    Columns: `loss`, `learning_rate`, `gradient_norm` (over all tensors), `seconds`, and one column per trained tensor,
    named after it, with the norm of its gradient before clipping. A step repeated by a resumed training appears once,
    with its last values. UserError if the run has no readable training record, or one that does not match.
    """
    run = RunPaths(directory)
    try:
        tensors = read_record(run.train_record, TrainRecord).tensors
        lines = list(read_lines(run.metrics))
        norms = [line.pop("gradient_norms") for line in lines]
        if any(len(values) != len(tensors) for values in norms):
            raise UserError(f"{run.metrics}: does not have one gradient norm for each of the {len(tensors)} tensors")
        scalars = pd.DataFrame(lines, columns=pd.Index(["step", "loss", "learning_rate", "gradient_norm", "seconds"]))
        gradients = pd.DataFrame(norms, columns=pd.Index(tensors), dtype=float)
        frame = pd.concat([scalars.astype({"step": "int64"}).astype(SCALARS), gradients], axis="columns")
    except UNREADABLE as error:
        raise UserError(line_of(run.metrics, error)) from None
    return frame.drop_duplicates("step", keep="last").set_index("step").sort_index()


def load_spectra(directory: Path) -> pd.DataFrame:
    """Return a run's spectra of inputs and gradients (experiments/train/spectra.py), a row per step, layer and side.

    Columns: `step`, `tokens`, `seconds` (of the whole measurement), `layer` (from 0), `module`, `side` ("X" or "g_Y"),
    `blocks`, `stable_rank`, `energy`; means over the blocks: `block_stable_rank`, `block_energy`, `covered`; and the
    least and greatest `covered` of a block, `covered_least` and `covered_most`.
    UserError if there are none, or they cannot be read.
    """
    path = RunPaths(directory).spectra
    rows = []
    try:
        for line in read_lines(path):
            for name, sides in line["layers"].items():
                found = re.search(r"\.(\d+)\.(.+)$", name)
                where = {"layer": int(found[1]) if found else 0, "module": (found[2] if found else name).split(".")[-1]}
                for side, values in sides.items():
                    blocks = {key: _numbers(values[key]) for key in ("block_stable_rank", "block_energy", "covered")}
                    covered = blocks["covered"]
                    rows.append(
                        {key: line[key] for key in ("step", "tokens", "seconds")}
                        | {**where, "side": side, "blocks": len(covered)}
                        | {key: values[key] for key in ("stable_rank", "energy")}
                        | {key: fmean(of_blocks) for key, of_blocks in blocks.items()}
                        | {"covered_least": min(covered), "covered_most": max(covered)}
                    )
        if not rows:
            raise UserError(f"{path}: nothing was measured")
        frame = pd.DataFrame(rows)
        numbers = [name for name in frame if name not in ("step", "tokens", "layer", "module", "side", "blocks")]
        return frame.astype({"step": "int64", "tokens": "int64"}).astype(dict.fromkeys(numbers, "float64"))
    except UNREADABLE as error:
        raise UserError(line_of(path, error)) from None


def _numbers(values: Sequence[float | None]) -> list[float]:
    return [math.nan if value is None else value for value in values]


def load_step_times(path: Path) -> StepTimes:
    """Return step times measured by `experiments.speed.timing`: each round times the frozen floor and every method.

    Ratios are taken within a round, so that a temporary slowdown of the machine affects both. UserError if the file is
    not such a measurement.
    """
    data = read_json(path)
    try:
        if data["schema"] != 1:
            raise UserError(f"{path}: schema {data['schema']}, this version reads 1: measure again")
        seconds = pd.DataFrame(data["seconds"], dtype=float)
        ratios = seconds.drop(columns="floor").div(seconds["floor"], axis="index")
        quartiles = ratios.quantile([0.25, 0.5, 0.75]).T.set_axis(["low", "median", "high"], axis="columns")
        return StepTimes(data["model"], data["device"], data["batch"], quartiles.assign(rounds=len(ratios)))
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(f"{path}: not a measurement of step times ({error}): measure again") from None


def names_of(rows: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Return a name for each group (settings that differ only in the learning rate) among rows of `Runs.frame`.

    The name is the label, extended by what distinguishes groups with equal labels.
    """
    groups = {row["group"]: row for row in rows}
    names = {}
    for group, row in groups.items():
        alike = [other for other in groups.values() if other["label"] == row["label"]]
        by_loss = len({other["loss_on"] for other in alike}) == len(alike)
        told = f", loss on {row['loss_on']}" if by_loss else f" ({group[:6]})"
        names[group] = row["label"] + (told if len(alike) > 1 else "")
    return names


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Return the rows of a frame as dictionaries from column name to value."""
    return cast(list[dict[str, Any]], frame.to_dict("records"))


def find_runs(paths: Iterable[Path]) -> list[Path]:
    """Return the run directories in `paths`: each is a run or a folder of runs. UserError if one has none."""
    found: list[Path] = []
    for path in paths:
        if (path / "config.yaml").is_file():
            found.append(path)
        elif path.is_dir() and (names := [name for name in os.listdir(path) if isfile(f"{path}/{name}/config.yaml")]):
            found += [path / name for name in sorted(names)]
        else:
            raise UserError(f"{path}: neither a run directory nor a folder of them (a run has a config.yaml)")
    return found
