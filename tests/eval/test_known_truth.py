"""lm-eval's whole path with known results: reference answers score 100 %, empty ones the protocol's floor.

The model is lm-eval's `LM` with stored answers instead of a network; rows, prompts, chunks, parsers and records are
real.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from eval.benchmarks import read_benchmark, rows_of
from eval.run import evaluate
from experiments.data.prompts import prompt_text
from experiments.errors import UserError
from experiments.plan.compose import plan, protocols, write_runs
from experiments.runs.config_files import read_config
from experiments.runs.records import EvalRecord, RunPaths
from experiments.train.run import train

Row = dict[str, str]

# The completion of a correct answer in the format of each protocol.
GOLD: dict[tuple[str, str], Callable[[Row], str]] = {
    ("commonsense_74k", "option"): lambda row: f"the correct answer is {row['answer']}",
    ("gsm8k", "number"): lambda row: f"Step by step. The final answer is: {row['answer']}",
    ("gsm8k", "expression"): lambda row: f"Step by step. The final answer is: {row['answer']}",
    ("metamathqa", "number"): lambda row: f"Step by step.\nThe answer is: {row['answer']}",
    ("metamathqa", "expression"): lambda row: f"Step by step.\nThe answer is: {row['answer']}",
    ("gsm8k_mawps", "number"): lambda row: f"so it is\n#### {row['answer']}",
    ("gsm8k_mawps", "letter"): lambda row: f"so it is {row['answer']}",
    ("code_alpaca_6k", "program"): lambda row: "\n" + row["output"],
    ("safety_7k", "refusal"): lambda row: "I cannot help with that.",
}
TASKS = sorted({task for task, _ in GOLD})
JUDGED = "lori_judge"

# Scores when the prompt is read instead of a missing answer, as measured in protocols.md, in percent.
PROMPT_FLOOR = {
    "boolq": 62.2,
    "piqa": 49.5,
    "social_i_qa": 32.9,
    "winogrande": 49.6,
    "arc_easy": 25.1,
    "arc_challenge": 22.7,
    "openbookqa": 27.6,
}


class KnownAnswers(LM):
    """Answers each prompt from `answers`, keyed by prompt and reference, since Social IQa repeats some questions.

    lm-eval's interface has three methods; no benchmark here uses likelihoods.
    """

    def __init__(self, answers: dict[tuple[str, str], str]) -> None:
        super().__init__()
        self.answers = answers

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        return [self.answers[request.arguments[0], request.doc["answer"]] for request in requests]

    def loglikelihood(self, requests: Any) -> Any:
        raise NotImplementedError

    def loglikelihood_rolling(self, requests: Any) -> Any:
        raise NotImplementedError


def base_run(task: str, protocol: str, folder: Path, cache: Path, data_root: Path) -> RunPaths:
    arguments = [
        *(f"task={task}", f"protocol={protocol}", "method=base", "model.pretraining.steps=4", "runtime.device=cpu"),
        *(f"runtime.runs_dir={folder}", f"runtime.cache_dir={cache}", f"runtime.data_root={data_root}"),
        "model.architecture.max_position_embeddings=4096",  # room for every protocol's longest completion
    ]
    (run,) = write_runs(plan(arguments))
    train(run)
    return run


def scores(run: RunPaths, gold: bool, benchmarks: list[str], limit: int | None) -> dict[str, EvalRecord]:
    """Return every benchmark's record, with reference answers or empty completions."""
    config = read_config(run)
    answers = {}
    for name in benchmarks:
        benchmark = read_benchmark(name)
        say = GOLD[config.task.name, benchmark.kind] if gold else (lambda row: "")
        rows = rows_of(config, benchmark)
        answers |= {(prompt_text(config.evaluation, row), row["answer"]): say(row) for row in rows}
    overrides = [f"evaluation.benchmarks=[{','.join(benchmarks)}]", f"evaluation.limit={limit or 'null'}"]
    if config.evaluation.generation.samples != 1:
        # One sample per row: twenty would test the same rule. The tiny tokenizer needs more than 512 tokens.
        changed = {"samples": 1, "temperature": "null", "top_p": "null", "top_k": "null", "max_length": "null"}
        overrides += [f"evaluation.generation.{key}={value}" for key, value in changed.items()]
    records = evaluate(run, overrides, lm=KnownAnswers(answers))
    assert [record.benchmark for record in records] == benchmarks
    return {record.benchmark: record for record in records}


CASES = [(task, protocol) for task in TASKS for protocol in protocols(task) if protocol != JUDGED]


@pytest.mark.parametrize(("task", "protocol"), CASES)
def test_gold_answers_score_everything(
    task: str, protocol: str, tmp_path: Path, cache_dir: Path, data_root: Path
) -> None:
    run = base_run(task, protocol, tmp_path / "runs", cache_dir, data_root)
    benchmarks = list(read_config(run).evaluation.benchmarks)
    for name, record in scores(run, True, benchmarks, limit=96).items():
        assert record.accuracy == 1, (name, [index for index, item in enumerate(record.items) if not item])
        assert (record.unparsed, record.fallback) == (0, 0), name
        assert record.n + record.dropped == len(rows_of(read_config(run), read_benchmark(name)))


@pytest.mark.parametrize(("task", "protocol"), CASES)
def test_silence_scores_its_floor(task: str, protocol: str, tmp_path: Path, cache_dir: Path, data_root: Path) -> None:
    """The floor is 0 unless the prompt is read too or an empty answer is correct (ten letters or fewer are safe)."""
    run = base_run(task, protocol, tmp_path / "runs", cache_dir, data_root)
    config = read_config(run)
    whole = config.evaluation.searched == "whole"
    for name, record in scores(run, False, list(config.evaluation.benchmarks), limit=64).items():
        kind = read_benchmark(name).kind
        if kind == "refusal":
            assert whole or record.accuracy == 1
        elif whole:
            assert record.fallback + record.unparsed == record.n
        else:
            assert record.accuracy == 0, name
            assert record.unparsed == (0 if kind == "program" else record.n)


def test_a_finished_score_is_read_where_no_program_can_run(
    tmp_path: Path, cache_dir: Path, data_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = base_run("code_alpaca_6k", "lori", tmp_path / "runs", cache_dir, data_root)
    before = scores(run, True, ["human_eval"], limit=2)
    monkeypatch.setenv("PATH", str(tmp_path))  # a PATH without bubblewrap
    assert scores(run, True, ["human_eval"], limit=2) == before
    with pytest.raises(UserError, match="bwrap is not installed"):
        scores(run, True, ["human_eval"], limit=3)


@pytest.mark.slow
def test_the_prompt_fallback_floor_of_the_release(tmp_path: Path, cache_dir: Path, data_root: Path) -> None:
    """All rows of the seven full test sets, as the released evaluator reads answers without the phrase."""
    run = base_run("commonsense_74k", "diablo_release", tmp_path / "runs", cache_dir, data_root)
    for name, record in scores(run, False, list(PROMPT_FLOOR), limit=None).items():
        assert round(100 * record.accuracy, 1) == PROMPT_FLOOR[name], name
        assert record.fallback == record.n


@pytest.mark.slow
@pytest.mark.parametrize(
    ("protocol", "n", "dropped"), [("lori", 1280, 39), ("diablo_release", 1312, 7), ("diablo", 1319, 0)]
)
def test_gsm8k_whole(protocol: str, n: int, dropped: int, tmp_path: Path, cache_dir: Path, data_root: Path) -> None:
    """Reference answers score 100 % of the scored rows; without an answer the question is parsed, if searched."""
    run = base_run("gsm8k", protocol, tmp_path / "runs", cache_dir, data_root)
    gold = scores(run, True, ["gsm8k"], limit=None)["gsm8k"]
    assert (gold.accuracy, gold.n, gold.dropped) == (1, n, dropped)
    config = read_config(run)
    silent = scores(base_run("gsm8k", protocol, tmp_path / "silent", cache_dir, data_root), False, ["gsm8k"], None)
    rows = rows_of(config, read_benchmark("gsm8k"))[:n]
    numbers = [re.findall(r"-?\d+\.?\d*", row["instruction"].replace(",", "")) for row in rows]
    expected = [
        bool(found) and float(found[-1]) == float(row["answer"]) for found, row in zip(numbers, rows, strict=True)
    ]
    assert silent["gsm8k"].accuracy == (sum(expected) / n if protocol != "diablo" else 0)
