"""The rows of one run: what tables take from its config, training record and scores.

Unreadable files are skipped and reported in one line each; missing values stay missing, they never become zero.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from experiments.config import RunConfig
from experiments.errors import UserError
from experiments.runs.config_files import group_hash, read_config, setting_hash
from experiments.runs.evaluations import LIKELIHOOD, evaluation_paths, kind_of, name_of
from experiments.runs.follows import check_score, check_training
from experiments.runs.records import (
    NLL,
    EvalPaths,
    EvalRecord,
    RunPaths,
    TrainRecord,
    content_hash,
    read_json,
    read_record,
)
from experiments.settings import with_values

UNREADABLE = (UserError, OSError, ValueError, KeyError, TypeError, AttributeError)  # raised by damaged files
SIZES = {  # the setting that sizes an adapter -> its name in the literature; PaCA's rank is a number of rows
    **{"num_blocks": "N", "r": "r", "count": "r"},
    **{"num_virtual_tokens": "tokens", "bottleneck_size": "width", "down_ratio": "down"},
}
DENOMINATOR = 4096  # largest one of a density
RUN_COLUMNS = (
    *("run_id", "path", "model", "method", "label", "size", "size_number", "task", "seed", "learning_rate"),
    *("rate_chosen", "rate_by", "train_protocol", "loss_on", "pattern", "quantizer", "bits"),
)
TRAIN_COLUMNS = (
    *("trainable_parameters", "base_parameters", "percent_of_base", "steps", "train_seconds", "final_loss"),
    *("held_out_loss", "held_out_exact_match", "step_seconds", "peak_memory_bytes"),
)
HASH_COLUMNS = ("base_hash", "train_data_hash", "environment")
EVAL_COLUMNS = (
    *("benchmark", "place", "metric", "protocol", "protocol_version", "evaluation", "n", "accuracy"),
    *("standard_error", "extra_metrics", "commits", "limit"),
)
COUNT_COLUMNS = (
    "unparsed",
    "fallback",
    "dropped",
    "cut_prompts",
    "samples",
    "items",
    "test_data_hash",
    "eval_environment",
)
COLUMNS = [*RUN_COLUMNS, "setting", "group", *TRAIN_COLUMNS, *HASH_COLUMNS, *EVAL_COLUMNS, *COUNT_COLUMNS]
WHOLE_NUMBERS = [
    *("seed", "trainable_parameters", "base_parameters", "steps", "peak_memory_bytes"),
    *("bits", "protocol_version", "place", "n", "limit", *COUNT_COLUMNS[:5]),
]
NUMBERS = [
    *("size_number", "learning_rate", "percent_of_base", "train_seconds", "final_loss", "held_out_loss"),
    *("held_out_exact_match", "step_seconds", "accuracy", "standard_error"),
]
TYPES = dict.fromkeys(WHOLE_NUMBERS, "Int64") | dict.fromkeys(NUMBERS, "float64")
TEXTS = [
    *("run_id", "model", "method", "label", "size", "task", "rate_chosen", "rate_by", "train_protocol", "loss_on"),
    *("pattern", "quantizer", "setting", "group", "base_hash", "train_data_hash", "benchmark", "metric", "protocol"),
    *("evaluation", "test_data_hash"),
]


def read_run(directory: Path) -> list[dict[str, Any]]:
    """Return the rows of one run, each with its `problems`; an unreadable run has one row with only these.

    Likelihood benchmarks have their own rows, with the metric `NLL`, and enter no mean. A run always has at least one
    other row.
    """
    run = RunPaths(directory)
    try:
        rows = _read_run(run)
        for row in rows:
            _check_types(row)
    except Exception as error:  # one bad file must not prevent the report of the other runs
        return [{"path": directory, "problems": [line_of(run.config, error)]}]
    return rows


def _check_types(row: dict[str, Any]) -> None:
    """Raise a ValueError unless every value fits its column: a misfit would stop the reading of all runs."""
    for column, value in row.items():
        kind = TYPES.get(column)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        fits = isinstance(value, str) if column in TEXTS else number if kind else True
        if kind == "Int64" and number:
            fits = math.isfinite(value) and value == int(value) and abs(value) < 2**63
        if value is not None and not fits:
            what = "text" if column in TEXTS else "a whole number" if kind == "Int64" else "a number"
            raise ValueError(f"{column} is {value!r:.40}, not {what}")


def _read_run(run: RunPaths) -> list[dict[str, Any]]:
    problems: list[str] = []
    config = read_config(run)
    about_run = _about_run(run, config)
    planned = [name_of(name) for name in config.evaluation.benchmarks]
    about_run |= _rate_choice(run, problems)
    trained, training = _training(run, config, problems)
    scores = list(_evaluations(run, config, trained, problems))
    likelihoods = [score for score in scores if score["metric"] == NLL]
    evaluations = [score for score in scores if score["metric"] != NLL]
    scored = {score["benchmark"] for score in scores}
    every, planned = planned, [name for name in planned if not _is_likelihood(name)]
    if config.evaluation.mean:
        evaluations += list(_means(run, evaluations, planned, problems))
    for evaluation in evaluations:
        if evaluation["benchmark"] in planned:
            evaluation["place"] = planned.index(evaluation["benchmark"])
    for benchmark in every:
        if benchmark in scored:
            continue
        problems.append(f"{run.root}: no score for {benchmark}")
        if benchmark in planned:
            evaluations.append({"benchmark": benchmark, "place": planned.index(benchmark)})
        else:
            likelihoods.append({"benchmark": benchmark, "metric": NLL})
    found = [*(evaluations or [{}]), *likelihoods]
    return [about_run | training | evaluation | {"problems": problems} for evaluation in found]


def _is_likelihood(benchmark: str) -> bool:
    try:
        return kind_of(benchmark) == LIKELIHOOD
    except UserError:  # a benchmark of another version of the code
        return False


def _about_run(run: RunPaths, config: RunConfig) -> dict[str, Any]:
    method, quantization = config.method, config.quantization
    adapter = method.adapter or {}
    size = next((key for key in SIZES if adapter.get(key) is not None), None)
    letter = "blocks" if method.name == "smt" else SIZES[size] if size else ""  # SMT's N counts blocks in the model
    pattern = None if size else adapter.get("pattern")
    density = f" {Fraction(adapter['density']).limit_denominator(DENOMINATOR)}" if adapter.get("density") else ""
    return {
        "run_id": run.root.name,
        "path": run.root,
        "model": config.model.name,
        "method": method.name,
        "label": method.label,
        "size": f"{letter}={adapter[size]}" if size else f"{pattern}{density}" if pattern else "",
        "size_number": adapter[size] if size else None,
        "task": config.task.name,
        "seed": config.seed,
        "learning_rate": None if method.trains == "nothing" else config.recipe.learning_rate,
        "train_protocol": config.protocol.name,
        "loss_on": "prompt and answer" if config.protocol.train_on_prompt else "answer",
        "pattern": pattern,
        "quantizer": quantization and quantization.method,
        "bits": quantization and quantization.bits,
        "setting": setting_hash(config.mapping),
        "group": group_hash(config.mapping),
    }


def _rate_choice(run: RunPaths, problems: list[str]) -> dict[str, Any]:
    """Return how the learning rate was chosen, in words and by which rule; empty if the config set it."""
    if not run.learning_rate.is_file():
        return {}
    try:
        choice = read_json(run.learning_rate)
        by, edge = choice["by"], ", at the edge" if choice["at_edge"] else ""
        words = f"best of {len(choice['tried'])} by held-out {by.replace('_', ' ')}{edge}"
    except UNREADABLE as error:
        problems.append(line_of(run.learning_rate, error))
        return {}
    return {"rate_chosen": words, "rate_by": by}


def _training(run: RunPaths, config: RunConfig, problems: list[str]) -> tuple[TrainRecord | None, dict[str, Any]]:
    """Return the training record and the frame's columns from it; (None, {}) if there is no valid record."""
    if run.diverged.is_file():
        try:
            about = read_json(run.diverged)
            problems.append(f"{run.root}: diverged in step {about['step']}: {about['reason']}")
        except UNREADABLE as error:
            problems.append(line_of(run.diverged, error))
        return None, {"final_loss": math.inf}
    if not run.train_record.is_file():
        problems.append(f"{run.root}: not trained, or not to the end")
        return None, {}
    try:
        record = read_record(run.train_record, TrainRecord)
        check_training(run, config, record)
        return record, {
            "trainable_parameters": record.trainable_parameters,
            "base_parameters": record.base_parameters,
            "percent_of_base": 100 * record.trainable_parameters / record.base_parameters,
            "steps": record.steps,
            "train_seconds": record.train_seconds if record.steps else None,
            "final_loss": record.final_loss,
            "held_out_loss": (record.held_out or {}).get("loss"),
            "held_out_exact_match": (record.held_out or {}).get("exact_match"),
            "step_seconds": record.step_seconds,
            "peak_memory_bytes": record.peak_memory_bytes if record.steps else None,
            "base_hash": record.base_hash,
            "train_data_hash": record.data_hash,
            "environment": record.environment,
        }
    except (*UNREADABLE, ZeroDivisionError) as error:
        problems.append(line_of(run.train_record, error))
        return None, {}


def _as_merged(run: RunPaths, config: RunConfig) -> dict[Path, str]:
    """Map the evaluation folders of a run scored unmerged to the names they would have if it had been merged.

    Merging is not part of a protocol, so both belong in one table.
    """
    if config.evaluation.merge:
        return {}
    try:
        own = evaluation_paths(run, config)
        merged = evaluation_paths(run, with_values(config, {"evaluation.merge": True}))
    except UNREADABLE:  # a run of another version: its folders keep their names
        return {}
    pairs = [(paths.root, other.root) for paths, other in zip(own, merged, strict=True)]
    return {root: _name(run, other) for root, other in pairs if not other.exists()}


def _name(run: RunPaths, folder: Path) -> str:
    return folder.relative_to(run.root / "eval").as_posix()


def _evaluations(
    run: RunPaths, config: RunConfig, trained: TrainRecord | None, problems: list[str]
) -> Iterator[dict[str, Any]]:
    """Yield the frame's columns for every evaluation that can be read and belongs to the run's weights."""
    names = _as_merged(run, config)
    for path in sorted(run.root.glob("eval/*/*/score.json")):
        try:
            record = read_record(path, EvalRecord)
            _check_score(path, run, record, trained)
            items = np.array(record.items, dtype=float)
        except UNREADABLE as error:
            problems.append(line_of(path, error))
            continue
        yield {
            "benchmark": record.benchmark,
            "metric": record.metric,
            "protocol": record.protocol,
            "protocol_version": record.protocol_version,
            "evaluation": names.get(path.parent) or _name(run, path.parent),
            "n": record.n,
            "accuracy": record.accuracy,
            "standard_error": record.standard_error,
            "extra_metrics": record.extra_metrics,
            "commits": _commits(record, *([trained] if trained else [])),
            "asked": record.generation,
            "limit": record.generation["limit"],
            "searched": record.searched,
            "unparsed": record.unparsed,
            "fallback": record.fallback,
            "dropped": record.dropped,
            "cut_prompts": record.cut_prompts,
            "samples": record.samples,
            "items": items,
            "test_data_hash": record.data_hash,
            "eval_environment": record.environment,
        }


def _means(
    run: RunPaths, evaluations: Sequence[dict[str, Any]], planned: Sequence[str], problems: list[str]
) -> Iterator[dict[str, Any]]:
    """Yield the unweighted mean over all planned benchmarks, one for each way in which all were scored completely."""
    ways: dict[str, list[dict[str, Any]]] = {}
    for row in evaluations:
        if row["benchmark"] in planned and row["asked"]["limit"] is None:
            ways.setdefault(_way(row), []).append(row)
    for parts in ways.values():
        parts.sort(key=lambda row: planned.index(row["benchmark"]))
        if [row["benchmark"] for row in parts] == list(planned):
            yield _mean(parts)
        else:
            scored = ", ".join(row["evaluation"] for row in parts)
            problems.append(f"{run.root}: no mean over the {len(planned)} benchmarks: equal settings only for {scored}")


def _way(row: dict[str, Any]) -> str:
    """Return a hash of what evaluations in one mean share: protocol and settings, except lengths and stop strings."""
    asked = row["asked"]
    generation = {key: value for key, value in asked["generation"].items() if key not in ("max_new_tokens", "stop")}
    return content_hash([row["protocol"], row["searched"], {**asked, "generation": generation}])


def _mean(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {
        "benchmark": f"mean of {len(parts)}",
        "metric": parts[0]["metric"],
        "protocol": parts[0]["protocol"],
        "protocol_version": parts[0]["protocol_version"],
        "evaluation": "mean: " + ", ".join(row["evaluation"] for row in parts),
        "n": sum(row["n"] for row in parts),
        "accuracy": float(np.mean([row["accuracy"] for row in parts])),
        "standard_error": float(np.sqrt(sum(row["standard_error"] ** 2 for row in parts))) / len(parts),
        "extra_metrics": {},
        "place": len(parts),
        "limit": parts[0]["limit"],
        "commits": sorted({commit for row in parts for commit in row["commits"]}),
        **{count: sum(row[count] for row in parts) for count in COUNT_COLUMNS[:4]},
        "samples": parts[0]["samples"],
        "items": [row["items"] for row in parts],
        "test_data_hash": content_hash([row["test_data_hash"] for row in parts]),
        "eval_environment": parts[0]["eval_environment"],
    }


def _commits(*found: TrainRecord | EvalRecord) -> list[str]:
    """Return the code versions behind the records; "unknown" outside a git checkout, "…, changed" with local edits."""
    about = [record.environment for record in found]
    return sorted({f"{e.get('commit') or 'unknown'}{', changed' if e.get('dirty') else ''}" for e in about})


def _check_score(path: Path, run: RunPaths, record: EvalRecord, trained: TrainRecord | None) -> None:
    """Raise a UserError unless the score is this run's, follows from its files, and is of the trained weights."""
    if record.run_id != run.root.name:
        raise UserError(f"{path}: the score of {record.run_id}: evaluate the run again")
    check_score(EvalPaths(path.parent), record)
    if trained is not None:
        for name in trained.adapter_files.keys() & record.adapter_files.keys():
            if trained.adapter_files[name] != record.adapter_files[name]:
                raise UserError(f"{path}: scored with another {name} than train.json has: evaluate the run again")


def line_of(path: Path, error: BaseException) -> str:
    """Return one line that names the file: our own errors already do, others get its name as prefix."""
    text = " ".join(str(error).split())
    return text if isinstance(error, UserError) else f"{path}: cannot be read ({type(error).__name__}: {text})"
