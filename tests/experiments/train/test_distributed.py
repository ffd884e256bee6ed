"""Two gloo processes on the CPU train as one process does on the joined batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import set_seed

from experiments import ROOT
from experiments.runs.records import RunPaths, TrainRecord, read_lines, read_record
from experiments.train import methods
from experiments.train.run import train
from tests.conftest import SMALL, planned
from tests.experiments.train.test_methods import batch, config_of, fresh_base

MODES = ("adapter", "in_place")
METHODS = ("lora", "full", "diablo")

# Everything in one pair of processes, since it takes longer to start one than to use it.
TOGETHER = """
from experiments.errors import prepare_imports
prepare_imports()  # a second of every start
import json, sys, torch, torch.distributed as dist
from pathlib import Path
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from diablo.blocks.in_place import local_shard
from experiments.runs.records import RunPaths
from experiments.train import methods
from experiments.train.__main__ import main
from experiments.train.run import train
from tests.experiments.train.test_distributed import MODES, in_mode
from tests.conftest import SMALL, planned
from tests.experiments.train.test_methods import batch

folder, *runs = map(Path, sys.argv[1:])
for run in runs[:-1]:
    train(RunPaths(run))
rank, mesh = dist.get_rank(), init_device_mesh("cpu", (2,))
rows = torch.cat([batch(), batch().flip(0)])[rank::2]

for mode in MODES:  # gradients
    model = DistributedDataParallel(in_mode(mode))
    for part, sync in ((rows[:1], False), (rows[1:2], False), (rows[2:], True)):
        with model.no_sync() if not sync else torch.enable_grad():
            (model(input_ids=part, labels=part).loss / 3).backward()
    gradients = {name: tensor.grad.tolist() for name, tensor in methods.trained_tensors(model.module).items()}
    (folder / f"{mode}-{rank}.json").write_text(json.dumps(gradients), encoding="utf-8")

for mode in MODES:  # sharded
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
        save_file(state, folder / f"{mode}.safetensors")
        try:
            local_shard(model.get_base_model().model.layers[0].mlp.up_proj.base_layer.weight, 3)
        except RuntimeError as error:
            assert "mode='adapter'" in str(error)
        else:
            raise AssertionError("three blocks were given to two processes")
dist.barrier()
main([str(runs[-1])])  # leaves the group
assert not dist.is_initialized()
"""


@dataclass(frozen=True)
class Together:
    """What two processes wrote, and their runs beside the same runs of one process."""

    folder: Path
    runs: dict[str, tuple[RunPaths, RunPaths]]


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> Together:
    folder = tmp_path_factory.mktemp("together")
    runs = {}
    for method in METHODS:
        arguments = [*SMALL, f"method={method}", "recipe.learning_rate=1e-3", "recipe.micro_batch_size=4"]
        arguments.append(f"runtime.cache_dir={cache_dir}")
        one, two = (planned([*arguments, f"runtime.runs_dir={folder / name}"]) for name in ("one", "two"))
        train(one)
        runs[method] = one, two
    script = folder / "together.py"
    script.write_text(TOGETHER, encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    done = subprocess.run(
        [*command, "--nproc_per_node=2", str(script), str(folder), *(str(two.root) for _, two in runs.values())],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        encoding="utf-8",
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return Together(folder, runs)


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_equal_one(method: str, together: Together) -> None:
    """Same data order, same losses and gradient norms at every step, same weights, up to the order of additions."""
    one, two = together.runs[method]
    assert read_record(two.train_record, TrainRecord).world_size == 2
    for first, second in zip(read_lines(one.metrics), read_lines(two.metrics), strict=True):
        assert second["loss"] == pytest.approx(first["loss"], rel=1e-4)
        assert second["gradient_norms"] == pytest.approx(first["gradient_norms"], rel=1e-3, abs=1e-6)
    name = "model.safetensors" if method == "full" else "adapter_model.safetensors"
    first, second = load_file(one.adapter / name), load_file(two.adapter / name)
    for key, tensor in first.items():
        torch.testing.assert_close(second[key], tensor, atol=1e-4, rtol=1e-3)


def in_mode(mode: str) -> Any:
    """DiaBlo in one forward mode, its blocks not zero."""
    set_seed(1)
    method = config_of("diablo").method
    method = replace(method, adapter={**(method.adapter or {}), "mode": mode, "init_weights": False})
    return methods.attach(method, fresh_base()).eval()


def test_gradients_are_equal_on_both_ranks_and_to_the_joined_batch(together: Together) -> None:
    """With accumulation under no_sync, as Trainer does it."""
    for mode in MODES:
        files = (together.folder / f"{mode}-{rank}.json" for rank in (0, 1))
        first, second = (json.loads(path.read_text(encoding="utf-8")) for path in files)
        assert first == second, mode
        model = in_mode(mode)
        rows = torch.cat([batch(), batch().flip(0)])
        model(input_ids=rows, labels=rows).loss.backward()
        for name, tensor in methods.trained_tensors(model).items():
            torch.testing.assert_close(torch.tensor(first[name]), tensor.grad, atol=1e-6, rtol=1e-4)


def test_a_model_sharded_by_fsdp2_trains_as_one_process_does(together: Together) -> None:
    """In place, each process writes the blocks of its own rows; what is gathered is W0 and D."""
    for mode in MODES:
        state = load_file(together.folder / f"{mode}.safetensors")
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
