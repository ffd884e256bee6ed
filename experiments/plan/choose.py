"""Experiments of two stages: learning rates are chosen on rows kept out of training, then the runs are seeded.

An experiment file says `learning_rate_by: loss`. Of its runs, those that differ in nothing but the learning rate and
the seed are a group. The first stage trains every learning rate of a group with the group's first seed; the second has
all seeds of the one that was best by `held_out` of train.json: the smallest loss, or the largest exact match (the
smaller loss among equals). No benchmark is looked at before that. The first-stage run of the chosen learning rate is
also one of the second stage.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from experiments.config import RunConfig
from experiments.errors import UserError, nearest
from experiments.plan.compose import plan, run_paths
from experiments.plan.experiment_files import read_experiment, split_experiment
from experiments.runs.config_files import group_hash
from experiments.runs.follows import check_training
from experiments.runs.records import TrainRecord, read_record, write_atomically

Config = dict[str, Any]
RULES: dict[str, Callable[[Config], tuple[float, ...]]] = {  # of `held_out`; the smallest is the best
    "loss": lambda held_out: (held_out["loss"],),
    "exact_match": lambda held_out: (-held_out["exact_match"], held_out["loss"]),
}


@dataclass(frozen=True)
class Tried:
    """A run of the first stage, and what it scored; None where it is not finished."""

    config: RunConfig
    held_out: Config | None
    chosen: bool
    at_edge: bool  # chosen, and the smallest or largest that was tried: the best may lie beyond


@dataclass
class Stages:
    """The runs of an experiment, as far as they can be told by what is finished."""

    first: list[RunConfig] = field(default_factory=list[RunConfig])  # only trained; none where nothing is chosen
    final: list[RunConfig] = field(default_factory=list[RunConfig])  # trained and scored
    # Groups without a choice: the runs they wait for, a line each.
    undecided: list[str] = field(default_factory=list[str])
    # Their second stage, with a learning rate that stands in.
    to_come: list[RunConfig] = field(default_factory=list[RunConfig])
    by: str | None = None  # a key of `RULES`
    tried: list[Tried] = field(default_factory=list[Tried])

    def known(self) -> list[RunConfig]:
        """The runs of both stages that can be named by now, each once."""
        return list({config.run_id: config for config in [*self.first, *self.final]}.values())

    def following(self) -> list[RunConfig]:
        """Stand-ins for the runs of the second stage that cannot be named yet."""
        known = {config.run_id for config in self.known()}
        return [config for config in self.to_come if config.run_id not in known]

    def chosen(self) -> list[str]:
        """A line per choice; it names model and task where there are several."""
        several = len({(tried.config.model.name, tried.config.task.name) for tried in self.tried}) > 1
        return [
            f"{setting_label(tried.config) if several else tried.config.method.label}: "
            f"learning rate {tried.config.recipe.learning_rate:g}"
            + (", the smallest or largest that was tried" if tried.at_edge else "")
            for tried in self.tried
            if tried.chosen
        ]


def stages(arguments: Sequence[str]) -> Stages:
    """The stages of what `plan` plans. Reads the records of the first stage's runs."""
    return stages_of(plan(arguments), rule(arguments))


def stages_of(configs: list[RunConfig], by: str | None) -> Stages:
    """The stages of planned runs, whose learning rates are chosen `by` a key of `RULES`; None: as they are."""
    if by is None:
        return Stages(final=configs)
    groups: dict[str, list[RunConfig]] = {}
    for config in configs:
        groups.setdefault(group_hash(config.mapping), []).append(config)
    found = Stages(by=by)
    for group in groups.values():
        rates = {_rate(config) for config in group}
        if len(rates) == 1:
            found.final += group
            continue
        if not group[0].task.data.heldout:
            raise UserError(
                f"{setting_label(group[0])}: learning rates are chosen on held-out rows: give task.data.heldout=1000"
            )
        first = [config for config in group if config.seed == group[0].seed]
        scores = [_held_out(config) for config in first]
        waiting = [config.run_id for config, score in zip(first, scores, strict=True) if score is None]
        best = None if waiting else _best(first, scores, by)
        edges = (min(rates), max(rates))
        found.first += first
        found.tried += [
            Tried(config, score, _rate(config) == best, _rate(config) == best and best in edges)
            for config, score in zip(first, scores, strict=True)
        ]
        found.final += [config for config in group if _rate(config) == best]
        if waiting:
            found.undecided.append(f"{setting_label(first[0])} waits for {', '.join(waiting)}")
            found.to_come += [config for config in group if _rate(config) == _rate(first[0])]
    return found


def follow(count: int) -> str:
    """What every command says of runs that cannot be named yet."""
    return f"{count} more runs follow when their learning rates are chosen"


def write_choices(found: Stages) -> None:
    """Leave in every run with a chosen learning rate how it was chosen: by what, and what every one scored."""
    groups: dict[str, list[Tried]] = {}
    for tried in found.tried:
        groups.setdefault(group_hash(tried.config.mapping), []).append(tried)
    for config in (tried.config for tried in found.tried if not tried.chosen):  # of an earlier, smaller grid
        run_paths(config).learning_rate.unlink(missing_ok=True)
    for config in found.final:
        group = groups.get(group_hash(config.mapping))
        if group is None:  # it had one learning rate
            continue
        choice = {
            "by": found.by,
            "seed": group[0].config.seed,
            "at_edge": any(tried.at_edge for tried in group),
            "tried": [{"learning_rate": _rate(tried.config), **(tried.held_out or {})} for tried in group],
        }
        path = run_paths(config).learning_rate
        text = json.dumps(choice, indent=1) + "\n"
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            write_atomically(path, text)


def to_csv(found: Stages) -> str:
    """Every learning rate that was tried, with what its run scored on the held-out rows."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    measured = ("rows", "loss", "exact_match")
    writer.writerow(["run_id", "model", "method", "task", "seed", "learning_rate", *measured, "chosen"])
    for tried in found.tried:
        config, scores = tried.config, tried.held_out or {}
        names = [config.run_id, config.model.name, config.method.label, config.task.name]
        writer.writerow([*names, config.seed, _rate(config), *(scores.get(key) for key in measured), tried.chosen])
    return text.getvalue()


def rule(arguments: Sequence[str]) -> str | None:
    """What the experiment chooses learning rates by, if it does."""
    name, _ = split_experiment(arguments)
    by = read_experiment(name).get("learning_rate_by") if name else None
    if by is not None and by not in RULES:
        raise UserError(f"experiment {name}: learning_rate_by: {by}: {nearest(str(by), RULES)}")
    return by


def _rate(config: RunConfig) -> float:
    return config.recipe.learning_rate


def _held_out(config: RunConfig) -> Config | None:
    """What a finished run scored on the held-out rows; of one that diverged, that it has no loss."""
    run = run_paths(config)
    if run.diverged.is_file():
        return {"rows": 0, "loss": None, "exact_match": None}
    if not run.train_record.is_file():
        return None
    record = read_record(run.train_record, TrainRecord)
    check_training(run, config, record)
    return record.held_out


def _best(first: list[RunConfig], scores: Sequence[Config | None], by: str) -> float:
    """The learning rate whose run did best. A run that diverged, so that its loss is not finite, is no candidate."""
    candidates = [
        (RULES[by](score), _rate(config))
        for config, score in zip(first, scores, strict=True)
        if score is not None and score["loss"] is not None
    ]
    if not candidates:
        raise UserError(f"{setting_label(first[0])}: all learning rates diverged: give smaller ones")
    return min(candidates)[1]


def setting_label(config: RunConfig) -> str:
    return f"{config.method.label} on {config.model.name} and {config.task.name}"
