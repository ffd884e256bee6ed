"""Figures of sweeps: learning rates, sparse patterns and quantised bases, step time and memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from analysis.load import records
from analysis.plots import BLACK, BLUE, METHOD_COLOURS, METHOD_MARKERS, STYLE, VERMILLION, Picture
from analysis.sweeps import Sweep

COLUMNS = 4  # panels in a row, at most


def learning_rates(name: str, sweep: Sweep, methods: Sequence[str]) -> Picture:
    """Draw one panel per label: every run as an open marker, a line through the means, crosses for failed runs.

    `methods` is every method of the page in a fixed order, as in `plots.accuracy_by_parameters`.
    """
    labels = sweep.labels()
    lines = math.ceil(len(labels) / COLUMNS)
    columns = math.ceil(len(labels) / lines)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.6, 0.8 + 2.3 * lines), layout="constrained")
        panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
        for number, axes in enumerate(panels.flat):
            if number >= len(labels):
                axes.remove()
                continue
            _draw_rates(axes, sweep, labels[number], methods)
        failed = sum(bool(point.failed) for point in sweep.points)
        if sweep.lower:  # the loss at too large a rate is an order of magnitude higher
            panels[0, 0].set_yscale("log")
        if failed:  # room below every value for the crosses
            bottom, top = panels[0, 0].get_ylim()
            below = bottom * (bottom / top) ** 0.15 if sweep.lower else bottom - 0.15 * (top - bottom)
            panels[0, 0].set_ylim(below, top)
        for axes in panels[:, 0]:
            axes.set_ylabel(sweep.quantity)
        for number, axes in enumerate(panels.flat):
            if number + columns >= len(labels):  # no panel below it
                axes.set_xlabel("learning rate")
                axes.tick_params(labelbottom=True)
    caption = (
        f"{sweep.model} trained on {sweep.task}, {sweep.quantity} over the learning rate. Open markers: every run; "
        f"line: means over seeds; dotted: the chosen one, or the best mean. {failed} runs failed"
        f"{' (crosses)' if failed else ''}."
    )
    alt = f"{sweep.quantity} over the learning rate for {', '.join(labels)}; the table has the numbers."
    return Picture(name, figure, caption, alt)


def accuracy_by_setting(name: str, title: str, table: pd.DataFrame) -> Picture:
    """Draw one section of `method_table`, a line per setting: mean, 95 % interval, and every seed's point.

    For settings without an order by size: sparse patterns, quantised bases. DiaBlo has its own colour and marker.
    """
    rows = records(table.dropna(subset=["accuracy"]))[::-1]  # the first on top
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.6, 1.0 + 0.42 * len(rows)), layout="constrained")
        axes = figure.subplots()
        for place, row in enumerate(rows):
            diagonal = row["method"] == "diablo" or row["pattern"] == "diagonal"
            colour, marker = (VERMILLION, "D") if diagonal else (BLUE, "o")
            mean, low, high = (100 * row[key] for key in ("accuracy", "low", "high"))
            axes.errorbar(mean, place, xerr=[[mean - low], [high - mean]], color=colour, capsize=3, zorder=3)
            axes.plot(mean, place, marker, color=colour, markersize=7, zorder=4)
            scores = [100 * score for score in row["by_seed"].values()]
            axes.plot(scores, [place - 0.25] * len(scores), marker, color=colour, markersize=4, markerfacecolor="white")
        axes.set_yticks(range(len(rows)), [row["label"] for row in rows])
        axes.set_ylim(-0.6, len(rows) - 0.4)
        axes.set_xlabel(f"{rows[0]['metric']}, %")
    over = ", or ".join(sorted({row["interval_over"] for row in rows}))
    caption = (
        f"{title}. Filled marker: mean over seeds; open markers below it: each seed; bar: 95 % interval over {over}. "
        f"DiaBlo has diamonds. The axis does not start at 0."
    )
    return Picture(
        name, figure, caption, f"Accuracy of {', '.join(row['label'] for row in rows)}; the table has the numbers."
    )


def time_and_memory(name: str, title: str, runs: pd.DataFrame) -> Picture:
    """Draw median step time and peak memory of every trained run, a line per label.

    `runs` is `Runs.frame` of one task. The time axis starts at 0, the memory axis does not. On a GPU the memory is the
    device's, elsewhere the process's, which includes Python.
    """
    trained = runs.dropna(subset=["step_seconds"]).drop_duplicates("run_id")
    trained = trained.sort_values(["method", "size_number", "label", "seed"])
    by_label = {str(label): part for label, part in trained.groupby("label", sort=False)}
    labels = list(by_label)[::-1]
    machines = sorted({str(environment.get("device")) for environment in trained["environment"]})
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.6, 1.0 + 0.32 * len(labels)), layout="constrained")
        time, memory = figure.subplots(1, 2, sharey=True)
        for axes, column, scale, words in (
            (time, "step_seconds", 1e3, "time of an optimizer step, ms"),
            (memory, "peak_memory_bytes", 1 / 2**20, "peak memory, MiB"),
        ):
            for place, label in enumerate(labels):
                values = scale * by_label[label][column].to_numpy(dtype=float)
                axes.plot(values, [place] * len(values), "o", color=BLUE, markersize=5, markerfacecolor="white")
                axes.plot(np.median(values), place, "|", color=BLACK, markersize=13, markeredgewidth=1.8)
            axes.margins(x=0.08)
            axes.set_xlabel(words)
        time.set_xlim(left=0)
        time.set_yticks(range(len(labels)), labels)
    caption = (
        f"{title}: median time of an optimizer step and peak memory while training. Open markers: every run; bar: "
        f"their median. The memory axis does not start at 0. Measured on {'; '.join(machines)}."
    )
    return Picture(name, figure, caption, f"Step time and peak memory of {', '.join(labels)}.")


def _draw_rates(axes: Axes, sweep: Sweep, label: str, methods: Sequence[str]) -> None:
    points = [point for point in sweep.points if point.label == label]
    place = list(methods).index(points[0].method)
    colour, marker = METHOD_COLOURS[place % len(METHOD_COLOURS)], METHOD_MARKERS[place % len(METHOD_MARKERS)]
    axes.set_title(label, fontsize=9)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    style: dict[str, Any] = {"color": colour, "markersize": 5, "markerfacecolor": "white", "linestyle": "none"}
    axes.plot([point.learning_rate for point in points], [point.value for point in points], marker, **style)
    means, best = sweep.means(label), sweep.best(label)
    axes.plot(list(means), list(means.values()), color=colour, linewidth=1)
    if best is not None:
        axes.axvline(best, color=BLACK, linewidth=1, linestyle="dotted")
    failed = [point.learning_rate for point in points if point.failed]
    height = axes.get_xaxis_transform()  # y in shares of the panel
    axes.plot(failed, [0.06] * len(failed), "x", color=BLACK, markersize=6, transform=height)
