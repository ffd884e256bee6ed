"""The typed config: what a mapping may hold, how it is read, and what `--help-config` prints of it."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from experiments import CONFIGS
from experiments.config import Recipe, RunConfig
from experiments.plan import compose, experiment_files
from experiments.plan.__main__ import main
from experiments.plan.compose import plan
from experiments.plan.explain import explain
from experiments.runs.config_files import config_hash, read_config, run_id, write_config
from experiments.runs.received import read_settings
from experiments.runs.records import RunPaths
from experiments.settings import SECTIONS, section, typed, with_values

Fails = Callable[[Callable[[], object]], str]


@pytest.fixture(scope="module")
def config() -> RunConfig:
    return plan(["method=diablo", "protocol.replace={a: b}"])[0]


def test_a_config_is_frozen(config: RunConfig) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.recipe.batch_size = 3  # pyright: ignore[reportAttributeAccessIssue]
    changed = with_values(config, {"recipe.batch_size": 3, "method.adapter.num_blocks": 2})
    assert (changed.recipe.batch_size, changed.mapping["method"]["adapter"]["num_blocks"]) == (3, 2)
    assert (config.recipe.batch_size, config.mapping["method"]["adapter"]["num_blocks"]) == (16, 8)


def test_lists_are_tuples_but_in_open_mappings(config: RunConfig) -> None:
    assert config.recipe.betas == (0.9, 0.999)
    assert config.evaluation.benchmarks == ("arith",)
    assert config.task.target_modules == ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
    assert config.method.adapter is not None
    assert config.method.adapter["target_modules"] == list(config.task.target_modules or ())  # for PEFT
    assert config.protocol.replace == {"a": "b"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda mapping: mapping["recipe"].update(batchsize=3), "no setting recipe.batchsize: did you mean batch_size"),
        (
            lambda mapping: mapping["task"]["data"].update(held_out=3),
            "no setting task.data.held_out: did you mean held",
        ),
        (lambda mapping: mapping["recipe"].pop("epochs"), "the setting recipe.epochs is missing"),
        (lambda mapping: mapping.pop("protocol"), "the setting protocol is missing"),
        (lambda mapping: mapping["evaluation"].update(generation=None), "evaluation.generation=null: it must be a sec"),
        (lambda mapping: mapping["method"].update(adapter=5), "method.adapter=5: it must be a section of settings"),
        (lambda mapping: mapping.update(mapping=3), "no setting mapping"),
    ],
)
def test_a_mapping_has_the_settings_that_there_are(
    change: Callable[[dict], object], message: str, config: RunConfig, fails_with: Fails
) -> None:
    mapping = yaml.safe_load(yaml.safe_dump(dict(config.mapping)))
    change(mapping)
    assert fails_with(lambda: typed(mapping)).startswith(message)


def test_a_misspelt_key_in_a_file_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_with: Fails
) -> None:
    """Hydra would add it, and the setting would keep its default."""
    configs = shutil.copytree(CONFIGS, tmp_path / "configs")
    text = (CONFIGS / "task" / "arith.yaml").read_text(encoding="utf-8")
    (configs / "task" / "misspelt.yaml").write_text(text.replace("warmup_steps", "warm_up_steps"), encoding="utf-8")
    for module in (compose, experiment_files):
        monkeypatch.setattr(module, "CONFIGS", configs)
    said = fails_with(lambda: plan(["task=misspelt", "recipe.learning_rate=1e-3"]))
    assert said == "no setting recipe.warm_up_steps: did you mean warmup_steps or max_steps?"


def test_the_name_that_a_prerequisite_had_is_read_and_kept_in_the_run_id(tmp_path: Path) -> None:
    """Run directories of earlier versions call it `first`."""
    (config,) = plan(["method=lori_s"])
    assert config.method.prerequisite is not None
    assert config.method.prerequisite.method.name == "lori_d"
    method = {"first" if key == "prerequisite" else key: value for key, value in config.mapping["method"].items()}
    earlier = {**config.mapping, "method": method}
    assert config_hash(earlier) == config_hash(config.mapping)
    assert config.run_id == run_id(earlier)
    run = RunPaths(tmp_path / config.run_id)
    write_config(run, earlier)
    assert read_config(run) == config
    assert "first" not in read_settings(run.config)["method"]


def test_a_section_alone_is_typed(config: RunConfig) -> None:
    assert section(Recipe, config.mapping["recipe"]) == config.recipe


def test_help_tells_every_setting_of_run_yaml(capsys: pytest.CaptureFixture[str]) -> None:
    content = yaml.safe_load((CONFIGS / "run.yaml").read_text(encoding="utf-8"))
    for name in SECTIONS:
        main(["--help-config", name, "quantization=gptq"])
        lines = capsys.readouterr().out.splitlines()
        told = [line.partition(" = ")[0].strip() for line in lines]
        for key in content.get(name, {}):
            assert f"{name}.{key}" in told
    main(["--help-config", "recipe", "recipe.batch_size=32"])
    text = capsys.readouterr().out
    assert (
        "recipe.batch_size = 32\n    Rows per optimizer step, over all devices. A whole number of at least 1.\n" in text
    )


def test_help_of_what_is_no_section_names_the_nearest(config: RunConfig, fails_with: Fails) -> None:
    assert fails_with(lambda: list(explain("recipes", config.mapping))) == (
        "no section 'recipes': did you mean recipe?"
    )
