"""The model card of a run: its front matter, its figures, and the commands that repeat the run."""

from __future__ import annotations

import dataclasses
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from analysis.stats import accuracy_interval
from experiments import ROOT
from experiments.card import main
from experiments.merge import merge
from experiments.plan.compose import plan
from experiments.reproduce.command import commands
from experiments.runs.config_files import read_config, write_config
from experiments.runs.records import (
    EvalRecord,
    RunPaths,
    TrainRecord,
    read_record,
    trained_record,
    write_record,
)
from experiments.settings import with_values
from experiments.train.card import card, with_interval, write_card
from tests.conftest import planned

REAL = ROOT / "results" / "real_smoke" / "runs"


@pytest.fixture
def run(finished: RunPaths, tmp_path: Path) -> RunPaths:
    folder = tmp_path / finished.root.name
    shutil.copytree(finished.root, folder)
    return RunPaths(folder)


def score_of(run: RunPaths) -> EvalRecord:
    (paths,) = run.evaluations()
    return read_record(paths.score, EvalRecord)


def test_scoring_adds_the_scores_to_the_card_and_the_command_writes_the_same(
    run: RunPaths, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run.adapter / "README.md"
    by_scoring = path.read_text(encoding="utf-8")
    write_card(run)
    assert "import diablo" in path.read_text(encoding="utf-8")
    main([str(run.root)])
    assert capsys.readouterr().out.strip() == str(path)
    assert path.read_text(encoding="utf-8") == by_scoring
    after: Any = ModelCard.load(path)
    data = after.data.to_dict()
    assert data["library_name"] == "peft"
    assert {"diablo"} <= set(data["tags"])
    score = score_of(run)
    (result,) = after.data.eval_results
    assert (result.dataset_name, result.metric_type, result.metric_value) == ("arith", "accuracy", score.accuracy)
    assert f"| arith | {score.protocol} | accuracy | {with_interval(score)} | {score.n} | 0 | – |" in after.text
    trained_record(run)  # the card is no part of what training wrote
    assert str(run.root.parent) not in after.text


def test_the_commands_plan_the_very_same_run(run: RunPaths) -> None:
    config = read_config(run)
    found = commands(config)
    (again,) = plan(shlex.split(found[0])[3:])
    assert again.run_id == config.run_id
    assert again.mapping["evaluation"] == config.mapping["evaluation"]
    main([str(run.root)])
    assert found[0] in (run.adapter / "README.md").read_text(encoding="utf-8")


def test_a_card_without_commands_holds_the_config(run: RunPaths) -> None:
    write_card(run, commands=[])
    text = (run.adapter / "README.md").read_text(encoding="utf-8")
    stored = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert stored["run_id"] == run.root.name
    assert stored["runtime"]["runs_dir"] is None
    assert stored["method"] == read_config(run).mapping["method"]


def test_a_hub_id_without_a_slash_is_named(run: RunPaths) -> None:
    config = with_values(read_config(run), {"model.path": "gpt2"})
    text = card(run, config, read_record(run.train_record, TrainRecord), [])
    assert "base_model: gpt2\n" in text
    assert "AutoModelForCausalLM.from_pretrained('gpt2')" in text
    assert "FOLDER" not in text


def test_other_seeds_of_the_setting_are_named(run: RunPaths, small: list[str], tmp_path: Path) -> None:
    config = read_config(run)
    (paths,) = run.evaluations()
    for seed, accuracy in ((1, 0.25), (2, 0.5)):
        (other,) = plan([*small, "method=diablo", f"seed={seed}", *(["recipe.learning_rate=0.5"] if seed == 2 else [])])
        place = RunPaths(run.root.parent / other.run_id)
        write_config(place, other.mapping)
        folder = place.root / paths.root.relative_to(run.root)
        folder.mkdir(parents=True)
        (folder / "plan.json").write_text("{}", encoding="utf-8")
        record = dataclasses.replace(score_of(run), run_id=other.run_id, accuracy=accuracy)
        write_record(folder / "score.json", record)
    text = card(run, config, read_record(run.train_record, TrainRecord), [score_of(run)])
    assert "| 0 | 1: 25.0% |" in text  # seed 2 has another learning rate


def test_intervals_are_those_of_the_report(run: RunPaths) -> None:
    import numpy as np

    score = dataclasses.replace(score_of(run), items=[1.0] * 7 + [0.0] * 13, n=20, accuracy=0.35)
    score = dataclasses.replace(score, standard_error=(0.35 * 0.65 / 20) ** 0.5)
    interval = accuracy_interval(np.array([score.items]))
    assert with_interval(score) == f"35.0% ({interval.low:.1%} to {interval.high:.1%})"
    none = dataclasses.replace(score, accuracy=0.0, standard_error=0.0)
    assert with_interval(none) == "0.0% (0.0% to 16.1%)"
    nll = dataclasses.replace(score, metric="nll", accuracy=1.5, standard_error=0.25)
    assert with_interval(nll) == "1.5000 ± 0.2500 (standard error)"


def test_a_merged_model_gets_the_card(run: RunPaths, tmp_path: Path) -> None:
    merge(run, tmp_path / "merged", to_grid=False)
    loaded = ModelCard.load(tmp_path / "merged" / "README.md")
    assert loaded.data.to_dict()["library_name"] == "transformers"
    assert "The adapter is merged into the weights" in loaded.text
    assert "import diablo" not in loaded.text
    assert with_interval(score_of(run)) in loaded.text


@pytest.mark.parametrize(
    ("task", "datasets", "licences"),
    [
        ("gsm8k_mawps", ["openai/gsm8k"], {"gsm8k": "mit", "mawps": "odc-by"}),
        ("arc_easy", None, {"arc_easy": "odc-by"}),
    ],
)
def test_data_sets_and_their_licences(task: str, datasets: Any, licences: dict[str, str]) -> None:
    """On committed runs of SmolLM2 on real rows, whose commands give the same runs again."""
    sources = sorted(REAL.glob(f"*-diablo-*-{task}-s*"))
    assert sources
    assert all(commands(read_config(RunPaths(source))) for source in sources)
    for source in sources:
        committed = RunPaths(source)
        config, trained = read_config(committed), read_record(committed.train_record, TrainRecord)
        scores = [read_record(path, EvalRecord) for path in sorted(source.glob("eval/*/*/score.json"))]
        text = card(committed, config, trained, scores, merged=True)
        data = yaml.safe_load(text.split("---\n")[1])
        assert data["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
        assert (data.get("datasets"), data["data_licenses"]) == (datasets, licences)
        assert len(data.get("model-index", [{"results": []}])[0]["results"]) == len(scores)
        assert ("Not evaluated when" in text) == (not scores)


def test_unknown_licences_are_left_to_the_page(finished: RunPaths) -> None:
    (config,) = plan(["task=metamathqa", "method=diablo"])
    text = card(finished, config, read_record(finished.train_record, TrainRecord), [], merged=True)
    assert "| metamathqa | https://huggingface.co/datasets/meta-math/MetaMathQA | see the data set's page |" in text
    assert "data_licenses" not in text


def test_a_base_in_a_folder_is_not_named_by_its_path(finished: RunPaths, tmp_path: Path) -> None:
    config = with_values(read_config(finished), {"model.path": str(tmp_path)})
    record = dataclasses.replace(read_record(finished.train_record, TrainRecord), base=str(tmp_path))
    assert str(tmp_path) not in card(finished, config, record, [], commands=[])


def test_a_run_that_trained_nothing_has_no_card(small: list[str]) -> None:
    from experiments.errors import UserError
    from experiments.train.run import train

    run = planned([*small, "method=base"])
    train(run)
    with pytest.raises(UserError, match="trained nothing"):
        main([str(run.root)])
