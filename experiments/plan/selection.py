"""Which runs of an experiment to plan: --paper and --budget, with the same meaning in plan, submit and reproduce."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from experiments.config import RunConfig
from experiments.errors import UserError
from experiments.plan.choose import rule, setting_label
from experiments.plan.compose import plan
from experiments.plan.cost import Speed, known_hours, read_budget, read_speed
from experiments.plan.experiment_files import PAPER
from experiments.runs.config_files import group_hash
from experiments.runs.sizes import counted

Hours = Callable[[RunConfig], float]


@dataclass(frozen=True)
class Selection:
    """The selected runs. `budget` is in GPU-hours; `flags` are the options as given, to pass on to later jobs."""

    paper: bool = False
    budget: float | None = None
    speed: Speed = field(default_factory=lambda: Speed({}))
    flags: tuple[str, ...] = ()


EVERYTHING = Selection()


@dataclass(frozen=True)
class Selected:
    """The runs, the rule that chooses their learning rates, and the settings that the budget leaves out.

    `left_out` maps a setting to its number of runs that are left out, and its total. Runs that only try a learning rate
    for a later seed are not counted, because only one of them will be run.
    """

    configs: list[RunConfig]
    by: str | None
    left_out: dict[str, tuple[int, int]] = field(default_factory=dict[str, tuple[int, int]])

    def lines(self) -> list[str]:
        """Return lines about `left_out` for printing."""
        if not self.left_out:
            return []
        lines = [f"left out by the budget: {counted(sum(count for count, _ in self.left_out.values()), 'run')}"]
        return [
            *lines,
            *(f"  {name}: {count} of {counted(total, 'run')}" for name, (count, total) in self.left_out.items()),
        ]


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--paper", action="store_true", help="only the paper's own cells of an experiment")
    parser.add_argument("--budget", metavar="200gpuh", help="only runs that fit into this many GPU-hours of training")
    parser.add_argument(
        "--tokens-per-second", action="append", default=[], metavar="[MODEL=]N", help="measured, per GPU: for GPU-hours"
    )
    parser.add_argument("--tokens-per-row", type=float, metavar="N", help="used if data or tokenizer are not local")


def read_options(options: argparse.Namespace) -> Selection:
    flags = ["--paper"] if options.paper else []
    flags += [f"--budget={options.budget}"] if options.budget else []
    flags += [f"--tokens-per-second={text}" for text in options.tokens_per_second]
    flags += [f"--tokens-per-row={options.tokens_per_row}"] if options.tokens_per_row else []
    return Selection(
        paper=options.paper,
        budget=read_budget(options.budget) if options.budget else None,
        speed=read_speed(options.tokens_per_second, options.tokens_per_row),
        flags=tuple(flags),
    )


def select(arguments: Sequence[str], selection: Selection, hours: Hours | None = None) -> Selected:
    """Return the runs that the arguments plan and the selection keeps.

    Args:
        hours: GPU-hours of a run, for the budget; by default at the selection's speed.
    """
    configs, by = plan([*arguments, *([PAPER] if selection.paper else [])]), rule(arguments)
    if selection.budget is None:
        return Selected(configs, by)
    cost: Hours = hours or (lambda config: known_hours(config, selection.speed))
    return within(configs, by, selection.budget, cost)


def within(configs: list[RunConfig], by: str | None, budget: float, hours: Hours) -> Selected:
    """Return the runs that fit into a budget.

    In the experiment's order every setting first gets its learning-rate search and one seed, then a second seed, and so
    on. A setting that no longer fits into the rest of the budget gets no more; cheaper ones after it may. For a later
    seed whose learning rate is not chosen yet, the budget counts one run, and the runs of all its rates are kept.
    """
    groups: dict[str, list[RunConfig]] = {}
    for config in configs:
        groups.setdefault(group_hash(config.mapping), []).append(config)
    rounds = {name: _rounds(group, by) for name, group in groups.items()}
    kept: set[str] = set()
    left, lacks = budget, dict[str, int]()
    for number in range(max(map(len, rounds.values()), default=0)):
        for name, parts in rounds.items():
            if number >= len(parts) or name in lacks:
                continue
            paid, keep = parts[number]
            cost = sum(map(hours, paid))
            if cost <= left:
                left -= cost
                kept |= {config.run_id for config in keep}
            else:
                lacks[name] = sum(len(paid) for paid, _ in parts[number:])
    if configs and not kept:
        name, parts = min(rounds.items(), key=lambda item: sum(map(hours, item[1][0][0])))
        cost = sum(map(hours, parts[0][0]))
        raise UserError(
            f"--budget {budget:g}gpuh is too small: the cheapest setting, {setting_label(groups[name][0])}, takes "
            f"{cost:.3g} GPU-hours for {counted(len(parts[0][0]), 'run')}"
        )
    left_out = {
        setting_label(groups[name][0]): (count, sum(len(paid) for paid, _ in rounds[name]))
        for name, count in lacks.items()
    }
    return Selected([config for config in configs if config.run_id in kept], by, left_out)


def _rounds(group: list[RunConfig], by: str | None) -> list[tuple[list[RunConfig], list[RunConfig]]]:
    """Return a setting's rounds: the runs that the budget counts, and the runs to keep if they fit."""
    if by is None or len({config.recipe.learning_rate for config in group}) == 1:
        return [([config], [config]) for config in group]
    seeds: dict[int, list[RunConfig]] = {}
    for config in group:
        seeds.setdefault(config.seed, []).append(config)
    first, *others = seeds.values()
    return [(first, first), *((runs[:1], runs) for runs in others)]
