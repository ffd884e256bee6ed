"""Configs, sweeps and run ids."""

from __future__ import annotations

import csv
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from experiments import CONFIGS, ROOT
from experiments.config import RunConfig
from experiments.errors import UserError
from experiments.plan import compose as planning
from experiments.plan.compose import options, plan, resolve, resolve_with_hydra, sweep, write_runs
from experiments.plan.counting import count
from experiments.runs.config_files import read_config
from experiments.runs.records import RunPaths


def only(arguments: list[str]) -> RunConfig:
    (config,) = plan(arguments)
    return config


# Composing a pair takes a quarter of a second: every method with two models and every model with one method; the rest
# of the product is slow.
PAIRS = [
    pytest.param(model, method, marks=() if model in ("tiny", "llama2_7b") or method == "diablo" else pytest.mark.slow)
    for model in options("model")
    for method in options("method")
]


@pytest.mark.parametrize(("model", "method"), PAIRS)
def test_every_method_composes_with_every_model(model: str, method: str) -> None:
    config = only([f"model={model}", f"method={method}", "task=commonsense_170k", "recipe.learning_rate=1e-4"])
    assert config.run_id.startswith(f"{model}-{method}")


@pytest.mark.parametrize("name", options("experiment"))
def test_every_experiment_plans(name: str) -> None:
    configs = plan([f"experiment={name}"])
    assert len({config.run_id for config in configs}) == len(configs) > 0


def test_sweep_grammar() -> None:
    configs = plan(["method=diablo,lora", "seed=range(0,3)", "recipe.learning_rate=1e-3,2e-3"])
    assert [(c.method.name, c.seed, c.recipe.learning_rate) for c in configs] == [
        (method, seed, rate) for method in ("diablo", "lora") for seed in range(3) for rate in (1e-3, 2e-3)
    ]


@pytest.mark.parametrize(
    "arguments",
    [
        ["method=diablo", "seed=3"],
        ["method=dora", "model=llama3_8b", "task=metamathqa", "method.adapter.r=16", "recipe.learning_rate=1e-4"],
        ["method=diablo", "method.adapter.num_blocks=16", "+method.adapter.allow_uneven=true", "recipe.epochs=1"],
        ["method=lora", "method.adapter.target_modules=[q_proj,o_proj]", "recipe.max_grad_norm=0.5"],
        ["task=gsm8k", "protocol=diablo_release", "protocol.max_length=128"],
    ],
)
def test_merging_single_values_equals_composing_everything(arguments: list[str]) -> None:
    (overrides,) = sweep(arguments)
    assert resolve(overrides) == resolve_with_hydra(overrides)


def test_what_is_resolved_once_for_many_runs_is_right_for_each() -> None:
    """References from and beside swept settings: `lora_alpha: ${times:2,${.r}}`, the chosen learning rate."""
    references = ["method.adapter.r=2,4", "recipe.adapter_dropout=0.0,0.1", "protocol.bos=true,false"]
    beside = ["recipe.learning_rate=1e-3,${method.learning_rate.arith}", "seed=1", "recipe.schedule=cosine"]
    for overrides in (*sweep(["method=lora", *references, *beside]), *sweep(["method=lora", *beside, *references])):
        assert resolve(overrides) == resolve_with_hydra(overrides)


def test_planning_a_thousand_runs_takes_seconds() -> None:
    started = time.process_time()
    configs = plan(
        ["method=lora,diablo", "seed=range(0,50)", f"recipe.learning_rate={','.join(map(str, range(1, 11)))}"]
    )
    assert len(configs) == 1000
    assert time.process_time() - started < 20  # a safety net: well below a second


RESULT = [
    "seed=1",
    "recipe.learning_rate=0.5",
    "recipe.epochs=7",
    "recipe.micro_batch_size=4",
    "method.adapter.num_blocks=4",
    "method.adapter.dropout=0.1",
    "protocol.max_length=32",
    "task.data.seed=1",
    "model.pretraining.steps=1",
    "model.path=/somewhere",
]
NOT_RESULT = [
    "runtime.device=cpu",
    "runtime.gradient_checkpointing=true",
    "runtime.checkpoint_every=1",
    "runtime.data_root=/somewhere",
    "evaluation.generation.num_beams=4",
    "evaluation.benchmarks=[arith_heldout]",
    "evaluation.batch_size=1",
]


@pytest.mark.parametrize("override", RESULT)
def test_settings_that_can_change_the_result_change_the_run_id(override: str) -> None:
    assert only([override]).run_id != only([]).run_id


@pytest.mark.parametrize("override", NOT_RESULT)
def test_runtime_and_evaluation_settings_do_not(override: str) -> None:
    changed = only([override])
    assert changed.run_id == only([]).run_id
    assert changed != only([])


def test_every_top_level_section_but_two_is_part_of_the_id() -> None:
    assert set(only([]).mapping) == {
        *("run_id", "seed", "model", "method", "task", "protocol", "recipe"),  # read by config_hash
        *("evaluation", "runtime"),
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["method=dablo"], "no method 'dablo': did you mean diablo?"),
        (["model=llama3"], "no model 'llama3': did you mean llama"),
        (["task=gsm"], "no task 'gsm': did you mean gsm8k?"),
        (["recipe.lerning_rate=1"], "no setting 'recipe.lerning_rate': did you mean learning_rate?"),
        (["recipee.epochs=1"], "no setting 'recipee.epochs': did you mean recipe.epochs?"),
        (["method.num_blocks=4"], "no setting 'method.num_blocks': did you mean method.adapter.num_blocks?"),
        (["learning_rate=1e-3"], "no setting 'learning_rate': did you mean recipe.learning_rate?"),
        (["method=lora", "num_blocks=4"], "no setting 'num_blocks': known: evaluation, experiment, method,"),
        (["method=full", "method.adapter.r=3"], "method.adapter is None for these choices"),
        (["experiment=quikstart"], "no experiment 'quikstart': did you mean quickstart"),
        (["seed=[1"], "cannot read 'seed=[1'"),
        (["~seed"], "cannot be deleted"),
        (["+recipe.new=1"], "only method.adapter takes new keys"),
        (["method=pissa", "task=nothing"], "no task 'nothing'"),
        (["method=full", "task=gsm8k"], "no learning rate is recorded for full on gsm8k: give recipe.learning_rate="),
    ],
)
def test_mistakes_name_what_and_the_nearest(
    arguments: list[str], message: str, fails_with: Callable[[Callable[[], object]], str]
) -> None:
    assert message in fails_with(lambda: plan(arguments))


def test_a_config_is_frozen(tmp_path: Path, fails_with: Callable[[Callable[[], object]], str]) -> None:
    config = only([f"runtime.runs_dir={tmp_path}"])
    (run,) = write_runs([config])
    assert read_config(run) == config
    before = run.config.stat().st_mtime_ns
    write_runs([config])
    assert run.config.stat().st_mtime_ns == before
    edited = {**config.mapping, "seed": 5}
    run.config.write_text(yaml.safe_dump(edited), encoding="utf-8")
    assert "undo the edit or plan a new run" in fails_with(lambda: read_config(run))
    assert "undo the edit" in fails_with(lambda: write_runs([config]))


def test_a_renamed_folder_is_told_its_name(tmp_path: Path, fails_with: Callable[[Callable[[], object]], str]) -> None:
    (run,) = write_runs([only([f"runtime.runs_dir={tmp_path}"])])
    renamed = RunPaths(run.root.rename(tmp_path / "favourite"))
    said = fails_with(lambda: read_config(renamed))
    assert said.startswith(f"{renamed.root}: the folder of run {run.root.name} under another name: rename it back")
    assert read_config(RunPaths(renamed.root.rename(run.root))).run_id == run.root.name


def test_a_directory_without_config_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a run directory"):
        read_config(RunPaths(tmp_path))


# Exact trainable parameters and their share of the base, from the published shapes; the third number gives the paper's
# percentages for LLaMA3, which has grouped-query attention. Paper, tables 1 to 4.
COUNTS = [
    ("llama2_7b", "diablo", "method.adapter.num_blocks=128", "commonsense_170k", 35_127_296, 0.5213, None),
    ("llama2_7b", "diablo", "method.adapter.num_blocks=64", "commonsense_170k", 70_254_592, 1.0426, None),
    ("llama2_7b", "diablo", "method.adapter.num_blocks=32", "metamathqa", 140_509_184, 2.0852, None),
    ("llama2_7b", "lora", "method.adapter.r=32", "commonsense_170k", 56_098_816, 0.8325, None),
    ("llama2_7b", "lora", "method.adapter.r=64", "metamathqa", 112_197_632, 1.6650, None),
    ("llama2_7b", "milora", "method.adapter.r=64", "metamathqa", 112_197_632, 1.6650, None),
    ("llama2_7b", "pissa", "method.adapter.r=64", "metamathqa", 112_197_632, 1.6650, None),
    ("llama2_7b", "dora", "method.adapter.r=16", "commonsense_170k", 28_925_952, 0.4293, None),
    ("llama3_8b", "diablo", "method.adapter.num_blocks=64", "commonsense_170k", 71_303_168, 0.8879, 83_886_080),
    ("llama3_8b", "diablo", "method.adapter.num_blocks=128", "commonsense_170k", 35_651_584, 0.4440, 41_943_040),
    ("llama3_8b", "lora", "method.adapter.r=32", "commonsense_170k", 56_623_104, 0.7051, 62_914_560),
    ("llama3_8b", "dora", "method.adapter.r=32", "commonsense_170k", 57_409_536, 0.7149, 63_897_600),
    ("llama3_8b", "diablo", "ALL", "commonsense_170k", 109_051_904, 1.3580, 121_634_816),
    ("llama3_8b", "lora", "ALL", "commonsense_170k", 83_886_080, 1.0446, 90_177_536),
    ("llama3_8b", "dora", "ALL", "commonsense_170k", 85_262_336, 1.0618, 91_750_400),
    ("llama_13b", "diablo", "method.adapter.num_blocks=64", "commonsense_170k", 137_625_600, 1.0574, None),
    ("llama_13b", "dora", "method.adapter.r=32", "commonsense_170k", 89_190_400, 0.6852, None),
    ("mistral_7b", "diablo", "ALL", "commonsense_170k", 109_051_904, 1.5059, None),
]
ALL_SEVEN = "method.adapter.target_modules=[q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj]"


@pytest.mark.parametrize(("model", "method", "size", "task", "trainable", "percent", "ungrouped"), COUNTS)
def test_exact_counts(
    model: str, method: str, size: str, task: str, trainable: int, percent: float, ungrouped: int | None
) -> None:
    counted = count(only([f"model={model}", f"method={method}", f"task={task}", ALL_SEVEN if size == "ALL" else size]))
    assert counted.trainable == trainable
    assert counted.percent == pytest.approx(percent, abs=5e-5)
    assert counted.ungrouped == ungrouped


@pytest.mark.parametrize(
    ("model", "total"),
    [
        ("llama_7b", 6_738_415_616),
        ("llama2_7b", 6_738_415_616),
        ("llama_13b", 13_015_864_320),
        ("llama2_13b", 13_015_864_320),
        ("llama3_8b", 8_030_261_248),
        ("llama3_2_3b", 3_212_749_824),
        ("mistral_7b", 7_241_732_096),
        ("qwen2_5_7b", 7_615_616_512),
    ],
)
def test_base_models_have_their_published_size(model: str, total: int) -> None:
    counted = count(only([f"model={model}", "method=full", "task=commonsense_170k"]))
    assert counted.trainable == counted.base == total


def test_matched_budgets_of_the_quickstart() -> None:
    """The experiment compares methods within 10 % of each other's parameters."""
    matched = [
        count(config).trainable
        for config in plan(["experiment=quickstart"])
        if config.method.label.endswith(("-r6", "-N8"))
    ]
    assert len(matched) == 10  # five methods, two seeds
    assert max(matched) / min(matched) < 1.1


def test_the_quickstart_uses_the_learning_rates_that_were_chosen() -> None:
    """Those with the best held-out accuracy in the committed record; on ties the smallest."""
    with (ROOT / "results" / "quickstart_lr.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for label in {row["label"] for row in rows}:
        tried = [row for row in rows if row["label"] == label]
        best = max(tried, key=lambda row: (float(row["accuracy"]), -float(row["learning_rate"])))
        used = yaml.safe_load((CONFIGS / "method" / f"{best['method']}.yaml").read_text(encoding="utf-8"))[
            "learning_rate"
        ]["arith"]
        assert used == float(best["learning_rate"]), label


def test_every_config_file_is_read() -> None:
    """There is no file that no group or experiment uses."""
    offered = {
        CONFIGS / group / f"{name}.yaml" for group in (*planning.GROUPS, "experiment") for name in options(group)
    }
    assert set(CONFIGS.rglob("*.yaml")) == offered | {CONFIGS / "run.yaml"}
