"""Worker processes, each of which trains and scores runs one by one, so imports and device start-up happen once.

    python -m experiments.reproduce.workers      # started by experiments/reproduce/run.py, not by hand

A worker prints that it is ready, reads a job per line from standard input, `{"run": DIRECTORY, "score": true}`, and
answers on standard output: `{"outcome": TEXT}`, `{"error": TEXT}` or, if a signal stopped it, `{"preempted": TEXT}`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import IO, Any

from experiments.errors import Preempted, UserError, one_line, run_command
from experiments.runs import preemption
from experiments.runs.records import RunPaths

Answer = dict[str, Any]
READY = "ready"


class Stopped(UserError):
    """A run was not started or not finished because its worker was told to stop."""


@dataclass
class Worker:
    """One process of `threads` threads; replaced by a new one if it dies."""

    threads: int = 1
    process: subprocess.Popen[str] | None = None
    errors: IO[bytes] | None = None
    stopped: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)  # a stopped worker must not start a process

    def do(self, run: RunPaths, score: bool) -> str:
        """Return the outcome of a run. UserError if it failed, or if the process died, e.g. for lack of memory."""
        self.start()
        process = self.process
        if self.stopped or process is None:
            raise Stopped("not started")
        assert process.stdin is not None
        assert process.stdout is not None
        line = ""
        with suppress(OSError, ValueError):  # the process is gone, or its input was closed to stop it
            process.stdin.write(json.dumps({"run": str(run.root), "score": score}) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        answer: Answer = json.loads(line) if line.endswith("\n") else self._of_the_dead(run)
        if "preempted" in answer:
            raise Stopped(f"{answer['preempted']}, the same command resumes")
        if "error" in answer:
            raise Stopped("not started") if self.stopped and not line else UserError(answer["error"])
        return answer["outcome"]

    def stop(self) -> None:
        """Tell the process to stop: a training after its step, with a checkpoint; without a job at once."""
        with self.lock:
            self.stopped = True
        if self.process is not None:
            self.process.terminate()
            with suppress(OSError):
                assert self.process.stdin is not None
                self.process.stdin.close()

    def wait(self) -> None:
        if self.process is not None:
            self.process.wait()
            assert self.process.stdout is not None
            self.process.stdout.close()
        if self.errors is not None:
            self.errors.close()

    def start(self) -> None:
        """Start the process unless it is running or stopped, and wait until it has imported its modules."""
        with self.lock:
            if self.stopped or (self.process is not None and self.process.poll() is None):
                return
            self.errors = tempfile.TemporaryFile()  # noqa: SIM115 (it lives as long as the process)
            self.process = subprocess.Popen(
                [sys.executable, "-m", "experiments.reproduce.workers"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.errors,
                encoding="utf-8",
                env={**os.environ, "OMP_NUM_THREADS": str(self.threads)},
            )
            assert self.process.stdout is not None
        self.process.stdout.readline()  # READY, or nothing if the process died, which the first job reports

    def _of_the_dead(self, run: RunPaths) -> Answer:
        assert self.process is not None
        assert self.errors is not None
        status = self.process.wait()
        if status == -signal.SIGKILL:
            return {
                "error": f"{run.root}: its process was killed, as Linux does when memory runs out: give fewer "
                "--workers, or plan smaller runs"
            }
        self.errors.seek(0)
        lines = self.errors.read().decode("utf-8", "replace").strip().splitlines()
        return {"error": lines[-1].removeprefix("error: ") if lines else f"{run.root}: ended with status {status}"}


def threads_of_each(workers: int) -> int:
    """Return the threads of each worker: OMP_NUM_THREADS if it is set, else an equal share of the processors.

    More threads than processors wait for each other: two workers of two threads take longer than one.
    """
    given = os.environ.get("OMP_NUM_THREADS", "")
    if given.isdecimal():
        return int(given)
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, processors // workers)


def answer(job: dict[str, Any]) -> Answer:
    """Do one job and return its result, whatever happens."""
    from experiments.reproduce.jobs import outcome, train_and_score
    from experiments.runs.environment import free_memory

    try:
        return {"outcome": outcome(*train_and_score(RunPaths(Path(job["run"])), score=job["score"]))}
    except Preempted as stop:
        return {"preempted": str(stop)}
    except Exception as error:
        if not isinstance(error, UserError):
            traceback.print_exc()
        return {"error": one_line(error)}
    finally:
        free_memory()


def main(arguments: list[str]) -> None:
    if arguments:
        raise UserError(
            "experiments.reproduce.workers takes no arguments: it is started by experiments.reproduce --workers"
        )
    preemption.listen()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # keeps the output of libraries out of the answers
    for name in ("experiments.train.run", "eval.run"):  # before the first job, so that its time excludes imports
        import_module(name)

    print(READY, file=answers, flush=True)
    for line in sys.stdin:
        found = answer(json.loads(line))
        with suppress(BrokenPipeError):
            print(json.dumps(found), file=answers, flush=True)
        if "preempted" in found or preemption.pending_signal():
            break


if __name__ == "__main__":
    run_command(main)
