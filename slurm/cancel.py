"""Cancels waiting and running jobs of a folder of runs. Results are kept; submitting again resumes.

python -m slurm.cancel experiment=quickstart
python -m slurm.cancel runs_dir=/data/runs tiny-lora-r6-arith-s0-989cd5bc runs/tiny-full-arith-s1-35be0a9d
"""

from __future__ import annotations

import argparse
from pathlib import Path

from experiments.errors import UserError, run_command
from slurm.queue import cancel, queued
from slurm.status import folder_and_experiment, statuses


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m slurm.cancel", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("which", nargs="*", help="experiment=NAME, runs_dir=FOLDER, runs by name or directory")
    parser.add_argument("--all", action="store_true", help="every run of the folder")
    options = parser.parse_intermixed_args(arguments)
    named = [Path(which) for which in options.which if "=" not in which]
    runs_dir, experiment = folder_and_experiment([which for which in options.which if "=" in which])
    if not named and experiment is None and not options.all:
        raise UserError("nothing selected to cancel: give experiment=NAME, names of runs, or --all")
    if named and runs_dir == Path("runs").resolve() and len(named[0].parts) > 1:
        runs_dir = named[0].resolve().parent
    waiting = queued(runs_dir)
    names = {path.name for path in named} or {state.name for state in statuses(runs_dir, experiment)}
    tasks = {task.job for name in names for task in waiting.get(name, [])}
    cancel(tasks)
    beside = [name for name in waiting if name not in names and tasks & {task.job for task in waiting[name]}]
    packed = f"; packed with them: {', '.join(beside)}" if beside else ""
    print(f"cancelled {len(tasks)} tasks{packed}")


if __name__ == "__main__":
    run_command(main)
