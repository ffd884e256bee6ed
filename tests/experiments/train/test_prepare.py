"""Runs of methods that are prepared with data or follow another run, on the real pipeline."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional

from diablo.methods.lora_ga import estimate_gradients
from diablo.methods.smt import choose_blocks
from eval.run import evaluate
from experiments import ROOT
from experiments.config import RunConfig
from experiments.data.prompts import IGNORED, collate, select_rows
from experiments.data.rows import load_rows
from experiments.data.tokens import Examples, tokenised
from experiments.models.load import load_base
from experiments.plan.compose import plan, resolve, resolve_with_hydra, sweep
from experiments.runs.config_files import read_config
from experiments.runs.prerequisite import prerequisite_config, prerequisite_run
from experiments.runs.records import RunPaths, file_hash, read_json, read_lines
from experiments.settings import with_values
from experiments.train import methods
from experiments.train.preparation import Backward, row_steps
from experiments.train.run import train
from tests.conftest import planned
from tests.experiments.runs.test_lock import held_elsewhere
from tests.experiments.train.test_methods import random_backward
from tests.experiments.train.test_run import files_of, train_until

LORI_S = ["method=lori_s", "method.adapter.sparsity=0.8"]


def before(run: RunPaths) -> RunPaths:
    first = prerequisite_run(run, read_config(run))
    assert first is not None
    return first


def test_a_run_trains_the_one_before_it_and_both_are_scored(small: list[str]) -> None:
    run = planned([*small, *LORI_S])
    record = train(run)
    first = before(run)
    assert first == planned([*small, "method=lori_d"])  # as if planned separately
    whole = train(first)
    assert record.changed
    assert record.base_hash == whole.base_hash
    assert record.trainable_parameters == int((1 - 0.8) * whole.trainable_parameters)
    assert record.steps == whole.steps == 16
    for name, factor in load_file(run.adapter / "adapter_model.safetensors").items():
        if "lora_A" in name:  # the same A, so that entries of B correspond
            assert torch.equal(factor, load_file(first.adapter / "adapter_model.safetensors")[name])
    (scored,) = evaluate(run)
    assert scored.n == 28
    assert not scored.identity


def test_the_run_before_is_shared_and_trained_once(small: list[str]) -> None:
    one, other = (planned([*small, *LORI_S, f"recipe.learning_rate={rate}"]) for rate in (1e-2, 1e-1))
    assert one != other
    assert before(one) == before(other)
    train(one)
    times = {path: path.stat().st_mtime_ns for path in before(one).root.rglob("*")}
    train(other)
    assert times == {path: path.stat().st_mtime_ns for path in before(one).root.rglob("*")}
    assert load_lines(one) != load_lines(other)


def test_the_run_before_takes_the_memory_settings_of_the_run_after(small: list[str]) -> None:
    """The same processes train both, so an older sharding setting would not fit them."""
    run = planned([*small, *LORI_S, "runtime.sharding=none"])
    planned([*small, "method=lori_d", "runtime.gradient_checkpointing=true", "runtime.sharding=full"])
    first = read_config(before(run))
    assert (first.runtime.gradient_checkpointing, first.runtime.sharding) == (False, "none")


def load_lines(run: RunPaths) -> list[float]:
    return [line["loss"] for line in read_lines(run.metrics)]


@pytest.mark.parametrize("method", [LORI_S, ["method=lora_ga"]], ids=["lori_s", "lora_ga"])
def test_killed_and_resumed_equals_undisturbed(
    method: list[str], small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [*small, *method, "recipe.adapter_dropout=0.1", "recipe.micro_batch_size=4"]
    whole = planned(arguments)
    record = train(whole)
    assert record.changed
    broken = planned([*arguments, "runtime.checkpoint_every=3", f"runtime.runs_dir={tmp_path / 'broken'}"])
    if method == LORI_S:  # also killed in the first run
        train_until(broken, 7, monkeypatch)
        assert not before(broken).train_record.exists()
        train(before(broken))
        assert train(before(broken)).resumed_at == [6]
        assert files_of(before(broken)) == files_of(before(whole))
    for step in (5, 13):
        train_until(broken, step, monkeypatch)
    assert train(broken).resumed_at == [3, 12]
    assert files_of(broken) == files_of(whole)
    if method != LORI_S:
        (scored,) = evaluate(broken)
        assert not scored.identity


def test_another_start_is_noticed(small: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints are not resumed if different entries are trained."""
    run = planned([*small, *LORI_S, "runtime.checkpoint_every=3"])
    train(before(run))
    train_until(run, 5, monkeypatch)
    change_adapter(before(run))
    assert train(run).resumed_at == []


def change_adapter(run: RunPaths) -> None:
    """Change which entries of the adapter are large, but not how many."""
    path = run.adapter / "adapter_model.safetensors"
    save_file({name: tensor.flip(0).contiguous() for name, tensor in load_file(path).items()}, path)
    record = read_json(run.train_record)
    record["adapter_files"][path.name] = file_hash(path)
    run.train_record.write_text(json.dumps(record), encoding="utf-8")


def test_a_mask_of_another_base_is_refused(small: list[str], fails_with: Callable[[Callable[[], object]], str]) -> None:
    run = planned([*small, *LORI_S])
    first = before(run)
    real = train(first).base_hash
    record = read_json(first.train_record)
    first.train_record.write_text(json.dumps({**record, "base_hash": "0123456789abcdef"}), encoding="utf-8")
    message = fails_with(lambda: train(run))
    assert "mask from another base" in message
    assert "hash 0123456789ab, this run's base has " + real[:12] in message
    first.train_record.write_text(json.dumps(record), encoding="utf-8")
    (first.adapter / "adapter_model.safetensors").write_bytes(b"")
    assert "not what training wrote" in fails_with(lambda: train(run))


def test_a_first_adapter_of_another_size_is_refused(
    small: list[str], fails_with: Callable[[Callable[[], object]], str]
) -> None:
    """`method.…` applies to the method only; settings for both runs are elsewhere."""
    run = planned([*small, *LORI_S, "method.adapter.r=3"])
    assert "in the first run's adapter" in fails_with(lambda: train(run))
    (both,) = plan([*small, *LORI_S, "model.adapter_size.rank=3"])
    method = both.mapping["method"]
    assert method["prerequisite"]["method"]["adapter"]["r"] == method["adapter"]["r"] == 3


@pytest.mark.slow
def test_another_process_at_the_run_before_is_waited_for(small: list[str]) -> None:
    run = planned([*small, *LORI_S])
    command = [sys.executable, "-m", "experiments.train", str(before(run).root)]
    other = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while other.poll() is None and not before(run).heartbeat.is_file():
            time.sleep(0.01)
        assert before(run).lock.is_file()
        train(run)
        assert other.wait(240) == 0
    finally:
        other.kill()
        other.wait()
    attempts = json.loads(before(run).attempts.read_text(encoding="utf-8"))
    assert [entry["pid"] == os.getpid() for entry in attempts] == [False, True]
    assert attempts[0]["how"] == "finished"
    assert train(before(run)).resumed_at == []


def test_processes_that_train_together_do_not_wait(
    small: list[str], monkeypatch: pytest.MonkeyPatch, fails_with: Callable[[Callable[[], object]], str]
) -> None:
    from experiments.runs import lock

    run = planned([*small, *LORI_S])
    monkeypatch.setattr(lock, "_job_gone", lambda job: False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    held_elsewhere(before(run))
    beats = itertools.count()
    read = lock._read
    monkeypatch.setattr(lock, "_read", lambda path: str(next(beats)) if path.name == "heartbeat.json" else read(path))
    assert "is being written by" in fails_with(lambda: train(run))


def torchrun(run: RunPaths) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    done = subprocess.run(
        [*command, "--nproc_per_node=2", "-m", "experiments.train", str(run.root)],
        cwd=ROOT,
        capture_output=True,
        encoding="utf-8",
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("method", [LORI_S, ["method=lora_ga"]], ids=["lori_s", "lora_ga"])
def test_two_processes_equal_one(method: list[str], small: list[str], tmp_path: Path) -> None:
    """The first run is trained in the same process group; all processes prepare equally."""
    arguments = [*small, *method, "recipe.learning_rate=1e-3", "recipe.micro_batch_size=4"]
    one, two = planned(arguments), planned([*arguments, f"runtime.runs_dir={tmp_path / 'two'}"])
    train(one)
    torchrun(two)
    record = train(two)
    assert record.world_size == 2
    assert record.trainable_parameters == train(one).trainable_parameters
    for first, second in zip(read_lines(one.metrics), read_lines(two.metrics), strict=True):
        assert second["loss"] == pytest.approx(first["loss"], rel=1e-3)


@pytest.mark.parametrize(
    "arguments",
    [
        LORI_S,
        ["method=lori_s", "recipe.learning_rate=1e-3", "recipe.epochs=7", "seed=3", "model.adapter_size.rank=2"],
        ["recipe.adapter_dropout=0.1", "method=lori_s", "task=gsm8k", "model=llama3_8b", "protocol=diablo_release"],
    ],
)
def test_the_method_before_is_frozen_with_its_own_learning_rate(arguments: list[str]) -> None:
    (overrides,) = sweep(arguments)
    config = resolve(overrides)
    assert config == resolve_with_hydra(overrides)
    before = config.method.prerequisite
    assert before is not None
    assert config.recipe.learning_rate != before.learning_rate
    shared = [line for line in arguments if not line.startswith(("method", "recipe.learning_rate"))]
    (alone,) = plan([*shared, "method=lori_d"])
    assert prerequisite_config(config) == alone
    assert prerequisite_config(alone) is None


def test_a_method_before_without_a_learning_rate_is_refused(
    fails_with: Callable[[Callable[[], object]], str],
) -> None:
    said = fails_with(lambda: plan(["method=lori_s", "task=metamathqa", "recipe.learning_rate=1e-3"]))
    assert said == (
        "the run that lori_s needs first is set only by configs/method/lori_d.yaml: no learning rate is recorded for "
        "lori_d on metamathqa: add it there"
    )


@pytest.mark.parametrize(
    ("task", "stand_in"),
    [("commonsense_170k", "commonsense_74k"), ("code_alpaca", "code_alpaca_6k"), ("saferpaca", "safety_7k")],
)
def test_a_stand_in_has_the_learning_rates_of_its_task(task: str, stand_in: str) -> None:
    """A method that needs a first run also works on the stand-in tasks."""
    runs = [plan(["method=lori_s", f"task={name}"])[0] for name in (task, stand_in)]
    ours, theirs = ((run.recipe.learning_rate, run.mapping["method"]["prerequisite"]["learning_rate"]) for run in runs)
    assert ours == theirs == (5e-4, 5e-5)


def steps_of(examples: Examples, config: RunConfig, number: int) -> list[list[dict[str, torch.Tensor]]]:
    steps = row_steps(examples, config, partial(collate, pad_token_id=0), torch.device("cpu"))
    return list(itertools.islice(steps, number))


def examples_of(config: RunConfig) -> Examples:
    rows = select_rows(config.protocol, load_rows(config.task.data, "train", None))
    return tokenised(config.protocol, load_base(config)[1], rows, Path(config.runtime.cache_dir))


def test_steps_are_the_examples_in_an_order_of_the_seed(small: list[str]) -> None:
    (config,) = plan([*small, "recipe.batch_size=24", "recipe.micro_batch_size=8"])
    examples = examples_of(config)

    def drawn(seed: int) -> list[torch.Tensor]:
        return [
            batch["input_ids"] for step in steps_of(examples, with_values(config, {"seed": seed}), 5) for batch in step
        ]

    assert [len(batch) for batch in drawn(0)] == [8] * 15  # 64 rows give two steps per epoch, without end
    assert all(torch.equal(*pair) for pair in zip(drawn(0), drawn(0), strict=True))
    assert not torch.equal(drawn(0)[0], drawn(0)[6])
    assert not torch.equal(drawn(0)[0], drawn(1)[0])
    texts = {tuple(examples[index].input_ids) for index in range(len(examples))}
    epoch = [tuple(row[row != 0].tolist()) for batch in drawn(0)[:6] for row in batch]
    assert len(set(epoch)) == 48
    assert set(epoch) <= texts


@pytest.mark.parametrize("grouped", [True, False])
def test_a_step_is_of_batch_size_rows_whatever_the_device_holds(grouped: bool, small: list[str]) -> None:
    """The gradient of the whole batch's mean loss, in float64, from micro-batches of 1, 3 and 12 of 12 rows."""
    found = []
    for size in (1, 3, 12):
        settings = ["recipe.batch_size=12", f"recipe.micro_batch_size={size}", f"recipe.group_by_length={grouped}"]
        (config,) = plan([*small, *settings])
        base: Any = load_base(config)[0].double()
        steps = steps_of(examples_of(config), config, 7)  # into the second epoch
        assert [sum(len(batch["labels"]) for batch in step) for step in steps] == [12] * 7
        backward = Backward(base, iter(steps))
        for _ in steps:
            backward()
        found.append({name: parameter.grad for name, parameter in base.named_parameters()})
    base.zero_grad()
    for (whole,) in steps:  # the last step is one micro-batch
        logits, labels = base(whole["input_ids"], whole["attention_mask"]).logits, whole["labels"]
        functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED).backward()
    for name, parameter in base.named_parameters():
        for gradients in found:
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", ["smt", "lora_ga"])
def test_what_is_prepared_does_not_depend_on_the_micro_batch_size(method: str, small: list[str]) -> None:
    """Compares chosen blocks, or gradients (the signs of LoRA-GA's singular vectors are arbitrary)."""
    found = []
    for size in (2, 4, 8):
        (config,) = plan([*small, f"method={method}", f"recipe.micro_batch_size={size}"])
        base = load_base(config)[0]
        base.requires_grad_(False)
        backward = Backward(base, row_steps(examples_of(config), config, partial(collate, pad_token_id=0), "cpu"))
        adapter: Any = methods.peft_config(config.method.adapter or {})
        if method == "smt":
            found.append(choose_blocks(base, adapter, backward, steps=20, learning_rate=1e-3).blocks)
            continue
        estimate_gradients(base, adapter, backward, iterations=8)
        layers = base.named_modules()
        found.append({name: layer._peft_loraga_grad for name, layer in layers if hasattr(layer, "_peft_loraga_grad")})
    for other in found[1:]:
        if method == "smt":
            assert other == found[0]
        else:
            torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-7)


def test_what_preparing_lacks_is_a_users_error(
    small: list[str], fails_with: Callable[[Callable[[], object]], str]
) -> None:
    (config,) = plan([*small, "method=lora_ga"])
    base, _ = load_base(config)
    assert "lora_ga-r6 on llama: LoRA-GA estimates gradients on 8 batches" in fails_with(
        lambda: methods.attach(config.method, base)
    )
    config = with_values(config, {"method.prepare._target_": "diablo.nothing.prepare"})
    assert "method.prepare._target_=diablo.nothing.prepare: no such function" in fails_with(
        lambda: methods.attach(config.method, base, random_backward(base))
    )


def test_step_times_need_no_data(small: list[str], tmp_path: Path) -> None:
    from experiments.speed.timing import measure_step_times

    configs = [plan([*small, f"method={name}"])[0] for name in ("lori_s", "lora_ga")]
    seconds = read_json(measure_step_times(configs, tmp_path, rounds=1))["seconds"]
    assert set(seconds) == {"floor", "lori_s-r6", "lora_ga-r6"}
