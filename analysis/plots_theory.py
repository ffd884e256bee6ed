"""The map of analysis/theory.py: over rank(X) and budget, who reaches the full optimum and who is nearer to it."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure

from analysis.plots import BLACK, STYLE, Picture


def sign(diablo: float, lora: float) -> str:
    """The sign of a cell, from the losses above the full optimum."""
    if diablo == 0:
        return "=" if lora == 0 else "D="
    if lora == 0:
        return "L="
    return "D" if diablo < lora else "L"


def least_squares_map(name: str, width: int, sweeps: Sequence[tuple[str, Sequence[dict[str, float]]]]) -> Picture:
    """One panel per (title, rows of `theory.sweep`) on square matrices of this width; rows of one grid in each.

    Colour: LoRA's loss above the full optimum minus DiaBlo's, in percent of the loss before training. The signs say the
    same without colour. The black line is the condition, rank(X) = width / N.
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
        figure.colorbar(images[0], ax=list(panels), label=label)
    caption = (
        f"Least squares, square matrices of width {width}: the loss left above full fine-tuning's optimum, at equal "
        f"budget. = both reach the optimum; D= only DiaBlo does; L= only LoRA does; D neither, DiaBlo is nearer; L "
        f"neither, LoRA is nearer. Line: rank(X) = {width} / N, up to which DiaBlo is exact. Means over the draws."
    )
    alt = "Maps over the rank of X and the number of blocks of which method is nearer to the full optimum."
    return Picture(name, figure, caption, alt)


def _draw(axes: Axes, width: int, rows: Sequence[dict[str, float]]) -> ScalarMappable:
    ranks, blocks = (sorted({row[key] for row in rows}) for key in ("rank", "num_blocks"))
    gaps = np.zeros((len(blocks), len(ranks)))
    for row in rows:
        place = blocks.index(row["num_blocks"]), ranks.index(row["rank"])
        gaps[place] = 100 * (row["lora"] - row["diablo"])
        text = sign(row["diablo"], row["lora"])
        axes.text(place[1], place[0], text, ha="center", va="center", fontsize=8, color=BLACK)
    image = axes.imshow(gaps, cmap="PuOr", vmin=-50, vmax=50, origin="lower", aspect="auto", alpha=0.8)
    for place, count in enumerate(blocks):  # the boundary, as steps between the cells
        last = sum(rank <= width / count for rank in ranks) - 0.5
        axes.plot([last, last], [place - 0.5, place + 0.5], color=BLACK, linewidth=1.8)
        if place:
            before = sum(rank <= width / blocks[place - 1] for rank in ranks) - 0.5
            axes.plot([last, before], [place - 0.5, place - 0.5], color=BLACK, linewidth=1.8)
    axes.set_xticks(range(len(ranks)), [f"{rank:g}" for rank in ranks])
    axes.set_yticks(range(len(blocks)), [f"{count:g}" for count in blocks])
    return image
