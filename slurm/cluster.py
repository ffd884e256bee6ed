"""Cluster settings for sbatch: files `slurm/<name>.yaml`, selected by `cluster=<name>` or by path."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from experiments.config import RunConfig
from experiments.errors import UserError, nearest
from experiments.rules import Value
from experiments.runs.sizes import read_bytes

FOLDER = Path(__file__).resolve().parent
PER_MODEL = ("gpus", "time", "memory", "cpus")  # a value for all, or {default: …, <model>: …, <method>: …}
AUTO = "auto"  # value of gpus: as many as a run needs
NODES = 4  # most nodes per run
SMALL = {"gpus": 0, "cpus": 1, "time": "30", "memory": None}  # enough to plan and to write a report
SET_BY_US = {  # sbatch options that the submission sets itself, and how to change them
    "array": "give --max-parallel",
    "comment": "it names the manifest of a job",
    "dependency": "give --after",
    "chdir": "jobs start where they were submitted",
    "open-mode": "a requeued task appends to the same log",
    "output": "logs are in the folder of the manifest",
    "error": "logs are in the folder of the manifest",
    "requeue": "give max_requeues",
    "no-requeue": "give max_requeues: 0",
    "signal": "give signal",
    "partition": "give partition",
    "account": "give account",
    "time": "give time",
    "mem": "give memory",
    "nodes": "give gpus and gpus_per_node",
    "ntasks": "give gpus",
    "cpus-per-task": "give cpus",
    "gres": "give gpus and gres",
    "wrap": "jobs run the manifest",
    "parsable": "it is always on",
}


@dataclass(frozen=True)
class Resources:
    """The resources of one task of an array."""

    gpus: int
    nodes: int
    time: str
    memory: str | None
    cpus: int
    sharding: str = "none"  # full: its GPUs share the model, which does not fit on one

    @property
    def processes(self) -> int:
        """Number of processes: one per GPU; one for a run without GPUs."""
        return max(1, self.gpus)

    @property
    def gpu_hours(self) -> float:
        return self.gpus * minutes(self.time) / 60


@dataclass(frozen=True)
class Cluster:
    """A settings file. slurm/cluster.example.yaml explains each key."""

    partition: str | None = None
    account: str | None = None
    gpus: Any = field(default_factory=lambda: {"default": AUTO, "tiny": 0})
    gpu_memory: str | None = None
    gpus_per_node: int = 8
    gres: str = "gpu"
    cpus: Any = 8
    memory: Any = None
    time: Any = field(default_factory=lambda: {"default": "1-00:00:00", "tiny": "0:20:00"})
    max_parallel: int | None = None
    max_requeues: int = 100
    signal: str = "USR1@120"
    activate: list[str] = field(default_factory=list[str])
    python: str | None = None
    scratch: str | None = None
    sbatch: dict[str, Any] = field(default_factory=dict[str, Any])
    eval: dict[str, Any] = field(default_factory=dict[str, Any])
    follow_up: dict[str, Any] = field(default_factory=dict[str, Any])
    given: tuple[str, ...] = field(default=(), compare=False)  # not a setting: the arguments behind this object

    def resources(self, config: RunConfig, stage: str = "train") -> Resources:
        """Return the resources of a stage of a run. A separate evaluation may have its own; default is one GPU.

        UserError if the run does not fit its GPUs.
        """
        model, method = config.model.name, config.method.name
        asked = self._chosen((f"{model}/{method}", model, method), stage)
        gpus = asked["gpus"]
        if gpus == AUTO:
            asked["gpus"] = self._gpus_needed(config) if stage == "train" else 1
        elif stage == "train" and isinstance(gpus, int) and gpus > 0:
            self._check_gpus(config, gpus)
        found = self._resources(asked, f"{method} on {model}")
        return dataclasses.replace(found, sharding=self._sharding(config, found.gpus)) if stage == "train" else found

    def follow_up_resources(self) -> Resources:
        """Return the resources of the small job that plans a second stage and writes the report."""
        return self._resources(self._chosen((), "follow_up"), "the follow-up job")

    @property
    def gpu_bytes(self) -> int | None:
        """Memory of one GPU in bytes; None if the settings do not give it."""
        return None if self.gpu_memory is None else read_bytes(self.gpu_memory)

    def _gpus_needed(self, config: RunConfig) -> int:
        if self.gpu_bytes is None:
            return 1
        from experiments.plan.fit import (
            gpus_needed,  # needs torch; submitting to a cluster without gpu_memory does not
        )

        return gpus_needed(config, self.gpu_bytes, self.largest)

    def _check_gpus(self, config: RunConfig, gpus: int) -> None:
        from experiments.plan.fit import check_divides, check_fits

        if self.gpu_bytes is None:
            check_divides(config, gpus)
        else:
            check_fits(config, gpus, self.gpu_bytes, self.largest)

    def _sharding(self, config: RunConfig, gpus: int) -> str:
        if gpus < 2 and config.runtime.sharding != "full":
            return "none"
        from experiments.plan.fit import sharding_on

        return sharding_on(config, gpus, self.gpu_bytes)

    @property
    def largest(self) -> int:
        """Most GPUs per run."""
        return NODES * self.gpus_per_node

    def _chosen(self, names: Sequence[str], stage: str) -> dict[str, Any]:
        """Return the settings of a stage; from maps, the value of the first of the names that they contain."""
        settings = {key: getattr(self, key) for key in PER_MODEL}
        own = {"train": {}, "eval": self.eval, "follow_up": {**SMALL, **self.follow_up}}[stage]
        chosen: dict[str, Any] = {}
        value: Value
        for key, value in {**settings, **own}.items():
            if isinstance(value, dict):
                found = next((name for name in (*names, "default") if name in value), None)
                if found is None:
                    raise UserError(
                        f"cluster setting {key} has no value for {' or '.join(names[1:])}: add it, or a default"
                    )
                value = value[found]
            chosen[key] = value
        return chosen

    def _resources(self, chosen: dict[str, Any], what: str) -> Resources:
        for key in ("gpus", "cpus"):
            if not isinstance(chosen[key], int) or chosen[key] < (key == "cpus"):
                also = f", or {AUTO}" if key == "gpus" else ""
                raise UserError(f"cluster setting {key} of {what} is {chosen[key]!r}: give a number{also}")
        minutes(chosen["time"])
        nodes = max(1, -(-chosen["gpus"] // self.gpus_per_node))
        if chosen["gpus"] % nodes:
            raise UserError(
                f"{chosen['gpus']} GPUs for {what} do not divide over {nodes} nodes of {self.gpus_per_node}"
            )
        return Resources(nodes=nodes, **chosen)


def minutes(time: Any) -> float:
    """Return the minutes of a time in Slurm's notation: `90`, `90:00`, `1:30:00`, `1-12`, `1-12:30`, `1-12:30:00`."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", time) if isinstance(time, str) else None
    if match is None:
        raise UserError(f"cluster setting time is {time!r}: write it in quotes, as '1-12:00:00' or '90' minutes")
    days, first, second, third = (int(part or 0) for part in match.groups())
    if match[1] is not None:
        return days * 1440 + first * 60 + second + third / 60
    if match[4] is not None:
        return first * 60 + second + third / 60
    return first + second / 60


def read_cluster(name: str, overrides: Iterable[str] = ()) -> Cluster:
    """Read the settings of `cluster=<name or path>`, overridden by `cluster.<key>=<YAML value>`."""
    path = Path(name) if "/" in name or name.endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    if not path.is_file():
        known = [file.stem for file in FOLDER.glob("*.yaml")]
        raise UserError(
            f"no cluster {name!r}: {nearest(name, known)}, or copy slurm/cluster.example.yaml and fill it in"
        )
    overrides = list(overrides)
    try:
        content: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        for override in overrides:
            key, _, value = override.partition("=")
            content[key] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not YAML ({error})") from None
    where = str(path.resolve()) if path.parent != FOLDER else name  # jobs find their own copy of a file in this folder
    given = (f"cluster={where}", *(f"cluster.{override}" for override in overrides))
    return dataclasses.replace(_checked(path, content), given=given)


def _checked(path: Path, content: Value) -> Cluster:
    if not isinstance(content, dict):
        raise UserError(f"{path}: cluster settings are key: value lines")
    known = {field.name for field in dataclasses.fields(Cluster)} - {"given"}
    for key in content:
        if key not in known:
            raise UserError(
                f"{path}: no cluster setting {key!r}: {nearest(str(key), known)}; options of sbatch go under sbatch"
            )
    kinds = {
        "sbatch": dict,
        "eval": dict,
        "follow_up": dict,
        "activate": list,
        "gpus_per_node": int,
        "max_requeues": int,
        "signal": str,
    }
    for key, kind in kinds.items():
        if key in content and not isinstance(content[key], kind):
            raise UserError(f"{path}: {key} is {content[key]!r}, it must be a {kind.__name__}")
    cluster = Cluster(**content)
    if cluster.gpu_memory is not None:
        try:
            read_bytes(cluster.gpu_memory)
        except UserError as error:
            raise UserError(f"{path}: gpu_memory: {error}") from None
    for section in ("eval", "follow_up"):
        for key in getattr(cluster, section):
            if key not in PER_MODEL:
                raise UserError(f"{path}: no setting {section}.{key}: {nearest(str(key), PER_MODEL)}")
    for option in cluster.sbatch:
        if option in SET_BY_US:
            raise UserError(f"{path}: sbatch.{option} is set by the submission: {SET_BY_US[option]}")
        if not re.fullmatch(r"[a-z][a-z0-9-]+", str(option)):
            raise UserError(f"{path}: sbatch.{option}: write options by their long name without dashes, as `qos: high`")
    if not re.fullmatch(r"(USR1|USR2|TERM)@\d+", cluster.signal):
        raise UserError(f"{path}: signal is {cluster.signal!r}: write a signal and seconds before the end, as USR1@120")
    return cluster


def sbatch_lines(cluster: Cluster, resources: Resources) -> list[str]:
    """Return the sbatch options of these settings."""
    options: dict[str, Any] = {
        "partition": cluster.partition,
        "account": cluster.account,
        "nodes": resources.nodes,
        "ntasks": resources.processes,
        "ntasks-per-node": resources.processes // resources.nodes,
        "cpus-per-task": resources.cpus,
        "gres": f"{cluster.gres}:{resources.gpus // resources.nodes}" if resources.gpus else None,
        "mem": resources.memory,
        "time": resources.time,
        "signal": f"B:{cluster.signal}",  # only to the batch script, which passes it on
        "requeue" if cluster.max_requeues else "no-requeue": True,
        "open-mode": "append",
        **cluster.sbatch,
    }
    chosen = {key: value for key, value in options.items() if value is not None and value is not False}
    return [f"--{key}" if value is True else f"--{key}={value}" for key, value in chosen.items()]
