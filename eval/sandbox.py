"""Runs programs written by a model in isolation, and returns the outcome of each.

With `sandbox="bwrap"` every program is a separate process in bubblewrap's namespaces: no network, no other visible
process, the system and Python's libraries read-only and nothing else of the machine, a scratch folder of SCRATCH bytes
in memory at /tmp, an empty environment, no privileges, and the limits of `sandbox_runner.py`. `seccomp.py` denies it
more processes, namespaces, keyrings and memory outside its own, so that the limits of the process cover everything it
does. Bubblewrap runs in a user namespace, except as the machine's own root, whom RLIMIT_NPROC does not bind: then every
program gets its own user id instead. With `sandbox="none"` the same runner, time-out and limits (except on threads)
apply in a plain process, which can read and write everything the user can.

Not prevented: a program shares its interpreter with the tests, as in openai/human-eval and juzhengz/LoRI, so one
that inspects the interpreter, or returns an object that equals everything, can cheat on its own score; it cannot harm
the machine.
"""

from __future__ import annotations

import json
import os
import secrets
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, get_args

from eval.seccomp import call_filter
from experiments.errors import UserError, nearest

Sandbox = Literal["bwrap", "none"]
Status = Literal["passed", "failed", "timed_out", "killed"]

RUNNER = Path(__file__).resolve().with_name("sandbox_runner.py")
SYSTEM = ("/usr", "/bin", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache", "/etc/alternatives")
SCRATCH = 64 * 2**20  # bytes
WALL_FACTOR = 4  # the wall limit of a program, in multiples of its CPU time limit
START_LIMIT = 120.0  # seconds until the runner's first line, on a loaded machine
REPORT_LIMIT = 4096  # bytes
ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "LANG": "C.UTF-8",
    "HOME": "/tmp",
    "PYTHONHASHSEED": "0",  # for reproducible outcomes
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}


@dataclass(frozen=True)
class Outcome:
    """How a program ended: `passed` all its tests, `failed` with the error in `message`, `timed_out`, or was `killed`
    or exited before its tests finished."""

    status: Status
    message: str = ""

    @property
    def passed(self) -> bool:
        return self.status == "passed"


def run_programs(
    programs: Sequence[str], *, sandbox: str, timeout: float = 3.0, workers: int | None = None
) -> list[Outcome]:
    """Run programs in parallel, by default one per CPU; outcomes are in the programs' order.

    A program passes only if the runner reports so, with a token made for this program, after its last line has run.
    `timeout` is the CPU time of a program in seconds (3.0: openai/human-eval, juzhengz/LoRI); its wall time, from its
    first line, may be WALL_FACTOR times as long, so that load on the machine fails no correct program.
    """
    command = _command(sandbox)
    with ThreadPoolExecutor(workers or len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(partial(_run, sandbox=sandbox, command=command, timeout=timeout), programs))


def check_sandbox(sandbox: str) -> None:
    """Raise an error if programs cannot be run this way here; call it before hours of generation."""
    run_programs(["pass"], sandbox=sandbox)


def _command(sandbox: str) -> list[str]:
    """Return the command that starts the runner."""
    if sandbox not in get_args(Sandbox):
        raise UserError(f"evaluation.sandbox={sandbox}: {nearest(sandbox, get_args(Sandbox))}")
    # With an environment that is empty except for ENVIRONMENT, this is isolated mode (-I) with a fixed hash seed.
    python = [sys.executable, "-s", "-P", "-B"]
    if sandbox == "none":
        return [*python, str(RUNNER)]
    bwrap = shutil.which("bwrap")
    if bwrap is None:
        raise UserError(f"evaluation.sandbox=bwrap: bwrap is not installed: {_remedy('apt-get install bubblewrap')}")
    command = [bwrap, "--die-with-parent", "--new-session"]
    command += ["--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]
    if _is_root():  # the runner switches to another user id, which drops the two capabilities
        command += ["--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    else:
        command += ["--unshare-user", "--uid", "65534", "--gid", "65534"]
    command += ["--perms", "1777", "--size", str(SCRATCH), "--tmpfs", "/tmp", "--chdir", "/tmp"]
    # Not the whole prefix, which may be a home directory, but what Python needs from it.
    executable = os.path.realpath(sys.executable)
    prefixes = sorted({sys.prefix, sys.base_prefix, str(Path(executable).parents[1])})
    parts = [f"{prefix}/{part}" for prefix in prefixes for part in ("lib", "lib64", "pyvenv.cfg")]
    for path in [*SYSTEM, *parts, executable]:  # a folder precedes its subfolders
        command += _parents(path)
        command += ["--ro-bind-try", path, path]
    if not _within(sys.executable, SYSTEM) and sys.executable != executable:
        command += [*_parents(sys.executable), "--symlink", executable, sys.executable]
    command += ["--ro-bind", str(RUNNER), "/runner.py", "--proc", "/proc", "--dev", "/dev"]
    command += ["--remount-ro", "/dev", "--remount-ro", "/"]
    return [*command, "--", *python, "/runner.py"]


def _parents(path: str) -> list[str]:
    """Return options that create a path's parent folders: bubblewrap's own are not accessible to other users."""
    return [word for parent in reversed(Path(path).parents) for word in ("--dir", str(parent))]


def _within(path: str, folders: Sequence[str]) -> bool:
    return any(Path(path).is_relative_to(folder) for folder in folders)


def _is_root() -> bool:
    """Return whether this is the machine's own root, not one that a container maps to an ordinary user."""
    return os.geteuid() == 0 and Path("/proc/self/uid_map").read_text(encoding="utf-8").split()[:2] == ["0", "0"]


def _remedy(install: str) -> str:
    return f"{install}, or evaluation.sandbox=none, which runs the programs without protection"


def _run(program: str, sandbox: str, command: list[str], timeout: float) -> Outcome:
    token, sandboxed = secrets.token_hex(16), sandbox != "none"
    # A separate user id, so that the processes of two programs are not counted together.
    uid = 2**30 + secrets.randbelow(2**30) if sandboxed and _is_root() else None
    data = {"token": token, "uid": uid, "sandboxed": sandboxed, "timeout": timeout, "program": program}
    with (
        tempfile.TemporaryFile() as task,
        tempfile.TemporaryFile() as calls,
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
    ):
        task.write(json.dumps(data).encode())
        task.seek(0)
        if sandboxed:
            calls.write(call_filter())
            calls.seek(0)
            command = [command[0], "--seccomp", str(calls.fileno()), *command[1:]]
        with subprocess.Popen(
            command,
            stdin=task,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=ENVIRONMENT,
            cwd=folder,
            pass_fds=[calls.fileno()] if sandboxed else [],
            start_new_session=True,
        ) as process:
            try:
                return _watch(process, token, timeout)
            finally:
                # Killing bubblewrap ends everything in its PID namespace; without it, kill the process group.
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)


def _watch(process: subprocess.Popen[bytes], token: str, timeout: float) -> Outcome:
    """Read the report until its last line, the end of all its writers, or the deadline."""
    assert process.stderr is not None
    pipe = process.stderr.fileno()
    poll = select.poll()
    poll.register(pipe, select.POLLIN)
    report, started = b"", False
    deadline = time.monotonic() + START_LIMIT
    while (left := deadline - time.monotonic()) > 0 and poll.poll(left * 1000):
        chunk = os.read(pipe, REPORT_LIMIT)
        if not chunk:
            break
        report = (report + chunk)[:REPORT_LIMIT]
        lines = report.decode(errors="replace").split("\n")[:-1]  # complete lines
        if not started and f"{token} started" in lines:
            started, deadline = True, time.monotonic() + WALL_FACTOR * timeout
        if f"{token} passed" in lines:
            return Outcome("passed")
        for line in lines:
            if line.startswith(f"{token} failed "):
                return Outcome("failed", line.removeprefix(f"{token} failed "))
    if not started:
        late = time.monotonic() >= deadline
        words = report.decode(errors="replace").strip().split("\n")[-1]
        words = f"no start within {START_LIMIT:.0f} s" if late else words or f"exit status {process.wait()}"
        raise UserError(
            f"evaluation.sandbox: a program could not be started here: {words}: "
            f"{_remedy('let bubblewrap (0.6 or newer) make namespaces')}"
        )
    try:
        status = process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        return Outcome("timed_out", f"over {WALL_FACTOR * timeout:g} s on the clock")
    number = -status if status < 0 else status - 128  # bubblewrap turns a signal into 128 + its number
    if number == signal.SIGPROF:
        return Outcome("timed_out", f"over {timeout:g} s of CPU time")
    how = f"signal {number}" if number > 0 else f"exit status {status}"
    return Outcome("killed", f"{how} before its tests were through")
