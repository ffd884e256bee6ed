"""The parts of `python -m experiments.gpu`: items, done one after the other while time is left."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from experiments import ROOT
from experiments.errors import UserError, out_of_memory
from experiments.gpu.runs import Item, ItemFailed, methods_items, queue_items, resume_items
from experiments.models.shapes import resolve_device
from experiments.runs.environment import environment, free_memory, reset_peak_memory
from experiments.runs.records import write_atomically
from experiments.speed.cases import ADAPTER, AUTHORS, DORA, DROPOUT, FLOOR, FULL, IN_PLACE, LORA, RECOMPUTED
from experiments.speed.layer_passes import SHAPES, machine_rates, measure_layer, measure_model
from experiments.speed.timing import synchronize

Config = dict[str, Any]


def run_part(part: str, options: argparse.Namespace) -> None:
    """Do the items of a part that fit into the time; the record is written before and after each."""
    device = str(resolve_device(options.device))
    path, known = options.out / f"{part}.json", known_seconds(options.out, part, device)
    record: Config = {
        "part": part,
        "status": "running",
        "reason": None,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "environment": {**environment(device), "cuda": torch.version.cuda},
        "item": None,  # the current one
        "items": [],
        "left_out": {},  # item -> its estimated seconds
    }
    versions = {name: record["environment"].get(name) for name in ("device", "python", "torch", "cuda", "commit")}
    print(f"{part:12} " + ", ".join(f"{name} {value}" for name, value in versions.items()), flush=True)
    longest = 0.0
    for item in ITEMS[part](options, record["items"]):
        estimate = known.get(item.name, max(item.estimate, longest if item.like_others else 0.0))
        if time.time() + estimate > options.until:
            record["left_out"][item.name] = round(estimate, 1)
            continue
        record["item"] = item.name
        write_atomically(path, json.dumps(record, indent=1) + "\n")
        done = _do(item, device)
        longest = max(longest, done["seconds"])
        record["items"].append(done)
        print(
            f"{part:12} {item.name:28} {done['error'] or done.get('line', '')}  ({done['seconds']:.1f} s)", flush=True
        )
        write_atomically(path, json.dumps(record, indent=1) + "\n")
        if done["error"] is not None:
            _check_device(device)
    if record["left_out"]:
        left = ", ".join(f"{name} ({seconds:.0f} s)" for name, seconds in record["left_out"].items())
        print(f"{part:12} did not fit: {left}", flush=True)
    failed = [item["name"] for item in record["items"] if item["error"] is not None]
    record |= {"item": None, "status": "failed" if failed else "finished"}
    record["reason"] = f"{len(failed)} of {len(record['items'])} items: {', '.join(failed)}" if failed else None
    if not failed and record["left_out"]:
        record["reason"] = f"{len(record['left_out'])} items did not fit"
    write_atomically(path, json.dumps(record, indent=1) + "\n")


def _check_device(device: str) -> None:
    """Raise a UserError if the device is gone, which ends the part: nothing in this process could use it."""
    try:
        synchronize(device)
    except RuntimeError as error:
        raise UserError(_one_line(error)) from error


def _do(item: Item, device: str) -> Config:
    started = time.time()
    done: Config = {"name": item.name, "error": None}
    try:
        reset_peak_memory(device)
        done |= item.work()
    except Exception as error:
        done["error"] = _one_line(error)
        done |= getattr(error, "result", {})
    free_memory()
    return {**done, "seconds": round(time.time() - started, 2)}


def _one_line(error: Exception) -> str:
    named = "" if isinstance(error, UserError | ItemFailed) else f"{type(error).__name__}: "
    return out_of_memory(error) or (named + " ".join(str(error).split()))[:400]


def known_seconds(out: Path, part: str, device: str) -> dict[str, float]:
    """Return the seconds of every item when it last finished on this kind of device, from the records in `out`."""
    found: dict[str, float] = {}
    name = environment(device)["device"]
    for path in sorted(out.glob(f"{part}-*.json")):
        record = json.loads(path.read_text("utf-8"))
        if record.get("environment", {}).get("device") == name:
            found |= {item["name"]: item["seconds"] for item in record["items"] if item["error"] is None}
    return found


# Correctness


class _Outcomes:
    """A pytest plugin that records the outcome of every test and stops the session when the time is up."""

    def __init__(self, until: float) -> None:
        self.until, self.tests, self.session = until, [], None
        self.tests: list[Config] = []

    def pytest_sessionstart(self, session: Any) -> None:
        self.session = session

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            message = str(getattr(getattr(report.longrepr, "reprcrash", None), "message", report.longrepr or ""))
            why = (message.splitlines() or [""])[0][:300]
            entry = {"name": report.nodeid.partition("::")[2], "outcome": report.outcome, "why": why or None}
            self.tests.append({**entry, "seconds": round(report.duration, 2)})
        if time.time() > self.until and self.session is not None:
            self.session.shouldstop = "the time is up"


def _correctness(options: argparse.Namespace, _: list[Config]) -> Iterator[Item]:
    def work() -> Config:
        try:
            import pytest
        except ImportError:
            raise ItemFailed("pytest is not installed: make install-dev", {}) from None

        os.environ["DIABLO_TEST_DEVICE"] = options.device
        outcomes = _Outcomes(options.until)
        arguments = ["-q", "-m", "cuda", "-p", "no:cacheprovider", "--rootdir", str(ROOT), f"-c{ROOT}/pyproject.toml"]
        arguments += [f"--junitxml={options.out / 'correctness.xml'}", f"--basetemp={options.out / 'tmp' / 'pytest'}"]
        with contextlib.redirect_stdout(sys.stderr):
            status = pytest.main(
                [*arguments, str(ROOT / "tests" / "experiments" / "gpu" / "test_cuda.py")], plugins=[outcomes]
            )
        counts = {
            name: sum(test["outcome"] == name for test in outcomes.tests) for name in ("passed", "failed", "skipped")
        }
        result = {**counts, "status": int(status), "tests": outcomes.tests}
        if status or not counts["passed"]:
            first = next(
                (f"{t['name']}: {t['why']}" for t in outcomes.tests if t["outcome"] != "passed"), "none was run"
            )
            raise ItemFailed(f"{counts['failed']} of {len(outcomes.tests)} tests failed; the first: {first}", result)
        return {**result, "line": f"{counts['passed']} passed, {counts['skipped']} skipped"}

    yield Item("pytest -m cuda", work, 60.0, like_others=False)


# Speed


def _speed(options: argparse.Namespace, items: list[Config]) -> Iterator[Item]:
    from experiments.speed.report import write_report

    device = str(resolve_device(options.device))
    on_gpu = device.startswith("cuda")
    dtype = torch.bfloat16 if on_gpu else torch.float32
    common = {"device": device, "dtype": dtype, "element": dtype.itemsize, "authors_repo": options.authors_repo}
    models = SimpleNamespace(**common, rounds=6 if on_gpu else 2, length=512, num_blocks=None if on_gpu else 8)
    layers = SimpleNamespace(**common, rounds=20 if on_gpu else 2)
    labels = (FLOOR, LORA, DORA, ADAPTER, DROPOUT, IN_PLACE, *([AUTHORS] if options.authors_repo else []))
    tokens = 4096 if on_gpu else 64
    torch.manual_seed(0)  # pyright: ignore[reportUnknownMemberType]

    def model(name: str, labels: tuple[str, ...], tokens: int, checkpointing: bool, seconds: float) -> Item:
        title = f"{name} {tokens}{' checkpointing' if checkpointing else ''}{' full' if FULL in labels else ''}"
        case = partial(measure_model, models, labels, name, "q k v up down", tokens, checkpointing)
        return Item(title, lambda: _timed("models", case()), seconds, like_others=False)

    yield Item("this machine", lambda: {"rates": machine_rates(layers)}, 5.0, like_others=False)
    yield model("llama2_7b" if on_gpu else "tiny", (*labels, RECOMPUTED), tokens, False, 90.0 if on_gpu else 5.0)
    for m, n in SHAPES if on_gpu else ((64, 64),):
        case = partial(measure_layer, layers, labels, m, n, tokens, 64 if on_gpu else 8)
        yield Item(f"{m}×{n}", lambda case=case: _timed("layers", case()), 8.0, like_others=False)
    if on_gpu:
        yield model("llama2_7b", (FLOOR, IN_PLACE, FULL), 4096, False, 60.0)
        yield model("llama2_7b", labels, 8192, True, 200.0)
        yield model("llama3_8b", labels, 8192, True, 220.0)
    cases = [item for item in items if "suite" in item]
    rates = next((item["rates"] for item in items if "rates" in item), None)
    if cases:
        suites = {suite: [c["case"] for c in cases if c["suite"] == suite] for suite in ("layers", "models", "curve")}
        about = {"dtype": str(dtype).removeprefix("torch."), "environment": environment(device), "rates": rates}
        write_atomically(options.out / "speed" / "benchmark.json", json.dumps({**about, **suites}, indent=1) + "\n")
        write_report({**about, **suites}, options.out / "speed")


def _timed(suite: str, case: Config) -> Config:
    floor = statistics.median(case["entries"][FLOOR]["seconds"])
    ratios = {label: statistics.median(entry["seconds"]) / floor for label, entry in case["entries"].items()}
    line = f"floor {1e3 * floor:.2f} ms; " + ", ".join(f"{k} {v:.2f}" for k, v in ratios.items() if k != FLOOR)
    return {"suite": suite, "case": case, "line": line}


ITEMS: dict[str, Callable[[argparse.Namespace, list[Config]], Iterator[Item]]] = {
    "correctness": _correctness,
    "methods": methods_items,
    "resume": resume_items,
    "speed": _speed,
    "queue": queue_items,
}
