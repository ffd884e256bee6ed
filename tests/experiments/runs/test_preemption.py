"""Runs stopped by real signals and restarted end like uninterrupted ones."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from eval.run import evaluate
from experiments import ROOT
from experiments.errors import Preempted, UserError
from experiments.runs import preemption
from experiments.runs.attempts import attempt
from experiments.runs.records import RunPaths, read_json, read_lines
from experiments.train import checkpoint as checkpoints
from experiments.train.run import train
from tests.conftest import planned

CLOCKS = ("seconds", "train_seconds", "step_seconds", "peak_memory_bytes", "resumed_at", "environment")
Seen = Callable[[RunPaths], bool]


def start(module: str, run: RunPaths, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", module, str(run.root)],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )


def preempt(module: str, run: RunPaths, seen: Seen, number: int = signal.SIGUSR1) -> dict[str, Any]:
    """Start a stage, send it a signal once `seen` accepts its directory, and return the marker's content."""
    process = start(module, run, SLURM_ARRAY_JOB_ID="7", SLURM_ARRAY_TASK_ID="3", SLURM_RESTART_COUNT="1")
    try:
        while process.poll() is None and not seen(run):
            time.sleep(0.001)
        process.send_signal(number)
        process.send_signal(number)  # Slurm repeats its signals
        _, errors = process.communicate(timeout=240)
    finally:
        process.kill()
    assert process.returncode == 75, errors[-2000:]
    line = errors.splitlines()[-1]
    assert line.startswith("preempted: ")
    assert signal.Signals(number).name in line
    assert not run.lock.exists()
    return read_json(run.preempted)


def beating(run: RunPaths) -> bool:
    """Return whether the attempt has begun, while Python still imports and loads."""
    return run.lock.is_file() and bool(run.lock.read_text(encoding="utf-8")) and run.heartbeat.is_file()


def after(steps: int) -> Seen:
    return lambda run: run.metrics.is_file() and len(run.metrics.read_text(encoding="utf-8").splitlines()) > steps


def saving(run: RunPaths) -> bool:
    return any(run.checkpoints.glob(".step-*"))


def content(run: RunPaths) -> dict[str, Any]:
    """Return all records of a run except clocks and machine."""
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


@pytest.mark.slow
def test_a_run_stopped_again_and_again_ends_as_if_undisturbed(
    undisturbed: RunPaths, settings: list[str], tmp_path: Path
) -> None:
    """During imports, twice in the middle of training, inside a save, and twice during evaluation."""
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
    assert done.wait(240) == 0
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
    attempts = json.loads(run.attempts.read_text(encoding="utf-8"))
    assert [entry["how"] for entry in attempts] == ["preempted"] * 4 + ["finished"] + ["preempted"] * 2 + ["finished"]
    assert (attempts[0]["job"], attempts[0]["restart"], attempts[-1]["job"]) == ("7_3", 1, None)
    assert all(entry["started"] < entry["ended"] for entry in attempts)
    assert read_json(run.heartbeat)["stage"] == "eval"


def start_two(run: RunPaths, port: int) -> list[subprocess.Popen[str]]:
    """Start two processes as srun does, without torchrun."""
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [start("experiments.train", run, RANK=str(rank), LOCAL_RANK=str(rank), **common) for rank in (0, 1)]


def listens(process: subprocess.Popen[str]) -> bool:
    """Return whether a process catches SIGTERM yet; in its first tenths of a second it would die and the other wait."""
    with contextlib.suppress(OSError):
        status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
        caught = int(re.findall(r"SigCgt:\s*(\w+)", status)[0], 16)
        return bool(caught >> (signal.SIGTERM - 1) & 1)
    return False


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.mark.slow
def test_all_processes_stop_at_one_step_though_one_was_asked(small: list[str], tmp_path: Path) -> None:
    """Before the first step and in the middle; then they resume and end like two uninterrupted ones."""
    settings = [*small, "recipe.epochs=6", "recipe.micro_batch_size=4", "recipe.adapter_dropout=0.1"]
    whole, broken = (planned([*settings, f"runtime.runs_dir={tmp_path / name}"]) for name in ("whole", "broken"))
    steps = []
    for seen in (beating, after(5)):
        processes = start_two(broken, free_port())
        while processes[0].poll() is None and not (seen(broken) and listens(processes[1])):
            time.sleep(0.001)
        processes[1].send_signal(signal.SIGTERM)
        for process in processes:
            assert process.wait(240) == 75, process.communicate()[1][-2000:]
        marker = read_json(broken.preempted)
        assert marker["signal"] == "SIGTERM"  # written by the first process, received by the second
        steps.append(marker["step"])
    assert steps[0] is None
    assert 5 < steps[1] < 48
    for run in (whole, broken):
        assert [process.wait(240) for process in start_two(run, free_port())] == [0, 0]
    assert train(broken).resumed_at == steps[1:]
    assert content(broken) == content(whole)


def test_a_disk_that_is_full_keeps_the_checkpoint_before(small: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit on file sizes simulates the full disk: a write inside a checkpoint's file fails."""
    run = planned([*small, "runtime.checkpoint_every=4"])
    publish, before = checkpoints.publish, resource.getrlimit(resource.RLIMIT_FSIZE)

    def publish_then_fill(*arguments: Any) -> None:
        publish(*arguments)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "publish", publish_then_fill)
        try:
            with pytest.raises(OSError, match=r"step-00000008: cannot be written, the previous checkpoint is kept"):
                train(run)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in run.checkpoints.iterdir()] == ["step-00000004"]
    assert "cannot be written" in json.loads(run.attempts.read_text(encoding="utf-8"))[-1]["error"]
    assert train(run).resumed_at == [4]


def test_a_new_checkpoint_is_never_dropped_for_stale_ones(tmp_path: Path) -> None:
    """The folder may hold later checkpoints of other data."""
    for step in (400, 500):
        checkpoints.folder(tmp_path, step).mkdir()
    for step in (100, 200, 300):
        aside = tmp_path / ".aside"
        aside.mkdir()
        checkpoints.publish(aside, checkpoints.folder(tmp_path, step), {})
        assert checkpoints.newest(tmp_path, {}) == checkpoints.folder(tmp_path, step)
    assert len(list(tmp_path.iterdir())) == checkpoints.KEEP


def test_a_signal_is_raised_at_once_where_nothing_is_lost(tmp_path: Path) -> None:
    run, before = RunPaths(tmp_path), signal.getsignal(signal.SIGUSR1)
    reached: list[str] = []

    def stage() -> None:
        with attempt(run, "eval"):
            reached.append("begun")
            signal.raise_signal(signal.SIGUSR1)
            reached.append("went on")

    with pytest.raises(Preempted, match="eval stopped by SIGUSR1"):
        stage()
    assert reached == ["begun"]
    marker = read_json(run.preempted)
    assert (marker["count"], marker["stage"], marker["step"]) == (1, "eval", None)
    with attempt(run, "eval") as heart:
        assert not run.preempted.exists()
        heart.at(3, 7)
    assert read_json(run.heartbeat)["step"] == 3
    assert signal.getsignal(signal.SIGUSR1) is before


def test_a_library_that_chokes_on_the_signal_is_preempted_and_a_mistake_is_not(tmp_path: Path) -> None:
    run = RunPaths(tmp_path)

    def stage(error: Exception) -> None:
        with attempt(run, "eval"):
            preemption.raise_immediately(False)
            signal.raise_signal(signal.SIGTERM)
            raise error

    with pytest.raises(Preempted):
        stage(RuntimeError("a worker died"))
    with pytest.raises(UserError):
        stage(UserError("no such file"))
    preemption.acknowledge()
    assert [entry["how"] for entry in json.loads(run.attempts.read_text(encoding="utf-8"))] == ["preempted", "failed"]


def test_a_signal_after_the_last_step_leaves_the_run_finished(tmp_path: Path) -> None:
    """The signal is handled by the next stage of the process."""
    run = RunPaths(tmp_path)
    with attempt(run, "train"):
        preemption.raise_immediately(False)
        signal.raise_signal(signal.SIGTERM)
    assert not run.preempted.exists()
    reached: list[str] = []
    with pytest.raises(Preempted), attempt(run, "eval"):
        reached.append("begun")
    assert not reached


def test_speed_and_remaining_time_are_of_this_attempt(tmp_path: Path) -> None:
    started = time.monotonic()
    with attempt(RunPaths(tmp_path), "train") as heart:
        heart.at(100, 200, 5000)  # resumed there
        time.sleep(0.5)
        heart.at(110, 200, 6000)
    beat = read_json(RunPaths(tmp_path).heartbeat)
    assert 1000 / (time.monotonic() - started) < beat["tokens_per_second"] <= 2000  # 1,000 tokens in 0.5 s or more
    assert beat["eta_seconds"] == pytest.approx(9 * 1000 / beat["tokens_per_second"], rel=0.1)
