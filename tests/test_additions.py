"""The files of docs/extend.md (a method, a task with its protocol, a benchmark), added to a copy of the clone."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import ROOT
from experiments.runs.config_files import read_config
from experiments.runs.records import EvalRecord, RunPaths, TrainRecord, read_record
from tests.conftest import SMALL

# The files that docs/extend.md shows: a code block whose first line is a comment with a path.
FILES: dict[str, str] = dict(
    re.findall(
        r"^```\w+\n# (\S+/\S+)\n(.*?)^```", (ROOT / "docs" / "extend.md").read_text(encoding="utf-8"), re.S | re.M
    )
)


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    folder = tmp_path / "clone"
    for name in ("diablo", "configs", "experiments", "eval", "slurm", "analysis", "tests", "results/gpu_h200"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    assert len(FILES) == 5
    for name, text in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def python(clone: Path, *arguments: str) -> str:
    told = subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=clone, env={**os.environ, "PYTHONPATH": str(clone)}, capture_output=True, encoding="utf-8", timeout=500,
    )  # fmt: skip
    assert told.returncode == 0, told.stdout[-2000:] + told.stderr[-2000:]
    return told.stdout


@pytest.mark.slow
def test_a_method_a_task_and_a_benchmark_of_ones_own(clone: Path, tmp_path: Path, cache_dir: Path) -> None:
    folders = [f"runtime.runs_dir={tmp_path / 'runs'}", f"runtime.cache_dir={cache_dir}"]
    sizes = [setting for setting in SMALL if setting.startswith("model.pretraining")]
    python(
        clone,
        "experiments.plan",
        "model=tiny",
        "task=toy",
        "method=toy",
        "recipe.batch_size=8",
        "recipe.micro_batch_size=8",
        *sizes,
        *folders,
    )
    (root,) = (tmp_path / "runs").glob("tiny-toy-r3-toy-s0-*")
    python(clone, "experiments.train", str(root))
    python(clone, "eval.run", str(root))
    run = RunPaths(root)
    assert read_config(run).mapping["method"]["adapter"]["_target_"] == "diablo.methods.toy.ToyConfig"
    trained = read_record(run.train_record, TrainRecord)
    assert trained.changed
    assert trained.steps == 8
    (evaluation,) = run.evaluations()
    score = read_record(evaluation.score, EvalRecord)
    assert (score.benchmark, score.protocol, score.n) == ("toy", "plain", 28)
    assert not score.identity


METHODS = "tests/experiments/train/test_methods.py"


@pytest.mark.slow
def test_the_contract_tests_find_a_method_of_ones_own(clone: Path) -> None:
    told = python(
        clone,
        "pytest",
        "-v",
        "-p",
        "no:cacheprovider",
        "-n",
        "0",
        "tests/experiments/train/test_methods.py",
        "-k",
        "toy",
    )
    for name in ("merged_equals_unmerged", "saved_and_loaded", "only_what_is_trained", "trainable_parameters_equal"):
        assert re.search(rf"test_{name}\w*\[.*toy\] PASSED", told), name
    assert " failed" not in told
