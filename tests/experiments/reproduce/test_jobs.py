"""The jobs of an experiment: their order, the time limit, and runs finished elsewhere."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from analysis.export import export_run
from experiments import ROOT
from experiments.errors import UserError
from experiments.plan.compose import plan, run_paths, write_runs
from experiments.reproduce.jobs import Job, Jobs, take_in
from experiments.reproduce.run import execute, reproduce
from experiments.runs.records import TrainRecord, read_json, read_record
from tests.conftest import SMALL
from tests.experiments.plan.test_choose import pretend

FILE = """
title: Two methods
common: model=tiny task=arith seed=3,4
learning_rate_by: loss
grids:
  - method=diablo recipe.learning_rate=1e-3,1e-2
  - method=base seed=0 recipe.learning_rate=0
  - method=lora recipe.learning_rate=1e-3,1e-2
"""


@pytest.fixture
def arguments(tmp_path: Path, cache_dir: Path) -> list[str]:
    path = tmp_path / "two_methods.yaml"
    path.write_text(FILE, encoding="utf-8")
    small = [*SMALL, "recipe.max_steps=2", f"runtime.runs_dir={tmp_path / 'runs'}", f"runtime.cache_dir={cache_dir}"]
    return [f"experiment={path}", *small]


@pytest.fixture
def record(finished: object) -> TrainRecord:
    return read_record(finished.train_record, TrainRecord)  # pyright: ignore[reportAttributeAccessIssue]


def short(job: Job | None) -> tuple[str, float, int, bool] | None:
    if job is None:
        return None
    config = job.config
    return config.method.name, config.recipe.learning_rate, config.seed, job.score


def test_jobs_follow_the_grids_and_seeds_follow_their_choice(arguments: list[str], record: TrainRecord) -> None:
    jobs = Jobs(arguments)
    assert jobs.total() == 9  # 2 rates and 2 seeds of two methods, and the base
    first, second, base, lora = (jobs.take() for _ in range(4))
    assert first is not None
    assert second is not None
    assert [short(job) for job in (first, second, base, lora)] == [
        ("diablo", 1e-3, 3, False),
        ("diablo", 1e-2, 3, False),
        ("base", 0, 0, True),  # DiaBlo's seeds wait for its learning rate, these do not
        ("lora", 1e-3, 3, False),
    ]
    pretend(first.config, record, 0.5, 0.0)
    jobs.done(first, 1.0)
    pretend(second.config, record, 0.25, 0.0)
    jobs.done(second, 1.0)
    assert [short(jobs.take()) for _ in range(3)] == [
        ("diablo", 1e-2, 3, True),
        ("diablo", 1e-2, 4, True),
        ("lora", 1e-2, 3, False),
    ]


def test_a_worker_waits_for_a_choice_that_others_are_making(arguments: list[str], record: TrainRecord) -> None:
    jobs = Jobs([*arguments, "method=diablo"])
    taken = [jobs.take(), jobs.take()]
    found: list[Job | None] = []
    waiting = threading.Thread(target=lambda: found.append(jobs.take()))
    waiting.start()
    for job, loss in zip(taken, (0.5, 0.25), strict=True):
        assert job is not None
        assert not found
        pretend(job.config, record, loss, 0.0)
        jobs.done(job, 1.0)
    waiting.join(30)
    # Seed 3 comes second if the choice was seen between the last record and the end of its job, which trained seed 3.
    assert len(found) == 1
    assert {short(job) for job in [*found, jobs.take()]} == {("diablo", 1e-2, 3, True), ("diablo", 1e-2, 4, True)}


def test_after_a_failure_the_others_go_on_and_nobody_waits(arguments: list[str]) -> None:
    jobs = Jobs(arguments)
    count = 0
    while (job := jobs.take()) is not None:
        jobs.done(job, 1.0, "failed")
        count += 1
    assert count == 5  # without learning rates to choose
    assert len(jobs.failed) == 5


def test_no_job_is_begun_that_does_not_fit(arguments: list[str], record: TrainRecord) -> None:
    jobs = Jobs(arguments, deadline=time.time() + 100)
    for loss in (0.5, 0.25):
        job = jobs.take()
        assert job is not None
        pretend(job.config, record, loss, 0.0)
        jobs.done(job, 10.0)
    chosen = jobs.take()
    assert short(chosen) == ("diablo", 1e-2, 3, True)
    assert chosen is not None
    jobs.done(chosen, 1000.0)  # runs to be scored would exceed the time left, runs that only train do not
    assert short(jobs.take()) == ("lora", 1e-3, 3, False)
    left = [config for config in jobs.configs if (config.run_id, True) in jobs.left_out]
    assert [(config.method.name, config.seed) for config in left] == [("diablo", 4), ("base", 0)]


def test_the_time_limit_ends_an_experiment_cleanly_and_the_same_command_goes_on(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, *overrides = arguments
    name = name.removeprefix("experiment=")
    jobs = Jobs(arguments, deadline=time.time() + 60)
    jobs.done(Job(plan([*arguments])[0], True), 1e6)
    jobs.done(Job(plan([*arguments])[0], False), 0.0)
    execute("Two", jobs, workers=1)
    assert len(jobs.left_out) == 5
    capsys.readouterr()
    reproduce(name, overrides, tmp_path / "report", minutes=60)
    assert "[1/9]" in capsys.readouterr().out
    scores = list((tmp_path / "runs").glob("*/eval/*/*/score.json"))
    assert len(scores) == 5


def test_runs_finished_elsewhere_count(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All are reported without an adapter; one that must be rescored is retrained."""
    name, *overrides = arguments
    name = name.removeprefix("experiment=")
    reproduce(name, overrides, tmp_path / "report")
    before = accuracies(tmp_path / "report" / "table.csv")
    exported = tmp_path / "exported"
    for run in (tmp_path / "runs").iterdir():
        if (run / "config.yaml").is_file():
            export_run(run, exported)
    shutil.rmtree(tmp_path / "runs")
    capsys.readouterr()
    reproduce(name, overrides, tmp_path / "report", results=exported)
    assert "7 runs taken from" in capsys.readouterr().out
    assert not list((tmp_path / "runs").glob("*/adapter"))

    assert accuracies(tmp_path / "report" / "table.csv") == before
    scored = next((tmp_path / "runs").glob("*diablo*-s4-*/eval"))
    held_out = read_json(scored.parent / "held_out.json")
    shutil.rmtree(scored)
    reproduce(name, overrides, tmp_path / "report")
    assert list(scored.glob("*/*/score.json"))
    assert read_json(scored.parent / "held_out.json") == held_out  # retrained, bit for bit equal
    assert (scored.parent / "adapter").is_dir()


def accuracies(table: Path) -> list[tuple[str, ...]]:
    with table.open(encoding="utf-8") as file:
        return [tuple(row[name] for name in ("label", "seeds", "accuracy", "by_seed")) for row in csv.DictReader(file)]


def test_an_export_that_was_edited_is_refused(arguments: list[str], tmp_path: Path, finished: object) -> None:
    configs = plan(arguments)
    (run,) = write_runs(configs[:1])
    run.train_record.write_text("{}", encoding="utf-8")
    shutil.move(run.root, tmp_path / "exported" / run.root.name)
    config = tmp_path / "exported" / run.root.name / "config.yaml"
    config.write_text(config.read_text(encoding="utf-8").replace("seed: 3", "seed: 5"), encoding="utf-8")
    with pytest.raises(UserError, match="undo the edit"):
        take_in(configs, tmp_path / "exported")
    assert not run_paths(configs[0]).root.exists()


@pytest.mark.slow
def test_an_error_that_is_nobodys_ends_the_workers_that_wait(arguments: list[str], tmp_path: Path) -> None:
    """A run's config cannot be written while one worker trains and another waits for the choice."""
    name, *overrides = [*arguments, "method=diablo"]
    broken = Jobs([name, *overrides]).known()[0].run.config
    (broken / "in the way").mkdir(parents=True)
    command = [sys.executable, "-m", "experiments.reproduce", name.removeprefix("experiment="), *overrides]
    done = subprocess.run(
        [*command, "--workers", "3"], cwd=ROOT, capture_output=True, encoding="utf-8", timeout=400, check=False
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: [Errno 21] Is a directory")


@pytest.mark.slow
def test_a_worker_does_one_run_after_the_other(arguments: list[str], tmp_path: Path) -> None:
    """Two processes work through seven runs and produce the same files as one process."""
    name, *overrides = arguments
    name = name.removeprefix("experiment=")
    reproduce(name, overrides, tmp_path / "report", workers=2)
    attempts = [read_json_list(path) for path in (tmp_path / "runs").glob("*/attempts.json")]
    assert len({entry["pid"] for run in attempts for entry in run}) == 2
    alone = [override for override in overrides if not override.startswith("runtime.runs_dir")]
    reproduce(name, [*alone, f"runtime.runs_dir={tmp_path / 'alone'}"], tmp_path / "report2")
    for path in (tmp_path / "alone").glob("*/train.json"):
        there = read_json(tmp_path / "runs" / path.parent.name / "train.json")
        assert read_json(path)["adapter_files"] == there["adapter_files"]


def read_json_list(path: Path) -> list[dict[str, object]]:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("settings", "said"), [({"minutes": 0.0}, "--minutes 0: give more than 0"), ({"workers": 0}, "--workers 0")]
)
def test_bad_input(
    settings: dict[str, float], said: str, arguments: list[str], fails_with: Callable[[Callable[[], object]], str]
) -> None:
    assert said in fails_with(lambda: reproduce("quickstart", arguments[1:], **settings))  # pyright: ignore
