"""Full fine-tuning of real weights that do not fit one GPU: submission shards it, preemption changes no result."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.runs.config_files import read_config
from experiments.runs.records import TrainRecord, read_record
from tests.experiments.runs.test_preemption import content
from tests.real_runs import settings as real_settings
from tests.slurm.slurm_cluster import SlurmCluster, cluster, running_cluster
from tests.slurm.slurm_runs import Running

__all__ = ["cluster", "running_cluster"]
pytestmark = pytest.mark.slurm


def test_a_sharded_run_of_real_weights_is_preempted_and_equals_an_undisturbed_one(
    cluster: SlurmCluster, smollm2_slice: list[str], tmp_path: Path, data_root: Path
) -> None:
    """Three layers of SmolLM2-135M need 0.90 GiB on one GPU and 0.87 on each of two; 0.88 is available."""
    changes = ("gpus=auto", "gpu_memory=0.96G", "cpus=1")
    runs = []
    for name in ("undisturbed", "preempted"):
        arguments = [
            *smollm2_slice, *real_settings(tmp_path / name, data_root), "method=full", "recipe.learning_rate=1e-4",
            *("recipe.max_steps=14", "task.data.source=mawps", "runtime.checkpoint_every=1000", "seed=0"),
            *("recipe.micro_batch_size=1", "evaluation.limit=2"),
        ]  # fmt: skip
        running = Running(cluster, tmp_path / name / "runs", arguments, *changes)
        if name == "preempted":
            # Warned with enough time for a checkpoint: a manual requeue kills after half a minute.
            cluster.output("scancel", "--batch", "--signal=USR1", running.task)
            running.wait_for_restarts(1, 180)
        running.finish()
        record = read_record(running.run.train_record, TrainRecord)
        assert (record.world_size, record.sharding) == (2, "full")
        assert read_config(running.run).runtime.sharding == "full"
        assert bool(record.resumed_at) == (name == "preempted")
        runs.append(running.run)
    assert content(runs[0]) == content(runs[1])
