"""Plans runs: writes a resolved, frozen `config.yaml` into every run's directory.

    python -m experiments.plan model=llama3_8b method=diablo task=commonsense_170k --dry-run
    python -m experiments.plan method=lora,diablo seed=0,1,2 recipe.learning_rate=1e-3
    python -m experiments.plan experiment=quickstart

Arguments are Hydra overrides; commas make a sweep. An experiment file is a list of such lines, its grids; its runs are
their union. `--dry-run` only prints the runs, their exact parameter counts and their memory, computed from the
architecture. `--help-config SECTION` explains the settings of a section (model, method, quantization, task,
recipe, spectra, protocol, evaluation, runtime), with their values for the choices that are given.
"""

from __future__ import annotations

import argparse
import sys

from experiments.errors import UserError, run_command
from experiments.plan.choose import follow, stages_of
from experiments.plan.compose import plan, write_runs
from experiments.plan.explain import explain
from experiments.plan.selection import add_options, read_options, select


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", help="experiment=…, model=…, method=…, key=value, key=a,b,c")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument(
        "--dry-run", action="store_true", help="print runs, parameters, tokens and memory; write no runs"
    )
    instead.add_argument(
        "--help-config", metavar="SECTION", help="print a section's settings, their values and what they may be"
    )
    add_options(parser)
    options = parser.parse_intermixed_args(arguments)
    if options.help_config is not None:
        config, *more = plan(options.overrides)
        if more:
            raise UserError(
                f"--help-config shows the values of one run, and these are {len(more) + 1}: leave out commas"
            )
        print(*explain(options.help_config, config.mapping), sep="\n")
        return
    selection = read_options(options)
    if options.dry_run:
        from experiments.plan.overview import dry_run  # imports torch and peft, which --help must not wait for

        dry_run(options.overrides, selection)
        return
    selected = select(options.overrides, selection)
    found = stages_of(selected.configs, selected.by)
    for run in write_runs(found.known()):
        print(run.root)
    if following := found.following():
        print(follow(len(following)), file=sys.stderr)
    for line in selected.lines():
        print(line, file=sys.stderr)


if __name__ == "__main__":
    run_command(main)
