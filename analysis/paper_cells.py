"""Selects the runs that correspond to a published number, and computes their numbers.

A run matches a published row if it has the row's model, method, size or pattern, and quantised base, was trained with
the loss on the same tokens, and was scored completely by the wanted protocol.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import hypergeom

from analysis.load import records
from analysis.stats import accuracy_interval
from analysis.tables import item_arrays

EMPTY: dict[str, Any] = dict.fromkeys(
    (
        *("ours", "low", "high", "interval_over", "by_seed", "seeds", "learning_rate", "rate_chosen"),
        *("mixed", "difference"),
    )
)


@dataclass(frozen=True)
class Wanted:
    """Selects our runs for a column: scored by one of these protocols, trained with the loss on these tokens."""

    protocols: tuple[str, ...]
    loss_on: str = ""  # empty: any


def matching(frame: pd.DataFrame, row: dict[str, Any]) -> pd.DataFrame:
    """Return our rows with the model, method, size or pattern, and quantised base of a published row."""
    same = frame["method"] == row["method"]
    if row["model"]:
        same &= frame["model"] == row["model"]
    if row["setting"]:
        same &= frame["size"] == row["setting"]
    same &= frame["quantizer"].astype("string").fillna("") == row["quantizer"]
    return frame.loc[same & (frame["bits"].astype("string").fillna("") == row["bits"])]


def score_cell(ours: pd.DataFrame, scored: pd.DataFrame, row: dict[str, Any], wanted: Wanted) -> dict[str, Any]:
    """Return our numbers for one published score, in percent: the keys of `EMPTY`, None where there is none.

    Args:
        ours: rows of `Runs.frame`.
        scored: `method_table` of them.

    If several settings match, those whose learning rate an experiment chose come first, then those with more seeds.
    Several learning rates, none of them chosen, give no number: picking one would be choosing by score.
    """
    if scored.empty:
        return dict(EMPTY)
    benchmark, _, metric = row["benchmark"].partition(" pass@")
    found = matching(scored.dropna(subset=["accuracy"]), row)
    found = found.loc[(found["benchmark"] == benchmark) & found["protocol"].isin(wanted.protocols)]
    found = found.loc[found["limit"].isna()]
    if wanted.loss_on:
        found = found.loc[found["loss_on"] == wanted.loss_on]
    chosen = found.loc[found["rate_chosen"].str.startswith("best of")]
    found = found if chosen.empty else chosen
    if found.empty or (chosen.empty and found["learning_rate"].nunique() > 1):
        return dict(EMPTY)
    best = records(found.sort_values("seeds", ascending=False, kind="stable"))[0]
    cell = {key: best[key] for key in ("interval_over", "seeds", "learning_rate", "rate_chosen", "by_seed", "mixed")}
    mean, low, high = best["accuracy"], best["low"], best["high"]
    if metric not in ("", "1"):
        runs = ours.loc[(ours["setting"] == best["setting"]) & (ours["evaluation"] == best["evaluation"])]
        runs = runs.loc[(runs["benchmark"] == benchmark) & (runs["test_data_hash"] == best["test_data_hash"])]
        items = _pass_at(runs, int(metric))
        if items is None:
            return dict(EMPTY)
        interval = accuracy_interval(items)
        mean, low, high = interval.mean, interval.low, interval.high
        cell |= {"interval_over": interval.over, "by_seed": dict(zip(runs["seed"], items.mean(axis=1), strict=True))}
    return cell | {"ours": 100 * mean, "low": 100 * low, "high": 100 * high, "difference": 100 * mean - row["value"]}


def _pass_at(scored: pd.DataFrame, k: int) -> np.ndarray | None:
    """Return pass@k of every problem for each run of a setting; None if a problem has fewer than k completions.

    A problem's item is the share of its completions that are right, which determines pass@k.
    """
    runs = records(scored)
    counts = {int(run["samples"]) for run in runs}
    samples = min(counts, default=0)
    if len(counts) != 1 or samples < k:
        return None
    (items,) = item_arrays(runs)
    right = np.round(items * samples).astype(int)
    return np.asarray(hypergeom.sf(0, samples, right, k))  # at least one right among k drawn without replacement


def time_ratio(ours: pd.DataFrame, row: dict[str, Any], place: str) -> tuple[float, str] | None:
    """Return our median step time of a method over that of the diagonal blocks, and both labels.

    `place` is "model task". If the published row names no size, the pair of settings nearest in size is used. Both must
    have been trained on one machine.
    """
    trained = ours.loc[(ours["model"] + " " + ours["task"]) == place]
    trained = trained.dropna(subset=["step_seconds"]).drop_duplicates("run_id")
    method = matching(trained, row)
    diagonal = trained.loc[(trained["method"] == "diablo") | (trained["pattern"] == "diagonal")]
    if row["table"] == "sparse_patterns":
        diagonal = trained.loc[trained["pattern"] == "diagonal"]
    if row["method"] == "diablo":
        method = diagonal
    sides = [
        [(runs["trainable_parameters"].iloc[0], runs) for _, runs in part.groupby("setting")]
        for part in (method, diagonal)
    ]
    pairs = [
        (abs(size - other_size), number, one, other)
        for number, ((size, one), (other_size, other)) in enumerate(itertools.product(*sides))
    ]
    if not pairs:
        return None
    _, _, one, other = min(pairs, key=lambda pair: pair[:2])
    machines = {environment.get("device") for part in (one, other) for environment in part["environment"]}
    if len(machines) > 1:
        return None
    labels = f"{one['label'].iloc[0]} over {other['label'].iloc[0]}"
    return float(np.median(one["step_seconds"]) / np.median(other["step_seconds"])), labels
