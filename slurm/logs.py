"""Shows the log of a run: the output of its stages in all attempts, or, before its first stage, of its job.

python -m slurm.logs runs/tiny-lora-r6-arith-s0-989cd5bc --follow
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from experiments.errors import UserError, run_command
from slurm.manifest import all_manifests


def log_of(run: Path) -> Path:
    """Return the most informative log file of a run."""
    run = run.resolve()
    own = run / "slurm.log"
    if own.is_file():
        return own
    logs = [
        log
        for path, manifest in all_manifests(run.parent)
        for index, names in enumerate(manifest.tasks)
        if run.name in names
        for log in path.parent.glob(f"logs/*_{index}.log")
    ]
    if not logs:
        raise UserError(f"{run}: no log: it was not submitted from this folder, or still waits")
    return logs[-1]


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m slurm.logs", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="a run directory")
    parser.add_argument("--follow", action="store_true", help="keep showing new lines")
    options = parser.parse_args(arguments)
    log = log_of(options.run)
    if options.follow:
        os.execvp("tail", ["tail", "-n", "+1", "-F", str(log)])
    sys.stdout.write(log.read_text(errors="replace", encoding="utf-8"))


if __name__ == "__main__":
    run_command(main)
