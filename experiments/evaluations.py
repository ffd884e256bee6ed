"""What a run's `evaluation` section says for a benchmark, and the folder that follows from it.

Read from files alone, so that whoever asks whether a run is scored needs nothing of what scores it.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import yaml

from experiments.errors import UserError, nearest
from experiments.records import EvalPaths, RunPaths
from experiments.settings import NAME

Config = dict[str, Any]
TASKS = Path(__file__).resolve().parent.parent / "eval" / "tasks"
ASKED = ("prompt", "prompt_with_input", "strip_prompt", "bos", "limit", "merge", "backend")
READ = ("searched", "full_batches_of")


def evaluation_paths(run: RunPaths, config: Config) -> list[EvalPaths]:
    """Where the scores of a run's config are written, one folder for each of its benchmarks."""
    evaluation = config["evaluation"]
    return [
        run.evaluation(name, evaluation["protocol"], settings_of(evaluation, name, _kind(name)))
        for name in evaluation["benchmarks"]
    ]


def settings_of(evaluation: Config, benchmark: str, kind: str) -> Config:
    """The settings of a benchmark whose answers are of a kind: `asked` decides completions, `read` decides scores."""

    def chosen(value: Any, name: str) -> Any:
        """A setting's value: the value itself, or what it says for the benchmark or its kind of answer."""
        if not isinstance(value, dict):
            return value
        if benchmark in value:
            return value[benchmark]
        if kind not in value:
            raise UserError(
                f"benchmark {benchmark} has answers of the kind {kind}, of which {name} says nothing "
                f"(it has {', '.join(value) or 'nothing'}): choose another protocol or give {name}.{kind}=…"
            )
        return value[kind]

    generation = {key: chosen(value, f"evaluation.generation.{key}") for key, value in evaluation["generation"].items()}
    read = {key: chosen(evaluation[key], f"evaluation.{key}") for key in READ}
    if kind == "program":
        read |= {"parser": "program", "equality": "unit_tests"}
    else:
        read |= {key: chosen(evaluation[key], f"evaluation.{key}") for key in ("parser", "equality")}
    read["judge"] = evaluation["judge"] if read["parser"] == "judged" else None
    return {"asked": {key: evaluation[key] for key in ASKED} | {"generation": generation}, "read": read}


def task_file(benchmark: str) -> Path:
    """lm-eval's task file of a benchmark."""
    path = TASKS / f"{benchmark}.yaml"
    if not NAME.fullmatch(benchmark) or not path.is_file():
        raise UserError(
            f"no benchmark {benchmark!r}: {nearest(benchmark, (file.stem for file in TASKS.glob('*.yaml')))}"
        )
    return path


@cache
def _kind(benchmark: str) -> str:
    return yaml.safe_load(task_file(benchmark).read_text())["metadata"]["kind"]
