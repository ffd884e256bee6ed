"""The parts of a GPU session, each in a separate process, so that a crash affects only its own part."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from experiments import ROOT
from experiments.runs.records import read_json, write_atomically

PARTS = ("correctness", "methods", "resume", "speed", "queue")
START_UP = 20.0  # seconds needed to import, initialise CUDA and do anything
SHUT_DOWN = 4.0  # seconds reserved for a part to write its record and exit
GRACE = 10.0  # seconds between asking a part to stop and killing it
Config = dict[str, Any]


def run_parts(options: argparse.Namespace, arguments: list[str]) -> list[Config]:
    """Run all parts in order and return, for each, its status, its reason unless finished, and its seconds."""
    deadline = time.time() + 60 * options.minutes
    options.out.mkdir(parents=True, exist_ok=True)
    summary: list[Config] = []
    for part in options.parts:
        reason = _why_not(part, options, deadline, summary)
        if reason:
            outcome: Config = {"part": part, "status": "left out", "reason": reason, "seconds": 0.0}
        else:
            outcome = _run_part(part, options.out, arguments, deadline)
        summary.append(outcome)
        write_atomically(options.out / "gpu.json", json.dumps(summary, indent=1) + "\n")
        told = f": {outcome['reason']}" if outcome["reason"] else ""
        print(f"{part}: {outcome['status']}{told} ({outcome['seconds']:.0f} s)", flush=True)
    return summary


def _why_not(part: str, options: argparse.Namespace, deadline: float, summary: list[Config]) -> str | None:
    """Return why a part is left out, or None."""
    if part == "queue" and options.queue is None:
        return "no --queue EXPERIMENT is given"
    if deadline - time.time() < START_UP:
        return "no time is left"
    if options.device != "cpu" and any(outcome["status"] == "failed" for outcome in summary):
        failure = probe(options.device, options.out, min(60.0, deadline - time.time()))
        if failure:
            return f"CUDA no longer answers: {failure}"
        if deadline - time.time() < START_UP:
            return "no time is left"
    return None


def _run_part(part: str, out: Path, arguments: list[str], deadline: float) -> Config:
    """Run one part in its own process group, which is ended when the time is up."""
    started, path, log = time.time(), out / f"{part}.json", out / f"{part}.log"
    keep_earlier(path)
    command = [
        sys.executable,
        "-m",
        "experiments.gpu",
        *arguments,
        "--part",
        part,
        "--until",
        str(deadline - SHUT_DOWN),
    ]
    with log.open("w", encoding="utf-8") as errors:
        process = subprocess.Popen(
            command, cwd=ROOT, env=_environment(out), stdin=subprocess.DEVNULL, stderr=errors, start_new_session=True
        )
        in_time = True
        try:
            process.wait(max(0.0, deadline - time.time()))
        except subprocess.TimeoutExpired:
            in_time = False
        finally:
            _end(process)
    record: Config = read_json(path) if path.is_file() else {"part": part, "items": []}
    ended = record.get("status", "running") != "running"  # the part wrote it, with every item done or left out
    if not ended and not in_time:
        record |= {"status": "stopped", "reason": f"the time was up in {record.get('item') or 'its start'}"}
    elif not ended:
        record |= {"status": "failed", "reason": _last_line(log, process.returncode)}
    record["seconds"] = round(time.time() - started, 1)
    write_atomically(path, json.dumps(record, indent=1) + "\n")
    return {key: record.get(key) for key in ("part", "status", "reason", "seconds")}


def keep_earlier(path: Path) -> None:
    """Rename an existing record so that its name includes its start time."""
    if path.is_file():
        stamp = str(read_json(path).get("started", "earlier")).replace(":", "")
        path.replace(path.with_name(f"{path.stem}-{stamp}.json"))


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ask the whole group to stop (a training stops at its next step), and kill what remains after a while."""
    for number, patience in ((signal.SIGTERM, GRACE), (signal.SIGKILL, GRACE)):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(patience)


def _last_line(log: Path, status: int) -> str:
    """Return the last line of a process's log, or its signal or status if there is none."""
    lines = log.read_text("utf-8", "replace").strip().splitlines()
    if status < 0:
        return f"ended by {signal.Signals(-status).name}"
    return lines[-1].removeprefix("error: ") if lines else f"ended with status {status}"


def probe(device: str, out: Path, patience: float) -> str | None:
    """Return what is wrong with the device, using a new process: after some errors the old one cannot use it."""
    name = "cuda" if device == "auto" else device
    code = f"import torch; torch.ones(1, device={name!r}).sum().item()"
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], env=_environment(out), capture_output=True, timeout=patience, check=False
        )
    except subprocess.TimeoutExpired:
        return f"no answer in {patience:.0f} s"
    lines = done.stderr.decode("utf-8", "replace").strip().splitlines()
    return (lines[-1] if lines else f"status {done.returncode}") if done.returncode else None


def _environment(out: Path) -> dict[str, str]:
    """Return the environment of the parts: no network, and caches and temporary files under `out`."""
    cache, scratch = out.resolve() / "cache", out.resolve() / "tmp"
    scratch.mkdir(parents=True, exist_ok=True)
    folders = {
        "TMPDIR": scratch,  # torch.compile writes there too
        "XDG_CACHE_HOME": cache,
        "TRITON_CACHE_DIR": cache / "triton",
        "CUDA_CACHE_PATH": cache / "cuda",
        "MPLCONFIGDIR": cache / "matplotlib",
        "HF_DATASETS_CACHE": cache / "datasets",
    }
    settings = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONDONTWRITEBYTECODE": "1"}
    return {**os.environ, **settings, **{name: str(folder) for name, folder in folders.items()}}
