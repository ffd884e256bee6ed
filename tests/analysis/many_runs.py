"""Measures the report of thousands of runs, with invented numbers, without a cache and again from it.

    python -m tests.analysis.many_runs                             # prints seconds and memory of 5,000 runs
    python -m tests.analysis.many_runs --out results/reports/reports.json   # also writes them

500 settings of ten seeds, on five pairs of model and task: LoRA and DiaBlo in 50 sizes, 128 answers and 40 steps each.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from experiments.errors import run_command
from experiments.runs.environment import environment
from experiments.runs.records import write_atomically
from tests.analysis.analysis_runs import write_run

PAIRS = (("tiny", "arith"), ("tiny", "gsm8k"), ("llama3_8b", "gsm8k"), ("llama3_8b", "math"), ("llama2_7b", "gsm8k"))
METHODS, SIZES = ("lora", "diablo"), 50
ITEMS, STEPS = 128, 40


def write_runs(root: Path, seeds: int) -> int:
    """Write the runs and return how many they are."""
    grid = list(itertools.product(PAIRS, METHODS, range(1, SIZES + 1), range(seeds)))
    for (model, task), method, size, seed in tqdm(grid, desc="writing runs", unit="run", leave=False):
        drawn = np.random.default_rng([size, seed, len(model), len(task), len(method)])
        items = drawn.binomial(1, 0.3 + size / 200, ITEMS).tolist()
        named: dict[str, Any] = {"model": model, "task": task, "size": size, "seed": seed}
        write_run(root, method, **named, parameters=1000 * size, items=items, steps=STEPS)
    return len(grid)


def measure(runs: Path, scratch: Path) -> dict[str, float]:
    """Return seconds, processor seconds and the largest process's peak memory of a report in a process of its own."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    command = [sys.executable, "-m", "analysis.report", str(runs), "--out", str(scratch / "report")]
    cache = {**os.environ, "DIABLO_CACHE": str(scratch / "cache")}
    subprocess.run(command, env=cache, stdout=subprocess.DEVNULL, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "seconds": time.perf_counter() - started,
        "processor_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "peak_bytes": after.ru_maxrss * 1024,
    }


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.analysis.many_runs", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=10, help="runs of each of the 500 settings; default: 10")
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        runs = write_runs(Path(folder) / "runs", options.seeds)
        found = {kind: measure(Path(folder) / "runs", Path(folder)) for kind in ("without a cache", "from the cache")}
    for kind, figures in found.items():
        print(
            f"{runs:,} runs, {kind}: {figures['seconds']:.1f} s, {figures['processor_seconds']:.1f} s of processor "
            f"time, {figures['peak_bytes'] / 1e6:,.0f} MB"
        )
    if options.out is not None:
        about = {"environment": environment("cpu"), "runs": runs, "settings": len(PAIRS) * len(METHODS) * SIZES}
        write_atomically(options.out, json.dumps({**about, "reports": found}, indent=1) + "\n")


if __name__ == "__main__":
    run_command(main)
