"""Slurm's commands: only sbatch, squeue, scontrol and scancel; accounting (sacct) is not needed."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from experiments.errors import UserError, shortened
from experiments.runs.commands import answer
from slurm.manifest import Manifest, read_manifest, submissions

PATIENCE = 30.0  # seconds for squeue, which retries a busy controller itself


@dataclass(frozen=True)
class Task:
    """One unfinished task of an array."""

    job: str  # <array job>_<task>
    state: str  # PENDING, RUNNING, COMPLETING …
    reason: str  # why it is pending


def slurm(*command: str, seconds: float = 120) -> str:
    """Return the standard output of a command; a failure becomes a one-line UserError."""
    try:
        result = answer(command, seconds)
    except FileNotFoundError:
        raise UserError(
            f"no {command[0]} on the path: submit on a node of the cluster, or run here without Slurm by "
            "`python -m experiments.reproduce`"
        ) from None
    if result is None:
        raise UserError(f"{command[0]} gave no answer in {seconds:g} s: the controller is down or busy, try again")
    if result.returncode:
        said = [line.removeprefix(f"{command[0]}: ") for line in result.stderr.splitlines()]
        fatal = [line.removeprefix("fatal: ") for line in said if line.startswith("fatal: ")]  # the reason, if any
        lines = fatal or [line.removeprefix("error: ") for line in said]
        raise UserError(f"{command[0]}: {shortened(lines) or f'exit status {result.returncode}'}")
    return result.stdout


def queued(runs_dir: Path) -> dict[str, list[Task]]:
    """Return the waiting and running runs of this folder with their tasks, a running task first.

    A job's comment is the path of its manifest. A run whose evaluation is submitted separately has two tasks.
    """
    ours = f"{submissions(runs_dir)}/"
    read = cache(read_manifest)
    tasks: dict[str, list[Task]] = {}
    command = ("squeue", "--noheader", "--array", "--user", str(os.getuid()), "--format=%F|%K|%T|%r|%k")
    for line in slurm(*command, seconds=PATIENCE).splitlines():
        job, index, state, reason, comment = [*line.split("|", 4), *[""] * 4][:5]
        if not job.isdigit() or not state.isupper():
            raise UserError(f"squeue: cannot read its line {line[:80]!r}")
        if not comment.startswith(ours) or not Path(comment).is_file():
            continue
        manifest: Manifest = read(Path(comment))
        if not index.isdigit() or int(index) >= len(manifest.tasks):
            raise UserError(f"squeue: cannot read its line {line[:80]!r}: no task of {comment}")
        for name in manifest.tasks[int(index)]:
            task = Task(f"{job}_{index}", state, reason)
            others = tasks.setdefault(name, [])
            others.insert(0 if state == "RUNNING" else len(others), task)
    return tasks


def queued_if_known(runs_dir: Path) -> dict[str, list[Task]] | None:
    """As `queued`, but return None and print a note if Slurm gives no readable answer."""
    try:
        return queued(runs_dir)
    except UserError as error:
        print(f"note: without the queue ({error})", file=sys.stderr)
        return None


def max_array_size() -> int:
    """Return the most tasks an array may have; 1001 is Slurm's own default."""
    match = re.search(r"^MaxArraySize\s*=\s*(\d+)", slurm("scontrol", "show", "config"), re.MULTILINE)
    return int(match[1]) if match else 1001


def cancel(tasks: Iterable[str]) -> None:
    chosen = sorted(set(tasks))
    for start in range(0, len(chosen), 200):  # the length of a command line is limited
        slurm("scancel", *chosen[start : start + 200])
