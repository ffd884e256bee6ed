"""Arrays: groups runs into tasks, and submits arrays with sbatch.

The manifest and the script are written to `<runs_dir>/.slurm/<submission>/` first; if sbatch refuses, the folder is
removed.
"""

from __future__ import annotations

import itertools
import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.config import RunConfig
from experiments.errors import UserError
from experiments.runs.sizes import counted
from slurm.cluster import Cluster, Resources, sbatch_lines
from slurm.manifest import Manifest, submissions, write_manifest
from slurm.queue import slurm


@dataclass(frozen=True)
class Options:
    """How the arrays are cut and chained, and which runs are left out."""

    max_parallel: int | None = None
    after: str | None = None
    pack: int = 1
    eval_separately: bool = False
    dry_run: bool = False
    only_failed: bool = False
    second_stage: bool = False  # skip the runs that choose learning rates, finished or not


@dataclass(frozen=True)
class Array:
    """Tasks with equal resources; each task is a list of runs, done one after the other."""

    stages: list[str]
    resources: Resources
    tasks: list[list[str]]
    parallel: int | None  # tasks that may run at the same time

    @property
    def gpu_hours(self) -> float:
        """GPU-hours if every task uses its whole time limit."""
        return self.resources.gpu_hours * len(self.tasks)

    def __str__(self) -> str:
        runs, tasks = counted(sum(map(len, self.tasks)), "run"), counted(len(self.tasks), "task")
        return (
            f"{' and '.join(self.stages)} of {runs} in {tasks}"
            f"{f', {self.parallel} at a time' if self.parallel else ''}; each {counted(self.resources.gpus, 'GPU')}"
            f"{', which share the model,' if self.resources.sharding == 'full' else ''} for at most "
            f"{self.resources.time}, together at most {self.gpu_hours:,.1f} GPU-hours"
        )


def arrays(todo: list[tuple[RunConfig, bool]], cluster: Cluster, options: Options, largest: int) -> Iterator[Array]:
    """Yield one array per kind of resources, cut at the cluster's limit. `todo`: configs, and whether to score them."""
    groups: dict[tuple[Resources, Resources, bool], list[str]] = {}
    for config, scored in todo:
        kind = (cluster.resources(config), cluster.resources(config, "eval"), scored)
        groups.setdefault(kind, []).append(config.run_id)
    parallel = options.max_parallel or cluster.max_parallel
    for (training, evaluation, scored), names in groups.items():
        tasks = list(_parts(names, options.pack))
        for part in _parts(tasks, largest):
            if scored and not options.eval_separately:
                yield Array(["train", "eval"], training, part, parallel)
                continue
            yield Array(["train"], training, part, parallel)
            if scored:
                yield Array(["eval"], evaluation, part, parallel)


def _parts(items: list[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while part := list(itertools.islice(iterator, size)):
        yield part


def submit_array(manifest: Manifest, array: Array, cluster: Cluster, dependency: str) -> str:
    """Write the manifest and the script, submit them, and return the job id."""
    folder = submission_folder(Path(manifest.runs_dir))
    (folder / "logs").mkdir()
    path = folder / "manifest.json"
    digest = write_manifest(path, manifest)
    command = ["slurm.job", str(path), digest]
    (folder / "job.sh").write_text(job_script(cluster, array.resources, manifest.code, command), encoding="utf-8")
    limit = f"%{array.parallel}" if array.parallel else ""
    options = [f"--array=0-{len(manifest.tasks) - 1}{limit}", f"--comment={path}", f"--output={folder}/logs/%A_%a.log"]
    return sbatch(folder, manifest.experiment, cluster, options, dependency)


def submission_folder(runs_dir: Path) -> Path:
    """Create a new folder, named by the time."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    folders = (submissions(runs_dir) / f"{stamp}-{number:03}" for number in itertools.count(1))
    folder = next(folder for folder in folders if not folder.exists())
    folder.mkdir(parents=True)
    return folder


def sbatch(folder: Path, title: str, cluster: Cluster, options: list[str], dependency: str) -> str:
    """Submit the folder's `job.sh` and return the job id; the folder is removed if sbatch refuses."""
    command = ["sbatch", "--parsable", *options]
    if "job-name" not in cluster.sbatch:
        name = "".join(c if c.isalnum() or c in "-_." else "_" for c in f"diablo-{title}")
        command.append(f"--job-name={name[:60]}")
    if dependency:
        command += [f"--dependency={dependency}", "--kill-on-invalid-dep=yes"]
    try:
        return slurm(*command, str(folder / "job.sh")).strip().split(";")[0]
    except UserError:
        shutil.rmtree(folder)
        raise


def job_script(
    cluster: Cluster, resources: Resources, code: dict[str, Any], command: list[str], before: Sequence[str] = ()
) -> str:
    """Return `job.sh`: only what must happen before Python is available, then a module with its arguments."""
    python = shlex.quote(cluster.python or ("python" if cluster.activate else sys.executable))
    lines = ["#!/bin/bash", *(f"#SBATCH {option}" for option in sbatch_lines(cluster, resources)), ""]
    for activation in cluster.activate:
        failed = shlex.quote(f"error: activation failed on this node: {activation}")
        lines += [activation, f"[ $? = 0 ] || {{ echo {failed}; exit 1; }}"]
    version = f"{python} -c 'import sys; sys.exit(sys.version_info < (3, 11))'"
    hint = shlex.quote(
        f"error: {python} on this node is not Python 3.11 or later: set python or activate of the cluster"
    )
    lines += [
        f"{version} || {{ echo {hint}; exit 1; }}",
        # The working folder is where the job was submitted, so relative paths keep their meaning; code comes only from
        # the snapshot.
        f'export PYTHONSAFEPATH=1 PYTHONPATH={shlex.quote(code["folder"])}"${{PYTHONPATH:+:$PYTHONPATH}}"',
        *before,
        f"exec {python} -m {shlex.join(command)}",
    ]
    return "\n".join(lines) + "\n"
