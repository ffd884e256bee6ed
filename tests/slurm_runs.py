"""Tiny runs for the tests of Slurm: what is submitted, and how their records are compared."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from experiments.records import EvalRecord, RunPaths, TrainRecord, read_record
from slurm.cluster import Cluster, read_cluster
from tests.conftest import SMALL, planned

# What a run's records have in common wherever and in however many attempts it was made.
TRAINED = ("config_hash", "base_hash", "data_hash", "steps", "tokens", "final_loss", "changed")
SCORED = ("benchmark", "protocol", "accuracy", "items", "n", "no_match", "base_hash", "data_hash")


def overrides(runs_dir: Path, cache_dir: Path) -> list[str]:
    return [*SMALL, f"runtime.runs_dir={runs_dir}", f"runtime.cache_dir={cache_dir}", "runtime.checkpoint_every=4"]


def settings(*changes: str) -> Cluster:
    """A cluster of the tests; jobs run with the python of the tests."""
    path = Path(__file__).parent / "slurm_cluster.yaml"
    return read_cluster(str(path), changes)


def one_thread() -> dict[str, str]:
    """Jobs take the environment of their submitter; the nodes share a few processors."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def result(run: RunPaths) -> dict[str, Any]:
    """What has to be equal: all of the records but clocks, machines and attempts."""
    trained = read_record(run.train_record, TrainRecord)
    scores = [read_record(paths.score, EvalRecord) for paths in run.evaluations()]
    weights = {name: digest for name, digest in trained.adapter_files.items() if name.endswith(".safetensors")}
    return {
        "weights": weights,  # PEFT writes a set into adapter_config.json, in no fixed order
        "train": {name: getattr(trained, name) for name in TRAINED},
        "eval": [{name: getattr(score, name) for name in SCORED} for score in scores],
        "completions": [paths.samples.read_text().splitlines()[1:] for paths in run.evaluations()],
    }


def reference(arguments: list[str]) -> dict[str, Any]:
    """The result of one run, undisturbed and without Slurm, in a process of its own as in a job."""
    run = planned(arguments)
    for module in ("experiments.train", "eval.run"):
        subprocess.run([sys.executable, "-m", module, str(run.root)], check=True, env=one_thread(), capture_output=True)
    return result(run)
