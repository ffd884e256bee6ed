"""The table of methods: what each trained, its scores with their uncertainty, and its cost.

`method_table` holds numbers; `display` turns them into text for Markdown and HTML, and CSV keeps the numbers.
Rows are sorted by name and size, never by score, and no cell is marked as a winner.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analysis.load import StepTimes, records
from analysis.stats import accuracy_interval
from experiments.progress import WAIT, Bar

# The columns that all rows of one table share.
SECTION = ["model", "task", "benchmark", "metric", "protocol", "evaluation", "test_data_hash", "n"]
ROW_ORDER = ["model", "task", "benchmark", "evaluation", "method", "size_number", "label", "learning_rate"]
OF_A_SETTING = ["place", "method", "label", "size", "pattern", "quantizer", "bits", "loss_on", "group"]
STEP_TIME_COLUMNS = ["step_time_ratio", "step_time_low", "step_time_high"]
COLUMNS = [
    *SECTION,
    *("limit", "setting", *OF_A_SETTING, "size_number"),
    *("trainable_parameters", "percent_of_base", "learning_rate", "rate_chosen"),
    *("accuracy", "low", "high", "interval_over", "by_seed", "seeds", "planned_seeds", "mixed", "train_seconds"),
    *("step_seconds", "peak_memory_bytes"),
    *STEP_TIME_COLUMNS,
]

Row = dict[str, Any]  # of `Runs.frame`, by column

MARKS = {"code versions": "†", "protocols": "‡", "base weights": "§", "training data": "¶", "devices": "‖"}
MEANINGS = {
    "code versions": "The runs behind it were trained or scored by different versions of the code.",
    "protocols": "The runs behind it were trained and scored under different protocols, or several versions of one.",
    "base weights": "The runs behind it started from different base weights, of one model and one quantisation.",
    "training data": "The runs behind it were trained on different rows.",
    "devices": "The runs behind it were trained on different devices, whose rounding differs.",
}


def method_table(frame: pd.DataFrame, step_times: StepTimes | None = None) -> pd.DataFrame:
    """Return one row per setting (method, size, learning rate …) and evaluation, with the columns `COLUMNS`.

    `frame` is `Runs.frame`. `accuracy`, `low` and `high` are in [0, 1]; `by_seed` maps a seed to its accuracy; `seeds`
    counts the scored seeds and `planned_seeds` all; `mixed` lists what differs between the runs behind the score (keys
    of `MARKS`); `train_seconds`, `step_seconds` and `peak_memory_bytes` are medians over seeds; step times are relative
    to the frozen model's, for the model they were measured on. Missing values are NaN.
    """
    rows = []
    parts = [(section, runs) for section, part in sections(frame) for runs in by_setting(records(part))]
    with Bar(total=len(parts), desc="table", unit="row", leave=False, delay=WAIT) as bar:
        for section, runs in parts:
            bar.update()
            scored = sorted((run for run in runs if pd.notna(run["accuracy"])), key=lambda run: run["seed"])
            first = runs[0]
            rows.append(
                section
                | {name: first[name] for name in ("setting", *OF_A_SETTING, "size_number", "learning_rate")}
                | {"rate_chosen": _rate_chosen(runs)}
                | {name: _known(runs, name) for name in ("limit", "trainable_parameters", "percent_of_base")}
                | _accuracy(scored)
                | {"planned_seeds": len({run["seed"] for run in runs}), "mixed": mixed(scored)}
                | {name: _median(runs, name) for name in ("train_seconds", "step_seconds", "peak_memory_bytes")}
                | _step_time(step_times, first["model"], first["label"])
            )
    table = pd.DataFrame(rows, columns=pd.Index(COLUMNS))
    table = table.astype(
        dict.fromkeys(("trainable_parameters", "n", "limit", "place", "bits"), "Int64")
        | dict.fromkeys(("size_number", "learning_rate"), "float64")
    )
    return table.sort_values(ROW_ORDER, ignore_index=True, na_position="first")


def display(table: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of `method_table` as text for readers; missing values are empty cells.

    Quantised bases have a column if there are any, and the tokens in the loss if they differ.
    """
    bases = [f"{row['quantizer']}, {row['bits']} bits" if pd.notna(row["quantizer"]) else "" for row in records(table)]
    return pd.DataFrame(
        {
            "Method": table["method"],
            **({"Quantised base": bases} if any(bases) else {}),
            "N / r": table["size"],
            **({"Loss on": table["loss_on"]} if len(set(table["loss_on"])) > 1 else {}),
            "Score, %": [
                _percent(mean) + marks(mixed) for mean, mixed in zip(table["accuracy"], table["mixed"], strict=True)
            ],
            "95 % interval": [
                _range(_percent(low), _percent(high)) for low, high in zip(table["low"], table["high"], strict=True)
            ],
            "Interval over": table["interval_over"],
            "Each seed, %": [each_seed(scores) for scores in table["by_seed"]],
            "Seeds": [
                f"{seeds}" if seeds == planned else f"{seeds} of {planned}"
                for seeds, planned in zip(table["seeds"], table["planned_seeds"], strict=True)
            ],
            "Trainable": table["trainable_parameters"].map(lambda count: _text(count, "{:,}")),
            "% of base": table["percent_of_base"].map(lambda percent: _text(percent, "{:.3f}")),
            "Learning rate": table["learning_rate"].map(lambda rate: _text(rate, "{:g}")),
            "Rate chosen": table["rate_chosen"],
            "Training, s": table["train_seconds"].map(lambda seconds: _text(seconds, "{:,.1f}")),
            "Step time ÷ frozen": [
                f"{middle:.2f} ({low:.2f}–{high:.2f})" if pd.notna(middle) else ""
                for middle, low, high in table[STEP_TIME_COLUMNS].itertuples(index=False)
            ],
        }
    )


def to_markdown(table: pd.DataFrame) -> str:
    """Return the wide tables, one table per section under its heading, and the meaning of the marks."""
    parts = [(title, wide) for title, wide in wide_tables(table)]
    parts += [(title, display(section)) for title, section in by_section(table)]
    return with_legend(parts, table)


def with_legend(parts: Iterable[tuple[str, pd.DataFrame]], table: pd.DataFrame) -> str:
    """Return titled text tables as Markdown, with the meaning of the marks in the column `mixed` of `table`."""
    texts = [f"## {_plain(title)}\n\n{markdown(body)}" for title, body in parts]
    return "\n".join([*texts, *(f"{line}\n" for line in legend(table["mixed"]))])


def legend(mixed: Iterable[Sequence[str]]) -> list[str]:
    """Return a line for each mark that `mixed` uses."""
    found = {name for names in mixed for name in names}
    return [f"{sign} {MEANINGS[name]}" for name, sign in MARKS.items() if name in found]


def markdown(body: pd.DataFrame) -> str:
    """Return a frame of text as a Markdown table: the first column left-aligned, the others right-aligned."""
    columns = ["left"] + ["right"] * (body.shape[1] - 1)
    body = body.map(_plain).rename(columns=_plain)
    return body.to_markdown(index=False, disable_numparse=True, colalign=columns) + "\n"


def _plain(cell: Any) -> Any:
    """Escape text so that it contains no HTML and does not end its column or row."""
    if not isinstance(cell, str):
        return cell
    return re.sub(r"<(?=[A-Za-z/!?])", "&lt;", re.sub(r"\s", " ", cell)).replace("|", "\\|")


def csv_text(table: pd.DataFrame) -> str:
    """Return a frame as CSV. Text that a spreadsheet would read as a formula gets a leading apostrophe."""
    texts = [name for name in table if not pd.api.types.is_numeric_dtype(table[name])]
    return table.assign(**{str(name): table[name].map(_no_formula) for name in texts}).to_csv(index=False)


def _no_formula(cell: Any) -> Any:
    if not isinstance(cell, str) or not cell.startswith(("=", "+", "-", "@", "\t", "\r")):
        return cell
    try:
        float(cell)
    except ValueError:
        return f"'{cell}"
    return cell


def to_csv(table: pd.DataFrame) -> str:
    """Return the unrounded numbers as CSV; `by_seed` as `0=0.85 1=0.84`."""
    pairs = table["by_seed"].map(lambda scores: " ".join(f"{seed}={score}" for seed, score in scores.items()))
    return csv_text(table.assign(by_seed=pairs, mixed=table["mixed"].map("; ".join)))


def wide_tables(table: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """Yield methods × benchmarks, with a title, for each task whose runs were scored on several benchmarks.

    `table` is `method_table`'s. Rows are settings; columns are the benchmarks and their mean, if the task has one, each
    cell with its 95 % interval. A benchmark scored with several settings has a column for each. Missing values are
    empty cells; a method without any score has a row of empty cells.
    """
    scored = table.dropna(subset=["protocol"])
    for _, part in scored.groupby(["model", "task", "protocol"], sort=False):
        single = part.loc[~part["benchmark"].str.startswith("mean of ")]
        if single["benchmark"].nunique() < 2:
            continue
        ways = records(part.drop_duplicates(SECTION).sort_values(["place", "evaluation"]))
        settings = part.drop_duplicates("setting").sort_values(["method", "size_number", "label", "learning_rate"])
        shown = display(settings).reset_index(drop=True)
        wide = shown.filter(["Method", "Quantised base", "N / r", "Loss on"])
        for way in ways:
            cells = {row["setting"]: _cell(row) for row in records(part) if _same(row, way)}
            wide[_heading(way, ways)] = [cells.get(setting, "") for setting in settings["setting"]]
        wide = wide.join(shown.filter(["Trainable", "% of base", "Learning rate", "Rate chosen"]))
        first = part.iloc[0]
        yield f"{first['model']} trained on {first['task']}, all benchmarks, protocol {first['protocol']}", wide


def marks(mixed: Sequence[str]) -> str:
    """Return the signs after a number whose runs differ in what `mixed` names."""
    return "".join(f" {MARKS[name]}" for name in mixed)


def by_section(table: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """Yield the rows that may be compared (one model, task, evaluation and test set), with their title."""
    for _, section in table.groupby(SECTION, sort=False, dropna=False):
        first = section.iloc[0]
        metric = f"{first['metric']}, " if first["metric"] != "accuracy" else ""
        benchmark = f"{first['benchmark']} ({metric}protocol {first['protocol']}, {first['n']} items)"
        scored = f"scored on {benchmark}" if pd.notna(first["protocol"]) else "not scored yet"
        yield f"{first['model']} trained on {first['task']}, {scored}", section


def sections(frame: pd.DataFrame) -> Iterator[tuple[dict[str, Any], pd.DataFrame]]:
    """Yield each section's key with its runs, including those planned for its benchmark but not scored."""
    for _, part in frame.groupby(["model", "task", "benchmark"], dropna=False):
        scored, waiting = part.dropna(subset=["accuracy"]), part.loc[part["accuracy"].isna()]
        for _, runs in scored.groupby(SECTION, dropna=False):
            yield records(runs.filter(SECTION))[0], pd.concat([runs, waiting])
        if scored.empty:
            yield records(waiting.filter(SECTION))[0], waiting


def by_setting(rows: Iterable[Row]) -> list[list[Row]]:
    """Return the rows of each setting, settings by their first row. A frame per setting would be many times slower."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["setting"], []).append(row)
    return list(found.values())


def item_arrays(scored: Iterable[Row]) -> list[NDArray[np.float64]]:
    """Return the items of runs that answered the same ones, a (runs, n) array per benchmark; means have several."""
    by_run = [run["items"] if isinstance(run["items"], list) else [run["items"]] for run in scored]
    return [np.stack(part) for part in zip(*by_run, strict=True)]


def _accuracy(scored: Sequence[Row]) -> Row:
    """Return the accuracy cells for the scored runs of one setting, one run per seed."""
    if not scored:
        return {"interval_over": "", "by_seed": {}, "seeds": 0}
    interval = accuracy_interval(*item_arrays(scored))
    return {
        "accuracy": interval.mean,
        "low": interval.low,
        "high": interval.high,
        "interval_over": interval.over,
        "by_seed": {run["seed"]: run["accuracy"] for run in scored},
        "seeds": len(scored),
    }


def _rate_chosen(runs: Sequence[Row]) -> str:
    """Return how the learning rate of a setting was chosen; "given" if its config sets it."""
    if _known(runs, "learning_rate") is None:
        return ""
    return "; ".join(dict.fromkeys(run["rate_chosen"] for run in runs if pd.notna(run["rate_chosen"]))) or "given"


def _step_time(times: StepTimes | None, model: str, label: str) -> dict[str, float]:
    if times is None or times.model != model or label not in times.ratios.index:
        return {}
    return dict(zip(STEP_TIME_COLUMNS, times.ratios.loc[label, ["median", "low", "high"]], strict=True))


def mixed(scored: Sequence[Row]) -> list[str]:
    """Return in what scored runs differ: the keys of `MARKS` that apply."""
    trained = [run for run in scored if pd.notna(run["trainable_parameters"]) and run["trainable_parameters"] > 0]
    protocols = {(run["protocol"], run["protocol_version"]) for run in scored}
    protocols |= {
        (run["train_protocol"], scored[0]["protocol_version"]) for run in trained if pd.notna(run["train_protocol"])
    }
    weights: dict[str, set[str]] = {}
    for run in scored:
        if pd.notna(run["base_hash"]):
            weights.setdefault(f"{run['quantizer']} {run['bits']}", set()).add(run["base_hash"])
    counts = {
        "code versions": len({commit for run in scored for commit in run["commits"]}),
        "protocols": len(protocols),
        "base weights": max(map(len, weights.values()), default=0),
        "training data": len({run["train_data_hash"] for run in trained}),
        "devices": len({str(run["environment"].get("device")).partition(",")[0] for run in trained}),
    }
    return [name for name in MARKS if counts[name] > 1]


def _same(row: dict[str, Any], way: dict[str, Any]) -> bool:
    return all(row[name] == way[name] for name in SECTION)


def _heading(way: dict[str, Any], ways: Sequence[dict[str, Any]]) -> str:
    """Return a column's heading: the benchmark, with its settings if it was scored with several."""
    alike = sum(other["benchmark"] == way["benchmark"] for other in ways)
    name = way["benchmark"] if alike == 1 else f"{way['evaluation']}, test data {way['test_data_hash'][:6]}"
    metric = f", {way['metric']}" if way["metric"] != "accuracy" else ""
    return f"{name}{metric}, %"


def _cell(row: dict[str, Any]) -> str:
    if pd.isna(row["accuracy"]):
        return ""
    missing = f", {row['seeds']} of {row['planned_seeds']} seeds" if row["seeds"] < row["planned_seeds"] else ""
    interval = _range(_percent(row["low"]), _percent(row["high"]))
    return f"{_percent(row['accuracy'])} ({interval}){missing}{marks(row['mixed'])}"


def _known(runs: Sequence[Row], column: str) -> Any:
    """Return the value that all seeds share; None if no seed has one yet."""
    return next((run[column] for run in runs if pd.notna(run[column])), None)


def _median(runs: Sequence[Row], column: str) -> float:
    values = [run[column] for run in runs if pd.notna(run[column])]
    return float(np.median(values)) if values else math.nan


def _text(value: float, layout: str) -> str:
    return "" if pd.isna(value) else layout.format(value)


def _percent(share: float) -> str:
    return _text(100 * share, "{:.1f}")


def _range(low: str, high: str) -> str:
    return f"{low}–{high}" if low else ""


def each_seed(scores: dict[int, float]) -> str:
    return " · ".join(f"s{seed} {_percent(score)}" for seed, score in scores.items())
