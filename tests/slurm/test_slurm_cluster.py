"""The private Slurm used by the other Slurm tests."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.slurm.slurm_cluster import SlurmCluster, cluster, running_cluster

__all__ = ["cluster", "running_cluster"]
pytestmark = pytest.mark.slurm


def test_jobs_run_with_the_gpus_they_asked_for(cluster: SlurmCluster, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ["--parsable", "--nodes=1", "--ntasks=2", "--gres=gpu:2", f"--output={out}"]
    script = "srun --label printenv CUDA_VISIBLE_DEVICES"
    submitted = subprocess.run(
        ["sbatch", *options, "--wrap", script], check=True, capture_output=True, encoding="utf-8"
    )
    job = submitted.stdout.strip()
    assert cluster.wait(job, {"COMPLETED", "FAILED"})["JobState"] == "COMPLETED"
    assert sorted(out.read_text(encoding="utf-8").splitlines()) == ["0: 0,1", "1: 0,1"]
    failing = subprocess.run(
        ["sbatch", "--parsable", "--output=/dev/null", "--wrap", "exit 3"],
        check=True,
        capture_output=True,
        encoding="utf-8",
    )
    assert cluster.wait(failing.stdout.strip(), {"COMPLETED", "FAILED"})["ExitCode"] == "3:0"


def test_the_controller_can_be_restarted(cluster: SlurmCluster) -> None:
    command = ["sbatch", "--parsable", "--hold", "--output=/dev/null", "--wrap", "true"]
    job = subprocess.run(command, check=True, capture_output=True, encoding="utf-8").stdout.strip()
    cluster.stop_controller()
    cluster.start_controller()
    assert cluster.job(job)["JobState"] == "PENDING"
    cluster.output("scontrol", "release", job)
    cluster.wait(job, {"COMPLETED"})
