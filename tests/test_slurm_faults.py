"""What happens to jobs on a cluster, done to a run in the middle of its training: its records must not show it."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from experiments.records import RunPaths, TrainRecord, read_record
from slurm import cancel
from slurm.status import State, statuses
from slurm.submit import Options, submit
from tests.slurm_cluster import SlurmCluster, cluster, running_cluster, wait_for
from tests.slurm_runs import overrides, reference, result, settings

__all__ = ["cluster", "running_cluster"]
pytestmark = pytest.mark.slurm
LONG = "recipe.epochs=40"  # 320 steps, time enough to be interrupted in between
END = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> dict[str, Any]:
    runs_dir = tmp_path_factory.mktemp("undisturbed")
    return reference(["method=lora", "seed=0", *overrides(runs_dir, cache_dir), LONG])


class Running:
    """One run of an array of one task, in the middle of its training."""

    def __init__(
        self, cluster: SlurmCluster, runs_dir: Path, cache_dir: Path, *changes: str, recipe: tuple[str, ...] = (LONG,)
    ) -> None:
        self.cluster = cluster
        self.runs_dir = runs_dir
        self.arguments = ["method=lora", "seed=0", *overrides(runs_dir, cache_dir), *recipe]
        self.changes = changes
        self.submit()
        self.run = RunPaths(runs_dir / self.state().name)
        self.wait_for_step(10)

    def submit(self) -> None:
        (job,) = submit(self.arguments, settings(*self.changes), Options())
        self.task = f"{job}_0"

    def state(self) -> State:
        (state,) = statuses(self.runs_dir)
        return state

    def heartbeat(self) -> dict[str, Any]:
        path = self.run.root / "heartbeat.json"
        return json.loads(path.read_text()) if path.is_file() else {}

    def wait_for_step(self, step: int) -> None:
        wait_for(lambda: (self.heartbeat().get("step") or 0) >= step, f"step {step}", 120)

    def finish(self) -> dict[str, Any]:
        """Wait until the job has ended well, and return what Slurm holds of it."""
        job = self.cluster.wait(self.task, END, 180)
        assert job["JobState"] == "COMPLETED", self.log()
        assert self.state().state == "finished"
        return job

    def resumed_at(self) -> list[int]:
        return read_record(self.run.train_record, TrainRecord).resumed_at

    def log(self) -> str:
        logs = [*self.runs_dir.glob(".slurm/*/logs/*.log"), self.run.root / "slurm.log"]
        return "\n".join(log.read_text(errors="replace") for log in logs)


Start = Callable[..., Running]


@pytest.fixture
def start(cluster: SlurmCluster, tmp_path: Path, cache_dir: Path, undisturbed: dict[str, Any]) -> Start:
    return lambda *changes: Running(cluster, tmp_path / "runs", cache_dir, *changes)


def test_a_killed_process_is_a_failed_task_and_submitting_again_goes_on(
    start: Start, undisturbed: dict[str, Any]
) -> None:
    running = start()
    os.kill(running.heartbeat()["pid"], signal.SIGKILL)
    assert running.cluster.wait(running.task, END)["JobState"] == "FAILED"
    assert running.state().state == "failed"
    running.submit()
    running.finish()
    assert running.resumed_at()[0] > 0
    assert result(running.run) == undisturbed


def test_requeued_by_hand(start: Start, undisturbed: dict[str, Any]) -> None:
    running = start()
    running.cluster.output("scontrol", "requeue", running.task)
    wait_for(lambda: running.state().state in ("preempted", "queued"), "the requeued task")
    assert running.finish()["Restarts"] == "1"
    assert running.resumed_at()[0] > 0
    assert result(running.run) == undisturbed


def test_preempted_by_a_partition_of_higher_priority(start: Start, undisturbed: dict[str, Any]) -> None:
    running = start()
    wanted = ["--partition=high", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap", "sleep 3"]
    running.cluster.output("sbatch", *wanted)
    wait_for(lambda: running.cluster.job(running.task).get("Restarts") == "1", "the preemption")
    wait_for(lambda: running.state().preempted == 1, "the record of the preemption")
    running.finish()
    assert running.resumed_at()[0] > 0
    assert result(running.run) == undisturbed


def test_preempted_with_a_time_of_grace(start: Start, undisturbed: dict[str, Any]) -> None:
    """Slurm warns and waits, so the task has to put itself back; leaving would count as finished."""
    running = start("partition=grace")
    wanted = ["--partition=high", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap", "sleep 3"]
    running.cluster.output("sbatch", *wanted)
    wait_for(lambda: running.cluster.job(running.task).get("Restarts") == "1", "the preemption")
    assert f"requeued {running.task}" in running.log()
    running.finish()
    assert result(running.run) == undisturbed


def test_the_warning_before_the_time_limit(start: Start, undisturbed: dict[str, Any]) -> None:
    """Slurm looks at limits every half minute and may warn a minute early; it never requeues at a limit itself."""
    running = start('time="1"', "signal=USR1@50")
    wait_for(lambda: running.cluster.job(running.task).get("Restarts") == "1", "the warning", 120)
    assert f"requeued {running.task}" in running.log()
    running.finish()
    assert result(running.run) == undisturbed


def test_a_node_that_goes_down(start: Start, undisturbed: dict[str, Any]) -> None:
    running = start()
    node = running.cluster.job(running.task)["NodeList"]
    try:
        running.cluster.output("scontrol", "update", f"nodename={node}", "state=down", "reason=test")
        wait_for(lambda: running.cluster.job(running.task).get("Restarts") == "1", "the requeue")
        running.finish()
    finally:
        running.cluster.output("scontrol", "update", f"nodename={node}", "state=resume")
    assert result(running.run) == undisturbed


def test_cancelled_stays_cancelled_and_submitting_again_goes_on(start: Start, undisturbed: dict[str, Any]) -> None:
    running = start()
    cancel.main([f"runs_dir={running.runs_dir}", running.run.root.name])
    assert running.cluster.wait(running.task, END)["JobState"] == "CANCELLED"
    assert "not in the queue" in running.state().detail
    running.submit()
    running.finish()
    assert running.resumed_at()[0] > 0
    assert result(running.run) == undisturbed


def test_two_processes_on_two_nodes(cluster: SlurmCluster, tmp_path: Path, cache_dir: Path) -> None:
    results = []
    for name in ("disturbed", "undisturbed"):
        recipe = ("recipe.epochs=10", "recipe.micro_batch_size=4")  # 80 steps of 4 rows per process
        running = Running(cluster, tmp_path / name, cache_dir, "gpus=2", "gpus_per_node=1", recipe=recipe)
        assert cluster.job(running.task)["NumNodes"] == "2"
        if name == "disturbed":
            cluster.output("scontrol", "requeue", running.task)
        running.finish()
        assert read_record(running.run.train_record, TrainRecord).world_size == 2
        assert bool(running.resumed_at()) == (name == "disturbed")
        results.append(result(running.run))
    assert results[0] == results[1]
