"""Cluster settings: what sbatch is asked for. Files `slurm/<name>.yaml`, chosen by `cluster=<name>` or by path."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from experiments.errors import UserError, nearest

FOLDER = Path(__file__).resolve().parent
PER_MODEL = ("gpus", "time", "memory", "cpus")  # a value for all models, or {default: …, <model>: …}
SMALL = {"gpus": 0, "cpus": 1, "time": "30", "memory": None}  # enough to plan and to write a report
SET_BY_US = {  # options of sbatch that a submission sets itself, and how to ask for something else
    "array": "give --max-parallel",
    "comment": "it says which manifest a job belongs to",
    "dependency": "give --after",
    "chdir": "jobs start where they were submitted",
    "open-mode": "a requeued task goes on in the same log",
    "output": "logs lie beside the manifest",
    "error": "logs lie beside the manifest",
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
    """What one task of an array asks for."""

    gpus: int
    nodes: int
    time: str
    memory: str | None
    cpus: int

    @property
    def processes(self) -> int:
        """One per GPU; a run without GPUs has one."""
        return max(1, self.gpus)

    @property
    def gpu_hours(self) -> float:
        return self.gpus * minutes(self.time) / 60


@dataclass(frozen=True)
class Cluster:
    """A settings file. `example` in this folder says what each key means."""

    partition: str | None = None
    account: str | None = None
    gpus: Any = 1
    gpus_per_node: int = 8
    gres: str = "gpu"
    cpus: Any = 8
    memory: Any = None
    time: Any = "1-00:00:00"
    max_parallel: int | None = None
    max_requeues: int = 100
    signal: str = "USR1@120"
    activate: list[str] = field(default_factory=list)
    python: str | None = None
    scratch: str | None = None
    sbatch: dict[str, Any] = field(default_factory=dict)
    eval: dict[str, Any] = field(default_factory=dict)
    follow_up: dict[str, Any] = field(default_factory=dict)
    given: tuple[str, ...] = field(default=(), compare=False)  # no setting: the arguments that chose these

    def resources(self, model: str, stage: str = "train") -> Resources:
        """For a stage of a model's runs. A separate evaluation may have its own; the follow-up job is small."""
        settings = {key: getattr(self, key) for key in PER_MODEL}
        own = {"train": {}, "eval": self.eval, "follow_up": {**SMALL, **self.follow_up}}[stage]
        chosen = {}
        for key, value in {**settings, **own}.items():
            if isinstance(value, dict):
                if model not in value and "default" not in value:
                    raise UserError(f"cluster setting {key} has no value for {model}: add it, or a default")
                value = value.get(model, value.get("default"))
            chosen[key] = value
        for key in ("gpus", "cpus"):
            if not isinstance(chosen[key], int) or chosen[key] < (key == "cpus"):
                raise UserError(f"cluster setting {key} of {model} is {chosen[key]!r}: give a number")
        minutes(chosen["time"])
        nodes = max(1, -(-chosen["gpus"] // self.gpus_per_node))
        if chosen["gpus"] % nodes:
            raise UserError(
                f"{chosen['gpus']} GPUs for {model} do not divide over {nodes} nodes of {self.gpus_per_node}"
            )
        return Resources(nodes=nodes, **chosen)


def minutes(time: Any) -> float:
    """The minutes of a time as Slurm writes it: `90`, `90:00`, `1:30:00`, `1-12`, `1-12:30`, `1-12:30:00`."""
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
    """The settings of `cluster=<name or path>`, with `cluster.<key>=<YAML value>` in their place."""
    path = Path(name) if "/" in name or name.endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    if not path.is_file():
        known = [file.stem for file in FOLDER.glob("*.yaml")]
        raise UserError(
            f"no cluster {name!r}: {nearest(name, known)}, or copy slurm/cluster.example.yaml and fill it in"
        )
    overrides = list(overrides)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        for override in overrides:
            key, _, value = override.partition("=")
            content[key] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not YAML ({error})") from None
    where = str(path.resolve()) if path.parent != FOLDER else name  # a job finds its own copy of a file of this folder
    given = (f"cluster={where}", *(f"cluster.{override}" for override in overrides))
    return dataclasses.replace(_checked(path, content), given=given)


def _checked(path: Path, content: Any) -> Cluster:
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
            raise UserError(f"{path}: {key} is {content[key]!r}, it has to be a {kind.__name__}")
    cluster = Cluster(**content)
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
    """The options of sbatch that the settings amount to."""
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
        "signal": f"B:{cluster.signal}",  # to the batch script alone, which passes it on
        "requeue" if cluster.max_requeues else "no-requeue": True,
        "open-mode": "append",
        **cluster.sbatch,
    }
    chosen = {key: value for key, value in options.items() if value is not None and value is not False}
    return [f"--{key}" if value is True else f"--{key}={value}" for key, value in chosen.items()]
