"""Plan, train, score and report an experiment.

    python -m experiments.reproduce quickstart
    python -m experiments.reproduce quickstart seed=0,1,2,3,4 --out report/five_seeds
    python -m experiments.reproduce quickstart --workers 4      # four runs at a time, each in processes of its own

Where the experiment chooses learning rates (experiments/choose.py), that is done first, on rows kept out of training.
Finished runs are skipped and interrupted ones resumed, so the same command is also how an experiment is continued.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from experiments import preemption
from experiments.choose import Stages, stages, to_csv, write_choices
from experiments.errors import UserError, run_command
from experiments.evaluations import evaluation_paths
from experiments.plan import read_experiment, run_paths, write_runs
from experiments.records import EvalRecord, RunPaths, TrainRecord, read_config, write_atomically

Config = dict[str, Any]
Outcome = TypeVar("Outcome")


def reproduce(
    name: str, overrides: list[str], out: Path | None = None, workers: int = 1, report_only: bool = False
) -> Path:
    """Run every stage of `configs/experiment/<name>.yaml` and return the path of the report's page.

    `report_only`: report what is finished, run nothing.
    """
    if workers < 1:
        raise UserError(f"--workers {workers}: give one or more")
    started = time.perf_counter()
    arguments = [f"experiment={name}", *overrides]
    found = stages(arguments)
    out = out or Path("report") / Path(name).stem
    failures: list[str] = []
    if not report_only:
        execute = Runner(name, workers, [*found.first, *found.final])
        if found.first:
            print(f"{_title(name)}: {len(found.first)} runs to choose learning rates by", flush=True)
            failures += execute(found.first, score=False)
            found = stages(arguments)
            print("\n".join(found.chosen()), flush=True)
        if found.final:
            print(f"{_title(name)}: {len(found.final)} runs in {run_paths(found.final[0]).root.parent}", flush=True)
            failures += execute(found.final)
    page = report(name, found, out, overrides, measure=not report_only)
    print(f"report: {page.resolve()}  ({time.perf_counter() - started:.0f} s in all)")
    missing = (
        [f"{len(found.to_come)} runs without a learning rate ({'; '.join(found.undecided)})"] if found.undecided else []
    )
    if failures:
        total = len({config["run_id"] for config in [*found.first, *found.final]})
        missing.append(f"{len(failures)} of {total} runs failed")
    if missing:
        raise UserError(f"{' and '.join(missing)} and are missing from the report")
    return page


def report(name: str, found: Stages, out: Path, overrides: list[str], measure: bool) -> Path:
    """Write the report of an experiment's runs into `out`. `measure`: its step times are measured here, if they can be.

    `overrides` are named on the page, whose title and notes are the experiment file's.
    """
    # Late and only here: experiments is what eval and analysis stand on.
    from analysis.report import write_report
    from experiments.timing import can_measure, measure_step_times

    experiment, notes = read_experiment(name), []
    runs = [run for run in map(run_paths, found.final) if run.config.is_file()]
    if not any(run.train_record.is_file() for run in runs):
        raise UserError(f"no run of {name} is finished: there is nothing to report")
    given = [override for override in overrides if not override.startswith("runtime.")]
    if given:
        notes.append(f"These settings were given for all runs, whatever title and notes say: {' '.join(given)}")
    if found.first:
        write_choices(found)
        write_atomically(out / "learning_rates.csv", to_csv(found))
        by = experiment["learning_rate_by"].replace("_", " ")
        notes.append(
            f"Learning rates were chosen by the {by} on rows kept out of training, with one seed; the tables say "
            "which. learning_rates.csv has every one that was tried."
        )
    step_times = None
    if measure and can_measure(found.final):
        step_times = measure_step_times(found.final, runs[0].root.parent / "step_times")
    return write_report(
        [run.root for run in runs],
        out,
        step_times,
        experiment["title"],
        [*experiment.get("notes", []), *notes],
        reference=experiment.get("reference"),
        tried=[run.root for run in map(run_paths, found.first) if run.config.is_file()],
        wandb=found.final[0]["runtime"]["wandb"],
    )


class Runner:
    """Trains and scores runs, one after the other here, or several at a time in processes of their own."""

    def __init__(self, name: str, workers: int, configs: list[Config]) -> None:
        from eval.run import check_data

        self.name = name
        for config in {config["task"]["name"]: config for config in configs}.values():
            check_data(config)  # what is missing is told before the first run is trained
        self.workers, self.processes = workers, Processes() if workers > 1 else None
        if self.processes:
            make_bases(configs)

    def __call__(self, configs: list[Config], score: bool = True) -> list[str]:
        """Do the runs and tell in one line each how it went. Returns what failed; UserError if all did."""
        runs = write_runs(configs)

        def execute(number: int, run: RunPaths) -> str | None:
            title = f"[{number:>{len(str(len(runs)))}}/{len(runs)}] {run.root.name}"
            before = time.perf_counter()
            try:
                result = self._execute(run, title, score)
            except UserError as error:
                print(f"{title}  failed: {error}", file=sys.stderr, flush=True)
                return f"{run.root.name}: {error}"
            print(f"{title}  {result}  ({time.perf_counter() - before:.1f} s)", flush=True)
            return None

        numbers = range(1, len(runs) + 1)
        if self.processes:
            outcomes = self.processes.map(self.workers, execute, numbers, runs)
        else:
            outcomes = [execute(number, run) for number, run in zip(numbers, runs, strict=True)]
        failures = [failure for failure in outcomes if failure]
        if len(failures) == len(runs):
            raise UserError(f"no run of {self.name} finished; the first: {failures[0]}")
        return failures

    def _execute(self, run: RunPaths, title: str, score: bool) -> str:
        """Train and, if asked, score one run; what came out."""
        if self.processes and not run.train_record.is_file():
            self.processes.run("experiments.train", run)
        if self.processes and score and not _is_scored(run):
            self.processes.run("eval.run", run)
        return outcome(*train_and_score(run, title, score, progress=not self.processes))


def train_and_score(
    run: RunPaths, title: str = "", score: bool = True, progress: bool = False, allow_identity: bool = False
) -> tuple[TrainRecord, list[EvalRecord]]:
    """Train and, if asked, score one run in this process."""
    from eval.run import evaluate
    from experiments.train import train

    trained = train(run, progress=title)
    return trained, evaluate(run, progress=progress, allow_identity=allow_identity) if score else []


def outcome(trained: TrainRecord, scores: list[EvalRecord]) -> str:
    """What came out, in one line: the scores, or without any what the held-out rows say."""
    if scores:
        return ", ".join(_short(score) for score in scores)
    return ", ".join(f"{key} {value}" for key, value in _rounded(trained.held_out or {}))


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
        if process.returncode == -signal.SIGKILL:
            raise UserError(
                f"{run.root}: {module} was killed, as Linux does when memory runs out: give fewer --workers, or plan "
                f"smaller runs"
            )
        if process.returncode:
            lines = errors.strip().splitlines() or [f"{module} ended with status {process.returncode}"]
            raise UserError(lines[-1].removeprefix("error: "))

    def map(self, workers: int, function: Callable[..., Outcome], *arguments: Iterable[Any]) -> list[Outcome]:
        """As the built-in, in threads. When this process is asked to stop, the commands are asked to and waited for."""
        pool = ThreadPoolExecutor(workers)
        self._stopped = False
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


def _title(name: str) -> str:
    return read_experiment(name)["title"]


def _is_scored(run: RunPaths) -> bool:
    return all(paths.score.is_file() for paths in evaluation_paths(run, read_config(run)))


def _rounded(held_out: Config) -> list[tuple[str, str]]:
    return [(key.replace("_", " "), f"{value:.4g}") for key, value in held_out.items() if value is not None]


def _short(score: EvalRecord) -> str:
    metric = "" if score.metric == "accuracy" else f"{score.metric} "
    return f"{score.benchmark} {metric}{score.shown(score.accuracy)}"


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.reproduce",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("experiment", help="a file of configs/experiment without its ending, or the path of another")
    parser.add_argument("overrides", nargs="*", help="key=value or key=a,b,c, applied to every grid")
    parser.add_argument("--out", type=Path, help="folder of the report; default: report/<experiment>")
    parser.add_argument(
        "--workers",
        type=int,
        default=1,
        help="runs at a time, each with processes of its own and OMP_NUM_THREADS threads; default: 1, here",
    )
    parser.add_argument("--report-only", action="store_true", help="report the runs that are finished, run nothing")
    options = parser.parse_intermixed_args(arguments)
    reproduce(options.experiment, options.overrides, options.out, options.workers, options.report_only)


if __name__ == "__main__":
    run_command(main)
