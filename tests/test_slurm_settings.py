"""What Slurm's side decides without Slurm: settings, scripts, snapshots, locks, and the states of runs."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from experiments.evaluations import evaluation_paths
from experiments.plan import plan, write_runs
from experiments.records import RunPaths, read_config
from slurm import retry
from slurm.arrays import Options, job_script
from slurm.cluster import FOLDER, Cluster, minutes, read_cluster, sbatch_lines
from slurm.job import _note_given_up
from slurm.manifest import Manifest, describe_run, is_finished, write_manifest
from slurm.queue import Task, queued
from slurm.rank import torch_variables
from slurm.snapshot import take_snapshot
from slurm.status import NEVER_STARTED, failed_before, run_state, statuses, table
from slurm.submit import _submitter_lock, _with_frozen_evaluation, parse, submit
from tests.slurm_runs import overrides, settings

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


def test_resources_by_model() -> None:
    cluster = read_cluster("a100")
    assert (cluster.resources("llama2_13b").gpus, cluster.resources("llama3_8b").gpus) == (2, 1)
    assert cluster.resources("llama2_13b").gpu_hours == 48  # 2 GPUs, 1 day
    assert cluster.resources("llama2_13b", "eval").gpu_hours == 12
    two_nodes = settings("gpus=4").resources("tiny")  # of 2 GPUs each
    assert (two_nodes.nodes, two_nodes.processes) == (2, 4)
    assert "--ntasks-per-node=2" in sbatch_lines(settings("gpus=4"), two_nodes)


def test_any_option_of_sbatch_is_passed_through() -> None:
    cluster = settings("sbatch={qos: long, exclusive: true, nice: 5, constraint: null}", "gres='gpu:a100'")
    lines = sbatch_lines(cluster, cluster.resources("tiny"))
    assert {"--qos=long", "--exclusive", "--nice=5", "--gres=gpu:a100:1", "--signal=B:USR1@120"} <= set(lines)
    assert not any("constraint" in line for line in lines)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("partitoin=main", "did you mean partition or"),
        ("qos=high", "options of sbatch go under sbatch"),
        ("sbatch={array: 1-3}", "sbatch.array is set by the submission: give --max-parallel"),
        ("sbatch={--qos: high}", "without dashes"),
        ("sbatch=[1]", "it has to be a dict"),
        ("signal=KILL@3", "as USR1@120"),
        ("eval={partition: x}", "no setting eval.partition"),
    ],
)
def test_wrong_settings_are_refused(change: str, expected: str, fails_with: FailsWith) -> None:
    assert expected in fails_with(lambda: settings(change))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("time=24:00:00", "write it in quotes"),  # YAML reads a number of seconds
        ("gpus={llama3_8b: 1}", "gpus has no value for tiny"),
        ("gpus=3", "do not divide over 2 nodes"),
        ("cpus=0", "cpus of tiny is 0"),
    ],
)
def test_wrong_resources_are_refused(change: str, expected: str, fails_with: FailsWith) -> None:
    assert expected in fails_with(lambda: settings(change).resources("tiny"))


def test_unknown_clusters_and_missing_sbatch(
    tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch, fails_with: FailsWith
) -> None:
    assert "did you mean a100?" in fails_with(lambda: read_cluster("a10"))
    monkeypatch.setenv("PATH", str(tmp_path))
    arguments = ["method=lora", *overrides(tmp_path / "runs", cache_dir)]
    assert "no sbatch on the path" in fails_with(lambda: submit(arguments, settings(), Options()))
    assert not (tmp_path / "runs").exists()
    assert "--failed" in fails_with(lambda: retry.main(["method=lora", "cluster=a100"]))
    assert "numbers from 1" in fails_with(lambda: parse(["method=lora", "--pack", "0"]))


def test_a_second_submitter_is_told_who_is_first(tmp_path: Path, fails_with: FailsWith) -> None:
    def again() -> None:
        with _submitter_lock(tmp_path):
            pass

    with _submitter_lock(tmp_path):
        assert f"process {os.getpid()} on " in fails_with(again)
    again()


def test_the_script_stops_where_activation_fails(tmp_path: Path) -> None:
    manifest = _manifest(tmp_path, {}, [])
    cluster = settings("activate=[export GREETING=hello, 'false # it''s broken']")
    script = job_script(cluster, cluster.resources("tiny"), manifest.code, ["slurm.job"])
    result = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (1, "error: activation failed on this node: false # it's broken\n")


def test_snapshots_hold_commit_changes_and_untracked_files(tmp_path: Path) -> None:
    project = tmp_path / "project"
    (project / "slurm").mkdir(parents=True)

    def git(*arguments: str, folder: Path = project) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        command = ["git", "-C", str(folder), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    git("init", "--quiet")
    (project / "slurm" / "kept.py").write_text("first = 1\n")
    (project / ".gitignore").write_text("ignored.py\n")
    git("add", ".")
    git("commit", "--quiet", "-m", "first")
    (project / "slurm" / "kept.py").write_text("second = 2\n")
    (project / "slurm" / "new.py").write_text("new = 3\n")
    (project / "slurm" / "ignored.py").write_text("secret\n")
    about = take_snapshot(tmp_path / "code", project)
    code = Path(about["folder"])
    assert (code / "slurm" / "kept.py").read_text() == "second = 2\n"
    assert (code / "slurm" / "new.py").read_text() == "new = 3\n"
    assert not (code / "slurm" / "ignored.py").exists()
    assert about["commit"] == git("rev-parse", "HEAD", folder=code).strip()
    assert (about["changed"], about["untracked"]) == (True, ["slurm/new.py"])
    assert take_snapshot(tmp_path / "code", project) == about
    (project / "slurm" / "new.py").write_text("new = 4\n")
    assert take_snapshot(tmp_path / "code", project)["folder"] != about["folder"]
    assert (code / "slurm" / "new.py").read_text() == "new = 3\n"


def test_ranks_under_the_names_that_torch_reads() -> None:
    slurm = {"SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "70001"}
    assert torch_variables({**slurm, "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.7"}) == {
        **{"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4"},
        **{"MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "20001"},
    }


def _attempt(how: str | None, error: str | None = None) -> dict[str, Any]:
    return {"job": "7_0", "restart": 0, "host": "n1", "stage": "train", "how": how, "error": error}


@pytest.mark.parametrize(
    ("attempts", "task", "expected"),
    [
        ([], None, ("planned", NEVER_STARTED)),
        ([], Task("7_0", "PENDING", "Priority"), ("queued", "waits: Priority")),
        ([_attempt("preempted")], Task("7_0", "PENDING", "BeginTime"), ("preempted", "waits: BeginTime")),
        ([_attempt("preempted")], None, ("preempted", "not in the queue: submit again to go on")),
        ([{**_attempt("preempted"), "error": "max_requeues"}], None, ("failed", "max_requeues")),
        ([_attempt(None)], Task("7_0", "RUNNING", "None"), ("running", "starting")),
        ([_attempt("failed", "out of memory")], None, ("failed", "out of memory")),
        ([_attempt(None)], None, ("failed", "ended without a word on n1: killed, out of memory, or the node died")),
    ],
)
def test_states(tmp_path: Path, attempts: list[dict[str, Any]], task: Task | None, expected: tuple[str, str]) -> None:
    if attempts:
        (tmp_path / "attempts.json").write_text(json.dumps(attempts))
    state = run_state(RunPaths(tmp_path), ABOUT, task, None)
    assert (state.state, state.detail) == expected
    assert state.preempted == sum(attempt["how"] == "preempted" for attempt in attempts)


@pytest.mark.parametrize(
    ("attempts", "expected"),
    [
        ([], ("unknown", "not started; whether")),
        ([_attempt("preempted")], ("unknown", "train preempted; whether")),
        ([_attempt("finished")], ("unknown", "train finished; whether")),
        ([_attempt(None)], ("unknown", "train on n1 without a fresh heartbeat; whether")),
        ([_attempt("failed", "out of memory")], ("failed", "out of memory")),
    ],
)
def test_states_where_the_queue_is_not_known(
    tmp_path: Path, attempts: list[dict[str, Any]], expected: tuple[str, str]
) -> None:
    if attempts:
        (tmp_path / "attempts.json").write_text(json.dumps(attempts))
    log = tmp_path / "task.log"
    log.write_text("said by an earlier task")
    state = run_state(RunPaths(tmp_path), ABOUT, None, log, queue_known=False)
    assert (state.state, state.detail[: len(expected[1])]) == expected


@pytest.mark.parametrize("queue_known", [True, False])
def test_a_fresh_heartbeat_is_a_running_run(tmp_path: Path, queue_known: bool) -> None:
    (tmp_path / "attempts.json").write_text(json.dumps([_attempt(None)]))
    heartbeat, now = tmp_path / "heartbeat.json", time.time()

    def state(beat: float, written: float) -> str:
        heartbeat.write_text(json.dumps({"stage": "train", "step": 12, "steps": 40, "time": beat}))
        os.utime(heartbeat, (written, written))
        return run_state(RunPaths(tmp_path), ABOUT, None, None, queue_known).state

    ended = "failed" if queue_known else "unknown"
    assert state(now, now) == "running"
    assert state(now - 3600, now) == "running"  # one clock is wrong
    assert state(now, now + 3600) == "running"
    assert state(now - 3600, now - 3600) == ended
    assert state(now + 3600, now + 3600) == ended  # both


@pytest.fixture
def squeue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Puts a script in the place of squeue."""
    path = tmp_path / "bin" / "squeue"
    path.parent.mkdir()
    monkeypatch.setenv("PATH", f"{path.parent}:{os.environ['PATH']}")

    def write(script: str) -> None:
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    return write


@pytest.mark.parametrize(
    "script",
    [
        "echo 'slurm_load_jobs error: Unable to contact slurm controller (connect failure)' >&2; exit 1",
        "echo '<html>502 Bad Gateway</html>'",
        "printf '\\377\\376\\000garbage'",
        "echo '7|0'",
        "echo 'x|y|z|u|v'",
        "echo '7|N/A|RUNNING|None|{manifest}'",
        "echo '7|5|RUNNING|None|{manifest}'",
        "sleep 60 & sleep 60",
    ],
)
def test_a_queue_that_cannot_be_read_makes_runs_unknown(
    script: str,
    tmp_path: Path,
    squeue: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("slurm.queue.PATIENCE", 1.0)
    path = tmp_path / ".slurm" / "20260101-000000-001" / "manifest.json"
    for name in ("waiting", "running"):
        (tmp_path / name).mkdir()
    write_manifest(path, _manifest(tmp_path, {"waiting": ABOUT, "running": ABOUT}, [["waiting"], ["running"]]))
    (tmp_path / "running" / "attempts.json").write_text(json.dumps([_attempt(None)]))
    (tmp_path / "running" / "heartbeat.json").write_text(json.dumps({"stage": "train", "time": time.time()}))
    squeue(script.replace("{manifest}", str(path)))
    started = time.monotonic()
    assert [state.state for state in statuses(tmp_path)] == ["unknown", "running"]
    assert time.monotonic() - started < 30
    (note,) = capsys.readouterr().err.splitlines()
    assert note.startswith("note: without the queue (squeue")


def test_lines_of_other_jobs_are_passed_over(tmp_path: Path, squeue: Callable[[str], None]) -> None:
    path = tmp_path / ".slurm" / "20260101-000000-001" / "manifest.json"
    write_manifest(path, _manifest(tmp_path, {"run": ABOUT}, [["run"]]))
    squeue(f"echo '6|N/A|PENDING|Priority|a comment | of others'; echo '7|0|RUNNING|None|{path}'")
    assert queued(tmp_path) == {"run": [Task("7_0", "RUNNING", "None")]}


def test_a_give_up_is_a_failure_of_every_run_of_the_task(tmp_path: Path, fails_with: FailsWith) -> None:
    """Whether a run was preempted, killed, between its stages or not begun when the task was stopped."""
    lasts: dict[str, list[dict[str, Any]]] = {
        "preempted": [_attempt("preempted")],
        "killed": [_attempt(None)],
        "between": [_attempt("finished")],
        "not-begun": [],
        "done": [_attempt("finished")],
    }
    for name, attempts in lasts.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "attempts.json").write_text(json.dumps(attempts))
    (tmp_path / "between" / "train.json").touch()
    for record in ("train.json", *ABOUT["eval"]):
        (tmp_path / "done" / record).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "done" / record).touch()
    manifest = _manifest(tmp_path, dict.fromkeys(lasts, ABOUT), [list(lasts)])
    why = "stopped, and not requeued again after 3 times (max_requeues): submit again to go on"
    _note_given_up(manifest, list(lasts), why)
    states = {name: run_state(RunPaths(tmp_path / name), ABOUT, None, None) for name in lasts}
    assert {state.state for name, state in states.items() if name != "done"} == {"failed"}
    assert {state.detail for name, state in states.items() if name != "done"} == {why}
    assert states["done"].state == "finished"
    assert [failed_before(RunPaths(tmp_path / name)) for name in lasts] == [True] * 4 + [False]
    assert states["preempted"].preempted == 1


def test_an_error_of_git_is_short_and_comes_before_anything_is_written(
    tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch, fails_with: FailsWith
) -> None:
    """A full disk has a line for every file; a repository of another user is refused at once."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, script in {
        "sbatch": "echo slurm 23.02",
        "squeue": "true",
        "scontrol": "echo MaxArraySize = 1001",
        "git": 'for i in $(seq 2000); do echo "error: unable to write file f$i" >&2; done; exit 128',
    }.items():
        (tools / name).write_text(f"#!/bin/sh\n{script}\n")
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


def test_a_running_runs_progress_and_a_finished_run(tmp_path: Path) -> None:
    about = {"train": ["train.json"], "eval": ["eval/arith/plain-0/score.json", "eval/more/plain-0/score.json"]}
    beat = {"stage": "train", "step": 120, "steps": 400, "tokens_per_second": 5300.4, "eta_seconds": 240}
    (tmp_path / "heartbeat.json").write_text(json.dumps({**beat, "time": time.time()}))
    running = run_state(RunPaths(tmp_path), about, Task("7_0", "RUNNING", "None"), None)
    assert running.detail.startswith("train step 120/400, 5,300 tokens/s, 4 min left, until ")
    heartbeat, now = tmp_path / "heartbeat.json", time.time()
    for jumped in (0, now - 1200, now + 1200):  # the clock of the node: the disk's says that it was written just now
        heartbeat.write_text(json.dumps({**beat, "time": jumped}))
        assert "silent" not in run_state(RunPaths(tmp_path), about, Task("7_0", "RUNNING", "None"), None).detail
    heartbeat.write_text(json.dumps({**beat, "time": now - 1200}))
    os.utime(heartbeat, (now - 1200, now - 1200))
    silent = run_state(RunPaths(tmp_path), about, Task("7_0", "RUNNING", "None"), None)
    assert silent.detail.endswith("silent for 20 min")
    (tmp_path / "train.json").touch()
    for score in about["eval"]:
        assert run_state(RunPaths(tmp_path), about, None, None).state != "finished"
        (tmp_path / score).parent.mkdir(parents=True)
        (tmp_path / score).touch()
    assert run_state(RunPaths(tmp_path), about, None, None).state == "finished"


def test_status_of_a_thousand_runs_takes_a_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")  # without Slurm
    names = [f"run-{number:04}" for number in range(1000)]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "attempts.json").write_text(json.dumps([_attempt("failed", "no data")]))
    path = tmp_path / ".slurm" / "20260101-000000-001" / "manifest.json"
    write_manifest(path, _manifest(tmp_path, dict.fromkeys(names, ABOUT), [[name] for name in names]))
    started = time.perf_counter()
    shown = table(statuses(tmp_path, "sweep"))
    assert time.perf_counter() - started < 10  # a safety net: well below a second on two idle cores
    assert shown.splitlines()[0] == "1000 runs: 1000 failed"
    assert len(shown.splitlines()) == 1001


def test_a_run_is_finished_when_its_own_evaluation_is(tmp_path: Path, small: list[str]) -> None:
    """Another one, with `evaluation.limit`, leaves a score in another folder of the same protocol."""
    from eval.run import evaluate
    from experiments.train import train

    arguments = ["method=lora", "seed=0", *small]
    (run,) = write_runs(plan(arguments))
    about = describe_run(run, plan(arguments)[0])
    train(run)
    evaluate(run, ["evaluation.limit=3"])
    assert len(list(run.root.glob("eval/arith/plain-*/score.json"))) == 1
    assert (is_finished(run, "train", about), is_finished(run, "eval", about)) == (True, False)
    evaluate(run)
    assert is_finished(run, "eval", about)
    # The run's own config counts, whatever it is submitted with later.
    (later,) = (_with_frozen_evaluation(config) for config in plan([*arguments, "evaluation.limit=5"]))
    assert describe_run(run, later) == about


def test_status_names_what_it_knows(tmp_path: Path, fails_with: FailsWith) -> None:
    assert "nothing was submitted from" in fails_with(lambda: statuses(tmp_path))
    write_manifest(tmp_path / ".slurm" / "a" / "manifest.json", _manifest(tmp_path, {"run": {}}, [["run"]]))
    assert "did you mean sweep?" in fails_with(lambda: statuses(tmp_path, "swep"))


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
    (failed.root / "attempts.json").write_text(json.dumps([_attempt("failed", "no data")]))
    (begun.root / "attempts.json").write_text(json.dumps([_attempt("preempted")]))
    submit(arguments, settings(), Options(dry_run=True))
    shown, noted = capsys.readouterr()
    assert noted.startswith("note: without the queue (no squeue on the path")
    assert "4 runs: 1 new, 1 to resume, 1 to resume after a failure, 0 already queued, 1 finished" in shown
    assert "would submit train and eval of 3 runs in 3 tasks" in shown
    submit(arguments, settings(), Options(dry_run=True, only_failed=True))
    assert "would submit train and eval of 1 runs in 1 tasks" in capsys.readouterr().out


def _manifest(runs_dir: Path, runs: dict[str, Any], tasks: list[list[str]]) -> Manifest:
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
