"""One attempt at a stage of a run: lock, heartbeat, entry in `attempts.json`, and how it ended.

lock            who is writing in the directory (experiments/runs/lock.py)
heartbeat.json  progress of the stage, once per second; also shows others that its writer is alive
attempts.json   every attempt: who, when, and `how` it ended: finished, preempted or failed; null if it was killed or
                is still running
preempted.json  exists while a stopped stage waits to be resumed
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
# How to make a stage smaller with settings that a planned run may change. recipe.micro_batch_size is not one: it
# decides which rows share a batch, and so is part of the run id.
LESS_MEMORY = {
    "train": "plan it again with runtime.gradient_checkpointing=true to resume, or share the model among more GPUs "
    "(runtime.sharding=full and torchrun --nproc_per_node N, or cluster.gpus=N), or plan another run with a smaller "
    "recipe.micro_batch_size; with --workers, give fewer",
    "eval": "give a smaller evaluation.batch_size; with --workers, give fewer",
}


class Heartbeat:
    """Writes the heartbeat from its own thread, so that long steps or a slow disk neither stop it nor wait for it."""

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
        """Set the progress: `step` of `steps` done, and tokens seen."""
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
            if not holds(self.run, self._lock):  # this process was suspended so long that its lock was taken over
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
        with suppress(OSError):  # a full disk must not stop a run that has nothing else to write
            aside.write_text(json.dumps({**content, "time": time.time()}) + "\n", encoding="utf-8")
            os.replace(aside, self.run.heartbeat)


@contextmanager
def attempt(run: RunPaths, stage: str, wait_for_holder: bool = False) -> Generator[Heartbeat, None, None]:
    """Run the body as an attempt at a stage. If a signal stops it, it ends with `Preempted` and leaves a marker.

    Of several processes only the first writes; there, loading is not interrupted, or the others would wait forever.
    `wait_for_holder`: wait for another process that works on the run, instead of failing.
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
    """Turn running out of memory into one line that says what to change, and free the stage's memory."""
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
    """Append the attempt to `attempts.json`, and add at its end how it ended."""
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
        with suppress(OSError):  # the error to report is the one that ended the attempt, not a full disk
            _write_attempts(run, attempts)


def _is_preemption(error: BaseException) -> bool:
    """Return whether a signal ended the attempt. An interrupted library may raise something else, e.g. if its workers
    got the signal too."""
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
