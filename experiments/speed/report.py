# pyright: reportUnknownMemberType=false
"""Writes the speed benchmark's table (Markdown) and picture from its JSON."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from experiments.runs.records import write_atomically
from experiments.speed.bars import draw_bars
from experiments.speed.cases import (
    ADAPTER,
    AUTHORS,
    DORA,
    DROPOUT,
    FLOOR,
    FULL,
    IN_PLACE,
    LORA,
    OTHER_PATTERNS,
    PISSA,
    RECOMPUTED,
)

# One epoch of commonsense_170k with the Alpaca prompt: 152.7 tokens per row, 170,420 rows. The mean length of each of
# the eight sets (training files of six, test files of SIQA and HellaSwag) by Mistral-7B's 32,000-token tokenizer,
# weighted by the sets' sizes. LLaMA2's tokenizer, of the same size and kind, was unavailable.
COMMONSENSE_TOKENS = 26_014_832
PAPER_MINUTES = {LORA: 170, DORA: 480, IN_PLACE: 170, ADAPTER: 170}  # arXiv 2506.03230, one epoch, its own hardware
# The paper's ablation, LLaMA3-8B on GSM8K at density 1/64; it does not say whether for one epoch or all.
PATTERN_MINUTES = {
    IN_PLACE: 17.26, "random_entry": 26.51, "random_block": 29.76, "random_column": 17.01, "random_row": 17.76,
}  # fmt: skip

# Okabe and Ito's colours; markers and hatches also distinguish the methods.
STYLES = {
    FULL: ("#000000", "D"), LORA: ("#E69F00", "s"), DORA: ("#D55E00", "v"), PISSA: ("#CC79A7", "P"),
    ADAPTER: ("#56B4E9", "^"), DROPOUT: ("#56B4E9", "X"), IN_PLACE: ("#0072B2", "o"), AUTHORS: ("#009E73", "*"),
    RECOMPUTED: ("#0072B2", "X"),
    **dict.fromkeys(OTHER_PATTERNS, ("#999999", "s")),
}  # fmt: skip


def ratio(
    case: dict[str, Any], label: str, key: str = "seconds", floor_key: str = "seconds"
) -> tuple[float, float, float]:
    """Return a method's time relative to the floor's, by rounds: median and quartiles."""
    entries = case["entries"]
    ratios = np.array(entries[label][key]) / np.array(entries[FLOOR]["seconds"])
    low, middle, high = np.percentile(ratios, [25, 50, 75])
    return float(middle), float(low), float(high)


def limit_seconds(entry: dict[str, Any], rates: dict[str, float]) -> float:
    """Return the least time this machine needs: the slower of its arithmetic and its memory."""
    return max(entry["operations"] / rates["operations_per_second"], entry["bytes"] / rates["bytes_per_second"])


def limit_share(entry: dict[str, Any], rates: dict[str, float] | None) -> str:
    """Return the least time as a share of the median pass; empty if the machine's rates were not measured."""
    return "" if rates is None else f"{limit_seconds(entry, rates) / statistics.median(entry['seconds']):.0%}"


def layer_table(case: dict[str, Any], rates: dict[str, float] | None) -> list[str]:
    m, n = case["shape"]
    lines = [
        f"**{m} × {n}**, {case['tokens']:,} tokens, N = {case['num_blocks']}, r = {case['rank']}",
        "",
        "| method | trainable | ms | ÷ floor (25–75 %) | Gflop | MB moved | limit ÷ time | peak MB |",
        "|---|---:|---:|---|---:|---:|---:|---:|",
    ]
    for label, entry in case["entries"].items():
        middle, low, high = ratio(case, label)
        median = statistics.median(entry["seconds"])
        lines.append(
            f"| {label} | {entry['parameters']:,} | {1e3 * median:.2f} | {middle:.3f} ({low:.3f}–{high:.3f}) | "
            f"{entry['operations'] / 1e9:.1f} | {entry['bytes'] / 1e6:.0f} | "
            f"{limit_share(entry, rates)} | {entry['peak_bytes'] / 1e6:.0f} |"
        )
    return [*lines, ""]


def model_table(case: dict[str, Any], rates: dict[str, float] | None) -> list[str]:
    lines = [
        f"**{case['model']}** ({case['base_parameters']:,} parameters), {case['targets']}, {case['tokens']:,} tokens "
        f"in rows of {case['length']}, N = {case['num_blocks']}, r = {case['rank']}"
        + (", gradient checkpointing" if case["checkpointing"] else ""),
        "",
        "| method | trainable | pass ÷ floor (25–75 %) | step with AdamW ÷ floor's pass | tokens/s | "
        "min/epoch | paper | Tflop | GB moved | limit ÷ pass | peak MB |",
        "|---|---:|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    minutes = PATTERN_MINUTES if case["entries"].keys() & set(OTHER_PATTERNS) else PAPER_MINUTES
    for label, entry in case["entries"].items():
        middle, low, high = ratio(case, label)
        step, step_low, step_high = ratio(case, label, "step_seconds")
        speed = case["tokens"] / statistics.median(entry["step_seconds"])
        lines.append(
            f"| {label} | {entry['parameters']:,} | {middle:.3f} ({low:.3f}–{high:.3f}) | "
            f"{step:.3f} ({step_low:.3f}–{step_high:.3f}) | {speed:,.0f} | {COMMONSENSE_TOKENS / speed / 60:,.0f} | "
            f"{minutes.get(label, '')} | {entry['operations'] / 1e12:.2f} | {entry['bytes'] / 1e9:.1f} | "
            f"{limit_share(entry, rates)} | "
            f"{entry['peak_bytes'] / 1e6:,.0f} |"
        )
    return [*lines, ""]


def curve_table(cases: Sequence[dict[str, Any]]) -> list[str]:
    labels = [label for label in cases[0]["entries"] if label != FLOOR]
    m, n = cases[0]["shape"]
    lines = [
        f"**{m} × {n}**, {cases[0]['tokens']:,} tokens: time ÷ floor (25–75 %) at equal budgets",
        "",
        "| N | r | trainable | " + " | ".join(labels) + " |",
        "|---:|---:|---:|" + "---|" * len(labels),
    ]
    for case in cases:
        cells = ["{:.3f} ({:.3f}–{:.3f})".format(*ratio(case, label)) for label in labels]
        trained = case["entries"][IN_PLACE]["parameters"]
        lines.append(f"| {case['num_blocks']} | {case['rank']} | {trained:,} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def write_report(result: dict[str, Any], out: Path) -> Path:
    """Write `benchmark.md`, `.png` and `.svg`, and `passes.*` of a first whole model; returns the table's path."""
    environment, rates = result["environment"], result["rates"]
    cases = [*result["models"], *result["layers"], *result["curve"]]
    rounds = sorted({len(entry["seconds"]) for case in cases for entry in case["entries"].values()})
    reached = (
        f"This machine reaches {rates['operations_per_second'] / 1e9:,.0f} Gflop/s in a large product and "
        f"{rates['bytes_per_second'] / 1e9:,.1f} GB/s in a copy; `limit ÷ time` says how near a pass is to the least "
        "time that those two allow for the operations and bytes beside it (of a model: its linear layers). "
        if rates is not None
        else ""
    )
    lines = [
        "# Speed and memory",
        "",
        f"{environment['device']}; {result['dtype']}; torch {environment['torch']}, peft {environment['peft']}; "
        f"{' or '.join(map(str, rounds))} interleaved rounds, medians. The floor is the frozen model: forward, and the "
        f"gradient of its input. {reached}Peak is memory beyond weights and optimizer. "
        f"`min/epoch` is from the step, for the {COMMONSENSE_TOKENS / 1e6:.1f} M "
        "tokens of one epoch of commonsense_170k; the paper's minutes are of its own models and hardware.",
        "",
    ]
    if "note" in result:
        lines += [result["note"], ""]
    if result["models"]:
        lines += ["## Whole models", "", *[line for case in result["models"] for line in model_table(case, rates)]]
    if result["layers"]:
        lines += ["## Single layers", "", *[line for case in result["layers"] for line in layer_table(case, rates)]]
    if result["curve"]:
        lines += ["## N and rank at equal budgets", "", *curve_table(result["curve"])]
    write_atomically(out / "benchmark.md", "\n".join(lines).rstrip() + "\n")
    draw(result, out)
    if result["models"]:
        draw_bars(result["models"][0], environment["device"], out)
    return out / "benchmark.md"


def draw(result: dict[str, Any], out: Path) -> None:
    """Draw ratios to the floor with quartiles: a panel for each whole model, one for the layers, one for the curve."""
    panels = [*result["models"], *([result["layers"]] if result["layers"] else [])]
    panels += [result["curve"]] if result["curve"] else []
    style: Any = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "diablo"}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(4.2 * len(panels), 3.9), layout="constrained")
        for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            axes.axhline(1, color="#888888", linewidth=1, linestyle="--")
            axes.grid(axis="y", color="#e4e4e4", linewidth=0.6)
            axes.set_ylabel("time ÷ frozen floor")
            if isinstance(panel, dict):
                _draw_model(axes, cast(dict[str, Any], panel))
            elif panel is result["curve"]:
                names = [f"{case['num_blocks']}\n{case['rank']}" for case in panel]
                _draw_cases(axes, panel, names, "N (DiaBlo) and rank (LoRA), equal budgets")
            else:
                names = ["{}×\n{}".format(*case["shape"]) for case in panel]
                _draw_cases(axes, panel, names, f"in × out features, {panel[0]['tokens']:,} tokens")
        handles = {h.get_label(): h for axes in figure.axes for h in axes.get_legend_handles_labels()[0]}
        if handles:
            figure.legend(
                handles=list(handles.values()),
                loc="outside lower center",
                ncols=2 * len(panels),
                frameon=False,
                fontsize=8,
            )
        figure.savefig(out / "benchmark.png", dpi=160)
        figure.savefig(out / "benchmark.svg", metadata={"Date": None})


def _draw_model(axes: Any, case: dict[str, Any]) -> None:
    labels = [label for label in case["entries"] if label != FLOOR]
    for place, label in enumerate(labels):
        colour, marker = STYLES[label]
        for key, shift, filled in (("seconds", -0.12, True), ("step_seconds", 0.12, False)):
            middle, low, high = ratio(case, label, key)
            axes.vlines(place + shift, low, high, color=colour)
            face = colour if filled else "white"
            axes.plot(place + shift, middle, color=colour, marker=marker, markerfacecolor=face, markersize=6)
    axes.set_xticks(range(len(labels)), [label.replace(", ", ",\n") for label in labels], rotation=40, ha="right")
    axes.set_title(f"{case['model']}, {case['tokens']:,} tokens\nfilled: pass; hollow: step with AdamW", fontsize=9)


def _draw_cases(axes: Any, cases: Sequence[dict[str, Any]], names: list[str], title: str) -> None:
    labels = [label for label in cases[0]["entries"] if label != FLOOR]
    for number, label in enumerate(labels):
        colour, marker = STYLES[label]
        points = np.array([ratio(case, label) for case in cases])
        positions = np.arange(len(cases)) + (number - len(labels) / 2) * 0.06
        spread = [points[:, 0] - points[:, 1], points[:, 2] - points[:, 0]]
        axes.errorbar(
            positions, points[:, 0], spread, color=colour, marker=marker, markersize=5, linestyle="", label=label
        )
    axes.set_xticks(range(len(cases)), names)
    axes.set_title(title, fontsize=9)
