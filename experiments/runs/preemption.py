"""The signals that ask a run to stop: SIGTERM, and SIGUSR1, which Slurm sends ahead of a time limit.

Where nothing is lost (loading, tokenising, scoring: files are written aside and renamed) the request is raised
as `Preempted` at once. A training and a chunk of a generation finish their step first, and then look.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from experiments.errors import Preempted

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class _Request:
    signal = 0  # the first that came, 0 while none did
    raises = False  # whether it is raised at once


def listen() -> None:
    """From now on the signals are noted. Signal handlers belong to the main thread; in others this does nothing."""
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            signal.signal(number, _note)


def pending_signal() -> str | None:
    """The name of the signal that came."""
    return signal.Signals(_Request.signal).name if _Request.signal else None


def acknowledge() -> None:
    """The request was met. One that came too late to be is left to the next stage of this process."""
    _Request.signal = 0


def raise_immediately(raises: bool) -> None:
    """Whether a signal is raised where it meets the program; one that was noted before is raised here."""
    _Request.raises = raises
    if raises and _Request.signal:
        _Request.raises = False
        raise Preempted


@contextmanager
def deferred() -> Generator[None, None, None]:
    """What is begun is finished; signals are raised before and after it."""
    raise_immediately(True)
    _Request.raises = False
    yield
    raise_immediately(True)


@contextmanager
def listening() -> Generator[None, None, None]:
    """Listen, and leave the handlers as they were: a command that listens all along goes on doing so."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    listen()
    try:
        yield
    finally:
        _Request.raises = False
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler)


def agreed(device: Any) -> bool:
    """Whether any process of the training was asked to stop: all of them get the same answer at the same step."""
    import torch.distributed

    if torch.distributed.is_initialized():
        number = torch.tensor(_Request.signal, device=device)
        torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX)  # pyright: ignore[reportUnknownMemberType]
        _Request.signal = int(number)
    return bool(_Request.signal)


def _note(number: int, _: Any) -> None:
    _Request.signal = _Request.signal or number
    if _Request.raises:
        _Request.raises = False  # signals are repeated, and what unwinds is not to be interrupted
        raise Preempted
