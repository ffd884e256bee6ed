"""Two stages on real weights: learning rates chosen on real rows kept out of training, from plan to report."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch

from analysis.load import load_runs, records
from experiments.data.prompts import IGNORED, encode
from experiments.data.rows import training_rows
from experiments.models.load import load_base
from experiments.plan.choose import stages
from experiments.plan.compose import run_paths
from experiments.reproduce.run import reproduce
from experiments.runs.records import read_json
from experiments.speed import timing
from experiments.train import methods
from tests.real_runs import keep_shortest_rows, settings

pytestmark = pytest.mark.real

FILE = """
title: Two stages on real weights
learning_rate_by: loss
grids:
  - method=lora,diablo recipe.learning_rate=1e-4,3e-3
"""


def test_rates_are_chosen_by_the_held_out_rows_with_grouping_by_length(
    smollm2_slice: list[str], tmp_path: Path, data_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_shortest_rows(monkeypatch, 24)
    monkeypatch.setattr(timing, "measure_step_times", partial(timing.measure_step_times, rounds=1))
    file = tmp_path / "two_stages.yaml"
    file.write_text(FILE, encoding="utf-8")
    few = ["task.data.heldout=8", "recipe.max_steps=4", "evaluation.benchmarks=[mawps]"]
    overrides = [*smollm2_slice, *settings(tmp_path, data_root), *few]
    page = reproduce(str(file), overrides, tmp_path / "report")
    found = stages([f"experiment={file}", *overrides])
    assert (len(found.rate_search), len(found.final), found.undecided) == (4, 2, [])

    losses: dict[str, dict[float, float]] = {}
    for tried in found.tried:
        config = tried.config
        assert config.recipe.group_by_length
        kept, held_out = training_rows(config.task.data, str(data_root))
        assert (len(kept), len(held_out)) == (16, 8)
        base, tokenizer = load_base(config)
        examples = encode(config.protocol, tokenizer, held_out)
        lengths = [len(example.input_ids) for example in examples]
        assert lengths != sorted(lengths)  # unsorted, so that scoring in sorted order could mix them up
        rows = read_json(run_paths(config).held_out)
        assert rows["targets"] == [sum(label != IGNORED for label in example.labels) for example in examples]
        if tried.chosen:  # equal row by row to the loaded adapter's predictions
            model = methods.load(config.method, base, run_paths(config).adapter, merge=False).eval()
            for example, nll in zip(examples, rows["nll"], strict=True):
                ids, labels = torch.tensor([example.input_ids]), torch.tensor([example.labels])
                with torch.no_grad():
                    loss = model(input_ids=ids, labels=labels).loss * (labels != IGNORED).sum()
                assert loss.item() == pytest.approx(nll, rel=1e-4)
        assert tried.held_out is not None
        loss = sum(rows["nll"]) / sum(rows["targets"])
        assert tried.held_out["loss"] == pytest.approx(loss, rel=1e-5)
        losses.setdefault(config.method.label, {})[config.recipe.learning_rate] = loss
    best = {label: min(by_rate, key=lambda rate: by_rate[rate]) for label, by_rate in losses.items()}
    assert {config.method.label: config.recipe.learning_rate for config in found.final} == best

    for config in found.final:
        choice = json.loads(run_paths(config).learning_rate.read_text(encoding="utf-8"))
        tried = {entry["learning_rate"]: entry["loss"] for entry in choice["tried"]}
        assert tried == pytest.approx(losses[config.method.label], rel=1e-5)
        assert len(list(run_paths(config).evaluations())) == 1
    frame = load_runs(run_paths(config).root for config in found.final).frame
    assert {row["label"]: float(row["learning_rate"]) for row in records(frame)} == best
    assert {row["rate_chosen"] for row in records(frame)} == {"best of 2 by held-out loss, at the edge"}
    assert "learning_rates.csv has every one that was tried" in page.read_text(encoding="utf-8")
    assert len((tmp_path / "report" / "learning_rates.csv").read_text(encoding="utf-8").splitlines()) == 5
