"""Tokens, GPU-hours and budgets of planned runs, against sums computed by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from experiments.config import RunConfig
from experiments.plan.__main__ import main
from experiments.plan.choose import stages, stages_of
from experiments.plan.compose import plan
from experiments.plan.cost import Speed, gpu_hours, read_budget, read_speed, rows_trained_on, tokens
from experiments.plan.experiment_files import PAPER
from experiments.plan.selection import Selection, select

FailsWith = Callable[[Callable[[], object]], str]
FILE = """
title: Cells
common: model=tiny task=arith method.adapter.num_blocks=8 seed=0,1
learning_rate_by: loss
paper:
  - method=diablo recipe.learning_rate=0.01,0.02
grids:
  - method=diablo method.adapter.num_blocks=4 recipe.learning_rate=0.03
"""


@pytest.fixture
def cells(tmp_path: Path) -> str:
    path = tmp_path / "cells.yaml"
    path.write_text(FILE, encoding="utf-8")
    return f"experiment={path}"


def test_rows_are_those_of_whole_batches() -> None:
    (config,) = plan(["task=arith", "method=lora", "seed=0"])
    assert rows_trained_on(config) == 2 * (1456 // 16) * 16
    (config,) = plan(["task=arith", "method=lora", "seed=0", "recipe.max_steps=10"])
    assert rows_trained_on(config) == 160
    (config,) = plan(["task=arith", "method=base", "seed=0"])
    assert tokens(config, Speed({})) == 0
    real = ["model=llama2_7b", "task=commonsense_170k", "method=diablo", "task.data.heldout=1000"]
    (config,) = plan(real)
    assert rows_trained_on(config) == 3 * (169_420 // 16) * 16


def test_more_rows_than_can_be_generated_are_told(fails_with: Callable[[Callable[[], object]], str]) -> None:
    (config,) = plan(["task.data.train=100000000"])
    assert "problems are too many" in fails_with(lambda: rows_trained_on(config))


def test_a_dry_run_tells_that_a_batch_is_larger_than_the_data(
    fails_with: Callable[[Callable[[], object]], str],
) -> None:
    said = fails_with(lambda: main(["recipe.batch_size=2048", "--dry-run"]))
    assert "recipe.batch_size=2048: the training rows do not fill one batch: give fewer" in said


def test_tokens_are_those_a_run_counts(tmp_path: Path, cache_dir: Path) -> None:
    """All rows fill whole batches here, so that the mean times the number of rows equals the sum."""
    from experiments.plan.compose import write_runs
    from experiments.train.run import train
    from tests.conftest import SMALL

    small = [*SMALL, f"runtime.runs_dir={tmp_path / 'runs'}", f"runtime.cache_dir={cache_dir}"]
    (config,) = plan([*small, "method=lora", "seed=0"])
    counted = tokens(config, Speed({}))
    (run,) = write_runs([config])
    assert counted == pytest.approx(train(run).tokens)
    assert counted is not None
    assert gpu_hours(config, Speed({"": 100.0})) == pytest.approx(counted / 360_000)
    assert gpu_hours(config, Speed({"llama2_7b": 100.0})) is None


def test_without_the_tokenizer_tokens_are_what_one_row_is_said_to_have() -> None:
    (config,) = plan(["model=llama2_7b", "task=commonsense_170k", "method=diablo"])
    assert tokens(config, Speed({})) is None
    speed = read_speed(["llama2_7b=1000", "2000"], 67.5)
    assert gpu_hours(config, speed) == pytest.approx(3 * 170_416 * 67.5 / 1000 / 3600)
    (other,) = plan(["model=llama3_8b", "task=commonsense_170k", "method=diablo"])
    assert gpu_hours(other, speed) == pytest.approx(3 * 170_416 * 67.5 / 2000 / 3600)


def test_a_budget_gives_every_setting_one_seed_before_any_gets_two(cells: str, fails_with: FailsWith) -> None:
    found = stages([cells])
    assert (len(found.rate_search), len(found.final), len(found.to_come)) == (2, 2, 2)
    speed = Speed({"": 1000.0})
    hour = gpu_hours(found.final[0], speed)
    assert hour is not None

    def kept(budget: float) -> tuple[list[tuple[int, int]], list[tuple[int, int]], list[str]]:
        selected = select([cells], Selection(budget=budget * hour, speed=speed))
        chosen = stages_of(selected.configs, selected.by)
        return sizes(chosen.known()), sizes(chosen.following()), selected.lines()[1:]

    def sizes(runs: list[RunConfig]) -> list[tuple[int, int]]:
        return [(run.mapping["method"]["adapter"]["num_blocks"], run.seed) for run in runs]

    assert kept(5.01) == ([(8, 0), (8, 0), (4, 0), (4, 1)], [(8, 1)], [])
    assert kept(3.01) == (
        [(8, 0), (8, 0), (4, 0)],
        [],
        ["  diablo-N8 on tiny and arith: 1 of 3 runs", "  diablo-N4 on tiny and arith: 1 of 2 runs"],
    )
    assert kept(1.01) == (
        [(4, 0)],
        [],
        ["  diablo-N8 on tiny and arith: 3 of 3 runs", "  diablo-N4 on tiny and arith: 1 of 2 runs"],
    )
    said = fails_with(lambda: kept(0.99))
    assert "gpuh is too small: the cheapest setting, diablo-N4 on tiny and arith, takes" in said


def test_a_budget_is_kept_to_when_the_learning_rates_are_chosen(cells: str) -> None:
    """A separate job submits the second stage and must select the same runs."""
    before = select([cells], Selection(budget=4.01, speed=Speed({"": 1.0})), lambda config: 1.0)
    known = [(config.mapping["method"]["adapter"]["num_blocks"], config.seed) for config in before.configs]
    assert known == [(8, 0), (8, 0), (8, 1), (8, 1), (4, 0)]
    found = stages_of(before.configs, before.by)
    assert len(found.following()) == 1


def test_the_command(cells: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], fails_with: FailsWith) -> None:
    main([cells, "--dry-run", "--tokens-per-second", "1000"])
    shown = capsys.readouterr()
    assert "\n4 runs, " in shown.out
    assert "GPU-hours of training of all 5" in shown.out
    assert shown.out.endswith("\n1 more run follows when its learning rate is chosen\n")
    assert "unknown" not in shown.out
    main([cells, "--dry-run", "--paper"])
    shown = capsys.readouterr().out
    assert "\n2 runs, " in shown
    assert "unknown: GPU-hours of tiny: no speed was given: give --tokens-per-second tiny=N" in shown
    main([cells, "--tokens-per-second", "1e6", "--budget", "0.00016gpuh", f"runtime.runs_dir={tmp_path / 'runs'}"])
    assert "left out by the budget:" in capsys.readouterr().err
    assert len(list((tmp_path / "runs").iterdir())) == 3
    assert "write GPU-hours as 200gpuh" in fails_with(lambda: read_budget("200h"))
    assert "give a number, or MODEL=number" in fails_with(lambda: read_speed(["llama=fast"], None))
    assert "no cells of the paper" in fails_with(lambda: plan(["experiment=quickstart", PAPER]))
    real = ["model=llama2_7b", "task=commonsense_170k", "method=diablo", "--budget", "1gpuh"]
    said = fails_with(lambda: main(real))
    assert "give --tokens-per-second llama2_7b=… and --tokens-per-row …" in said
