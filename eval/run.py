"""Score a trained run on its benchmarks.

    python -m eval.run runs/<run_id>
    python -m eval.run runs/<run_id> evaluation.benchmarks=[arith_heldout] evaluation.generation.num_beams=4
    python -m eval.run runs/<run_id> protocol=llm_adapters      # prompted and read by another protocol of its task

lm-eval generates; every completion is kept in `samples.jsonl`, and the score is a pure function of that file. Other
settings use another folder; finished evaluations are kept, interrupted ones resume. SIGTERM and SIGUSR1 stop it after
the current chunk.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

from eval.backends import Scored, language_model, load
from eval.benchmarks import Benchmark, Row, planned, read_benchmark, rows_of
from eval.generate import asked_of, begin, check_room, check_weights, generate, make_plan, quiet, reuse
from eval.judge import judge
from eval.likelihood import measure
from eval.rescore import score_samples
from eval.sandbox import check_sandbox
from experiments.config import RunConfig
from experiments.data.prompts import prompt_text
from experiments.data.rows import rows_hash
from experiments.errors import UserError, run_command
from experiments.models.shapes import resolve_device
from experiments.reproduce.command import commands
from experiments.runs import preemption
from experiments.runs.attempts import Heartbeat, attempt
from experiments.runs.config_files import read_config
from experiments.runs.environment import environment
from experiments.runs.evaluations import LIKELIHOOD, evaluation_path, protocol_of
from experiments.runs.follows import check_training, read_score
from experiments.runs.records import EvalPaths, EvalRecord, RunPaths, TrainRecord, trained_record
from experiments.settings import with_values
from experiments.train.card import write_card

Config = dict[str, Any]
# The run's own settings that stay when another protocol is selected.
OWN = ("benchmarks", "mean", "limit", "batch_size", "backend", "merge", "sandbox")


def evaluate(
    run: RunPaths,
    overrides: list[str] | None = None,
    progress: bool = False,
    allow_identity: bool = False,
    lm: Any = None,
) -> list[EvalRecord]:
    """Score the run on every benchmark of its config (or of `overrides`), generating only missing completions.

    `lm`: another lm-eval model to generate with, instead of the run's own behind `evaluation.backend`.
    """
    config = with_overrides(read_config(run), overrides or [])
    wanted = [
        (benchmark, settings, evaluation_path(run, config, benchmark.name, settings))
        for benchmark, settings in planned(config)
    ]
    if all(paths.score.is_file() for _, _, paths in wanted):
        run.preempted.unlink(missing_ok=True)
        _check_trained(run, wanted)
        return [read_score(paths) for _, _, paths in wanted]
    _check_sandbox(config, said="evaluation.sandbox=none" in (overrides or []))
    if not run.train_record.is_file() and not run.lock.exists():
        trained_record(run)  # never trained: refused before it counts as a failed attempt at scoring
    with attempt(run, "eval") as heartbeat, ExitStack() as stack:
        trained = _check_trained(run, wanted)
        missing = [entry for entry in wanted if not entry[2].samples.is_file()]
        rows = {benchmark.name: rows_of(config, benchmark) for benchmark, *_ in missing}  # before any generation

        @cache
        def scored() -> Scored:
            """Load the run's model, once, if anything is to be scored."""
            return load(config, run, trained, allow_identity)

        @cache
        def model() -> tuple[Scored, Any]:
            """Return the run's model and its lm-eval interface, made once, if anything is to be generated."""
            quiet()
            return scored(), lm or stack.enter_context(language_model(config, run, scored()))

        missing.sort(key=lambda entry: entry[0].kind != LIKELIHOOD)  # vLLM later moves the model off the device
        for benchmark, settings, paths in missing:
            about = _about(config, trained, benchmark, settings, rows[benchmark.name])
            asked = rows[benchmark.name][: settings["asked"]["limit"]]
            if benchmark.kind == LIKELIHOOD:
                measure(about, asked, config, scored(), paths, progress, heartbeat)
            else:
                _generate(config, about, benchmark, asked, paths, model, progress, heartbeat)
        stack.close()  # frees the model before a judge is loaded
        scores = [_score(config, settings, paths) for _, settings, paths in wanted]
        if run.adapter.is_dir():
            write_card(run, commands=commands(read_config(run)))
        return scores


def _check_trained(run: RunPaths, wanted: list[tuple[Benchmark, Config, EvalPaths]]) -> TrainRecord:
    """Return the run's train record, after checking that existing evaluations used the same weights."""
    trained = trained_record(run)
    check_training(run, read_config(run), trained)
    for _, _, paths in wanted:
        check_weights(paths, trained)
    return trained


def check_data(config: RunConfig) -> None:
    """Raise a UserError if a benchmark in a run's config cannot be scored: wrong settings, missing rows, no sandbox."""
    for benchmark, _ in planned(config):
        rows_of(config, benchmark)
    _check_sandbox(config)


def _check_sandbox(config: RunConfig, said: bool = False) -> None:
    """Check the sandbox before hours of generation; not needed to read finished scores.

    Args:
        said: whether this command line disabled the sandbox. A run's config is not trusted to do so: it may come
            from elsewhere, with the programs.
    """
    evaluation = config.evaluation
    if any(read_benchmark(name).kind == "program" for name in evaluation.benchmarks):
        if evaluation.sandbox == "none" and not said and os.environ.get("DIABLO_SANDBOX") != "none":
            raise UserError(
                f"{config.run_id}: evaluation.sandbox=none in its config would run programs without protection: "
                f"set DIABLO_SANDBOX=none as well, or give eval.run evaluation.sandbox=bwrap"
            )
        check_sandbox(evaluation.sandbox)


def _about(config: RunConfig, trained: TrainRecord, benchmark: Benchmark, settings: Config, rows: list[Row]) -> Config:
    """Return a plan's entries about a benchmark, its `rows` and the weights."""
    protocol, version = protocol_of(config, settings)
    return {
        "run_id": config.run_id,
        "benchmark": benchmark.name,
        "benchmark_version": benchmark.version,
        "protocol": protocol,
        "protocol_version": version,
        "settings": settings,
        "rows": len(rows),
        "data_hash": rows_hash(rows),
        "base_hash": trained.base_hash,
        "adapter_files": trained.adapter_files,
    }


def _generate(
    config: RunConfig,
    about: Config,
    benchmark: Benchmark,
    rows: list[Row],
    paths: EvalPaths,
    model: Callable[[], tuple[Scored, Any]],
    progress: bool,
    heartbeat: Heartbeat,
) -> None:
    prompts = [prompt_text(asked_of(about), row) for row in rows]
    plan = make_plan(about, prompts, config.evaluation.batch_size)
    begin(paths, plan)
    if reuse(paths, plan):
        return
    scored, lm = model()
    about_model = {
        "dtype": scored.dtype,
        "identity": scored.identity,
        "cut_prompts": check_room(plan, prompts, scored.tokenizer, scored.context),
        "environment": environment(str(resolve_device(config.runtime.device))),
    }
    generate(plan, benchmark, rows, lm, scored.tokenizer, about_model, paths, progress, heartbeat)


def _score(config: RunConfig, settings: Config, paths: EvalPaths) -> EvalRecord:
    if paths.score.is_file():
        return read_score(paths)
    if settings["read"]["judge"] is not None:
        judge(settings["read"]["judge"], paths, str(resolve_device(config.runtime.device)))
    return score_samples(paths, config.evaluation.sandbox)


def with_overrides(config: RunConfig, overrides: list[str]) -> RunConfig:
    """Return a frozen config with other evaluation or runtime settings; only these may change after training."""
    from experiments.plan.compose import protocol_evaluation, set_values

    for override in overrides:
        if not override.startswith(("evaluation.", "runtime.", "protocol=")):
            raise UserError(
                f"{override}: a run's config is frozen, only evaluation.…, runtime.… and protocol=… may change"
            )
        if override.startswith("protocol="):
            other = protocol_evaluation(config.task.name, override.removeprefix("protocol="))
            own = config.mapping["evaluation"]
            config = with_values(config, {"evaluation": {**other, **{key: own[key] for key in OWN}}})
    return set_values(config, [override for override in overrides if not override.startswith("protocol=")])


def describe(record: EvalRecord) -> str:
    """Return a score as one line."""
    text = f"{record.benchmark} ({record.protocol}, {record.parser}): {record.metric} {record.shown(record.accuracy)}"
    text += f" ± {record.shown(record.standard_error)} (n = {record.n}"
    counts = {
        "without an answer": record.unparsed,
        "read by the second rule": record.fallback,
        "rows dropped": record.dropped,
        "prompts cut": record.cut_prompts,
        "comparisons given up": int(record.extra_metrics.get("undecided", 0)),
    }
    text += "".join(f"; {count:,} {words}" for words, count in counts.items() if count)
    shares = {
        name: value
        for name, value in record.extra_metrics.items()
        if not re.search("programs|undecided|^targets$", name)
    }
    more = ", ".join(f"{name} {value:.1%}" for name, value in shares.items())
    return f"{text})" + (f"; {more}" if more else "")


def main(arguments: list[str]) -> None:
    preemption.listen()
    parser = argparse.ArgumentParser(
        prog="python -m eval.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="a trained run directory")
    parser.add_argument("overrides", nargs="*", help="evaluation.key=value, runtime.key=value or protocol=name")
    parser.add_argument(
        "--allow-identity", action="store_true", help="also score a model whose adapter changes nothing"
    )
    options = parser.parse_intermixed_args(arguments)
    run = RunPaths(options.run.resolve())
    for record in evaluate(run, options.overrides, progress=True, allow_identity=options.allow_identity):
        print(describe(record))


if __name__ == "__main__":
    run_command(main)
