"""One writer per run directory: `lock`, a file that names the job, host and process writing there.

The lock of a killed holder is taken over, but never on a guess, since a job that Slurm lost may still run next to its
successor. Either the holder's process is gone from this very machine, or its heartbeat has stood still for `PATIENCE`
seconds, or for `PATIENCE_UNLISTED` if squeue does not know its job (which may belong to another cluster). Seconds are
those of the waiter's own monotonic clock; times in files are not used.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from experiments.errors import Preempted, UserError
from experiments.rules import Value
from experiments.runs import preemption
from experiments.runs.commands import answer
from experiments.runs.records import RunPaths

PATIENCE, PATIENCE_UNLISTED = 600.0, 60.0  # seconds
POLL, POLL_QUEUE = 0.2, 30.0  # seconds between checks of the files and the process, and of the queue

Holder = dict[str, Any]


def identity() -> Holder:
    """Return who writes: Slurm job (`<array>_<task>` in an array), its number of requeues, host and process."""
    environment = os.environ
    job = environment.get("SLURM_JOB_ID")
    if "SLURM_ARRAY_JOB_ID" in environment and "SLURM_ARRAY_TASK_ID" in environment:
        job = f"{environment['SLURM_ARRAY_JOB_ID']}_{environment['SLURM_ARRAY_TASK_ID']}"
    restart = int(environment.get("SLURM_RESTART_COUNT", "0"))
    return {"job": job, "restart": restart, "host": socket.gethostname(), "pid": os.getpid()}


@contextmanager
def locked(run: RunPaths, patience: float | None = None, wait_for_holder: bool = False) -> Generator[str, None, None]:
    """Hold the run's lock and yield its text. Waits for a holder without signs of life; UserError if it is alive.

    `wait_for_holder`: also wait for a living holder, until it has ended.
    """
    beat = _read_json(_read(run.heartbeat)).get("beat", -1) + 1  # makes the lock different from all earlier ones
    text = json.dumps({**identity(), "processes": _processes(), "beat": beat})
    try:
        _acquire(run, text, PATIENCE if patience is None else patience, wait_for_holder)
    except OSError as error:
        raise UserError(
            f"{run.root}: cannot be written to ({error.strerror}): fix its permissions, or plan the run elsewhere "
            f"with runtime.runs_dir=…"
        ) from None
    try:
        yield text
    finally:
        if holds(run, text):
            run.lock.unlink(missing_ok=True)


def _processes() -> str:
    """Return the scope in which a process id is unique: this boot of this machine, and the container in it."""
    try:
        return f"{_read(Path('/proc/sys/kernel/random/boot_id')).strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return socket.gethostname()


def holds(run: RunPaths, text: str) -> bool:
    """Return whether the lock still belongs to its holder, who may have been suspended for long."""
    return _read(run.lock) in (text, "")


def describe(holder: Holder) -> str:
    job = f"job {holder.get('job')}, restart {holder.get('restart')}, " if holder.get("job") else ""
    return f"{job}process {holder.get('pid')} on {holder.get('host')}"


def _acquire(run: RunPaths, text: str, patience: float, wait_for_holder: bool) -> None:
    me = json.loads(text)
    seen: tuple[str, str] | None = None
    since = asked_queue = -float("inf")
    while True:
        with suppress(FileExistsError):
            handle = os.open(run.lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            return
        content = _read(run.lock)
        holder, now = _read_json(content), time.monotonic()
        state = (content, _read(run.heartbeat))
        still = now - since if state == seen else 0.0
        here = holder.get("processes") == me["processes"]
        gone = here and not _alive(holder.get("pid"))
        if not gone and not here and still > PATIENCE_UNLISTED and now - asked_queue > POLL_QUEUE:
            gone, asked_queue = _job_gone(holder.get("job")), now
        if gone or still > patience:
            _remove(run.lock, content)
            continue
        if state != seen:
            earlier_self = holder.get("job") is not None and holder.get("job") == me["job"]
            if seen is None:
                print(f"{run.root}: waiting for {describe(holder)}, which holds its lock", file=sys.stderr, flush=True)
            elif seen[0] == content and holder and not earlier_self and not wait_for_holder:
                raise UserError(f"{run.root}: is being written by {describe(holder)}: wait for it, or stop it first")
            seen, since = state, now
        if preemption.pending_signal():
            raise Preempted
        time.sleep(POLL)


def _remove(lock: Path, content: str) -> None:
    """Remove a dead holder's lock. If another waiter did so first and holds its own lock now, that one is restored."""
    aside = lock.with_name(f".lock-{socket.gethostname()}-{os.getpid()}")
    try:
        os.rename(lock, aside)
    except FileNotFoundError:
        return
    if _read(aside) != content:
        with suppress(FileExistsError):
            os.link(aside, lock)
    aside.unlink()


def _alive(pid: Any) -> bool:
    """Return whether a process runs on this host. A zombie does not count."""
    if not isinstance(pid, int):
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    stat = _read(Path(f"/proc/{pid}/stat"))
    return stat.rpartition(")")[2].split()[:1] != ["Z"]


def _job_gone(job: Any) -> bool:
    """Return whether squeue answers and does not know the job."""
    if job is None or shutil.which("squeue") is None:
        return False
    done = answer(["squeue", "--noheader", "--jobs", str(job), "--format", "%i"], 30)
    if done is None:
        return False
    return not done.stdout.strip() if done.returncode == 0 else "Invalid job id" in done.stderr


def _read(path: Path) -> str:
    """Return a file's text, or "" if there is no file."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""


def _read_json(text: str) -> dict[str, Any]:
    """Parse a JSON object; {} for other text (a lock is empty while it is being written)."""
    try:
        content: Value = json.loads(text)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}
