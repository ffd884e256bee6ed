"""Writes small copies of run directories, for committing: only what tables, figures and notebooks read.

    python -m analysis.export runs --out results/quickstart/runs
    python -m analysis.export runs --out results/evidence/runs --no-norms      # for many runs

Keeps config.yaml (without the paths in `runtime`), train.json or diverged.json, held_out.json, learning_rate.json,
every score.json and a thinned metrics.jsonl and spectra.jsonl. Omits adapters, plans, samples and checkpoints.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments import ROOT
from experiments.errors import UserError, run_command
from experiments.runs.config_files import read_config, write_config
from experiments.runs.records import RunPaths, read_json, read_lines, write_atomically
from experiments.settings import with_values

RESULTS = ROOT / "results"
PATHS = ("runs_dir", "data_root", "cache_dir")  # of `runtime`: paths on a machine that readers do not have
FIRST = 10  # steps kept at the start, where the gradients of LoRA's A grow from zero
STEPS = 60  # steps kept in total
DIGITS = 5  # significant digits of a number in metrics.jsonl


def export_run(source: Path, out: Path, norms: bool = True) -> Path:
    """Write the small copy of one run into the folder `out` and return its directory.

    `norms`: keep the gradient norm of every trained tensor, which takes most of a copy's size.
    """
    old, new = RunPaths(source), RunPaths(out / source.name)
    if out.resolve().is_relative_to(source.resolve()) or new.root.resolve() == source.resolve():
        raise UserError(f"--out {out}: the copy of {source} would be written into the run itself: give another folder")
    config = read_config(old)
    write_config(new, with_values(config, {f"runtime.{key}": None for key in PATHS}).mapping)
    records = (old.train_record, old.held_out, old.diverged, old.learning_rate)
    for path in (*records, *sorted(source.glob("eval/*/*/score.json"))):
        if path.is_file():
            record = read_json(path) if norms or path != old.train_record else read_json(path) | {"tensors": []}
            write_atomically(new.root / path.relative_to(source), _compact(record))
    if old.spectra.is_file():
        write_atomically(new.spectra, "".join(_compact(line) for line in thinned(list(read_lines(old.spectra)), 0, 8)))
    if old.metrics.is_file():
        lines = [line if norms else line | {"gradient_norms": []} for line in read_lines(old.metrics)]
        write_atomically(new.metrics, "".join(_compact(_rounded(line)) for line in thinned(lines)))
    return new.root


def thinned(lines: Sequence[dict[str, Any]], first: int = FIRST, steps: int = STEPS) -> list[dict[str, Any]]:
    """Return the `first` lines and evenly spaced ones of the rest, including the last: `steps` in total."""
    if len(lines) <= steps:
        return list(lines)
    rest = len(lines) - 1 - first
    return [*lines[:first], *(lines[first + rest * k // (steps - first - 1)] for k in range(steps - first))]


def committed_runs(experiment: str) -> list[Path]:
    """Return the committed run directories of an experiment; `DIABLO_RESULTS` can name another folder of results.

    UserError if there are none.
    """
    from analysis.load import find_runs

    folder = Path(os.environ.get("DIABLO_RESULTS") or RESULTS) / experiment / "runs"
    try:
        return find_runs([folder])
    except UserError:
        raise UserError(
            f"{folder}: no committed runs: `python -m experiments.reproduce {experiment}`, then "
            f"`python -m analysis.export runs --out {folder}`"
        ) from None


def _rounded(line: dict[str, Any]) -> dict[str, Any]:
    norms = [float(f"{norm:.{DIGITS}g}") for norm in line["gradient_norms"]]
    numbers = {key: float(f"{value:.{DIGITS}g}") for key, value in line.items() if isinstance(value, float)}
    return line | numbers | {"gradient_norms": norms}


def _compact(record: dict[str, Any]) -> str:
    """Return a record as one line; items have 11 digits, so that their mean is exact, and integers have no `.0`."""
    if "items" in record:
        items = [int(item) if float(item).is_integer() else float(f"{item:.11g}") for item in record["items"]]
        record = record | {"items": items}
    return json.dumps(record, separators=(",", ":")) + "\n"


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m analysis.export", description="Write small copies of runs.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUNS", help="run directories, or folders of them")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the small copies into")
    parser.add_argument("--no-norms", action="store_true", help="leave out the gradient norm of each tensor")
    options = parser.parse_args(arguments)

    from analysis.load import find_runs

    copies = [export_run(run, options.out, not options.no_norms) for run in find_runs(options.runs)]
    size = sum(path.stat().st_size for copy in copies for path in copy.rglob("*") if path.is_file())
    print(f"{len(copies)} run{'s' * (len(copies) != 1)}, {size / 2**10:,.0f} KiB in {options.out}")


if __name__ == "__main__":
    run_command(main)
