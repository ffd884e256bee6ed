"""Records that contradict their files are refused by name wherever they are reported."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from analysis.load import load_metrics, load_runs, load_spectra, records
from analysis.report import write_report
from analysis.tables import csv_text, markdown
from eval.rescore import rescore
from eval.run import evaluate
from experiments.errors import UserError
from experiments.plan.choose import _held_out
from experiments.runs.config_files import read_config, write_config
from experiments.runs.received import read_settings
from experiments.runs.records import RunPaths, read_json
from experiments.settings import with_values
from tests.analysis.analysis_runs import write_run, write_spectra

Fails = Callable[[Callable[[], object]], str]


def copied(run: RunPaths, folder: Path) -> RunPaths:
    return RunPaths(Path(shutil.copytree(run.root, folder / run.root.name)))


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(read_json(path) | values), encoding="utf-8")


def edit_line(path: Path, number: int, **values: Any) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    lines[number] = json.dumps(json.loads(lines[number]) | values)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


CHANGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "a completion": (lambda folder: edit_line(folder / "samples.jsonl", 3, completion="#### 5"), "not the completions"),
    "an answer": (lambda folder: edit_line(folder / "samples.jsonl", 3, answer="5"), "not the completions"),
    "what the samples say of the model": (
        lambda folder: edit_line(folder / "samples.jsonl", 0, identity=True),
        "not the",
    ),
    "the accuracy": (lambda folder: edit(folder / "score.json", accuracy=0.9), "accuracy does not follow"),
    "the error": (lambda folder: edit(folder / "score.json", standard_error=0.001), "standard_error does not follow"),
    "n": (lambda folder: edit(folder / "score.json", n=10), "n does not fit its items"),
    "an item": (lambda folder: edit(folder / "score.json", items=[2.0] + [0.0] * 27), "n does not fit its items"),
    "the answers that were not found": (lambda folder: edit(folder / "score.json", unparsed=99), "unparsed is more"),
    "the protocol": (lambda folder: edit(folder / "score.json", protocol="lori"), "its protocol does not follow"),
    "the benchmark": (lambda folder: edit(folder / "score.json", benchmark="gsm8k"), "its benchmark does not follow"),
    "the parser": (lambda folder: edit(folder / "score.json", parser="last_number"), "its parser does not follow"),
    "the identity": (lambda folder: edit(folder / "score.json", identity=True), "its identity does not follow"),
    "the rows left out": (lambda folder: edit(folder / "score.json", dropped=5), "its dropped does not follow"),
    "the plan": (lambda folder: edit(folder / "plan.json", data_hash="0"), "its data_hash does not follow"),
    "the plan's settings": (lambda folder: edit(folder / "plan.json", settings={}), "not the plan of an evaluation"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("reader", ["analysis", "eval.run", "rescore"])
def test_a_changed_score_is_refused_by_name(
    reader: str, change: str, finished: RunPaths, tmp_path: Path, fails_with: Fails
) -> None:
    run = copied(finished, tmp_path)
    assert records(load_runs([run.root]).frame)[0]["n"] == 28
    (paths,) = run.evaluations()
    action, message = CHANGES[change]
    action(paths.root)
    if reader == "analysis":
        runs = load_runs([run.root], quiet=True)
        assert bool(runs.frame["accuracy"].isna().all())
        said = runs.problems[0]
    else:
        said = fails_with(lambda: evaluate(run) if reader == "eval.run" else rescore(run))
    assert message in said
    assert str(paths.root) in said


@pytest.mark.parametrize("name", ["samples.jsonl", "plan.json"])
def test_a_score_without_its_files_is_a_committed_one_or_none(
    name: str, finished: RunPaths, tmp_path: Path, fails_with: Fails
) -> None:
    """Committed runs hold only scores, which tables read; scoring a run needs the files behind the score."""
    run = copied(finished, tmp_path)
    (paths,) = run.evaluations()
    (paths.root / name).unlink()
    assert records(load_runs([run.root]).frame)[0]["n"] == 28
    assert f"{name}: missing" in fails_with(lambda: evaluate(run))


def test_changed_completions_do_not_become_another_evaluations(
    finished: RunPaths, tmp_path: Path, fails_with: Fails
) -> None:
    run = copied(finished, tmp_path)
    (paths,) = run.evaluations()
    edit_line(paths.samples, 3, completion="#### 5")
    said = fails_with(lambda: evaluate(run, ["evaluation.parser.number=last_number"]))
    assert f"{paths.samples}: not the completions" in said


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"config_hash": "0" * 64}, "not of this config"),
        ({"held_out": {"rows": 14, "loss": 0.001, "exact_match": 1.0}}, "held_out does not follow from held_out.json"),
    ],
)
def test_a_changed_training_record_is_refused(
    values: dict[str, Any], message: str, finished: RunPaths, tmp_path: Path, fails_with: Fails
) -> None:
    """In tables, in scoring and in the choice of a learning rate."""
    run = copied(finished, tmp_path)
    config = read_config(run)
    config = with_values(config, {"runtime.runs_dir": str(tmp_path)})
    write_config(run, config.mapping)
    assert _held_out(config) == read_json(run.train_record)["held_out"]
    edit(run.train_record, **values)
    assert any(message in line for line in load_runs([run.root], quiet=True).problems)
    for reader in (lambda: evaluate(run), lambda: _held_out(config)):
        said = fails_with(reader)
        assert message in said
        assert str(run.train_record) in said


# One unreadable run does not affect the others


def rewrite(run: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """Change the run's config and rename the run to the run id of the changed config."""
    from experiments.runs.config_files import run_id

    config = read_settings(RunPaths(run).config)
    change(config)
    config["run_id"] = run_id(config)
    new = run.rename(run.with_name(config["run_id"]))
    write_config(RunPaths(new), config)
    return new


BROKEN: dict[str, Callable[[Path], object]] = {
    "a seed that is text": lambda run: rewrite(run, lambda config: config.update(seed="0")),
    "a seed that is too large": lambda run: rewrite(run, lambda config: config.update(seed=2**70)),
    "a size that is text": lambda run: rewrite(run, lambda config: config["method"]["adapter"].update(r="7")),
    "a size that is a list": lambda run: rewrite(run, lambda config: config["method"]["adapter"].update(r=[7])),
    "a rate that is text": lambda run: rewrite(run, lambda config: config["recipe"].update(learning_rate="1e-3")),
    "a method without a section": lambda run: rewrite(run, lambda config: config.update(evaluation=None)),
    "benchmarks that are a number": lambda run: rewrite(run, lambda config: config["evaluation"].update(benchmarks=3)),
    "counts beyond any column": lambda run: edit(run / "train.json", steps=10**30),
    "parameters that are text": lambda run: edit(run / "train.json", trainable_parameters="many"),
    "a limit that is text": lambda run: edit(next(run.glob("eval/*/*/score.json")), generation={"limit": "x"}),
    "settings that are a list": lambda run: edit(next(run.glob("eval/*/*/score.json")), generation={"limit": [1]}),
    "a choice that is none": lambda run: (run / "learning_rate.json").write_text(
        '{"by": 1, "at_edge": 0, "tried": 1}', encoding="utf-8"
    ),
    "a deep record": lambda run: (run / "train.json").write_text("[" * 100_000, encoding="utf-8"),
    "norms that are text": lambda run: edit_line(run / "metrics.jsonl", 0, gradient_norms=["x"] * 16),
    "losses that are text": lambda run: edit_line(run / "metrics.jsonl", 0, loss="x"),
    "spectra that are text": lambda run: (
        write_spectra(run),
        edit_line(run / "spectra.jsonl", 0, step="x"),
    ),
}


@pytest.mark.parametrize("damage", BROKEN)
def test_the_report_survives_a_run_that_it_cannot_read(damage: str, tmp_path: Path) -> None:
    whole = [write_run(tmp_path / "runs", "lora", seed=seed, items=[1, 0]) for seed in (0, 1)]
    broken = write_run(tmp_path / "runs", "lora", seed=2, items=[1, 1])
    found = BROKEN[damage](broken)
    broken = found if isinstance(found, Path) else broken
    page = write_report([*whole, broken], tmp_path / "report", None, "x")
    text = page.read_text(encoding="utf-8")
    assert f"{broken.name}/" in text
    table = pd.read_csv(tmp_path / "report" / "table.csv")
    assert bool(table["by_seed"].str.contains("0=0.5 1=0.5").any())


def test_metrics_and_spectra_of_other_types_are_one_line(tmp_path: Path) -> None:
    run = write_run(tmp_path, "lora", items=[1, 0])
    write_spectra(run)
    for name, load in (("metrics.jsonl", load_metrics), ("spectra.jsonl", load_spectra)):
        edit_line(run / name, 0, step="one")
        with pytest.raises(UserError, match=name):
            load(run)


# Text in tables


def test_text_in_tables_is_neither_markup_nor_a_formula() -> None:
    cells = ["=1+1", "+a", "-a", "@x", "\t=1", "-0.5", "+1e3", "a=b", "<0.001"]
    frame = pd.DataFrame({"label": cells, "value": range(len(cells))})
    read = [line.rsplit(",", 1)[0].strip('"') for line in csv_text(frame).splitlines()[1:]]
    assert read == ["'=1+1", "'+a", "'-a", "'@x", "'\t=1", "-0.5", "+1e3", "a=b", "<0.001"]
    text = markdown(pd.DataFrame({"<b>": ["<script>alert(1)</script>", "a|b", "a\nb", "<0.001"]}))
    assert "<script" not in text
    assert "<b>" not in text
    assert "&lt;script>" in text
    assert "a\\|b" in text
    assert "<0.001" in text
    assert len(text.strip().splitlines()) == 6
