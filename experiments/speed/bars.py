# pyright: reportUnknownMemberType=false
"""Draws the time of a training pass of a whole model over the frozen floor as bars: the figure of README."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from experiments.speed.cases import FLOOR, IN_PLACE

GREY, BLUE = "#b8bec6", "#0072b2"


def draw_bars(case: dict[str, Any], device: str, out: Path) -> None:
    """Write `passes.svg` and `passes.png` into `out`: medians over rounds with quartiles, and each method's peak."""
    entries = case["entries"]
    floor = np.array(entries[FLOOR]["seconds"])
    ratios = {label: np.array(entry["seconds"]) / floor for label, entry in entries.items() if label != FLOOR}
    labels = sorted(ratios, key=lambda label: float(np.median(ratios[label])), reverse=True)
    style: Any = {"font.size": 10, "svg.hashsalt": "diablo"}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(7.6, 0.42 * len(labels) + 1.5), layout="constrained", facecolor="white")
        axes = figure.add_subplot()
        for place, label in enumerate(labels):
            low, middle, high = np.percentile(ratios[label], [25, 50, 75])
            axes.barh(place, middle, height=0.62, color=BLUE if label == IN_PLACE else GREY)
            axes.hlines(place, low, high, color="#333333", linewidth=1.2)
            peak = entries[label]["peak_bytes"] / 1e9
            axes.text(high + 0.02, place, f"{middle:.2f}    {peak:.1f} GB", va="center", fontsize=9)
        axes.axvline(1, color="#333333", linewidth=1, linestyle="--")
        axes.set_yticks(range(len(labels)), labels)
        axes.set_xlim(0, max(float(np.percentile(values, 75)) for values in ratios.values()) + 0.45)
        axes.set_xlabel(
            "time of a forward and backward pass ÷ that of the frozen model (dashed)\n"
            f"GB: peak memory beyond the weights; the frozen model's is {entries[FLOOR]['peak_bytes'] / 1e9:.1f}",
            fontsize=9,
        )
        parameters = case["base_parameters"] / 1e9
        axes.set_title(
            f"Shapes of {case['model']} ({parameters:.1f} B), {case['tokens']:,} tokens, N={case['num_blocks']}, "
            f"r={case['rank']}\n{device}, medians and quartiles of {len(floor)} interleaved rounds",
            fontsize=9,
            loc="left",
        )
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
        figure.savefig(out / "passes.svg", metadata={"Date": None})
        figure.savefig(out / "passes.png", dpi=160)
