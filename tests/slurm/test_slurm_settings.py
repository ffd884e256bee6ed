"""The Slurm code that needs no Slurm: settings, scripts, snapshots and locks."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from experiments.config import RunConfig
from experiments.plan.compose import plan, write_runs
from experiments.runs.config_files import read_config
from experiments.runs.evaluations import evaluation_paths
from experiments.runs.sizes import read_bytes
from slurm import retry
from slurm.arrays import Options, job_script
from slurm.cluster import FOLDER, Cluster, minutes, read_cluster, sbatch_lines
from slurm.manifest import describe_run, is_finished
from slurm.rank import torch_variables
from slurm.snapshot import take_snapshot
from slurm.submit import _submitter_lock, _with_frozen_evaluation, parse, submit
from tests.slurm.slurm_runs import attempt_entry, overrides, planned_manifest, settings

FailsWith = Callable[[Callable[[], object]], str]
ABOUT = {"config": "", "train": ["train.json"], "eval": ["eval/arith/plain-0/score.json"]}


@pytest.mark.parametrize(
    ("text", "expected"),
    [("90", 90), ("90:30", 90.5), ("1:30:00", 90), ("1-12", 2160), ("1-12:30", 2190), ("2-00:00:30", 2880.5)],
)
def test_times_as_slurm_writes_them(text: str, expected: float) -> None:
    assert minutes(text) == expected


@pytest.mark.parametrize("name", [path.stem for path in FOLDER.glob("*.yaml")])
def test_every_settings_file_is_read(name: str) -> None:
    assert isinstance(read_cluster(name), Cluster)


def test_the_example_shows_every_key_with_its_default() -> None:
    assert read_cluster("cluster.example") == Cluster()


def run(model: str = "tiny", method: str = "diablo", *more: str) -> RunConfig:
    task = "arith" if model == "tiny" else "commonsense_170k"
    (config,) = plan([f"model={model}", f"method={method}", f"task={task}", *more])
    return config


def test_resources_by_model_and_method() -> None:
    cluster = settings("gpus={default: 1, full: 2, llama2_7b: 4, llama3_8b/full: 8, tiny: 0}", "gpus_per_node=4")
    asked = [
        ("llama3_8b", "diablo"),
        ("llama3_8b", "full"),
        ("llama2_7b", "full"),
        ("llama_13b", "full"),
        ("tiny", "full"),
    ]
    small = "recipe.micro_batch_size=1"
    assert [cluster.resources(run(*names, small)).gpus for names in asked] == [1, 8, 4, 2, 0]
    assert cluster.resources(run("llama3_8b", "full", small)).nodes == 2
    two_nodes = settings("gpus=4").resources(run("tiny", "diablo", "recipe.micro_batch_size=4"))  # of 2 GPUs each
    assert (two_nodes.nodes, two_nodes.processes) == (2, 4)
    assert "--ntasks-per-node=2" in sbatch_lines(settings("gpus=4"), two_nodes)


def test_the_a100_file_has_host_memory_for_every_process() -> None:
    """Each process loads the base, in float32 for full fine-tuning, and SMT's warm-up copies it in float32."""
    cluster = read_cluster("a100")
    for model, parameters in (
        ("llama2_7b", 6.74e9),
        ("llama3_8b", 8.03e9),
        ("llama_13b", 13.02e9),
        ("llama2_13b", 13.02e9),
    ):
        for method, size in (("full", 4), ("smt", 2 + 4)):
            resources = cluster.resources(run(model, method))
            assert resources.memory is not None
            per_node = resources.processes // resources.nodes
            assert read_bytes(resources.memory) > per_node * size * parameters, (model, method)


def test_a_run_that_does_not_fit_one_gpu_is_sharded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sharded without a request; a run that fits is not sharded, regardless of its number of GPUs."""
    monkeypatch.setenv("PATH", "/nonexistent")
    a100 = ["gpus_per_node=8", "gpu_memory=80G", "gpus={default: auto, lora: 2}"]
    found = {method: settings(*a100).resources(run("llama2_7b", method)) for method in ("full", "lora")}
    assert {method: (each.gpus, each.sharding) for method, each in found.items()} == {
        "full": (2, "full"),
        "lora": (2, "none"),
    }
    assert settings("gpus=2").resources(run("llama2_7b", "full")).sharding == "none"  # GPUs of unknown memory
    arguments = ["model=llama2_7b", "method=full,lora", "task=commonsense_170k", f"runtime.runs_dir={tmp_path}"]
    submit(arguments, settings(*a100), Options(dry_run=True))
    shown = capsys.readouterr().out
    (full,), (lora,) = (
        [line for line in shown.splitlines() if f"llama2_7b {name}" in line] for name in ("full", "lora")
    )
    assert " 2 sharded " in full
    assert "sharded" not in lora
    assert "each 2 GPUs, which share the model, for at most" in shown
    assert "each 2 GPUs for at most" in shown


def test_a_submission_writes_how_a_run_is_sharded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_with: FailsWith
) -> None:
    """Planning again keeps it; a checkpoint of a different number of processes is refused before anything is queued."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, script in {"sbatch": "echo 7", "squeue": "true", "scontrol": "echo MaxArraySize = 1001"}.items():
        (tools / name).write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    arguments = ["model=llama2_7b", "method=full", "task=commonsense_170k", f"runtime.runs_dir={tmp_path / 'runs'}"]
    a100 = ["gpus_per_node=8", "gpu_memory=80G", "gpus=auto"]
    (planned,) = write_runs(plan(arguments))
    assert read_config(planned).runtime.sharding == "auto"
    submit(arguments, settings(*a100), Options())
    assert read_config(planned).runtime.sharding == "full"
    write_runs(plan(arguments))
    assert read_config(planned).runtime.sharding == "full"
    write_runs(plan([*arguments, "runtime.sharding=none"]))
    assert read_config(planned).runtime.sharding == "none"

    checkpoint = planned.checkpoints / "step-00000008"
    checkpoint.mkdir(parents=True)
    layout = {"processes": 2, "sharding": "full"}
    (checkpoint / "manifest.json").write_text(json.dumps(layout), encoding="utf-8")
    submit(arguments, settings(*a100), Options())
    said = fails_with(lambda: submit(arguments, settings(*a100, "gpus=4"), Options()))
    assert "was written by 2 processes with runtime.sharding=full, but these are 4 processes with" in said


def test_any_option_of_sbatch_is_passed_through() -> None:
    cluster = settings("sbatch={qos: long, exclusive: true, nice: 5, constraint: null}", "gres='gpu:a100'")
    lines = sbatch_lines(cluster, cluster.resources(run()))
    assert {"--qos=long", "--exclusive", "--nice=5", "--gres=gpu:a100:1", "--signal=B:USR1@120"} <= set(lines)
    assert not any("constraint" in line for line in lines)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("partitoin=main", "did you mean partition or"),
        ("qos=high", "options of sbatch go under sbatch"),
        ("sbatch={array: 1-3}", "sbatch.array is set by the submission: give --max-parallel"),
        ("sbatch={--qos: high}", "without dashes"),
        ("sbatch=[1]", "it must be a dict"),
        ("signal=KILL@3", "as USR1@120"),
        ("eval={partition: x}", "no setting eval.partition"),
        ("gpu_memory=80", "gpu_memory: 80 is not a size: write e.g. 80G"),
        ("gpu_memory=[40G, 80G]", "if GPUs differ, that of the smallest"),
        ("gpu_memory=0G", "is not a size"),
    ],
)
def test_wrong_settings_are_refused(change: str, expected: str, fails_with: FailsWith) -> None:
    assert expected in fails_with(lambda: settings(change))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("time=24:00:00", "write it in quotes"),  # YAML reads a number of seconds
        ("gpus={llama3_8b: 1}", "gpus has no value for tiny or diablo: add it, or a default"),
        ("gpus=5", "batch_size=16 is not a multiple of recipe.micro_batch_size=1 × 5 GPUs: give 1, 2, 4, 8, 16 GPUs"),
        ("gpus=some", "gpus of diablo on tiny is 'some': give a number, or auto"),
        ("gpus=8;gpus_per_node=3", "8 GPUs for diablo on tiny do not divide over 3 nodes"),
        ("cpus=0", "cpus of diablo on tiny is 0"),
    ],
)
def test_wrong_resources_are_refused(change: str, expected: str, fails_with: FailsWith) -> None:
    config = run("tiny", "diablo", "recipe.micro_batch_size=1")
    assert expected in fails_with(lambda: settings(*change.split(";")).resources(config))


def test_unknown_clusters_and_missing_sbatch(
    tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch, fails_with: FailsWith
) -> None:
    assert "did you mean a100?" in fails_with(lambda: read_cluster("a10"))
    monkeypatch.setenv("PATH", str(tmp_path))
    arguments = ["method=lora", *overrides(tmp_path / "runs", cache_dir)]
    assert "no sbatch on the path" in fails_with(lambda: submit(arguments, settings(), Options()))
    assert not (tmp_path / "runs").exists()
    assert "--failed" in fails_with(lambda: retry.main(["method=lora", "cluster=a100"]))
    assert "must be at least 1" in fails_with(lambda: parse(["method=lora", "--pack", "0"]))


def test_a_second_submitter_is_told_who_is_first(tmp_path: Path, fails_with: FailsWith) -> None:
    def again() -> None:
        with _submitter_lock(tmp_path):
            pass

    with _submitter_lock(tmp_path):
        assert f"process {os.getpid()} on " in fails_with(again)
    again()


def test_the_script_stops_where_activation_fails(tmp_path: Path) -> None:
    manifest = planned_manifest(tmp_path, {}, [])
    cluster = settings("activate=[export GREETING=hello, 'false # it''s broken']")
    script = job_script(cluster, cluster.resources(run()), manifest.code, ["slurm.job"])
    result = subprocess.run(["bash", "-c", script], capture_output=True, encoding="utf-8")
    assert (result.returncode, result.stdout) == (1, "error: activation failed on this node: false # it's broken\n")


def test_snapshots_hold_commit_changes_and_untracked_files(tmp_path: Path) -> None:
    project = tmp_path / "project"
    (project / "slurm").mkdir(parents=True)

    def git(*arguments: str, folder: Path = project) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        command = ["git", "-C", str(folder), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, encoding="utf-8").stdout

    git("init", "--quiet")
    (project / "slurm" / "kept.py").write_text("first = 1\n", encoding="utf-8")
    (project / ".gitignore").write_text("ignored.py\n", encoding="utf-8")
    git("add", ".")
    git("commit", "--quiet", "-m", "first")
    (project / "slurm" / "kept.py").write_text("second = 2\n", encoding="utf-8")
    (project / "slurm" / "new.py").write_text("new = 3\n", encoding="utf-8")
    (project / "slurm" / "ignored.py").write_text("secret\n", encoding="utf-8")
    about = take_snapshot(tmp_path / "code", project)
    code = Path(about["folder"])
    assert (code / "slurm" / "kept.py").read_text(encoding="utf-8") == "second = 2\n"
    assert (code / "slurm" / "new.py").read_text(encoding="utf-8") == "new = 3\n"
    assert not (code / "slurm" / "ignored.py").exists()
    assert about["commit"] == git("rev-parse", "HEAD", folder=code).strip()
    assert (about["changed"], about["untracked"]) == (True, ["slurm/new.py"])
    assert take_snapshot(tmp_path / "code", project) == about
    (project / "slurm" / "new.py").write_text("new = 4\n", encoding="utf-8")
    assert take_snapshot(tmp_path / "code", project)["folder"] != about["folder"]
    assert (code / "slurm" / "new.py").read_text(encoding="utf-8") == "new = 3\n"


def test_ranks_under_the_names_that_torch_reads() -> None:
    slurm = {"SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "70001"}
    assert torch_variables({**slurm, "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.7"}) == {
        **{"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4"},
        **{"MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "20001"},
    }


def test_an_error_of_git_is_short_and_comes_before_anything_is_written(
    tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch, fails_with: FailsWith
) -> None:
    """With a full disk git prints a line for every file; a repository of another user is refused immediately."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, script in {
        "sbatch": "echo slurm 23.02",
        "squeue": "true",
        "scontrol": "echo MaxArraySize = 1001",
        "git": 'for i in $(seq 2000); do echo "error: unable to write file f$i" >&2; done; exit 128',
    }.items():
        (tools / name).write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    runs_dir = tmp_path / "runs"
    arguments = ["method=lora", "seed=0", *overrides(runs_dir, cache_dir)]
    message = fails_with(lambda: submit(arguments, settings(), Options()))
    assert message.startswith("git rev-parse in ")
    assert message.endswith(": error: unable to write file f1; … (2000 lines); error: unable to write file f2000")
    assert not list(runs_dir.glob("*/config.yaml"))
    assert "time" in fails_with(lambda: submit(arguments, settings("time=24:00:00"), Options()))
    assert not list(runs_dir.glob("*/config.yaml"))


def test_a_run_is_finished_when_its_own_evaluation_is(tmp_path: Path, small: list[str]) -> None:
    """Another evaluation, with `evaluation.limit`, leaves a score in another folder of the same protocol."""
    from eval.run import evaluate
    from experiments.train.run import train

    arguments = ["method=lora", "seed=0", *small]
    (run,) = write_runs(plan(arguments))
    about = describe_run(run, plan(arguments)[0])
    train(run)
    evaluate(run, ["evaluation.limit=3"])
    assert len(list(run.root.glob("eval/arith/plain-*/score.json"))) == 1
    assert (is_finished(run, "train", about), is_finished(run, "eval", about)) == (True, False)
    evaluate(run)
    assert is_finished(run, "eval", about)
    # The run's own config applies, regardless of later submissions.
    (later,) = (_with_frozen_evaluation(config) for config in plan([*arguments, "evaluation.limit=5"]))
    assert describe_run(run, later) == about


def test_what_is_finished_or_started_is_told_apart_in_a_dry_run(
    tmp_path: Path, cache_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    arguments = ["method=lora", "seed=0,1,2,3", *overrides(tmp_path / "runs", cache_dir)]
    done, failed, begun, _ = write_runs(plan(arguments))
    done.train_record.touch()
    (evaluation,) = evaluation_paths(done, read_config(done))
    evaluation.root.mkdir(parents=True)
    evaluation.score.touch()
    (failed.root / "attempts.json").write_text(json.dumps([attempt_entry("failed", "no data")]), encoding="utf-8")
    (begun.root / "attempts.json").write_text(json.dumps([attempt_entry("preempted")]), encoding="utf-8")
    submit(arguments, settings(), Options(dry_run=True))
    shown, noted = capsys.readouterr()
    assert noted.startswith("note: without the queue (no squeue on the path")
    assert "4 runs: 1 new, 1 to resume, 1 to resume after a failure, 1 finished" in shown
    assert "would submit train and eval of 3 runs in 3 tasks" in shown
    submit(arguments, settings(), Options(dry_run=True, only_failed=True))
    assert "would submit train and eval of 1 run in 1 task" in capsys.readouterr().out
