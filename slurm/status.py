"""Shows the state of the runs of a folder, from the run directories and Slurm's queue.

    python -m slurm.status                          # every run ever submitted from runs/
    python -m slurm.status experiment=quickstart runs_dir=/data/runs --watch 10

States: planned, queued, running, preempted, failed, finished. Needs no accounting. If Slurm gives no answer, a run with
a fresh heartbeat counts as running, and one whose state only the queue could tell is unknown.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.errors import UserError, nearest, run_command
from experiments.rules import Value
from experiments.runs.records import RunPaths
from experiments.runs.sizes import counted
from slurm.manifest import all_manifests, is_finished
from slurm.queue import Task, queued_if_known

STALE = 600  # seconds without a heartbeat after which the table says so
FRESH = 30  # seconds since its last heartbeat within which a run counts as running, whatever the queue says
NEVER_STARTED = "never started, and not in the queue: cancelled, or a job it depended on failed; submit again"
STATES = ("running", "queued", "preempted", "failed", "unknown", "planned", "finished")


@dataclass(frozen=True)
class State:
    """One line of the table."""

    name: str
    state: str
    preempted: int
    job: str
    detail: str
    apart: str = ""  # the settings that distinguish it from runs whose names differ only in the hash


def statuses(runs_dir: Path, experiment: str | None = None) -> list[State]:
    """Return the state of all runs submitted from a folder, in the order of planning."""
    about: dict[str, dict[str, Any]] = {}
    logs: dict[str, Path] = {}  # run -> log of its last task
    experiments: set[str] = set()
    for path, manifest in all_manifests(runs_dir):
        experiments.add(manifest.experiment)
        if experiment is not None and manifest.experiment != experiment:
            continue
        about |= manifest.runs
        for log in path.parent.glob("logs/*.log"):
            index = log.stem.rpartition("_")[2]
            logs |= dict.fromkeys(manifest.tasks[int(index)], log) if index.isdigit() else {}
    if not experiments:
        raise UserError(f"nothing was submitted from {runs_dir}: give runs_dir=FOLDER, or submit first")
    if not about:
        raise UserError(f"{runs_dir}: no submission of {experiment}: {nearest(str(experiment), experiments)}")
    waiting = queued_if_known(runs_dir)
    return [
        run_state(
            RunPaths(runs_dir / name),
            entry,
            next(iter((waiting or {}).get(name, [])), None),
            logs.get(name),
            queue_known=waiting is not None,
        )
        for name, entry in about.items()
    ]


def run_state(
    run: RunPaths, about: dict[str, Any], task: Task | None, log: Path | None, queue_known: bool = True
) -> State:
    """Return the state of one run. The queue overrides the files, which a killed process cannot update."""
    attempts = read_attempts(run)
    preempted = sum(attempt.get("how") == "preempted" for attempt in attempts)
    job = task.job if task is not None else ""

    def state(word: str, detail: str = "") -> State:
        detail = detail.replace(f"{run.root}: ", "").replace(f"{run.root}/", "")  # the line begins with the run's name
        return State(run.root.name, word, preempted, job, detail, about.get("apart", ""))

    if not run.root.is_dir():
        return state("failed", "the run directory is gone")
    if task is not None and task.state in ("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED"):
        return state("running", progress(run))
    if all(is_finished(run, stage, about) for stage in ("train", "eval")):
        return state("finished")
    if task is not None:
        return state("preempted" if preempted else "queued", f"waits: {task.reason}")
    last = attempts[-1] if attempts else {}
    if attempts and last.get("how") is None and _lives(run):
        where = "not in this cluster's queue" if queue_known else "seen by its heartbeat"
        return state("running", f"{progress(run)}; {where}")
    if last.get("how") == "failed" or last.get("error"):
        return state("failed", last.get("error") or "no message")
    if not queue_known:
        return state("unknown", f"{_last_seen(last)}; whether it is queued or running is unknown")
    if not attempts:
        said = last_line(log) if log is not None else ""
        return state("failed", said) if said else state("planned", NEVER_STARTED)
    if last.get("how") == "preempted":
        return state("preempted", "not in the queue: submit again to resume")
    if last.get("how") is None:
        return state(
            "failed", f"ended without a message on {last.get('host')}: killed, out of memory, or the node died"
        )
    return state("planned", f"{last.get('stage')} is finished, the rest is not in the queue")


def _last_seen(attempt: dict[str, Any]) -> str:
    """Describe the last attempt, if it did not fail."""
    if not attempt:
        return "not started"
    if attempt.get("how") is None:
        return f"{attempt.get('stage')} on {attempt.get('host')} without a fresh heartbeat"
    return f"{attempt.get('stage')} {attempt['how']}"


def _lives(run: RunPaths) -> bool:
    """Return whether its heartbeat is fresh by its node's or the disk's clock, either of which may be wrong."""
    try:
        beat, written = json.loads(run.heartbeat.read_text(encoding="utf-8")), run.heartbeat.stat().st_mtime
    except (OSError, ValueError):
        return False
    return any(abs(time.time() - clock) < FRESH for clock in (beat.get("time", 0), written))


def read_attempts(run: RunPaths) -> list[dict[str, Any]]:
    """Return the records of all attempts at the run; empty before the first."""
    try:
        attempts: Value = json.loads((run.root / "attempts.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return attempts if isinstance(attempts, list) else []


def was_started(run: RunPaths) -> bool:
    return any(path.exists() for path in (run.root / "attempts.json", run.train_record, run.checkpoints, run.metrics))


def failed_before(run: RunPaths) -> bool:
    """Return whether the last attempt failed, was given up or ended without a message. For runs not in the queue."""
    attempts = read_attempts(run)
    return bool(attempts) and (attempts[-1].get("how") in ("failed", None) or bool(attempts[-1].get("error")))


def progress(run: RunPaths) -> str:
    """Return e.g. `train step 120/400, 5,300 tokens/s, 4 min left`, from the heartbeat."""
    try:
        beat, written = json.loads(run.heartbeat.read_text(encoding="utf-8")), run.heartbeat.stat().st_mtime
    except (OSError, ValueError):
        return "starting"
    if beat.get("step") is None:
        return f"{beat.get('stage')} starting"
    parts = [f"{beat.get('stage')} step {beat['step']}/{beat.get('steps')}"]
    if beat.get("tokens_per_second"):
        parts.append(f"{beat['tokens_per_second']:,.0f} tokens/s")
    if beat.get("eta_seconds") is not None:
        parts.append(f"{duration(beat['eta_seconds'])} left, until {_clock(beat['eta_seconds'])}")
    # By the clock of the run's node or of the disk, either of which may be wrong.
    silent = time.time() - max(beat.get("time", 0), written)
    if silent > STALE:
        parts.append(f"silent for {duration(silent)}")
    return ", ".join(parts)


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _clock(seconds: float) -> str:
    return time.strftime("%a %H:%M", time.localtime(time.time() + seconds))


def last_line(log: Path) -> str:
    """Return the last non-empty line of a log; of a line rewritten by a progress bar, its last state."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 8192))
        lines = [line.rstrip(b"\r").rsplit(b"\r")[-1].strip() for line in file.read().split(b"\n")]
    return next((line.decode(errors="replace") for line in reversed(lines) if line), "")


def table(states: list[State]) -> str:
    """Return the counts, then a line per run."""
    counts = Counter(state.state for state in states)
    lines = [
        f"{counted(len(states), 'run')}: " + ", ".join(f"{counts[word]} {word}" for word in STATES if counts[word])
    ]
    width = max(len(state.name) for state in states)
    room = max(40, shutil.get_terminal_size((160, 24)).columns - width - 40)
    for state in states:
        times = f"preempted ×{state.preempted}" if state.preempted else ""
        detail = f"[{state.apart}] {state.detail}" if state.apart else state.detail
        detail = detail if len(detail) <= room else detail[: room - 1] + "…"
        lines.append(f"{state.name:<{width}}  {state.state:<9}  {state.job:<9}  {times:<12}  {detail}".rstrip())
    return "\n".join(lines)


def following(runs_dir: Path, experiment: str | None = None) -> int:
    """Return the number of second-stage runs without a name when their experiments were last submitted."""
    newest = {manifest.experiment: manifest.following for _, manifest in all_manifests(runs_dir)}
    return sum(count for name, count in newest.items() if experiment in (None, name))


def folder_and_experiment(arguments: list[str]) -> tuple[Path, str | None]:
    """Parse `runs_dir=…` (or `runtime.runs_dir=…`; default `runs`) and `experiment=…`."""
    runs_dir, experiment = Path("runs"), None
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key in ("runs_dir", "runtime.runs_dir"):
            runs_dir = Path(value)
        elif key == "experiment":
            experiment = value
        else:
            raise UserError(f"cannot read {argument!r}: give experiment=NAME, runs_dir=FOLDER or both")
    return runs_dir.resolve(), experiment


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m slurm.status", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("which", nargs="*", help="experiment=NAME, runs_dir=FOLDER")
    parser.add_argument("--watch", type=float, metavar="SECONDS", help="refresh after this many seconds")
    options = parser.parse_intermixed_args(arguments)
    runs_dir, experiment = folder_and_experiment(options.which)
    while True:
        text = table(statuses(runs_dir, experiment))
        if more := following(runs_dir, experiment):
            from experiments.plan.choose import follow  # needs hydra, whose absence slurm.job must be able to report

            text += f"\n{follow(more)}"
        if options.watch is None:
            print(text)
            return
        print(f"\x1b[2J\x1b[H{text}", flush=True)  # clear the screen
        time.sleep(options.watch)


if __name__ == "__main__":
    run_command(main)
