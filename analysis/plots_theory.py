"""Figures of the theory: which method reaches the least-squares optimum, and the condition measured in training."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure

from analysis.plots import BLACK, METHOD_COLOURS, METHOD_MARKERS, STYLE, Picture


def sign(diablo: float, lora: float) -> str:
    """Return the sign of a cell, from the losses above the full optimum."""
    if diablo == 0:
        return "=" if lora == 0 else "D="
    if lora == 0:
        return "L="
    return "D" if diablo < lora else "L"


def least_squares_map(name: str, width: int, sweeps: Sequence[tuple[str, Sequence[dict[str, float]]]]) -> Picture:
    """Draw one panel per (title, rows of `theory.sweep`) on square matrices of this width; all have the same grid.

    Colour: LoRA's loss above the full optimum minus DiaBlo's, in percent of the loss before training. The signs repeat
    this without colour. The black line is the condition, rank(X) = width / N.
    """
    with matplotlib.rc_context({**STYLE, "axes.grid": False}):
        figure = Figure(figsize=(9.6, 3.6), layout="constrained")
        panels = figure.subplots(1, len(sweeps), sharex=True, sharey=True, squeeze=False)[0]
        images = []
        for axes, (title, rows) in zip(panels, sweeps, strict=True):
            axes.set_title(title, fontsize=9)
            axes.set_xlabel("rank(X)")
            images.append(_draw(axes, width, rows))
        panels[0].set_ylabel("number of blocks N\n(trained share 1/N)")
        label = "LoRA's loss − DiaBlo's, % of the first loss"
        figure.colorbar(images[0], ax=list(panels), label=label, extend="both")
    caption = (
        f"Least squares, square matrices of width {width}: the loss left above full fine-tuning's optimum, at equal "
        f"budget. = both reach the optimum; D= only DiaBlo does; L= only LoRA does; D neither, DiaBlo is nearer; L "
        f"neither, LoRA is nearer. Line: rank(X) = {width} / N, up to which DiaBlo is exact. Means over the draws."
    )
    alt = "Maps over the rank of X and the number of blocks of which method is nearer to the full optimum."
    return Picture(name, figure, caption, alt)


QUANTITIES = {  # column of `load_spectra` -> axis label
    "stable_rank": "stable rank",
    "energy": "energy in the\nlargest m / N",
    "covered": "covered by\none block",
}


def condition_measured(name: str, title: str, spectra: pd.DataFrame) -> Picture:
    """Draw, over the layers, for X and g_Y: stable rank, energy, and block coverage; `spectra` is from `load_spectra`.

    The first measurement is faint, the last solid.
    """
    first, last = int(min(spectra["step"])), int(max(spectra["step"]))
    modules = list(dict.fromkeys(spectra["module"]))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.6, 7.0), layout="constrained")
        panels = figure.subplots(len(QUANTITIES), 2, sharex=True, sharey="row")
        for row, (column, words) in enumerate(QUANTITIES.items()):
            panels[row, 0].set_ylabel(words)
            for place, side in enumerate(("X", "g_Y")):
                axes = panels[row, place]
                for number, module in enumerate(modules):
                    part = spectra.loc[(spectra["side"] == side) & (spectra["module"] == module)]
                    _draw_module(axes, part, column, number, [first, last])
                if column != "stable_rank":
                    axes.axhline(1, color=BLACK, linewidth=0.8)
            panels[row, 0].set_ylim(0, None if column == "stable_rank" else 1.05)  # of both, after both are drawn
        for axes, side in zip(panels[0], ("inputs X", "gradients of outputs, g_Y"), strict=True):
            axes.set_title(side, fontsize=9)
        for axes in panels[-1]:
            axes.set_xlabel("layer")
            axes.xaxis.get_major_locator().set_params(integer=True)
        figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
    blocks, tokens = spectra["blocks"].max(), spectra.groupby("step")["tokens"].first()
    caption = (
        f"{title}, cut into N = {blocks} blocks, on the tokens of a micro-batch. Faint: step {first}, {tokens[first]} "
        f"tokens; full: step {last}, {tokens[last]} tokens. Energy: the share of the squared norm in the largest m / N "
        "singular directions of m. Covered: the share inside the column space of one block (its singular directions "
        "above rounding), mean over the blocks, bars from the least to the most. Where it is 1 for every block of X, "
        "or of g_Y, the theory's condition holds and the diagonal blocks lose nothing."
    )
    alt = f"Stable rank, energy and what one block covers, over the layers, for {', '.join(modules)}."
    return Picture(name, figure, caption, alt)


def _draw_module(axes: Axes, part: pd.DataFrame, column: str, number: int, steps: Sequence[int]) -> None:
    colour, marker = METHOD_COLOURS[number % len(METHOD_COLOURS)], METHOD_MARKERS[number % len(METHOD_MARKERS)]
    for step in dict.fromkeys(steps):
        rows = part.loc[part["step"] == step].sort_values("layer")
        at_last = step == steps[-1]
        places = rows["layer"] + 0.05 * number  # puts the bars of several modules next to each other
        label = str(rows["module"].iloc[0]) if at_last and len(rows) else None
        style = {"color": colour, "alpha": 1.0 if at_last else 0.3, "linewidth": 0.9}
        axes.plot(places, rows[column], marker=marker, markersize=5, markerfacecolor="white", label=label, **style)
        if column == "covered" and at_last:
            axes.vlines(places, rows["covered_least"], rows["covered_most"], color=colour, linewidth=0.9)


def _draw(axes: Axes, width: int, rows: Sequence[dict[str, float]]) -> ScalarMappable:
    ranks, blocks = (sorted({row[key] for row in rows}) for key in ("rank", "num_blocks"))
    gaps = np.zeros((len(blocks), len(ranks)))
    for row in rows:
        place = blocks.index(row["num_blocks"]), ranks.index(row["rank"])
        gaps[place] = 100 * (row["lora"] - row["diablo"])
        text = sign(row["diablo"], row["lora"])
        axes.text(place[1], place[0], text, ha="center", va="center", fontsize=8, color=BLACK)
    image = axes.imshow(gaps, cmap="PuOr", vmin=-50, vmax=50, origin="lower", aspect="auto", alpha=0.8)
    for place, count in enumerate(blocks):  # the boundary, in steps between the cells
        last = sum(rank <= width / count for rank in ranks) - 0.5
        axes.plot([last, last], [place - 0.5, place + 0.5], color=BLACK, linewidth=1.8)
        if place:
            before = sum(rank <= width / blocks[place - 1] for rank in ranks) - 0.5
            axes.plot([last, before], [place - 0.5, place - 0.5], color=BLACK, linewidth=1.8)
    axes.set_xticks(range(len(ranks)), [f"{rank:g}" for rank in ranks])
    axes.set_yticks(range(len(blocks)), [f"{count:g}" for count in blocks])
    return image
