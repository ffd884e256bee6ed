"""Submits an experiment as arrays with one task per run, and returns at once.

    python -m slurm.submit experiment=quickstart cluster=mycluster --max-parallel 16
    python -m slurm.submit experiment=commonsense cluster=a100 --paper --budget 2000gpuh --dry-run
    python -m slurm.submit method=lora,diablo seed=range(0,5) cluster=a100 cluster.partition=gpu --dry-run

Submits what is missing, i.e. neither finished nor waiting nor running. To continue failed and cancelled runs, submit
again. Jobs run from a snapshot of the code, so you may edit it at once. A small job follows an experiment's arrays: it
submits the second stage if the experiment chooses learning rates, and finally writes the report.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import socket
import time
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from experiments.config import RunConfig
from experiments.errors import UserError, run_command
from experiments.plan.choose import Stages, follow, stages_of
from experiments.plan.compose import run_paths, write_runs
from experiments.plan.cost import gpu_hours, reasons
from experiments.plan.experiment_files import split_experiment
from experiments.plan.fit import with_sharding
from experiments.plan.selection import EVERYTHING, Selected, Selection, add_options, read_options, select
from experiments.runs.config_files import group_hash, read_config
from experiments.runs.differences import differing
from experiments.runs.records import RunPaths
from experiments.runs.sizes import counted
from experiments.settings import with_values
from slurm.arrays import Array, Options, arrays, submit_array
from slurm.cluster import Cluster, Resources, read_cluster, sbatch_lines
from slurm.follow_up import submit_follow_up
from slurm.manifest import Manifest, describe_run, is_finished, stage_records, submissions
from slurm.queue import max_array_size, queued, queued_if_known, slurm
from slurm.snapshot import take_snapshot
from slurm.status import failed_before, was_started


def submit(
    arguments: Sequence[str], cluster: Cluster, options: Options, selection: Selection = EVERYTHING
) -> list[str]:
    """Plan, write the manifests and submit. Returns the arrays' job ids."""
    name, overrides = split_experiment(arguments)
    title = name or " ".join(arguments)
    selected = select(arguments, selection, partial(_hours, cluster=cluster, selection=selection))
    if selection.budget is not None and reasons(selected.configs, selection.speed):
        print("the budget counts the whole time limit of runs whose GPU-hours are unknown")
    found = stages_of(selected.configs, selected.by)
    first = {} if options.second_stage else {config.run_id: (config, False) for config in found.rate_search}
    planned = {**first, **{config.run_id: (config, True) for config in found.final}}
    wanted = [(_with_frozen_evaluation(config), scored) for config, scored in planned.values()]
    if not wanted:
        raise UserError(f"{title}: no learning rate is chosen yet: {'; '.join(found.undecided)}")
    folders = {str(config.runtime.runs_dir) for config, _ in wanted}
    if len(folders) != 1:
        raise UserError(f"runtime.runs_dir has {len(folders)} values: a submission has one folder of runs")
    runs_dir = Path(folders.pop()).resolve()
    if options.dry_run:
        todo = _missing(title, wanted, queued_if_known(runs_dir) or {}, options)
        refused = show(todo, found.following(), cluster, options, selection)
        _say_what_comes(found, selected)
        if refused:
            raise UserError(f"{counted(refused, 'setting')} cannot be submitted, for the reasons above")
        return []
    slurm("sbatch", "--version")  # fails before anything is written
    with _submitter_lock(runs_dir):
        # All checks come before the run directories are written.
        waiting = queued(runs_dir)
        todo = _missing(title, wanted, waiting, options)
        submits = bool(todo) or options.second_stage
        parts = list(arrays(todo, cluster, options, max_array_size())) if todo else []
        sharded = {config.run_id: _with_sharding(config, cluster) for config, _ in todo}
        for config in sharded.values():
            _check_checkpoint(config, cluster)
        code = take_snapshot(submissions(runs_dir) / "code") if submits else {}
        # A queued run's config must not change: its job refuses an edited one.
        write_runs(sharded.get(config.run_id, config) for config, _ in wanted if config.run_id not in waiting)
        if not submits:
            _say_what_comes(found, selected)
            return []
        apart = differing([config for config, _ in wanted])
        about = {
            config.run_id: describe_run(_absolute(runs_dir, config), config, scored, apart.get(config.run_id, ""))
            for config, scored in wanted
        }
        manifest = partial(
            Manifest,
            experiment=title,
            runs_dir=str(runs_dir),
            runs=about,
            max_requeues=cluster.max_requeues,
            scratch=cluster.scratch,
            code=code,
            following=len(found.following()),
        )
        jobs = _submit_arrays(parts, manifest, cluster, options)
        if name:
            earlier = {task.job.split("_")[0] for run_id in planned for task in waiting.get(run_id, [])}
            more = bool(found.undecided) and not options.second_stage
            after = [*sorted(earlier), *jobs]
            job = submit_follow_up(name, overrides, runs_dir, code, cluster, options, selection.flags, after, more)
            print(f"job {job}: {'chooses learning rates and submits the second stage' if more else 'the report'}")
    _say_what_comes(found, selected)
    return jobs


def _submit_arrays(
    parts: list[Array], manifest: Callable[..., Manifest], cluster: Cluster, options: Options
) -> list[str]:
    """Submit the arrays, chained where they have to wait, and return their job ids."""
    jobs: list[str] = []
    previous: dict[Resources, str] = {}
    for array in parts:
        if array.stages == ["eval"]:
            dependency = f"aftercorr:{jobs[-1]}"
        else:
            before = [options.after] if options.after else []
            # Parts of one array wait for each other, or their limits on parallel tasks would add up.
            before += [previous[array.resources]] if array.resources in previous and array.parallel else []
            dependency = ",".join(job if ":" in job else f"afterany:{job}" for job in before)
        part = manifest(stages=array.stages, tasks=array.tasks, processes=array.resources.processes)
        try:
            job = submit_array(part, array, cluster, dependency)
        except UserError as error:
            done = f"; submitted before: {', '.join(jobs)}; the rest is not submitted" if jobs else ""
            raise UserError(f"{error}{done}") from None
        jobs.append(job)
        previous[array.resources] = job
        print(f"job {job}: {array}", flush=True)
    return jobs


def _hours(config: RunConfig, cluster: Cluster, selection: Selection) -> float:
    """Return the GPU-hours of a run: at the measured speed, or its whole time limit. 0 for a refused run."""
    try:
        resources = cluster.resources(config)
    except UserError:
        return 0.0
    known = gpu_hours(config, selection.speed)
    return resources.gpu_hours if known is None else known


def _refused(configs: Sequence[RunConfig], cluster: Cluster) -> dict[str, str]:
    """Return, by `group_hash`, why settings cannot be submitted: too few GPUs, or a checkpoint of another layout."""
    refused: dict[str, str] = {}
    for config in configs:
        try:
            _check_checkpoint(_with_sharding(config, cluster), cluster)
        except UserError as error:
            refused[group_hash(config.mapping)] = str(error)
    return refused


def show(
    todo: list[tuple[RunConfig, bool]],
    following: list[RunConfig],
    cluster: Cluster,
    options: Options,
    selection: Selection,
) -> int:
    """Print what would be submitted, a line per setting, then the arrays; and what cannot be, with the reason.

    Returns the number of settings that cannot be submitted.
    """
    from experiments.plan.overview import Column, memory_table, settings

    refused = _refused([*(config for config, _ in todo), *following], cluster)
    kept = [
        (_with_sharding(config, cluster), scored)
        for config, scored in todo
        if group_hash(config.mapping) not in refused
    ]
    configs = [config for config, _ in kept]
    unknown = reasons([config for config in configs if cluster.resources(config).gpus], selection.speed)

    def hours(runs: Sequence[RunConfig]) -> str:
        limited = any(gpu_hours(run, selection.speed) is None and cluster.resources(run).gpus for run in runs)
        return f"{'≤ ' if limited else ''}{sum(_hours(run, cluster, selection) for run in runs):,.0f}"

    if settings(configs):
        gpus: list[Column] = [("GPU-h", lambda config, count: hours([config] * count))]
        print(*memory_table(configs, lambda config: cluster.resources(config).gpus, gpus), sep="\n")
    for line in unknown:
        print(f"unknown: {line}; ≤ is the time limit" if line.startswith("GPU-hours") else f"unknown: {line}")
    _show_arrays(list(arrays(kept, cluster, options, 1001)), cluster)
    more = [config for config in following if group_hash(config.mapping) not in refused]
    then = f"; with the {len(more)} that follow {hours([*configs, *more])} GPU-hours" if more else ""
    if configs:
        print(f"{counted(len(configs), 'run')}: {hours(configs)} GPU-hours{then}")
    for reason in refused.values():
        print(f"cannot be submitted: {reason}")
    return len(refused)


def _show_arrays(parts: list[Array], cluster: Cluster) -> None:
    """Print each array with the sbatch options that not all of them have, then the common options."""
    lines = [sbatch_lines(cluster, array.resources) for array in parts]
    common = [option for option in lines[0] if all(option in line for line in lines)] if lines else []
    for array, line in zip(parts, lines, strict=True):
        own = " ".join(option for option in line if option not in common)
        print(f"would submit {array}" + (f"\n  {own}" if own else ""))
    if common:
        print(f"{'all with ' if len(parts) > 1 else ''}sbatch {' '.join(common)}")


def _say_what_comes(found: Stages, selected: Selected) -> None:
    for line in found.chosen():
        print(line)
    if following := found.following():
        print(follow(len(following)))
    for line in selected.lines():
        print(line)


def _with_frozen_evaluation(config: RunConfig) -> RunConfig:
    """Return a planned config; an existing run keeps its own evaluation, because the job reads that."""
    run = run_paths(config)
    if not run.config.is_file():
        return config
    return with_values(config, {"evaluation": read_config(run).mapping["evaluation"]})


def _with_sharding(config: RunConfig, cluster: Cluster) -> RunConfig:
    """Return a config that says how the run trains on its GPUs."""
    return with_sharding(config, cluster.resources(config).sharding)


def _check_checkpoint(config: RunConfig, cluster: Cluster) -> None:
    """Raise a UserError if the run cannot resume from its checkpoint, which the job would only find hours later."""
    from experiments.train.checkpoint import MANIFEST, check_layout

    manifests = sorted(run_paths(config).checkpoints.glob(f"step-*/{MANIFEST}"))
    if manifests:
        resources = cluster.resources(config)
        with contextlib.suppress(ValueError):  # a damaged checkpoint, which training skips
            check_layout(manifests[-1].parent, {"processes": resources.processes, "sharding": resources.sharding})


def _missing(
    title: str, wanted: list[tuple[RunConfig, bool]], waiting: dict[str, Any], options: Options
) -> list[tuple[RunConfig, bool]]:
    """Return the runs to submit, and print the number of each kind."""
    kinds: dict[str, str] = {}
    for config, scored in wanted:
        run = run_paths(config)
        records = stage_records(run, config, scored)
        if config.run_id in waiting:
            kinds[config.run_id] = "already queued"
        elif all(is_finished(run, stage, records) for stage in ("train", "eval")):
            kinds[config.run_id] = "finished"
        elif failed_before(run):
            kinds[config.run_id] = "to resume after a failure"
        else:
            kinds[config.run_id] = "to resume" if was_started(run) else "new"
    counts = Counter(kinds.values())
    order = ("new", "to resume", "to resume after a failure", "already queued", "finished")
    short = title if len(title) <= 80 else f"{title[:79]}…"
    print(
        f"{short}: {counted(len(wanted), 'run')}: {', '.join(f'{counts[k]} {k}' for k in order if counts[k])}",
        flush=True,
    )
    chosen = order[2:3] if options.only_failed else order[:3]
    return [(config, scored) for config, scored in wanted if kinds[config.run_id] in chosen]


def _absolute(runs_dir: Path, config: RunConfig) -> RunPaths:
    return RunPaths(runs_dir / config.run_id)


@contextlib.contextmanager
def _submitter_lock(runs_dir: Path) -> Generator[None, None, None]:
    """Lock a folder of runs for one submitter. The system releases the lock whenever its holder ends."""
    path = submissions(runs_dir) / "lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            raise UserError(
                f"{runs_dir}: being submitted by {file.read().strip()}: wait until that has ended"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%H:%M:%S')}")
        file.flush()
        yield


def parse(
    arguments: list[str], command: str = "slurm.submit", about: str | None = __doc__, failed: bool = False
) -> argparse.Namespace:
    """Parse the options of this command, or of another one that submits; `failed` adds its option `--failed`."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {command}", description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="+", help="experiment=…, key=a,b,c, cluster=NAME or PATH, cluster.key=value")
    parser.add_argument("--dry-run", action="store_true", help="print what would be submitted, write nothing")
    parser.add_argument("--max-parallel", type=int, metavar="N", help="tasks of an array that run at the same time")
    parser.add_argument("--after", metavar="JOBID", help="start when this job has ended; or a condition: afterok:JOBID")
    parser.add_argument("--pack", type=int, default=1, metavar="N", help="runs per task, one after the other")
    parser.add_argument("--eval-separately", action="store_true", help="submit evaluations as separate arrays")
    parser.add_argument("--second-stage", action="store_true", help="skip the runs that choose learning rates")
    add_options(parser)
    if failed:
        parser.add_argument("--failed", action="store_true", help="required")
    options = parser.parse_intermixed_args(arguments)
    if options.pack < 1 or (options.max_parallel is not None and options.max_parallel < 1):
        raise UserError("--pack and --max-parallel must be at least 1")
    return options


def submit_from(options: argparse.Namespace, only_failed: bool = False) -> None:
    names = [o.removeprefix("cluster=") for o in options.overrides if o.startswith("cluster=")]
    if len(names) != 1:
        raise UserError("give one cluster=NAME: a file slurm/NAME.yaml, or its path")
    settings = [o.removeprefix("cluster.") for o in options.overrides if o.startswith("cluster.")]
    others = [o for o in options.overrides if not o.startswith(("cluster=", "cluster."))]
    chosen = Options(
        max_parallel=options.max_parallel,
        after=options.after,
        pack=options.pack,
        eval_separately=options.eval_separately,
        dry_run=options.dry_run,
        only_failed=only_failed,
        second_stage=options.second_stage,
    )
    submit(others, read_cluster(names[0], settings), chosen, read_options(options))


if __name__ == "__main__":
    run_command(lambda arguments: submit_from(parse(arguments)))
