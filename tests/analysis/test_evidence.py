"""The evidence page: regenerated from the committed runs it equals the committed page; missing runs are named."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from analysis.evidence_page import write_evidence
from analysis.evidence_runs import BASE, OURS, PRIMARY, QUESTIONS, RETENTION, comparisons_of, settings_of
from analysis.load import Runs, find_runs, load_runs
from experiments import ROOT
from experiments.reproduce.jobs import Job, Jobs, take_in
from experiments.runs.records import EvalRecord, read_record

RESULTS = ROOT / "results" / "evidence"


@pytest.fixture(scope="module")
def runs() -> list[Path]:
    return find_runs([RESULTS / "runs"])


def loaded(directories: Sequence[Path]) -> Runs:
    return load_runs(directories, quiet=True)


def test_the_committed_page_is_what_its_runs_say(runs: list[Path], tmp_path: Path) -> None:
    write_evidence(runs, tmp_path)
    for name in ("evidence.md", "settings.csv", "comparisons.csv"):
        assert (tmp_path / name).read_text("utf-8") == (RESULTS / name).read_text("utf-8"), name
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in RESULTS.iterdir()} - {"runs"}


def test_a_setting_is_its_records(runs: list[Path]) -> None:
    """DiaBlo's setting traced by hand: its NLL, its learning rate among those tried, and its forgetting."""
    found = settings_of(loaded(runs))
    ours = found[OURS]
    chosen = [run for run in runs if "-diablo-N24-" in run.name and list(run.glob(f"eval/{PRIMARY}/*/score.json"))]
    scores = [read_record(next(run.glob(f"eval/{PRIMARY}/*/score.json")), EvalRecord) for run in chosen]
    assert ours.seeds == [0, 1, 2, 3, 4]
    assert sorted(ours.by_seed(PRIMARY)) == pytest.approx(sorted(score.accuracy for score in scores))
    assert ours.items[PRIMARY].shape == (5, 1319)
    assert len(ours.tried) == 7
    assert ours.rate == min(ours.tried, key=lambda point: point[1])[0]
    assert not ours.at_edge
    assert ours.percent == found["lora-r14"].percent  # equal parameters, as registered
    assert found[BASE].nll(*RETENTION) == pytest.approx(np.mean([found[BASE].nll(name) for name in RETENTION]))


def test_comparisons_are_the_registered_ones_corrected_within_a_question(runs: list[Path]) -> None:
    comparisons = comparisons_of(settings_of(loaded(runs)))
    registered = {(question.letter, pair) for question in QUESTIONS for pair in question.pairs}
    assert {(row.question, (row.first, row.second)) for row in comparisons} <= registered
    for letter in {row.question for row in comparisons}:
        family = sorted((row for row in comparisons if row.question == letter), key=lambda row: row.difference.p)
        assert family[0].p_holm == pytest.approx(min(1, len(family) * family[0].difference.p))


def test_a_seed_that_lacks_a_benchmark_does_not_count(runs: list[Path], tmp_path: Path) -> None:
    """On copies of a few runs, one of them without the score of a retention set."""
    kept = [run for run in runs if f"-{BASE}-" in run.name or "-lora-r14-" in run.name]
    copies = [Path(shutil.copytree(run, tmp_path / run.name)) for run in kept]
    before = settings_of(loaded(copies))["lora-r14"].seeds
    scored = next(run for run in copies if list(run.glob("eval/alpaca_nll/*")) and "-s3-" in run.name)
    shutil.rmtree(scored / "eval" / "alpaca_nll")
    assert settings_of(loaded(copies))["lora-r14"].seeds == [seed for seed in before if seed != 3]


def test_without_the_base_nothing_can_be_forgotten(
    runs: list[Path], fails_with: Callable[[Callable[[], object]], str]
) -> None:
    assert "no finished run of method=base" in fails_with(
        lambda: settings_of(loaded([run for run in runs if "-lora-r14-" in run.name]))
    )


@pytest.mark.usefixtures("smollm2")
@pytest.mark.real  # run ids contain the weights' hash: without the local weights the queue plans the hub's
def test_committed_runs_are_runs_of_the_queue_and_count_as_finished(tmp_path: Path, runs: list[Path]) -> None:
    jobs = Jobs(["experiment=evidence", f"runtime.runs_dir={tmp_path}"])
    assert {run.name for run in runs} <= {config.run_id for config in jobs.configs}
    assert take_in(jobs.configs, RESULTS / "runs") >= 109
    finished = [job for job in jobs.known() if job.is_finished()]
    with (RESULTS / "settings.csv").open(encoding="utf-8") as file:
        seeds = sum(int(row["seeds"]) for row in csv.DictReader(file))
    assert sum(job.score for job in finished) == seeds
    first = jobs.take()
    assert isinstance(first, Job)
    assert first.is_finished()  # the base, for which nothing is repeated
