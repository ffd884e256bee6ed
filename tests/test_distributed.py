"""Two gloo processes on the CPU train as one process does on the whole batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import set_seed

from experiments import ROOT
from experiments.plan.compose import plan, write_runs
from experiments.runs.records import RunPaths, TrainRecord, read_lines, read_record
from experiments.train import methods
from experiments.train.run import train
from tests.test_methods import batch, config_of, fresh_base

MODES = ("adapter", "in_place")  # in one pair of processes, since starting a pair takes longer than using it


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


@pytest.mark.parametrize("method", ["diablo", "lora", "full"])
def test_two_processes_equal_one(method: str, small: list[str], tmp_path: Path) -> None:
    """Equal data order, losses and gradient norms at every step, and weights, up to the order of summation."""
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
from experiments.train import methods
from tests.test_methods import batch
from tests.test_distributed import MODES, in_mode
dist.init_process_group("gloo")
rank = dist.get_rank()
rows = torch.cat([batch(), batch().flip(0)])[rank::2]
for mode in MODES:
    model = DistributedDataParallel(in_mode(mode))
    for part, sync in ((rows[:1], False), (rows[1:2], False), (rows[2:], True)):
        with model.no_sync() if not sync else torch.enable_grad():
            (model(input_ids=part, labels=part).loss / 3).backward()
    gradients = {name: tensor.grad.tolist() for name, tensor in methods.trained_tensors(model.module).items()}
    open(os.path.join(sys.argv[1], f"{mode}-{rank}.json"), "w").write(json.dumps(gradients))
dist.destroy_process_group()
"""


def in_mode(mode: str) -> Any:
    """Return a DiaBlo model in the given forward mode with non-zero blocks."""
    set_seed(1)
    method = config_of("diablo")["method"]
    method["adapter"] |= {"mode": mode, "init_weights": False}
    return methods.attach(method, fresh_base()).eval()


def run_script(script: Path, code: str) -> subprocess.CompletedProcess[str]:
    """Run the code in two gloo processes."""
    script.write_text(code, encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    return subprocess.run(
        [*command, "--nproc_per_node=2", str(script), str(script.parent)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        encoding="utf-8",
        check=False,
        timeout=240,
    )


def test_gradients_are_equal_on_both_ranks_and_to_the_joined_batch(tmp_path: Path) -> None:
    """With gradient accumulation under no_sync, as Trainer does it."""
    done = run_script(tmp_path / "gradients.py", GRADIENTS)
    assert done.returncode == 0, done.stderr[-3000:]
    for mode in MODES:
        first, second = (json.loads((tmp_path / f"{mode}-{rank}.json").read_text(encoding="utf-8")) for rank in (0, 1))
        assert first == second, mode
        model = in_mode(mode)
        rows = torch.cat([batch(), batch().flip(0)])
        model(input_ids=rows, labels=rows).loss.backward()
        for name, tensor in methods.trained_tensors(model).items():
            torch.testing.assert_close(torch.tensor(first[name]), tensor.grad, atol=1e-6, rtol=1e-4)


SHARDED = """
import sys, torch, torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from diablo.blocks.in_place import local_shard
from tests.test_distributed import MODES, in_mode
from tests.test_methods import batch
dist.init_process_group("gloo")
rank, mesh = dist.get_rank(), init_device_mesh("cpu", (2,))
rows = torch.cat([batch(), batch().flip(0)])[rank::2]
for mode in MODES:
    model = in_mode(mode)
    for layer in model.get_base_model().model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    logits = model(input_ids=batch()).logits
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        state = {"logits": logits.detach(), **{name: tensor.clone() for name, tensor in state.items()}}
        save_file(state, f"{sys.argv[1]}/{mode}.safetensors")
        try:
            local_shard(model.get_base_model().model.layers[0].mlp.up_proj.base_layer.weight, 3)
        except RuntimeError as error:
            assert "mode='adapter'" in str(error)
        else:
            raise AssertionError("three blocks were given to two processes")
dist.barrier()
dist.destroy_process_group()
"""


def test_a_model_sharded_by_fsdp2_trains_as_one_process_does(tmp_path: Path) -> None:
    """In place, each process writes the blocks of its own rows; W0 and D are gathered."""
    done = run_script(tmp_path / "sharded.py", SHARDED)
    assert done.returncode == 0, done.stderr[-3000:]
    for mode in MODES:
        state = load_file(tmp_path / f"{mode}.safetensors")
        model = in_mode(mode)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        rows = torch.cat([batch(), batch().flip(0)])
        for _ in range(3):
            model(input_ids=rows, labels=rows).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        torch.testing.assert_close(state.pop("logits"), model(input_ids=batch()).logits, atol=1e-4, rtol=1e-3)
        expected = model.state_dict()
        assert state.keys() == expected.keys()
        for name, tensor in expected.items():
            if "diablo_" in name:
                torch.testing.assert_close(state[name], tensor, atol=1e-4, rtol=1e-3)
            else:
                assert torch.equal(state[name], tensor), name
