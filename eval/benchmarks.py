"""Benchmarks: task files, their rows, and the settings of a run's protocol for their kind of answer.

A benchmark is an lm-eval task file in `eval/tasks/`. Its metadata names the data set, the kind of answer (option,
number, letter, expression, program or refusal) and, for options, the possible ones. The kind `likelihood` needs no
answer: it measures how well the model predicts the rows' targets (eval/likelihood.py). Its metadata also names the
protocol that tokenises the rows (null for the run's own) and, for fixed samples, the `limit` of rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.scoring import Rules, check_rules
from eval.text import text_rows
from experiments.config import Data, RunConfig
from experiments.errors import UserError
from experiments.runs import evaluations

Config = dict[str, Any]
Row = dict[str, str]


@dataclass(frozen=True)
class Benchmark:
    """A task file. `task`: its content; `kind`: kind of answer; `metric`: name of the mean over rows."""

    name: str
    task: Config
    source: str
    kind: str
    version: float
    metric: str
    options: tuple[str, ...]

    @property
    def split(self) -> str:
        return self.task["test_split"]


def read_benchmark(name: str) -> Benchmark:
    task = evaluations.task_of(name)
    about = task["metadata"]
    return Benchmark(
        name=evaluations.name_of(name),
        task=task,
        source=about["source"],
        kind=about["kind"],
        version=about["version"],
        metric=about.get("metric", "accuracy"),
        options=tuple(about.get("options", ())),
    )


def rows_of(config: RunConfig, benchmark: Benchmark) -> list[Row]:
    """Return a benchmark's rows, generated as for the run's own task if that has the same data."""
    from experiments.data.rows import load_rows

    if benchmark.source.endswith(evaluations.TEXT):
        return text_rows(Path(benchmark.source))
    own = config.task.data
    data = own if own.source == benchmark.source else Data(benchmark.source)
    return load_rows(data, benchmark.split, config.runtime.data_root)


def planned(config: RunConfig) -> list[tuple[Benchmark, Config]]:
    """Return the benchmarks in a run's config with the settings of each, all checked."""
    evaluations.check_benchmarks(config.evaluation)
    found: list[tuple[Benchmark, Config]] = []
    for name in config.evaluation.benchmarks:
        benchmark = read_benchmark(name)
        if benchmark.kind == evaluations.LIKELIHOOD:
            settings = evaluations.likelihood_settings(config, name)
        else:
            settings = settings_of(config, benchmark)
        found.append((benchmark, settings))
    return found


def settings_of(config: RunConfig, benchmark: Benchmark) -> Config:
    """Return a run's settings for a benchmark, checked: `asked` determines completions, `read` scores."""
    settings = evaluations.settings_of(config.mapping["evaluation"], benchmark.name, benchmark.kind)
    read = settings["read"]
    if benchmark.kind != "program":
        check_rules(Rules(**{key: read[key] for key in ("searched", "parser", "equality")}))
    if read["judge"] is not None and read["judge"]["model"] is None:
        raise UserError(
            f"protocol {config.evaluation.protocol} reads completions with a chat model: set it with "
            f"evaluation.judge.model=…"
        )
    evaluations.check_generation(settings["asked"]["generation"], config.evaluation)
    return settings
