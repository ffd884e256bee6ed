"""Run directories → data frames. Reads records only: no torch, no model, nothing is computed again.

What cannot be read is left out and named in one line, on standard error and in `Runs.problems`; what is missing stays
missing (NaN, None), it never becomes a zero.
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
from experiments.runs import evaluations
from experiments.runs import records as run_records
from experiments.runs.received import read_settings
from experiments.runs.records import RunPaths, TrainRecord, content_hash, file_hash, read_json, read_lines, read_record

SCALARS = dict.fromkeys(("loss", "learning_rate", "gradient_norm", "seconds"), "float64")  # of metrics.jsonl
MANY = 200  # runs from which reading is shared between processors and kept for the next time


@dataclass(frozen=True)
class Runs:
    """What was read.

    `frame` has a row per run and evaluation, with the columns `COLUMNS`: `setting` is a hash of the config without its
    seed, so rows of one setting differ in nothing but the seed, and `group` one without the learning rate too;
    `loss_on` is "answer" or "prompt and answer"; `limit` is of rows, None where all were scored; `rate_chosen` says in
    words how an experiment chose the learning rate and `rate_by` by which rule, both None where the config gave it;
    `train_protocol` is the protocol it was trained under, `pattern` the sparse pattern of methods that have one,
    `quantizer` and `bits` the quantisation of the base; `final_loss` is the mean training loss at the end (NaN of a
    training that diverged), `held_out_loss` and `held_out_exact_match` are of the held-out rows where they were read;
    `evaluation` is the folder under `eval/`, which names benchmark, protocol and settings, and `place` is the
    benchmark's in the task's order, their mean last; `commits` are the versions of this code that trained and scored;
    `items` is an (n,) array of 1 and 0, or of shares where a row has several completions, and a list of such arrays for
    the mean over a task's benchmarks; `percent_of_base` is in percent, `accuracy` in [0, 1], `train_seconds` in
    seconds. A planned evaluation without a score has a row with `benchmark` alone.

    `likelihood` has the evaluations of likelihood benchmarks (eval/likelihood.py), with the same columns but `nll`
    instead of `accuracy`: nats per target token, lower is better; `items` is a row's NLL over the mean number of
    targets of a row. They are no share of anything, so `frame`, and with it every table, figure and comparison of
    accuracies, is without them; a run that has no other evaluation has one row there, without a benchmark.

    `problems` has a line for everything that was left out or is not there yet.
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
    """Read run directories, in the order given. A directory without a readable config is a problem, not an error.

    From `MANY` on they are read by all processors, and what was read is kept (analysis/cache.py). `quiet`: problems are
    returned and not printed. UserError when two directories of one run id have different configs.
    """
    seen: dict[str, Path] = {}
    problems: list[str] = []
    for directory in directories:
        first = seen.setdefault(directory.name, directory)
        if first is not directory and first.resolve() != directory.resolve():  # it would look like one more seed
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
        return list(pool.map(read_run, directories, chunksize=100))


def _frame(found: Sequence[dict[str, Any]]) -> pd.DataFrame:
    return pd.DataFrame(found, columns=pd.Index([*COLUMNS, "problems"])).astype(TYPES)


def _check_same_config(first: Path, second: Path) -> None:
    """UserError with the difference when two directories of one run id were configured differently."""
    try:
        ours, theirs = (_flat(read_settings(run / "config.yaml")) for run in (first, second))
    except (OSError, UserError):
        return  # not a config: reading the run says so
    keys = [key for key in sorted(ours.keys() | theirs.keys()) if not key.startswith("runtime.")]
    differ = [f"{key} is {ours.get(key)!r} and {theirs.get(key)!r}" for key in keys if ours.get(key) != theirs.get(key)]
    if differ:
        raise UserError(f"{first} and {second} are one run id with different configs: {'; '.join(differ[:5])}")


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by their dotted names."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def load_metrics(directory: Path) -> pd.DataFrame:
    """What a training logged, one row per optimizer step, indexed by `step` (from 1).

    Columns: `loss`, `learning_rate`, `gradient_norm` (all tensors together), `seconds`, and one column per trained
    tensor, under the tensor's name, with the norm of its gradient before clipping. A step that a resumed training did
    again is there once, as done last. UserError when the run has no readable training record or does not fit it.
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
    """What a run measured of its inputs and gradients (experiments/train/spectra.py), a row per step, layer and side.

    Columns: `step`, `tokens`, `seconds` (of the whole measurement), `layer` (from 0), `module`, `side` ("X" or "g_Y"),
    `blocks`, `stable_rank`, `energy`; means over the blocks: `block_stable_rank`, `block_energy`, `covered`; and of the
    last the least and the most, `covered_least` and `covered_most`.
    UserError when there is none that can be read.
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
    """Step times as `experiments.speed.timing` measured them: in every round the frozen floor and each method once.

    A ratio is taken within its round, so that a machine that slows down for a while slows both. UserError when the file
    is not such a measurement.
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
    """A name for each group (the settings that differ in nothing but the learning rate) among rows of `Runs.frame`.

    Its label, and where several groups have one label what tells them apart.
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
    """The rows of a frame as dictionaries of column name to value."""
    return cast(list[dict[str, Any]], frame.to_dict("records"))


def find_runs(paths: Iterable[Path]) -> list[Path]:
    """The run directories meant by `paths`: each is one, or a folder of them. UserError when nothing is found."""
    found: list[Path] = []
    for path in paths:
        if (path / "config.yaml").is_file():
            found.append(path)
        elif path.is_dir() and (names := [name for name in os.listdir(path) if isfile(f"{path}/{name}/config.yaml")]):
            found += [path / name for name in sorted(names)]
        else:
            raise UserError(f"{path}: no run directory and no folder of them (a run has a config.yaml)")
    return found
