"""Figures of the evidence page: differences with intervals, gain against forgetting, learning rates."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from analysis.evidence_runs import BASE, OURS, PRIMARY, RETENTION, Comparison, Setting
from analysis.nll import MARGIN
from analysis.plots import BLACK, BLUE, METHOD_COLOURS, METHOD_MARKERS, STYLE, VERMILLION, Picture

COLUMNS = 4  # panels in a row
HIGHEST = 1.3  # loss that is still drawn
GREY = "#777777"
SIZED = re.compile(r"(diablo|lora|dora|pissa|milora)-[Nr]\d+")  # a method and its size, no other difference
RETAINED = "g"  # the question about forgetting, drawn on its own scale


def differences(comparisons: Sequence[Comparison]) -> Picture:
    """Draw a line per comparison: the difference of NLL with its interval, in the colour of its verdict."""
    parts = [[row for row in comparisons if (row.question == RETAINED) == retained] for retained in (False, True)]
    parts = [rows[::-1] for rows in parts if rows]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.6, 1.4 + 0.34 * len(comparisons)), layout="constrained")
        panels = figure.subplots(len(parts), squeeze=False, height_ratios=[len(rows) + 1 for rows in parts])
        for axes, rows in zip(panels.flat, parts, strict=True):
            if rows[0].question != RETAINED:  # equality is registered for the primary measure
                axes.axvspan(-MARGIN, MARGIN, color="#eeeeee", zorder=0)
            _draw_differences(axes, rows)
            what = "what is forgotten" if rows[0].question == RETAINED else "GSM8K's test solutions"
            axes.set_xlabel(f"difference of NLL of {what}, nats per token; left of 0 the first is better")
    caption = (
        "All finished comparisons: mean over seeds, 95 % interval over seeds and rows. Blue triangles down: the first "
        f"is better; red triangles up: worse; grey: neither (Holm, 5 %). Grey band: ±{MARGIN} nats. "
        "The lines of (g) show forgetting, on three other kinds of text."
    )
    alt = "Differences of NLL with intervals; the tables have the numbers."
    return Picture("differences", figure, caption, alt)


def _draw_differences(axes: Axes, rows: Sequence[Comparison]) -> None:
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
    """Draw each setting's gain on the task against its loss on other text: sizes of methods; patterns and modules."""
    sized = {name: setting for name, setting in settings.items() if SIZED.fullmatch(name) or name == "full"}
    others = {name: setting for name, setting in settings.items() if name not in sized and name != BASE}
    if OURS in settings:
        others = {OURS: settings[OURS], **others}
    by_method: dict[str, list[Setting]] = {}
    for name, setting in sorted(sized.items(), key=lambda item: item[1].percent):
        by_method.setdefault(name.partition("-")[0], []).append(setting)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10.4, 6.4), layout="constrained")
        panels = figure.subplots(1, 2, sharex=True, sharey=True)
        groups = ({name: by_method[name] for name in sorted(by_method)}, {name: [one] for name, one in others.items()})
        titles = ("Methods: size, learning rate", "Patterns, modules and losses")
        for axes, group, title in zip(panels, groups, titles, strict=True):
            # A style stands for one thing in both panels; only DiaBlo at N=24 is in both.
            for number, (label, sizes) in enumerate(group.items(), 0 if group is groups[0] else len(by_method) - 1):
                number = 0 if label == OURS else number
                _draw_trade_off(axes, label, sizes, settings[BASE], number)
            axes.axhline(0, color=BLACK, linewidth=0.8)
            axes.set_title(title, fontsize=10)
            axes.legend(frameon=False, fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.05))
        figure.supxlabel("gained: NLL of GSM8K's test solutions, before − after, nats per token", fontsize=9)
        panels[0].set_ylabel("forgotten: mean NLL of three other texts, after − before")
    caption = (
        "Bottom right is best. Filled: mean over seeds; open: every seed. Each setting at the learning rate that "
        "was best on held-out rows of the task, which ignores forgetting."
    )
    return Picture("trade_off", figure, caption, "Gain against forgetting per setting; the tables have the numbers.")


def _draw_trade_off(axes: Axes, label: str, sizes: Sequence[Setting], base: Setting, number: int) -> None:
    """Draw the settings of one method; size and learning rate stand beside each point if there are several."""
    colour, marker = METHOD_COLOURS[number % len(METHOD_COLOURS)], METHOD_MARKERS[number % len(METHOD_MARKERS)]
    means: list[tuple[float, float]] = []
    for setting in sizes:
        gains = base.nll(PRIMARY) - setting.by_seed(PRIMARY)
        lost = setting.by_seed(*RETENTION) - base.nll(*RETENTION)
        axes.plot(gains, lost, marker, color=colour, fillstyle="none", markersize=4, alpha=0.35)
        means.append((float(gains.mean()), float(lost.mean())))
        if len(sizes) > 1:
            size = f"{setting.name.rpartition('-')[2]}, {setting.rate:g}"
            axes.annotate(size, means[-1], xytext=(7, -3), textcoords="offset points", fontsize=8, color=colour)
    axes.plot(*zip(*means, strict=True), marker=marker, color=colour, markersize=8, linestyle="", label=label)


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
            axes.set_ylim(0.69, HIGHEST)
            axes.set_yticks([0.7, 0.8, 0.9, 1, 1.2], ["0.7", "0.8", "0.9", "1", "1.2"])
        for axes in list(panels.flat)[len(shown) :]:
            axes.remove()
        for axes in list(panels.flat)[max(0, len(shown) - COLUMNS) : len(shown)]:
            axes.tick_params(labelbottom=True)
        figure.supxlabel("learning rate", fontsize=9)
        figure.supylabel("NLL per token of held-out rows", fontsize=9)
    caption = f"Seed 0, one run for each learning rate tried; dotted: the chosen one. Above {HIGHEST}: rates.csv."
    return Picture("rates", figure, caption, "Held-out loss over learning rates; settings.csv has the chosen ones.")
