"""Runs that real signals stop and that are started again end as if nothing had been."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from eval.run import evaluate
from experiments.records import RunPaths, read_json, read_lines
from experiments.train import train
from tests.conftest import planned

ROOT = Path(__file__).resolve().parent.parent
CLOCKS = ("seconds", "train_seconds", "step_seconds", "peak_memory_bytes", "resumed_at", "environment")
Seen = Callable[[RunPaths], bool]


def start(module: str, run: RunPaths, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", module, str(run.root)],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def preempt(module: str, run: RunPaths, seen: Seen, number: int = signal.SIGUSR1) -> dict[str, Any]:
    """Start a stage, send it a signal as soon as something is seen in its directory, and read the marker."""
    process = start(module, run, SLURM_ARRAY_JOB_ID="7", SLURM_ARRAY_TASK_ID="3", SLURM_RESTART_COUNT="1")
    try:
        while process.poll() is None and not seen(run):
            time.sleep(0.001)
        process.send_signal(number)
        process.send_signal(number)  # Slurm repeats its signals
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 75, errors[-2000:]
    line = errors.splitlines()[-1]
    assert line.startswith("preempted: ")
    assert signal.Signals(number).name in line
    assert not run.lock.exists()
    return read_json(run.preempted)


def beating(run: RunPaths) -> bool:
    """The attempt has begun: Python imports and loads."""
    return run.lock.is_file() and bool(run.lock.read_text()) and run.heartbeat.is_file()


def after(steps: int) -> Seen:
    return lambda run: run.metrics.is_file() and len(run.metrics.read_text().splitlines()) > steps


def saving(run: RunPaths) -> bool:
    return any(run.checkpoints.glob(".step-*"))


def content(run: RunPaths) -> dict[str, Any]:
    """Everything a run recorded, but for clocks and machine."""
    found: dict[str, Any] = {path.name: path.read_bytes() for path in run.adapter.iterdir()}
    for name in ("metrics.jsonl", "eval/*/*/samples.jsonl"):
        for path in run.root.glob(name):
            found[path.name] = [{k: v for k, v in line.items() if k not in CLOCKS} for line in read_lines(path)]
    for name in ("train.json", "eval/*/*/score.json"):
        for path in run.root.glob(name):
            found[path.name] = {k: v for k, v in read_json(path).items() if k not in (*CLOCKS, "samples_hash")}
    return found


@pytest.fixture(scope="module")
def settings(cache_dir: Path) -> list[str]:
    from tests.conftest import SMALL

    return [
        *(*SMALL, "recipe.epochs=15", "recipe.adapter_dropout=0.1", "runtime.checkpoint_every=20"),
        *("evaluation.batch_size=1", f"runtime.cache_dir={cache_dir}"),  # 120 steps, 7 chunks of 4 rows
    ]


@pytest.fixture(scope="module")
def undisturbed(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> RunPaths:
    run = planned([*settings, f"runtime.runs_dir={tmp_path_factory.mktemp('undisturbed')}"])
    train(run)
    evaluate(run)
    return run


def test_a_run_stopped_again_and_again_ends_as_if_undisturbed(
    undisturbed: RunPaths, settings: list[str], tmp_path: Path
) -> None:
    """While it imports, in the middle of training twice in a row, inside a save, and twice in the evaluation."""
    run = planned([*settings, f"runtime.runs_dir={tmp_path}"])
    markers = [preempt("experiments.train", run, beating)]
    assert not run.checkpoints.exists()
    markers.append(preempt("experiments.train", run, after(10), signal.SIGTERM))
    first = markers[-1]["step"]
    markers.append(preempt("experiments.train", run, after(first + 3)))
    markers.append(preempt("experiments.train", run, saving))
    assert markers[0]["step"] is None
    assert 10 < first < markers[2]["step"] <= markers[3]["step"] < 120
    done = start("experiments.train", run)
    assert done.wait(120) == 0
    assert not run.preempted.exists()
    assert train(run).resumed_at == [marker["step"] for marker in markers[1:]]
    markers.append(preempt("eval.run", run, beating, signal.SIGTERM))
    markers.append(preempt("eval.run", run, lambda run: any(run.root.glob("eval/*/*/chunks/0*"))))
    assert 0 < len(list(run.root.glob("eval/*/*/chunks/0*"))) < 7
    assert [marker["count"] for marker in markers] == [1, 2, 3, 4, 5, 6]
    assert [marker["stage"] for marker in markers] == ["train"] * 4 + ["eval"] * 2
    evaluate(run)
    assert not run.preempted.exists()
    assert content(run) == content(undisturbed)
    attempts = json.loads(run.attempts.read_text())
    assert [entry["how"] for entry in attempts] == ["preempted"] * 4 + ["finished"] + ["preempted"] * 2 + ["finished"]
    assert (attempts[0]["job"], attempts[0]["restart"], attempts[-1]["job"]) == ("7_3", 1, None)
    assert all(entry["started"] < entry["ended"] for entry in attempts)
    assert read_json(run.heartbeat)["stage"] == "eval"
