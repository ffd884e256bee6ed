"""The signals that tell a run to stop: SIGTERM, and SIGUSR1, which Slurm sends before a time limit.

Where nothing is lost (loading, tokenising, scoring: files are written under a temporary name and renamed) the signal is
raised as `Preempted` at once. A training and a chunk of a generation finish their step first, and then check.
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
    signal = 0  # the first one received, or 0
    raises = False  # whether to raise it at once


def listen() -> None:
    """Record the signals from now on. Signal handlers belong to the main thread; in others this does nothing."""
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            signal.signal(number, _note)


def pending_signal() -> str | None:
    """Return the name of the received signal, or None."""
    return signal.Signals(_Request.signal).name if _Request.signal else None


def acknowledge() -> None:
    """Clear the signal, which has been handled. A later one is left to the next stage of this process."""
    _Request.signal = 0


def raise_immediately(raises: bool) -> None:
    """Set whether a signal is raised wherever it arrives; one received earlier is raised here."""
    _Request.raises = raises
    if raises and _Request.signal:
        _Request.raises = False
        raise Preempted


@contextmanager
def deferred() -> Generator[None, None, None]:
    """Finish the body without interruption; signals are raised before and after it."""
    raise_immediately(True)
    _Request.raises = False
    yield
    raise_immediately(True)


@contextmanager
def listening() -> Generator[None, None, None]:
    """Listen in the body, then restore the handlers, so that a command that already listens continues to do so."""
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
    """Return whether any process of the training got a signal; all of them get the same answer at the same step."""
    import torch.distributed

    if torch.distributed.is_initialized():
        number = torch.tensor(_Request.signal, device=device)
        torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX)  # pyright: ignore[reportUnknownMemberType]
        _Request.signal = int(number)
    return bool(_Request.signal)


def _note(number: int, _: Any) -> None:
    _Request.signal = _Request.signal or number
    if _Request.raises:
        _Request.raises = False  # signals are repeated, and unwinding must not be interrupted
        raise Preempted
