"""Submitting arrays to a real Slurm: which tasks are queued, run or left out."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from experiments.plan.__main__ import main as plan_main
from experiments.plan.compose import plan, write_runs
from experiments.plan.selection import read_options
from experiments.runs.records import RunPaths
from slurm import cancel, logs, status
from slurm.manifest import all_manifests, read_manifest
from slurm.queue import queued
from slurm.speed import measure_sweep
from slurm.submit import Options, _submitter_lock, parse, submit
from tests.slurm.slurm_cluster import SlurmCluster, cluster, running_cluster, wait_for
from tests.slurm.slurm_runs import END, overrides, reference, result, settings

__all__ = ["cluster", "running_cluster"]
pytestmark = pytest.mark.slurm


def states(runs_dir: Path) -> list[str]:
    return [state.state for state in status.statuses(runs_dir)]


def test_an_array_of_eight_from_dry_run_to_finished(
    cluster: SlurmCluster, tmp_path: Path, cache_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Trained two at a time, each evaluated by a separate task as soon as it is trained."""
    runs_dir = tmp_path / "runs"
    options = Options(max_parallel=2, eval_separately=True)
    arguments = ["method=lora", "seed=range(0,8)", *overrides(runs_dir, cache_dir)]
    assert submit(arguments, settings(), dataclasses.replace(options, dry_run=True)) == []
    assert not runs_dir.exists()
    assert "would submit train of 8 runs in 8 tasks" in capsys.readouterr().out
    training, evaluation = submit(arguments, settings(), options)
    shown = capsys.readouterr().out
    assert "8 runs: 8 new\n" in shown
    assert "8 tasks, 2 at a time; each 1 GPU for at most 10, together at most 1.3 GPU-hours" in shown
    assert submit(arguments, settings(), options) == []
    assert "8 already queued" in capsys.readouterr().out
    running = {training: {0}, evaluation: {0}}

    def ended() -> bool:
        tasks = [task for tasks in queued(runs_dir).values() for task in tasks]
        for job, counts in running.items():
            counts.add(sum(task.job.startswith(f"{job}_") and task.state == "RUNNING" for task in tasks))
        return not tasks

    wait_for(lambda: "running" in states(runs_dir), "a running task")
    assert set(states(runs_dir)[2:]) == {"queued"}
    wait_for(ended, "the arrays", 400)
    assert max(running[training]) == 2
    assert max(running[evaluation]) in (1, 2)
    assert states(runs_dir) == ["finished"] * 8
    assert {cluster.job(f"{job}_{task}")["JobState"] for job in running for task in range(8)} == {"COMPLETED"}
    assert submit(arguments, settings(), options) == []
    assert "8 finished" in capsys.readouterr().out
    for seed, state in enumerate(status.statuses(runs_dir)):
        run = RunPaths(runs_dir / state.name)
        assert result(run) == reference(["method=lora", f"seed={seed}", *overrides(tmp_path / "alone", cache_dir)])
        assert "16 steps" in logs.log_of(run.root).read_text(encoding="utf-8")


def test_a_budget_submits_the_runs_that_plan_writes(
    cluster: SlurmCluster, tmp_path: Path, cache_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From three learning rates and two seeds the runs within the hours of four runs; status counts the same."""
    experiment = tmp_path / "cells.yaml"
    experiment.write_text(
        "title: Cells\nlearning_rate_by: loss\ncommon: seed=0,1\npaper:\n"
        "  - method=lora recipe.learning_rate=0.01,0.02,0.03\n  - method=dora recipe.learning_rate=0.01\n",
        encoding="utf-8",
    )
    flags = ["--paper", "--tokens-per-second=1000", "--budget=0.0087gpuh"]
    plan_main([f"experiment={experiment}", *overrides(tmp_path / "planned", cache_dir), *flags])
    shown = capsys.readouterr()
    names = {Path(line).name for line in shown.out.splitlines()}
    left_out = [line for line in shown.err.splitlines() if "out by" in line or line.startswith("  ")]
    assert (len(names), len(left_out)) == (4, 3)
    runs_dir = tmp_path / "runs"
    arguments = [f"experiment={experiment}", *overrides(runs_dir, cache_dir)]
    jobs = submit(arguments, settings(), Options(), read_options(parse([*arguments, *flags])))
    shown = capsys.readouterr().out.splitlines()
    assert f"{experiment}: 4 runs: 4 new" in shown[0] or "…: 4 runs: 4 new" in shown[0]
    assert shown[-3:] == left_out
    assert {name for _, manifest in all_manifests(runs_dir) for name in manifest.runs} == names
    status.main([f"runs_dir={runs_dir}"])
    assert capsys.readouterr().out.startswith("4 runs: ")
    cluster.output("scancel", "--me")
    assert jobs


def test_a_failing_run_harms_no_other(
    cluster: SlurmCluster, tmp_path: Path, cache_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs_dir = tmp_path / "runs"
    arguments = ["method=lora", *overrides(runs_dir, cache_dir), "recipe.batch_size=4096,8"]
    (job,) = submit(arguments, settings(), Options(pack=2))
    assert cluster.wait(f"{job}_0", END, 120)["JobState"] == "FAILED"
    failed, finished = status.statuses(runs_dir)
    assert (failed.state, finished.state) == ("failed", "finished")
    assert "do not fill one batch of 4096" in failed.detail
    capsys.readouterr()
    submit(arguments, settings(), Options(only_failed=True))
    assert "1 to resume after a failure, 1 finished" in capsys.readouterr().out
    assert list(queued(runs_dir)) == [failed.name]
    cancel.main([f"runs_dir={runs_dir}", failed.name])
    wait_for(lambda: not queued(runs_dir), "the cancelled job", 30)


def test_what_starts_after_a_failed_job_and_is_refused_if_it_was_edited_or_moved(
    cluster: SlurmCluster, tmp_path: Path, cache_dir: Path
) -> None:
    failing = cluster.output("sbatch", "--parsable", "--hold", "--output=/dev/null", "--wrap", "exit 1").strip()
    submitted: dict[str, tuple[list[str], Path, RunPaths]] = {}
    for name in ("manifest", "config", "moved", "afterok"):
        runs_dir = tmp_path / name
        arguments = ["method=lora", "seed=0", *overrides(runs_dir, cache_dir)]
        after = f"afterok:{failing}" if name == "afterok" else failing
        jobs = submit(arguments, settings(), Options(after=after, eval_separately=name == "config"))
        (manifest, _), *_ = all_manifests(runs_dir)
        submitted[name] = (jobs, manifest, RunPaths(next(runs_dir.glob("*/config.yaml")).parent))
    manifest, config = submitted["manifest"][1], submitted["config"][2].config
    manifest.write_text(
        manifest.read_text(encoding="utf-8").replace('"max_requeues": 100', '"max_requeues": 999'), encoding="utf-8"
    )
    config.write_text(config.read_text(encoding="utf-8") + "# a note\n", encoding="utf-8")
    submitted["moved"][2].root.rename(tmp_path / "elsewhere")
    cluster.output("scontrol", "release", failing)
    assert cluster.wait(failing, END)["JobState"] == "FAILED"
    expected = {
        "manifest": "manifest.json: edited after it was submitted",
        "config": "config.yaml: edited after it was submitted",
        "moved": "no such run directory: it was moved or deleted",
    }
    for name, said in expected.items():
        (job, *_), manifest, _ = submitted[name]
        assert cluster.wait(f"{job}_0", END)["JobState"] == "FAILED"
        assert said in (manifest.parent / "logs" / f"{job}_0.log").read_text(encoding="utf-8")
    # A job that depends on the success of a failed job is cancelled and reported.
    for job in (submitted["config"][0][1], submitted["afterok"][0][0]):
        assert cluster.wait(f"{job}_0", END)["JobState"] == "CANCELLED"
    (failed,), (never,) = (status.statuses(tmp_path / name) for name in ("config", "afterok"))
    assert (failed.state, expected["config"] in failed.detail) == ("failed", True)
    assert (never.state, never.detail) == ("planned", status.NEVER_STARTED)


def test_a_second_submitter_waits_for_the_first(
    cluster: SlurmCluster, tmp_path: Path, cache_dir: Path, fails_with: Callable[[Callable[[], object]], str]
) -> None:
    runs_dir = tmp_path / "runs"
    arguments = ["method=lora", "seed=0,1", *overrides(runs_dir, cache_dir)]
    held = settings("sbatch={hold: true}")
    with _submitter_lock(runs_dir):
        assert "being submitted by process" in fails_with(lambda: submit(arguments, held, Options()))
        assert not list(runs_dir.glob("*/config.yaml"))
    assert len(submit(arguments, held, Options())) == 1
    assert len(queued(runs_dir)) == 2


def test_the_benchmark_leaves_nothing_behind(cluster: SlurmCluster, tmp_path: Path) -> None:
    lines = [what for what, _ in measure_sweep(5, tmp_path / "sweep")]
    assert [line for line in lines if "status" in line] == ["status, all queued", "status, all failed"]
    assert queued(tmp_path / "sweep") == {}


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
    assert str(code) in (path.parent / "job.sh").read_text(encoding="utf-8")
    assert read_manifest(path) == manifest
    assert json.loads(path.read_text(encoding="utf-8"))["runs_dir"] == str(runs_dir)
    assert len(write_runs(plan(["method=lora", "seed=0", *overrides(runs_dir, cache_dir)]))) == 1
