"""Processes that each hold a part of the model (`runtime.sharding=full`) train like one process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from eval.run import evaluate
from experiments import ROOT
from experiments.methods import contract_of
from experiments.plan.compose import options
from experiments.runs.config_files import read_config
from experiments.runs.records import RunPaths, TrainRecord, read_json, read_lines, read_record
from experiments.settings import with_values
from experiments.train import methods
from experiments.train.checkpoint import MANIFEST
from experiments.train.run import train
from experiments.train.sharding import sharding_of
from tests.conftest import planned
from tests.experiments.runs.test_preemption import after, content
from tests.experiments.train.test_methods import config_of, fresh_base
from tests.real_runs import settings

TRAIN = """
import sys
from pathlib import Path
from experiments.errors import prepare_imports
prepare_imports()  # a second of every start
import torch.distributed
from experiments.runs import preemption
from experiments.errors import run_command
from experiments.runs.records import RunPaths
from experiments.train.run import train

def main(paths):
    preemption.listen()
    for path in paths:
        train(RunPaths(Path(path)))
    torch.distributed.destroy_process_group()

run_command(main)
"""
SIX_EPOCHS = ["recipe.epochs=6", "recipe.micro_batch_size=4"]
FLOAT64 = ["model.dtype=float64", "recipe.epochs=1", "recipe.micro_batch_size=2", "recipe.learning_rate=1e-3"]


def start(folder: Path, runs: list[RunPaths], processes: int) -> subprocess.Popen[str]:
    """Start training the runs one after the other in one group of gloo processes."""
    script = folder / "train.py"
    script.write_text(TRAIN, encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    return subprocess.Popen(
        [*command, f"--nproc_per_node={processes}", str(script), *(str(run.root) for run in runs)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
    )


def train_over(folder: Path, runs: list[RunPaths], processes: int = 2) -> None:
    process = start(folder, runs, processes)
    try:
        told, _ = process.communicate(timeout=500)
    finally:
        process.kill()
    assert process.returncode == 0, told[-3000:]


def sharded(arguments: list[str], folder: Path) -> RunPaths:
    return planned([*arguments, "runtime.sharding=full", f"runtime.runs_dir={folder}"])


def assert_equal(one: RunPaths, two: RunPaths, relative: float, sharding: str = "full") -> None:
    """Compare losses and gradient norms at every step, all saved files, and the loss on the held-out rows."""
    steps = list(zip(read_lines(one.metrics), read_lines(two.metrics), strict=True))
    assert steps
    for first, second in steps:
        for key in ("loss", "gradient_norm", "gradient_norms", "learning_rate"):
            assert second[key] == pytest.approx(first[key], rel=relative, abs=relative * 1e-2), (two.root, key)
    assert sorted(path.name for path in two.adapter.iterdir()) == sorted(path.name for path in one.adapter.iterdir())
    for path in one.adapter.iterdir():
        if path.name == "README.md":  # the card has a run's scores, which one of the two may not have yet
            continue
        if path.suffix != ".safetensors":
            assert (two.adapter / path.name).read_bytes() == path.read_bytes(), path
            continue
        tensors, others = load_file(path), load_file(two.adapter / path.name)
        assert others.keys() == tensors.keys(), two.root
        for name, tensor in tensors.items():
            assert others[name].dtype == tensor.dtype
            assert (others[name] - tensor).abs().max() <= relative, (two.root, name)
    first, second = read_record(one.train_record, TrainRecord), read_record(two.train_record, TrainRecord)
    assert second.sharding == sharding
    assert first.sharding == "none"
    assert second.changed
    for key in ("tokens", "steps", "trainable_parameters", "base_parameters", "base_hash", "tensors"):
        assert getattr(second, key) == getattr(first, key), (two.root, key)
    if first.held_out is not None and second.held_out is not None:
        assert second.held_out["loss"] == pytest.approx(first.held_out["loss"], rel=relative)


@pytest.mark.slow
def test_two_processes_equal_one(small: list[str], tmp_path: Path) -> None:
    """With two micro-batches per step and process, with or without activation checkpointing, up to the score."""
    plans = [["method=full"], ["method=full", "runtime.gradient_checkpointing=true"]]
    plans += [["method=diablo", "method.adapter.mode=in_place"]]
    ones = [
        planned([*small, *FLOAT64, *each, f"runtime.runs_dir={tmp_path / f'one{i}'}"]) for i, each in enumerate(plans)
    ]
    twos = [sharded([*small, *FLOAT64, *each], tmp_path / f"two{i}") for i, each in enumerate(plans)]
    train_over(tmp_path, twos)
    for one, two in zip(ones, twos, strict=True):
        assert one.root.name == two.root.name  # sharding does not change the run id
        train(one)
        assert_equal(one, two, 1e-10)
    assert set(read_record(twos[2].train_record, TrainRecord).forward_modes.values()) == {"in_place"}
    for run in (ones[0], twos[0]):
        evaluate(run)
    scores = [content(run)["score.json"]["accuracy"] for run in (ones[0], twos[0])]
    samples = [content(run)["samples.jsonl"] for run in (ones[0], twos[0])]
    assert samples[0] == samples[1]
    assert scores[0] == scores[1]


@pytest.mark.slow
@pytest.mark.parametrize(("sharding", "key"), [("full", "fsdp2"), ("none", "ddp")])
def test_every_method_over_two_processes(sharding: str, key: str, small: list[str], tmp_path: Path) -> None:
    of_method = {"pissa": ["model.dtype=float32"], "smt": ["method.prepare.steps=2"]}
    names = [name for name in options("method") if name != "base" and contract_of(name).get(key, True)]
    arguments = {name: [*small, *FLOAT64, f"method={name}", *of_method.get(name, [])] for name in names}
    settings = [f"runtime.sharding={sharding}", f"runtime.runs_dir={tmp_path / 'two'}"]
    twos = {name: planned([*arguments[name], *settings]) for name in names}
    train_over(tmp_path, list(twos.values()))
    for name, two in twos.items():
        one = planned(arguments[name])
        train(one)
        is_float64 = all("64" in str(t.dtype) for t in load_file(next(one.adapter.glob("*.safetensors"))).values())
        assert_equal(one, two, 1e-10 if is_float64 else 1e-5, sharding)


@pytest.mark.slow
def test_four_processes_and_blocks_that_they_cannot_share(small: list[str], tmp_path: Path) -> None:
    """Each of four processes has two of eight blocks; only two blocks cannot be shared and train beside the weight."""
    plans = [["method=full"], ["method=diablo", "method.adapter.mode=in_place"]]
    plans += [["method=diablo", "method.adapter.num_blocks=2"]]
    plans = [[*small, *FLOAT64, *each] for each in plans]
    fours = [sharded(each, tmp_path / "four") for each in plans]
    train_over(tmp_path, fours, 4)
    for each, four in zip(plans, fours, strict=True):
        one = planned(each)
        train(one)
        assert_equal(one, four, 1e-10)
    modes = [set(read_record(four.train_record, TrainRecord).forward_modes.values()) for four in fours[1:]]
    assert modes == [{"in_place"}, {"adapter"}]


@pytest.mark.slow
def test_bf16_over_float32_master_weights(small: list[str], tmp_path: Path) -> None:
    """Losses are closer to float32 than bf16's rounding; the float32 copy is saved."""
    plans = [[*small, *FLOAT64, f"method={name}", "model.dtype=bfloat16"] for name in ("full", "diablo", "lora")]
    twos = [sharded(each, tmp_path / "two") for each in plans]
    train_over(tmp_path, twos)
    for each, two in zip(plans, twos, strict=True):
        one = planned(each)
        train(one)
        for first, second in zip(read_lines(one.metrics), read_lines(two.metrics), strict=True):
            assert second["loss"] == pytest.approx(first["loss"], rel=1e-2)
        for tensor in load_file(next(two.adapter.glob("*.safetensors"))).values():
            assert str(tensor.dtype) == "torch.float32"
            assert (tensor != tensor.bfloat16().float()).any()  # more precise than bf16


def preempt(folder: Path, run: RunPaths, processes: int, steps: int) -> int:
    """Stop the training by a signal to its first process after `steps` steps; return its checkpoint's step."""
    process = start(folder, [run], processes)
    try:
        while process.poll() is None and not after(steps)(run):
            time.sleep(0.001)
        os.kill(json.loads(run.lock.read_text(encoding="utf-8"))["pid"], signal.SIGUSR1)
        told, _ = process.communicate(timeout=400)
    finally:
        process.kill()
    assert "preempted: " in told, told[-3000:]
    assert run.preempted.is_file()
    return read_json(run.preempted)["step"]


def stopped_equals_undisturbed(arguments: list[str], tmp_path: Path) -> RunPaths:
    """Check that a stopped and resumed run equals an uninterrupted one bit for bit; return the stopped one."""
    whole, broken = sharded(arguments, tmp_path / "whole"), sharded(arguments, tmp_path / "broken")
    train_over(tmp_path, [whole])
    step = preempt(tmp_path, broken, 2, steps=2)
    (checkpoint,) = broken.checkpoints.glob(f"step-{step:08d}")
    parts = [checkpoint / f"{name}-{rank}.safetensors" for name in ("weights", "optimizer") for rank in (0, 1)]
    assert all(part.is_file() for part in parts)
    sizes = [sum(tensor.numel() for tensor in load_file(part).values()) for part in parts]
    trained = sum(sizes[:2])
    assert max(sizes[:2]) <= 0.6 * trained  # each process wrote its half
    train_over(tmp_path, [broken])
    record = read_record(broken.train_record, TrainRecord)
    assert record.resumed_at == [step]
    assert record.trainable_parameters == trained
    assert content(broken) == content(whole)
    return broken


@pytest.mark.slow
def test_a_sharded_run_that_is_stopped_ends_as_if_undisturbed(small: list[str], tmp_path: Path) -> None:
    stopped_equals_undisturbed([*small, "method=diablo", *SIX_EPOCHS, "recipe.adapter_dropout=0.1"], tmp_path)


@pytest.mark.slow
def test_a_checkpoint_of_another_sharding_is_refused(
    small: list[str], tmp_path: Path, fails_with: Callable[[Callable[[], object]], str]
) -> None:
    arguments = [*small, "method=full", *SIX_EPOCHS]
    run = sharded(arguments, tmp_path)
    step = preempt(tmp_path, run, 2, steps=1)
    again = planned([*arguments, f"runtime.runs_dir={tmp_path}"])
    assert again.root == run.root
    assert read_config(run).runtime.sharding == "full"  # planning it again keeps the setting
    planned([*arguments, f"runtime.runs_dir={tmp_path}", "runtime.sharding=none"])
    line = fails_with(lambda: train(again))
    assert "was written by 2 processes with runtime.sharding=full, but these are 1 processes with" in line
    assert f"step-{step:08d}" in line
    assert str(run.checkpoints) in line
    assert (run.checkpoints / f"step-{step:08d}" / MANIFEST).is_file()  # nothing was lost
    sharded(arguments, tmp_path)
    train_over(tmp_path, [run])
    assert read_record(run.train_record, TrainRecord).resumed_at == [step]


def test_what_cannot_be_sharded_is_refused(
    small: list[str], fails_with: Callable[[Callable[[], object]], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = planned([*small, "method=full", "runtime.sharding=full"])
    assert "there is only one: start the training with torchrun" in fails_with(lambda: train(run))
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert sharding_of(read_config(run)) == "full"

    def line(*arguments: str) -> str:
        return fails_with(lambda: sharding_of(read_config(planned([*small, *arguments]))))

    assert "it must be one of auto, none, full" in line("method=full", "runtime.sharding=ful", "seed=1")
    assert "quantised base" in line("method=lora", "runtime.sharding=full", "quantization=rtn")
    assert "spectra" in line("method=lora", "runtime.sharding=full", "spectra.every=2")


def test_blocks_that_processes_cannot_share_are_not_forced_into_the_weight(
    fails_with: Callable[[Callable[[], object]], str],
) -> None:
    config = with_values(config_of("diablo"), {"method.adapter.num_blocks": 2, "method.adapter.mode": "auto"})
    method = config.method
    modes = {shards: methods.forward_modes(methods.attach(method, fresh_base(), shards=shards)) for shards in (1, 2, 3)}
    assert "in_place" in modes[1].values()
    assert modes[2] == modes[1]
    assert set(modes[3].values()) == {"adapter"}
    method = with_values(config, {"method.adapter.mode": "in_place"}).method
    assert "3 processes shard a weight of 2 blocks" in fails_with(
        lambda: methods.attach(method, fresh_base(), shards=3)
    )


@pytest.mark.real
def test_full_fine_tuning_of_real_weights_over_two_and_four_processes(
    smollm2_slice: list[str], tmp_path: Path, data_root: Path
) -> None:
    arguments = [
        *smollm2_slice, *settings(tmp_path, data_root), "method=full", "recipe.learning_rate=1e-4",
        *("recipe.max_steps=3", "task.data.source=mawps", "model.dtype=float64", "recipe.micro_batch_size=1"),
        "evaluation.limit=4",
    ]  # fmt: skip
    one = planned(arguments)
    train(one)
    evaluate(one)
    for processes in (2, 4):
        for sharding in ("full", "none"):
            folder = tmp_path / f"{sharding}{processes}"
            run = planned([*arguments, f"runtime.sharding={sharding}", f"runtime.runs_dir={folder}"])
            train_over(tmp_path, [run], processes)
            assert_equal(one, run, 1e-10, sharding)
            evaluate(run)
            for name in ("accuracy", "loss"):
                assert content(run)["score.json"].get(name) == content(one)["score.json"].get(name)
            assert content(run)["samples.jsonl"] == content(one)["samples.jsonl"]


@pytest.mark.real
def test_full_fine_tuning_of_real_weights_is_stopped_and_ends_as_if_undisturbed(
    smollm2_slice: list[str], tmp_path: Path, data_root: Path
) -> None:
    arguments = [
        *smollm2_slice, *settings(tmp_path, data_root), "method=full", "recipe.learning_rate=1e-4",
        *("recipe.max_steps=8", "task.data.source=mawps"),
    ]  # fmt: skip
    stopped_equals_undisturbed(arguments, tmp_path)
