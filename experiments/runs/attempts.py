"""One attempt at a stage of a run: its lock, its heartbeat, its line in `attempts.json`, and how it ended.

lock            who writes in the directory now (experiments/runs/lock.py)
heartbeat.json  where the stage is, once per second; the same file shows others that its writer lives
attempts.json   every attempt: who, when, and `how` it ended: finished, preempted or failed; null for one that was
                killed or still runs
preempted.json  there while a stage that was asked to stop waits to be continued
"""

from __future__ import annotations

import gc
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Generator
from contextlib import contextmanager, suppress
from typing import Any

from experiments.errors import Preempted, UserError, out_of_memory
from experiments.runs import preemption
from experiments.runs.lock import holds, identity, locked
from experiments.runs.records import RunPaths, write_atomically

INTERVAL = 1.0  # seconds between two beats
# What makes a stage smaller and may change in a run that is planned. recipe.micro_batch_size decides which rows share
# a batch, and so is part of the run id.
LESS_MEMORY = {
    "train": "plan it again with runtime.gradient_checkpointing=true and it goes on, or share the model among more "
    "GPUs (runtime.sharding=full and torchrun --nproc_per_node N, or cluster.gpus=N), or plan another run with a "
    "smaller recipe.micro_batch_size; with --workers, give fewer",
    "eval": "give a smaller evaluation.batch_size; with --workers, give fewer",
}


class Heartbeat:
    """Written by a thread of its own, so that a long step or a slow disk neither stops it nor waits for it."""

    def __init__(self, run: RunPaths, stage: str) -> None:
        self.run, self.who = run, {"stage": stage, **identity()}
        self.step: int | None = None
        self._steps: int | None = None
        self._tokens = 0
        self._begun: tuple[float, int, int] | None = None  # the clock, step and tokens at the first step seen
        self._lock, self._beat = "", 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def at(self, step: int, steps: int, tokens: int = 0) -> None:
        """Where the stage is: so many steps of so many done, and tokens seen."""
        if self._begun is None or step < self._begun[1]:  # or another benchmark has begun
            self._begun = (time.monotonic(), step, tokens)
        self.step, self._steps, self._tokens = step, steps, tokens

    def start(self, lock: str) -> None:
        self._lock, self._beat = lock, json.loads(lock)["beat"]
        self._write()
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()
        self._write()

    def _run(self) -> None:
        while not self._stop.wait(INTERVAL):
            if not holds(self.run, self._lock):  # this process was stopped so long that it was given up
                print(f"{self.run.root}: another process took over its lock: stopping", file=sys.stderr, flush=True)
                os._exit(1)
            self._write()

    def _write(self) -> None:
        speed: dict[str, float | None] = {"tokens_per_second": None, "eta_seconds": None}
        if self._begun and self.step is not None and self._steps is not None and self.step > self._begun[1]:
            seconds = time.monotonic() - self._begun[0]
            speed["eta_seconds"] = round((self._steps - self.step) * seconds / (self.step - self._begun[1]), 1)
            if self._tokens:
                speed["tokens_per_second"] = round((self._tokens - self._begun[2]) / seconds, 1)
        self._beat += 1
        content = {**self.who, "step": self.step, "steps": self._steps, **speed, "beat": self._beat}
        aside = self.run.heartbeat.with_name(".heartbeat.json")
        with suppress(OSError):  # a full disk shall not stop a run that has nothing else to write
            aside.write_text(json.dumps({**content, "time": time.time()}) + "\n", encoding="utf-8")
            os.replace(aside, self.run.heartbeat)


@contextmanager
def attempt(run: RunPaths, stage: str, wait_for_holder: bool = False) -> Generator[Heartbeat, None, None]:
    """The body is an attempt at a stage. Asked to stop by a signal, it ends with `Preempted` and leaves a marker.

    Of several processes the first alone writes; loading is not interrupted there, for the others would wait for ever.
    `wait_for_holder`: another process that is at the run is waited for, instead of failing.
    """
    heart, writes = Heartbeat(run, stage), os.environ.get("RANK", "0") == "0"
    with preemption.listening():
        try:
            if writes:
                with locked(run, wait_for_holder=wait_for_holder) as lock, _recorded(run, heart):
                    heart.start(lock)
                    try:
                        preemption.raise_immediately(os.environ.get("WORLD_SIZE", "1") == "1")
                        with _memory_errors_explained(run, stage):
                            yield heart
                    finally:
                        preemption.raise_immediately(False)
                        heart.stop()
            else:
                with _memory_errors_explained(run, stage):
                    yield heart
        except (Exception, Preempted) as error:
            preemption.raise_immediately(False)
            if not _is_preemption(error):
                raise
            signal = preemption.pending_signal()
            preemption.acknowledge()
            if writes:
                count = sum(entry["how"] == "preempted" for entry in _read_attempts(run))
                marker = {"count": count, "stage": stage, "step": heart.step, "signal": signal, "time": time.time()}
                write_atomically(run.preempted, json.dumps(marker) + "\n")
            where = "" if heart.step is None else f" at step {heart.step}"
            raise Preempted(f"{run.root}: {stage} stopped by {signal}{where}") from error


@contextmanager
def _memory_errors_explained(run: RunPaths, stage: str) -> Generator[None, None, None]:
    """Out of memory becomes one line that names what to change, and what the stage held is free for the next one."""
    try:
        yield
    except Exception as error:
        memory = out_of_memory(error)
        if memory is None:
            raise
        traceback.clear_frames(error.__traceback__)
        gc.collect()
        raise UserError(f"{run.root}: {stage}: {memory}: {LESS_MEMORY[stage]}") from error


@contextmanager
def _recorded(run: RunPaths, heart: Heartbeat) -> Generator[None, None, None]:
    """Append the attempt to `attempts.json`, and say at its end how it went."""
    entry: dict[str, Any] = {**heart.who, "started": time.time(), "ended": None, "how": None, "error": None}
    attempts = [*_read_attempts(run), entry]
    _write_attempts(run, attempts)
    run.preempted.unlink(missing_ok=True)
    try:
        yield
        entry["how"] = "finished"
    except BaseException as error:
        entry["how"] = "preempted" if _is_preemption(error) else "failed"
        if entry["how"] == "failed":
            name = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            entry["error"] = (name + str(error)).strip().splitlines()[-1]
        raise
    finally:
        entry["ended"] = time.time()
        with suppress(OSError):  # what ended the attempt is to be told, not that the disk is full
            _write_attempts(run, attempts)


def _is_preemption(error: BaseException) -> bool:
    """A library that is interrupted may end otherwise, as a server whose workers got the signal too."""
    return isinstance(error, Preempted) or (
        preemption.pending_signal() is not None and not isinstance(error, UserError)
    )


def _read_attempts(run: RunPaths) -> list[dict[str, Any]]:
    try:
        return json.loads(run.attempts.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    except ValueError as error:
        raise UserError(f"{run.attempts}: not valid JSON ({error}): delete it") from None


def _write_attempts(run: RunPaths, attempts: list[dict[str, Any]]) -> None:
    write_atomically(run.attempts, json.dumps(attempts, indent=1) + "\n")
