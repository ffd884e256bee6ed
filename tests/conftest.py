"""Shared fixtures: a base model small enough to make in seconds, and run directories planned on it."""

from __future__ import annotations

import gc
import os
import resource
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

from experiments.runs.environment import device_name
from experiments.runs.records import RunPaths

STARTED = time.monotonic()
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may depend on the network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported: its kernels then run on the CPU

# Property tests use the same examples in every run, so that a failure is caused by the change under test;
# `make test-random` draws ten times as many new examples each time and prints failures, to be added as @example.
# There is no deadline per example, since its duration depends on the machine.
settings.register_profile(
    "fixed", derandomize=True, database=None, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("random", settings.get_profile("fixed"), derandomize=False, max_examples=1000)
settings.load_profile("fixed")

# The model `tiny` after a few steps of pretraining: the same code, seconds instead of a minute.
SMALL = [
    "model.pretraining.steps=4",
    "task.data.train=64",
    "task.data.heldout=14",
    "task.data.test=28",
    "recipe.epochs=2",
    "recipe.batch_size=8",
    "recipe.micro_batch_size=8",
    "recipe.warmup_steps=2",
    "evaluation.generation.max_new_tokens=8",
    "runtime.device=cpu",
]


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Seed every test, so that its random numbers do not depend on earlier tests in the same process."""
    import torch

    torch.manual_seed(0)


@pytest.fixture(scope="module", autouse=True)
def imports_are_no_garbage() -> None:
    """A training collects garbage twice, half a second each with all that is imported: what is there by now stays."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def planned(arguments: list[str]) -> RunPaths:
    """Return the directory of the single run planned by the arguments."""
    from experiments.plan.compose import plan, write_runs

    (run,) = write_runs(plan(arguments))
    return run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> RunPaths:
    """One DiaBlo run, trained and scored; tests that change it work on a copy."""
    from eval.run import evaluate
    from experiments.train.run import train

    runs = tmp_path_factory.mktemp("finished")
    run = planned([*SMALL, "method=diablo", f"runtime.runs_dir={runs}", f"runtime.cache_dir={cache_dir}"])
    train(run)
    evaluate(run)
    return run


@pytest.fixture
def small(tmp_path: Path, cache_dir: Path) -> list[str]:
    """Return overrides that make any tiny/arith run take seconds, in its own directory."""
    return [*SMALL, f"runtime.runs_dir={tmp_path / 'runs'}", f"runtime.cache_dir={cache_dir}"]


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Return the folder of SmolLM2-135M in the user's cache, converting the installed package; skip without either."""
    from experiments.models.gguf import converted
    from experiments.plan.compose import plan

    (config,) = plan(["model=smollm2_135m", "method=base", "task=arith"])
    if config.model.gguf is None:
        pytest.skip("SmolLM2-135M is not installed: run make real-model")
    return converted(config.model.gguf, Path(config.runtime.cache_dir))


@pytest.fixture(scope="session")
def smollm2_slice(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return overrides for the first three layers of SmolLM2-135M, with its embedding and tokenizer."""
    return first_layers(smollm2, 3, tmp_path_factory.mktemp("slice"))


def first_layers(whole: Path, count: int, folder: Path) -> list[str]:
    """Write the first layers of SmolLM2-135M into `folder` and return the overrides that select them."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(whole)
    model.model.layers = model.model.layers[:count]
    model.config.num_hidden_layers = count
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(whole).save_pretrained(folder)
    return ["model=smollm2_135m", f"model.path={folder}", f"model.architecture.num_hidden_layers={count}"]


@pytest.fixture(scope="session")
def data_root() -> Path:
    """Return the folder of real data sets; skip without it."""
    root = os.environ.get("DIABLO_DATA_ROOT")
    if not root or not Path(root).is_dir():
        pytest.skip("no data: set DIABLO_DATA_ROOT to the folder of the data sets")
    return Path(root).resolve()


@pytest.fixture
def fails_with() -> Callable[[Callable[[], object]], str]:
    """Return a function that runs a callable and returns the one line of its user error."""
    from experiments.errors import UserError

    def run(action: Callable[[], object]) -> str:
        with pytest.raises(UserError) as caught:
            action()
        return " ".join(str(caught.value).split())

    return run


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, None]:
    """Turn a skip for a missing prerequisite into a failure in CI, where every prerequisite is installed."""
    outcome = yield
    report = outcome.get_result()
    if report.skipped and os.environ.get("CI") and isinstance(report.longrepr, tuple):
        reason = report.longrepr[2]
        if "not installed" in reason or "no data" in reason:
            report.outcome = "failed"
            report.longrepr = f"{item.nodeid}: in CI this may not be skipped: {reason}"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the processor time, which depends less on the machine's load than wall time; xdist's workers have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    seconds = sum(usage.ru_utime + usage.ru_stime for usage in used)
    line = f"{seconds:.0f} s of processor time in {time.monotonic() - STARTED:.0f} s"
    terminalreporter.write_line(f"{line}, {device_name('cpu')}, {os.cpu_count()} processors")


@pytest.fixture
def squeue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Return a function that replaces squeue by a script."""
    path = tmp_path / "bin" / "squeue"
    path.parent.mkdir()
    monkeypatch.setenv("PATH", f"{path.parent}:{os.environ['PATH']}")

    def write(script: str) -> None:
        path.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
        path.chmod(0o755)

    return write
