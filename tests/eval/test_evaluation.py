"""Evaluation of a run: settings and folders, chunks and resuming, stored completions, and errors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from eval import generate as generate_module
from eval.backends import load
from eval.rescore import main as rescore_main
from eval.rescore import rescore
from eval.run import evaluate
from experiments.runs.attempts import attempt
from experiments.runs.config_files import config_hash, read_config, run_id, write_config
from experiments.runs.records import EvalPaths, RunPaths, read_json, trained_record
from experiments.settings import with_values
from experiments.train.run import train
from tests.conftest import planned

Fails = Callable[[Callable[[], object]], str]
SAMPLED = [
    *("evaluation.generation.samples=3", "evaluation.generation.temperature=0.7", "evaluation.generation.top_p=0.95"),
    *("evaluation.batch_size=6", "evaluation.limit=10"),  # chunks of 8 rows × 3 samples
]


def copied(run: RunPaths, folder: Path) -> RunPaths:
    return RunPaths(Path(shutil.copytree(run.root, folder / run.root.name)))


def test_other_generation_settings_get_their_own_folder(finished: RunPaths, tmp_path: Path) -> None:
    run = copied(finished, tmp_path)
    (first,) = evaluate(run)
    (second,) = evaluate(run, ["evaluation.generation.max_new_tokens=4"])
    folders = list((run.root / "eval" / "arith").iterdir())
    assert len(folders) == 2
    assert all(folder.name.startswith("plain-") for folder in folders)
    assert (first.n, second.n) == (28, 28)
    assert second.generation["generation"]["max_new_tokens"] == 4


def test_scores_are_recomputed_from_samples(finished: RunPaths, tmp_path: Path) -> None:
    run = copied(finished, tmp_path)
    (score,) = run.root.glob("eval/*/*/score.json")
    samples = score.with_name("samples.jsonl")
    lines = samples.read_text(encoding="utf-8").splitlines()
    right = [json.loads(line) for line in lines[1:]]
    for line in right[:7]:
        line["completion"] = f"#### {line['answer']}"
    samples.write_text(
        "".join(f"{line}\n" for line in [lines[0], *(json.dumps(line) for line in right)]), encoding="utf-8"
    )
    score.unlink()
    (record,) = evaluate(run)
    assert record.items == [1] * 7 + [0] * 21
    assert record.accuracy == 7 / 28


def test_evaluation_before_training_is_refused(small: list[str], fails_with: Fails) -> None:
    run = planned(small)
    assert "not trained yet: run `python -m experiments.train" in fails_with(lambda: evaluate(run))
    assert [path.name for path in run.root.iterdir()] == ["config.yaml"], "it counts as no attempt"
    with attempt(run, "train"):
        assert "is being written by" in fails_with(lambda: evaluate(run))


def test_a_changed_adapter_is_refused(finished: RunPaths, tmp_path: Path, fails_with: Fails) -> None:
    run = copied(finished, tmp_path)
    shutil.rmtree(run.root / "eval")
    weights = run.adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    assert "not what training wrote" in fails_with(lambda: evaluate(run))
    weights.unlink()
    assert "missing" in fails_with(lambda: evaluate(run))


def test_an_adapter_without_effect_is_not_scored(finished: RunPaths, tmp_path: Path, fails_with: Fails) -> None:
    from experiments.runs.records import file_hash

    run = copied(finished, tmp_path)
    shutil.rmtree(run.root / "eval")
    weights = run.adapter / "adapter_model.safetensors"
    from safetensors.torch import save_file

    save_file({name: torch.zeros_like(tensor) for name, tensor in load_file(weights).items()}, weights)
    record = json.loads(run.train_record.read_text(encoding="utf-8"))
    record["adapter_files"][weights.name] = file_hash(weights)
    run.train_record.write_text(json.dumps(record), encoding="utf-8")
    said = fails_with(lambda: evaluate(run))
    assert "still computes the same as its base" in said
    assert "--allow-identity" in said
    (score,) = evaluate(run, allow_identity=True)
    assert score.identity


def test_zero_steps_are_the_base_and_need_to_be_allowed(small: list[str], fails_with: Fails) -> None:
    """An adapter trained for zero steps equals the base, and is scored only if a setting allows it."""
    run = planned([*small, "method=lora", "recipe.max_steps=1", "recipe.learning_rate=0"])
    train(run)
    assert "changed nothing" in fails_with(lambda: evaluate(run))
    pissa = planned(
        [*small, "method=pissa", "recipe.max_steps=1", "recipe.learning_rate=0"]
    )  # changes the base by rounding errors
    train(pissa)
    assert "changed nothing" in fails_with(lambda: evaluate(pissa))
    base = planned([*small, "method=base"])
    train(base)
    (of_base,), (of_adapter,) = evaluate(base), evaluate(run, allow_identity=True)
    assert of_base.identity  # the base itself needs no permission
    assert of_base.items == of_adapter.items


def test_a_model_that_computes_nan_is_not_scored(finished: RunPaths, tmp_path: Path, fails_with: Fails) -> None:
    """Finite blocks so large that the model's outputs are not finite."""
    run = copied(finished, tmp_path)
    trained, file = trained_record(run), run.adapter / "adapter_model.safetensors"
    save_file({key: torch.full_like(tensor, 3e38) for key, tensor in load_file(file).items()}, file, {"format": "pt"})
    message = fails_with(lambda: load(read_config(run), run, trained, allow_identity=False))
    assert message.startswith(f"{run.root.name}: with {run.adapter} the model computes NaN in float32: a larger")


def test_an_adapter_of_another_base_is_refused(finished: RunPaths, tmp_path: Path, fails_with: Fails) -> None:
    """The same adapter files under a config with a differently pretrained base."""
    config = read_config(finished)
    config = with_values(config, {"model.pretraining.seed": 9})
    config = with_values(config, {"run_id": run_id(config.mapping)})
    other = RunPaths(tmp_path / config.run_id)
    shutil.copytree(finished.root, other.root)
    shutil.rmtree(other.root / "eval")
    write_config(other, config.mapping)
    record = read_json(other.train_record)
    other.train_record.write_text(
        json.dumps(record | {"run_id": config.run_id, "config_hash": config_hash(config.mapping)}), encoding="utf-8"
    )
    assert "was trained on a base model with hash" in fails_with(lambda: evaluate(other))


def evaluation_of(run: RunPaths) -> EvalPaths:
    (paths,) = run.evaluations()
    return paths


class Killed(BaseException):
    """Simulates the death of the process: no code may catch it."""


def stop_after(chunks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    complete = generate_module._complete
    done = []

    def stopping(*arguments: Any) -> Any:
        if len(done) == chunks:
            raise Killed
        done.append(arguments)
        return complete(*arguments)

    monkeypatch.setattr(generate_module, "_complete", stopping)


@pytest.mark.parametrize("settings", [["evaluation.batch_size=4"], SAMPLED], ids=["greedy", "sampled"])
def test_an_interrupted_generation_ends_as_one_that_was_not(
    settings: list[str], finished: RunPaths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after a chunk and again while writing the next one: the same completions, bit for bit."""
    whole, stopped = copied(finished, tmp_path / "whole"), copied(finished, tmp_path / "stopped")
    for run in (whole, stopped):
        shutil.rmtree(run.root / "eval")
    evaluate(whole, settings)
    with monkeypatch.context() as patch:
        stop_after(1, patch)
        with pytest.raises(Killed):
            evaluate(stopped, settings)
    paths = evaluation_of(stopped)
    assert [path.name for path in paths.chunks.iterdir()] == ["00000.jsonl"]
    (paths.chunks / ".00001.jsonl.abc").write_text("half a li", encoding="utf-8")  # left by a killed write
    torch.manual_seed(99)  # a resumed process has another random state
    evaluate(stopped, settings)
    completions = [
        [json.loads(line) for line in evaluation_of(run).samples.read_text(encoding="utf-8").splitlines()[1:]]
        for run in (whole, stopped)
    ]
    assert completions[0] == completions[1]
    assert len(completions[0]) == (30 if settings is SAMPLED else 28)
    assert not paths.chunks.exists()
    if settings is SAMPLED:
        by_row: dict[int, set[str]] = {}
        for line in completions[0]:
            by_row.setdefault(line["index"], set()).add(line["completion"])
        assert any(len(texts) > 1 for texts in by_row.values())  # samples of one row differ


def test_several_samples_are_a_share_of_right_ones(finished: RunPaths, tmp_path: Path) -> None:
    run = copied(finished, tmp_path)
    shutil.rmtree(run.root / "eval")
    (record,) = evaluate(run, SAMPLED)
    assert (record.n, record.samples, len(record.items)) == (10, 3, 10)
    assert record.dropped == 18


def test_completions_of_other_weights_are_refused(finished: RunPaths, tmp_path: Path, fails_with: Fails) -> None:
    """After retraining a run, neither its old score nor its old completions are used for the new weights."""
    run = copied(finished, tmp_path)
    paths = evaluation_of(run)
    plan = read_json(paths.plan)
    paths.plan.write_text(json.dumps(plan | {"adapter_files": {"adapter_model.safetensors": "0"}}), encoding="utf-8")
    assert f"{paths.root}: made with other weights than" in fails_with(lambda: evaluate(run))
    paths.score.unlink()
    assert "made with other weights than" in fails_with(lambda: evaluate(run))


def test_a_generation_goes_on_as_it_was_begun(
    finished: RunPaths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_with: Fails
) -> None:
    """Another batch size rounds differently: refused during a generation, accepted before it starts."""
    run = copied(finished, tmp_path)
    shutil.rmtree(run.root / "eval")
    for chunks in (0, 1):
        with monkeypatch.context() as patch:
            stop_after(chunks, patch)
            with pytest.raises(Killed):
                evaluate(run, [f"evaluation.batch_size={4 + chunks}"])
    assert "was started with another batch_size" in fails_with(lambda: evaluate(run, ["evaluation.batch_size=6"]))
    (record,) = evaluate(run, ["evaluation.batch_size=5"])
    assert record.batch_size == 5


def test_completions_that_were_asked_the_same_are_not_generated_again(
    finished: RunPaths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another way of parsing the same completions gets its own folder and generates nothing."""
    run = copied(finished, tmp_path)
    stop_after(0, monkeypatch)
    (record,) = evaluate(run, ["evaluation.parser.number=last_number"])
    first, second = run.evaluations()
    assert first.samples.read_text(encoding="utf-8") == second.samples.read_text(encoding="utf-8")
    assert record.parser == "last_number"


def test_rescoring_needs_no_model(finished: RunPaths, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = copied(finished, tmp_path)
    shutil.rmtree(run.adapter)
    paths = evaluation_of(run)
    score = paths.score.read_bytes()
    ((before, after),) = rescore(run)
    assert before == after
    assert paths.score.read_bytes() == score
    record = read_json(paths.score)
    paths.score.write_text(json.dumps(record | {"items": [1.0] * 28, "accuracy": 1.0}), encoding="utf-8")
    rescore_main([str(run.root)])
    assert "was 100.00%" in capsys.readouterr().out
    assert paths.score.read_bytes() == score


def test_half_the_completions_are_not_scored(finished: RunPaths, tmp_path: Path, fails_with: Fails) -> None:
    run = copied(finished, tmp_path)
    paths = evaluation_of(run)
    paths.samples.write_text(
        "".join(paths.samples.read_text(encoding="utf-8").splitlines(keepends=True)[:-3]), encoding="utf-8"
    )
    paths.score.unlink()
    assert "does not have the completions of its plan" in fails_with(lambda: rescore(run))


def test_only_evaluation_settings_may_change(finished: RunPaths, fails_with: Fails) -> None:
    assert "a run's config is frozen" in fails_with(lambda: evaluate(finished, ["recipe.learning_rate=1"]))
    said = fails_with(lambda: evaluate(finished, ["protocol=lori"]))
    assert "task arith has no protocol 'lori': it has plain" in said


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("evaluation.parser.number=last_numbr", "did you mean last_number or"),
        ("evaluation.searched=prompt", "evaluation.searched='prompt': it must be one of completion, whole, "),
        ("evaluation.limit=0", "evaluation.limit=0: it must be a whole number of at least 1, or a map"),
        ("evaluation.batch_size=1,2", "a comma makes several"),
        ("protocol=plain,lori", "protocol=plain,lori: name one"),
        ("evaluation.generation.temperature=0.7", "one sample is decoded greedily, not sampled"),
        ("evaluation.backend=vlm", "evaluation.backend='vlm': it must be one of hf, vllm"),
        ("evaluation.benchmarks=[arit]", "did you mean arith"),
    ],
)
def test_bad_settings_are_told_before_anything_is_generated(
    override: str, message: str, finished: RunPaths, tmp_path: Path, fails_with: Fails
) -> None:
    run = copied(finished, tmp_path)
    assert message in fails_with(lambda: evaluate(run, [override]))
    assert len(run.evaluations()) == 1


def test_a_completion_needs_room(finished: RunPaths, fails_with: Fails) -> None:
    said = fails_with(lambda: evaluate(finished, ["evaluation.generation.max_new_tokens=1024"]))
    assert "leaves no room for a prompt in the model's context of 1024 tokens" in said


def test_cut_prompts_are_counted(finished: RunPaths, tmp_path: Path) -> None:
    """Completions of 1,000 tokens leave 24 for the prompt: all prompts are truncated on the left, and recorded."""
    run = copied(finished, tmp_path)
    (record,) = evaluate(run, ["evaluation.generation.max_new_tokens=1000", "evaluation.limit=2"])
    assert record.cut_prompts == 2
    (record,) = evaluate(run, ["evaluation.generation.max_length=20", "evaluation.limit=2"])
    assert record.cut_prompts == 2
    assert record.unparsed == 2
