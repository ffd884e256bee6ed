"""The settings in a run's `evaluation` section for a benchmark, and the folder that they determine.

Only reads files, so that checking whether a run is scored needs none of the scoring code.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from experiments import CONFIGS, ROOT
from experiments.config import Evaluation, RunConfig
from experiments.errors import UserError, nearest
from experiments.rules import NAME, Value
from experiments.runs.records import EvalPaths, RunPaths

Config = dict[str, Any]
TASKS = ROOT / "eval" / "tasks"
ASKED = ("prompt", "prompt_with_input", "strip_prompt", "bos", "limit", "merge", "backend")
READ = ("searched", "full_batches_of")
LIKELIHOOD = "likelihood"  # kind of benchmarks that score given targets instead of completions
TEXT = ".txt"  # the path of such a file is a benchmark that measures the likelihood of its text (eval/text.py)
WINDOW = 1000  # most characters of it that the model sees together


def evaluation_paths(run: RunPaths, config: RunConfig) -> list[EvalPaths]:
    """Return where the scores of a run's config are written, one folder for each of its benchmarks."""
    found: list[EvalPaths] = []
    for name in config.evaluation.benchmarks:
        kind = kind_of(name)
        if kind == LIKELIHOOD:
            settings = likelihood_settings(config, name)
        else:
            settings = settings_of(config.mapping["evaluation"], name, kind)
        found.append(evaluation_path(run, config, name, settings))
    return found


def evaluation_path(run: RunPaths, config: RunConfig, benchmark: str, settings: Config) -> EvalPaths:
    """Return the folder of one benchmark, named by its prompts' protocol and by the hash of its settings.

    The hash of a likelihood benchmark excludes the protocol's version: that changes with how answers are read, which
    does not affect a likelihood; everything that determines the tokens is in the settings.
    """
    name, asked = protocol_of(config, settings)[0], settings["asked"]
    if "protocol" in asked:
        asked = {**asked, "protocol": {key: value for key, value in asked["protocol"].items() if key != "version"}}
    return run.evaluation(name_of(benchmark), name, {**settings, "asked": asked})


def name_of(benchmark: str) -> str:
    """Return a benchmark's name in records: for a text, only the name of its file."""
    return Path(benchmark).name if benchmark.endswith(TEXT) else benchmark


def protocol_of(config: RunConfig, settings: Config) -> tuple[str, int]:
    """Return name and version of the protocol that prompts a benchmark's rows."""
    asked = settings["asked"].get("protocol")
    if asked is not None:
        return asked["name"], asked["version"]
    return config.evaluation.protocol, config.evaluation.version


def likelihood_settings(config: RunConfig, benchmark: str) -> Config:
    """Return the settings of a likelihood benchmark, in the form of `settings_of`.

    Its rows are tokenised as in training, by the run's own protocol or the one that the task file names; the targets
    are the answer's tokens, also if the training loss includes the prompt, so that all runs predict the same tokens.
    The run's settings for generating and reading completions do not apply.
    """
    evaluation, about = config.evaluation, _about(benchmark)
    limits = [_chosen(evaluation.limit, "evaluation.limit", benchmark, LIKELIHOOD), about.get("limit")]
    protocol = config.mapping["protocol"] if about["protocol"] is None else protocol_section(about["protocol"])
    if "train_on_prompt" in protocol:
        protocol = {**protocol, "train_on_prompt": False}
    asked = {
        "protocol": protocol,
        "limit": min((limit for limit in limits if limit is not None), default=None),
        "merge": evaluation.merge,
        "backend": "hf",
    }
    read = {"searched": "target", "parser": LIKELIHOOD, "equality": "argmax", "full_batches_of": None, "judge": None}
    return {"asked": asked, "read": read}


@cache
def protocol_section(name: str) -> Config:
    """Return the `protocol` section of a run planned with the file <task>/<name> of `configs/protocol`.

    "text" is not a file: it stands for the windows of a plain text.
    """
    if name == "text":
        return {"name": name, "version": 1, "window": WINDOW}
    path = CONFIGS / "protocol" / f"{name}.yaml"
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    parents = [entry for entry in content.get("defaults", []) if entry != "_self_"]
    if parents:
        section = protocol_section(parents[0])
    else:
        section = yaml.safe_load((CONFIGS / "run.yaml").read_text(encoding="utf-8"))["protocol"]
    return {**section, **content.get("protocol", {})}


def check_evaluation(config: RunConfig) -> None:
    """Raise a UserError if a planned run could not be scored, as far as its config tells."""
    evaluation = config.evaluation
    check_benchmarks(evaluation)
    for name in evaluation.benchmarks:
        if (kind := kind_of(name)) != LIKELIHOOD:
            settings = settings_of(config.mapping["evaluation"], name, kind)
            check_generation(settings["asked"]["generation"], evaluation)


def check_benchmarks(evaluation: Evaluation) -> None:
    names = [name_of(name) for name in evaluation.benchmarks]
    if not names:
        raise UserError("evaluation.benchmarks=[]: nothing would be scored: name one or several of eval/tasks")
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"evaluation.benchmarks: two are called {name}: name it once")


def check_generation(generation: Config, evaluation: Evaluation) -> None:
    """Raise a UserError if a benchmark's settings of generation exclude each other."""
    samples, beams = generation["samples"], generation["num_beams"]
    if samples > 1 and beams > 1:
        raise UserError(f"evaluation.generation: {samples} samples and {beams} beams: choose one of the two")
    if samples > 1 and not generation["temperature"]:
        raise UserError("evaluation.generation.samples is more than one: give a temperature to sample with")
    for key in ("temperature", "top_p", "top_k"):
        if samples == 1 and generation[key] is not None:
            raise UserError(
                f"evaluation.generation.{key}={generation[key]}: one sample is decoded greedily, not sampled: give "
                f"evaluation.generation.samples of two or more, or {key}=null"
            )
    if evaluation.backend == "vllm" and beams > 1:
        raise UserError(
            f"evaluation.generation.num_beams={beams}: vLLM's beam search is not transformers', so its scores would "
            f"not be this protocol's: use evaluation.backend=hf, or a protocol without beams such as metamath"
        )
    if evaluation.backend == "vllm" and not evaluation.merge:
        raise UserError("evaluation.merge=false: vLLM serves the exported merged model: use evaluation.backend=hf")


def settings_of(evaluation: Mapping[str, Any], benchmark: str, kind: str) -> Config:
    """Return a benchmark's settings for its kind of answers: `asked` determines completions, `read` scores.

    Args:
        evaluation: the mapping of a config's section; the settings are written to plan.json, and hashed.
    """

    def chosen(value: Any, name: str) -> Any:
        return _chosen(value, name, benchmark, kind)

    generation = {key: chosen(value, f"evaluation.generation.{key}") for key, value in evaluation["generation"].items()}
    read = {key: chosen(evaluation[key], f"evaluation.{key}") for key in READ}
    if kind == "program":
        read |= {"parser": "program", "equality": "unit_tests"}
    else:
        read |= {key: chosen(evaluation[key], f"evaluation.{key}") for key in ("parser", "equality")}
    read["judge"] = evaluation["judge"] if read["parser"] == "judged" else None
    asked = {key: evaluation[key] for key in ASKED} | {"generation": generation}
    return {"asked": asked | {"limit": chosen(evaluation["limit"], "evaluation.limit")}, "read": read}


def _chosen(value: Value, name: str, benchmark: str, kind: str) -> Any:
    """Return a setting's value, or if it is a map, its value for the benchmark or its kind of answer."""
    if not isinstance(value, Mapping):
        return value
    if benchmark in value:
        return value[benchmark]
    if kind not in value:
        raise UserError(
            f"benchmark {benchmark} has answers of the kind {kind}, for which {name} has no value "
            f"(it has {', '.join(value) or 'nothing'}): choose another protocol or give {name}.{kind}=…"
        )
    return value[kind]


def task_of(benchmark: str) -> Config:
    """Return the content of a benchmark's task file; for a text, what such a file would contain."""
    if benchmark.endswith(TEXT):
        about = {"version": 1.0, "source": benchmark, "kind": LIKELIHOOD, "metric": "nll", "protocol": "text"}
        return {"task": name_of(benchmark), "test_split": "test", "metadata": about}
    return yaml.safe_load(_task_file(benchmark).read_text(encoding="utf-8"))


def _task_file(benchmark: str) -> Path:
    path = TASKS / f"{benchmark}.yaml"
    if not NAME.fullmatch(benchmark) or not path.is_file():
        raise UserError(
            f"no benchmark {benchmark!r}: {nearest(benchmark, (file.stem for file in TASKS.glob('*.yaml')))}"
        )
    return path


def kind_of(benchmark: str) -> str:
    return _about(benchmark)["kind"]


@cache
def _about(benchmark: str) -> Config:
    """Return the metadata of a benchmark's task file."""
    return task_of(benchmark)["metadata"]
