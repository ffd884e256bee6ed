"""How the processes of one training find each other, and the error if one is missing."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from experiments.train.processes import Member, join, mixed_memory
from experiments.train.run import train
from tests.conftest import planned

ROOT = Path(__file__).resolve().parents[3]
PROCESS = """
import os, sys, time
import torch.distributed
from experiments.train import processes
from experiments.errors import run_command

processes.JOIN, processes.NOTE = float(sys.argv[1]), 0.5

def main(_):
    time.sleep(float(sys.argv[2]))
    processes.join(torch.device("cpu"))
    torch.distributed.init_process_group("gloo")
    torch.distributed.barrier()
    processes.leave()

run_command(main)
"""


def start(folder: Path, rank: int, port: int, seconds: float, late: float) -> subprocess.Popen[str]:
    """Start one of two processes, which waits `seconds` for the other and starts `late` seconds late."""
    script = folder / "process.py"
    script.write_text(PROCESS, encoding="utf-8")
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2"}
    return subprocess.Popen(
        [sys.executable, str(script), str(seconds), str(late)],
        env={**os.environ, "PYTHONPATH": str(ROOT), **where},
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.slow
def test_a_process_that_starts_late_is_waited_for(rank: int, tmp_path: Path) -> None:
    port = free_port()
    processes = [start(tmp_path, each, port, 120, 3.0 if each == rank else 0.0) for each in (0, 1)]
    told = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], told
    waiting = ["waiting for process 1 of 2 to start", "process 1 of 2 is waiting for process 0"]
    assert waiting[1 - rank] in told[1 - rank].splitlines()
    assert waiting[rank] not in told[rank]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.slow
def test_a_process_that_never_starts_is_named(rank: int, tmp_path: Path) -> None:
    process = start(tmp_path, 1 - rank, port := free_port(), 1, 0)
    told = process.communicate(timeout=60)[1].splitlines()
    assert process.returncode == 1
    first = (
        f"process 1 of 2 found no process 0 at 127.0.0.1, port {port}, within 1 seconds: look at the log of that node"
    )
    second = "process 1 of 2 did not start within 1 seconds: look at the log of its node"
    assert told[-1] == f"error: {(first, second)[rank]}, and start the training again"


def test_a_port_that_is_taken(
    monkeypatch: pytest.MonkeyPatch, fails_with: Callable[[Callable[[], object]], str]
) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        settings = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": "0", "WORLD_SIZE": "2"}
        for name, value in settings.items():
            monkeypatch.setenv(name, value)
        line = fails_with(lambda: join(torch.device("cpu")))
    assert line.startswith(f"process 0 cannot listen on port {port} of 127.0.0.1: set another MASTER_PORT (")


def test_gpus_of_mixed_memory_are_noted() -> None:
    big, small = Member("n1", "A100-80", 80 * 2**30), Member("n2", "A100-40", 40 * 2**30)
    almost = Member("n3", "A100-80", 79 * 2**30)  # drivers reserve different amounts
    assert mixed_memory([big, almost]) is None
    assert mixed_memory([Member("n1", "cpu", 0), Member("n2", "cpu", 0)]) is None
    assert mixed_memory([big, small, big]) == (
        "the GPUs of this training differ in memory, from 40.0 GiB (A100-40 on n2) to 80.0 GiB (A100-80 on n1): the "
        "smallest one limits what fits"
    )


def test_a_number_of_processes_that_does_not_divide_the_batch(
    small: list[str], monkeypatch: pytest.MonkeyPatch, fails_with: Callable[[Callable[[], object]], str]
) -> None:
    """Refused immediately, before any process waits for another."""
    run = planned([*small, "method=lora", "recipe.micro_batch_size=4"])
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert fails_with(lambda: train(run)) == (
        "recipe.batch_size=8 is not a multiple of recipe.micro_batch_size=4 × 3 processes: start 2 processes, or "
        "plan it with another recipe.batch_size"
    )
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert fails_with(lambda: train(run)).endswith(": start 2 processes, or plan it with recipe.micro_batch_size=2")
