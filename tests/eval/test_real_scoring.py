"""Every kind of benchmark on real rows, with an adapter on real weights: completions stored, scored and rescored."""

from __future__ import annotations

from pathlib import Path

import pytest

from eval.benchmarks import read_benchmark
from eval.rescore import rescore
from eval.run import evaluate
from experiments.runs.evaluations import TASKS
from experiments.runs.records import EvalRecord, read_json, read_lines, read_record
from experiments.train.run import train
from tests.conftest import planned
from tests.real_runs import keep_shortest_rows, settings

pytestmark = pytest.mark.real

RUNS = {  # task: a small source of its rows, a protocol, benchmarks, completions of a row
    "commonsense_74k": ("arc_easy", "diablo", ["arc_easy", "winogrande"], 1),
    "math_10k": ("mawps", "pyreft", ["mawps", "aqua"], 1),
    "gsm8k": ("mawps", "diablo", ["gsm8k", "math"], 1),
    "code_alpaca_6k": ("code_alpaca_2k", "lori", ["human_eval"], 2),
    "safety_7k": ("safety_refusals", "lori_completion", ["advbench", "xstest_safe"], 1),
}


def test_every_kind_is_here() -> None:
    kinds = {read_benchmark(path.stem).kind for path in TASKS.glob("*.yaml")}
    kinds.remove("likelihood")  # tests/eval/test_likelihood.py
    assert {read_benchmark(name).kind for _, _, names, _ in RUNS.values() for name in names} == kinds


@pytest.mark.parametrize("task", RUNS)
def test_a_few_rows_of_every_kind(
    task: str, smollm2_slice: list[str], tmp_path: Path, data_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, protocol, benchmarks, samples = RUNS[task]
    keep_shortest_rows(monkeypatch)
    run = planned(
        [
            *smollm2_slice, *settings(tmp_path, data_root),
            *("method=diablo", "recipe.learning_rate=3e-3", "recipe.max_steps=2"),
            *(f"task={task}", f"task.data.source={source}", f"protocol={protocol}"),
            *(f"evaluation.benchmarks=[{','.join(benchmarks)}]", f"evaluation.generation.samples={samples}"),
        ]
    )  # fmt: skip
    trained = train(run)
    records = evaluate(run)
    assert [record.benchmark for record in records] == benchmarks
    folders = {read_json(paths.plan)["benchmark"]: paths for paths in run.evaluations()}
    for record in records:
        paths = folders[record.benchmark]
        assert read_record(paths.score, EvalRecord) == record
        assert (record.n, record.identity, record.adapter_files) == (4, False, trained.adapter_files)
        header, *lines = read_lines(paths.samples)
        assert header["dtype"] == record.dtype == "float32"
        assert [line["index"] for line in lines] == [row for row in range(4) for _ in range(samples)]
        assert any(line["completion"] for line in lines)
        assert len(record.items) == 4
        assert all(0 <= item <= 1 for item in record.items)
    before = {paths.score: paths.score.read_bytes() for paths in folders.values()}
    assert {new.benchmark: old == new for old, new in rescore(run)} == dict.fromkeys(benchmarks, True)
    assert {path: path.read_bytes() for path in before} == before
