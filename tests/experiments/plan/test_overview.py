"""The output of plan and of dry runs of reproduce and submit: equal runs in equal words, their costs, and reasons."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from experiments import ROOT
from experiments.plan import __main__ as planning
from experiments.plan.compose import plan
from experiments.plan.experiment_files import PAPER, options
from experiments.reproduce import __main__ as reproduce
from experiments.runs.differences import differing
from experiments.settings import with_values
from slurm.cluster import read_cluster
from slurm.submit import parse, submit_from
from tests.slurm.slurm_runs import overrides

FailsWith = Callable[[Callable[[], object]], str]
FILE = """
title: Cells
common: model=tiny task=arith seed=0,1,2
learning_rate_by: loss
paper:
  - method=diablo method.adapter.num_blocks=8 recipe.learning_rate=0.01,0.02
  - method=lora recipe.learning_rate=0.01
grids:
  - method=diablo method.adapter.num_blocks=4 recipe.learning_rate=0.03
"""
SPEED = "--tokens-per-second=1000"
# All except those only on the tiny or the real small model.
SMALL = {
    "evidence",
    "evidence_pilot",
    "evidence_spectra",
    "quickstart",
    "quickstart_lr",
    "real_data_tiny",
    "real_smoke",
}
SMALL |= {"all_methods_tiny", "quantized_tiny", "spectra_tiny"}
OF_THE_PAPER = sorted(set(options("experiment")) - SMALL)
HOUR = 0.00217  # GPU-hours of a run of the cells at that speed


@pytest.fixture
def cells(tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("PATH", "/nonexistent")  # no squeue
    path = tmp_path / "cells.yaml"
    path.write_text(FILE, encoding="utf-8")
    return [f"experiment={path}", *overrides(tmp_path / "runs", cache_dir)]


def submitted(arguments: list[str]) -> None:
    submit_from(parse([*arguments, "cluster=a100"]))


def cluster_file(tmp_path: Path, **settings: object) -> str:
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return f"cluster={path}"


def test_every_experiment_of_the_paper_has_its_cells() -> None:
    for name in OF_THE_PAPER:
        assert plan([f"experiment={name}", PAPER]), name


@pytest.mark.slow
@pytest.mark.parametrize("name", OF_THE_PAPER)
def test_the_shipped_cluster_file_has_gpus_for_every_run_of_the_paper(name: str) -> None:
    """A run that fits on no number of GPUs would be an error; full fine-tuning and SMT from 7B on are sharded."""
    cluster = read_cluster(str(ROOT / "slurm" / "a100.yaml"))
    for config in plan([f"experiment={name}", PAPER]):
        model, method = config.model, config.method
        several = method.name in ("full", "smt") and model.name != "tiny"
        assert (cluster.resources(config).gpus > 1) == several, (model.name, method.label)


def test_plan_reproduce_and_submit_count_the_same_runs(
    cells: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All runs, the paper's cells, runs within a budget, and both, at the measured speed; tiny runs need no GPU."""
    left = set()
    for flags in ([], ["--paper"], [f"--budget={5 * HOUR:.6f}gpuh"], ["--paper", f"--budget={5 * HOUR:.6f}gpuh"]):
        planning.main([*cells, "--dry-run", SPEED, *flags])
        planned = capsys.readouterr().out
        reproduce.main([cells[0].removeprefix("experiment="), *cells[1:], "--dry-run", SPEED, *flags])
        assert capsys.readouterr().out == planned
        submitted([*cells, "--dry-run", SPEED, *flags])
        shown = capsys.readouterr().out
        count = re.search(r"^(\d+) runs,", planned, re.MULTILINE)
        assert count is not None
        assert f": {count[1]} runs: {count[1]} new\n" in shown
        told = [line for line in planned.splitlines() if "follow when" in line or "left out" in line or " of " in line]
        told = [line for line in told if "tokens of" not in line and "run " not in line and "off the" not in line]
        assert told
        for line in told[1:] if told[0].startswith(count[0]) else told:
            assert line in shown.splitlines(), line
        table = [line.split()[:8] for line in planned.splitlines() if re.match(r"tiny \S+ +\d", line)]
        for line in table:  # for a CPU run plan prints one GPU and submit none
            assert any(line[:3] == other.split()[:3] for other in shown.splitlines()), line
        left.add("left out" in planned)
    assert left == {True, False}
    assert not (tmp_path / "runs").exists()


def test_a_budget_smaller_than_the_first_run_is_one_line(cells: list[str], fails_with: FailsWith) -> None:
    for command in (planning.main, submitted):
        said = fails_with(lambda command=command: command([*cells, "--dry-run", SPEED, "--budget=0.0000001gpuh"]))
        assert "\n" not in said
        assert "is too small: the cheapest setting, " in said
        assert "GPU-hours for 1 run" in said


def test_without_a_speed_submit_counts_time_limits(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """4 of 7 runs of 24 hours each choose the learning rate; a budget of 100 pays for those, not for a second seed."""
    path = tmp_path / "one.yaml"
    experiment = {
        "title": "One",
        "learning_rate_by": "loss",
        "common": "model=llama2_7b task=commonsense_170k task.data.heldout=1000 seed=0,1,2,3",
        "paper": ["method=lora recipe.learning_rate=1e-4,2e-4,3e-4,4e-4"],
    }
    path.write_text(yaml.safe_dump(experiment), encoding="utf-8")
    arguments = [f"experiment={path}", f"runtime.runs_dir={tmp_path / 'runs'}", "--dry-run", "--budget=100gpuh"]
    submitted(arguments)
    shown = capsys.readouterr().out
    assert "the budget counts the whole time limit of runs whose GPU-hours are unknown" in shown
    assert ": 4 runs: 4 new\n" in shown  # the title, a path here, may be cut
    assert (
        "unknown: GPU-hours of llama2_7b: no speed was given: give --tokens-per-second llama2_7b=N; ≤ is the" in shown
    )
    assert "left out by the budget: 3 runs\n  lora-r32 on llama2_7b and commonsense_170k: 3 of 7 runs\n" in shown
    assert "4 runs: ≤ 96 GPU-hours\n" in shown


def test_what_fits_no_gpu_is_one_line_a_setting(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], fails_with: FailsWith
) -> None:
    arguments = ["model=llama2_7b", "task=commonsense_170k", "method=lora,full", "seed=0,1", "--dry-run"]
    arguments += [f"runtime.runs_dir={tmp_path}", cluster_file(tmp_path, gpu_memory="20G", gpus=1)]
    fails_with(lambda: submit_from(parse([*arguments, "recipe.learning_rate=1e-4"])))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("cannot be submitted: ")]
    budget = "--budget=100gpuh"  # of which these runs use nothing
    said = fails_with(lambda: submit_from(parse([*arguments, "recipe.learning_rate=1e-4", budget])))
    assert said == "2 settings cannot be submitted, for the reasons above"
    budgeted = [line for line in capsys.readouterr().out.splitlines() if line.startswith("cannot be submitted: ")]
    assert budgeted == lines
    assert len(lines) == 2
    assert all("does not fit: it needs" in line and "18.4 GiB are usable on" in line for line in lines)
    assert ": give 2 GPUs, sharded (" in lines[0]
    assert ", or runtime.gradient_checkpointing=true (" in lines[0]
    assert "lora-r32 on llama2_7b" in lines[0]
    assert ": give runtime.gradient_checkpointing=true and recipe.micro_batch_size=1 on 8 GPUs (" in lines[1]


def test_what_fits_only_sharded_is_told_so_where_that_was_switched_off(fails_with: FailsWith) -> None:
    asked = ["model=llama2_7b", "task=math_10k", "method=full", "recipe.learning_rate=1e-5", "runtime.sharding=none"]
    (config,) = plan(asked)
    said = fails_with(lambda: read_cluster(str(ROOT / "slurm" / "a100.yaml")).resources(config))
    assert "are usable on one GPU: give runtime.sharding=auto and 2 GPUs, sharded (" in said


def test_micro_batches_that_do_not_divide_are_one_line(tmp_path: Path, fails_with: FailsWith) -> None:
    arguments = ["model=llama2_7b", "task=commonsense_170k", "method=full", f"runtime.runs_dir={tmp_path}"]
    arguments += ["recipe.micro_batch_size=4", "recipe.batch_size=12", cluster_file(tmp_path, gpus=2)]
    arguments += ["recipe.learning_rate=1e-5"]
    config = plan([a for a in arguments if not a.startswith("cluster=")])[0]
    said = fails_with(lambda: read_cluster(arguments[-2].removeprefix("cluster=")).resources(config))
    assert "recipe.batch_size=12 is not a multiple of recipe.micro_batch_size=4 × 2 GPUs: give 1, 3 GPUs, or" in said
    for settings in ({"gpus": "auto"}, {"gpus": 1}):
        cluster = read_cluster(cluster_file(tmp_path, gpu_memory="80G", **settings).removeprefix("cluster="))
        for method in (config, plan(["method=base"])[0]):  # a base's process checks it too
            odd = with_values(config, {"recipe.batch_size": 13, "method": method.mapping["method"]})
            said = fails_with(lambda cluster=cluster, odd=odd: cluster.resources(odd))
            assert "recipe.batch_size=13 is not a multiple of recipe.micro_batch_size=4 × 1 GPU" in said


@pytest.mark.slow
def test_the_shipped_settings_fit_every_long_row_of_the_paper() -> None:
    """The longest rows in the tables: 2,048 tokens of MetaMathQA, without tokenizer and rows."""
    cluster = read_cluster("a100")
    configs = {config.method.label: config for config in plan(["experiment=arithmetic", PAPER])}
    assert {label: cluster.resources(config).gpus for label, config in configs.items()} == {
        "diablo-N32": 1, "lora-r64": 1, "pissa-r64": 1, "milora-r64": 1, "full": 2,
    }  # fmt: skip


def test_a_quickstart_asks_for_no_gpu_and_for_minutes() -> None:
    (config, *_) = plan(["experiment=quickstart"])
    for name in ("a100", "cluster.example"):
        resources = read_cluster(name).resources(config)
        assert (resources.gpus, resources.gpu_hours, resources.time) == (0, 0, "0:20:00")


def test_a_protocol_that_differs_is_named_once() -> None:
    runs = plan(["model=llama2_7b", "task=metamathqa", "method=lora", "protocol=milora,metamath"])
    assert list(differing(runs).values()) == ["protocol.name=milora", "protocol.name=metamath"]
    long = [
        with_values(config, {"run_id": f"a-{index}", "protocol.prompt": f"{index}\n{'x' * 99}"})
        for index, config in enumerate(runs[:1] * 2)
    ]
    assert all("\n" not in text and len(text) < 60 for text in differing(long).values())


@pytest.mark.parametrize(("model", "starred"), [("tiny", False), ("llama3_8b", True)])
def test_the_papers_count_is_only_of_its_model(model: str, starred: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """Both models have grouped-query attention."""
    planning.main([f"model={model}", "recipe.learning_rate=1e-3", "--dry-run", "--tokens-per-row=10"])
    shown = capsys.readouterr().out
    assert ("[* " in shown, "* as the paper counts LLaMA3's" in shown) == (starred, starred)
    assert "\n1 run, " in shown
