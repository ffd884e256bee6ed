"""The table of differences: which pairs are compared, over which seeds, in which family of tests."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from analysis.comparisons import COLUMNS, comparison_table, display, to_csv, to_markdown
from analysis.load import find_runs, load_runs, records
from experiments.errors import UserError
from tests.analysis.analysis_runs import change, score_file, write_run

WON = [1] * 6 + [0] * 4
LOST = [0] * 5 + [1] + [0] * 4


def compared(folder: Path, reference: str | None = None) -> pd.DataFrame:
    return comparison_table(load_runs(find_runs([folder])).frame, reference)


def test_every_pair_of_few_with_holms_correction(tmp_path: Path) -> None:
    """Five seeds that agree: 5 items won and 0 lost gives 1/16; no difference gives 1. Holm: 3/16, 3/16 and 1."""
    for method, items in (("dora", LOST), ("lora", WON), ("pissa", WON)):
        for seed in range(5):
            write_run(tmp_path, method, seed=seed, items=items)
    table = compared(tmp_path)
    assert list(table.columns) == COLUMNS
    rows = records(table)
    assert [(row["first_label"], row["second_label"]) for row in rows] == [
        ("dora-r7", "lora-r7"),
        ("dora-r7", "pissa-r7"),
        ("lora-r7", "pissa-r7"),
    ]
    assert [row["p_value"] for row in rows] == pytest.approx([1 / 16, 1 / 16, 1], abs=0.002)
    assert [row["p_holm"] for row in rows] == pytest.approx([3 / 16, 3 / 16, 1], abs=0.006)
    assert [row["mean"] for row in rows] == pytest.approx([-0.5, -0.5, 0])
    shown = display(table).iloc[0].to_dict()
    assert shown["Compared"] == "dora-r7 − lora-r7"
    assert (shown["Difference, points"], shown["p, Holm over 3"], shown["First's seed ahead"]) == (
        "-50.0",
        "0.19",
        "0 %",
    )
    assert "| dora-r7 − lora-r7" in to_markdown(table)
    assert to_csv(table).splitlines()[0] == ",".join(COLUMNS)


def test_fewer_than_five_seeds_are_not_tested(tmp_path: Path) -> None:
    """The difference on these items is significant for these trained models, but is no evidence about the methods."""
    for method, items in (("dora", 20 * LOST), ("lora", 20 * WON)):
        for seed in range(4):
            write_run(tmp_path, method, seed=seed, items=items)
    table = compared(tmp_path)
    (row,) = records(table)
    assert row["mean"] == pytest.approx(-0.5)
    assert table[["low", "high", "p_value", "p_holm", "smallest"]].isna().to_numpy().all()
    assert row["family"] == 0
    shown = display(table).iloc[0].to_dict()
    assert shown["Test"] == "none: fewer than 5 seeds"
    assert [shown[name] for name in ("95 % interval", "p", "Smallest found, points")] == ["", "", ""]
    assert shown["Difference, points"] == "-50.0"
    for method, items in (("dora", 20 * LOST), ("lora", 20 * WON)):
        write_run(tmp_path, method, seed=4, items=items)
    (row,) = records(compared(tmp_path))
    assert row["p_value"] < 0.001


def test_only_common_seeds_are_compared(tmp_path: Path) -> None:
    for seed in (0, 1, 2):
        write_run(tmp_path, "lora", seed=seed, items=WON)
    for seed in (1, 2, 3):
        write_run(tmp_path, "dora", seed=seed, items=WON if seed == 3 else LOST)
    (row,) = records(compared(tmp_path))
    assert (row["seeds"], row["mean"], row["improvement"]) == ([1, 2], pytest.approx(-0.5), 0)


def test_without_common_seeds_or_items_there_is_no_row(tmp_path: Path) -> None:
    write_run(tmp_path, "lora", seed=0, items=WON)
    write_run(tmp_path, "dora", seed=1, items=LOST)
    change(score_file(write_run(tmp_path, "pissa", seed=0, items=LOST)), data_hash="0" * 64)
    assert compared(tmp_path).empty


def test_many_settings_are_compared_with_the_one_nearest_in_size_to_lora(tmp_path: Path) -> None:
    for size, parameters in ((4, 40_000), (8, 20_000), (16, 10_000), (32, 5_000)):
        write_run(tmp_path, "diablo", size=size, parameters=parameters, items=WON)
    for method in ("dora", "lora", "pissa"):
        write_run(tmp_path, method, parameters=18_000, items=LOST)
    table = compared(tmp_path)
    assert set(table["second_label"]) == {"diablo-N8"}
    assert len(table) == 6
    named = compared(tmp_path, "dora-r7")
    assert set(named["second_label"]) == {"dora-r7"}
    assert set(named["first_label"]) > {"diablo-N8", "lora-r7"}


def test_an_unknown_reference_is_one_clear_error(tmp_path: Path) -> None:
    write_run(tmp_path, "lora", items=WON)
    with pytest.raises(UserError, match="did you mean lora-r7"):
        compared(tmp_path, "lora-r8")


def test_a_sweep_over_learning_rates_is_not_compared(tmp_path: Path) -> None:
    for rate in (1e-3, 2e-3):
        write_run(tmp_path, "lora", learning_rate=rate, items=WON)
    write_run(tmp_path, "dora", items=WON)
    write_run(tmp_path, "pissa", items=LOST)
    assert [(row["first_label"], row["second_label"]) for row in records(compared(tmp_path))] == [
        ("dora-r7", "pissa-r7")
    ]
