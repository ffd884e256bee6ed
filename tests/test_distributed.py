"""Two gloo processes on the CPU train as one process does on the joined batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from experiments.plan import plan, write_runs
from experiments.records import RunPaths, TrainRecord, read_lines, read_record
from experiments.train import train

ROOT = Path(__file__).resolve().parent.parent


def torchrun(run: RunPaths) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    done = subprocess.run(
        [*command, "--nproc_per_node=2", "-m", "experiments.train", str(run.root)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("method", ["diablo", "lora", "full"])
def test_two_processes_equal_one(method: str, small: list[str], tmp_path: Path) -> None:
    """Same data order, same losses and gradient norms at every step, same weights, up to the order of additions."""
    arguments = [*small, f"method={method}", "recipe.learning_rate=1e-3", "recipe.micro_batch_size=4"]
    (one,) = write_runs(plan(arguments))
    (two,) = write_runs(plan([*arguments, f"runtime.runs_dir={tmp_path / 'two'}"]))
    train(one)
    torchrun(two)
    assert read_record(two.train_record, TrainRecord).world_size == 2
    for first, second in zip(read_lines(one.metrics), read_lines(two.metrics), strict=True):
        assert second["loss"] == pytest.approx(first["loss"], rel=1e-4)
        assert second["gradient_norms"] == pytest.approx(first["gradient_norms"], rel=1e-3, abs=1e-6)
    name = "model.safetensors" if method == "full" else "adapter_model.safetensors"
    first, second = load_file(one.adapter / name), load_file(two.adapter / name)
    for key, tensor in first.items():
        torch.testing.assert_close(second[key], tensor, atol=1e-4, rtol=1e-3)


GRADIENTS = """
import json, os, sys, torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from experiments import methods
from tests.test_methods import ARCHITECTURE, attached, batch
dist.init_process_group("gloo")
rank = dist.get_rank()
model = DistributedDataParallel(attached("diablo"))
rows = torch.cat([batch(), batch().flip(0)])[rank::2]
for part, sync in ((rows[:1], False), (rows[1:2], False), (rows[2:], True)):
    with model.no_sync() if not sync else torch.enable_grad():
        (model(input_ids=part, labels=part).loss / 3).backward()
gradients = {name: tensor.grad.tolist() for name, tensor in methods.trained_tensors(model.module).items()}
open(os.path.join(sys.argv[1], f"{rank}.json"), "w").write(json.dumps(gradients))
dist.destroy_process_group()
"""


def test_gradients_are_equal_on_both_ranks_and_to_the_joined_batch(tmp_path: Path) -> None:
    """With accumulation under no_sync, as Trainer does it."""
    from experiments import methods
    from tests.test_methods import attached, batch

    script = tmp_path / "gradients.py"
    script.write_text(GRADIENTS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    done = subprocess.run(
        [*command, "--nproc_per_node=2", str(script), str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    model = attached("diablo")
    rows = torch.cat([batch(), batch().flip(0)])
    model(input_ids=rows, labels=rows).loss.backward()
    for name, tensor in methods.trained_tensors(model).items():
        torch.testing.assert_close(torch.tensor(first[name]), tensor.grad, atol=1e-6, rtol=1e-4)
