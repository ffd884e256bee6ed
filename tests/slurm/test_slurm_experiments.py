"""Whole experiments on a real Slurm, submitted once: two stages, and a report unaffected by preemptions."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments import ROOT
from experiments.plan.choose import stages
from experiments.plan.compose import plan, run_paths
from experiments.reproduce.run import make_bases, reproduce
from experiments.runs.records import TrainRecord, read_record
from slurm import submit
from slurm.queue import queued
from slurm.status import statuses
from tests.conftest import SMALL
from tests.experiments.plan.test_choose import FILE
from tests.slurm.slurm_cluster import SlurmCluster, cluster, running_cluster, wait_for

__all__ = ["cluster", "running_cluster"]
pytestmark = pytest.mark.slurm
CLUSTER = f"cluster={ROOT}/tests/slurm/slurm_cluster.yaml"


def idle(cluster: SlurmCluster) -> bool:
    return not cluster.output("squeue", "-h", "--user", str(os.getuid())).strip()


def table(report: Path) -> list[dict[str, str]]:
    """Return the report's table without times and memory."""
    with (report / "table.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    measured = ("time", "seconds", "memory", "mixed")  # a commit during the test makes code versions mixed
    return [{key: value for key, value in row.items() if not any(word in key for word in measured)} for row in rows]


def test_two_stages_from_one_submission(
    cluster: SlurmCluster,
    tmp_path: Path,
    cache_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Without further commands, a job chooses the learning rates and submits the rest, another writes the report."""
    monkeypatch.chdir(tmp_path)
    Path("two_stages.yaml").write_text(FILE.format(by="loss", rates="1e-3,1e-2"), encoding="utf-8")
    small = [*SMALL, "recipe.max_steps=4", f"runtime.cache_dir={cache_dir}"]
    arguments = ["experiment=two_stages.yaml", *small, f"runtime.runs_dir={tmp_path / 'runs'}"]
    submit.submit_from(submit.parse([*arguments, CLUSTER, "--pack", "5"]))
    said = capfd.readouterr().out
    assert "5 runs: 5 new" in said
    assert "chooses learning rates and submits the second stage" in said
    assert "2 more runs follow when their learning rates are chosen" in said
    submit.submit_from(submit.parse([*arguments, CLUSTER, "--pack", "5"]))
    assert "5 already queued" in capfd.readouterr().out
    wait_for(lambda: (tmp_path / "report/two_stages/index.html").is_file(), "the report", 240)
    wait_for(lambda: idle(cluster), "the end of the last job", 30)
    found = stages(arguments)
    assert len(found.final) == 5
    assert {state.state for state in statuses(tmp_path / "runs")} == {"finished"}
    for tried in found.tried:
        assert bool(list(run_paths(tried.config).evaluations())) == tried.chosen
    here = [*small, f"runtime.runs_dir={tmp_path / 'here'}"]
    reproduce("two_stages.yaml", here, tmp_path / "report_here")
    assert table(tmp_path / "report/two_stages") == table(tmp_path / "report_here")
    chosen = [name.read_text(encoding="utf-8").split(",") for name in tmp_path.glob("report*/**/learning_rates.csv")]
    assert chosen[0] == chosen[1]


def test_the_quickstart_preempted_twice_ends_in_the_same_report(
    cluster: SlurmCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`python -m slurm.submit experiment=quickstart` with one seed, and the same runs without Slurm on this machine."""
    cache = os.environ.get("DIABLO_CACHE", f"{os.environ['HOME']}/.cache/diablo")
    settings = ["seed=0", f"runtime.cache_dir={cache}"]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    make_bases(plan(["experiment=quickstart", *settings]))  # otherwise the first jobs would spend minutes on it
    runs = tmp_path / "runs"
    arguments = ["experiment=quickstart", *settings, f"runtime.runs_dir={runs}", "runtime.checkpoint_every=20"]
    subprocess.run([sys.executable, "-m", "slurm.submit", *arguments, CLUSTER, "--pack", "5"], check=True)
    jobs = {task.job for tasks in queued(runs).values() for task in tasks}

    def training() -> bool:
        """Return whether all tasks run and one of them is in the middle of training."""
        beats = [json.loads(path.read_text(encoding="utf-8")) for path in runs.glob("*/heartbeat.json")]
        alive = [beat for beat in beats if beat["stage"] == "train" and time.time() - beat["time"] < 2]
        running = all(cluster.job(job).get("JobState") == "RUNNING" for job in jobs)
        return running and any((beat["step"] or 0) > 20 for beat in alive)

    for number in (1, 2):
        wait_for(training, "a training under way", 240)
        wanted = ["--partition=high", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap", "sleep 1"]
        cluster.output("sbatch", *wanted)
        wait_for(lambda n=number: all(int(cluster.job(job)["Restarts"]) >= n for job in jobs), "preemption", 120)
    wait_for(lambda: (tmp_path / "report/quickstart/index.html").is_file(), "the report", 900)
    assert all(int(cluster.job(job)["Restarts"]) >= 2 for job in jobs)
    here = ["quickstart", *settings, f"runtime.runs_dir={tmp_path / 'here'}", "--out", "report_here"]
    alone = subprocess.run(
        [sys.executable, "-m", "experiments.reproduce", *here], capture_output=True, encoding="utf-8"
    )
    assert alone.returncode == 0, alone.stderr
    records = [read_record(path, TrainRecord) for path in runs.glob("*/train.json")]
    resumed = [step for record in records for step in record.resumed_at]
    assert max(resumed) > 0
    assert table(tmp_path / "report/quickstart") == table(tmp_path / "report_here")
