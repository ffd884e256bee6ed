"""Writes the model card of trained runs, README.md in their adapter folder, with their scores.

python -m experiments.card runs/<run_id>
hf upload <user>/<name> runs/<run_id>/adapter      # publishes the folder; nothing here uploads anything
"""

from __future__ import annotations

import argparse
from pathlib import Path

from experiments.errors import UserError, run_command
from experiments.runs.records import RunPaths, trained_record


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.card", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="run", help="a trained run directory")
    options = parser.parse_intermixed_args(arguments)
    from experiments.reproduce.command import commands
    from experiments.runs.config_files import read_config
    from experiments.train.card import write_card

    for folder in options.runs:
        run = RunPaths(folder.resolve())
        config = read_config(run)
        trained_record(run)
        path = write_card(run, commands=commands(config))
        if path is None:
            raise UserError(f"{folder}: trained nothing: there is no adapter to describe")
        print(path)


if __name__ == "__main__":
    run_command(main)
