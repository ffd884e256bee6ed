"""Submit an experiment as arrays of one task per run, and return at once.

    python -m slurm.submit experiment=quickstart cluster=mycluster --max-parallel 16
    python -m slurm.submit method=lora,diablo seed=range(0,5) cluster=a100 cluster.partition=gpu --dry-run

Submits what is missing: not what is finished, and not what is waiting or running. Submitting again is how failed and
cancelled runs are continued. Jobs run from a snapshot of the code, so it may be edited at once.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import itertools
import os
import shlex
import shutil
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.errors import UserError, run_command
from experiments.plan import plan, run_paths, write_runs
from experiments.records import RunPaths, read_config
from slurm.cluster import Cluster, Resources, read_cluster, sbatch_lines
from slurm.manifest import Manifest, describe_run, is_finished, stage_records, submissions, write_manifest
from slurm.queue import max_array_size, queued, queued_if_known, slurm
from slurm.snapshot import take_snapshot
from slurm.status import failed_before, was_started

Config = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """How the arrays are cut and chained."""

    max_parallel: int | None = None
    after: str | None = None
    pack: int = 1
    eval_separately: bool = False
    dry_run: bool = False
    only_failed: bool = False


def submit(arguments: Sequence[str], cluster: Cluster, options: Options) -> list[str]:
    """Plan, write the manifests and submit. Returns the job ids of the arrays."""
    named = [argument.removeprefix("experiment=") for argument in arguments if argument.startswith("experiment=")]
    title = named[0] if named else " ".join(arguments)
    configs = [_with_frozen_evaluation(config) for config in plan(arguments)]
    folders = {str(config["runtime"]["runs_dir"]) for config in configs}
    if len(folders) != 1:
        raise UserError(f"runtime.runs_dir has {len(folders)} values: a submission has one folder of runs")
    runs_dir = Path(folders.pop()).resolve()
    if options.dry_run:
        todo = _missing(title, configs, queued_if_known(runs_dir), options)
        for stages, resources, tasks in _arrays(todo, cluster, options, 1001):
            _announce("would submit", stages, resources, tasks, cluster, options)
        if todo:
            print("\n".join(sbatch_lines(cluster, cluster.resources(todo[0]["model"]["name"]))))
        return []
    slurm("sbatch", "--version")  # before anything is written
    with _submitter_lock(runs_dir):
        write_runs(configs)
        todo = _missing(title, configs, queued(runs_dir), options)
        if not todo:
            return []
        about = {config["run_id"]: describe_run(_absolute(runs_dir, config), config) for config in configs}
        code = take_snapshot(submissions(runs_dir) / "code")
        jobs: list[str] = []
        previous: dict[Resources, str] = {}
        for stages, resources, tasks in _arrays(todo, cluster, options, max_array_size()):
            manifest = Manifest(
                experiment=title,
                runs_dir=str(runs_dir),
                stages=stages,
                tasks=tasks,
                runs=about,
                processes=resources.processes,
                max_requeues=cluster.max_requeues,
                scratch=cluster.scratch,
                code=code,
            )
            if stages == ["eval"]:
                dependency = f"aftercorr:{jobs[-1]}"
            else:
                before = [options.after] if options.after else []
                # Parts of one array wait for each other, or their limits on parallel tasks would add up.
                before += [previous[resources]] if resources in previous and _parallel(cluster, options) else []
                dependency = ",".join(job if ":" in job else f"afterany:{job}" for job in before)
            try:
                job = _sbatch(manifest, resources, cluster, options, dependency)
            except UserError as error:
                done = f"; submitted before that: {', '.join(jobs)}; the rest is not" if jobs else ""
                raise UserError(f"{error}{done}") from None
            jobs.append(job)
            previous[resources] = job
            _announce(f"job {job}:", stages, resources, tasks, cluster, options)
    return jobs


def _with_frozen_evaluation(config: Config) -> Config:
    """A planned config. Of a run that is there the job reads its own: the evaluation alone may be another."""
    run = run_paths(config)
    return {**config, "evaluation": read_config(run)["evaluation"]} if run.config.is_file() else config


def _missing(title: str, configs: list[Config], waiting: dict[str, Any], options: Options) -> list[Config]:
    """The runs to submit. Says how many there are of each kind."""
    kinds: dict[str, str] = {}
    for config in configs:
        run = run_paths(config)
        records = stage_records(run, config)
        if config["run_id"] in waiting:
            kinds[config["run_id"]] = "already queued"
        elif all(is_finished(run, stage, records) for stage in ("train", "eval")):
            kinds[config["run_id"]] = "finished"
        elif failed_before(run):
            kinds[config["run_id"]] = "to resume after a failure"
        else:
            kinds[config["run_id"]] = "to resume" if was_started(run) else "new"
    counts = Counter(kinds.values())
    order = ("new", "to resume", "to resume after a failure", "already queued", "finished")
    short = title if len(title) <= 80 else f"{title[:79]}…"
    print(f"{short}: {len(configs)} runs: {', '.join(f'{counts[kind]} {kind}' for kind in order)}", flush=True)
    wanted = order[2:3] if options.only_failed else order[:3]
    return [config for config in configs if kinds[config["run_id"]] in wanted]


def _arrays(
    todo: list[Config], cluster: Cluster, options: Options, largest: int
) -> Iterator[tuple[list[str], Resources, list[list[str]]]]:
    """Stages, resources and tasks of every array: one for each kind of resources, cut at the cluster's limit."""
    groups: dict[tuple[Resources, Resources], list[str]] = {}
    for config in todo:
        model = config["model"]["name"]
        kind = (cluster.resources(model), cluster.resources(model, "eval"))
        groups.setdefault(kind, []).append(config["run_id"])
    for (training, evaluation), names in groups.items():
        tasks = [list(part) for part in _parts(names, options.pack)]
        for part in _parts(tasks, largest):
            if options.eval_separately:
                yield ["train"], training, part
                yield ["eval"], evaluation, part
            else:
                yield ["train", "eval"], training, part


def _parts(items: list[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while part := list(itertools.islice(iterator, size)):
        yield part


def _parallel(cluster: Cluster, options: Options) -> int | None:
    return options.max_parallel or cluster.max_parallel


def _sbatch(manifest: Manifest, resources: Resources, cluster: Cluster, options: Options, dependency: str) -> str:
    """Write the manifest and the script, submit them, and return the job id."""
    parent = submissions(Path(manifest.runs_dir))
    stamp = time.strftime("%Y%m%d-%H%M%S")
    folder = next(path for n in itertools.count(1) if not (path := parent / f"{stamp}-{n:03}").exists())
    (folder / "logs").mkdir(parents=True)
    path = folder / "manifest.json"
    digest = write_manifest(path, manifest)
    script = folder / "job.sh"
    script.write_text(job_script(cluster, resources, manifest, path, digest))
    parallel = _parallel(cluster, options)
    name = "".join(c if c.isalnum() or c in "-_." else "_" for c in f"diablo-{manifest.experiment}")[:60]
    command = [
        *("sbatch", "--parsable", f"--array=0-{len(manifest.tasks) - 1}{f'%{parallel}' if parallel else ''}"),
        *(f"--comment={path}", f"--output={folder}/logs/%A_%a.log"),
    ]
    if "job-name" not in cluster.sbatch:
        command.append(f"--job-name={name}")
    if dependency:
        command += [f"--dependency={dependency}", "--kill-on-invalid-dep=yes"]
    try:
        return slurm(*command, str(script)).strip().split(";")[0]
    except UserError:
        shutil.rmtree(folder)
        raise


def job_script(cluster: Cluster, resources: Resources, manifest: Manifest, path: Path, digest: str) -> str:
    """`job.sh`: only what has to happen before Python is there."""
    python = shlex.quote(cluster.python or ("python" if cluster.activate else sys.executable))
    lines = ["#!/bin/bash", *(f"#SBATCH {option}" for option in sbatch_lines(cluster, resources)), ""]
    for command in cluster.activate:
        failed = shlex.quote(f"error: activation failed on this node: {command}")
        lines += [command, f"[ $? = 0 ] || {{ echo {failed}; exit 1; }}"]
    version = f"{python} -c 'import sys; sys.exit(sys.version_info < (3, 11))'"
    hint = shlex.quote(
        f"error: {python} on this node is not Python 3.11 or later: set python or activate of the cluster"
    )
    lines += [
        f"{version} || {{ echo {hint}; exit 1; }}",
        # The working folder is where the job was submitted, so relative paths mean what they meant there; code comes
        # from the snapshot alone.
        f'export PYTHONSAFEPATH=1 PYTHONPATH={shlex.quote(manifest.code["folder"])}"${{PYTHONPATH:+:$PYTHONPATH}}"',
        f"exec {python} -m slurm.job {shlex.quote(str(path))} {digest}",
    ]
    return "\n".join(lines) + "\n"


def _announce(
    what: str, stages: list[str], resources: Resources, tasks: list[list[str]], cluster: Cluster, options: Options
) -> None:
    parallel = _parallel(cluster, options)
    print(
        f"{what} {' and '.join(stages)} of {sum(map(len, tasks))} runs in {len(tasks)} tasks"
        f"{f', {parallel} at a time' if parallel else ''}; each {resources.gpus} GPUs for at most {resources.time}, "
        f"together at most {resources.gpu_hours * len(tasks):,.1f} GPU-hours",
        flush=True,
    )


def _absolute(runs_dir: Path, config: Config) -> RunPaths:
    return RunPaths(runs_dir / config["run_id"])


@contextlib.contextmanager
def _submitter_lock(runs_dir: Path) -> Iterator[None]:
    """One submitter per folder of runs. The system lets go of it when its holder ends, however it ends."""
    path = submissions(runs_dir) / "lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            raise UserError(f"{runs_dir}: being submitted by {file.read().strip()}: wait until it has ended") from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%H:%M:%S')}")
        file.flush()
        yield


def parse(arguments: list[str], add: Callable[[argparse.ArgumentParser], object] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m slurm.submit", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="+", help="experiment=…, key=a,b,c, cluster=NAME or PATH, cluster.key=value")
    parser.add_argument("--dry-run", action="store_true", help="say what would be submitted, write nothing")
    parser.add_argument("--max-parallel", type=int, metavar="N", help="tasks of an array that run at the same time")
    parser.add_argument("--after", metavar="JOBID", help="start when this job has ended; or a condition: afterok:JOBID")
    parser.add_argument("--pack", type=int, default=1, metavar="N", help="runs per task, one after the other")
    parser.add_argument("--eval-separately", action="store_true", help="evaluations as an array of their own")
    if add is not None:
        add(parser)
    options = parser.parse_intermixed_args(arguments)
    if options.pack < 1 or (options.max_parallel is not None and options.max_parallel < 1):
        raise UserError("--pack and --max-parallel are numbers from 1")
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
    )
    submit(others, read_cluster(names[0], settings), chosen)


if __name__ == "__main__":
    run_command(lambda arguments: submit_from(parse(arguments)))
