"""The estimated memory of a run against peaks of full trainings of SmolLM2-135M on this CPU, alone and sharded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.plan.cost import longest_row
from experiments.plan.memory import estimate
from experiments.runs.config_files import read_config
from tests.conftest import planned
from tests.real_runs import settings

pytestmark = pytest.mark.real

ROOT = Path(__file__).resolve().parents[3]
LENGTH = 128  # nearly every row of GSM8K is longer and truncated to this
# By the allocator's events: the peak of every step except the first, at whose end Adam's state is made, and the last,
# whose end is not marked. The whole base is loaded first.
MEASURE = """
import bisect, json, sys, time
from pathlib import Path
import torch.distributed
from torch.profiler import ProfilerActivity, profile
from transformers import Trainer
from experiments.runs.records import RunPaths
from experiments.train.run import train

begun = []
step = Trainer.training_step
def timed(self, *arguments, **options):
    begun.append(time.time_ns())
    return step(self, *arguments, **options)
Trainer.training_step = timed
with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
    train(RunPaths(Path(sys.argv[1])))
events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
held, peaks = 0, [0] * (len(begun) - 2)
for event in sorted(events, key=lambda event: event.start_ns()):
    held += event.nbytes()
    step = bisect.bisect(begun, event.start_ns()) - 2
    if 0 <= step < len(peaks):
        peaks[step] = max(peaks[step], held)
rank = 0
if torch.distributed.is_initialized():
    rank = torch.distributed.get_rank()
    torch.distributed.destroy_process_group()
Path(sys.argv[2], f"{rank}.json").write_text(json.dumps(peaks))
"""


@pytest.mark.parametrize(
    ("method", "processes", "tolerance"),
    [("full", 1, 0.03), ("diablo", 1, 0.03), ("lora", 1, 0.03), ("full", 2, 0.08), ("lora", 2, 0.08)],
)
def test_a_run_takes_what_is_estimated(
    method: str, processes: int, tolerance: float, smollm2: Path, data_root: Path, tmp_path: Path
) -> None:
    """Sharded, the smallest of three steps: processes waiting for each other held up to a fifth more in one step."""
    more = ["runtime.sharding=full"] if processes > 1 else []
    run = planned(
        [
            *("model=smollm2_135m", *settings(tmp_path, data_root), f"method={method}", "task=gsm8k", *more),
            *(f"recipe.max_steps={3 if processes == 1 else 5}", "recipe.batch_size=4"),
            *(f"recipe.micro_batch_size={4 // processes}", f"protocol.max_length={LENGTH}"),
            *("protocol.train_on_prompt=true", "recipe.adapter_dropout=0", "recipe.learning_rate=1e-4"),
        ]
    )  # fmt: skip
    config = read_config(run)
    assert longest_row(config) == LENGTH
    script, out = tmp_path / "measure.py", tmp_path / "out"
    script.write_text(MEASURE, encoding="utf-8")
    out.mkdir()
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
        start += [f"--nproc_per_node={processes}"]
    told = subprocess.run(
        [*start, str(script), str(run.root), str(out)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        cwd=ROOT, capture_output=True, encoding="utf-8", timeout=500,
    )  # fmt: skip
    assert told.returncode == 0, told.stderr[-3000:]
    peaks = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(out.iterdir())]
    assert len(peaks) == processes
    found = estimate(config, processes)
    for of_steps in peaks:
        assert found.peak == pytest.approx(min(of_steps), rel=tolerance), of_steps
