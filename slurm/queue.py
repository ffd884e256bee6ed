"""Slurm's commands. Only sbatch, squeue, scontrol and scancel: accounting (sacct) is not needed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from experiments.errors import UserError
from slurm.manifest import Manifest, read_manifest, submissions


@dataclass(frozen=True)
class Task:
    """One task of an array that Slurm has not finished with."""

    job: str  # <array job>_<task>
    state: str  # PENDING, RUNNING, COMPLETING …
    reason: str  # why it is pending


def slurm(*command: str, text: str | None = None) -> str:
    """Standard output of a command; its refusal, in one line, as an error."""
    try:
        result = subprocess.run(command, input=text, capture_output=True, text=True, timeout=120)
    except FileNotFoundError:
        raise UserError(
            f"no {command[0]} on the path: submit on a node of the cluster, or run here without Slurm by "
            "`python -m experiments.reproduce`"
        ) from None
    except subprocess.TimeoutExpired:
        raise UserError(
            f"{command[0]} gave no answer in 2 minutes: the controller is down or busy, try again"
        ) from None
    if result.returncode:
        said = "; ".join(line.removeprefix(f"{command[0]}: error: ") for line in result.stderr.strip().splitlines())
        raise UserError(f"{command[0]}: {said or f'exit status {result.returncode}'}")
    return result.stdout


def queued(runs_dir: Path) -> dict[str, list[Task]]:
    """The runs of this folder that wait or run, and in which tasks, one that runs first.

    A job names its manifest as its comment. A run whose evaluation is submitted separately has two tasks.
    """
    ours = f"{submissions(runs_dir)}/"
    read = cache(read_manifest)
    tasks: dict[str, list[Task]] = {}
    listing = slurm("squeue", "--noheader", "--array", "--user", str(os.getuid()), "--format=%F|%K|%T|%r|%k")
    for line in listing.splitlines():
        job, index, state, reason, comment = line.split("|", 4)
        if not comment.startswith(ours) or not Path(comment).is_file():
            continue
        manifest: Manifest = read(Path(comment))
        for name in manifest.tasks[int(index)]:
            task = Task(f"{job}_{index}", state, reason)
            others = tasks.setdefault(name, [])
            others.insert(0 if state == "RUNNING" else len(others), task)
    return tasks


def queued_if_known(runs_dir: Path) -> dict[str, list[Task]]:
    """As `queued`; where Slurm does not answer, nothing, and a note that says so."""
    try:
        return queued(runs_dir)
    except UserError as error:
        print(f"note: without the queue ({error})", file=sys.stderr)
        return {}


def max_array_size() -> int:
    """The most tasks an array may have; 1001 is Slurm's own default."""
    match = re.search(r"^MaxArraySize\s*=\s*(\d+)", slurm("scontrol", "show", "config"), re.MULTILINE)
    return int(match[1]) if match else 1001


def cancel(tasks: Iterable[str]) -> None:
    chosen = sorted(set(tasks))
    for start in range(0, len(chosen), 200):  # a command line has an end
        slurm("scancel", *chosen[start : start + 200])
