"""The jobs of an experiment as an ordered list that always knows the next job that can start.

A job trains a run, and scores it unless the run only serves to choose a learning rate. Jobs are in the order of the
experiment's grids: the runs that choose a setting's learning rate, then its seeds. Seeds that wait for a choice are
skipped until it is made, so that several workers stay busy.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.config import RunConfig
from experiments.plan.choose import Stages, stages_of
from experiments.plan.compose import run_paths
from experiments.plan.selection import EVERYTHING, Selection, select
from experiments.runs.config_files import group_hash, read_config, write_config
from experiments.runs.evaluations import evaluation_paths
from experiments.runs.follows import check_score, check_training
from experiments.runs.records import EvalRecord, RunPaths, TrainRecord, read_record


@dataclass(frozen=True)
class Job:
    """One run to train and, if `score`, to evaluate."""

    config: RunConfig
    score: bool

    @property
    def key(self) -> tuple[str, bool]:
        return self.config.run_id, self.score

    @property
    def run(self) -> RunPaths:
        return run_paths(self.config)

    def is_finished(self) -> bool:
        scored = not self.score or all(paths.score.is_file() for paths in evaluation_paths(self.run, self.config))
        return self.run.train_record.is_file() and scored


class Jobs:
    """The jobs of an experiment. Thread-safe; every job is handed out once.

    Args:
        arguments: the arguments of `plan`.
        deadline: `time.time()` after which nothing may run: a job that would take longer, judged by the longest
            finished one of its kind, is not started.
        selection: which jobs to do; `unpaid` has lines about what a budget leaves out.
    """

    def __init__(
        self, arguments: Sequence[str], deadline: float | None = None, selection: Selection = EVERYTHING
    ) -> None:
        selected = select(arguments, selection)
        self.configs, self.by, self.deadline = selected.configs, selected.by, deadline
        self.unpaid = selected.lines()
        self.failed: dict[tuple[str, bool], str] = {}
        self.left_out: dict[tuple[str, bool], float] = {}  # -> its estimated seconds
        self._place = {group_hash(config.mapping): number for number, config in reversed(list(enumerate(self.configs)))}
        self._begun: set[tuple[str, bool]] = set()
        self._done: set[tuple[str, bool]] = set()
        self._seconds: dict[tuple[str, bool], float] = {}  # of finished jobs
        self._changed = threading.Condition()

    def stages(self) -> Stages:
        """Return what is known so far, from the records of the runs."""
        return stages_of(self.configs, self.by)

    def known(self) -> list[Job]:
        """Return all jobs whose settings are known, in order."""
        found = self.stages()
        jobs = [Job(config, False) for config in found.rate_search] + [Job(config, True) for config in found.final]
        return sorted(jobs, key=lambda job: (self._place[group_hash(job.config.mapping)], job.score))

    def total(self) -> int:
        """Return the number of all jobs, including those that wait for a choice."""
        found = self.stages()
        return len(found.rate_search) + len(found.final) + len(found.to_come)

    def take(self) -> Job | None:
        """Return the next job, waiting for jobs in progress if necessary; None if there is none left to start."""
        with self._changed:
            while True:
                running = self._begun - self._done
                busy = {run_id for run_id, _ in running}
                waiting = False
                for job in self.known():
                    if job.key in self._begun or job.key in self.left_out:
                        continue
                    if job.config.run_id in busy:
                        waiting = True
                    elif self._fits(job):
                        self._begun.add(job.key)
                        return job
                if not running or not (waiting or self.stages().undecided):
                    return None
                self._changed.wait()

    def done(self, job: Job, seconds: float, error: str | None = None) -> None:
        """Report the end of a taken job."""
        with self._changed:
            self._done.add(job.key)
            if error is not None:
                self.failed[job.key] = error
            else:
                self._seconds[job.key] = seconds
            self._changed.notify_all()

    def times(self) -> list[tuple[tuple[str, bool], float]]:
        """Return the seconds of every finished job, in the order of their ends."""
        return list(self._seconds.items())

    def stopped(self, job: Job) -> None:
        """Report that a taken job will be continued another time."""
        with self._changed:
            self._done.add(job.key)
            self.left_out[job.key] = 0.0
            self._changed.notify_all()

    def _fits(self, job: Job) -> bool:
        if self.deadline is None or job.is_finished():
            return True
        alike = [seconds for (_, score), seconds in self._seconds.items() if score == job.score]
        estimate = max(alike or self._seconds.values(), default=0.0)
        if time.time() + estimate <= self.deadline:
            return True
        self.left_out[job.key] = estimate
        return False


def train_and_score(
    run: RunPaths, title: str = "", score: bool = True, progress: bool = False, allow_identity: bool = False
) -> tuple[TrainRecord, list[EvalRecord]]:
    """Train one run in this process and, if `score`, score it."""
    from eval.run import evaluate
    from experiments.train.run import train

    trained = train(run, progress=title)
    return trained, evaluate(run, progress=progress, allow_identity=allow_identity) if score else []


def outcome(trained: TrainRecord, scores: Sequence[EvalRecord]) -> str:
    """Return the outcome in one line: the scores, or without any the held-out results."""
    if scores:
        return ", ".join(_short(score) for score in scores)
    rounded = ((key, value) for key, value in (trained.held_out or {}).items() if value is not None)
    return ", ".join(f"{key.replace('_', ' ')} {value:.4g}" for key, value in rounded)


def finished_outcome(job: Job) -> str | None:
    """Return the outcome of a finished job whose adapter is not local, e.g. trained elsewhere; else None."""
    if job.run.adapter.is_dir() or not job.is_finished():
        return None
    trained = read_record(job.run.train_record, TrainRecord)
    scores: list[EvalRecord] = []
    check_training(job.run, job.config, trained)
    for paths in evaluation_paths(job.run, job.config) if job.score else []:
        scores.append(read_record(paths.score, EvalRecord))
        check_score(paths, scores[-1])
    return outcome(trained, scores)


def take_in(configs: Sequence[RunConfig], folder: Path) -> int:
    """Copy exported runs (analysis/export.py) among `configs` to where they are still missing. Returns their number.

    A run trained elsewhere that must be scored here lacks its adapter: it is not copied, but trained again.
    """
    taken = 0
    for config in configs:
        there, here = RunPaths(folder / config.run_id), run_paths(config)
        if here.root.exists() or not (there.train_record.is_file() or there.diverged.is_file()):
            continue
        read_config(there)  # an error unless it is the run that its name says
        aside = here.root.with_name(f".{here.root.name}.taken-in")
        shutil.rmtree(aside, ignore_errors=True)
        shutil.copytree(there.root, aside)
        write_config(RunPaths(aside), config.mapping)  # the exported config has no paths
        aside.rename(here.root)
        taken += 1
    return taken


def forget_unscorable(job: Job) -> None:
    """Delete a run that was trained elsewhere but not scored, because scoring needs its adapter."""
    run = job.run
    if job.score and run.train_record.is_file() and not run.adapter.is_dir() and not job.is_finished():
        shutil.rmtree(run.root)


def _short(score: EvalRecord) -> str:
    metric = "" if score.metric == "accuracy" else f"{score.metric} "
    return f"{score.benchmark} {metric}{score.shown(score.accuracy)}"
