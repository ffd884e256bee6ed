"""Running out of memory gives one line that names the setting to change, with which the run continues."""

from __future__ import annotations

import json
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments import ROOT
from experiments.errors import UserError, out_of_memory
from experiments.plan.compose import plan, write_runs
from experiments.reproduce.workers import Worker
from experiments.runs.attempts import attempt
from experiments.runs.config_files import read_config
from experiments.runs.environment import reset_peak_memory
from experiments.runs.records import RunPaths
from experiments.settings import with_values
from experiments.train.run import train
from tests.conftest import planned

TOO_LARGE = 2**47  # bytes: more than a process can address


def allocate_torch() -> None:
    torch.empty(TOO_LARGE, dtype=torch.uint8)


def allocate_numpy() -> None:
    np.empty(2**60, dtype=np.uint8)


def allocate_python() -> None:
    bytearray(2**62)


@pytest.mark.parametrize(
    ("allocate", "size"),
    [(allocate_torch, "140737488355328 bytes"), (allocate_numpy, "1.00 EiB"), (allocate_python, None)],
)
def test_every_allocator_s_error_is_known(allocate: Callable[[], None], size: str | None) -> None:
    with pytest.raises((RuntimeError, MemoryError)) as caught:
        allocate()
    asked = f" ({size} more were requested)" if size else ""
    assert out_of_memory(caught.value) == f"the machine is out of memory{asked}"


@pytest.mark.parametrize(
    "text",
    [
        "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 139.72 GiB of which 3 MiB is",
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    ],
)
def test_so_are_those_of_a_gpu(text: str) -> None:
    kind = torch.OutOfMemoryError if text.startswith("CUDA out") else RuntimeError
    asked = " (20.00 MiB more were requested)" if "Tried" in text else ""
    assert out_of_memory(kind(text)) == f"the GPU is out of memory{asked}"


@pytest.mark.parametrize("error", [RuntimeError("mat1 and mat2 shapes"), OSError(28, "No space left"), UserError("x")])
def test_other_errors_are_not(error: Exception) -> None:
    assert out_of_memory(error) is None


@pytest.mark.parametrize(
    ("stage", "named"),
    [
        ("train", ["runtime.gradient_checkpointing=true", "recipe.micro_batch_size"]),
        ("eval", ["evaluation.batch_size"]),
    ],
)
def test_an_attempt_that_runs_out_of_memory_says_what_to_change(stage: str, named: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught, attempt(RunPaths(tmp_path), stage):
        allocate_torch()
    line = str(caught.value)
    assert line.startswith(f"{tmp_path}: {stage}: the machine is out of memory (140737488355328 bytes more")
    assert all(setting in line for setting in [*named, "--workers"])
    assert len(line.splitlines()) == 1
    (entry,) = json.loads((tmp_path / "attempts.json").read_text(encoding="utf-8"))
    assert (entry["how"], entry["error"]) == ("failed", line)
    assert not (tmp_path / "lock").exists()


def test_what_the_attempt_held_is_freed(tmp_path: Path) -> None:
    held: list[weakref.ref[torch.Tensor]] = []

    def stage() -> None:
        tensor = torch.ones(10)
        held.append(weakref.ref(tensor))
        allocate_torch()

    with pytest.raises(UserError) as caught, attempt(RunPaths(tmp_path), "train"):
        stage()
    assert caught.value is not None  # its traceback is alive, the tensor is not
    assert held[0]() is None


# Runs a stage's command, `-m module run`, in a process with a limit of bytes beyond those of its libraries.
LIMITED = """\
import resource, runpy, sys, torch, transformers, peft, datasets
sys.argv = sys.argv[2:]  # as `python -m` would have it
taken = 1024 * int(next(line for line in open("/proc/self/status") if line.startswith("VmSize")).split()[1])
resource.setrlimit(resource.RLIMIT_AS, (taken + {bytes}, resource.RLIM_INFINITY))
runpy.run_module(sys.argv[0], run_name="__main__")
"""


@pytest.fixture
def little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Limit the memory of every Python process that commands start."""
    program, python = tmp_path / "limited.py", tmp_path / "python"
    program.write_text(LIMITED.format(bytes=60_000_000), encoding="utf-8")
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{program}" "$@"\n', encoding="utf-8")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # otherwise the script's own folder would be on the path


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="no limit on memory that holds elsewhere")
@pytest.mark.usefixtures("little_memory")
def test_a_run_without_enough_memory_goes_on_with_another_setting(small: list[str]) -> None:
    """As a command and as one of several workers; after planning it again, the same run is trained."""
    overrides = [*small, "recipe.batch_size=64", "recipe.micro_batch_size=64", "method=diablo"]
    run = planned(overrides)
    command = [sys.executable, "-m", "experiments.train", str(run.root)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", check=False, timeout=240)
    assert done.returncode == 1, done.stderr[-2000:]
    line = done.stderr.splitlines()[-1]
    assert line.startswith(f"error: {run.root}: train: the machine is out of memory")
    assert "runtime.gradient_checkpointing=true" in line
    with pytest.raises(UserError) as caught:
        Worker().do(run, score=False)
    assert "train: the machine is out of memory" in str(caught.value)
    assert "--workers" in str(caught.value)
    assert planned([*overrides, "runtime.gradient_checkpointing=true"]) == run
    assert read_config(run).runtime.gradient_checkpointing is True
    assert train(run).steps == 2


def test_a_run_planned_again_takes_the_memory_settings_and_nothing_else(small: list[str]) -> None:
    run = planned(small)
    before = read_config(run)
    others = ["evaluation.limit=3", "runtime.checkpoint_every=7"]
    changed = plan([*small, "runtime.gradient_checkpointing=true", "evaluation.batch_size=3", *others])
    assert write_runs(changed) == [run]
    after = read_config(run)
    changes = {"runtime.gradient_checkpointing": True, "evaluation.batch_size": 3}
    assert after == with_values(before, changes)
    assert after.mapping == with_values(before, changes).mapping


def test_a_worker_that_was_killed_is_told_in_one_line(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A command that kills itself simulates one killed by the kernel."""
    killed = tmp_path / "python"
    killed.write_text("#!/bin/sh\nkill -9 $$\n", encoding="utf-8")
    killed.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(killed))
    with pytest.raises(UserError, match=r"its process was killed, as Linux does .* give fewer --workers"):
        Worker().do(planned(small), score=False)


def test_cuda_is_initialised_before_its_statistics_are_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    """Regression: without a GPU the order of the two calls is checked, which was wrong on the first GPU."""
    called: list[str] = []
    monkeypatch.setattr(torch.cuda, "init", lambda: called.append("init"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: called.append(f"reset {device}"))
    reset_peak_memory("cuda:0")
    assert called == ["init", "reset cuda:0"]


def test_only_one_module_reads_cuda_s_memory_statistics() -> None:
    """Only the module that initialises CUDA before reading them."""
    statistics = ("reset_peak_memory_stats", "max_memory_allocated", "memory_stats", "max_memory_reserved")
    folders = (ROOT / name for name in ("diablo", "experiments", "eval", "analysis", "slurm"))
    sources = [path for folder in folders for path in folder.rglob("*.py")]
    reading = {path.name for path in sources if any(name in path.read_text("utf-8") for name in statistics)}
    assert reading == {"environment.py"}
