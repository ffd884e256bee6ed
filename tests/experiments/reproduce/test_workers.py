"""`python -m experiments.reproduce EXPERIMENT --workers N`: several runs at a time, in separate processes.

tests/experiments/reproduce/test_jobs.py tests durations and the order of runs.
"""

from __future__ import annotations

import csv
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from eval.run import evaluate
from experiments.plan.compose import plan, write_runs
from experiments.reproduce.workers import Stopped, Worker, threads_of_each
from experiments.runs.records import RunPaths
from experiments.train.run import train
from tests.conftest import SMALL
from tests.experiments.runs.test_preemption import ROOT, after, content


def test_workers_share_the_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(8))
    assert [threads_of_each(workers) for workers in (1, 2, 3, 8, 20)] == [8, 4, 2, 1, 1]
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert threads_of_each(4) == 3


def test_a_stopped_worker_starts_no_process() -> None:
    """Told to stop while it starts, it ends; told before, it does not begin."""
    worker = Worker()
    starting = threading.Thread(target=worker.start)
    starting.start()
    while worker.process is None:
        time.sleep(0.001)
    worker.stop()
    starting.join(60)
    worker.wait()
    assert worker.process.poll() is not None
    never = Worker()
    never.stop()
    never.start()
    never.wait()
    assert never.process is None
    with pytest.raises(Stopped, match="not started"):
        never.do(RunPaths(Path("any")), score=False)


@pytest.mark.slow
def test_runs_beside_each_other_end_as_those_in_one_process(tmp_path: Path, cache_dir: Path) -> None:
    """Stopped once in the middle; then one fails without affecting the others."""
    overrides = [*SMALL, "seed=0", "method=diablo", "recipe.epochs=4", f"runtime.cache_dir={cache_dir}"]
    here = f"runtime.runs_dir={tmp_path / 'runs'}"
    runs = write_runs(plan(["experiment=quickstart", *overrides, here]))
    assert len(runs) == 3  # N = 4, 8 and 16
    command = [sys.executable, "-m", "experiments.reproduce", "quickstart", *overrides, here, "--workers", "2"]
    command += ["--out", str(tmp_path / "report")]

    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8")
    try:
        while process.poll() is None and not all(after(3)(run) for run in runs[:2]):
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=240)
    finally:
        process.kill()
    assert process.returncode == 75, errors[-2000:]
    assert errors.splitlines()[-1] == "preempted: the same command resumes"
    assert [run.preempted.is_file() for run in runs] == [True, True, False]
    assert not any(run.lock.exists() for run in runs)

    runs[2].metrics.mkdir()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", check=False, timeout=240)
    assert done.returncode == 1
    assert "1 of 3 runs failed and are missing from the report" in done.stderr.splitlines()[-1]
    assert f"[3/3] {runs[2].root.name}  failed: [Errno 21] Is a directory" in done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("[")]
    assert sorted(line.split()[1] for line in lines) == sorted(run.root.name for run in runs[:2])
    assert all("arith " in line for line in lines)
    with (tmp_path / "report" / "table.csv").open(encoding="utf-8") as file:
        assert sum(bool(row["accuracy"]) for row in csv.DictReader(file)) == 2

    alone = write_runs(plan(["experiment=quickstart", *overrides, f"runtime.runs_dir={tmp_path / 'alone'}"]))[1]
    train(alone)
    evaluate(alone)
    assert content(runs[1]) == content(alone)
    assert train(runs[1]).resumed_at[0] > 3
