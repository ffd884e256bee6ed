"""Learning rates chosen on held-out rows, and the second stage planned with them."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from analysis.load import load_runs, records
from experiments.config import Data, RunConfig
from experiments.data.rows import load_rows
from experiments.plan.choose import Stages, stages, to_csv, write_choices
from experiments.plan.compose import run_paths, write_runs
from experiments.reproduce.run import reproduce
from experiments.runs.config_files import config_hash
from experiments.runs.records import TrainRecord, read_record, write_atomically
from experiments.train.loss import Targets
from experiments.train.run import train
from tests.conftest import SMALL

FILE = """
title: Two stages
common: model=tiny task=arith seed=3,4
learning_rate_by: {by}
grids:
  - method=lora,diablo recipe.learning_rate={rates}
  - method=base seed=0 recipe.learning_rate=0
"""


@pytest.fixture
def experiment(tmp_path: Path, cache_dir: Path) -> Callable[..., list[str]]:
    """Return a function giving the arguments of a small two-stage experiment in its own folder of runs."""

    def write(rates: str = "1e-3,1e-2,1e-1", by: str = "loss") -> list[str]:
        path = tmp_path / "two_stages.yaml"
        path.write_text(FILE.format(by=by, rates=rates), encoding="utf-8")
        small = [*SMALL, f"runtime.runs_dir={tmp_path / 'runs'}", f"runtime.cache_dir={cache_dir}"]
        return [f"experiment={path}", *small]

    return write


def pretend(config: RunConfig, record: TrainRecord, loss: float | None, exact_match: float) -> None:
    """Write a finished run with these scores on its held-out rows."""
    (run,) = write_runs([config])
    held_out = {"rows": 14, "loss": loss, "exact_match": exact_match}
    about = {"run_id": config.run_id, "config_hash": config_hash(config.mapping)}
    write_atomically(run.train_record, json.dumps({**vars(record), **about, "held_out": held_out}))


@pytest.fixture
def record(finished: Any) -> TrainRecord:
    return read_record(finished.train_record, TrainRecord)


def rates(configs: list[RunConfig]) -> list[tuple[str, float, int]]:
    return [(config.method.name, config.recipe.learning_rate, config.seed) for config in configs]


def choose(arguments: list[str], record: TrainRecord, scores: dict[float, tuple[float | None, float]]) -> Stages:
    for config in stages(arguments).rate_search:
        pretend(config, record, *scores[config.recipe.learning_rate])
    return stages(arguments)


def test_the_first_stage_has_one_seed_and_the_second_waits_for_it(
    experiment: Callable[..., list[str]], record: TrainRecord
) -> None:
    arguments = experiment()
    found = stages(arguments)
    assert rates(found.rate_search) == [(name, rate, 3) for name in ("lora", "diablo") for rate in (1e-3, 1e-2, 1e-1)]
    assert rates(found.final) == [("base", 0, 0)]  # the base has no learning rate
    assert len(found.to_come) == 4
    assert found.undecided[0].startswith("lora-r6 on tiny and arith waits for tiny-lora-r6-arith-s3-")
    for config in found.rate_search[:3]:
        pretend(config, record, {1e-3: 0.5, 1e-2: 0.25, 1e-1: 1.0}[config.recipe.learning_rate], 0.0)
    found = stages(arguments)
    assert rates(found.final) == [("lora", 1e-2, 3), ("lora", 1e-2, 4), ("base", 0, 0)]
    assert len(found.to_come) == 2
    assert found.chosen() == ["lora-r6: learning rate 0.01"]


def test_what_is_best(experiment: Callable[..., list[str]], record: TrainRecord) -> None:
    """The smallest loss, or the largest exact match (ties: the smaller loss); diverged runs are excluded."""
    scores = {1e-3: (0.5, 0.25), 1e-2: (0.75, 0.5), 1e-1: (None, 1.0)}
    found = choose(experiment(), record, scores)
    assert found.chosen()[0] == "lora-r6: learning rate 0.001, the smallest or largest that was tried"
    assert stages(experiment(by="exact_match")).chosen()[0] == "lora-r6: learning rate 0.01"
    found = choose(experiment(by="exact_match"), record, {**scores, 1e-1: (0.125, 0.5)})
    assert rates(found.final)[:2] == [("lora", 1e-1, 3), ("lora", 1e-1, 4)]
    for config in found.rate_search[:2]:
        run_paths(config).learning_rate.write_text("left from a smaller grid", encoding="utf-8")
    write_choices(found)
    kept = [run_paths(config).learning_rate.is_file() for config in found.rate_search[:3]]
    assert kept == [False, False, True]
    table = list(csv.DictReader(to_csv(found).splitlines()))
    assert [(row["learning_rate"], row["loss"], row["chosen"]) for row in table][:3] == [
        *(("0.001", "0.5", "False"), ("0.01", "0.75", "False"), ("0.1", "0.125", "True"))
    ]


def test_bad_input(
    experiment: Callable[..., list[str]], record: TrainRecord, fails_with: Callable[[Callable[[], object]], str]
) -> None:
    said = fails_with(lambda: choose(experiment(), record, dict.fromkeys((1e-3, 1e-2, 1e-1), (None, 0.0))))
    assert said == "lora-r6 on tiny and arith: all learning rates diverged: give smaller ones"
    assert "learning_rate_by: accuracy: known: exact_match, loss" in fails_with(
        lambda: stages(experiment(by="accuracy"))
    )
    said = fails_with(lambda: stages([experiment()[0], "task=gsm8k"]))
    assert "held-out rows: give task.data.heldout=1000" in said


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_reproduce_chooses_trains_and_reports(
    experiment: Callable[..., list[str]], tmp_path: Path, workers: int
) -> None:
    name, *overrides = experiment(rates="1e-3,1e-2")
    name = name.removeprefix("experiment=")
    overrides = [*overrides, "recipe.max_steps=4"]
    page = reproduce(name, overrides, tmp_path / "report", workers=workers)
    found = stages([f"experiment={name}", *overrides])
    assert len(found.rate_search) == 4
    assert len(found.final) == 5
    assert not found.undecided
    for tried in found.tried:
        assert tried.held_out is not None
        assert tried.held_out["rows"] == 14
        scored = list(run_paths(tried.config).evaluations())
        assert bool(scored) == tried.chosen  # only chosen runs are scored on a benchmark
    losses = {tried.chosen: tried.held_out["loss"] for tried in found.tried[:2] if tried.held_out}
    assert losses[True] < losses[False]
    assert len((tmp_path / "report" / "learning_rates.csv").read_text(encoding="utf-8").splitlines()) == 5
    assert "learning_rates.csv has every one that was tried" in page.read_text(encoding="utf-8")
    frame = load_runs(run_paths(config).root for config in found.final).frame
    told = {row["label"]: row["rate_chosen"] for row in records(frame.dropna(subset=["rate_chosen"]))}
    assert told == dict.fromkeys(("lora-r6", "diablo-N8"), "best of 2 by held-out loss, at the edge")
    assert "best of 2 by held-out loss, at the edge" in (tmp_path / "report" / "table.md").read_text(encoding="utf-8")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*.json")}
    reproduce(name, overrides, tmp_path / "report", report_only=True)
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*.json")}


@pytest.mark.parametrize("grouped", ["true", "false"])
def test_a_trained_run_scores_as_its_loaded_adapter_does(grouped: str, small: list[str]) -> None:
    """Compared row by row, without padding, on a freshly loaded base."""
    from experiments.data.prompts import encode
    from experiments.models.load import load_base
    from experiments.plan.compose import plan
    from experiments.train import methods

    (config,) = plan(
        [
            *small,
            "method=diablo",
            "seed=0",
            "recipe.epochs=8",
            "recipe.learning_rate=0.02",
            f"recipe.group_by_length={grouped}",
        ]
    )
    (run,) = write_runs([config])
    held_out = train(run).held_out
    base, tokenizer = load_base(config, "cpu")
    model = methods.load(config.method, base, run.adapter, merge=True).eval()
    loss, tokens = 0.0, 0
    rows = json.loads(run.held_out.read_text(encoding="utf-8"))
    examples = encode(config.protocol, tokenizer, load_rows(config.task.data, "heldout", None))
    for number, example in enumerate(examples):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([example.input_ids])).logits
        scores = Targets(logits, torch.tensor([example.labels]), lambda x: x, logits.shape[-1]).row_scores()[0]
        assert float(scores[0]) == pytest.approx(rows["nll"][number], rel=1e-4)
        assert [int(scores[1]), int(scores[2])] == [rows[key][number] for key in ("targets", "exact")]
        loss, tokens = loss + float(scores[0]), tokens + int(scores[1])
    assert held_out is not None
    assert held_out["rows"] == 14
    assert held_out["loss"] == pytest.approx(loss / tokens, rel=1e-5)


def test_held_out_rows_share_no_question_with_the_training_rows(
    data_root: Path, fails_with: Callable[[Callable[[], object]], str]
) -> None:
    data = Data(("boolq", "arc_challenge"), heldout=50)
    everything = load_rows(replace(data, heldout=0), "train", str(data_root))
    kept, held_out = (load_rows(data, split, str(data_root)) for split in ("train", "heldout"))
    questions = {(row["instruction"], row["input"]) for row in held_out}
    assert len(held_out) == len(questions) == 50
    assert not questions & {(row["instruction"], row["input"]) for row in kept}
    repeated = [row for row in everything if (row["instruction"], row["input"]) in questions]
    assert len(kept) == len(everything) - len(repeated)
    assert load_rows(data, "heldout", str(data_root)) == held_out
    assert all(row in everything for row in held_out)
    said = fails_with(lambda: load_rows(replace(data, heldout=10**6), "train", str(data_root)))
    assert "task.data.heldout=1000000: the training rows ask" in said
