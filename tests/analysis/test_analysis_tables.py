"""The wide table of methods × benchmarks, and the marks of cells whose runs are not comparable."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean

import pandas as pd
import pytest

from analysis.load import find_runs, load_runs, records
from analysis.tables import MARKS, display, method_table, to_csv, to_markdown, wide_tables
from experiments.runs.follows import standard_error
from experiments.runs.records import RunPaths, read_json
from tests.analysis.analysis_runs import change, score_file, write_run


def score_other(run: Path, items: list[int], **values: object) -> Path:
    """Write the score of a second benchmark."""
    first = score_file(run)
    second = RunPaths(run).evaluation("other", "plain", {}).score
    second.parent.mkdir(parents=True)
    second.write_text(first.read_text(encoding="utf-8"), encoding="utf-8")
    change(
        second,
        benchmark="other",
        items=items,
        n=len(items),
        accuracy=fmean(items),
        standard_error=standard_error(items),
        **values,
    )
    return second


def commit(path: Path, letter: str) -> None:
    change(path, environment=read_json(path)["environment"] | {"commit": letter * 40})


def test_methods_by_benchmarks(tmp_path: Path) -> None:
    """Benchmarks in the task's order, then their mean; a missing score is an empty cell."""
    write_run(tmp_path, "dora", items=[1, 0, 0, 0], mean_with="other")
    score_other(write_run(tmp_path, "lora", items=[1, 1, 1, 0], mean_with="other"), [0, 0, 0, 1])
    ((title, wide),) = wide_tables(method_table(load_runs(find_runs([tmp_path])).frame))
    assert title == "tiny trained on arith, all benchmarks, protocol plain"
    assert [name for name in wide.columns if name.endswith(", %")] == ["arith, %", "other, %", "mean of 2, %"]
    dora, lora = records(wide)
    assert (dora["Method"], dora["other, %"], dora["mean of 2, %"]) == ("dora", "", "")
    assert lora["other, %"] == "25.0 (4.6–69.9)"  # Wilson's interval for 1 of 4
    assert lora["mean of 2, %"].startswith("50.0 (")


def test_other_test_items_are_another_column(tmp_path: Path) -> None:
    for method, items, digit in (("dora", [1, 0], "0"), ("lora", [1, 1], "1")):
        run = write_run(tmp_path, method, items=items, mean_with="other")
        change(score_file(run), data_hash=digit * 64)
        score_other(run, [1, 1])
    ((_, wide),) = wide_tables(method_table(load_runs(find_runs([tmp_path])).frame))
    first, second = (name for name in wide.columns if name.startswith("arith"))
    assert ("test data 000000" in first, "test data 111111" in second) == (True, True)
    assert [row[first] == "" for row in records(wide)] == [False, True]


def test_incomplete_cells_say_so(tmp_path: Path) -> None:
    for seed in (0, 1):
        run = write_run(tmp_path, "lora", seed=seed, items=[1, 0], mean_with="other")
        if seed == 0:
            score_other(run, [1, 1])
    ((_, wide),) = wide_tables(method_table(load_runs(find_runs([tmp_path])).frame))
    (row,) = records(wide)
    assert row["other, %"].endswith(", 1 of 2 seeds")
    assert "seeds" not in row["arith, %"]


def test_one_benchmark_needs_no_wide_table(tmp_path: Path) -> None:
    write_run(tmp_path, "lora", items=[1, 0])
    assert not list(wide_tables(method_table(load_runs(find_runs([tmp_path])).frame)))


def test_a_cell_of_one_code_version_has_no_mark(tmp_path: Path) -> None:
    for seed in (0, 1):
        commit(score_file(write_run(tmp_path, "lora", seed=seed, items=[1, 0])), "0")
    (row,) = records(method_table(load_runs(find_runs([tmp_path])).frame))
    assert row["mixed"] == []


@pytest.mark.parametrize("name", MARKS)
def test_a_mixed_cell_is_marked(tmp_path: Path, name: str) -> None:
    for seed in (0, 1):
        run = write_run(tmp_path, "lora", seed=seed, items=[1, 0])
    if name == "code versions":
        commit(run / "train.json", "a")
    elif name == "protocols":
        change(score_file(run), protocol_version=2)
    elif name == "devices":
        record = read_json(run / "train.json")
        change(run / "train.json", environment=record["environment"] | {"device": "NVIDIA H200"})
    else:
        change(run / "train.json", **{{"base weights": "base_hash", "training data": "data_hash"}[name]: "0" * 64})
    table = method_table(load_runs(find_runs([tmp_path])).frame)
    (row,) = records(table)
    assert row["mixed"] == [name]
    assert display(table)["Score, %"].tolist() == [f"50.0 {MARKS[name]}"]
    assert to_markdown(table).splitlines()[-1].startswith(MARKS[name])
    assert f",{name}," in to_csv(table)


def test_a_score_whose_training_cannot_be_read_is_not_called_mixed(tmp_path: Path) -> None:
    write_run(tmp_path, "lora", seed=0, items=[1, 0])
    (write_run(tmp_path, "lora", seed=1, items=[1, 0]) / "train.json").write_text("{", encoding="utf-8")
    (row,) = records(method_table(load_runs(find_runs([tmp_path])).frame))
    assert (row["seeds"], row["mixed"]) == (2, [])


def test_a_score_under_another_protocol_than_the_training_is_marked(tmp_path: Path) -> None:
    change(score_file(write_run(tmp_path, "lora", items=[1, 0])), protocol="other")
    (row,) = records(method_table(load_runs(find_runs([tmp_path])).frame))
    assert row["mixed"] == ["protocols"]


def test_a_mean_of_parts_scored_by_different_code_is_marked(tmp_path: Path) -> None:
    """Benchmarks scored on two days: each score was made by one version of the code, the mean was not."""
    run = write_run(tmp_path, "lora", items=[1, 0], mean_with="other")
    commit(score_other(run, [1, 1]), "b")
    table = method_table(load_runs([run]).frame).set_index("benchmark")
    assert table["mixed"].to_dict() == {"arith": [], "other": ["code versions"], "mean of 2": ["code versions"]}


def test_bits_are_whole_numbers_next_to_a_base_without_any(tmp_path: Path) -> None:
    """The paper's tables look for them as text: 4, not 4.0."""
    for size in (4, 8):
        write_run(tmp_path, "lora", size=size, items=[1, 0])
    frame = load_runs(find_runs([tmp_path])).frame
    frame = frame.assign(quantizer=["nf", None], bits=pd.array([4, None], dtype="Int64"))
    table = method_table(frame)
    assert ",nf,4," in to_csv(table)
    assert sorted(display(table)["Quantised base"]) == ["", "nf, 4 bits"]
