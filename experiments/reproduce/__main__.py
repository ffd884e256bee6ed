"""Plans, trains, scores and reports an experiment.

    python -m experiments.reproduce quickstart
    python -m experiments.reproduce quickstart seed=0,1,2,3,4 --out report/five_seeds
    python -m experiments.reproduce quickstart --workers 4      # four runs at a time, in four processes
    python -m experiments.reproduce quickstart --minutes 30     # starts no run that would take longer
    python -m experiments.reproduce commonsense --paper         # only the paper's own cells
    python -m experiments.reproduce commonsense --dry-run       # prints the runs and the memory they need

If the experiment chooses learning rates (experiments/plan/choose.py), that is done first, on rows kept out of training.
Finished runs are skipped and interrupted ones resumed, so run the same command again to continue an experiment.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from experiments.errors import UserError, run_command
from experiments.plan.selection import add_options, read_options
from experiments.reproduce.run import reproduce


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.reproduce",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "experiment", nargs="?", help="name of a file in configs/experiment without .yaml, or the path of another"
    )
    parser.add_argument("overrides", nargs="*", help="key=value or key=a,b,c, applied to every grid")
    parser.add_argument("--out", type=Path, help="folder of the report; default: report/<experiment>")
    parser.add_argument(
        "--workers",
        type=int,
        default=1,
        help="runs at a time, each in a process with OMP_NUM_THREADS threads, by default its share of the processors; "
        "default: 1, in this process",
    )
    parser.add_argument("--report-only", action="store_true", help="report the finished runs, run nothing")
    parser.add_argument("--minutes", type=float, help="start no run that would not end within this time")
    parser.add_argument(
        "--results", type=Path, metavar="DIR", help="exported runs (analysis.export) that count as finished"
    )
    parser.add_argument("--dry-run", action="store_true", help="print runs, parameters, tokens and memory; run nothing")
    add_options(parser)
    options = parser.parse_intermixed_args(arguments)
    if options.experiment is None:
        raise UserError("give the name of an experiment, e.g. quickstart: they are the files of configs/experiment")
    selection = read_options(options)
    if options.dry_run:
        from experiments.plan.overview import dry_run

        dry_run([f"experiment={options.experiment}", *options.overrides], selection)
        return
    reproduce(
        options.experiment,
        options.overrides,
        options.out,
        options.workers,
        options.report_only,
        options.minutes,
        options.results,
        selection,
    )


if __name__ == "__main__":
    run_command(main)
