"""The evidence page: regenerated from the committed runs it equals the committed page; missing runs are named."""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from analysis.evidence_against import NO, UNKNOWN, YES, findings
from analysis.evidence_page import write_evidence
from analysis.evidence_runs import (
    BASE,
    MODULES,
    OURS,
    PRIMARY,
    QUESTIONS,
    RETENTION,
    Setting,
    comparisons_of,
    settings_of,
)
from analysis.evidence_spectra import HOLDS, parts
from analysis.load import Runs, find_runs, load_runs
from experiments import ROOT
from experiments.reproduce.jobs import Job, Jobs, take_in
from experiments.runs.config_files import read_config
from experiments.runs.records import EvalRecord, RunPaths, read_record

RESULTS = ROOT / "results" / "evidence"


@pytest.fixture(scope="module")
def runs() -> list[Path]:
    return find_runs([RESULTS / "runs"])


def loaded(directories: Sequence[Path]) -> Runs:
    return load_runs(directories, quiet=True)


def test_the_committed_page_is_what_its_runs_say(runs: list[Path], tmp_path: Path) -> None:
    (spectra,) = (RESULTS / "spectra").iterdir()
    write_evidence(runs, tmp_path, spectra)
    for name in ("evidence.md", "settings.csv", "comparisons.csv", "rates.csv"):
        assert (tmp_path / name).read_text("utf-8") == (RESULTS / name).read_text("utf-8"), name
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in RESULTS.iterdir()} - {"runs", "spectra"}


def test_what_one_block_covers_is_the_records() -> None:
    """The answer to (h) and its table, from the lines of `spectra.jsonl`."""
    (run,) = (RESULTS / "spectra").iterdir()
    lines = [json.loads(line) for line in (run / "spectra.jsonl").read_text(encoding="utf-8").splitlines()]
    last = lines[-1]["layers"]
    covered = {side: np.mean([np.mean(layer[side]["covered"]) for layer in last.values()]) for side in ("X", "g_Y")}
    held = sum(any(min(layer[side]["covered"]) >= HOLDS for side in layer) for layer in last.values())
    said, texts, _ = parts(run, "spectra")
    assert (
        f"it does in {held} of {len(last)} layers: one block covers {100 * covered['X']:.1f} % of the inputs X" in said
    )
    assert f"and {100 * covered['g_Y']:.1f} % of the output gradients g_Y" in said
    row = next(line for line in texts[-1].splitlines() if "output gradients g_Y |     down |      1 |" in line)
    ranks = [layer["g_Y"]["stable_rank"] for name, layer in lines[0]["layers"].items() if "down_proj" in name]
    assert f"| {np.mean(ranks):.1f} |" in re.sub(" +", " ", row)


def test_a_setting_is_its_records(runs: list[Path]) -> None:
    """DiaBlo's setting traced by hand: its NLL, its learning rate among those tried, and its forgetting."""
    found = settings_of(loaded(runs))
    ours = found[OURS]
    scored = [run for run in runs if "-diablo-N24-" in run.name and list(run.glob(f"eval/{PRIMARY}/*/score.json"))]
    chosen = [
        run for run in scored if read_config(RunPaths(run)).task.target_modules == tuple(MODULES)
    ]  # not those of (f)
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


def made(name: str, nll: float, forgotten: float = 0.0) -> Setting:
    """Return a setting of five seeds that is `nll` on every row, give or take noise that all settings share."""
    noise = np.random.default_rng(0).normal(0, 1e-3, (5, 40))
    items = {PRIMARY: nll + noise, **dict.fromkeys(RETENTION, 2 + forgotten + noise)}
    return Setting(name, 1.0, 1e-3, [], [0, 1, 2, 3, 4], items, dict.fromkeys(items, "one"))


def fewer(setting: Setting, seeds: int) -> Setting:
    items = {name: values[:seeds] for name, values in setting.items.items()}
    return replace(setting, seeds=setting.seeds[:seeds], items=items)


@pytest.mark.parametrize(
    ("nll", "forgotten", "found"),
    [
        # all as DiaBlo: nothing is better, but the place of the blocks does not matter
        ({}, {}, [NO, NO, YES, NO, YES, UNKNOWN]),
        # the paper's claims: DiaBlo is best, and more parameters help; no gain is equal to LoRA's
        (
            dict.fromkeys(("lora", "dora", "pissa", "milora", "full", "sparse"), 0.55)
            | {"diablo-N96": 0.5, "diablo-N48": 0.49, "diablo-N24": 0.48, "diablo-N12": 0.47},
            {},
            [NO, NO, NO, NO, NO, UNKNOWN],
        ),
        # PiSSA, full fine-tuning and other entries are better; at equal NLL LoRA forgets less
        ({"pissa": 0.4, "full": 0.4, "sparse": 0.4}, {"diablo": 0.1}, [YES] * 6),
        # LoRA is better at both sizes, though little; full fine-tuning by less than the margin; DiaBlo forgets less
        ({"lora": 0.495, "full": 0.495}, {"lora": 0.1}, [YES, NO, YES, NO, YES, NO]),
    ],
)
def test_what_counts_against_us_is_found(nll: dict[str, float], forgotten: dict[str, float], found: list[str]) -> None:
    names = {name for question in QUESTIONS for pair in question.pairs for name in pair}

    def value(of: dict[str, float], name: str, default: float) -> float:
        return next((of[start] for start in sorted(of, key=len, reverse=True) if name.startswith(start)), default)

    settings = {name: made(name, value(nll, name, 0.5), value(forgotten, name, 0.0)) for name in names}
    about = findings(settings, comparisons_of(settings))
    assert [one.found for one in about] == found
    three = {name: fewer(setting, 3) for name, setting in settings.items()}
    assert {one.found for one in findings(three, comparisons_of(three))} == {UNKNOWN}


def test_what_was_not_compared_is_not_judged(runs: list[Path]) -> None:
    settings = {name: made(name, 0.5) for name in (OURS, "full", BASE)}
    (only,) = findings(settings, comparisons_of(settings))
    assert only.registered.startswith("Full fine-tuning")
    committed = findings(found := settings_of(loaded(runs)), comparisons_of(found))
    assert len(committed) == 6
    assert {one.found for one in committed} <= {YES, NO, UNKNOWN}


def test_scores_of_other_tokens_are_not_compared(
    runs: list[Path], fails_with: Callable[[Callable[[], object]], str]
) -> None:
    """Two runs of which one was scored on prompts too have another NLL, whatever they learnt."""
    settings = settings_of(loaded([run for run in runs if f"-{BASE}-" in run.name or "-r14-" in run.name]))
    settings[OURS] = replace(
        settings["lora-r14"], name=OURS, evaluations=dict.fromkeys(settings["lora-r14"].items, "other")
    )
    assert "was scored as other and lora-r14 as gsm8k_nll/pyreft-" in fails_with(lambda: comparisons_of(settings))


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
    assert take_in(jobs.configs, RESULTS / "runs") >= 277
    finished = [job for job in jobs.known() if job.is_finished()]
    with (RESULTS / "settings.csv").open(encoding="utf-8") as file:
        seeds = sum(int(row["seeds"]) for row in csv.DictReader(file))
    assert sum(job.score for job in finished) == seeds
    first = jobs.take()
    assert isinstance(first, Job)
    assert first.is_finished()  # the base, for which nothing is repeated
