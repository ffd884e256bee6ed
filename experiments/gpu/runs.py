"""The runs of `python -m experiments.gpu`: every method, killed and resumed runs, and the runs of a queue."""

from __future__ import annotations

import argparse
import contextlib
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig

from experiments import ROOT
from experiments.errors import UserError
from experiments.models.full_precision import base_path, load_tokenizer
from experiments.plan.compose import options as choices
from experiments.plan.compose import plan, write_runs
from experiments.reproduce.jobs import Jobs, take_in, train_and_score
from experiments.reproduce.run import execute
from experiments.runs.records import RunPaths, read_lines
from experiments.train.run import train

Config = dict[str, Any]
REAL_MODEL = "smollm2_135m"
FEW_STEPS = [
    *("task=arith", "task.data.train=256", "task.data.heldout=14", "task.data.test=28", "recipe.max_steps=8"),
    *("recipe.epochs=100", "recipe.batch_size=16", "recipe.micro_batch_size=16", "recipe.warmup_steps=2"),
    *("evaluation.limit=16", "evaluation.generation.max_new_tokens=32"),
]
CALIBRATED = ["quantization.calibration.samples=8", "quantization.calibration.length=128"]
QUANTIZED = {  # settings that a quantiser needs; the default method is DiaBlo
    "gptq": CALIBRATED,
    "magr": CALIBRATED,
    "loftq": ["method=lora"],
    "apiq": ["method=lora", "quantization.options.epochs=1", *CALIBRATED],
}
RESUMED = {
    "in place": ["method=diablo"],
    "adapter with dropout": ["method=diablo", "recipe.adapter_dropout=0.1"],
    "LoRA with dropout": ["method=lora", "recipe.adapter_dropout=0.1"],
}
KILLED_AFTER = 10  # steps; there is a checkpoint after every fourth


@dataclass(frozen=True)
class Item:
    """One item of a part. `work` returns what is recorded, including the `line` to print."""

    name: str
    work: Callable[[], Config]
    estimate: float = 0.0  # seconds, until measured
    like_others: bool = True  # whether the part's longest item so far is also an estimate


class ItemFailed(Exception):
    """The result of an item is a failure, which is recorded."""

    def __init__(self, reason: str, result: Config) -> None:
        super().__init__(reason)
        self.result = result


# Methods and resume


def small_model(options: argparse.Namespace) -> list[str]:
    """Return the real model if it loads without a network, else the tiny one after a few pretraining steps."""
    if any(override.startswith("model=") for override in options.overrides):
        return []
    if REAL_MODEL in choices("model"):
        (config,) = plan([f"model={REAL_MODEL}", "task=arith", *options.overrides])
        with contextlib.suppress(OSError, UserError, ValueError):
            path = base_path(config)
            load_tokenizer(config.model, path)
            AutoConfig.from_pretrained(path, revision=config.model.revision)  # pyright: ignore[reportUnknownMemberType]
            return [f"model={REAL_MODEL}"]
    dtype = ["model.dtype=bfloat16"] if options.device != "cpu" else []
    return ["model=tiny", "model.pretraining.steps=50", *dtype]


@contextmanager
def _scratch_run(options: argparse.Namespace, *settings: str) -> Generator[RunPaths, None, None]:
    """Yield a planned run that is deleted afterwards."""
    with tempfile.TemporaryDirectory(dir=options.out / "tmp", ignore_cleanup_errors=True) as folder:
        where = [f"runtime.device={options.device}", f"runtime.runs_dir={folder}"]
        (run,) = write_runs(plan([*small_model(options), *FEW_STEPS, *settings, *options.overrides, *where]))
        yield run


def _train_and_score(options: argparse.Namespace, settings: list[str]) -> Config:
    with _scratch_run(options, *settings) as run:
        trained, (score,) = train_and_score(run, allow_identity=True)
        losses = [line["loss"] for line in read_lines(run.metrics)] if run.metrics.is_file() else []
        result = {
            "run_id": trained.run_id,
            "steps": trained.steps,
            "losses": losses,
            "trainable_parameters": trained.trainable_parameters,
            "forward_modes": sorted(set(trained.forward_modes.values())),
            "train_seconds": trained.train_seconds,
            "step_seconds": trained.step_seconds,
            "peak_memory_bytes": trained.peak_memory_bytes,
            "benchmark": score.benchmark,
            "accuracy": score.accuracy,
            "rows": score.n,
            "identity": score.identity,
            "dtype": score.dtype,
        }
    loss = f"loss {losses[0]:.3f} → {losses[-1]:.3f}, " if losses else ""
    peak = f"{trained.peak_memory_bytes / 1e6:,.0f} MB"
    return {**result, "line": f"{loss}{score.benchmark} {score.shown(score.accuracy)} of {score.n}, {peak}"}


def methods_items(options: argparse.Namespace, _: list[Config]) -> Iterator[Item]:
    for method in choices("method"):
        yield Item(method, partial(_train_and_score, options, [f"method={method}"]))
    for quantizer in choices("quantization"):
        if quantizer != "none":
            settings = ["method=diablo", f"quantization={quantizer}", *QUANTIZED.get(quantizer, [])]
            yield Item(f"on {quantizer}", partial(_train_and_score, options, settings))


def resume_items(options: argparse.Namespace, _: list[Config]) -> Iterator[Item]:
    for name, settings in list(RESUMED.items())[: 1 if options.device == "cpu" else None]:
        yield Item(name, partial(_kill_and_compare, options, settings), 30.0)


def _kill_and_compare(options: argparse.Namespace, settings: list[str]) -> Config:
    """Compare a killed and resumed run with two uninterrupted ones, whose difference is the device's own variation."""
    longer = [*settings, "recipe.max_steps=60", "runtime.checkpoint_every=4"]
    with contextlib.ExitStack() as stack:
        killed, whole, again = (stack.enter_context(_scratch_run(options, *longer)) for _ in range(3))
        _train_and_kill(killed)
        resumed_at = train(killed).resumed_at
        for run in (whole, again):
            train(run)
        adapters = [run.adapter / "adapter_model.safetensors" for run in (whole, killed, again)]
        resumed, repeated = (different_bits(adapters[0], other) for other in adapters[1:])
        first_step = [_first_difference(whole, other) for other in (killed, again)]
    if not resumed_at:
        raise UserError("the killed run did not resume from a checkpoint")
    line = f"killed, resumed at step {resumed_at[-1]}: {_told(resumed)}; two uninterrupted runs: {_told(repeated)}"
    return {
        "resumed_at": resumed_at,
        "resumed": {"bits": resumed, "first_different_step": first_step[0]},
        "repeated": {"bits": repeated, "first_different_step": first_step[1]},
        "line": line,
    }


def _train_and_kill(run: RunPaths) -> None:
    """Start a training in a separate process and kill it some steps after a checkpoint."""
    command = [sys.executable, "-m", "experiments.train", str(run.root)]
    process = subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, encoding="utf-8"
    )
    try:
        while process.poll() is None:
            if run.metrics.is_file() and len(run.metrics.read_text("utf-8").splitlines()) >= KILLED_AFTER:
                break
            time.sleep(0.002)
    finally:
        process.kill()
    _, errors = process.communicate()
    if process.returncode != -signal.SIGKILL:
        last = errors.strip().splitlines()[-1:] or [f"status {process.returncode}"]
        raise UserError(f"the training ended before it could be killed: {last[0]}")


def different_bits(left: Path, right: Path) -> dict[str, int]:
    """Return the number of differing bits per tensor of two safetensors files; equal tensors are left out."""
    from safetensors.torch import load_file  # pyright: ignore[reportUnknownVariableType]

    tensors, others = load_file(left), load_file(right)
    if tensors.keys() != others.keys():
        raise UserError(f"{left} and {right} hold different tensors: {sorted(tensors.keys() ^ others.keys())}")
    found: dict[str, int] = {}
    for name, tensor in tensors.items():
        bits = [t.contiguous().view(-1).view(torch.uint8).numpy() for t in (tensor, others[name])]
        found[name] = int(np.unpackbits(np.bitwise_xor(*bits)).sum())
    return {name: count for name, count in sorted(found.items()) if count}


def _first_difference(left: RunPaths, right: RunPaths) -> int | None:
    """Return the first step whose losses differ."""
    pairs = zip(read_lines(left.metrics), read_lines(right.metrics), strict=True)
    return next((one["step"] for one, other in pairs if one["loss"] != other["loss"]), None)


def _told(bits: dict[str, int]) -> str:
    return f"{sum(bits.values()):,} bits differ in {len(bits)} tensors" if bits else "bit-equal"


# Queue


def queue_items(options: argparse.Namespace, _: list[Config]) -> Iterator[Item]:
    """Yield the unfinished runs of an experiment as one item, in its order, until the time is up."""
    yield Item("runs", partial(_queue, options), like_others=False)


def _queue(options: argparse.Namespace) -> Config:
    where = [f"runtime.runs_dir={options.out / 'runs'}", *options.overrides, f"runtime.device={options.device}"]
    jobs = Jobs([f"experiment={options.queue}", *where], options.until)
    if options.results is not None:
        take_in(jobs.configs, options.results)
    execute(str(options.queue), jobs, options.workers)
    result: Config = {
        "runs": [{"run_id": run_id, "scored": scored, "seconds": round(s, 1)} for (run_id, scored), s in jobs.times()],
        "failed": [f"{run_id}: {error}" for (run_id, _), error in jobs.failed.items()],
        "left_out": len(jobs.left_out),
    }
    if jobs.failed:
        raise ItemFailed(f"{len(jobs.failed)} runs failed; the first: {result['failed'][0]}", result)
    return {**result, "line": f"{len(result['runs'])} runs, {len(jobs.left_out)} did not fit"}
