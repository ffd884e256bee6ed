"""Learning-rate sweeps: all runs of one method at several rates, including failed ones."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import pandas as pd

from analysis.load import names_of, records

QUANTITIES = {"held_out_loss": "held-out loss", "held_out_exact_match": "held-out exact match, %"}
FAILED = {"diverged": "its training loss is not finite", "not trained": "no training record", "not scored": "no score"}


@dataclass(frozen=True)
class Point:
    """One run of a sweep; `failed` is a key of `FAILED` or "", and `value` is NaN if it failed."""

    method: str
    label: str
    learning_rate: float
    seed: int
    value: float
    failed: str


@dataclass(frozen=True)
class Sweep:
    """The runs of one model and task whose labels have several learning rates.

    `quantity` names the points' values; `lower` says whether lower is better; `chosen` maps a label to the learning
    rate that an experiment chose.
    """

    model: str
    task: str
    quantity: str
    lower: bool
    points: list[Point]
    chosen: dict[str, float]

    def labels(self) -> list[str]:
        return list(dict.fromkeys(point.label for point in self.points))

    def by_rate(self, label: str) -> dict[float, list[Point]]:
        """Return the points of a label by learning rate, ascending."""
        points = [point for point in self.points if point.label == label]
        rates = sorted({point.learning_rate for point in points})
        return {rate: [point for point in points if point.learning_rate == rate] for rate in rates}

    def means(self, label: str) -> dict[float, float]:
        """Return the mean over seeds at each learning rate without failed runs."""
        rates = self.by_rate(label).items()
        return {
            rate: fmean(point.value for point in points)
            for rate, points in rates
            if not any(point.failed for point in points)
        }

    def best(self, label: str) -> float | None:
        """Return the chosen rate, else the one with the best mean; None if runs failed at every rate."""
        if label in self.chosen:
            return self.chosen[label]
        means = self.means(label)
        return (min if self.lower else max)(means, key=means.__getitem__) if means else None


def find_sweeps(frame: pd.DataFrame) -> Iterator[Sweep]:
    """Yield the sweeps among the rows of `Runs.frame`, by the quantity that rates were chosen by, else by score.

    With several benchmarks, the task's mean is used, or the first benchmark if there is no mean.
    """
    trained = records(frame.dropna(subset=["learning_rate"]))
    for model, task in sorted({(row["model"], row["task"]) for row in trained}):
        rows = [row for row in trained if (row["model"], row["task"]) == (model, task)]
        names = names_of(rows)
        rows = [row | {"label": names[row["group"]]} for row in rows]
        rates = {row["label"]: set() for row in rows}
        for row in rows:
            rates[row["label"]].add(row["learning_rate"])
        rows = [row for row in rows if len(rates[row["label"]]) > 1]
        if not rows:
            continue
        measure = _measure(rows)
        quantity = QUANTITIES.get(measure)
        if quantity is None:
            scored = [row for row in rows if pd.notna(row["accuracy"])]
            scored.sort(key=lambda row: (not str(row["benchmark"]).startswith("mean of "), _place(row)))
            first = scored[0] if scored else {"benchmark": None, "metric": "accuracy"}
            rows = [row for row in rows if row["benchmark"] == first["benchmark"] or pd.isna(row["accuracy"])]
            quantity = f"{first['metric']} on {first['benchmark']}, %"
        rows.sort(key=lambda row: pd.notna(row["accuracy"]))  # so that a run's score replaces its missing ones below
        points = {row["run_id"]: _point(row, measure) for row in rows}
        chosen = {row["label"]: float(row["learning_rate"]) for row in rows if pd.notna(row["rate_chosen"])}
        order = sorted(points.values(), key=lambda point: (point.method, point.label, point.learning_rate, point.seed))
        yield Sweep(model, task, quantity, measure == "held_out_loss", order, chosen)


def sweep_table(sweep: Sweep) -> pd.DataFrame:
    """Return labels × learning rates as text: each run's value or failure; an asterisk marks `Sweep.best`."""
    layout = "{:.4f}" if sweep.lower else "{:.1f}"
    rows = []
    for label in sweep.labels():
        cells = {
            rate: " · ".join(point.failed or layout.format(point.value) for point in points)
            for rate, points in sweep.by_rate(label).items()
        }
        best = sweep.best(label)
        rows.append({rate: text + (" *" if rate == best else "") for rate, text in cells.items()})
    rates = sorted({point.learning_rate for point in sweep.points})
    texts = {f"{rate:g}": [row.get(rate, "") for row in rows] for rate in rates}
    return pd.DataFrame({"Method": sweep.labels(), **texts})


def failures(sweep: Sweep) -> list[str]:
    """Return one line per failed run."""
    return [
        f"{point.label} at learning rate {point.learning_rate:g}, seed {point.seed}: {FAILED[point.failed]}"
        for point in sweep.points
        if point.failed
    ]


def _measure(rows: Sequence[dict[str, Any]]) -> str:
    """Return the column of a sweep's values: what the rule used, else the held-out loss, else the score."""
    rules = {f"held_out_{row['rate_by']}" for row in rows if pd.notna(row["rate_by"])}
    held_out = rules if len(rules) == 1 else {"held_out_loss"}
    return next((name for name in held_out if any(pd.notna(row[name]) for row in rows)), "accuracy")


def _point(row: dict[str, Any], measure: str) -> Point:
    value = float(row[measure]) * (1 if measure == "held_out_loss" else 100)
    failed = ""
    if math.isinf(row["final_loss"]) or math.isinf(value):
        failed = "diverged"
    elif pd.isna(row["trainable_parameters"]):
        failed = "not trained"
    elif math.isnan(row["final_loss"]):  # a record from before diverged trainings counted as failed
        failed = "diverged"
    elif math.isnan(value):
        failed = "not scored"
    place = (row["method"], row["label"], float(row["learning_rate"]), int(row["seed"]))
    return Point(*place, math.nan if failed else value, failed)


def _place(row: dict[str, Any]) -> int:
    return int(row["place"]) if pd.notna(row["place"]) else 1000  # unplanned benchmarks come last
