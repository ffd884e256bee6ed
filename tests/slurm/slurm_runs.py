"""Tiny runs for the Slurm tests: settings to submit them, and a comparison of their records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from eval.run import evaluate
from experiments.runs.records import EvalRecord, RunPaths, TrainRecord, read_record
from experiments.train.run import train
from slurm.cluster import Cluster, read_cluster
from slurm.manifest import Manifest
from slurm.status import State, statuses
from slurm.submit import Options, submit
from tests.conftest import SMALL, planned
from tests.slurm.slurm_cluster import SlurmCluster, wait_for

# The parts of a run's records that do not depend on the machine or on the number of attempts.
TRAINED = ("config_hash", "base_hash", "data_hash", "steps", "tokens", "final_loss", "changed")
SCORED = ("benchmark", "protocol", "accuracy", "items", "n", "unparsed", "base_hash", "data_hash")
END = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"}


def overrides(runs_dir: Path, cache_dir: Path) -> list[str]:
    return [*SMALL, f"runtime.runs_dir={runs_dir}", f"runtime.cache_dir={cache_dir}", "runtime.checkpoint_every=4"]


def settings(*changes: str) -> Cluster:
    """Return the settings of the test cluster, whose jobs run with the tests' Python."""
    path = Path(__file__).parent / "slurm_cluster.yaml"
    return read_cluster(str(path), changes)


def result(run: RunPaths) -> dict[str, Any]:
    """Return the records without clocks, machines and attempts, which must be equal between runs."""
    trained = read_record(run.train_record, TrainRecord)
    scores = [read_record(paths.score, EvalRecord) for paths in run.evaluations()]
    weights = {name: digest for name, digest in trained.adapter_files.items() if name.endswith(".safetensors")}
    return {
        "weights": weights,  # PEFT writes a set into adapter_config.json, in no fixed order
        "train": {name: getattr(trained, name) for name in TRAINED},
        "eval": [{name: getattr(score, name) for name in SCORED} for score in scores],
        "completions": [paths.samples.read_text(encoding="utf-8").splitlines()[1:] for paths in run.evaluations()],
    }


def reference(arguments: list[str]) -> dict[str, Any]:
    """Return the result of one uninterrupted run without Slurm."""
    run = planned(arguments)
    train(run)
    evaluate(run)
    return result(run)


class Running:
    """One run, submitted as an array of one task, in the middle of its training."""

    def __init__(self, cluster: SlurmCluster, runs_dir: Path, arguments: list[str], *changes: str) -> None:
        self.cluster, self.runs_dir, self.arguments, self.changes = cluster, runs_dir, arguments, changes
        self.submit()
        self.run = RunPaths(runs_dir / self.state().name)
        self.wait_for_steps()

    def submit(self) -> None:
        (job,) = submit(self.arguments, settings(*self.changes), Options())
        self.task = f"{job}_0"

    def state(self) -> State:
        (state,) = statuses(self.runs_dir)
        return state

    def pid(self) -> int:
        return json.loads(self.run.heartbeat.read_text(encoding="utf-8"))["pid"]

    def steps(self) -> int:
        return steps(self.run)

    def wait_for_steps(self) -> None:
        """Wait until more steps are done than before, some of them after the last checkpoint."""
        before = self.steps()

        def enough() -> bool:
            return self.steps() >= before + 6 or self.run.train_record.exists()

        wait_for(enough, f"steps after {before}", 120)
        assert not self.run.train_record.exists(), "the training is too short for the test"

    def wait_for_restarts(self, count: int, seconds: float = 60) -> None:
        wait_for(lambda: self.cluster.job(self.task).get("Restarts") == f"{count}", f"restart {count}", seconds)

    def wait_for_requeues(self, count: int) -> None:
        """Wait until the task has said that it requeued itself, which it does after Slurm has counted the restart."""
        wait_for(lambda: self.log().count(f"requeued {self.task}") >= count, f"requeue {count} in the log", 20)
        assert self.log().count(f"requeued {self.task}") == count

    def finish(self) -> None:
        job = self.cluster.wait(self.task, END, 180)
        assert job["JobState"] == "COMPLETED", self.log()
        assert self.state().state == "finished"

    def resumed_at(self) -> list[int]:
        return read_record(self.run.train_record, TrainRecord).resumed_at

    def log(self) -> str:
        logs = [*self.runs_dir.glob(".slurm/*/logs/*.log"), self.run.root / "slurm.log"]
        return "\n".join(log.read_text(errors="replace", encoding="utf-8") for log in logs)


def steps(run: RunPaths) -> int:
    """Return the number of training steps done."""
    return run.metrics.read_bytes().count(b"\n") if run.metrics.is_file() else 0


def attempt_entry(how: str | None, error: str | None = None) -> dict[str, Any]:
    return {"job": "7_0", "restart": 0, "host": "n1", "stage": "train", "how": how, "error": error}


def planned_manifest(runs_dir: Path, runs: dict[str, Any], tasks: list[list[str]]) -> Manifest:
    return Manifest(
        experiment="sweep",
        runs_dir=str(runs_dir),
        stages=["train", "eval"],
        tasks=tasks,
        runs=runs,
        processes=1,
        max_requeues=100,
        scratch=None,
        code={"folder": str(runs_dir)},
    )
