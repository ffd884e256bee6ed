"""Two-stage experiments: learning rates are chosen on rows kept out of training, then all seeds are run.

An experiment file sets `learning_rate_by: loss`. Its runs that differ only in the learning rate and the seed form a
group. The first stage trains every learning rate of a group with the group's first seed; the second trains all seeds
with the rate that was best by `held_out` in train.json: the smallest loss, or the largest exact match (ties go to the
smaller loss). No benchmark is used for the choice. The first-stage run of the chosen rate also belongs to the second
stage.
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
from experiments.runs.sizes import counted

Config = dict[str, Any]
RULES: dict[str, Callable[[Config], tuple[float, ...]]] = {  # keys of `held_out` -> sort key; the smallest is best
    "loss": lambda held_out: (held_out["loss"],),
    "exact_match": lambda held_out: (-held_out["exact_match"], held_out["loss"]),
}


@dataclass(frozen=True)
class Tried:
    """A run of the first stage and its held-out scores; None if it is not finished."""

    config: RunConfig
    held_out: Config | None
    chosen: bool
    at_edge: bool  # chosen, and the smallest or largest one tried: a better one may lie beyond


@dataclass
class Stages:
    """The runs of an experiment, as far as the finished runs determine them."""

    # Only trained; empty if there is nothing to choose.
    rate_search: list[RunConfig] = field(default_factory=list[RunConfig])
    # Trained and scored.
    final: list[RunConfig] = field(default_factory=list[RunConfig])
    # A line per group without a choice: the runs it waits for.
    undecided: list[str] = field(default_factory=list[str])
    # Their second stage, with a placeholder learning rate.
    to_come: list[RunConfig] = field(default_factory=list[RunConfig])
    by: str | None = None  # a key of `RULES`
    tried: list[Tried] = field(default_factory=list[Tried])

    def known(self) -> list[RunConfig]:
        """Return the runs of both stages whose settings are known, each once."""
        return list({config.run_id: config for config in [*self.rate_search, *self.final]}.values())

    def following(self) -> list[RunConfig]:
        """Return placeholders for the runs of the second stage whose learning rates are not chosen yet."""
        known = {config.run_id for config in self.known()}
        return [config for config in self.to_come if config.run_id not in known]

    def chosen(self) -> list[str]:
        """Return a line per choice, with model and task if there are several."""
        several = len({(tried.config.model.name, tried.config.task.name) for tried in self.tried}) > 1
        return [
            f"{setting_label(tried.config) if several else tried.config.method.label}: "
            f"learning rate {tried.config.recipe.learning_rate:g}"
            + (", the smallest or largest that was tried" if tried.at_edge else "")
            for tried in self.tried
            if tried.chosen
        ]


def stages(arguments: Sequence[str]) -> Stages:
    """Return the stages of the runs that `plan` plans, using the records of the first stage."""
    return stages_of(plan(arguments), rule(arguments))


def stages_of(configs: list[RunConfig], by: str | None) -> Stages:
    """Return the stages of planned runs whose learning rates are chosen `by` a key of `RULES`; None: no choice."""
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
        search = [config for config in group if config.seed == group[0].seed]
        scores = [_held_out(config) for config in search]
        waiting = [config.run_id for config, score in zip(search, scores, strict=True) if score is None]
        best = None if waiting else _best(search, scores, by)
        edges = (min(rates), max(rates))
        found.rate_search += search
        found.tried += [
            Tried(config, score, _rate(config) == best, _rate(config) == best and best in edges)
            for config, score in zip(search, scores, strict=True)
        ]
        found.final += [config for config in group if _rate(config) == best]
        if waiting:
            found.undecided.append(f"{setting_label(search[0])} waits for {', '.join(waiting)}")
            found.to_come += [config for config in group if _rate(config) == _rate(search[0])]
    return found


def follow(count: int) -> str:
    """Return the line that every command prints about runs whose learning rates are not chosen yet."""
    follows = "follows when its learning rate is" if count == 1 else "follow when their learning rates are"
    return f"{counted(count, 'more run')} {follows} chosen"


def write_choices(found: Stages) -> None:
    """Write into every run with a chosen learning rate how it was chosen: the rule, and the score of each rate."""
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
    """Return every learning rate tried, with its run's scores on the held-out rows, as CSV."""
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
    """Return the rule by which the experiment chooses learning rates, or None."""
    name, _ = split_experiment(arguments)
    by = read_experiment(name).get("learning_rate_by") if name else None
    if by is not None and by not in RULES:
        raise UserError(f"experiment {name}: learning_rate_by: {by}: {nearest(str(by), RULES)}")
    return by


def _rate(config: RunConfig) -> float:
    return config.recipe.learning_rate


def _held_out(config: RunConfig) -> Config | None:
    """Return a finished run's scores on the held-out rows; for a diverged run, scores of None."""
    run = run_paths(config)
    if run.diverged.is_file():
        return {"rows": 0, "loss": None, "exact_match": None}
    if not run.train_record.is_file():
        return None
    record = read_record(run.train_record, TrainRecord)
    check_training(run, config, record)
    return record.held_out


def _best(search: list[RunConfig], scores: Sequence[Config | None], by: str) -> float:
    """Return the learning rate of the best run. Diverged runs, whose loss is not finite, are no candidates."""
    candidates = [
        (RULES[by](score), _rate(config))
        for config, score in zip(search, scores, strict=True)
        if score is not None and score["loss"] is not None
    ]
    if not candidates:
        raise UserError(f"{setting_label(search[0])}: all learning rates diverged: give smaller ones")
    return min(candidates)[1]


def setting_label(config: RunConfig) -> str:
    return f"{config.method.label} on {config.model.name} and {config.task.name}"
