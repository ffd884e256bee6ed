"""Plan, train, score and report an experiment.

    python -m experiments.reproduce quickstart
    python -m experiments.reproduce quickstart seed=0,1,2,3,4 --out report/five_seeds
    python -m experiments.reproduce quickstart --workers 4      # four runs at a time, each in processes of its own

Finished runs are skipped and interrupted ones resumed, so the same command is also how an experiment is continued.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from experiments import preemption
from experiments.errors import UserError, run_command
from experiments.plan import plan, read_experiment, write_runs
from experiments.records import RunPaths

Config = dict[str, Any]
Outcome = TypeVar("Outcome")


def reproduce(name: str, overrides: list[str], out: Path | None = None, workers: int = 1) -> Path:
    """Run every stage of `configs/experiment/<name>.yaml` and return the path of the report's page."""
    if workers < 1:
        raise UserError(f"--workers {workers}: give one or more")
    started = time.perf_counter()
    experiment = read_experiment(name)
    configs = plan([f"experiment={name}", *overrides])
    runs = write_runs(configs)
    print(f"{experiment['title']}: {len(runs)} runs in {runs[0].root.parent}", flush=True)

    # These three come late and only here: experiments is what eval and analysis stand on.
    from analysis.report import write_report
    from eval.run import check_data, evaluate
    from experiments.timing import measure_step_times
    from experiments.train import train

    for config in {config["task"]["name"]: config for config in configs}.values():
        check_data(config)  # what is missing is told before the first run is trained

    processes = Processes() if workers > 1 else None

    def execute(number: int, run: RunPaths) -> str | None:
        """Train and score a run, tell in one line how it went, and return what failed."""
        title = f"[{number:>{len(str(len(runs)))}}/{len(runs)}] {run.root.name}"
        before = time.perf_counter()
        try:
            if processes:
                processes.run("experiments.train", run)
                processes.run("eval.run", run)
            else:
                train(run, progress=title)
            scores = evaluate(run, progress=not processes)
        except UserError as error:
            print(f"{title}  failed: {error}", file=sys.stderr, flush=True)
            return f"{run.root.name}: {error}"
        results = ", ".join(_short(score) for score in scores)
        print(f"{title}  {results}  ({time.perf_counter() - before:.1f} s)", flush=True)
        return None

    if processes:
        make_bases(configs)
        outcomes = processes.map(workers, execute, range(1, len(runs) + 1), runs)
    else:
        outcomes = [execute(number, run) for number, run in enumerate(runs, start=1)]
    failures = [failure for failure in outcomes if failure]
    if len(failures) == len(runs):
        raise UserError(f"no run of {name} finished; the first: {failures[0]}")
    # A label stands for one method only within a task: another task adapts other modules.
    one_task = len({config["task"]["name"] for config in configs}) == 1
    step_times = measure_step_times(configs, runs[0].root.parent / "step_times") if one_task else None
    page = write_report(
        [run.root for run in runs],
        out or Path("report") / name,
        step_times,
        experiment["title"],
        experiment.get("notes", []),
    )
    print(f"report: {page.resolve()}  ({time.perf_counter() - started:.0f} s in all)")
    if failures:
        raise UserError(f"{len(failures)} of {len(runs)} runs failed and are missing from the report")
    return page


class Processes:
    """The stages of several runs at a time, each by its own command, so that one that dies takes no other along."""

    def __init__(self) -> None:
        self._running: set[subprocess.Popen[str]] = set()
        self._stopped = False

    def run(self, module: str, run: RunPaths) -> None:
        """Run a stage's command. UserError with the last line that it wrote if it fails."""
        if self._stopped:
            raise UserError("not begun")
        command = [sys.executable, "-m", module, str(run.root)]
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        self._running.add(process)
        _, errors = process.communicate()
        self._running.discard(process)
        if process.returncode:
            lines = errors.strip().splitlines() or [f"{module} ended with status {process.returncode}"]
            raise UserError(lines[-1].removeprefix("error: "))

    def map(self, workers: int, function: Callable[..., Outcome], *arguments: Iterable[Any]) -> list[Outcome]:
        """As the built-in, in threads. When this process is asked to stop, the commands are asked to and waited for."""
        pool = ThreadPoolExecutor(workers)
        with preemption.listening():
            try:
                preemption.raise_at_once(True)
                return list(pool.map(function, *arguments))
            finally:
                preemption.raise_at_once(False)
                self._stopped = True
                pool.shutdown(wait=False, cancel_futures=True)
                for process in list(self._running):
                    process.terminate()
                pool.shutdown()


def make_bases(configs: list[Config]) -> None:
    """Make the base models that are made here once, before several processes would each make them."""
    from experiments.tiny import make_base

    for config in configs:
        if config["model"]["pretraining"] is not None:
            make_base(config["model"], Path(config["runtime"]["cache_dir"]))


def _short(score: Any) -> str:
    metric = "" if score.metric == "accuracy" else f"{score.metric} "
    return f"{score.benchmark} {metric}{score.accuracy:.1%}"


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.reproduce",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("experiment", help="a file of configs/experiment, without its ending")
    parser.add_argument("overrides", nargs="*", help="key=value or key=a,b,c, applied to every grid")
    parser.add_argument("--out", type=Path, help="folder of the report; default: report/<experiment>")
    parser.add_argument(
        "--workers",
        type=int,
        default=1,
        help="runs at a time, each with processes of its own and OMP_NUM_THREADS threads; default: 1, here",
    )
    options = parser.parse_intermixed_args(arguments)
    reproduce(options.experiment, options.overrides, options.out, options.workers)


if __name__ == "__main__":
    run_command(main)
