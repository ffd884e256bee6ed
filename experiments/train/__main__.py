"""Trains one run.

    python -m experiments.train runs/<run_id>
    torchrun --nproc_per_node 8 -m experiments.train runs/<run_id>      # one process per GPU

The run directory's config determines everything. A finished run is left alone; an interrupted one resumes from its last
checkpoint, on the CPU bit-equal to an uninterrupted run. SIGTERM and SIGUSR1 make it checkpoint after the current step.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from experiments.errors import Preempted, run_command
from experiments.runs import preemption
from experiments.runs.records import RunPaths
from experiments.runs.sizes import counted


def main(arguments: list[str]) -> None:
    preemption.listen()
    parser = argparse.ArgumentParser(prog="python -m experiments.train", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, help="a run directory made by `python -m experiments.plan`")
    run = RunPaths(parser.parse_intermixed_args(arguments).run.resolve())
    from experiments.train.processes import leave
    from experiments.train.run import train

    try:
        record = train(run, progress=run.root.name)
    except Preempted:
        leave()
        raise
    leave()
    if os.environ.get("RANK", "0") == "0":
        loss = "" if record.final_loss is None else f", loss {record.final_loss:.4f}"
        print(f"{run.root}: {counted(record.steps, 'step')}{loss}, {record.trainable_parameters:,} parameters trained")


if __name__ == "__main__":
    run_command(main)
