"""Scores runs again from stored completions, without a model.

    python -m eval.rescore runs/<run_id>

Recomputes every `score.json` of the run from `plan.json` and `samples.jsonl` (and the judge's words, if there is a
judge), and prints what changed.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import fmean
from typing import Any

from eval.benchmarks import read_benchmark
from eval.likelihood import score_likelihood
from experiments.errors import UserError, run_command
from experiments.runs.evaluations import LIKELIHOOD
from experiments.runs.follows import FROM_HEADER, check_samples, check_score, planned_fields, standard_error
from experiments.runs.received import check_folder
from experiments.runs.records import (
    EvalPaths,
    EvalRecord,
    RunPaths,
    file_hash,
    read_json,
    read_lines,
    read_record,
    write_record,
)

Config = dict[str, Any]


def score_samples(paths: EvalPaths, sandbox: str = "bwrap") -> EvalRecord:
    """Write and return `score.json` of one evaluation. `sandbox`: how model-written programs are run."""
    plan = read_json(paths.plan)
    planned = planned_fields(paths.plan, plan)
    header, *lines = read_lines(paths.samples)
    check_samples(paths, plan, lines)
    read, asked, benchmark = plan["settings"]["read"], plan["settings"]["asked"], read_benchmark(plan["benchmark"])
    lines = [line for line in lines if line["index"] < planned["n"]]
    if not lines:
        raise UserError(
            f"{benchmark.name}: {len(plan['order'])} rows do not fill a batch of {read['full_batches_of']}, and "
            f"{plan['protocol']} scores full batches only: give a larger evaluation.limit, or "
            f"evaluation.full_batches_of=null"
        )
    error = None
    if benchmark.kind == LIKELIHOOD:
        items, extra_metrics, counts, error = score_likelihood(lines)
    elif benchmark.kind == "program":
        items, extra_metrics, counts = _score_programs(lines, asked["generation"]["stop"], sandbox)
    else:
        items, extra_metrics, counts = _score_answers(paths, lines, read, benchmark.options, benchmark.kind)
    fields: dict[str, Any] = {
        **planned,
        **{name: header.get(name) for name in FROM_HEADER},
        **counts,
        "metric": benchmark.metric,
        "accuracy": fmean(items),
        "standard_error": standard_error(items) if error is None else error,
        "extra_metrics": extra_metrics,
        "items": items,
        "samples_hash": file_hash(paths.samples),
        "judgements_hash": None if read["judge"] is None else file_hash(paths.judgements),
    }
    record = EvalRecord(**fields)
    write_record(paths.score, record)
    return record


def rescore(run: RunPaths, sandbox: str = "bwrap") -> list[tuple[EvalRecord | None, EvalRecord]]:
    """Score every finished evaluation of a run again; returns (the old record if readable, the new one) for each.

    An old record that is readable but does not follow from its files is an error: one of them was changed.
    """
    check_folder(run.root)
    evaluations = [paths for paths in run.evaluations() if paths.samples.is_file()]
    if not evaluations:
        raise UserError(f"{run.root}: no stored completions: run `python -m eval.run {run.root}` first")
    results: list[tuple[EvalRecord | None, EvalRecord]] = []
    for paths in evaluations:
        if planned_fields(paths.plan, read_json(paths.plan))["judge"] is not None and not paths.score.is_file():
            continue  # not judged yet: `eval.run` continues there
        try:
            before = read_record(paths.score, EvalRecord) if paths.score.is_file() else None
        except UserError:  # of another schema: it is replaced here
            before = None
        if before is not None:
            check_score(paths, before)
        results.append((before, score_samples(paths, sandbox)))
    return results


def _score_programs(
    lines: list[Config], stops: list[str], sandbox: str
) -> tuple[list[float], dict[str, float], dict[str, int]]:
    """Return pass@1 for every problem, and pass@5 and pass@10 as extra metrics if there are enough samples."""
    from eval.code import cut_at_stop, human_eval_program, pass_at_k
    from eval.sandbox import run_programs

    programs = [
        human_eval_program(line["prompt"], cut_at_stop(line["completion"], stops), line["test"], line["entry_point"])
        for line in lines
    ]
    outcomes = run_programs(programs, sandbox=sandbox)
    passed: dict[int, list[bool]] = {}
    for line, outcome in zip(lines, outcomes, strict=True):
        passed.setdefault(line["index"], []).append(outcome.passed)
    samples = len(next(iter(passed.values())))
    at = {k: [pass_at_k(samples, sum(results), k) for results in passed.values()] for k in (1, 5, 10) if k <= samples}
    ended = [outcome.status for outcome in outcomes]
    extra_metrics = {f"pass@{k}": fmean(values) for k, values in at.items() if k > 1}
    extra_metrics |= {f"programs {status}": float(ended.count(status)) for status in sorted(set(ended))}
    return at[1], extra_metrics, {"unparsed": 0, "fallback": 0}


def _score_answers(
    paths: EvalPaths, lines: list[Config], read: Config, options: tuple[str, ...], kind: str
) -> tuple[list[float], dict[str, float], dict[str, int]]:
    from eval.scoring import Rules, Sample, score

    completions = [line["completion"] for line in lines]
    if read["judge"] is not None:
        from eval.judge import judged_completions

        completions = judged_completions(paths)[: len(lines)]  # the scored rows come first
    samples = [
        Sample(line["prompt"], completion, line["answer"]) for line, completion in zip(lines, completions, strict=True)
    ]
    scored = score(Rules(read["searched"], read["parser"], read["equality"], options), samples)
    extra_metrics = {"undecided": float(scored.undecided)} if scored.undecided else {}
    if kind == "expression":
        from eval.comparisons import compare

        verdicts = compare("math_verify", [(line["completion"], line["answer"]) for line in lines])
        extra_metrics["math-verify"] = fmean(verdict is True for verdict in verdicts)
        extra_metrics |= {"math-verify undecided": float(verdicts.count(None))} if None in verdicts else {}
    right: dict[int, list[int]] = {}
    for line, item in zip(lines, scored.items, strict=True):
        right.setdefault(line["index"], []).append(item)
    return (
        [fmean(each) for each in right.values()],
        extra_metrics,
        {"unparsed": scored.unparsed, "fallback": scored.fallback},
    )


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m eval.rescore", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directories with stored completions")
    parser.add_argument("--sandbox", default="bwrap", help="how model-written programs run: bwrap (default) or none")
    options = parser.parse_intermixed_args(arguments)
    for root in options.runs:
        for before, after in rescore(RunPaths(root.resolve()), options.sandbox):
            same = before is not None and (before.items, before.extra_metrics) == (after.items, after.extra_metrics)
            was = "unchanged" if same else "new" if before is None else f"was {before.shown(before.accuracy, 2)}"
            score = after.shown(after.accuracy, 2)
            print(f"{root.name} {after.benchmark} ({after.protocol}): {after.metric} {score}, {was}")


if __name__ == "__main__":
    run_command(main)
