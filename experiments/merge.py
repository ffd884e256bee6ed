# pyright: reportUnknownMemberType=false
"""Merges what a run trained into a standalone model.

    python -m experiments.merge runs/<run_id> --out model
    python -m experiments.merge runs/<run_id> --out model --to-grid

`model` is a folder for transformers. For a quantised base it contains the dequantised weights plus the update, in the
model's dtype; with --to-grid it is again a quantised base, for `diablo.quantize.load_quantized`. The rounding error of
the update, in bf16 or on the grid, is printed. README.md is the model card, with the run's scores. The adapter itself
does not change.
"""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path
from typing import Any

from experiments.errors import UserError, run_command
from experiments.runs.config_files import read_config
from experiments.runs.records import RunPaths, trained_record


def merge(run: RunPaths, out: Path, to_grid: bool) -> None:
    """Write the merged model of a trained run into the new folder `out`."""
    from experiments.models.load import load_checked_base
    from experiments.reproduce.command import commands
    from experiments.train import methods
    from experiments.train.card import write_card

    if out.exists():
        raise UserError(f"{out} already exists: give --out another folder")
    config, trained = read_config(run), trained_record(run)
    if to_grid and config.quantization is None:
        raise UserError(f"--to-grid: the base of {run.root.name} is not quantised: leave it out")
    if to_grid and config.method.trains != "adapter":
        raise UserError(f"--to-grid: {run.root.name} trained no adapter: leave it out")
    base, tokenizer = load_checked_base(config, run, trained)
    aside = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        if to_grid:
            _write_on_grid(methods.load(config.method, base, run.adapter, merge=False), aside, run)
        else:
            methods.load(config.method, base, run.adapter, merge=True).save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        write_card(run, aside, commands(config))
        for path in aside.rglob("*.safetensors"):
            path.chmod(0o644)  # written 0600 whatever the umask
        os.rename(aside, out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _write_on_grid(model: Any, folder: Path, run: RunPaths) -> None:
    from diablo.quantize import merge_to_grid, save_quantized

    try:
        merged = merge_to_grid(model)
    except (ValueError, AttributeError) as error:  # a prompt method has no layers to merge
        raise UserError(f"--to-grid: {run.root.name} cannot be merged: {error}") from None
    save_quantized(merged.model, folder, {"merged": run.root.name, "lost": merged.errors})


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.merge", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="a trained run directory")
    parser.add_argument("--out", type=Path, required=True, help="folder to create")
    parser.add_argument("--to-grid", action="store_true", help="round back to the grid of a quantised base")
    options = parser.parse_intermixed_args(arguments)
    merge(RunPaths(options.run.resolve()), options.out, options.to_grid)
    print(options.out)


if __name__ == "__main__":
    run_command(main)
