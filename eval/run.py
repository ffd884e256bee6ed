"""Score a trained run on its benchmarks.

    python -m eval.run runs/<run_id>
    python -m eval.run runs/<run_id> evaluation.benchmarks=[arith_heldout] evaluation.generation.num_beams=4
    python -m eval.run runs/<run_id> protocol=llm_adapters      # asked and read as another protocol of its task does

lm-eval generates; every completion is kept in `samples.jsonl`, and the score is a pure function of that file. Other
settings make another folder; what is finished is left as it is, what was interrupted goes on.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from eval.benchmarks import Benchmark, Row, read_benchmark, rows_of, settings_of
from eval.models import Scored, language_model, load, trained_record
from eval.rescore import score_samples
from experiments.errors import UserError, run_command
from experiments.prompts import prompt_text
from experiments.records import EvalPaths, EvalRecord, RunPaths, TrainRecord, read_config, read_record

Config = dict[str, Any]
# What a run keeps of its own when another protocol is named.
OWN = ("benchmarks", "mean", "limit", "batch_size", "backend", "merge", "sandbox")


def evaluate(
    run: RunPaths,
    overrides: list[str] | None = None,
    progress: bool = False,
    allow_identity: bool = False,
    lm: Any = None,
) -> list[EvalRecord]:
    """Score the run on every benchmark of its config (or of `overrides`), generating only what is not there yet.

    `lm`: another model of lm-eval's to ask instead of the run's own behind `evaluation.backend`.
    """
    config = with_overrides(read_config(run), overrides or [])
    trained = trained_record(run)
    names = config["evaluation"]["benchmarks"]
    if not names:
        raise UserError(f"{run.root.name}: no benchmark is named: name some with evaluation.benchmarks=[…]")
    benchmarks = [read_benchmark(name) for name in names]
    planned = [(benchmark, settings_of(config["evaluation"], benchmark)) for benchmark in benchmarks]  # all are checked
    if any(benchmark.kind == "program" for benchmark in benchmarks):
        from eval.sandbox import check_sandbox

        check_sandbox(config["evaluation"]["sandbox"])  # before the hours of generation, not after
    scored: list[Scored] = []

    def model() -> Scored:  # loaded once, and only where something is to be generated
        if not scored:
            scored.append(load(config, run, trained, allow_identity))
        return scored[0]

    records = []
    for benchmark, settings in planned:
        paths = run.evaluation(benchmark.name, config["evaluation"]["protocol"], settings)
        if not paths.score.is_file():
            if not paths.samples.is_file():
                _generate(config, run, trained, benchmark, settings, paths, model, progress, lm)
            if settings["read"]["judge"] is not None:
                from eval.judge import judge
                from experiments.models import resolve_device

                judge(settings["read"]["judge"], paths, str(resolve_device(config["runtime"]["device"])), progress)
            score_samples(paths, config["evaluation"]["sandbox"])
        records.append(read_record(paths.score, EvalRecord))
    return records


def _generate(
    config: Config,
    run: RunPaths,
    trained: TrainRecord,
    benchmark: Benchmark,
    settings: Config,
    paths: EvalPaths,
    model: Callable[[], Scored],
    progress: bool,
    lm: Any,
) -> None:
    from eval.generate import begin, check_room, generate, make_plan, reuse
    from experiments.data import rows_hash
    from experiments.environment import environment
    from experiments.models import resolve_device

    rows: list[Row] = rows_of(config, benchmark)
    evaluation = config["evaluation"]
    about = {
        "run_id": config["run_id"],
        "benchmark": benchmark.name,
        "benchmark_version": benchmark.version,
        "protocol": evaluation["protocol"],
        "protocol_version": evaluation["version"],
        "settings": settings,
        "rows": len(rows),
        "data_hash": rows_hash(rows),
        "base_hash": trained.base_hash,
        "adapter_files": trained.adapter_files,
    }
    rows = rows[: evaluation["limit"]]
    prompts = [prompt_text(settings["asked"], row) for row in rows]
    plan = begin(paths, make_plan(about, prompts, evaluation["batch_size"]))
    if reuse(paths, plan):
        return
    scored = model()
    about_model = {
        "dtype": scored.dtype,
        "batch_size": evaluation["batch_size"],
        "identity": scored.identity,
        "cut_prompts": check_room(plan, prompts, scored.tokenizer, scored.context),
        "environment": environment(str(resolve_device(config["runtime"]["device"]))),
    }
    if lm is not None:
        generate(plan, benchmark, rows, lm, scored.tokenizer, about_model, paths, progress)
        return
    with language_model(config, run, scored) as own:
        generate(plan, benchmark, rows, own, scored.tokenizer, about_model, paths, progress)


def with_overrides(config: Config, overrides: list[str]) -> Config:
    """A frozen config with other evaluation or runtime settings, the only ones that may change after training."""
    from experiments.plan import protocol_evaluation, set_values

    for override in overrides:
        if not override.startswith(("evaluation.", "runtime.", "protocol=")):
            raise UserError(
                f"{override}: a run's config is frozen, only evaluation.…, runtime.… and protocol=… may change"
            )
        if override.startswith("protocol="):
            other = protocol_evaluation(config["task"]["name"], override.removeprefix("protocol="))
            config = {**config, "evaluation": other | {key: config["evaluation"][key] for key in OWN}}
    return set_values(config, [override for override in overrides if not override.startswith("protocol=")])


def describe(record: EvalRecord) -> str:
    """A score in one line."""
    text = f"{record.benchmark} ({record.protocol}, {record.parser}): {record.metric} {record.accuracy:.1%}"
    text += f" ± {record.standard_error:.1%} (n = {record.n}"
    counts = {
        "without an answer": record.no_match,
        "read by the second rule": record.fallback,
        "rows dropped": record.dropped,
        "prompts cut": record.cut_prompts,
    }
    text += "".join(f"; {count:,} {words}" for words, count in counts.items() if count)
    beside = ", ".join(f"{name} {value:.1%}" for name, value in record.beside.items() if "programs" not in name)
    return f"{text})" + (f"; {beside}" if beside else "")


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m eval.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="a trained run directory")
    parser.add_argument("overrides", nargs="*", help="evaluation.key=value, runtime.key=value or protocol=name")
    parser.add_argument(
        "--allow-identity", action="store_true", help="score a model in which the adapter changes nothing"
    )
    options = parser.parse_intermixed_args(arguments)
    run = RunPaths(options.run.resolve())
    for record in evaluate(run, options.overrides, progress=True, allow_identity=options.allow_identity):
        print(describe(record))


if __name__ == "__main__":
    run_command(main)
