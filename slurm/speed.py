"""Measures the overhead of this machinery: seconds to plan, submit and list many runs, and to start and checkpoint one.

    python -m slurm.speed --runs 1000

Submits held jobs of tiny runs to the local Slurm and cancels them; without Slurm it skips that and says so. Trains a
tiny model on the CPU for a moment; run it on an idle machine.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from experiments.errors import UserError, run_command
from experiments.plan.compose import plan, write_runs
from experiments.runs.records import RunPaths, read_lines
from slurm.cluster import Cluster
from slurm.queue import cancel, queued, queued_if_known
from slurm.status import statuses, table
from slurm.submit import Options, submit

TINY = ("model=tiny", "task=arith", "runtime.device=cpu", "model.pretraining.steps=4", "task.data.train=64")
MODULES = (
    "train.trainer",
    "train.methods",
    "models.load",
    "data.tokens",
    "data.rows",
    "runs.environment",
)  # of `experiments`
EVERY, STEPS = 10, 200  # steps between checkpoints, and in total, for timing a checkpoint


def measure_sweep(runs: int, runs_dir: Path) -> Iterator[tuple[str, float]]:
    """Yield seconds for a sweep of this many runs, without and with Slurm."""
    arguments = [*TINY, "method=lora", f"seed=range(0,{runs})", f"runtime.runs_dir={runs_dir}"]
    seconds, configs = timed(lambda: plan(arguments))
    yield f"plan {runs:,} runs", seconds
    yield "write their directories", timed(lambda: write_runs(configs))[0]
    shutil.rmtree(runs_dir)
    try:
        queued(runs_dir)
    except UserError as error:
        print(f"without submission and status: {error}")
        return
    held = Cluster(gpus=0, cpus=1, time="1", sbatch={"hold": True})
    try:
        yield "submit them: plan, write and sbatch", timed(lambda: submit(arguments, held, Options()))[0]
        yield "submit again, all queued", timed(lambda: submit(arguments, held, Options()))[0]
        yield "status, all queued", timed(lambda: table(statuses(runs_dir)))[0]
    finally:
        cancel(task.job.partition("_")[0] for tasks in queued(runs_dir).values() for task in tasks)
    while queued_if_known(runs_dir):
        time.sleep(0.1)
    for run in runs_dir.glob("*/config.yaml"):
        attempts = [{"how": "preempted", "stage": "train", "host": "n1"}, {"how": "failed", "error": "no data"}]
        (run.parent / "attempts.json").write_text(json.dumps(attempts), encoding="utf-8")
    yield "status, all failed", timed(lambda: table(statuses(runs_dir)))[0]


def measure_start(folder: Path) -> Iterator[tuple[str, float]]:
    """Yield seconds of a tiny run's start, and of its checkpoints."""
    run = _train(folder, "method=full", f"recipe.max_steps={STEPS}", "recipe.epochs=100", seed=0)
    steps = list(read_lines(run.metrics))[1:]
    # A step's checkpoint is written after its line, so it counts in the next step's time.
    plain = statistics.median(line["seconds"] for line in steps if line["step"] % EVERY != 1)
    after = statistics.median(line["seconds"] for line in steps if line["step"] % EVERY == 1)
    yield "checkpoint of the tiny model, all of it trained", after - plain
    (config,) = plan(["seed=0"])
    every = config.runtime.checkpoint_every
    yield f"a step of it; {every} of them and a checkpoint: {(after - plain) / (every * plain):.2%} more", plain
    _train(folder, "method=diablo", "recipe.max_steps=1", seed=0)  # fills the caches for later runs
    modules = "; ".join(f"import experiments.{name}" for name in MODULES)
    command = "from experiments.errors import prepare_imports; prepare_imports()"
    command += f"; {modules}; import os, peft"
    command += "; os._exit(0)"  # skips the end of the process, which takes time as well
    imports: list[float] = []
    first: list[float] = []
    whole: list[float] = []
    for seed in range(1, 4):
        imports.append(timed(lambda: _python("-c", command))[0])
        started = time.time()
        run = _train(folder, "method=diablo", "recipe.max_steps=1", seed=seed)
        first.append(run.metrics.stat().st_mtime - started)
        whole.append(json.loads(run.attempts.read_text(encoding="utf-8"))[-1]["ended"] - started)
    yield "start of Python, torch, transformers and peft, best of 3", min(imports)
    yield "start of a run to the end of its first step, all of that included, best of 3", min(first)
    yield "a run of one step, best of 3", min(whole)


def timed(action: Callable[[], Any]) -> tuple[float, Any]:
    """Return the seconds and the result; standard output is suppressed."""
    with contextlib.redirect_stdout(io.StringIO()):
        started = time.perf_counter()
        result = action()
        return time.perf_counter() - started, result


def _train(folder: Path, *arguments: str, seed: int) -> RunPaths:
    places = (f"runtime.runs_dir={folder / 'runs'}", f"runtime.cache_dir={folder / 'cache'}")
    (run,) = write_runs(plan([*TINY, *arguments, f"seed={seed}", *places, f"runtime.checkpoint_every={EVERY}"]))
    _python("-m", "experiments.train", str(run.root))
    return run


def _python(*arguments: str) -> None:
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m slurm.speed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=1000, metavar="N", help="runs of the sweep (default: 1000)")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        parts = (measure_sweep(options.runs, Path(folder) / "sweep"), measure_start(Path(folder)))
        for what, seconds in (line for part in parts for line in part):
            print(f"{seconds:8.3f} s  {what}", flush=True)
    print(f"{os.cpu_count()} processors, load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    run_command(main)
