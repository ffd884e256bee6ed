"""Submitting arrays to a real Slurm: what is queued, what is run, what is left out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from experiments.plan import plan, write_runs
from experiments.records import RunPaths
from slurm import cancel, logs, status
from slurm.manifest import all_manifests, read_manifest
from slurm.queue import queued
from slurm.submit import Options, submit
from tests.slurm_cluster import SlurmCluster, cluster, running_cluster, wait_for
from tests.slurm_runs import overrides, reference, result, settings

__all__ = ["cluster", "running_cluster"]
pytestmark = pytest.mark.slurm
END = {"COMPLETED", "FAILED", "CANCELLED"}


def states(runs_dir: Path) -> list[str]:
    return [state.state for state in status.statuses(runs_dir)]


def test_an_array_from_dry_run_to_finished(
    cluster: SlurmCluster, tmp_path: Path, cache_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs_dir = tmp_path / "runs"
    arguments = ["method=lora", "seed=0,1,2", *overrides(runs_dir, cache_dir)]
    assert submit(arguments, settings(), Options(dry_run=True)) == []
    assert not runs_dir.exists()
    assert "would submit train and eval of 3 runs in 3 tasks" in capsys.readouterr().out
    (job,) = submit(arguments, settings(), Options(max_parallel=2))
    shown = capsys.readouterr().out
    assert "3 runs: 3 new, 0 to resume" in shown
    assert "3 tasks, 2 at a time; each 1 GPUs for at most 10, together at most 0.5 GPU-hours" in shown
    assert submit(arguments, settings(), Options()) == []
    assert "3 already queued" in capsys.readouterr().out
    running = set()

    def ended() -> bool:
        tasks = queued(runs_dir)
        running.add(sum(task.state == "RUNNING" for (task,) in tasks.values()))
        return not tasks

    wait_for(lambda: "running" in states(runs_dir), "a running task")
    assert states(runs_dir)[2:] == ["queued"]
    wait_for(ended, "the array", 240)
    assert max(running) == 2
    assert states(runs_dir) == ["finished"] * 3
    assert {cluster.job(f"{job}_{task}")["JobState"] for task in range(3)} == {"COMPLETED"}
    assert submit(arguments, settings(), Options()) == []
    assert "3 finished" in capsys.readouterr().out
    first = RunPaths(runs_dir / status.statuses(runs_dir)[0].name)
    expected = reference(["method=lora", "seed=0", *overrides(tmp_path / "alone", cache_dir)])
    assert result(first) == expected
    assert "16 steps" in logs.log_of(first.root).read_text()


def test_a_failing_run_harms_no_other(
    cluster: SlurmCluster, tmp_path: Path, cache_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs_dir = tmp_path / "runs"
    arguments = ["method=lora", "recipe.optimizer=nonsense,adamw_torch", *overrides(runs_dir, cache_dir)]
    (job,) = submit(arguments, settings(), Options(pack=2))
    assert cluster.wait(f"{job}_0", END, 120)["JobState"] == "FAILED"
    failed, finished = status.statuses(runs_dir)
    assert (failed.state, finished.state) == ("failed", "finished")
    assert "nonsense" in failed.detail
    capsys.readouterr()
    submit(arguments, settings(), Options(only_failed=True))
    assert "1 to resume after a failure, 0 already queued, 1 finished" in capsys.readouterr().out
    assert list(queued(runs_dir)) == [failed.name]
    cancel.main([f"runs_dir={runs_dir}", failed.name])
    wait_for(lambda: not queued(runs_dir), "the cancelled job", 30)


def test_what_was_edited_or_moved_after_submission_is_refused(
    cluster: SlurmCluster, tmp_path: Path, cache_dir: Path
) -> None:
    held = cluster.output("sbatch", "--parsable", "--hold", "--output=/dev/null", "--wrap", "true").strip()
    submitted: dict[str, tuple[str, Path, RunPaths]] = {}
    for name in ("edited", "config", "moved"):
        runs_dir = tmp_path / name
        arguments = ["method=lora", "seed=0", *overrides(runs_dir, cache_dir)]
        (job,) = submit(arguments, settings(), Options(after=held))
        ((manifest, _),) = all_manifests(runs_dir)
        submitted[name] = (job, manifest, RunPaths(next(runs_dir.glob("*/config.yaml")).parent))
    manifest, run = submitted["edited"][1], submitted["moved"][2]
    manifest.write_text(manifest.read_text().replace('"max_requeues": 100', '"max_requeues": 999'))
    run.root.rename(tmp_path / "elsewhere")
    config = submitted["config"][2].config
    config.write_text(config.read_text() + "# a note\n")
    cluster.output("scancel", held)
    expected = {
        "edited": "manifest.json: edited after it was submitted",
        "config": "config.yaml: edited after it was submitted",
        "moved": "no such run directory: it was moved or deleted",
    }
    for name, (job, manifest, _) in submitted.items():
        assert cluster.wait(f"{job}_0", END, 60)["JobState"] == "FAILED"
        assert expected[name] in (manifest.parent / "logs" / f"{job}_0.log").read_text()


def test_evaluations_of_their_own_and_arrays_cut_at_the_limit(
    cluster: SlurmCluster, tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slurm.submit.max_array_size", lambda: 2)
    runs_dir = tmp_path / "runs"
    arguments = ["method=lora", "seed=0,1,2", *overrides(runs_dir, cache_dir)]
    held = cluster.output("sbatch", "--parsable", "--hold", "--output=/dev/null", "--wrap", "true").strip()
    jobs = submit(arguments, settings("eval={gpus: 0}"), Options(after=held, eval_separately=True))
    assert [manifest.stages for _, manifest in all_manifests(runs_dir)] == [["train"], ["eval"]] * 2
    assert [len(manifest.tasks) for _, manifest in all_manifests(runs_dir)] == [2, 2, 1, 1]
    assert [cluster.job(f"{job}_0")["Dependency"].split("(")[0].split(":")[0] for job in jobs] == [
        *("afterany", "aftercorr", "afterany", "aftercorr")
    ]
    assert f"afterany:{jobs[0]}" in cluster.job(f"{jobs[2]}_0")["Dependency"]
    assert "Gres" not in cluster.job(f"{jobs[1]}_0").get("TresPerNode", "")
    cancel.main([f"runs_dir={runs_dir}", "--all"])
    assert queued(runs_dir) == {}


def test_the_clusters_refusal_is_passed_on(
    cluster: SlurmCluster, tmp_path: Path, cache_dir: Path, fails_with: Callable[[Callable[[], object]], str]
) -> None:
    runs_dir = tmp_path / "runs"
    arguments = ["method=lora", "seed=0", *overrides(runs_dir, cache_dir)]
    said = fails_with(lambda: submit(arguments, settings("partition=nowhere"), Options()))
    assert "invalid partition specified: nowhere" in said
    assert list(all_manifests(runs_dir)) == []


def test_the_job_sees_the_code_of_its_submission(cluster: SlurmCluster, tmp_path: Path, cache_dir: Path) -> None:
    runs_dir = tmp_path / "runs"
    held = cluster.output("sbatch", "--parsable", "--hold", "--output=/dev/null", "--wrap", "true").strip()
    submit(["method=lora", "seed=0", *overrides(runs_dir, cache_dir)], settings(), Options(after=held))
    ((path, manifest),) = all_manifests(runs_dir)
    code = Path(manifest.code["folder"])
    assert (code / "slurm" / "job.py").is_file()
    assert (code / "configs" / "run.yaml").is_file()
    assert str(code) in (path.parent / "job.sh").read_text()
    assert read_manifest(path) == manifest
    assert json.loads(path.read_text())["runs_dir"] == str(runs_dir)
    assert len(write_runs(plan(["method=lora", "seed=0", *overrides(runs_dir, cache_dir)]))) == 1
