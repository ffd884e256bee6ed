"""Runs a task of the array: each of its runs through the stages of the manifest. Started by the array's job script.

A warning signal (preemption, the time limit) is passed on to the stage, which stops at its next step, leaves
`preempted.json` in the run directory and exits; the task then requeues itself. Finished stages are skipped, so a
requeued task resumes where it was. A failing run does not stop the task's other runs.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

from experiments.errors import UserError, run_command
from experiments.runs.lock import identity
from experiments.runs.records import RunPaths, write_atomically
from slurm.manifest import Manifest, check_run, is_finished, read_manifest
from slurm.queue import slurm
from slurm.status import last_line, read_attempts

MODULES = {"train": "experiments.train", "eval": "eval.run"}
NEEDED = ("torch", "transformers", "peft", "safetensors", "hydra", "lm_eval")


class Interrupted(Exception):
    """The task was told to stop before its work was done."""


class Worker:
    """Runs one stage at a time and passes signals on to it."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.told_to_stop = False
        self.stage: subprocess.Popen[bytes] | None = None
        for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
            signal.signal(number, self._stop)

    def run(self, run: RunPaths, stage: str) -> None:
        """Run one stage of one run. Raises UserError if it fails, Interrupted if it was stopped."""
        if self.told_to_stop:
            raise Interrupted
        marker = run.root / "preempted.json"
        before = _content(marker)
        log = run.root / "slurm.log"
        with log.open("ab") as file:
            file.write(f"--- {stage}, job {job_id()}, {time.strftime('%Y-%m-%d %H:%M:%S')}\n".encode())
            file.flush()
            self.stage = subprocess.Popen(self._command(run, stage), stdout=file, stderr=subprocess.STDOUT)
            if self.told_to_stop:  # between the check above and the start
                self.stage.send_signal(signal.SIGUSR1)
            status = self.stage.wait()
            self.stage = None
        # Only the marker counts, because launchers change exit statuses. A stage stopped before it could handle signals
        # leaves none.
        if _content(marker) not in (None, before) or (self.told_to_stop and status):
            raise Interrupted
        if status:
            raise UserError(f"{stage} of {run.root.name} failed with status {status}: {last_line(log)}")

    def _command(self, run: RunPaths, stage: str) -> list[str]:
        module = [MODULES[stage], str(run.root)]
        if stage != "train" or self.manifest.processes == 1:
            return [sys.executable, "-m", *module]
        launcher = ["srun", "--kill-on-bad-exit=1", f"--ntasks={self.manifest.processes}"]
        if "SLURM_CPUS_PER_TASK" in os.environ:  # srun does not inherit it from sbatch
            launcher.append(f"--cpus-per-task={os.environ['SLURM_CPUS_PER_TASK']}")
        return [*launcher, sys.executable, "-m", "slurm.rank", *module]

    def _stop(self, number: int, frame: FrameType | None) -> None:
        # May be called several times: Slurm repeats signals to tasks of an array.
        self.told_to_stop = True
        if self.stage is not None:
            self.stage.send_signal(signal.SIGUSR1)


def work(manifest: Manifest, names: list[str]) -> int:
    """Run all stages of these runs. Exit status: 0, also when requeued; 1 if a run failed."""
    worker = Worker(manifest)
    failed = False
    for name in names:
        try:
            run = check_run(manifest, name)
            for stage in manifest.stages:
                if not is_finished(run, stage, manifest.runs[name]):
                    worker.run(run, stage)
        except Interrupted:
            return requeue(worker, names)
        except (UserError, OSError) as error:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
            failed = True
    return int(failed)


def requeue(worker: Worker, names: list[str]) -> int:
    """Requeue only this task, unless Slurm does so itself or someone cancelled it."""
    state = job_state()
    # After a preemption or a node failure Slurm requeues by itself, and a cancelled job must not be requeued. At a time
    # limit Slurm never requeues.
    if state not in ("RUNNING", "TIMEOUT", None):
        print(f"stopped: the job is {state}", flush=True)
        return 1
    restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    if restarts >= worker.manifest.max_requeues:
        why = f"stopped, and not requeued again after {restarts} times (max_requeues): submit again to go on"
        _note_given_up(worker.manifest, names, why)
        raise UserError(why)
    worker.told_to_stop = False
    slurm("scontrol", "requeue", job_id())
    print(f"requeued {job_id()}", flush=True)
    # Slurm now ends this script. If it exited before, the job could be recorded as finished.
    deadline = time.monotonic() + 60
    while not worker.told_to_stop and time.monotonic() < deadline:
        time.sleep(0.1)
    return 0


def _note_given_up(manifest: Manifest, names: list[str], why: str) -> None:
    """Record the failure in every unfinished run of the task, begun or not, for status and retry."""
    for name in names:
        run = RunPaths(Path(manifest.runs_dir) / name)
        left = [stage for stage in manifest.stages if not is_finished(run, stage, manifest.runs[name])]
        if left and run.root.is_dir():
            now = time.time()
            entry = {"stage": left[0], **identity(), "started": now, "ended": now, "how": "failed", "error": why}
            write_atomically(run.attempts, json.dumps([*read_attempts(run), entry], indent=1) + "\n")


def job_id() -> str:
    """Return `<array job>_<task>`: the plain id of an array's last task equals that of the whole array."""
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ["SLURM_JOB_ID"]


def job_state() -> str | None:
    """Return Slurm's state of this job, or None if Slurm does not answer."""
    try:
        shown = slurm("scontrol", "show", "job", "-o", job_id())
    except UserError:
        return None
    return next((word.split("=", 1)[1] for word in shown.split() if word.startswith("JobState=")), None)


def check_environment(manifest: Manifest) -> None:
    """Report in one line, before the first model is loaded, what would stop every run of the array."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"{sys.executable} on this node lacks {', '.join(missing)}: "
            "set `activate` or `python` of the cluster settings to the environment with requirements.txt"
        )
    if not os.access(manifest.runs_dir, os.W_OK):
        raise UserError(f"{manifest.runs_dir} cannot be written on this node: runs_dir must be on a shared disk")


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m slurm.job", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("manifest", type=Path, help="the submission's manifest")
    parser.add_argument("digest", help="hash of the manifest at submission")
    options = parser.parse_args(arguments)
    manifest = read_manifest(options.manifest, options.digest)
    check_environment(manifest)
    if manifest.scratch is not None:
        scratch = os.path.expandvars(manifest.scratch)
        os.makedirs(scratch, exist_ok=True)
        os.environ["TMPDIR"] = scratch
    return work(manifest, manifest.tasks[int(os.environ["SLURM_ARRAY_TASK_ID"])])


if __name__ == "__main__":
    run_command(main)
