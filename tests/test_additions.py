"""A method added to a copy of the clone as CONTRIBUTING.md says, and docs/extend.md's task, protocol and benchmark."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import ROOT
from experiments.runs.config_files import read_config
from experiments.runs.records import EvalRecord, RunPaths, TrainRecord, read_record
from tests.conftest import SMALL

GUIDE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("\n## Add a method\n")[2]
# The guide's files: a line with a path, then a fenced block with the content.
METHOD = dict(re.findall(r"^`([\w./]+)`:\n\n```\w+\n(.*?)```$", GUIDE, re.MULTILINE | re.DOTALL))
COMMANDS = re.findall(r"^```sh\n(.*?)```$", GUIDE, re.MULTILINE | re.DOTALL)[0].splitlines()
# The task, the protocol and the benchmark of docs/extend.md: a block whose first line is a comment with a path.
PAGE = (ROOT / "docs" / "extend.md").read_text(encoding="utf-8")
FILES: dict[str, str] = dict(re.findall(r"^```\w+\n# (\S+/\S+)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL))


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    folder = tmp_path / "clone"
    for name in ("diablo", "configs", "experiments", "eval", "slurm", "analysis", "tests", "results/gpu_h200"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    for name, text in {**METHOD, **FILES}.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text.lstrip(), encoding="utf-8")
    return folder


def shell(clone: Path, command: str) -> str:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    told = subprocess.run(
        ["bash", "-ec", command],
        cwd=clone, env={**os.environ, "PATH": path, "PYTHONPATH": str(clone)},
        capture_output=True, encoding="utf-8", timeout=500, check=False,
    )  # fmt: skip
    assert told.returncode == 0, told.stdout[-2000:] + told.stderr[-2000:]
    return told.stdout


def test_the_guide_adds_a_method_in_two_files() -> None:
    assert set(FILES) == {"configs/task/toy.yaml", "configs/protocol/toy/plain.yaml", "eval/tasks/toy.yaml"}
    assert set(METHOD) == {"diablo/methods/rslora.py", "configs/method/rslora.yaml"}
    assert [command.split()[2] for command in COMMANDS] == [
        *("pytest", "experiments.plan", "experiments.train", "eval.run")
    ]


@pytest.mark.slow
def test_the_guide_s_commands(clone: Path, cache_dir: Path) -> None:
    """Its lines as they are, but for a smaller model and less data, and for names of tests that passed."""
    added = {
        "pytest": " -v -n 0 -p no:cacheprovider",
        "experiments.plan": " " + " ".join(map(shlex.quote, [*SMALL, f"runtime.cache_dir={cache_dir}"])),
    }
    told = {}
    for command in COMMANDS:
        command = command.partition("#")[0].strip()
        module = command.split()[2]
        told[module] = shell(clone, command + added.get(module, ""))
    for name in ("merged_equals_unmerged", "saved_and_loaded", "only_what_is_trained", "trainable_parameters_equal"):
        assert re.search(rf"test_{name}\w*\[.*rslora\] PASSED", told["pytest"]), name
    assert " failed" not in told["pytest"]
    (root,) = (clone / "runs").glob("tiny-rslora-*")
    run = RunPaths(root)
    assert read_config(run).mapping["method"]["adapter"]["_target_"] == "diablo.methods.rslora.RsloraConfig"
    assert read_record(run.train_record, TrainRecord).changed
    assert len(run.evaluations()) == 1


@pytest.mark.slow
def test_a_task_and_a_benchmark_of_ones_own(clone: Path, cache_dir: Path) -> None:
    sizes = [setting for setting in SMALL if setting.startswith("model.pretraining")]
    settings = ["recipe.learning_rate=1e-2", "recipe.batch_size=8", "recipe.micro_batch_size=8", *sizes]
    words = map(shlex.quote, ["model=tiny", "task=toy", "method=rslora", *settings, f"runtime.cache_dir={cache_dir}"])
    root = Path(shell(clone, f"python -m experiments.plan {' '.join(words)}").strip())
    shell(clone, f"python -m experiments.train {root}; python -m eval.run {root}")
    run = RunPaths(clone / root)
    trained = read_record(run.train_record, TrainRecord)
    assert trained.changed
    assert trained.steps == 8
    (evaluation,) = run.evaluations()
    score = read_record(evaluation.score, EvalRecord)
    assert (score.benchmark, score.protocol, score.n) == ("toy", "plain", 28)
    assert not score.identity
