"""Figures of the evidence page: differences with intervals, gain against forgetting, learning rates."""

from __future__ import annotations

import math
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from analysis.evidence_runs import BASE, PRIMARY, RETENTION, Comparison, Setting
from analysis.nll import MARGIN
from analysis.plots import BLACK, BLUE, METHOD_COLOURS, METHOD_MARKERS, STYLE, VERMILLION, Picture

COLUMNS = 4  # panels in a row
GREY = "#777777"
RETAINED = "g"  # the question about forgetting, drawn on its own scale


def differences(comparisons: Sequence[Comparison]) -> Picture:
    """Draw a line per comparison: the difference of NLL with its interval, in the colour of its verdict."""
    parts = [[row for row in comparisons if (row.question == RETAINED) == retained] for retained in (False, True)]
    parts = [rows[::-1] for rows in parts if rows]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.6, 1.4 + 0.34 * len(comparisons)), layout="constrained")
        panels = figure.subplots(len(parts), squeeze=False, height_ratios=[len(rows) + 1 for rows in parts])
        for axes, rows in zip(panels.flat, parts, strict=True):
            _draw_differences(axes, rows)
            what = "what is forgotten" if rows[0].question == RETAINED else "GSM8K's test solutions"
            axes.set_xlabel(f"difference of NLL of {what}, nats per token; left of 0 the first is better")
    caption = (
        "All possible comparisons: mean over seeds, 95 % interval over seeds and rows. Blue triangles down: the first "
        f"is better; red triangles up: worse; grey: neither (Holm, 5 %). Grey band: ±{MARGIN} nats. "
        "The lines of (g) show forgetting, on three other kinds of text."
    )
    alt = "Differences of NLL with intervals; the tables have the numbers."
    return Picture("differences", figure, caption, alt)


def _draw_differences(axes: Axes, rows: Sequence[Comparison]) -> None:
    axes.axvspan(-MARGIN, MARGIN, color="#eeeeee", zorder=0)
    axes.axvline(0, color=BLACK, linewidth=0.8)
    for place, row in enumerate(rows):
        gap, said = row.difference, row.verdict
        colour, marker = GREY, "o"
        if said.startswith(("better", "worse")):
            colour, marker = (BLUE, "v") if said.startswith("better") else (VERMILLION, "^")
        axes.plot([gap.low, gap.high], [place, place], color=colour, linewidth=2)
        axes.plot(gap.mean, place, marker=marker, color=colour)
    axes.set_yticks(range(len(rows)), [f"({row.question}) {row.first} − {row.second}" for row in rows])


def trade_off(settings: dict[str, Setting]) -> Picture:
    """Draw each setting's gain on the task against its loss on other text, a point per seed and the mean."""
    base = settings[BASE]
    shown = [setting for name, setting in settings.items() if name != BASE]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.6, 5.2), layout="constrained")
        axes = figure.subplots()
        for number, setting in enumerate(shown):
            colour = METHOD_COLOURS[number % len(METHOD_COLOURS)]
            marker = METHOD_MARKERS[number % len(METHOD_MARKERS)]
            gains = base.nll(PRIMARY) - setting.by_seed(PRIMARY)
            lost = setting.by_seed(*RETENTION) - base.nll(*RETENTION)
            axes.plot(gains, lost, marker, color=colour, fillstyle="none", markersize=5, alpha=0.7)
            label = f"{setting.name} ({setting.percent:.3g} %)"
            axes.plot(gains.mean(), lost.mean(), marker, color=colour, markersize=9, label=label)
        axes.axhline(0, color=BLACK, linewidth=0.8)
        axes.set_xlabel("gained: NLL of GSM8K's test solutions, before − after, nats per token")
        axes.set_ylabel("forgotten: mean NLL of three other texts, after − before")
        axes.legend(frameon=False, fontsize=8, loc="upper right")
    caption = (
        "Bottom right is best. Filled: mean over seeds; open: every seed. Each setting at the learning rate that "
        "was best on held-out rows of the task, which ignores forgetting."
    )
    return Picture("trade_off", figure, caption, "Gain against forgetting per setting; the tables have the numbers.")


def rates(settings: dict[str, Setting]) -> Picture:
    """Draw one panel per setting: the loss on held-out rows over every learning rate tried."""
    shown = [setting for setting in settings.values() if len(setting.tried) > 1]
    lines = max(1, math.ceil(len(shown) / COLUMNS))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.6, 0.8 + 2.2 * lines), layout="constrained")
        panels = figure.subplots(lines, COLUMNS, sharey=True, sharex=True, squeeze=False)
        for axes, setting in zip(panels.flat, shown, strict=False):
            values = np.array(setting.tried, dtype=float)
            axes.plot(values[:, 0], values[:, 1], "o-", color=BLUE, markersize=4)
            if setting.rate is not None:
                axes.axvline(setting.rate, color=BLACK, linestyle=":", linewidth=1)
            axes.set_title(setting.name, fontsize=9)
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.yaxis.set_minor_formatter(NullFormatter())
            axes.set_yticks([0.7, 0.8, 1, 2, 4], ["0.7", "0.8", "1", "2", "4"])
        for axes in list(panels.flat)[len(shown) :]:
            axes.remove()
        figure.supxlabel("learning rate", fontsize=9)
        figure.supylabel("NLL per token of held-out rows", fontsize=9)
    caption = "Seed 0, one run for each learning rate tried; dotted: the chosen one."
    return Picture("rates", figure, caption, "Held-out loss over learning rates; settings.csv has the chosen ones.")
