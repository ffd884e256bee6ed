"""Converts a GGUF file into the cache folder before the runs that use it, and prints the folder.

python -m experiments.gguf model=smollm2_135m
python -m experiments.gguf model=llama3_2_1b model.path=Llama-3.2-1B-Q8_0.gguf
"""

from __future__ import annotations

import argparse
from pathlib import Path

from experiments.errors import UserError, run_command
from experiments.models.gguf import converted
from experiments.plan.compose import plan


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.gguf", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "overrides", nargs="+", metavar="key=value", help="model=… and, for a file, model.path=FILE.gguf"
    )
    overrides = parser.parse_intermixed_args(arguments).overrides
    (config,) = plan(["method=base", "task=arith", *overrides])
    gguf = config.model.gguf
    if gguf is None:
        raise UserError(f"model {config.model.name} has no GGUF file here: give model.path=FILE.gguf")
    print(converted(gguf, Path(config.runtime.cache_dir)))


if __name__ == "__main__":
    run_command(main)
