"""Pairwise comparisons of the methods in one table: differences with intervals, tests and power.

Only runs that answered the same test items are compared, seed by seed (statistics in analysis/paired.py). All tests of
one table form one family, corrected by Holm's method. With fewer than five common seeds nothing is tested: how the
trained models would do on other items does not show how the methods would do if trained again.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pandas as pd
from statsmodels.stats.multitest import multipletests

from analysis.load import names_of, records
from analysis.paired import paired_difference
from analysis.stats import SEEDS_FOR_AN_INTERVAL
from analysis.tables import (
    SECTION,
    Row,
    by_section,
    by_setting,
    csv_text,
    item_arrays,
    marks,
    mixed,
    sections,
    with_legend,
)
from experiments.errors import UserError, nearest
from experiments.progress import WAIT, Bar

ALL_PAIRS = 6  # up to this many settings, test every pair; above, test each against the reference
Runs = list[Row]  # of one setting
OF_A_SETTING = ["setting", "method", "label", "learning_rate"]
COLUMNS = [
    *SECTION,
    *(f"{side}_{name}" for side in ("first", "second") for name in OF_A_SETTING),
    *("seeds", "mixed", "mean", "low", "high", "over", "test", "p_value", "p_holm"),
    *("family", "improvement", "smallest"),
]


def comparison_table(frame: pd.DataFrame, reference: str | None = None) -> pd.DataFrame:
    """Return one row per pair of settings that share test items and seeds, with the columns `COLUMNS`.

    `frame` is `Runs.frame`. `mean`, `low`, `high` and `smallest` are differences of accuracy, first minus second, over
    the list of common `seeds`; `p_holm` is corrected over the `family` of tests in its table. With fewer than
    `SEEDS_FOR_AN_INTERVAL` seeds, interval, test and `smallest` are NaN and the row is in no family. If a table has
    at most `ALL_PAIRS` settings and no `reference` is given, all pairs are compared; else every setting is compared
    with the reference, a label. Its default is the DiaBlo setting nearest in size to one of LoRA, since size is known
    before any score. Settings with several learning rates are left out, being sweeps. UserError for an unknown label.
    """
    labels = set(frame["label"])
    if reference is not None and reference not in labels:
        raise UserError(f"reference {reference}: no run has this label, {nearest(reference, labels)}")
    rows: list[dict[str, Any]] = []
    for section, part in sections(frame):
        scored = part.dropna(subset=["accuracy"])
        names = names_of(records(scored.drop_duplicates("group")))
        scored = scored.assign(label=[names[group] for group in scored["group"]])
        settings = by_setting(records(_without_sweeps(scored).sort_values(_ORDER)))
        found = []
        pairs = list(_pairs(settings, reference))
        for first, second in Bar(pairs, desc="comparisons", unit="pair", leave=False, delay=WAIT):
            seeds = sorted({run["seed"] for run in first} & {run["seed"] for run in second})
            if seeds:
                found.append(section | _compared(first, second, seeds))
        family = [row for row in found if not math.isnan(row["p_value"])]
        corrected = multipletests([row["p_value"] for row in family], method="holm")[1] if family else []
        for row, p in zip(family, np.asarray(corrected), strict=True):
            row["p_holm"] = p
        rows += [{"p_holm": math.nan} | row | {"family": len(family)} for row in found]
    return pd.DataFrame(rows, columns=pd.Index(COLUMNS)).sort_values(
        ["model", "task", "benchmark", "evaluation"], kind="stable", ignore_index=True
    )


def display(table: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of `comparison_table` as text for readers; differences are in percentage points."""
    rows = []
    for row in records(table):
        untested = math.isnan(row["p_value"])
        rows.append(
            {
                "Compared": _title(row),
                "Common seeds": ", ".join(map(str, row["seeds"])),
                "Difference, points": f"{100 * row['mean']:+.1f}{marks(row['mixed'])}",
                "95 % interval": "" if untested else f"{100 * row['low']:+.1f} to {100 * row['high']:+.1f}",
                "Interval and test over": row["over"],
                "Test": row["test"],
                "p": "" if untested else _probability(row["p_value"]),
                f"p, Holm over {row['family']}": "" if untested else _probability(row["p_holm"]),
                "First's seed ahead": "" if pd.isna(row["improvement"]) else f"{100 * row['improvement']:.0f} %",
                "Smallest found, points": "" if untested else f"{100 * row['smallest']:.1f}",
            }
        )
    return pd.DataFrame(rows)


def to_markdown(table: pd.DataFrame) -> str:
    """Return one Markdown table per section, each under a heading."""
    return with_legend([(title, display(rows)) for title, rows in by_section(table)], table)


def to_csv(table: pd.DataFrame) -> str:
    """Return the unrounded numbers as CSV; `seeds` as `0 1 2`."""
    seeds = table["seeds"].map(lambda seeds: " ".join(map(str, seeds)))
    return csv_text(table.assign(seeds=seeds, mixed=table["mixed"].map("; ".join)))


_ORDER = ["method", "size_number", "label", "learning_rate", "setting", "seed"]


def _without_sweeps(scored: pd.DataFrame) -> pd.DataFrame:
    swept = [group for group, part in scored.groupby("group") if len(part["learning_rate"].dropna().unique()) > 1]
    return scored.loc[~scored["group"].isin(swept)]


def _pairs(settings: Sequence[Runs], reference: str | None) -> Iterator[tuple[Runs, Runs]]:
    if reference is None and len(settings) <= ALL_PAIRS:
        yield from itertools.combinations(settings, 2)
        return
    chosen = [number for number, runs in enumerate(settings) if runs[0]["label"] == reference]
    for number in chosen if reference else _nearest_in_size(settings):
        yield from ((other, settings[number]) for place, other in enumerate(settings) if place != number)


def _nearest_in_size(settings: Sequence[Runs]) -> list[int]:
    """Return the index of the DiaBlo setting nearest in trainable parameters to a LoRA setting; 0 if there is none."""
    facts = [
        ("diablo" if run["pattern"] == "diagonal" else run["method"], run["trainable_parameters"])
        for run, *_ in settings
    ]
    sizes = [size for method, size in facts if method == "lora" and pd.notna(size)]
    ours = [place for place, (method, size) in enumerate(facts) if method == "diablo" and pd.notna(size)]
    if not ours or not sizes:
        return [*ours, 0][:1]  # in a table of sparse patterns, the diagonal
    return [min(ours, key=lambda place: min(abs(facts[place][1] - size) for size in sizes))]


def _compared(first: Runs, second: Runs, seeds: Sequence[int]) -> dict[str, Any]:
    sides = {"first": first, "second": second}
    ours, theirs = ([run for seed in seeds for run in runs if run["seed"] == seed] for runs in sides.values())
    arrays = [item_arrays(runs) for runs in (ours, theirs)]
    about = {f"{side}_{name}": runs[0][name] for side, runs in sides.items() for name in OF_A_SETTING}
    difference = asdict(paired_difference(*arrays))
    if len(seeds) < SEEDS_FOR_AN_INTERVAL:
        difference |= dict.fromkeys(("low", "high", "p_value", "smallest"), math.nan)
        difference |= {"over": "", "test": f"none: fewer than {SEEDS_FOR_AN_INTERVAL} seeds"}
    return about | {"seeds": list(seeds), "mixed": mixed([*ours, *theirs])} | difference


def _title(row: dict[str, Any]) -> str:
    """Return the two labels; if they are equal, with the first characters of their settings' hashes."""
    if row["first_label"] != row["second_label"]:
        return f"{row['first_label']} − {row['second_label']}"
    return " − ".join(f"{row[f'{side}_label']} ({row[f'{side}_setting'][:6]})" for side in ("first", "second"))


def _probability(p: float) -> str:
    return "<0.0001" if p < 1e-4 else f"{p:.2g}" if p < 0.1 else f"{p:.2f}"
