"""Runs one program inside the sandbox. A standalone script: it imports nothing from the project.

It reads the task as JSON from standard input and reports to the initial standard error: a line `<token> started` before
the program, a line `<token> passed` or `<token> failed <error>` after it. For the program, standard input, output and
error are /dev/null.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import math
import os
import resource
import signal
import sys

GIB, MIB = 2**30, 2**20
MESSAGE_LENGTH = 200  # characters
THREADS = 16  # from Linux 5.14 on, a user namespace counts its own
LIMITS = {
    resource.RLIMIT_AS: 2 * GIB,
    resource.RLIMIT_FSIZE: 16 * MIB,
    resource.RLIMIT_NOFILE: 64,
    resource.RLIMIT_CORE: 0,
}
# What openai/human-eval execution.py and juzhengz/LoRI execute.py disable: there, a program that uses it fails.
TAKEN = {
    "os": "kill system putenv remove removedirs rmdir fchdir setuid fork forkpty killpg rename renames truncate "
    "replace unlink fchmod fchown chmod chown chroot lchflags lchmod lchown getcwd chdir",
    "shutil": "rmtree move chown",
    "subprocess": "Popen",
    "builtins": "exit quit help",
}
# Imported there in advance, and modules that cannot be imported there.
IMPORTED = ("multiprocessing", "numpy", "pandas")
NOT_INSTALLED = ("ipdb", "joblib", "resource", "psutil", "tkinter")


def main() -> None:
    write, leave, getpid = os.write, os._exit, os.getpid  # saved before a program can replace them
    task = json.loads(sys.stdin.buffer.read())
    report, runner = os.dup(2), getpid()
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1):
        os.dup2(null, stream)
    _limit(task["timeout"], task["sandboxed"])
    if task["uid"] is not None:
        os.setgroups([])
        os.setresgid(task["uid"], task["uid"], task["uid"])
        os.setresuid(task["uid"], task["uid"], task["uid"])  # leaving root drops every capability
    os.dup2(null, 2)  # last, so that a traceback of the lines above reaches the reader of the report
    write(report, f"{task['token']} started\n".encode())
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends the process; no `except` can catch it
    signal.setitimer(signal.ITIMER_PROF, task["timeout"])
    _take_away(task["program"])
    try:
        # Empty globals as in openai/human-eval execution.py: `__name__` is not "__main__".
        exec(compile(task["program"], "<program>", "exec", dont_inherit=True), {})
        result = "passed"
    except BaseException as error:
        result = f"failed {_describe(error)}"
    if getpid() == runner:  # a child forked by the program also gets here
        write(report, f"{task['token']} {result}\n".encode(errors="replace"))
    leave(0)  # at once, without exit handlers or waiting for threads


class _Unreadable(io.StringIO):
    """Standard input on which reading is an error, as there."""

    def read(self, *arguments: object) -> str:
        raise OSError

    readline = readlines = read  # type: ignore[assignment]


def _take_away(program: str) -> None:
    for module in IMPORTED:
        if module in program:
            with contextlib.suppress(Exception):
                importlib.import_module(module)
    for module, names in TAKEN.items():
        for name in names.split():
            setattr(importlib.import_module(module), name, None)
    sys.modules.update(dict.fromkeys(NOT_INSTALLED))  # type: ignore[arg-type]
    sys.stdin = _Unreadable()


def _limit(timeout: float, sandboxed: bool) -> None:
    """Set limits that the program cannot raise; lower limits of the machine stay. CPU seconds, as a backstop."""
    limits = {**LIMITS, resource.RLIMIT_CPU: math.ceil(timeout) + 2}
    if sandboxed:  # outside, all of the user's processes would count, and their number could fail a correct program
        limits[resource.RLIMIT_NPROC] = THREADS
    for kind, value in limits.items():
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def _describe(error: BaseException) -> str:
    """Return `NameError: name 'x' is not defined` on one bounded line; the error's own code may run here, and fail."""
    try:
        text = f"{type(error).__name__}: {str(error)[:MESSAGE_LENGTH]}"
        return " ".join(text.split())[:MESSAGE_LENGTH].removesuffix(":")
    except BaseException:
        return "an error that cannot be shown"


if __name__ == "__main__":
    main()
