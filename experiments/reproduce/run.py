"""Runs all stages of an experiment, in this process or with workers, and its report.

If the experiment chooses learning rates (experiments/plan/choose.py), that is done first, on rows kept out of training.
Finished runs are skipped and interrupted ones resumed.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path

from experiments.config import RunConfig
from experiments.errors import UserError
from experiments.models.shapes import resolve_device
from experiments.plan.choose import Stages, follow, to_csv, write_choices
from experiments.plan.compose import run_paths, write_runs
from experiments.plan.experiment_files import read_experiment
from experiments.plan.fit import check_workers
from experiments.plan.selection import EVERYTHING, Selection
from experiments.reproduce.jobs import Job, Jobs, finished_outcome, forget_unscorable, outcome, take_in, train_and_score
from experiments.reproduce.workers import Stopped, Worker, threads_of_each
from experiments.runs import preemption
from experiments.runs.environment import device_memory
from experiments.runs.records import write_atomically
from experiments.runs.sizes import counted


def reproduce(
    name: str,
    overrides: list[str],
    out: Path | None = None,
    workers: int = 1,
    report_only: bool = False,
    minutes: float | None = None,
    results: Path | None = None,
    selection: Selection = EVERYTHING,
) -> Path:
    """Run every stage of `configs/experiment/<name>.yaml` and return the path of the report's page.

    Args:
        report_only: report the finished runs, run nothing.
        minutes: start no run that would take longer than the time left, and stop cleanly.
        results: a folder of exported runs (analysis/export.py) that count as finished.
        selection: which of the experiment's runs to do.
    """
    if workers < 1:
        raise UserError(f"--workers {workers}: give one or more")
    if minutes is not None and minutes <= 0:
        raise UserError(f"--minutes {minutes:g}: give more than 0")
    started = time.perf_counter()
    deadline = None if minutes is None else time.time() + 60 * minutes
    jobs = Jobs([f"experiment={name}", *overrides], deadline, selection)
    if jobs.unpaid:
        print(*jobs.unpaid, sep="\n", flush=True)
    out = out or Path("report") / Path(name).stem
    if results is not None and (taken := take_in(jobs.configs, results)):
        print(f"{counted(taken, 'run')} taken from {results}", flush=True)
    if not report_only:
        execute(_title(name), jobs, workers)
    found = jobs.stages()
    page = report(name, found, out, [*overrides, *selection.flags], measure=not report_only)
    print(f"report: {page.resolve()}  ({time.perf_counter() - started:.0f} s in all)")
    missing: list[str] = []
    if jobs.failed:
        total = len({config.run_id for config in [*found.rate_search, *found.final]})
        missing.append(f"{len(jobs.failed)} of {counted(total, 'run')} failed")
    if jobs.left_out:
        print(f"{counted(len(jobs.left_out), 'run')} did not fit into the time: the same command trains the rest")
    elif found.undecided:
        others = f"; and {counted(len(found.undecided) - 1, 'other setting')}" if len(found.undecided) > 1 else ""
        missing.append(
            f"{counted(len(found.following()), 'run')} without a learning rate ({found.undecided[0]}{others})"
        )
    if missing:
        raise UserError(f"{' and '.join(missing)} and are missing from the report")
    return page


def report(name: str, found: Stages, out: Path, overrides: list[str], measure: bool) -> Path:
    """Write the report of an experiment's runs into `out`. `measure`: measure step times here, if possible.

    The page lists `overrides`; its title and notes are those of the experiment file.
    """
    # Imported here because eval and analysis depend on experiments.
    from analysis.report import write_report
    from experiments.speed.timing import can_measure, measure_step_times

    experiment = read_experiment(name)
    notes: list[str] = []
    runs = [run for run in map(run_paths, found.final) if run.config.is_file()]
    if not any(run.train_record.is_file() for run in runs):
        raise UserError(f"no run of {name} is finished: nothing to report")
    given = [override for override in overrides if not override.startswith("runtime.")]
    if given:
        notes.append(f"These settings were given for all runs, whatever title and notes say: {' '.join(given)}")
    if found.rate_search:
        write_choices(found)
        write_atomically(out / "learning_rates.csv", to_csv(found))
        by = experiment["learning_rate_by"].replace("_", " ")
        notes.append(
            f"Learning rates were chosen by the {by} on rows kept out of training, with one seed; the tables say "
            "which. learning_rates.csv has every one that was tried."
        )
    reference = experiment.get("reference")
    labels = {config.method.label for config in found.final if run_paths(config).train_record.is_file()}
    if reference is not None and reference not in labels:
        notes.append(f"Nothing is compared: no run of {reference}, the reference, is finished.")
        reference = None
    step_times = None
    if measure and can_measure(found.final):
        step_times = measure_step_times(found.final, runs[0].root.parent / "step_times")
    return write_report(
        [run.root for run in runs],
        out,
        step_times,
        experiment["title"],
        [*experiment.get("notes", []), *notes],
        reference=reference,
        tried=[run.root for run in map(run_paths, found.rate_search) if run.config.is_file()],
        wandb=found.final[0].runtime.wandb,
    )


def execute(title: str, jobs: Jobs, workers: int) -> None:
    """Do the jobs, one by one here or `workers` at a time in processes, and print a line about each.

    UserError if all failed. `jobs` has those that failed or did not fit into the time.
    """
    from eval.run import check_data

    for config in {config.task.name: config for config in jobs.configs}.values():
        check_data(config)  # reports missing data before the first run is trained
    known, total = jobs.known(), jobs.total()
    if not known:
        raise UserError(f"{title}: no runs")
    found = jobs.stages()
    by = f", {len(found.rate_search)} of them to choose learning rates by" if found.rate_search else ""
    print(f"{title}: {counted(len(found.known()), 'run')} in {known[0].run.root.parent}{by}", flush=True)
    if found.following():
        print(follow(len(found.following())), flush=True)
    numbers, told = itertools.count(1), set(jobs.stages().chosen())

    def work(worker: Worker | None) -> None:
        if worker is not None:
            worker.start()  # before timing, so that start-up does not count in the first run's seconds
        while (job := jobs.take()) is not None:
            line = f"[{next(numbers):>{len(str(total))}}/{total}] {job.config.run_id}"
            before, error = time.perf_counter(), None
            try:
                result = _do(job, line, worker)
            except Stopped as stop:
                print(f"{line}  {stop}", file=sys.stderr, flush=True)
                jobs.stopped(job)
                return
            except UserError as failure:
                error = f"{job.config.run_id}: {failure}"
                print(f"{line}  failed: {failure}", file=sys.stderr, flush=True)
            except BaseException:
                jobs.stopped(job)  # else workers that wait for it would wait forever
                raise
            else:
                print(f"{line}  {result}  ({time.perf_counter() - before:.1f} s)", flush=True)
            jobs.done(job, time.perf_counter() - before, error)
            for choice in jobs.stages().chosen():
                if choice not in told:
                    told.add(choice)
                    print(choice, flush=True)

    if workers == 1:
        work(None)
    else:
        device = str(resolve_device(jobs.configs[0].runtime.device))
        check_workers([job.config for job in known if not job.is_finished()], workers, device_memory(device))
        make_bases(jobs.configs)
        _work_in_processes(work, workers, jobs.deadline)
    if jobs.failed and jobs.failed.keys() >= {job.key for job in jobs.known()}:
        raise UserError(f"no run of {title} finished; the first: {next(iter(jobs.failed.values()))}")


def _do(job: Job, title: str, worker: Worker | None) -> str:
    done_elsewhere = finished_outcome(job)
    if done_elsewhere is not None:
        return done_elsewhere
    forget_unscorable(job)
    (run,) = write_runs([job.config])
    if worker is None:
        return outcome(*train_and_score(run, title, job.score, progress=True))
    return worker.do(run, job.score)


def _work_in_processes(work: Callable[[Worker], None], count: int, deadline: float | None) -> None:
    """Run `work` in a thread for each of `count` workers, which are stopped at the deadline or by a signal."""
    threads = threads_of_each(count)
    workers = [Worker(threads) for _ in range(count)]
    pool = ThreadPoolExecutor(count)
    with preemption.listening():
        try:
            preemption.raise_immediately(True)
            futures = [pool.submit(work, worker) for worker in workers]
            left = None if deadline is None else max(0.0, deadline - time.time())
            wait(futures, left, return_when=FIRST_EXCEPTION)
        finally:
            preemption.raise_immediately(False)
            for worker in workers:
                worker.stop()
            pool.shutdown()
            for worker in workers:
                worker.wait()
    for future in futures:
        future.result()


def make_bases(configs: list[RunConfig]) -> None:
    """Make generated base models in advance, before several processes would each make them."""
    from experiments.models.tiny import make_base

    for config in configs:
        if config.model.pretraining is not None:
            make_base(config.model, Path(config.runtime.cache_dir))


def _title(name: str) -> str:
    return read_experiment(name)["title"]
