# pyright: reportUnknownMemberType=false
"""The processes of one distributed training: waiting for all to start, their devices, and barriers."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed
from torch._C._distributed_c10d import TCPStore
from torch.distributed import DistNetworkError

from experiments.config import Recipe
from experiments.errors import Preempted, UserError
from experiments.runs import preemption
from experiments.runs.sizes import gibibytes

if TYPE_CHECKING:
    pass

# Seconds until a process gives up on others that have not started. The first may wait up to 600 s for the lock of
# an earlier attempt, and a node may import from a slow disk.
JOIN = 900.0
NOTE = 30.0  # seconds between two notes about what is being waited for
POLL = 0.1
_stores: list[TCPStore] = []  # the first process serves it, also to torch, which finds it by its port


@dataclass(frozen=True)
class Member:
    """A process and where it runs."""

    host: str
    device: str
    memory: int  # bytes of its GPU; 0 on a CPU


def world_size() -> int:
    """Return the number of processes of this training."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def accumulation_steps(recipe: Recipe) -> int:
    """Return the micro-batches per step on each process. The batch size is the recipe's, shared by all processes."""
    batch, micro_batch, world = recipe.batch_size, recipe.micro_batch_size, world_size()
    steps, rest = divmod(batch, micro_batch * world)
    if rest or not steps:
        parts = batch // micro_batch if batch % micro_batch == 0 else 0
        known = " or ".join(str(count) for count in range(2, parts + 1) if parts % count == 0)
        told = f"start {known} processes, or plan it" if known else "plan it"
        most = max((size for size in range(1, batch + 1) if batch % (size * world) == 0), default=None)
        raise UserError(
            f"recipe.batch_size={batch} is not a multiple of recipe.micro_batch_size={micro_batch} × {world} "
            f"processes: {told} with " + (f"recipe.micro_batch_size={most}" if most else "another recipe.batch_size")
        )
    return steps


def join(device: torch.device) -> None:
    """Wait for all processes of the training to start, and print a note if their GPUs differ in memory.

    torch itself would wait silently for as long as its collectives may take, i.e. hours.

    Raises:
        UserError: a process did not start within `JOIN` seconds.
    """
    rank, world = int(os.environ.get("RANK", "0")), world_size()
    if world == 1 or torch.distributed.is_initialized():
        return
    deadline = time.monotonic() + JOIN
    store = _connect(rank, world, deadline)
    store.set(f"started/{rank}", json.dumps(asdict(_member(device))))
    keys = [f"started/{other}" for other in range(world)]
    noted = time.monotonic()
    while not store.check(keys):
        if preemption.pending_signal():
            raise Preempted
        missing = [str(other) for other, key in enumerate(keys) if not store.check([key])]
        if missing and time.monotonic() > deadline:
            raise UserError(
                f"process {', '.join(missing)} of {world} did not start within {JOIN:.0f} seconds: look at the log of "
                f"its node, and start the training again"
            )
        if missing and time.monotonic() > noted + NOTE:
            noted = time.monotonic()
            if rank == 0:
                print(f"waiting for process {', '.join(missing)} of {world} to start", file=sys.stderr, flush=True)
        time.sleep(POLL)
    _stores.append(store)
    if rank == 0 and (note := mixed_memory([Member(**json.loads(store.get(key))) for key in keys])):
        print(f"note: {note}", file=sys.stderr, flush=True)


def _connect(rank: int, world: int, deadline: float) -> TCPStore:
    """Return the store through which the processes meet, served by torchrun or else by the first process."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    noted = time.monotonic()
    while not serves and not _is_there(host, port):  # torch's own attempts would each print a stack trace
        if preemption.pending_signal():
            raise Preempted
        if time.monotonic() > deadline:
            raise UserError(
                f"process {rank} of {world} found no process 0 at {host}, port {port}, within {JOIN:.0f} seconds: look "
                f"at the log of that node, and start the training again"
            )
        if time.monotonic() > noted + NOTE:
            noted = time.monotonic()
            print(f"process {rank} of {world} is waiting for process 0", file=sys.stderr, flush=True)
        time.sleep(POLL)
    try:
        return TCPStore(host, port, world, serves, timedelta(seconds=JOIN), wait_for_workers=False, multi_tenant=True)
    except DistNetworkError as error:
        what = "listen on" if serves else "be reached at"
        reason = str(error).splitlines()[0]
        raise UserError(f"process 0 cannot {what} port {port} of {host}: set another MASTER_PORT ({reason})") from None


def _is_there(host: str, port: int) -> bool:
    """Return whether something listens there."""
    try:
        with socket.create_connection((host, port), timeout=5):
            return True
    except OSError:
        return False


def _member(device: torch.device) -> Member:
    if device.type != "cuda":
        return Member(socket.gethostname(), device.type, 0)
    about = cast(Any, torch.cuda.get_device_properties(device))
    return Member(socket.gethostname(), about.name, about.total_memory)


def mixed_memory(members: list[Member]) -> str | None:
    """Return a note about GPUs that differ in memory, although each gets an equal part of the work; else None."""
    ranked = sorted(members, key=lambda member: member.memory)
    least, most = ranked[0], ranked[-1]
    if least.memory >= 0.95 * most.memory:
        return None
    told = [f"{gibibytes(member.memory)} ({member.device} on {member.host})" for member in (least, most)]
    return f"the GPUs of this training differ in memory, from {told[0]} to {told[1]}: the smallest one limits what fits"


def wait_for_everyone() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def leave() -> None:
    """Leave the process group at the end of the process; a second training in it would use the same group."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    _stores.clear()
