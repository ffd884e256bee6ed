"""Run directories with invented numbers, written through `experiments.runs.records` as the real stages write them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from experiments.plan.compose import plan
from experiments.runs.config_files import config_hash, run_id, write_config
from experiments.runs.follows import standard_error
from experiments.runs.records import EvalRecord, RunPaths, TrainRecord, content_hash, write_record

BASE_PARAMETERS = 1_000_000
MODULES = ("self_attn.q_proj", "mlp.down_proj")
LAYERS = 4
MATRICES = {
    "lora": ("lora_A.default.weight", "lora_B.default.weight"),
    "diablo": ("diablo_blocks.default",),
    "full": ("weight",),
    "base": (),
}


@cache
def template() -> Mapping[str, Any]:
    """The config of a planned run, for the settings that no table shows."""
    return plan(["recipe.learning_rate=1e-3"])[0].mapping


def write_run(
    root: Path,
    method: str = "lora",
    *,
    size: int = 7,
    seed: int = 0,
    parameters: int = 10_000,
    learning_rate: float = 1e-3,
    items: list[int] | None = None,
    steps: int = 3,
    model: str = "tiny",
    mean_with: str | None = None,
    task: str = "arith",
    protocol: str = "plain",
    benchmark: str | None = None,
    pattern: str | None = None,
    nll: list[float] | None = None,
) -> Path:
    """Write a finished run as the real stages do, with invented numbers. `items=None` omits the score,
    `mean_with` plans another benchmark and the mean of both; the benchmark has the task's name by default.
    `pattern` makes it a run of the method `sparse`; `nll` are the items of the likelihood benchmark gsm8k_nll."""
    benchmark = benchmark or task
    generator = np.random.default_rng(seed)
    key, letter = ("num_blocks", "N") if method == "diablo" else ("r", "r")
    names = [
        *([] if benchmark.startswith("mean of ") else [benchmark]),
        *([mean_with] if mean_with else []),
        *(["gsm8k_nll"] if nll else []),
    ]
    adapter = None if method in ("full", "base") else {key: size, "target_modules": ["q_proj", "down_proj"]}
    if pattern is not None:
        adapter = {"pattern": pattern, "density": 1 / size}
    planned = template()
    config: dict[str, Any] = {
        "model": {**planned["model"], "name": model},
        "method": {
            "name": method,
            "label": f"{method}-{pattern or f'{letter}{size}'}" if adapter else method,
            "trains": {"full": "all", "base": "nothing"}.get(method, "adapter"),
            "adapter": adapter,
        },
        "task": {**planned["task"], "name": task},
        "protocol": {**planned["protocol"], "name": protocol, "train_on_prompt": protocol == "llm_adapters"},
        "recipe": {**planned["recipe"], "learning_rate": learning_rate, "epochs": 1},
        "seed": seed,
        "evaluation": {
            **planned["evaluation"],
            "protocol": protocol,
            "benchmarks": [name for name in names if " " not in name],
            "mean": mean_with is not None,
        },
        "runtime": {**planned["runtime"], "device": "cpu"},
    }
    identity = run_id(config)
    run = RunPaths(root / identity)
    write_config(run, {"run_id": identity, **config})
    tensors = [
        f"base_model.model.model.layers.{layer}.{module}.{matrix}"
        for layer in range(LAYERS)
        for module in MODULES
        for matrix in MATRICES.get(method, MATRICES["lora"])
    ]
    steps = steps if tensors else 0
    adapter_files = {"adapter_model.safetensors": content_hash(identity)}
    write_record(
        run.train_record,
        TrainRecord(
            run_id=identity,
            config_hash=config_hash(config),
            base_hash=content_hash(model),
            data_hash=content_hash(task),
            adapter_files=adapter_files,
            trainable_parameters=parameters,
            base_parameters=BASE_PARAMETERS,
            steps=steps,
            rows=1700,
            examples=1700,
            tokens=100_000,
            truncated=0,
            changed=bool(tensors),
            final_loss=0.1 if tensors else None,
            held_out=None,
            train_seconds=8.0 + seed,
            step_seconds=0.03,
            peak_memory_bytes=10**9,
            resumed_at=[],
            forward_modes={},
            tensors=tensors,
            world_size=1,
            environment={"torch": "2.13.0", "device": "cpu", "commit": "0" * 40, "dirty": False},
        ),
    )
    lines = []
    for step in range(1, steps + 1):
        norms = [_norm(name, step, generator) for name in tensors]
        scalars = {"step": step, "loss": 4 / step, "learning_rate": learning_rate, "seconds": 0.03}
        total = float(np.sqrt(np.sum(np.square(norms))))
        lines.append(json.dumps({**scalars, "gradient_norm": total, "gradient_norms": norms}) + "\n")
    run.metrics.write_text("".join(lines), encoding="utf-8")
    for name, found in ((benchmark, items), ("gsm8k_nll", nll)):
        if found is not None:
            score = _score(identity, name, protocol, found, model, adapter_files)
            write_record(run.evaluation(name, protocol, {"max_new_tokens": 64}).score, score)
    return run.root


def _score(
    identity: str, benchmark: str, protocol: str, items: Sequence[float], model: str, adapter_files: dict[str, str]
) -> EvalRecord:
    mean, likelihood = sum(items) / len(items), benchmark.endswith("_nll")
    return EvalRecord(
        run_id=identity,
        benchmark=benchmark,
        benchmark_version=1.0,
        protocol=protocol,
        protocol_version=1,
        searched="completion",
        parser="hash_marks",
        equality="same_number",
        judge=None,
        metric="nll" if likelihood else "accuracy",
        n=len(items),
        samples=1,
        accuracy=mean,
        standard_error=0.1 if likelihood else (mean * (1 - mean) / len(items)) ** 0.5,
        extra_metrics={},
        unparsed=1,
        fallback=0,
        dropped=0,
        cut_prompts=0,
        items=[float(item) for item in items],
        generation={"limit": None, "generation": {"max_new_tokens": 64, "num_beams": 1}},
        backend="hf",
        dtype="float32",
        batch_size=64,
        seconds=1.0,
        identity=False,
        base_hash=content_hash(model),
        adapter_files=adapter_files,
        data_hash=content_hash(f"{benchmark} test"),
        samples_hash=content_hash("samples"),
        environment={"torch": "2.13.0", "device": "cpu", "commit": "0" * 40, "dirty": False},
    )


def _norm(tensor: str, step: int, generator: np.random.Generator) -> float:
    """Invented gradient norm; that of A is zero at the first step, where B is zero."""
    noise = float(np.exp(generator.normal(0, 0.25)))
    if "lora_A" in tensor:
        return 0.4 * (1 - np.exp(-(step - 1) / 25)) * noise
    return (1.5 if "lora_B" in tensor else 0.8 * (1 + float(np.exp(-step / 20)))) * noise


def score_file(run: Path) -> Path:
    return next(run.glob("eval/*/*/score.json"))


def step_times_file(folder: Path) -> Path:
    seconds = {"floor": [0.1, 0.2, 0.1, 0.1, 0.2], "lora-r7": [0.11, 0.24, 0.13, 0.14, 0.3]}
    path = folder / "step_times.json"
    path.write_text(
        json.dumps({"schema": 1, "model": "tiny", "device": "a CPU", "batch": [16, 64], "seconds": seconds}),
        encoding="utf-8",
    )
    return path


def change(path: Path, **values: Any) -> None:
    """Change values in a record; new items also change the standard error computed from them."""
    if all(isinstance(item, int | float) for item in values.get("items", [None])):
        values = {"standard_error": standard_error(values["items"]), **values}
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | values), encoding="utf-8")


def write_spectra(run: Path, steps: int = 2, blocks: int = 2) -> None:
    """Write invented measurements in the format of experiments/train/spectra.py."""
    lines = []
    for step in range(1, steps + 1):
        sides = {
            side: {
                "stable_rank": 2.0 + step,
                "energy": 0.9,
                "block_stable_rank": [1.5] * blocks,
                "block_energy": [0.8] * blocks,
                "covered": [0.1 * step, *[0.3 * step] * (blocks - 1)],
            }
            for side in ("X", "g_Y")
        }
        layers = {f"model.layers.{layer}.{module}": sides for layer in range(LAYERS) for module in MODULES}
        lines.append(json.dumps({"step": step, "tokens": 64, "seconds": 0.01, "layers": layers}) + "\n")
    RunPaths(run).spectra.write_text("".join(lines), encoding="utf-8")
