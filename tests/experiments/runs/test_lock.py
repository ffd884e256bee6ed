"""One writer per run directory: refusing, waiting, and taking over locks."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest

from experiments import ROOT
from experiments.errors import UserError
from experiments.runs import lock as lock_module
from experiments.runs.attempts import attempt
from experiments.runs.commands import answer
from experiments.runs.lock import identity, locked
from experiments.runs.records import RunPaths, write_atomically
from experiments.train.run import train
from tests.conftest import planned

Fails = Callable[[Callable[[], object]], str]
WRITER = """
import sys, time
from pathlib import Path
from experiments.runs import attempts
from experiments.runs.records import RunPaths
attempts.INTERVAL = 0.1
with attempts.attempt(RunPaths(Path(sys.argv[1])), "train"):
    print("begun", flush=True)
    time.sleep(120)
"""


@contextmanager
def writer(run: RunPaths, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """Run another process that holds the lock of an attempt."""
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(run.root)],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        encoding="utf-8",
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def run(tmp_path: Path) -> RunPaths:
    return RunPaths(tmp_path)


def enter(run: RunPaths, patience: float = 60) -> None:
    with locked(run, patience):
        assert json.loads(run.lock.read_text(encoding="utf-8"))["pid"] == os.getpid()
    assert not run.lock.exists()


def held_elsewhere(run: RunPaths, **more: object) -> None:
    """Write the lock of a process on an unreachable host."""
    run.lock.write_text(json.dumps({**identity(), "host": "another", "beat": 0, **more}), encoding="utf-8")


def test_a_second_writer_is_refused_and_told_by_whom(run: RunPaths, fails_with: Fails) -> None:
    with writer(run, SLURM_JOB_ID="41") as process:
        message = fails_with(lambda: enter(run))
        who = f"job 41, restart 0, process {process.pid} on {socket.gethostname()}"
        assert message == f"{run.root}: is being written by {who}: wait for it, or stop it first"
        assert json.loads(run.lock.read_text(encoding="utf-8"))["pid"] == process.pid


def test_a_dead_holder_of_this_host_is_taken_over_at_once(run: RunPaths) -> None:
    with writer(run) as process:
        process.kill()  # not waited for: a zombie counts as dead
        started = time.monotonic()
        enter(run)
        assert time.monotonic() - started < 30  # well below the 60 s after which any holder counts as dead


def test_a_requeued_task_waits_for_its_survivor(
    run: RunPaths, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same task is not refused: it continues once the first attempt has ended."""
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with writer(run, SLURM_RESTART_COUNT="0") as process:
        started = time.monotonic()
        subprocess.Popen(["sh", "-c", f"sleep 1.5; kill -9 {process.pid}"])
        enter(run)
        assert time.monotonic() - started > 1
    assert f"waiting for job 41, restart 0, process {process.pid}" in capsys.readouterr().err


def test_a_heartbeat_that_stands_still_is_taken_over_by_the_waiters_clock(run: RunPaths) -> None:
    held_elsewhere(run)
    started = time.monotonic()
    enter(run, patience=1.0)
    assert time.monotonic() - started > 1.0


@pytest.mark.parametrize("written", [0.0, 4e9], ids=["1970", "2096"])
def test_clock_times_in_files_count_for_nothing(run: RunPaths, written: float, fails_with: Fails) -> None:
    """A clock jump neither keeps the lock of a dead holder nor releases that of a live one."""
    held_elsewhere(run)
    write_atomically(run.heartbeat, json.dumps({"beat": 1, "time": written}))
    for path in (run.lock, run.heartbeat):
        os.utime(path, (written, written))
    started = time.monotonic()
    enter(run, patience=1.0)
    assert 1.0 < time.monotonic() - started < 60
    held_elsewhere(run)
    beats = (
        f"import time; time.sleep(1); open({str(run.heartbeat)!r}, 'w').write('{{\"beat\": 2, \"time\": {written}}}')"
    )
    subprocess.Popen([sys.executable, "-c", beats])
    assert "is being written by" in fails_with(lambda: enter(run, patience=30))


def test_a_stopped_process_that_wakes_leaves_the_directory_alone(run: RunPaths) -> None:
    with writer(run) as process:
        process.send_signal(19)  # SIGSTOP
        time.sleep(0.5)
        with locked(run, patience=1.0):
            process.send_signal(18)  # SIGCONT
            assert process.wait(120) == 1
            assert json.loads(run.lock.read_text(encoding="utf-8"))["pid"] == os.getpid()
    assert json.loads(run.attempts.read_text(encoding="utf-8"))[0]["how"] is None


def test_of_two_waiters_one_writes(run: RunPaths) -> None:
    """Both find the same stale lock; the periods in which they hold it do not overlap."""
    held_elsewhere(run)
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom experiments.runs.lock import locked\n"
        "from experiments.runs.records import RunPaths\n"
        "with locked(RunPaths(Path(sys.argv[1])), 2.5):\n"
        "    a = time.monotonic(); time.sleep(0.3); print(a, time.monotonic())"
    )
    environment = {**os.environ, "SLURM_JOB_ID": "1"}
    waiting = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(run.root)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            encoding="utf-8",
        )
        for _ in range(3)
    ]
    times = sorted(tuple(map(float, process.communicate(timeout=240)[0].split())) for process in waiting)
    assert len(times) == 3
    assert all(first[1] <= second[0] for first, second in pairwise(times))


UNKNOWN_JOB = "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1"


def test_squeue_is_believed_when_it_does_not_know_the_job(
    run: RunPaths, squeue: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only a reply that the job is unknown counts: an unreachable controller is no evidence about the job."""
    assert lock_module.PATIENCE_UNLISTED == 60
    monkeypatch.setattr(lock_module, "PATIENCE_UNLISTED", 0.3)
    for script, gone in (
        ("echo 41_3", False),
        ("true", True),
        (UNKNOWN_JOB, True),
        ("echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1", False),
    ):
        squeue(script)
        held_elsewhere(run, job="41_3")
        started = time.monotonic()
        enter(run, patience=4.0)
        assert time.monotonic() - started > 0.3
        assert (time.monotonic() - started < 4.0) is gone, script


def test_a_heartbeat_outweighs_squeue(
    run: RunPaths, squeue: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, fails_with: Fails
) -> None:
    """A live job of another cluster, on an unreachable host, is unknown to the local squeue."""
    monkeypatch.setattr(lock_module, "PATIENCE_UNLISTED", 2.0)
    squeue(UNKNOWN_JOB)
    held_elsewhere(run, job="41_3")
    beats = (
        f"import time\nfor beat in range(9):\n    time.sleep(1)\n    open({str(run.heartbeat)!r}, 'w').write(str(beat))"
    )
    process = subprocess.Popen([sys.executable, "-c", beats])
    try:
        assert "is being written by job 41_3" in fails_with(lambda: enter(run))
        assert run.lock.exists()
    finally:
        process.kill()
        process.wait()


def test_a_process_of_this_machine_outweighs_squeue(
    run: RunPaths, squeue: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The directory of a stopped orphan process, whose job has ended in Slurm, is taken over after the long wait."""
    monkeypatch.setattr(lock_module, "PATIENCE_UNLISTED", 0.3)
    squeue(UNKNOWN_JOB)
    with writer(run, SLURM_JOB_ID="41") as process:
        process.send_signal(19)  # SIGSTOP
        started = time.monotonic()
        enter(run, patience=3.0)
        assert time.monotonic() - started > 3.0


def test_a_process_id_counts_in_its_own_container_only(run: RunPaths) -> None:
    """Containers may share a host name, so a process id that is missing here may be alive in another container."""
    ended = subprocess.Popen(["true"])
    ended.wait()
    held_elsewhere(run, host=socket.gethostname(), pid=ended.pid, processes="another")
    started = time.monotonic()
    enter(run, patience=1.0)
    assert time.monotonic() - started > 1.0


def test_a_squeue_that_hangs_is_ended_with_its_children(run: RunPaths) -> None:
    started = time.monotonic()
    assert answer(["sh", "-c", "sleep 60 & sleep 60"], 0.5) is None
    assert time.monotonic() - started < 30


def test_training_beside_another_process_is_refused(small: list[str], fails_with: Fails) -> None:
    run = planned(small)
    with writer(run):
        assert "is being written by" in fails_with(lambda: train(run))
    assert not run.metrics.exists()


def test_a_stage_waits_ten_minutes_by_itself(run: RunPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    assert lock_module.PATIENCE == 600
    monkeypatch.setattr(lock_module, "PATIENCE", 0.5)
    held_elsewhere(run)
    with attempt(run, "train"):
        assert json.loads(run.lock.read_text(encoding="utf-8"))["pid"] == os.getpid()


@pytest.mark.slow
def test_a_directory_of_someone_else_is_one_clear_line(small: list[str]) -> None:
    code = (
        "import locale, os, sys\nfrom experiments.errors import prepare_imports, run_command\nprepare_imports()\n"
        "import experiments.train.run\n"
        "from experiments.train.__main__ import main\n"
        "if os.geteuid() == 0: os.seteuid(65534)\n"
        "run_command(main)"
    )
    with tempfile.TemporaryDirectory() as folder:  # other users cannot read pytest's own folders
        run = planned([*small, f"runtime.runs_dir={folder}"])
        Path(folder).chmod(0o755)
        run.root.chmod(0o555)
        command = [sys.executable, "-c", code, str(run.root)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", check=False)
        run.root.chmod(0o755)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {run.root}: cannot be written to (Permission denied): fix its permissions")
    assert len(done.stderr.splitlines()) == 1


def test_the_lock_goes_with_a_failure(run: RunPaths) -> None:
    with pytest.raises(UserError), attempt(run, "eval"):
        raise UserError("no such thing:\nmend it")
    assert not run.lock.exists()
    (entry,) = json.loads(run.attempts.read_text(encoding="utf-8"))
    assert (entry["stage"], entry["how"], entry["error"]) == ("eval", "failed", "mend it")
