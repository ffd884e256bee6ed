"""Run directories read into data frames: complete, missing and damaged records."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from analysis.load import find_runs, load_metrics, load_runs, load_step_times, records
from experiments import ROOT
from experiments.errors import UserError
from experiments.plan.compose import plan, write_runs
from experiments.runs.records import SCHEMA, EvalRecord, RunPaths, read_json, read_record, write_record
from tests.analysis.analysis_runs import LAYERS, MODULES, change, score_file, step_times_file, write_run


def test_a_run_becomes_a_row(tmp_path: Path) -> None:
    run = write_run(tmp_path, "diablo", size=8, seed=3, parameters=20_000, items=[1, 1, 1, 0])
    runs = load_runs([run])
    assert runs.problems == []
    (row,) = records(runs.frame)
    expected = {
        "run_id": run.name,
        "model": "tiny",
        "method": "diablo",
        "label": "diablo-N8",
        "size": "N=8",
        "task": "arith",
        "seed": 3,
        "learning_rate": 1e-3,
        "trainable_parameters": 20_000,
        "percent_of_base": 2.0,
        "steps": 3,
        "train_seconds": 11.0,
        "benchmark": "arith",
        "protocol": "plain",
        "n": 4,
        "accuracy": 0.75,
        "unparsed": 1,
    }
    assert {key: row[key] for key in expected} == expected
    assert list(row["items"]) == [1, 1, 1, 0]


def test_every_method_that_has_a_size_says_it(small: list[str]) -> None:
    """PaCA's size is a rank: PaCA is a method, not a pattern of the ablation."""
    grids = ["method=lora,ia3,full", "method=paca,s2ft,smt,prompt,prefix,bottleneck", "method=sparse,diablo"]
    configs = [config for grid in grids for config in plan([*small, grid, "recipe.learning_rate=1e-3"])]
    frame = load_runs([run.root for run in write_runs(configs)], quiet=True).frame
    assert dict(zip(frame["method"], frame["size"], strict=True)) == {
        **{"lora": "r=6", "ia3": "", "full": "", "paca": "r=12", "s2ft": "down=0.375", "smt": "blocks=108"},
        **{"prompt": "tokens=20", "prefix": "tokens=10", "bottleneck": "width=18"},
        **{"sparse": "random_entry 1/8", "diablo": "N=8"},
    }
    assert frame.loc[frame["pattern"].notna(), "method"].tolist() == ["sparse"]


def test_missing_stays_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    unscored = write_run(tmp_path, "lora")
    untrained = write_run(tmp_path, "dora")
    RunPaths(untrained).train_record.unlink()
    runs = load_runs([unscored, untrained])
    assert runs.frame["accuracy"].isna().tolist() == [True, True]
    assert runs.frame["trainable_parameters"].isna().tolist() == [False, True]
    assert runs.problems == [
        f"{unscored}: no score for arith",
        f"{untrained}: not trained, or not to the end",
        f"{untrained}: no score for arith",
    ]
    assert capsys.readouterr().err.splitlines() == runs.problems


def test_likelihoods_stand_in_a_frame_of_their_own(tmp_path: Path) -> None:
    """No table of accuracies contains them: neither scored, nor planned and missing, nor in the mean of benchmarks."""
    both = write_run(tmp_path, "lora", items=[1, 0], nll=[1.5, 2.5], task="gsm8k")
    plain = write_run(tmp_path, "dora", items=[1, 1], task="gsm8k")
    missing = write_run(tmp_path, "pissa", items=[0, 1], nll=[3.0], task="gsm8k")
    next(missing.glob("eval/gsm8k_nll/*/score.json")).unlink()
    only = write_run(tmp_path, "milora", nll=[0.5, 0.75], task="gsm8k")
    with_mean = write_run(tmp_path, "full", items=[1, 0], mean_with="svamp", nll=[2.0, 3.0], task="gsm8k")
    svamp = RunPaths(with_mean).evaluation("svamp", "plain", {}).score
    svamp.parent.mkdir(parents=True)
    svamp.write_text(next(with_mean.glob("eval/gsm8k/*/score.json")).read_text(encoding="utf-8"), encoding="utf-8")
    change(svamp, benchmark="svamp")
    runs = load_runs([both, plain, missing, only, with_mean], quiet=True)
    assert runs.problems == [
        f"{missing}: no score for gsm8k_nll",
        f"{only}: no score for gsm8k",
    ]
    assert runs.frame["benchmark"].tolist() == ["gsm8k"] * 5 + ["svamp", "mean of 2"]
    assert runs.frame["metric"].dropna().unique().tolist() == ["accuracy"]
    assert runs.frame["accuracy"].dropna().tolist() == [0.5, 1.0, 0.5, 0.5, 0.5, 0.5]
    assert "accuracy" not in runs.likelihood.columns
    rows = records(runs.likelihood)
    assert [row["benchmark"] for row in rows] == ["gsm8k_nll"] * 4
    assert [row["path"] for row in rows] == [both, missing, only, with_mean]
    assert runs.likelihood["nll"].dropna().tolist() == [2.0, 0.625, 2.5]
    assert list(rows[0]["items"]) == [1.5, 2.5]
    assert runs.likelihood["nll"].isna().tolist() == [False, True, False, False]
    with_parameters = {row["run_id"]: row["trainable_parameters"] for row in rows}
    assert set(with_parameters.values()) == {10_000}


def test_the_base_model_has_no_learning_rate_and_no_training_time(tmp_path: Path) -> None:
    (row,) = records(load_runs([write_run(tmp_path, "base", parameters=0, items=[0, 1])]).frame)
    assert row["trainable_parameters"] == 0
    assert pd.isna(row["learning_rate"])
    assert pd.isna(row["train_seconds"])


def half_write(path: Path) -> None:
    path.write_text(path.read_text(encoding="utf-8")[:100], encoding="utf-8")


DAMAGES = {
    "half-written score": lambda run: half_write(score_file(run)),
    "half-written training record": lambda run: half_write(run / "train.json"),
    "binary rubbish": lambda run: score_file(run).write_bytes(b"\xff\xfe\x00"),
    "empty": lambda run: score_file(run).write_text("", encoding="utf-8"),
    "a list": lambda run: score_file(run).write_text("[]", encoding="utf-8"),
    "another schema": lambda run: change(score_file(run), schema=99),
    "a field too many": lambda run: change(score_file(run), unheard_of=1),
    "items that are no numbers": lambda run: change(score_file(run), items=["a", None]),
    "items that do not add up": lambda run: change(score_file(run), accuracy=0.4),
    "another run's score": lambda run: change(score_file(run), run_id="tiny-lora-r7-arith-s9-00000000"),
    "another run's training record": lambda run: change(run / "train.json", run_id="another"),
    "a score of other weights": lambda run: change(
        score_file(run), adapter_files={"adapter_model.safetensors": "0" * 64}
    ),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_record_is_named_and_left_out(tmp_path: Path, damage: Any) -> None:
    run = write_run(tmp_path, items=[1, 0])
    whole = write_run(tmp_path, seed=1, items=[1, 1])
    damage(run)
    runs = load_runs([run, whole])
    bad, good = records(runs.frame)
    assert pd.isna(bad["accuracy"]) or pd.isna(bad["trainable_parameters"])
    assert (good["run_id"], good["accuracy"]) == (whole.name, 1)
    assert all(str(run) in problem and "\n" not in problem for problem in runs.problems)
    assert "json" in runs.problems[0]


@pytest.mark.parametrize("text", ["", "model: [", "seed: 0\n", "just words"])
def test_a_directory_without_a_good_config_is_a_problem(tmp_path: Path, text: str) -> None:
    run = write_run(tmp_path, items=[1, 0])
    (run / "config.yaml").write_text(text, encoding="utf-8")
    runs = load_runs([run, tmp_path / "nothing-here"])
    assert runs.frame.empty
    assert [str(run) in runs.problems[0], "nothing-here" in runs.problems[1]] == [True, True]


def test_an_edited_config_is_left_out(tmp_path: Path) -> None:
    run = write_run(tmp_path, items=[1, 0])
    (run / "config.yaml").write_text(
        (run / "config.yaml").read_text(encoding="utf-8").replace("epochs: 1", "epochs: 2"), encoding="utf-8"
    )
    assert "frozen" in load_runs([run]).problems[0]


def test_a_run_given_twice_is_not_two_seeds(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", items=[1, 0])
    copy = shutil.copytree(run, tmp_path / "b" / run.name)
    runs = load_runs([run, run, copy])
    assert len(runs.frame) == 1
    assert runs.problems == [f"{copy}: the same run as {run}, left out"]


def test_runs_are_found_in_folders(tmp_path: Path) -> None:
    runs = sorted([write_run(tmp_path, seed=0), write_run(tmp_path, seed=1)])
    assert find_runs([tmp_path]) == runs
    assert find_runs(runs) == runs
    with pytest.raises(UserError, match="neither a run directory nor a folder"):
        find_runs([tmp_path / "nowhere"])


def test_metrics_have_a_column_per_tensor(tmp_path: Path) -> None:
    run = RunPaths(write_run(tmp_path, "diablo", steps=5))
    done_again = (
        run.metrics.read_text(encoding="utf-8").splitlines(keepends=True)[3].replace('"loss": 1.0', '"loss": 0.5')
    )
    run.metrics.write_text(run.metrics.read_text(encoding="utf-8") + done_again + '{"step": 6, "lo', encoding="utf-8")
    metrics = load_metrics(run.root)
    assert metrics.index.tolist() == [1, 2, 3, 4, 5]
    assert metrics["loss"].tolist() == [4, 2, 4 / 3, 0.5, 0.8]
    name = "base_model.model.model.layers.3.mlp.down_proj.diablo_blocks.default"
    assert min(metrics[name]) > 0
    scalars = metrics[["loss", "learning_rate", "gradient_norm", "seconds"]]
    assert len(metrics.columns) == len(scalars.columns) + LAYERS * len(MODULES)


def test_metrics_that_do_not_fit_the_record_are_refused(tmp_path: Path) -> None:
    run = RunPaths(write_run(tmp_path))
    run.metrics.write_text('{"step": 1, "loss": 1, "gradient_norms": [1, 2]}\n', encoding="utf-8")
    with pytest.raises(UserError, match="one gradient norm for each of the 16 tensors"):
        load_metrics(run.root)
    run.metrics.unlink()
    with pytest.raises(UserError, match=r"metrics\.jsonl: cannot be read"):
        load_metrics(run.root)


def test_step_times_are_ratios_within_a_round(tmp_path: Path) -> None:
    """The rounds' ratios are 1.1, 1.2, 1.3, 1.4, 1.5."""
    times = load_step_times(step_times_file(tmp_path))
    assert times.ratios.loc["lora-r7", ["median", "low", "high", "rounds"]].tolist() == pytest.approx(
        [1.3, 1.2, 1.4, 5]
    )


@pytest.mark.parametrize("text", ["{}", '{"schema": 2}', '{"schema": 1, "seconds": {"lora-r7": [1]}}', "[]", "words"])
def test_a_file_that_is_no_measurement_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "times.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"times\.json"):
        load_step_times(path)


def test_the_mean_over_benchmarks_needs_them_all(tmp_path: Path) -> None:
    """Two planned benchmarks: the mean exists once both are scored, and weights them equally."""
    run = RunPaths(write_run(tmp_path, items=[1, 1, 1, 0], mean_with="other"))
    frame = load_runs([run.root]).frame
    assert "mean of 2" not in set(frame["benchmark"])
    first = score_file(run.root)
    second = run.evaluation("other", "plain", {}).score
    second.parent.mkdir(parents=True)
    second.write_text(first.read_text(encoding="utf-8"), encoding="utf-8")
    change(second, benchmark="other", items=[0.0, 1.0], n=2, accuracy=0.5, unparsed=2, standard_error=0.125**0.5)
    (row,) = records(load_runs([run.root]).frame.query("benchmark == 'mean of 2'"))
    assert (row["accuracy"], row["n"], row["unparsed"], row["protocol"]) == (0.625, 6, 3, "plain")
    assert row["standard_error"] == pytest.approx((0.125 + 0.75 * 0.25 / 4) ** 0.5 / 2)
    assert [list(part) for part in row["items"]] == [[1, 1, 1, 0], [0, 1]]


def test_a_quick_look_is_no_part_of_a_mean(tmp_path: Path) -> None:
    """A score of few rows neither changes a mean of full scores nor makes a mean itself, which a problem reports."""
    run = RunPaths(write_run(tmp_path, items=[1, 1, 1, 0], mean_with="other"))
    whole = score_file(run.root)
    for benchmark, limit, name in (("other", None, "whole"), ("arith", 2, "quick")):
        copy = run.evaluation(benchmark, "plain", {"name": name}).score
        copy.parent.mkdir(parents=True)
        copy.write_text(whole.read_text(encoding="utf-8"), encoding="utf-8")
        generation = {"limit": limit, "generation": {"max_new_tokens": 32, "num_beams": 1}}
        change(copy, benchmark=benchmark, generation=generation)
    runs = load_runs([run.root])
    assert list(runs.frame["benchmark"]).count("mean of 2") == 1
    change(whole, generation={"limit": None, "generation": {"max_new_tokens": 64, "num_beams": 4}})
    runs = load_runs([run.root])
    assert "mean of 2" not in set(runs.frame["benchmark"])
    assert any("no mean over the 2 benchmarks" in problem for problem in runs.problems)


def test_a_method_that_cannot_be_merged_stands_in_the_table_of_those_that_can(tmp_path: Path, cache_dir: Path) -> None:
    """Whether an adapter was merged into the weights is not part of a protocol."""
    from eval.run import evaluate
    from experiments.plan.compose import plan, write_runs
    from experiments.train.run import train
    from tests.conftest import SMALL

    small = [*SMALL, "seed=0", "recipe.max_steps=2", f"runtime.runs_dir={tmp_path}", f"runtime.cache_dir={cache_dir}"]
    runs = write_runs([*plan([*small, "method=lora,bottleneck"])])
    for run in runs:
        train(run)
        evaluate(run)
    folders = {path.parent.name for run in runs for path in run.root.glob("eval/*/*/score.json")}
    assert len(folders) == 2
    frame = load_runs([run.root for run in runs]).frame
    assert list(frame["method"]) == ["lora", "bottleneck"]
    assert len(set(frame["evaluation"])) == 1


def test_a_record_of_the_schema_before_is_read_under_todays_names(tmp_path: Path) -> None:
    """A score written when `extra_metrics` was called `beside` and `unparsed` was called `no_match`."""
    (old,) = (ROOT / "results" / "quickstart" / "runs").glob("tiny-lora-*s0-*/eval/arith/*/score.json")
    written = read_json(old)
    assert written["schema"] == 4
    record = read_record(old, EvalRecord)
    assert (record.extra_metrics, record.unparsed, record.schema) == (written["beside"], written["no_match"], SCHEMA)
    write_record(tmp_path / "score.json", record)
    assert read_record(tmp_path / "score.json", EvalRecord) == record
    assert "no_match" not in read_json(tmp_path / "score.json")
