"""The paper's experiments that choose learning rates on held-out rows, each executed from its plan to its report page.

On three layers of SmolLM2-135M and real rows, with every method, task, protocol and quantiser of the file; sizes, rows,
steps and rates are few. What comes out says that the experiment runs, and nothing about its methods.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from analysis.load import load_runs
from experiments.choose import stages
from experiments.plan import CONFIGS, plan, run_paths
from experiments.reproduce import reproduce

pytestmark = pytest.mark.real

COMMON = [
    *("recipe.learning_rate=1e-4,1e-3", "recipe.max_steps=2", "recipe.warmup_steps=0", "recipe.batch_size=2"),
    *("recipe.micro_batch_size=2", "task.data.heldout=4", "seed=0", "evaluation.limit=1"),
    *("evaluation.generation.max_new_tokens=2", "evaluation.full_batches_of=null", "runtime.device=cpu"),
]
COMMONSENSE = [
    *("task=commonsense_74k", "task.data.source=[arc_easy]", "protocol.max_length=96"),
    "evaluation.generation.num_beams=1",
]


@dataclass(frozen=True)
class Case:
    """What is given beside `COMMON`, and which of the file's sizes are replaced: those that do not fit 576 × 1536."""

    overrides: list[str] = field(default_factory=list)
    sizes: dict[str, str] = field(default_factory=dict)


CASES = {
    "commonsense": Case(
        COMMONSENSE,
        {"num_blocks=128": "num_blocks=32", "num_blocks=890,5049": "num_blocks=20 method.prepare.steps=2",
            "num_blocks=3688": "num_blocks=20 method.prepare.steps=2",
        },
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_every_stage_runs(
    name: str, smollm2_slice: list[str], data_root: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    case = CASES[name]
    text = (CONFIGS / "experiment" / f"{name}.yaml").read_text(encoding="utf-8")
    for written, fitting in case.sizes.items():
        assert written in text
        text = re.sub(rf"{written}(?=\s)", fitting, text)
    file = tmp_path / f"{name}.yaml"
    file.write_text(text, encoding="utf-8")
    places = [f"runtime.runs_dir={tmp_path / 'runs'}", f"runtime.data_root={data_root}"]
    overrides = [*smollm2_slice, *COMMON, *case.overrides, *places]
    page = reproduce(str(file), overrides, tmp_path / "report")
