"""The states of runs without Slurm: from their files, and from the output of squeue or its absence."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from experiments.runs.records import RunPaths
from slurm.job import _note_given_up
from slurm.manifest import write_manifest
from slurm.queue import Task, queued, slurm
from slurm.status import NEVER_STARTED, failed_before, run_state, statuses, table
from tests.slurm.slurm_runs import attempt_entry, planned_manifest

FailsWith = Callable[[Callable[[], object]], str]
ABOUT = {"config": "", "train": ["train.json"], "eval": ["eval/arith/plain-0/score.json"]}


@pytest.mark.parametrize(
    ("attempts", "task", "expected"),
    [
        ([], None, ("planned", NEVER_STARTED)),
        ([], Task("7_0", "PENDING", "Priority"), ("queued", "waits: Priority")),
        ([attempt_entry("preempted")], Task("7_0", "PENDING", "BeginTime"), ("preempted", "waits: BeginTime")),
        ([attempt_entry("preempted")], None, ("preempted", "not in the queue: submit again to resume")),
        ([{**attempt_entry("preempted"), "error": "max_requeues"}], None, ("failed", "max_requeues")),
        ([attempt_entry(None)], Task("7_0", "RUNNING", "None"), ("running", "starting")),
        ([attempt_entry("failed", "out of memory")], None, ("failed", "out of memory")),
        (
            [attempt_entry(None)],
            None,
            ("failed", "ended without a message on n1: killed, out of memory, or the node died"),
        ),
    ],
)
def test_states(tmp_path: Path, attempts: list[dict[str, Any]], task: Task | None, expected: tuple[str, str]) -> None:
    if attempts:
        (tmp_path / "attempts.json").write_text(json.dumps(attempts), encoding="utf-8")
    state = run_state(RunPaths(tmp_path), ABOUT, task, None)
    assert (state.state, state.detail) == expected
    assert state.preempted == sum(attempt["how"] == "preempted" for attempt in attempts)


@pytest.mark.parametrize(
    ("attempts", "expected"),
    [
        ([], ("unknown", "not started; whether")),
        ([attempt_entry("preempted")], ("unknown", "train preempted; whether")),
        ([attempt_entry("finished")], ("unknown", "train finished; whether")),
        ([attempt_entry(None)], ("unknown", "train on n1 without a fresh heartbeat; whether")),
        ([attempt_entry("failed", "out of memory")], ("failed", "out of memory")),
    ],
)
def test_states_where_the_queue_is_not_known(
    tmp_path: Path, attempts: list[dict[str, Any]], expected: tuple[str, str]
) -> None:
    if attempts:
        (tmp_path / "attempts.json").write_text(json.dumps(attempts), encoding="utf-8")
    log = tmp_path / "task.log"
    log.write_text("said by an earlier task", encoding="utf-8")
    state = run_state(RunPaths(tmp_path), ABOUT, None, log, queue_known=False)
    assert (state.state, state.detail[: len(expected[1])]) == expected


def test_an_error_is_shown_without_the_path_of_the_run_that_the_line_begins_with(tmp_path: Path) -> None:
    said = {"error": f"{tmp_path}: train: the GPU is out of memory; see {tmp_path}/config.yaml"}
    (tmp_path / "attempts.json").write_text(json.dumps([attempt_entry("failed") | said]), encoding="utf-8")
    state = run_state(RunPaths(tmp_path), ABOUT, None, None)
    assert (state.name, state.detail) == (tmp_path.name, "train: the GPU is out of memory; see config.yaml")


@pytest.mark.parametrize("queue_known", [True, False])
def test_a_fresh_heartbeat_is_a_running_run(tmp_path: Path, queue_known: bool) -> None:
    (tmp_path / "attempts.json").write_text(json.dumps([attempt_entry(None)]), encoding="utf-8")
    heartbeat, now = tmp_path / "heartbeat.json", time.time()

    def state(beat: float, written: float) -> str:
        heartbeat.write_text(json.dumps({"stage": "train", "step": 12, "steps": 40, "time": beat}), encoding="utf-8")
        os.utime(heartbeat, (written, written))
        return run_state(RunPaths(tmp_path), ABOUT, None, None, queue_known).state

    ended = "failed" if queue_known else "unknown"
    assert state(now, now) == "running"
    assert state(now - 3600, now) == "running"  # one clock is wrong
    assert state(now, now + 3600) == "running"
    assert state(now - 3600, now - 3600) == ended
    assert state(now + 3600, now + 3600) == ended  # both


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
    write_manifest(path, planned_manifest(tmp_path, {"waiting": ABOUT, "running": ABOUT}, [["waiting"], ["running"]]))
    (tmp_path / "running" / "attempts.json").write_text(json.dumps([attempt_entry(None)]), encoding="utf-8")
    (tmp_path / "running" / "heartbeat.json").write_text(
        json.dumps({"stage": "train", "time": time.time()}), encoding="utf-8"
    )
    squeue(script.replace("{manifest}", str(path)))
    started = time.monotonic()
    assert [state.state for state in statuses(tmp_path)] == ["unknown", "running"]
    assert time.monotonic() - started < 30
    (note,) = capsys.readouterr().err.splitlines()
    assert note.startswith("note: without the queue (squeue")


def test_lines_of_other_jobs_are_passed_over(tmp_path: Path, squeue: Callable[[str], None]) -> None:
    path = tmp_path / ".slurm" / "20260101-000000-001" / "manifest.json"
    write_manifest(path, planned_manifest(tmp_path, {"run": ABOUT}, [["run"]]))
    squeue(f"echo '6|N/A|PENDING|Priority|a comment | of others'; echo '7|0|RUNNING|None|{path}'")
    assert queued(tmp_path) == {"run": [Task("7_0", "RUNNING", "None")]}


def test_a_give_up_is_a_failure_of_every_run_of_the_task(tmp_path: Path, fails_with: FailsWith) -> None:
    """Whether a run was preempted, killed, between its stages or not started when the task was stopped."""
    lasts: dict[str, list[dict[str, Any]]] = {
        "preempted": [attempt_entry("preempted")],
        "killed": [attempt_entry(None)],
        "between": [attempt_entry("finished")],
        "not-begun": [],
        "done": [attempt_entry("finished")],
    }
    for name, attempts in lasts.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "attempts.json").write_text(json.dumps(attempts), encoding="utf-8")
    (tmp_path / "between" / "train.json").touch()
    for record in ("train.json", *ABOUT["eval"]):
        (tmp_path / "done" / record).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "done" / record).touch()
    manifest = planned_manifest(tmp_path, dict.fromkeys(lasts, ABOUT), [list(lasts)])
    why = "stopped, and not requeued again after 3 times (max_requeues): submit again to go on"
    _note_given_up(manifest, list(lasts), why)
    states = {name: run_state(RunPaths(tmp_path / name), ABOUT, None, None) for name in lasts}
    assert {state.state for name, state in states.items() if name != "done"} == {"failed"}
    assert {state.detail for name, state in states.items() if name != "done"} == {why}
    assert states["done"].state == "finished"
    assert [failed_before(RunPaths(tmp_path / name)) for name in lasts] == [True] * 4 + [False]
    assert states["preempted"].preempted == 1


def test_a_running_runs_progress_and_a_finished_run(tmp_path: Path) -> None:
    about = {"train": ["train.json"], "eval": ["eval/arith/plain-0/score.json", "eval/more/plain-0/score.json"]}
    beat = {"stage": "train", "step": 120, "steps": 400, "tokens_per_second": 5300.4, "eta_seconds": 240}
    (tmp_path / "heartbeat.json").write_text(json.dumps({**beat, "time": time.time()}), encoding="utf-8")
    running = run_state(RunPaths(tmp_path), about, Task("7_0", "RUNNING", "None"), None)
    assert running.detail.startswith("train step 120/400, 5,300 tokens/s, 4 min left, until ")
    heartbeat, now = tmp_path / "heartbeat.json", time.time()
    for jumped in (0, now - 1200, now + 1200):  # the node's clock: by the disk's clock it was written just now
        heartbeat.write_text(json.dumps({**beat, "time": jumped}), encoding="utf-8")
        assert "silent" not in run_state(RunPaths(tmp_path), about, Task("7_0", "RUNNING", "None"), None).detail
    heartbeat.write_text(json.dumps({**beat, "time": now - 1200}), encoding="utf-8")
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
        (tmp_path / name / "attempts.json").write_text(
            json.dumps([attempt_entry("failed", "no data")]), encoding="utf-8"
        )
    path = tmp_path / ".slurm" / "20260101-000000-001" / "manifest.json"
    write_manifest(path, planned_manifest(tmp_path, dict.fromkeys(names, ABOUT), [[name] for name in names]))
    started = time.perf_counter()
    shown = table(statuses(tmp_path, "sweep"))
    assert time.perf_counter() - started < 10  # a safety net: well below a second on two idle cores
    assert shown.splitlines()[0] == "1,000 runs: 1000 failed"
    assert len(shown.splitlines()) == 1001


def test_status_names_what_it_knows(tmp_path: Path, fails_with: FailsWith) -> None:
    assert "nothing was submitted from" in fails_with(lambda: statuses(tmp_path))
    write_manifest(tmp_path / ".slurm" / "a" / "manifest.json", planned_manifest(tmp_path, {"run": {}}, [["run"]]))
    assert "did you mean sweep?" in fails_with(lambda: statuses(tmp_path, "swep"))


def test_a_squeue_without_a_cluster_says_why_and_not_how_it_looked(
    squeue: Callable[[str], None], fails_with: Callable[[Callable[[], object]], str]
) -> None:
    """Slurm's tools print a line for each place searched for a configuration, and the reason last."""
    errors = [
        "error: resolve_ctls_from_dns_srv: res_nsearch error: Unknown host",
        "error: fetch_config: DNS SRV failed",
    ]
    errors.append("fatal: Could not establish a configuration source")
    squeue("; ".join(f"echo 'squeue: {error}' >&2" for error in errors) + "; exit 1")
    assert fails_with(lambda: slurm("squeue", "--me")) == "squeue: Could not establish a configuration source"
