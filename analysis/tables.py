"""The table of methods: what each trained, what it scored with how much uncertainty, and what it took.

`method_table` holds numbers; `display` turns them into the text that Markdown and HTML show, and CSV keeps the numbers.
Rows are sorted by name and size, never by score, and no cell is marked as a winner.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analysis.load import StepTimes, records
from analysis.stats import accuracy_interval

# What one table compares.
SECTION = ["model", "task", "benchmark", "metric", "protocol", "evaluation", "test_data_hash", "n"]
ROW_ORDER = ["model", "task", "benchmark", "evaluation", "method", "size_number", "learning_rate"]
STEP_TIME_COLUMNS = ["step_time_ratio", "step_time_low", "step_time_high"]
COLUMNS = [
    *SECTION,
    *("setting", "method", "label", "size", "size_number", "trainable_parameters", "percent_of_base", "learning_rate"),
    *("accuracy", "low", "high", "interval_over", "by_seed", "seeds", "planned_seeds", "train_seconds"),
    *STEP_TIME_COLUMNS,
]


def method_table(frame: pd.DataFrame, step_times: StepTimes | None = None) -> pd.DataFrame:
    """One row per setting (method, size, learning rate …) and evaluation, with the columns `COLUMNS`.

    `frame` is `Runs.frame`. `accuracy`, `low` and `high` are in [0, 1]; `by_seed` maps a seed to its accuracy; `seeds`
    counts the scored ones and `planned_seeds` all; `train_seconds` is the median over seeds; the step times are
    relative to the frozen model's, for the model they were measured on. What is not there is NaN.
    """
    rows = []
    for section, part in sections(frame):
        for setting, runs in part.groupby("setting", sort=False):
            scored = runs.dropna(subset=["accuracy"]).sort_values("seed")
            first = runs.iloc[0]
            rows.append(
                section
                | {"setting": setting}
                | {name: first[name] for name in ("method", "label", "size", "size_number", "learning_rate")}
                | {name: _known(runs, name) for name in ("trainable_parameters", "percent_of_base")}
                | _accuracy(scored)
                | {"planned_seeds": runs["seed"].nunique(), "train_seconds": runs["train_seconds"].median()}
                | _step_time(step_times, first["model"], first["label"])
            )
    table = pd.DataFrame(rows, columns=pd.Index(COLUMNS))
    table = table.astype({"trainable_parameters": "Int64", "n": "Int64", "size_number": float, "learning_rate": float})
    return table.sort_values(ROW_ORDER, ignore_index=True, na_position="first")


def display(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of `method_table` as text for a reader; what is missing is an empty cell."""
    return pd.DataFrame(
        {
            "Method": table["method"],
            "N / r": table["size"],
            "Trainable": table["trainable_parameters"].map(lambda count: _text(count, "{:,}")),
            "% of base": table["percent_of_base"].map(lambda percent: _text(percent, "{:.3f}")),
            "Learning rate": table["learning_rate"].map(lambda rate: _text(rate, "{:g}")),
            "Score, %": table["accuracy"].map(_percent),
            "95 % interval": [
                _range(_percent(low), _percent(high)) for low, high in zip(table["low"], table["high"], strict=True)
            ],
            "Interval over": table["interval_over"],
            "Each seed, %": [_each_seed(scores) for scores in table["by_seed"]],
            "Seeds": [
                f"{seeds}" if seeds == planned else f"{seeds} of {planned}"
                for seeds, planned in zip(table["seeds"], table["planned_seeds"], strict=True)
            ],
            "Training, s": table["train_seconds"].map(lambda seconds: _text(seconds, "{:,.1f}")),
            "Step time ÷ frozen": [
                f"{middle:.2f} ({low:.2f}–{high:.2f})" if pd.notna(middle) else ""
                for middle, low, high in table[STEP_TIME_COLUMNS].itertuples(index=False)
            ],
        }
    )


def to_markdown(table: pd.DataFrame) -> str:
    """One Markdown table per section, under a heading that names it."""
    return "\n".join(f"## {title}\n\n{markdown(display(section))}" for title, section in by_section(table))


def markdown(body: pd.DataFrame) -> str:
    """A frame of text as a Markdown table: the first column to the left, the others to the right."""
    columns = ["left"] + ["right"] * (body.shape[1] - 1)
    return body.to_markdown(index=False, disable_numparse=True, colalign=columns) + "\n"


def to_csv(table: pd.DataFrame) -> str:
    """The numbers, unrounded, as CSV; `by_seed` as `0=0.85 1=0.84`."""
    pairs = table["by_seed"].map(lambda scores: " ".join(f"{seed}={score}" for seed, score in scores.items()))
    return table.assign(by_seed=pairs).to_csv(index=False)


def by_section(table: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """The rows that may be compared with each other (one model, task, evaluation and test set), with their title."""
    for _, section in table.groupby(SECTION, sort=False, dropna=False):
        first = section.iloc[0]
        metric = f"{first['metric']}, " if first["metric"] != "accuracy" else ""
        benchmark = f"{first['benchmark']} ({metric}protocol {first['protocol']}, {first['n']} items)"
        scored = f"scored on {benchmark}" if pd.notna(first["protocol"]) else "not scored yet"
        yield f"{first['model']} trained on {first['task']}, {scored}", section


def sections(frame: pd.DataFrame) -> Iterator[tuple[dict[str, Any], pd.DataFrame]]:
    """Each section's key with its runs, among them those that are planned for its benchmark and not scored."""
    for _, part in frame.groupby(["model", "task", "benchmark"], dropna=False):
        scored, waiting = part.dropna(subset=["accuracy"]), part.loc[part["accuracy"].isna()]
        for _, runs in scored.groupby(SECTION, dropna=False):
            yield records(runs.filter(SECTION))[0], pd.concat([runs, waiting])
        if scored.empty:
            yield records(waiting.filter(SECTION))[0], waiting


def item_arrays(scored: pd.DataFrame) -> list[NDArray[np.float64]]:
    """The items of runs that answered the same ones, a (runs, n) array per benchmark: a mean has several."""
    by_run = [items if isinstance(items, list) else [items] for items in scored["items"]]
    return [np.stack(part) for part in zip(*by_run, strict=True)]


def _accuracy(scored: pd.DataFrame) -> dict[str, Any]:
    """The cells of the runs of one setting that have a score, one run per seed."""
    if scored.empty:
        return {"interval_over": "", "by_seed": {}, "seeds": 0}
    interval = accuracy_interval(*item_arrays(scored))
    return {
        "accuracy": interval.mean,
        "low": interval.low,
        "high": interval.high,
        "interval_over": interval.over,
        "by_seed": dict(zip(scored["seed"], scored["accuracy"], strict=True)),
        "seeds": len(scored),
    }


def _step_time(times: StepTimes | None, model: str, label: str) -> dict[str, float]:
    if times is None or times.model != model or label not in times.ratios.index:
        return {}
    return dict(zip(STEP_TIME_COLUMNS, times.ratios.loc[label, ["median", "low", "high"]], strict=True))


def _known(runs: pd.DataFrame, column: str) -> Any:
    """The value that all seeds share; None when no seed has it yet."""
    return next(iter(runs[column].dropna()), None)


def _text(value: float, layout: str) -> str:
    return "" if pd.isna(value) else layout.format(value)


def _percent(share: float) -> str:
    return _text(100 * share, "{:.1f}")


def _range(low: str, high: str) -> str:
    return f"{low}–{high}" if low else ""


def _each_seed(scores: dict[int, float]) -> str:
    return " · ".join(f"s{seed} {_percent(score)}" for seed, score in scores.items())
