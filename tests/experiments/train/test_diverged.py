"""A training whose loss becomes non-finite is a failed run: stopped, recorded, listed, never scored."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from analysis.load import load_runs
from eval.run import evaluate
from experiments.errors import UserError
from experiments.plan.choose import stages
from experiments.plan.compose import plan, run_paths, write_runs
from experiments.runs.records import RunPaths, read_json
from experiments.train.run import train
from tests.conftest import planned

Fails = Callable[[Callable[[], object]], str]


@pytest.fixture(scope="module")
def diverged(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> RunPaths:
    from tests.conftest import SMALL

    runs = tmp_path_factory.mktemp("diverged")
    settings = [*SMALL, "method=lora", "recipe.learning_rate=1e30", "recipe.warmup_steps=0"]
    run = planned([*settings, f"runtime.runs_dir={runs}", f"runtime.cache_dir={cache_dir}"])
    with pytest.raises(
        UserError, match=r"^diverged in step [2-4]: .* not finite: give a smaller recipe.learning_rate$"
    ):
        train(run)
    return run


def test_it_stops_with_step_and_reason_and_leaves_no_result(diverged: RunPaths, fails_with: Fails) -> None:
    about = read_json(diverged.diverged)
    assert about["step"] in (2, 3, 4)
    assert about["reason"].startswith("the gradient of base_model.")
    assert not diverged.train_record.exists()
    assert not diverged.checkpoints.exists()
    (attempt,) = json.loads(diverged.attempts.read_text(encoding="utf-8"))
    assert attempt["how"] == "failed"
    assert all(
        math.isfinite(json.loads(line)["loss"]) for line in diverged.metrics.read_text(encoding="utf-8").splitlines()
    )
    again = fails_with(lambda: train(diverged))
    assert again == (
        f"diverged in step {about['step']}: {about['reason']}: give a smaller recipe.learning_rate, or delete "
        f"{diverged.diverged} to train it again"
    )
    assert "not trained yet" in fails_with(lambda: evaluate(diverged))


def test_a_report_lists_it(diverged: RunPaths) -> None:
    runs = load_runs([diverged.root], quiet=True)
    assert any(line.startswith(f"{diverged.root}: diverged in step ") for line in runs.problems)
    assert [value == value for value in runs.frame["accuracy"].tolist()] == [False]  # NaN


def test_a_learning_rate_that_diverged_was_tried_and_is_not_chosen(tmp_path: Path, small: list[str]) -> None:
    file = tmp_path / "rates.yaml"
    grid = "method=lora recipe.learning_rate=1e-3,1e-2,1e30 recipe.max_steps=4 recipe.warmup_steps=0"
    file.write_text(f"title: rates\nlearning_rate_by: loss\ngrids:\n  - {grid}\n", encoding="utf-8")
    arguments = [f"experiment={file}", *small]
    first = stages(arguments).rate_search
    for run in write_runs(first)[:2]:
        train(run)
    with pytest.raises(UserError, match="diverged"):
        train(run_paths(first[2]))
    found = stages(arguments)
    assert not found.undecided
    assert len(found.chosen()) == 1
    assert [tried.held_out and tried.held_out["loss"] is None for tried in found.tried] == [False, False, True]


def test_a_loss_that_is_not_finite_with_gradients_that_are(
    small: list[str], monkeypatch: pytest.MonkeyPatch, fails_with: Fails
) -> None:
    from experiments.train.trainer import RunTrainer

    run = planned([*small, "method=diablo"])
    step = RunTrainer.training_step
    monkeypatch.setattr(RunTrainer, "training_step", lambda *given, **more: step(*given, **more) + math.inf)
    assert fails_with(lambda: train(run)) == "diverged in step 1: the loss is inf: give a smaller recipe.learning_rate"


def test_rows_without_a_label_are_counted_and_refused_where_none_is_left(
    small: list[str], capsys: pytest.CaptureFixture[str], fails_with: Fails
) -> None:
    lengths = sorted(len(example) for example in _prompts(small))
    some = planned([*small, "method=diablo", f"protocol.max_length={lengths[len(lengths) // 2]}"])
    record = train(some)
    assert 0 < record.unlabelled < record.examples
    assert f"{record.unlabelled} of {record.examples} training rows have no label" in capsys.readouterr().err
    none = planned([*small, "method=diablo", "protocol.max_length=4"])
    said = fails_with(lambda: train(none))
    assert said == (
        "64 of 64 training rows have no label: their targets are cut off by protocol.max_length=4: increase it"
    )


def _prompts(small: list[str]) -> list[list[int]]:
    from experiments.data.prompts import prompt_text, prompt_tokens
    from experiments.data.rows import load_rows
    from experiments.models.full_precision import base_path, load_tokenizer

    (config,) = plan([*small, "method=diablo"])
    tokenizer = load_tokenizer(config.model, base_path(config))
    rows = load_rows(config.task.data, "train", None)
    return prompt_tokens(tokenizer, [prompt_text(config.protocol, row) for row in rows], True)
