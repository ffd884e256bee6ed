"""Faults of a cluster, applied to runs in the middle of training, must not change their records."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from experiments.runs.records import RunPaths, TrainRecord, read_record
from slurm import cancel
from slurm.status import statuses
from slurm.submit import Options, submit
from tests.slurm.slurm_cluster import SlurmCluster, cluster, running_cluster, wait_for
from tests.slurm.slurm_runs import END, Running, overrides, reference, result, settings, steps

__all__ = ["cluster", "running_cluster"]
pytestmark = pytest.mark.slurm
LONG = "recipe.epochs=60"  # 480 steps, time enough to be interrupted in between
ALL_NODES = ("--partition=high", "--nodes=3", "--exclusive", "--output=/dev/null")


def test_one_run_through_every_fault(cluster: SlurmCluster, tmp_path: Path, cache_dir: Path) -> None:
    arguments = ["method=lora", "seed=0", LONG]
    running = Running(cluster, tmp_path / "runs", [*overrides(tmp_path / "runs", cache_dir), *arguments])

    # Preempted by a partition of higher priority: Slurm itself requeues.
    cluster.output("sbatch", *ALL_NODES, "--wrap", "sleep 1")
    running.wait_for_restarts(1)
    wait_for(lambda: running.state().preempted == 1, "the record of the preemption")
    assert running.state().state in ("preempted", "running")
    running.wait_for_steps()

    # Requeued by hand.
    cluster.output("scontrol", "requeue", running.task)
    wait_for(lambda: running.state().state == "preempted", "the requeued task")
    running.wait_for_restarts(2)
    running.wait_for_steps()

    # A node that goes down.
    node = cluster.job(running.task)["NodeList"]
    cluster.output("scontrol", "update", f"nodename={node}", "state=down", "reason=test")
    running.wait_for_restarts(3)
    cluster.output("scontrol", "update", f"nodename={node}", "state=resume")
    running.wait_for_steps()

    # A killed process is a failed task, and submitting again resumes it.
    os.kill(running.pid(), signal.SIGKILL)
    assert cluster.wait(running.task, END)["JobState"] == "FAILED"
    assert running.state().state == "running"  # for a moment, because of its heartbeat
    wait_for(lambda: running.state().state == "failed", "a heartbeat that is no longer fresh", 90)
    assert "ended without a message" in running.state().detail
    running.submit()
    running.wait_for_steps()

    # A cancelled task stays cancelled.
    cancel.main([f"runs_dir={running.runs_dir}", running.run.root.name])
    assert cluster.wait(running.task, END)["JobState"] == "CANCELLED"
    assert "not in the queue" in running.state().detail
    running.submit()

    running.finish()
    resumed_at = running.resumed_at()
    assert len(resumed_at) == 5
    assert resumed_at == sorted(set(resumed_at))
    assert resumed_at[0] > 0
    assert result(running.run) == reference([*overrides(tmp_path / "alone", cache_dir), *arguments])


def test_warned_with_a_time_of_grace_and_before_the_time_limit(
    cluster: SlurmCluster, tmp_path: Path, cache_dir: Path
) -> None:
    """Slurm warns and waits, so the task must requeue itself; exiting would count as finished."""
    arguments = ["method=lora", "seed=0", "recipe.epochs=20"]  # 160 steps
    everywhere = overrides(tmp_path / "runs", cache_dir)
    changes = ("partition=grace", "signal=USR1@50")  # the time limit is 10 minutes, from the settings
    running = Running(cluster, tmp_path / "runs", [*everywhere, *arguments], *changes)

    cluster.output("sbatch", *ALL_NODES, "--wrap", "sleep 1")
    running.wait_for_restarts(1)
    running.wait_for_requeues(1)
    running.wait_for_steps()

    # Slurm checks limits every half minute and may warn a minute early; it never requeues at a limit itself. The
    # training is stopped until it is warned, so that it is unfinished even on a fast machine; the limit is near
    # only while it is stopped, so that it is warned only once even on a slow machine.
    pid = running.pid()
    os.kill(pid, signal.SIGSTOP)
    try:
        minutes = int(cluster.job(running.task)["RunTime"].split(":")[1])
        cluster.output("scontrol", "update", f"jobid={running.task}", f"timelimit={minutes + 2}")
        wait_for(lambda: _is_told(pid, signal.SIGUSR1), "the warning", 120)
        cluster.output("scontrol", "update", f"jobid={running.task}", "timelimit=10")
    finally:
        os.kill(pid, signal.SIGCONT)
    running.wait_for_restarts(2)
    running.wait_for_requeues(2)

    running.finish()
    assert len(running.resumed_at()) == 2
    assert result(running.run) == reference([*overrides(tmp_path / "alone", cache_dir), *arguments])


def test_a_packed_task_goes_on_with_the_run_it_was_in_until_it_is_given_up(
    cluster: SlurmCluster, tmp_path: Path, cache_dir: Path
) -> None:
    runs_dir = tmp_path / "runs"
    short, long = (["method=lora", f"recipe.epochs={epochs}", "seed=0"] for epochs in (2, 20))
    arguments = [*overrides(runs_dir, cache_dir), "method=lora", "recipe.epochs=2,20", "seed=0"]
    (job,) = submit(arguments, settings("max_requeues=1"), Options(pack=2))
    first, second = (RunPaths(runs_dir / state.name) for state in statuses(runs_dir))

    wait_for(lambda: steps(second) >= 6, "steps of the second run", 120)
    before = first.attempts.read_bytes()
    cluster.output("scancel", "--batch", "--signal=USR1", f"{job}_0")
    wait_for(lambda: cluster.job(f"{job}_0").get("Restarts") == "1", "the requeue")
    done = steps(second)
    wait_for(lambda: steps(second) >= done + 6, "steps after the requeue", 120)
    assert first.attempts.read_bytes() == before, "the finished run was begun again"

    cluster.output("scancel", "--batch", "--signal=USR1", f"{job}_0")
    assert cluster.wait(f"{job}_0", END)["JobState"] == "FAILED"
    why = "stopped, and not requeued again after 1 times (max_requeues): submit again to go on"
    assert [(state.state, state.detail) for state in statuses(runs_dir)] == [("finished", ""), ("failed", why)]
    (log,) = runs_dir.glob(".slurm/*/logs/*.log")
    assert log.read_text(encoding="utf-8").splitlines()[-1] == f"error: {why}"

    (job,) = submit(arguments, settings(), Options(only_failed=True))
    assert cluster.wait(f"{job}_0", END, 120)["JobState"] == "COMPLETED"
    assert len(read_record(second.train_record, TrainRecord).resumed_at) == 2
    for run, own in ((first, short), (second, long)):
        assert result(run) == reference([*overrides(tmp_path / "alone", cache_dir), *own])


def test_two_processes_on_two_nodes(cluster: SlurmCluster, tmp_path: Path, cache_dir: Path) -> None:
    results = []
    for name in ("disturbed", "undisturbed"):
        recipe = ("recipe.epochs=10", "recipe.micro_batch_size=4")  # 80 steps of 4 rows per process
        arguments = [*overrides(tmp_path / name, cache_dir), "method=lora", "seed=0", *recipe]
        running = Running(cluster, tmp_path / name, arguments, "gpus=2", "gpus_per_node=1")
        assert cluster.job(running.task)["NumNodes"] == "2"
        if name == "disturbed":
            cluster.output("scontrol", "requeue", running.task)
        running.finish()
        assert read_record(running.run.train_record, TrainRecord).world_size == 2
        assert bool(running.resumed_at()) == (name == "disturbed")
        results.append(result(running.run))
    assert results[0] == results[1]


def _is_told(pid: int, number: signal.Signals) -> bool:
    """Return whether a signal is pending for a stopped process."""
    lines = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines())
    return any(int(lines[which], 16) >> (number - 1) & 1 for which in ("SigPnd", "ShdPnd"))
