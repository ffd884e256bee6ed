"""Learning-rate sweeps, and the figures of sweeps, patterns, time and memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from analysis.load import find_runs, load_runs, records
from analysis.plots_sweeps import accuracy_by_setting, learning_rates, time_and_memory
from analysis.report import write_report
from analysis.sweeps import Sweep, failures, find_sweeps, sweep_table
from analysis.tables import method_table
from experiments.runs.records import RunPaths
from tests.analysis.analysis_runs import change, write_run


def frame_of(folder: Path) -> pd.DataFrame:
    return load_runs(find_runs([folder])).frame


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """LoRA at four learning rates: two seeds, two seeds, one diverged, one not trained. DiaBlo at one rate."""
    for rate, seed, items in ((1e-3, 0, [1, 0]), (1e-3, 1, [0, 0]), (2e-3, 0, [1, 1]), (2e-3, 1, [1, 0])):
        write_run(tmp_path, "lora", learning_rate=rate, seed=seed, items=items)
    change(write_run(tmp_path, "lora", learning_rate=4e-3, items=[1, 1]) / "train.json", final_loss=float("nan"))
    RunPaths(write_run(tmp_path, "lora", learning_rate=8e-3)).train_record.unlink()
    write_run(tmp_path, "diablo", items=[1, 1])
    return tmp_path


def the_sweep(frame: pd.DataFrame) -> Sweep:
    (sweep,) = find_sweeps(frame)
    return sweep


def test_every_run_is_a_point_and_failures_are_named(runs: Path) -> None:
    sweep = the_sweep(frame_of(runs))
    assert (sweep.model, sweep.task, sweep.quantity, sweep.lower) == ("tiny", "arith", "accuracy on arith, %", False)
    assert sweep_table(sweep).iloc[0].to_dict() == {
        "Method": "lora-r7",
        "0.001": "50.0 · 0.0",
        "0.002": "100.0 · 50.0 *",
        "0.004": "diverged",
        "0.008": "not trained",
    }
    assert sweep.best("lora-r7") == 2e-3
    assert failures(sweep) == [
        "lora-r7 at learning rate 0.004, seed 0: its training loss is not finite",
        "lora-r7 at learning rate 0.008, seed 0: no training record",
    ]


def test_a_rate_at_which_one_seed_failed_is_not_the_best(runs: Path) -> None:
    write_run(runs, "lora", learning_rate=2e-3, seed=2)
    sweep = the_sweep(frame_of(runs))
    assert sweep.best("lora-r7") == 1e-3
    assert "100.0 · 50.0 · not scored" in sweep_table(sweep).iloc[0].tolist()


def test_held_out_loss_goes_before_accuracy_and_less_is_better(runs: Path) -> None:
    frame = frame_of(runs)
    losses = [0.2 + row["learning_rate"] for row in records(frame)]
    sweep = the_sweep(frame.assign(held_out_loss=losses))
    assert (sweep.quantity, sweep.lower, sweep.best("lora-r7")) == ("held-out loss", True, 1e-3)
    assert sweep_table(sweep)["0.001"].tolist() == ["0.2010 · 0.2010 *"]


def test_a_rate_that_was_chosen_is_marked_by_what_it_was_chosen_by(runs: Path) -> None:
    """Also if the loss or a benchmark would have chosen another rate."""
    frame = frame_of(runs)
    chosen = [row["label"] == "lora-r7" and row["learning_rate"] == 1e-3 for row in records(frame)]
    frame = frame.assign(
        held_out_loss=1 - frame["learning_rate"],
        held_out_exact_match=0.5,
        rate_chosen=["best of 4 by held-out exact match" if it else None for it in chosen],
        rate_by=["exact_match" if it else None for it in chosen],
    )
    sweep = the_sweep(frame)
    assert (sweep.quantity, sweep.lower, sweep.best("lora-r7")) == ("held-out exact match, %", False, 1e-3)
    assert sweep_table(sweep)["0.001"].tolist() == ["50.0 · 50.0 *"]


def test_a_choice_that_cannot_be_read_is_named(runs: Path) -> None:
    run = next(runs.iterdir())
    RunPaths(run).learning_rate.write_text("{}", encoding="utf-8")
    found = load_runs([run])
    assert found.frame.dropna(subset=["rate_chosen"]).empty
    assert any("learning_rate.json" in problem for problem in found.problems)


def test_no_sweep_without_several_rates(tmp_path: Path) -> None:
    write_run(tmp_path, "lora", items=[1, 0])
    assert not list(find_sweeps(frame_of(tmp_path)))


def test_the_figure_draws_every_point_and_every_failure(runs: Path) -> None:
    write_run(runs, "diablo", learning_rate=2e-3, items=[1, 0])
    picture = learning_rates("rates", the_sweep(frame_of(runs)), ["diablo", "lora"])
    _, lora = picture.figure.axes
    points = next(line for line in lora.get_lines() if line.get_markerfacecolor() == "white")
    assert np.asarray(points.get_ydata())[:4].tolist() == [50, 0, 100, 50]
    crosses = next(line for line in lora.get_lines() if line.get_marker() == "x")
    assert np.asarray(crosses.get_xdata()).tolist() == [4e-3, 8e-3]
    assert lora.get_ylim()[0] < -10  # the crosses are below every value
    assert "2 runs failed (crosses)" in picture.caption


def test_patterns_are_a_line_each_with_their_seeds(tmp_path: Path) -> None:
    for pattern, items in (("random_row", [1, 0, 0, 0]), ("banded", [1, 1, 0, 0])):
        for seed in (0, 1):
            write_run(tmp_path, "sparse", pattern=pattern, seed=seed, items=items)
    write_run(tmp_path, "diablo", items=[1, 1, 1, 0])
    table = method_table(frame_of(tmp_path))
    assert table["size"].tolist() == ["N=7", "banded 1/7", "random_row 1/7"]
    axes = accuracy_by_setting("patterns", "title", table).figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["sparse-random_row", "sparse-banded", "diablo-N7"]
    seeds = [line for line in axes.get_lines() if line.get_markerfacecolor() == "white"]
    assert [np.asarray(line.get_xdata()).tolist() for line in seeds] == [[25, 25], [50, 50], [75]]
    assert {str(line.get_marker()) for line in seeds} == {"o", "D"}


def test_time_and_memory_of_every_run(tmp_path: Path) -> None:
    for seed, seconds in ((0, 0.02), (1, 0.04)):
        change(write_run(tmp_path, "lora", seed=seed) / "train.json", step_seconds=seconds)
    write_run(tmp_path, "dora")
    time, memory = time_and_memory("costs", "title", frame_of(tmp_path)).figure.axes
    lines: list[Any] = [line for line in time.get_lines() if line.get_marker() == "o"]
    assert [np.asarray(line.get_xdata()).tolist() for line in lines] == [[20, 40], [30]]
    median = [line for line in time.get_lines() if line.get_marker() == "|"]
    assert [float(np.asarray(line.get_xdata())[0]) for line in median] == [30, 30]
    assert float(np.asarray(memory.get_lines()[0].get_xdata())[0]) == pytest.approx(1e9 / 2**20)
    assert time.get_xlim()[0] == 0


def test_the_page_lists_sweep_and_failures_and_no_figure_of_sizes(runs: Path) -> None:
    for rate in (1e-3, 2e-3):
        write_run(runs, "dora", learning_rate=rate, items=[1, 0])
    text = write_report(find_runs([runs]), runs / "report", None, "Sweep").read_text(encoding="utf-8")
    assert "<h2>Learning rates</h2>" in text
    assert "lora-r7 at learning rate 0.008, seed 0: no training record" in text
    figures = {path.stem for path in (runs / "report" / "figures").glob("*.svg")}
    assert figures == {"learning_rates_1", "gradient_norms_1", "time_and_memory_1"}
