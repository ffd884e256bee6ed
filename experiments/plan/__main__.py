"""From configs to runs: compose, sweep, freeze.

    python -m experiments.plan model=llama3_8b method=diablo task=commonsense_170k --dry-run
    python -m experiments.plan method=lora,diablo seed=0,1,2 recipe.learning_rate=1e-3
    python -m experiments.plan experiment=quickstart

Arguments are Hydra overrides, and a comma makes a sweep. An experiment file is a list of such lines, its grids; its
runs are their union. `plan` writes `config.yaml` into every run's directory, resolved and frozen; `--dry-run` prints
the runs and their exact parameter counts instead, from the architecture alone.
"""

from __future__ import annotations

import argparse
import sys

from experiments.errors import run_command
from experiments.plan.choose import follow, stages_of
from experiments.plan.compose import write_runs
from experiments.plan.selection import add_options, read_options, select


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", help="experiment=…, model=…, method=…, key=value, key=a,b,c")
    parser.add_argument("--dry-run", action="store_true", help="print runs, parameters and tokens; write no runs")

    add_options(parser)
    options = parser.parse_intermixed_args(arguments)
    selection = read_options(options)
    selected = select(options.overrides, selection)
    found = stages_of(selected.configs, selected.by)
    configs, following = found.known(), found.following()
    if options.dry_run:
        from experiments.plan.counting import print_counts  # torch and peft, which --help should not wait for
        from experiments.plan.overview import print_memory

        print_counts(configs, following, selection.speed)
        print_memory(configs)
    else:
        for run in write_runs(configs):
            print(run.root)
    if following:
        print(follow(len(following)), file=sys.stderr)
    if selected.left_out:
        print("left out by the budget:", *selected.left_out, sep="\n  ", file=sys.stderr)


if __name__ == "__main__":
    run_command(main)
