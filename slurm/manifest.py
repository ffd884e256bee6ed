"""The files of a submission in `<runs_dir>/.slurm/`:

    lock                       held by the submitter
    code/<12 hex>/             snapshots of the code
    <submission>/manifest.json the runs of one array, its tasks and the code they run from
    <submission>/job.sh        the script given to sbatch
    <submission>/logs/         output of the jobs themselves; a run's own output is in slurm.log in its directory

A job gets the manifest's path and hash, so an edited manifest is refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from experiments.config import RunConfig
from experiments.errors import UserError
from experiments.runs.evaluations import evaluation_paths
from experiments.runs.records import RunPaths, file_hash, read_json, write_atomically

SCHEMA = 2


@dataclass(frozen=True)
class Manifest:
    """One array. Runs are names of directories in `runs_dir`."""

    experiment: str  # its name, or the given overrides
    runs_dir: str
    stages: list[str]  # train, eval, or both
    tasks: list[list[str]]  # for each task, its runs, done one after the other
    runs: dict[str, dict[str, Any]]  # all planned runs, by `describe_run`
    processes: int  # of training
    max_requeues: int
    scratch: str | None
    code: dict[str, Any]
    following: int = 0  # runs without a name yet, because their learning rates are not chosen
    schema: int = SCHEMA


def submissions(runs_dir: Path) -> Path:
    return runs_dir / ".slurm"


def write_manifest(path: Path, manifest: Manifest) -> str:
    """Write the manifest and return its hash."""
    write_atomically(path, json.dumps(asdict(manifest), indent=1) + "\n")
    return file_hash(path)


def read_manifest(path: Path, expected: str | None = None) -> Manifest:
    if not path.is_file():
        raise UserError(f"{path}: no manifest: the folder was moved or deleted, submit again")
    if expected is not None and file_hash(path) != expected:
        raise UserError(f"{path}: edited after it was submitted: undo the edit, or cancel this job and submit again")
    data = read_json(path)
    if data.get("schema") != SCHEMA:
        raise UserError(
            f"{path}: schema {data.get('schema')}, this version reads {SCHEMA}: delete {path.parent} and submit again"
        )
    return Manifest(**data)


def all_manifests(runs_dir: Path) -> Iterator[tuple[Path, Manifest]]:
    """Yield the manifests of a folder of runs, oldest first."""
    for path in sorted(submissions(runs_dir).glob("*/manifest.json")):
        yield path, read_manifest(path)


def check_run(manifest: Manifest, name: str) -> RunPaths:
    """Return a run's directory after checking that it exists and has the submitted config."""
    run = RunPaths(Path(manifest.runs_dir) / name)
    if not run.config.is_file():
        raise UserError(
            f"{run.root}: no such run directory: it was moved or deleted after it was submitted, submit again"
        )
    if file_hash(run.config) != manifest.runs[name]["config"]:
        raise UserError(f"{run.config}: edited after it was submitted: undo the edit, or plan and submit again")
    return run


def describe_run(run: RunPaths, config: RunConfig, scored: bool = True, apart: str = "") -> dict[str, Any]:
    """Return a run's entry in `Manifest.runs`: the hash of its config file and the records that finish its stages.

    Args:
        apart: the settings that distinguish it from runs whose names differ only in the hash.
    """
    return {"config": file_hash(run.config), "apart": apart, **stage_records(run, config, scored)}


def stage_records(run: RunPaths, config: RunConfig, scored: bool = True) -> dict[str, list[str]]:
    """Return the records of every stage, as paths in the run's directory; no scores if `scored` is False."""
    scores = [str(paths.score.relative_to(run.root)) for paths in evaluation_paths(run, config) if scored]
    return {"train": [run.train_record.name], "eval": scores}


def is_finished(run: RunPaths, stage: str, about: dict[str, Any]) -> bool:
    """Return whether a stage has its records: `train.json`, or the `score.json` of every benchmark of the config."""
    return all(os.path.isfile(f"{run.root}/{record}") for record in about[stage])
