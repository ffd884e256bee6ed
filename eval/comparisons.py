"""Comparisons of many pairs of texts with sympy, each limited in time and memory.

sympy may run forever on a text (9^{9^{9^9}}) and block signals meanwhile, so pairs are compared in separate processes,
one per CPU. The kernel ends a process that exceeds its limit, and another replaces it at once: a fork of a process that
has imported sympy. Time is CPU time, so that load on the machine changes no verdict.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import resource
import selectors
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

from eval.equality import math_verify_equal, milora, milora_with_self_comparison
from experiments import ROOT
from experiments.errors import UserError

# A pair gets QUICK seconds; the first RETRIES pairs that exceed it get SECONDS.
QUICK, SECONDS, RETRIES = 0.5, 5.0, 100
MEMORY = 4 * 2**30  # bytes of address space
UNBOUNDED: dict[str, Callable[[str, str], bool]] = {
    "milora": milora,
    "milora_with_self_comparison": milora_with_self_comparison,
    "math_verify": math_verify_equal,
}
Pair = tuple[str, str]


def compare(name: str, pairs: Sequence[Pair]) -> list[bool | None]:
    """Return the verdict of this comparison on every pair; None if a limit was exceeded."""
    verdicts = _compare(name, dict(enumerate(pairs)), QUICK)
    undecided = [number for number in range(len(pairs)) if verdicts[number] is None]
    verdicts |= _compare(name, {number: pairs[number] for number in undecided[:RETRIES]}, SECONDS)
    return [verdicts[number] for number in range(len(pairs))]


class _Comparer:
    """A process that compares one pair at a time."""

    def __init__(self) -> None:
        root = str(ROOT)
        path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "eval.comparisons"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"},
            start_new_session=True,  # signals to us must not reach it: it ends when its standard input closes
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._pairs, self.verdicts = self._process.stdin, self._process.stdout

    def ask(self, name: str, pair: Pair, seconds: float) -> None:
        try:
            self._pairs.write(json.dumps([name, *pair, seconds]).encode() + b"\n")
            self._pairs.flush()
        except BrokenPipeError:
            raise self._ended() from None

    def verdict(self) -> bool | None:
        line = self.verdicts.readline()
        if not line:
            raise self._ended()
        return json.loads(line)

    def _ended(self) -> UserError:
        return UserError(
            f"the process that compares expressions ended with status {self._process.wait()}: free memory and score "
            "again with `python -m eval.rescore RUN`"
        )

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()


_idle: list[_Comparer] = []  # started earlier, ready for the next pairs


def _compare(name: str, pairs: dict[int, Pair], seconds: float) -> dict[int, bool | None]:
    """Return the verdicts on numbered pairs, each within this many seconds."""
    verdicts: dict[int, bool | None] = {}
    waiting = iter(pairs)
    asked: dict[_Comparer, int] = {}
    try:
        with selectors.DefaultSelector() as selector:
            for number in islice(waiting, len(os.sched_getaffinity(0))):
                comparer = _idle.pop() if _idle else _Comparer()
                asked[comparer] = number
                comparer.ask(name, pairs[number], seconds)
                selector.register(comparer.verdicts, selectors.EVENT_READ, comparer)
            while len(verdicts) < len(pairs):
                for key, _ in selector.select():
                    comparer = key.data
                    verdicts[asked[comparer]] = comparer.verdict()
                    number = next(waiting, None)
                    if number is not None:
                        asked[comparer] = number
                        comparer.ask(name, pairs[number], seconds)
    except BaseException:  # a pending verdict would be taken for another pair's
        for comparer in asked:
            comparer.end()
        raise
    _idle.extend(asked)
    return verdicts


# Code that runs in the process


def main() -> None:
    """Answer lines of [name, left, right, seconds] with true, false, or null if a limit was exceeded."""
    logging.disable()
    importlib.import_module("math_verify")  # fails here if missing; later it would look like a failed comparison

    _warm_up()
    verdicts = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # keeps the output of libraries out of the verdicts
    worker: _Worker | None = None
    for line in sys.stdin.buffer:
        worker = worker or _Worker()
        verdict = worker.compare(line)
        if not verdict:
            worker = None
        verdicts.write(verdict or b"null\n")


class _Worker:
    """A fork of this process that compares until a limit ends it."""

    def __init__(self) -> None:
        pairs, self._pairs = os.pipe()
        self._verdicts, verdicts = os.pipe()
        self._process = os.fork()
        if self._process == 0:
            os.close(self._pairs)
            _work(os.fdopen(pairs, "rb"), verdicts)
            os._exit(0)
        os.close(pairs)
        os.close(verdicts)
        self._lines = os.fdopen(self._verdicts, "rb")

    def compare(self, line: bytes) -> bytes:
        """Return its verdict; empty if the process was ended."""
        os.write(self._pairs, line)
        verdict = self._lines.readline()
        if not verdict:
            os.waitpid(self._process, 0)
            os.close(self._pairs)
            self._lines.close()
        return verdict


def _work(lines: Any, verdicts: int) -> None:
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY if hard == resource.RLIM_INFINITY else min(MEMORY, hard), hard))
    for line in lines:
        name, left, right, seconds = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, seconds)  # its signal ends the process
        try:
            verdict = UNBOUNDED[name](left, right)
        except MemoryError:
            verdict = None
        signal.setitimer(signal.ITIMER_PROF, 0)
        os.write(verdicts, json.dumps(verdict).encode() + b"\n")


def _warm_up() -> None:
    """Import libraries and fill the parsers' caches once for all forks."""
    for left, right in ((r"\frac{x^2+1}{2\sqrt{3}}", r"\frac{\pi}{4}"), ("(1,2)", r"\left(\frac{1}{2},-3\right]")):
        for equal in UNBOUNDED.values():
            equal(left, right)


if __name__ == "__main__":
    main()
