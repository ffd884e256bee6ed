"""Figures as matplotlib `Figure` objects: no pyplot, no global state, no display.

Colours are Okabe and Ito's, which colour-blind readers can distinguish; every method and every matrix also has its own
marker, so that figures work in greyscale.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullLocator
from matplotlib.transforms import offset_copy
from scipy.optimize import isotonic_regression

from analysis.load import records

# Okabe and Ito 2008, without yellow, which is hard to see on white.
BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
BLUE, VERMILLION, PURPLE = "#0072B2", "#D55E00", "#CC79A7"
METHOD_COLOURS = (BLUE, ORANGE, GREEN, BLACK, VERMILLION, PURPLE, SKY)
METHOD_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")  # 8 markers on 7 colours: 56 methods before a pair repeats
MATRICES = {"lora_A": "A", "lora_B": "B", "diablo_blocks": "D"}  # in a tensor's name -> in the papers
WINDOW = 20
MATRIX_STYLES = {"A": (ORANGE, "o"), "B": (BLUE, "s"), "D": (BLACK, "^")}  # light, medium and dark in greyscale
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "svg.hashsalt": "diablo",  # makes a figure's file reproducible
}


@dataclass(frozen=True)
class Picture:
    """A figure with its texts: `name` of its files, `caption` below it, `alt` as its alternative text."""

    name: str
    figure: Figure
    caption: str
    alt: str

    def _repr_png_(self) -> bytes:
        """Return the PNG that a notebook shows."""
        image = io.BytesIO()
        with matplotlib.rc_context(STYLE):
            self.figure.savefig(image, format="png", dpi=110)
        return image.getvalue()


@dataclass(frozen=True)
class Trace:
    """The gradient norms of one run: `norms` is `load_metrics`' frame, indexed by step, a column per trained tensor."""

    label: str
    seed: int
    learning_rate: float
    norms: pd.DataFrame


def gradient_norms(name: str, model: str, task: str, traces: Sequence[Trace]) -> Picture:
    """Draw the gradient norms of LoRA's A and B and DiaBlo's D over the steps, for an early, a middle and a late layer.

    Below each panel is the running variance of the norms, over the last `WINDOW` logged steps (a fifth of a short run).
    Uses the first module, in the model's order, that all `traces` adapt. The first seed of a label is drawn solid, the
    others faint. ValueError if they have no module in common.
    """
    columns = [_matrices(trace.norms) for trace in traces]
    common = set.intersection(*({module for _, module, _ in matrices} for matrices in columns))
    if not common:
        raise ValueError(f"{', '.join(trace.label for trace in traces)} adapt no module in common")
    module = next(module for _, module, _ in columns[0] if module in common)
    layers = sorted({layer for matrices in columns for layer, found, _ in matrices if found == module})
    layers = sorted({layers[0], layers[len(layers) // 2], layers[-1]})
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.6, 5.2), layout="constrained")
        panels, below = figure.subplots(2, len(layers), sharex=True, sharey="row", squeeze=False, height_ratios=(3, 2))
        window = max(3, min(WINDOW, min(len(trace.norms) for trace in traces) // 5))
        for axes, under, layer in zip(panels, below, layers, strict=True):
            axes.set_title(f"layer {layer}, {module}", fontsize=9)
            axes.set_yscale("log")
            under.set_yscale("log")
            under.set_xlabel("optimizer step")
            _draw_norms(axes, layer, module, traces, columns)
            _draw_norms(under, layer, module, traces, columns, window)
        panels[0].set_ylabel("gradient norm, before clipping")
        below[0].set_ylabel(f"its variance over\n{window} logged steps")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    rates = ", ".join(f"{trace.label} {trace.learning_rate:g}" for trace in _one_per_label(traces))
    seeds = sorted({trace.seed for trace in traces})
    zeros = sum(
        np.count_nonzero(trace.norms[column] == 0)
        for trace, matrices in zip(traces, columns, strict=True)
        for (layer, found, _), column in matrices.items()
        if found == module and layer in layers
    )
    caption = (
        f"{model}, fine-tuned on {task}: Frobenius norm of the gradient of each matrix of {module} before clipping, at "
        f"every step that was kept, and below it its running variance; log scales, axes shared. Learning rates: "
        f"{rates}. "
        f"{_seeds_drawn(seeds)}"
    )
    if zeros:
        caption += f" {zeros} norms of exactly 0 have no place on a log scale (A's gradient is 0 as long as B is)."
    last = traces[0].norms.index.max()
    alt = f"Line plots of gradient norm up to step {last} for {', '.join(labels)} in layers {layers}."
    return Picture(name, figure, caption, alt)


def accuracy_by_parameters(name: str, title: str, table: pd.DataFrame, methods: Sequence[str]) -> Picture:
    """Draw accuracy against trainable parameters, with every seed's point, for one section of `method_table`.

    `methods` is every method of the page in a fixed order, which gives each the same colour and marker in all figures.
    A setting without trained parameters (the base model) is a horizontal line, or a text in the legend if it lies so
    far off that drawing it would squeeze the rest. ValueError if no trained setting has a score.
    """
    scored = records(table.dropna(subset=["accuracy", "trainable_parameters"]))
    trained = [row for row in scored if row["trainable_parameters"] > 0]
    if not trained:
        raise ValueError("no trained setting has a score")
    sizes_of = {method: sum(row["method"] == method for row in trained) for method in methods}
    bottom, top = _limits(trained)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.6, 4.4), layout="constrained")
        axes = figure.subplots()
        axes.set_xscale("log")
        axes.set_ylim(bottom, top)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("trainable parameters (log scale)")
        axes.set_ylabel(f"{trained[0]['metric']}, %")
        places = _side_by_side([row["trainable_parameters"] for row in trained])
        axes.set_xlim(0.7 * min(places), 1.4 * max(places))  # if all sizes are equal, matplotlib's limits collapse
        for row, place in zip(trained, places, strict=True):
            _draw_setting(figure, axes, row, place, methods.index(row["method"]), sizes_of[row["method"]] > 1)
        for row in scored:
            level = 100 * row["accuracy"]
            if row["trainable_parameters"] == 0 and bottom < level < top:
                axes.axhline(level, color="#555555", linestyle="dashed", linewidth=1, label=row["label"])
            elif row["trainable_parameters"] == 0:
                axes.plot([], [], " ", label=f"{row['label']}: {level:.1f} %,\noff this axis")
        entries = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))  # each label once
        axes.legend(entries.values(), entries.keys(), loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    over = ", or ".join(sorted({row["interval_over"] for row in trained}))
    caption = (
        f"{title}. Filled marker: mean over seeds; open markers beside it: each seed; bar: 95 % interval over {over}. "
        f"Settings of nearly the same size are drawn side by side, and a thin line leads to their size. The accuracy "
        f"axis does not start at 0."
    )
    labels = ", ".join(row["label"] for row in scored)
    alt = f"Accuracy against trainable parameters for {labels}; the table above has the numbers."
    return Picture(name, figure, caption, alt)


def save(picture: Picture, folder: Path) -> tuple[Path, Path]:
    """Write `<name>.svg` and `<name>.png` (200 dpi) into `folder` and return both paths."""
    folder.mkdir(parents=True, exist_ok=True)
    svg, png = folder / f"{picture.name}.svg", folder / f"{picture.name}.png"
    with matplotlib.rc_context(STYLE):
        picture.figure.draw_without_rendering()
        picture.figure.set_layout_engine("none")  # it has the places by now, and would find them anew for each file
        picture.figure.savefig(svg, metadata={"Date": None})
        picture.figure.savefig(png, dpi=200)
    return svg, png


def _matrices(norms: pd.DataFrame) -> dict[tuple[int, str, str], str]:
    """Return (layer, module, matrix) → column for the LoRA and DiaBlo matrices in numbered layers."""
    found = {}
    for column in norms.columns:
        match = re.search(rf"\.(\d+)\.(.+)\.({'|'.join(MATRICES)})\b", column)
        if match:
            found[int(match[1]), match[2].rpartition(".")[2], MATRICES[match[3]]] = column
    return found


def _draw_norms(
    axes: Axes,
    layer: int,
    module: str,
    traces: Sequence[Trace],
    columns: Sequence[dict[tuple[int, str, str], str]],
    window: int | None = None,
) -> None:
    """Draw the norms of one layer's matrices; with a `window`, their running variance over that many steps."""
    first = {trace.label: trace.seed for trace in reversed(traces)}
    for trace, matrices in zip(traces, columns, strict=True):
        for number, (matrix, (colour, marker)) in enumerate(MATRIX_STYLES.items()):
            column = matrices.get((layer, module, matrix))
            if column is None:
                continue
            norm = trace.norms[column]
            shown = norm.rolling(window).var() if window else norm
            norm = pd.Series(shown).mask(norm <= 0)  # zero has no logarithm
            if trace.seed != first[trace.label]:
                axes.plot(norm.index, norm, color=colour, linewidth=0.6, alpha=0.35, zorder=2)
                continue
            every = max(1, len(norm) // 8)
            axes.plot(
                norm.index,
                norm,
                color=colour,
                linewidth=0.9,
                marker=marker,
                markevery=(number * every // 3, every),  # staggered, so that markers of two curves do not overlap
                markersize=5,
                markerfacecolor="white",
                zorder=3,
                label=f"{trace.label}: {matrix}",
            )


def _limits(rows: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """Return the limits of the accuracy axis, in percent: all intervals and seeds, with room below for the lines."""
    values = [100 * value for row in rows for value in (row["low"], row["high"], *row["by_seed"].values())]
    room = max(max(values) - min(values), 2.0)
    return min(values) - 0.25 * room, max(values) + 0.15 * room


def _draw_setting(
    figure: Figure, axes: Axes, row: dict[str, Any], place: float, number: int, several_sizes: bool
) -> None:
    """Draw one setting at `place` on the x axis: interval, mean, each seed's point, and a line to its true size."""
    colour = METHOD_COLOURS[number % len(METHOD_COLOURS)]
    marker = METHOD_MARKERS[number % len(METHOD_MARKERS)]
    mean, low, high = 100 * row["accuracy"], 100 * row["low"], 100 * row["high"]
    bottom, top = axes.get_ylim()
    elbow = bottom + 0.05 * (top - bottom)
    count = row["trainable_parameters"]
    axes.plot([count, place, place], [bottom, elbow, low], color="#bbbbbb", linewidth=0.6, zorder=1)
    axes.errorbar(place, mean, [[mean - low], [high - mean]], color=colour, capsize=3, linewidth=1.2, zorder=3)
    label = row["method"] if several_sizes else row["label"]
    axes.plot(place, mean, marker, color=colour, markersize=7, linestyle="none", label=label, zorder=3)
    scores = [100 * score for score in row["by_seed"].values()]
    if several_sizes:  # vertical, above the bar and all seeds, so that neighbours do not overlap
        above = (place, max(high, *scores))
        axes.annotate(row["size"], above, (1, 5), textcoords="offset points", ha="center", fontsize=8, rotation=90)
    beside = offset_copy(axes.transData, figure, x=7, units="points")
    style = {"color": colour, "markersize": 4, "markerfacecolor": "white", "zorder": 4}
    axes.plot([place] * len(scores), scores, marker, transform=beside, **style)


def _side_by_side(counts: Sequence[int]) -> np.ndarray:
    """Return positions on a log axis near the `counts`, in their order and far enough apart to be distinguished.

    The least-squares solution with a minimum gap: subtracting the gaps turns it into an isotonic regression.
    """
    logs = np.log10(np.array(counts, dtype=float))
    order = np.argsort(logs, kind="stable")
    gap = min(0.04, 0.8 / len(logs)) * min(max(float(np.ptp(logs)), 0.5), 1.0)
    gaps = gap * np.arange(len(logs))
    places = np.empty_like(logs)
    places[order] = 10 ** (isotonic_regression(logs[order] - gaps).x + gaps)
    return places


def _one_per_label(traces: Sequence[Trace]) -> list[Trace]:
    return list({trace.label: trace for trace in traces}.values())


def _seeds_drawn(seeds: Sequence[int]) -> str:
    if len(seeds) == 1:
        return f"Seed {seeds[0]}."
    return f"Seed {seeds[0]} in full, {', '.join(map(str, seeds[1:]))} faint."
