"""The model card of a run, README.md beside its weights: what was trained on what, its scores, how to load it.

Training writes it; `python -m experiments.card RUN` writes it again with the scores and the commands that repeat the
run, and `python -m experiments.merge` into the merged model. It is made from the run's records alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from experiments.config import RunConfig
from experiments.data.sources import HUBS, SOURCES, page_and_licence
from experiments.errors import UserError
from experiments.runs.config_files import read_config, setting_hash
from experiments.runs.intervals import wilson
from experiments.runs.records import (
    CARD,
    NLL,
    EvalRecord,
    RunPaths,
    TrainRecord,
    read_json,
    read_record,
    write_atomically,
)
from experiments.settings import with_values

NO_PATHS = {f"runtime.{name}": None for name in ("runs_dir", "data_root", "cache_dir")}  # of this machine
Config = dict[str, Any]


def write_card(run: RunPaths, folder: Path | None = None, commands: list[str] | None = None) -> Path | None:
    """Write the card of a trained run with all its scores; None for a run that trained nothing.

    Args:
        folder: the merged model that the card is for; None for the run's own adapter folder.
        commands: the commands that repeat the run, see `experiments.reproduce.command`; if they are none, the card has
            the run's config. None before that is known.
    """
    config, trained = read_config(run), read_record(run.train_record, TrainRecord)
    if config.method.trains == "nothing" and folder is None:
        return None
    scores = [read_record(paths.score, EvalRecord) for paths in run.evaluations() if paths.score.is_file()]
    path = (folder or run.adapter) / CARD
    write_atomically(path, card(run, config, trained, scores, folder is not None, commands))
    return path


def card(
    run: RunPaths,
    config: RunConfig,
    trained: TrainRecord,
    scores: list[EvalRecord],
    merged: bool = False,
    commands: list[str] | None = None,
) -> str:
    """Return the text of the card, with YAML front matter as the Hugging Face hub reads it."""
    kind = None if merged or config.method.trains != "adapter" else _peft_type(run)
    sections = [
        f"# {config.run_id}{' (merged)' if merged else ''}\n\n{_summary(config, trained)}",
        f"## Scores\n\n{_scores(run, config, scores)}",
        f"## How to load it\n\n{_loading(config, trained, kind, merged)}",
        f"## Data\n\n{_data(config)}",
        f"## How to repeat it\n\n{_commands(config, trained, commands)}",
    ]
    front = yaml.safe_dump(_front_matter(config, scores, kind), sort_keys=False, allow_unicode=True)
    return f"---\n{front}---\n\n" + "\n\n".join(sections) + "\n"


def _front_matter(config: RunConfig, scores: list[EvalRecord], kind: str | None) -> Config:
    base, sources = _hub_id(config), _sources(config)
    tags = {"diablo", config.method.name, *([kind.lower()] if kind else [])}
    licences = {source: licence for source in sources if (licence := page_and_licence(source)[1])}
    front: Config = {
        "base_model": base,
        "library_name": "peft" if kind else "transformers",
        "pipeline_tag": "text-generation",
        "tags": sorted(tags),
        "datasets": [HUBS[source].name for source in sources if source in HUBS],
        # Of the model, the terms of the base model and of the data together, which only the publisher can decide.
        "license": "other",
        "license_name": "terms-of-the-base-model-and-the-data",
        "data_licenses": licences,
        "model-index": [{"name": config.run_id, "results": [_result(score) for score in scores]}] if scores else None,
    }
    return {name: value for name, value in front.items() if value}


def _result(score: EvalRecord) -> Config:
    known = HUBS[score.benchmark].name if score.benchmark in HUBS else score.benchmark
    return {
        "task": {"type": "text-generation"},
        "dataset": {"name": score.benchmark, "type": known},
        "metrics": [
            {"type": score.metric, "name": f"{score.metric}, protocol {score.protocol}", "value": score.accuracy}
        ],
    }


def _summary(config: RunConfig, trained: TrainRecord) -> str:
    recipe, choice = config.recipe, "trains no weight"
    if trained.trainable_parameters:
        share = 100 * trained.trainable_parameters / trained.base_parameters
        choice = f"{trained.trainable_parameters:,} trained parameters, {share:.3g} % of the base"
    commit = trained.environment.get("commit") or "unknown"
    held_out = trained.held_out
    lines = {
        "Base model": base_name(config, trained),
        "Method": f"{config.method.label}: {choice}",
        "Task": f"{config.task.name}: {trained.examples:,} rows, {trained.steps:,} steps of {recipe.batch_size} rows",
        "Protocol": f"{config.protocol.name}, version {config.protocol.version}",
        "Learning rate": f"{recipe.learning_rate:g}, {recipe.schedule}",
        "Seed": str(config.seed),
        "Loss on held-out rows": f"{held_out['loss']:.4f} ({held_out['rows']} rows)" if held_out else None,
        "Base's quantisation": f"{config.quantization.method}, {config.quantization.bits} bits"
        if config.quantization
        else None,
        "Code": f"commit {commit}{', with local changes' if trained.environment.get('dirty') else ''}",
    }
    return "| | |\n|---|---|\n" + "\n".join(f"| {name} | {text} |" for name, text in lines.items() if text)


def _scores(run: RunPaths, config: RunConfig, scores: list[EvalRecord]) -> str:
    if not scores:
        return "Not evaluated when this card was written: `python -m eval.run` adds the scores."
    head = "| benchmark | protocol | metric | score (95 % over rows) | n | seed | other seeds |\n" + "|---" * 7 + "|"
    others = _other_seeds(run, config)
    rows = [
        f"| {score.benchmark} | {score.protocol} | {score.metric} | {with_interval(score)} | {score.n} | {config.seed} "
        f"| {_same(score, others) or '–'} |"
        for score in scores
    ]
    return "\n".join([head, *rows]) + "\n\nOther seeds are runs of the same settings; one seed says little."


def with_interval(score: EvalRecord) -> str:
    """Return a score with Wilson's 95 % interval; with the standard error where it is no share of right answers."""
    p, error = score.accuracy, score.standard_error
    if score.metric == NLL:
        return f"{score.shown(p)} ± {score.shown(error)} (standard error)"
    low, high = wilson(p, p * (1 - p) / error**2 if error else score.n)
    return f"{score.shown(p)} ({score.shown(low)} to {score.shown(high)})"


def _other_seeds(run: RunPaths, config: RunConfig) -> dict[int, list[EvalRecord]]:
    """Return the scores of the runs beside this one that differ only in the seed."""
    found: dict[int, list[EvalRecord]] = {}
    name = config.run_id.rpartition("-s")[0]
    for folder in sorted(run.root.parent.glob(f"{name}-s*/config.yaml")):
        other = RunPaths(folder.parent)
        try:
            settings = read_config(other)
            if settings.seed == config.seed or setting_hash(settings.mapping) != setting_hash(config.mapping):
                continue
            found[settings.seed] = [
                read_record(paths.score, EvalRecord) for paths in other.evaluations() if paths.score.is_file()
            ]
        except (UserError, OSError):  # a run that cannot be read is no evidence
            continue
    return found


def _same(score: EvalRecord, others: dict[int, list[EvalRecord]]) -> str:
    key = (score.benchmark, score.protocol, score.protocol_version, score.generation)
    return ", ".join(
        f"{seed}: {other.shown(other.accuracy)}"
        for seed, records in sorted(others.items())
        for other in records
        if (other.benchmark, other.protocol, other.protocol_version, other.generation) == key
    )


def _loading(config: RunConfig, trained: TrainRecord, kind: str | None, merged: bool) -> str:
    base = _hub_id(config)
    if kind is None:
        what = "The adapter is merged into the weights: an" if merged else "An"
        return (
            f"{what} ordinary model of transformers, where FOLDER is this folder: "
            "`AutoModelForCausalLM.from_pretrained(FOLDER)`. The tokenizer is the base model's."
        )
    ours = kind != "LORA" and str((config.method.adapter or {}).get("_target_")).startswith("diablo.")
    first = ""
    if ours:
        first = (
            "`pip install .` in a clone of the DiaBlo repository gives the package `diablo`; without the import PEFT "
        )
        first += f"raises `KeyError: '{kind}'`.\n\n"
    lines = ["import diablo"] if ours else []
    lines += ["from peft import PeftModel", "from transformers import AutoModelForCausalLM", ""]
    lines += [f"base = AutoModelForCausalLM.from_pretrained({repr(base) if base else 'BASE'})"]
    lines += ["model = PeftModel.from_pretrained(base, ADAPTER)"]
    where = "ADAPTER is this folder or its repository."
    if base is None:
        where += f" BASE is a folder with the base model: {base_name(config, trained)}."
    elif config.model.gguf is not None:
        where += f" It was trained and scored on other weights than the hub's: {base_name(config, trained)}."
    return first + "```python\n" + "\n".join(lines) + f"\n```\n\n{where}"


def _data(config: RunConfig) -> str:
    sources = _sources(config)
    if not sources:
        return "Generated word problems (experiments/data/arith.py), no one's data."
    lines: list[str] = []
    for source in sources:
        page, licence = page_and_licence(source)
        stated = f"{licence}, as its repository states" if licence else "see the data set's page"
        lines.append(f"| {source} | {page} | {stated} |")
    return "| data set | page | licence |\n|---|---|---|\n" + "\n".join(lines)


def _commands(config: RunConfig, trained: TrainRecord, commands: list[str] | None) -> str:
    commit = trained.environment.get("commit")
    at = f"At commit `{commit}`" if commit else "In a clone of the DiaBlo repository"
    if commands is None:
        return "`python -m eval.run`, or `python -m experiments.card`, of the run directory adds the commands."
    if commands:
        text = f"{at}:\n\n```sh\n" + "\n".join(commands) + "\n```"
    else:
        settings = yaml.safe_dump(with_values(config, NO_PATHS).mapping, sort_keys=False, allow_unicode=True)
        folder = f"runs/{config.run_id}"
        text = (
            f"{at}, with this as `{folder}/config.yaml`: `python -m experiments.train {folder}`, then "
            f"`python -m eval.run {folder}`.\n\n```yaml\n{settings}```"
        )
    local = config.model.path if config.model.path and _hub_id(config) is None else None
    return f"{text.replace(local, 'FOLDER')}\n\nFOLDER is the base model's." if local else text


def _sources(config: RunConfig) -> list[str]:
    source = config.task.data.source
    return [name for name in ([source] if isinstance(source, str) else source) if name in SOURCES]


def _peft_type(run: RunPaths) -> str:
    return str(read_json(run.adapter / "adapter_config.json")["peft_type"])


def _hub_id(config: RunConfig) -> str | None:
    from diablo.card import hub_id  # imports peft, which --help must not wait for

    return hub_id(config.model.path)


def base_name(config: RunConfig, trained: TrainRecord) -> str:
    """Return which weights the base model has, without a path of this machine."""
    known = trained.base or config.model.name
    return config.model.name if known.startswith(("/", ".", "~")) else known
