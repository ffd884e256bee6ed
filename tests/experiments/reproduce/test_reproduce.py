"""The whole pipeline through its commands, as typed by a user."""

from __future__ import annotations

import ast
import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

from eval.run import evaluate
from experiments import ROOT
from experiments.plan.compose import plan, write_runs
from experiments.reproduce.run import reproduce
from experiments.runs.records import read_json
from experiments.speed.timing import FLOOR, can_measure, measure_step_times
from experiments.train.run import train
from tests.conftest import SMALL, planned


def test_quickstart_end_to_end(tmp_path: Path, cache_dir: Path) -> None:
    """Every run of the experiment, shortened to seconds: the page, the table, and no work done twice."""
    overrides = [
        *SMALL,
        "recipe.max_steps=2",
        f"runtime.runs_dir={tmp_path / 'runs'}",
        f"runtime.cache_dir={cache_dir}",
    ]
    page = reproduce("quickstart", overrides, tmp_path / "report")
    text = page.read_text(encoding="utf-8")
    assert "http://" not in text.replace("http://www.w3.org", "")  # no external resources are loaded
    assert "given for all runs, whatever title and notes say: model.pretraining.steps=4 task.data.train=64" in text
    assert "runtime.runs_dir=" not in text
    with (tmp_path / "report" / "table.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["label"] for row in rows} == {
        *("base", "full", "lora-r6", "dora-r6", "pissa-r6", "milora-r6", "diablo-N4", "diablo-N8", "diablo-N16")
    }
    for row in rows:
        assert row["n"] == "28"
        assert (row["step_time_ratio"] == "") == (row["label"] == "base")
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*") if path.is_file()}
    reproduce("quickstart", overrides, tmp_path / "report")
    assert files == {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*") if path.is_file()}


def test_step_times_are_interleaved_and_kept(tmp_path: Path, cache_dir: Path) -> None:
    configs = plan([*SMALL, "method=lora,diablo,base", f"runtime.cache_dir={cache_dir}"])
    path = measure_step_times(configs, tmp_path, rounds=3, length=16)
    content = read_json(path)
    assert set(content["seconds"]) == {FLOOR, "lora-r6", "diablo-N8"}
    assert all(len(times) == 3 and min(times) > 0 for times in content["seconds"].values())
    before = path.stat().st_mtime_ns
    assert measure_step_times(configs, tmp_path, rounds=3, length=16) == path
    assert path.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("arguments", "measured"),
    [
        (["method=lora,base"], True),
        (["method=base"], False),
        (["model=smollm2_135m", "method=lora,diablo", "recipe.learning_rate=1e-3"], False),
        (["model=tiny,smollm2_135m", "method=lora", "recipe.learning_rate=1e-3"], False),
        (["task=arith,gsm8k", "method=lora", "recipe.learning_rate=1e-3"], False),
    ],
)
def test_step_times_are_of_one_task_and_one_small_model(arguments: list[str], measured: bool) -> None:
    """All methods' models are in memory together, and a label must identify one of them."""
    assert can_measure(plan(arguments)) == measured


def test_a_task_trains_and_scores_on_real_rows(data_root: Path, small: list[str]) -> None:
    """The smallest of five; all of them are below."""
    settings = [override for override in small if not override.startswith("task.data.")]
    run = planned(
        [
            *(*settings, "task=safety_7k", "method=diablo", "recipe.learning_rate=4e-2", "recipe.max_steps=3"),
            *("protocol.max_length=256", "evaluation.limit=2", f"runtime.data_root={data_root}"),
        ]
    )
    record = train(run)
    assert record.rows == 7483
    assert 0 < record.examples <= record.rows
    assert {score.benchmark for score in evaluate(run)} == {"advbench", "xstest_unsafe", "xstest_safe"}


@pytest.mark.slow
def test_every_task_trains_and_scores_on_real_rows(data_root: Path, tmp_path: Path, cache_dir: Path) -> None:
    """Five tasks' real files through the real pipeline: a few steps, a few rows of each benchmark, one page."""
    page = reproduce(
        "real_data_tiny",
        [
            *("model.pretraining.steps=4", "recipe.max_steps=2", "evaluation.limit=4", "runtime.device=cpu"),
            *("recipe.batch_size=4", "recipe.micro_batch_size=4"),
            *("evaluation.generation.max_new_tokens=8", "evaluation.full_batches_of=null"),
            *(f"runtime.runs_dir={tmp_path / 'runs'}", f"runtime.cache_dir={cache_dir}"),
            f"runtime.data_root={data_root}",
        ],
        tmp_path / "report",
    )
    with (tmp_path / "report" / "table.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["benchmark"] for row in rows} == {
        *("boolq", "piqa", "social_i_qa", "hellaswag_sample", "winogrande", "arc_easy", "arc_challenge", "openbookqa"),
        *("gsm8k", "math", "svamp", "mawps", "aqua", "human_eval", "advbench", "xstest_unsafe", "xstest_safe"),
    }  # scores of a few rows give no mean
    assert all(row["accuracy"] for row in rows)
    for protocol in ("diablo", "pyreft", "lori"):
        assert f"protocol {protocol}" in page.read_text(encoding="utf-8")
    records = [read_json(path) for path in (tmp_path / "runs").glob("*/train.json")]
    assert sorted(record["rows"] for record in records) == sorted(2 * [74265, 7473, 9371, 6552, 7483])
    assert all(0 < record["examples"] <= record["rows"] for record in records)


@pytest.mark.slow
def test_a_fresh_install_of_the_package_needs_no_hydra(tmp_path: Path) -> None:
    """After `pip install .`, `import diablo` works without Hydra and the rest of this repository."""
    target = tmp_path / "site"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(target), str(ROOT)], check=True
    )
    assert {path.name for path in target.iterdir() if path.is_dir() and "dist-info" not in path.name} == {"diablo"}
    code = (
        "import sys, diablo; print(diablo.__file__); "
        "assert not {'hydra', 'omegaconf', 'experiments'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(target)},
        capture_output=True,
        encoding="utf-8",
        check=True,
    )
    assert str(target) in done.stdout


@pytest.mark.slow
def test_the_tiny_model_learns_the_task(tmp_path: Path) -> None:
    """At full size, the base fails the task and full fine-tuning learns it; other methods are not tested."""
    accuracy = {}
    arguments = ["model=tiny", "task=arith", "method=base,full", f"runtime.runs_dir={tmp_path / 'runs'}"]
    for run in write_runs(plan(arguments)):
        train(run)
        (score,) = evaluate(run)
        accuracy[score.run_id.split("-")[1]] = score.accuracy
    assert accuracy["base"] < 0.1
    assert accuracy["full"] > 0.8


MAY_IMPORT = {
    "diablo": set(),
    "experiments": {"diablo"},
    "eval": {"experiments", "diablo"},
    "analysis": {"experiments"},
    "slurm": {"experiments"},
}


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_who_imports_whom(package: str) -> None:
    """Reading records needs no torch, diablo does not import runs; only reproduce and jobs start later stages."""
    for path in (ROOT / package).rglob("*.py"):
        if path.relative_to(ROOT).as_posix() in ("experiments/reproduce/run.py", "experiments/reproduce/jobs.py"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found = {name.split(".")[0] for name in names} & MAY_IMPORT.keys()
            assert found <= {package, *MAY_IMPORT[package]}, path
