"""The typed config: what a mapping may hold, how it is read, and what `--help-config` prints of it."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterator
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


def forget_files() -> None:
    for module in (compose, experiment_files):
        for function in vars(module).values():
            if hasattr(function, "cache_clear"):
                function.cache_clear()


@pytest.fixture
def own_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str, str], None]]:
    """Write one more file into a copy of configs/: group, the file it is like, and what it says beside."""
    configs = shutil.copytree(CONFIGS, tmp_path / "configs")
    for module in (compose, experiment_files):
        monkeypatch.setattr(module, "CONFIGS", configs)

    def write(group: str, like: str, more: str) -> None:
        content = yaml.safe_load((CONFIGS / group / f"{like}.yaml").read_text(encoding="utf-8"))
        for key, value in yaml.safe_load(more).items():
            *parents, last = key.split("/") if isinstance(key, str) else [key]
            node = content
            for part in parents:
                node = node[part]
            if value == "absent":
                del node[last]
            else:
                node[last] = value
        head = "# @package _global_\n" if group == "task" else ""
        (configs / group / "own.yaml").write_text(head + yaml.safe_dump(content, sort_keys=False), encoding="utf-8")

    forget_files()
    yield write
    forget_files()


@pytest.mark.parametrize(
    ("group", "like", "more", "message"),
    [
        ("task", "arith", "recipe/warm_up: 3", "no setting recipe.warm_up: did you mean warmup_steps"),
        ("task", "arith", "recipe: null", "recipe=null: it must be a section of settings"),
        ("task", "arith", "task: five", "task='five': it must be a section of settings"),
        ("task", "arith", "evaluation: {generation: 3}", "evaluation.generation=3: it must be a section of settings"),
        ("task", "arith", "spectra: {evry: 5}", "no setting spectra.evry: did you mean every?"),
        ("task", "arith", "run_id: mine", "no setting run_id"),
        ("task", "arith", "runtime: {1: 2}", "runtime.1: a setting's name must be text, in quotes"),
        ("task", "arith", "task/name: absent", "the setting task.name is missing"),
        ("task", "arith", "task/data: absent", "the setting task.data is missing"),
        ("task", "arith", "task/benchmark: [arith]", "no setting task.benchmark: did you mean benchmarks?"),
        ("method", "lora", "contract: absent", "the setting method.contract is missing"),
        ("method", "lora", "contract/merge: true", "no setting method.contract.merge: did you mean merges"),
        ("method", "lora", "learning_rate/aritth: 1", "method.learning_rate.aritth: no such task: did you mean arith"),
        ("method", "lora", "learning_rate: 3", "method.learning_rate=3: it must be a section of settings"),
        ("method", "lora", "adapter/_target_: os.system", "method.adapter._target_=os.system: only names in diablo"),
        ("method", "lora", "prepare: {rows: 3}", "method.prepare._target_=None: only names in diablo and peft"),
        ("method", "lora", "prerequisite: {method: lora}", "method.prerequisite={'method': 'lora'}: it must be a name"),
        ("method", "lora", "adapter: 3", "method.adapter=3: it must be a section of settings"),
        ("method", "lora", "name: absent", "the setting method.name is missing"),
        ("model", "tiny", "gguf: {}", "the setting model.gguf.file is missing"),
        ("model", "tiny", "gguf: {file: a.gguf, sha256: ab}", "model.gguf.sha256='ab': it must be 64 hexadecimal"),
        ("model", "tiny", "adapter_size: 3", "model.adapter_size=3: it must be a section of settings"),
        ("model", "tiny", "architecture: absent", "the setting model.architecture is missing"),
        ("model", "tiny", "architecture/model_type: absent", "model.architecture.model_type is missing: name"),
        ("model", "tiny", "architecture/model_type: lama", "model.architecture.model_type=lama: no model type of tra"),
        ("model", "tiny", "architecture/model_type: 3", "model.architecture.model_type=3: it must be text"),
        ("model", "tiny", "architecture/hiden_size: 96", "model.architecture.hiden_size: LlamaConfig has no such fie"),
        ("model", "tiny", "architecture/hidden_size: wide", "model.architecture.hidden_size='wide': it must be a whol"),
        ("model", "tiny", "architecture/num_attention_heads: 0", "model.architecture.num_attention_heads=0: it must"),
        ("model", "tiny", "architecture/num_attention_heads: 5", "model.architecture.num_key_value_heads=2: it does"),
        ("model", "tiny", "architecture/num_key_value_heads: 3", "model.architecture.num_key_value_heads=3: it does"),
        ("model", "tiny", "architecture/hidden_size: 98", "model.architecture.num_attention_heads=4: it does not di"),
        ("quantization", "gptq", "bits: absent", "the setting quantization.bits is missing"),
        ("quantization", "gptq", "options: absent", "the setting quantization.options is missing"),
        ("quantization", "gptq", "options/damp_percent: little", "quantization.options.damp_percent='little': it must"),
        ("method", "lora", "prerequisite: lora", "method.prerequisite=lora: a method cannot come before itself"),
        ("method", "lora", "defaults: base", "the files of method=own do not fit together: "),
        (
            "model",
            "tiny",
            "defaults: [nosuch]",
            "the files of model=own do not fit together: In 'model/own': Could not ",
        ),
        ("task", "arith", "7: x", "7: a setting's name must be text, in quotes"),
    ],
)
def test_a_file_of_ones_own_is_checked(
    group: str,
    like: str,
    more: str,
    message: str,
    own_file: Callable[[str, str, str], None],
    fails_with: Fails,
) -> None:
    own_file(group, like, more)
    said = fails_with(lambda: plan([f"{group}=own", "recipe.learning_rate=1e-3"]))
    assert said.startswith(message)
    assert "\n" not in said


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("name: [own", "own.yaml, line 1: while parsing a flow sequence: expected ',' or ']', but got '<stream end>'"),
        ("name: own\nname: two\n", "own.yaml, line 2: while constructing a mapping: found duplicate key name"),
        (
            "name: own\npath: ${\n",
            "the files of model=own do not fit together: path: not a reference such as ${task.name}",
        ),
    ],
)
def test_a_file_that_cannot_be_read_is_told_with_its_line(
    content: str, message: str, own_file: Callable[[str, str, str], None], fails_with: Fails
) -> None:
    own_file("model", "tiny", "{}")
    (compose.CONFIGS / "model" / "own.yaml").write_text(content, encoding="utf-8")
    assert message in fails_with(lambda: plan(["model=own"]))


@pytest.mark.parametrize("missing", ["learning_rate", "prepare", "prerequisite"])
def test_what_a_method_file_may_leave_out(missing: str, own_file: Callable[[str, str, str], None]) -> None:
    content = yaml.safe_load((CONFIGS / "method" / "lora.yaml").read_text(encoding="utf-8"))
    own_file("method", "lora", f"{missing}: absent" if missing in content else "label: lora")
    (config,) = plan(["method=own", "recipe.learning_rate=1e-3"])
    assert config.method.prepare is None


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
