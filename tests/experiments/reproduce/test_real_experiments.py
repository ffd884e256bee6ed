"""The paper's experiments that choose learning rates on held-out rows, each run from plan to report page.

On three layers of SmolLM2-135M and real rows, with every method, kind of task, protocol and quantiser of the file;
with few rows, steps, sizes and learning rates. This tests that the experiment runs, and nothing about the methods.
"""

from __future__ import annotations

import csv
import gc
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from analysis.load import load_runs
from experiments import CONFIGS
from experiments.config import RunConfig
from experiments.plan.choose import stages
from experiments.plan.compose import plan, run_paths
from experiments.reproduce.run import reproduce
from tests.conftest import first_layers

pytestmark = pytest.mark.real

COMMON = [
    *("recipe.max_steps=2", "recipe.warmup_steps=0", "recipe.batch_size=2", "recipe.micro_batch_size=2"),
    *("task.data.heldout=2", "seed=0", "evaluation.limit=1", "evaluation.generation.max_new_tokens=2"),
    *("evaluation.full_batches_of=null", "runtime.device=cpu"),
]
# The paper's repository lacks the full training set of the task: one part of its stand-in is used.
COMMONSENSE = [
    *("task=commonsense_74k", "task.data.source=[arc_easy]"),
    *("protocol.max_length=72", "protocol.max_prompt_length=60", "protocol.max_target_length=12"),
    *("evaluation.benchmarks=[boolq,arc_easy]", "evaluation.generation.num_beams=1"),
]


@dataclass(frozen=True)
class Case:
    """Settings beside `COMMON`, and replacements in the file's text: sizes that do not fit 576 × 1536, and settings
    that only one of its methods has."""

    overrides: list[str]
    replaced: dict[str, str] = field(default_factory=dict)
    layers: int | None = None  # number of layers of a separate base


CASES = {
    "commonsense": Case(
        COMMONSENSE,
        {
            "num_blocks=128": "num_blocks=32",
            "method=lora_ga": "method=lora_ga method.prepare.iterations=1",
            "num_blocks=890,5049": "num_blocks=20,40 method.prepare.steps=2",
            "num_blocks=3688": "num_blocks=20 method.prepare.steps=2",
        },
    ),
    "arithmetic": Case(["task.data.source=mawps"]),  # MetaMathQA's protocols need its own task
    "code_safety": Case(
        [
            *("task=code_alpaca_6k,safety_7k", "protocol.max_length=96", "protocol.max_prompt_length=80"),
            *("protocol.max_target_length=16", "evaluation.generation.samples={program: 2, refusal: 1}"),
        ]
    ),
    "sparse_patterns": Case(["task.data.source=mawps"]),
    "quantized": Case(
        [
            *("task=gsm8k_mawps", "task.data.source=[mawps]", "evaluation.benchmarks=[gsm8k,aqua]"),
            *("model.adapter_size.calibration_samples=2", "model.adapter_size.calibration_length=64"),
        ],
        {"quantization=magr": "quantization=magr quantization.options.iterations=2"},
        layers=1,  # quantising a layer in all ten ways takes 40 s
    ),
    "sweep_n_rank": Case(
        COMMONSENSE,
        {
            "num_blocks=16,32,128,256": "num_blocks=16",
            "r=4,8,16,64,128": "r=128",
            "r=4,8,16,32,64,128": "r=4,128",
        },
    ),
}


def shortened(name: str, folder: Path) -> Path:
    """Write a copy of the experiment: two learning rates for groups led by DiaBlo or the patterns, else the lowest."""
    text = (CONFIGS / "experiment" / f"{name}.yaml").read_text(encoding="utf-8")
    for written, fitting in CASES[name].replaced.items():
        assert re.search(rf"{written}(?=\s)", text), written
        text = re.sub(rf"{written}(?=\s)", fitting, text)
    rates = r"recipe\.learning_rate=[^,\s]+"
    found = re.search(rf"method=(diablo|sparse)\s.*?{rates},[^,\s]+", text, re.DOTALL)
    assert found is not None
    parts = [re.sub(rf"({rates})\S*", r"\1", part) for part in (text[: found.start()], text[found.end() :])]
    parts[1] = re.sub(r"^,\S+", "", parts[1])
    path = folder / f"{name}.yaml"
    path.write_text(parts[0] + found[0] + parts[1], encoding="utf-8")
    return path


def kinds(configs: list[RunConfig]) -> set[tuple[Any, ...]]:
    """Return what differs between runs apart from sizes, models, seeds and learning rates."""
    return {
        (
            config.method.name,
            (config.method.adapter or {}).get("pattern"),
            *((config.quantization.method, config.quantization.bits) if config.quantization else (None, None)),
            *(config.protocol.name, config.protocol.train_on_prompt),
        )
        for config in configs
    }


@pytest.mark.parametrize("name", CASES)
def test_an_experiment_runs_from_plan_to_page(
    name: str,
    smollm2: Path,
    smollm2_slice: list[str],
    data_root: Path,
    cache_dir: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    places = [f"runtime.runs_dir={tmp_path / 'runs'}", f"runtime.data_root={data_root}"]
    layers = CASES[name].layers
    base = first_layers(smollm2, layers, tmp_path / "base") if layers else smollm2_slice
    overrides = [*base, *COMMON, *CASES[name].overrides, *places, f"runtime.cache_dir={cache_dir}"]
    file = shortened(name, tmp_path)
    gc.collect()
    gc.freeze()  # every training runs the garbage collector twice over all imported objects, half a second each
    try:
        page = reproduce(str(file), overrides, tmp_path / "report")
    finally:
        gc.unfreeze()
    told = capfd.readouterr().err

    found, whole = stages([f"experiment={file}", *overrides]), plan([f"experiment={name}", "seed=0"])
    assert found.rate_search
    assert not found.undecided
    assert kinds(found.final) == kinds(whole)
    assert len({config.task.name for config in found.final}) == len({config.task.name for config in whole})
    runs = load_runs([run_paths(config).root for config in found.final], quiet=True)
    assert runs.problems == []
    assert set(runs.frame["run_id"]) == {config.run_id for config in found.final}
    assert not any(math.isnan(value) for value in runs.frame["accuracy"])
    assert len((page.parent / "learning_rates.csv").read_text(encoding="utf-8").splitlines()) == 1 + len(
        found.rate_search
    )
    with (page.parent / "table.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    benchmarks = sum(len(config.evaluation.benchmarks) for config in found.final)
    assert len(rows) == benchmarks
    assert all(row["accuracy"] for row in rows)
    shown = re.sub(r"<style.*?</style>|<[^>]+>", " ", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    odd = re.search(r"\b(nan|None|NaT|inf)\b", shown)
    assert odd is None, shown[max(0, odd.start() - 200) : odd.end() + 100]
    assert not re.search(r"warning|error|traceback|failed", told, re.IGNORECASE), told
