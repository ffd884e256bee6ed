"""Valid values of settings, and their form on the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from diablo.blocks.patterns import PATTERNS
from experiments import CONFIGS, open_fields, settings
from experiments import config as config_module
from experiments.plan.compose import options, plan, resolve, set_values
from experiments.plan.overrides import by_name, sweep, value_of
from experiments.runs.config_files import read_config, write_config
from experiments.runs.records import RunPaths
from experiments.settings import rule

Fails = Callable[[Callable[[], object]], str]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["seed='0'"], "seed='0': it must be a whole number of at least 0 and at most 4294967295"),
        (["seed=1e400"], "seed=inf: it must be a whole number"),
        (["spectra=null"], "spectra is a section, set one of its settings: spectra"),
        (["evaluation.generation.num_beams={number: {a: 2}}"], "evaluation.generation.num_beams="),
        (["method=full", "method.adapter=5"], "method.adapter=5: it must be a section of settings"),
        (["task.data.source=[]"], "task.data.source=[]: no data set: give one"),
        (["model.pretraining=null"], "model.path=null and model.pretraining=null: there are no weights"),
        (["quantization=gptq", "quantization.calibration=null"], "quantization=gptq needs calibration text: leave it"),
        (["quantization=gptq", "quantization.calibration={samples: 3}"], "quantization.calibration.text is missing"),
        (["seed=-1"], "seed=-1: it must be a whole number of at least 0"),
        (["seed=true"], "seed=true: it must be a whole number"),
        (["recipe.batch_size=8.5"], "recipe.batch_size=8.5: it must be a whole number of at least 1"),
        (["recipe.learning_rate=None"], "recipe.learning_rate='None': it must be a number of at least 0"),
        (["recipe.learning_rate=null"], "recipe.learning_rate=null: it must be a number of at least 0"),
        (["recipe.learning_rate=nan"], "recipe.learning_rate=nan: it must be a number"),
        (["recipe.learning_rate=-1e-3"], "recipe.learning_rate=-0.001: it must be a number of at least 0"),
        (["recipe.epochs=0"], "recipe.epochs=0: it must be a number above 0"),
        (["recipe.max_steps=0"], "recipe.max_steps=0: it must be a whole number of at least 1, or null"),
        (["recipe.betas=[0.9]"], "recipe.betas=[0.9]: it must be a list of 2 values, each a number of at least 0"),
        (["recipe.adapter_dropout=1"], "recipe.adapter_dropout=1: it must be a number of at least 0 and below 1"),
        (["recipe.schedule=step"], "recipe.schedule='step': it must be one of linear, cosine, constant"),
        (["recipe.optimizer=adam"], "recipe.optimizer='adam': it must be one of adamw_torch, "),
        (["recipe.group_by_length=1"], "recipe.group_by_length=1: it must be true or false"),
        (["recipe=foo"], "recipe=foo: recipe is a section, set one of its settings: recipe.… of learning_rate, epochs"),
        (["evaluation=null"], "evaluation=null: evaluation is a section"),
        (["recipe={epochs: 1}"], "recipe is a section"),
        (["evaluation.generation=1"], "evaluation.generation is a section"),
        (["method.adapter=null"], "method.adapter is a section"),
        (["task.data=arith"], "task.data is a section"),
        (
            ["method.adapter.num_blocks=0"],
            "method.adapter.num_blocks=0: it must be a whole number of at least 1, or auto",
        ),
        (["model.adapter_size.num_blocks=x"], "model.adapter_size.num_blocks='x': it must be a whole number"),
        (["method=lora", "method.adapter.r=many"], "method.adapter.r='many': it must be a whole number of at least 1"),
        (
            ["method=lora", "method.adapter.lora_alpha=${recipe.schedule}"],
            "method.adapter.lora_alpha='linear': it must",
        ),
        (["method=sparse", "method.adapter.pattern=stripes"], "'stripes': it must be one of diagonal, random_block"),
        (["method=sparse", "method.adapter.density=2"], "density=2: it must be a share as 1/64 or 0.015625 above 0"),
        (["method.budget=5"], "method.budget=5: it must be a number above 0 and at most 1, or null"),
        (["quantization=nf", "quantization.bits=9"], "quantization.bits=9: it must be a whole number of at least 2"),
        (["model.dtype=half"], "model.dtype='half': it must be one of auto, bfloat16"),
        (["runtime.wandb=maybe"], "runtime.wandb='maybe': it must be one of off, offline, online"),
        (["runtime.runs_dir=null"], "runtime.runs_dir=null: it must be text"),
        (["protocol.max_length=null"], "protocol.max_length=null: it must be a whole number"),
        (["protocol.ending=5"], "protocol.ending=5: it must be text (in quotes if it looks like a number)"),
        (["protocol.repeated_prompts=first"], "it must be one of all, last"),
        (
            ["evaluation.limit=0"],
            "evaluation.limit=0: it must be a whole number of at least 1, or a map from names to such, or null",
        ),
        (["evaluation.benchmarks=arith"], "evaluation.benchmarks='arith': it must be a list of a benchmark's name"),
        (
            ["method.adapter.target_modules=q_proj"],
            "method.adapter.target_modules='q_proj': text is all-linear or an ex",
        ),
        (["task.target_modules=q_proj"], "for whole names such as .*\\.q_proj: write [q_proj] for the layers of this"),
        (["method.adapter.target_modules=[]"], "method.adapter.target_modules=[]: no layer: name some"),
        (["+method.adapter.exclude_modules=3"], "method.adapter.exclude_modules=3: it must be text"),
        (["+method.adapter.layers_to_transform=all"], "method.adapter.layers_to_transform='all': it must be a whole n"),
        (["+method.adapter.modules_to_save=lm_head"], "method.adapter.modules_to_save='lm_head': it must be a list of"),
        (["method.adapter.task_type=CAUSAL"], "method.adapter.task_type='CAUSAL': it must be one of CAUSAL_LM"),
        (["method=lora", "+method.adapter.bias=some"], "method.adapter.bias='some': it must be one of none, all, lora"),
        (["evaluation.benchmarks=[]"], "evaluation.benchmarks=[]: nothing would be scored: name one or several"),
        (["evaluation.benchmarks=[arith,arith]"], "evaluation.benchmarks: two are called arith: name it once"),
        (["evaluation.parser=nosuch"], "evaluation.parser='nosuch': it must be one of hash_marks, "),
        (["evaluation.equality={number: nosuch}"], "evaluation.equality={'number': 'nosuch'}: it must be one of same_"),
        (
            ["evaluation.parser={nmber: last_number}"],
            "kind number, for which evaluation.parser has no value (it has nmb",
        ),
        (["evaluation.generation.samples=3"], "evaluation.generation.samples is more than one: give a temperature"),
        (["evaluation.generation.top_k=3"], "evaluation.generation.top_k=3: one sample is decoded greedily"),
        (["evaluation.backend=vllm", "evaluation.merge=false"], "evaluation.merge=false: vLLM serves the exported"),
        (["task=gsm8k", "task.data.heldout=7473"], "task.data.heldout=7473: gsm8k has 7,473 training rows: give fewer"),
        (["task.data.source=[arith,gsm8k]"], "task.data.source=['arith', 'gsm8k']: arith is generated and cannot be j"),
        (["task.data.seed=null"], "task.data.seed=null: arith is generated: give a number"),
        (["method=lora", "method.trains=all"], "method.trains=all and method.adapter=peft.LoraConfig exclude each"),
        (["method=full", "method.trains=adapter"], "method.trains=adapter and method.adapter=null exclude each other"),
        (["evaluation.benchmarks=[arit]"], "no benchmark 'arit': did you mean arith or"),
        (["task.data.source=gsm"], "task.data.source=gsm: no such data set: did you mean gsm8k"),
        (["evaluation.generation.max_new_tokens={number: 0}"], "it must be a whole number of at least 1"),
        (["evaluation.protocol=../../elsewhere"], "evaluation.protocol='../../elsewhere': it must be a name"),
        (["method.label=../../elsewhere"], "method.label='../../elsewhere': it must be a name"),
        (["model.name=a/b"], "model.name='a/b': it must be a name"),
        (["task.name=.hidden"], "task.name='.hidden': it must be a name"),
        (["evaluation.benchmarks=['../tasks/arith']"], "evaluation.benchmarks=['../tasks/arith']: it must be a list"),
    ],
)
def test_values_that_cannot_be_are_refused_when_planning(arguments: list[str], message: str, fails_with: Fails) -> None:
    assert message in fails_with(lambda: plan(arguments))


@pytest.mark.parametrize(
    ("arguments", "same"),
    [
        (["recipe.epochs=3"], ["recipe.epochs=3.0"]),
        (
            ["recipe.batch_size=8", "recipe.micro_batch_size=4"],
            ["recipe.batch_size=8.0", "recipe.micro_batch_size=4e0"],
        ),
        (["method=lora", "method.adapter.r=8"], ["method=lora", "method.adapter.r=8.0"]),
        (["method=lora", "method.adapter.lora_alpha=8"], ["method=lora", "method.adapter.lora_alpha=8.0"]),
        (["recipe.learning_rate=1"], ["recipe.learning_rate=1.0"]),
        (["recipe.weight_decay=0"], ["recipe.weight_decay=0.0"]),
        (["recipe.betas=[0,0.5]"], ["recipe.betas=[0.0,5e-1]"]),
        (["recipe.warmup_steps=5"], ["recipe.warmup_steps=5.0"]),
        (["recipe.adapter_dropout=0"], ["recipe.adapter_dropout=0.0"]),
        (["model.pretraining.learning_rate=1"], ["model.pretraining.learning_rate=1.0"]),
        (["+method.adapter.layers_to_transform=[1]"], ["+method.adapter.layers_to_transform=[1.0]"]),
        (["method=lori_s", "recipe.epochs=2"], ["method=lori_s", "recipe.epochs=2.0"]),
    ],
)
def test_equal_values_are_one_run(arguments: list[str], same: list[str]) -> None:
    (ours,), (theirs,) = plan(arguments), plan(same)
    assert ours == theirs
    assert repr(ours) == repr(theirs)  # 1 and 1.0 are equal in Python too


def test_equal_evaluations_have_one_folder() -> None:
    config = plan([])[0]
    sampled = ["evaluation.generation.samples=2"]
    one, other = (
        set_values(config, [*sampled, f"evaluation.generation.temperature={value}"]).evaluation
        for value in ("1", "1.0")
    )
    assert repr(one) == repr(other)


def test_every_setting_has_a_type() -> None:
    """The table has every range, and every setting that is null in the files, where its type is not visible."""
    untold: set[str] = set()
    for group in ("model", "method", "quantization", "task"):
        for name in options(group):
            arguments = [f"{group}={name}", "recipe.learning_rate=1"]
            arguments += ["method=lora"] * (name in ("loftq", "apiq"))
            config = plan(arguments)[0]
            untold |= {key for key, value in settings.leaves(config.mapping) if value is None and not rule(key)}
    assert untold <= {"method.adapter"}
    assert set(PATTERNS) == set(open_fields.PATTERNS)


def test_the_optimizers_are_those_of_transformers() -> None:
    from transformers.training_args import OptimizerNames

    assert set(config_module.OPTIMIZERS) == {name.value for name in OptimizerNames}


def test_the_parsers_and_equalities_are_those_of_scoring() -> None:
    from eval import scoring

    assert set(config_module.PARSERS) == set(scoring.PARSERS)
    assert set(config_module.EQUALITIES) == set(scoring.EQUALITIES)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [("recipe", "batch_size", "8"), ("evaluation", "protocol", "../.."), ("method", "label", 1)],
)
def test_a_config_that_was_edited_to_the_impossible_is_refused_by_name(
    section: str, key: str, value: object, tmp_path: Path, fails_with: Fails
) -> None:
    """As in a run directory received from others."""
    config = plan([])[0]
    run = RunPaths(tmp_path / config.run_id)
    write_config(run, {**config.mapping, section: config.mapping[section] | {key: value}})
    assert fails_with(lambda: read_config(run)).startswith(f"{run.config}: {section}.{key}={value!r}: it must be")


# Text


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        (r'evaluation.generation.stop=["\n"]', ["\n"]),
        (r'evaluation.generation.stop=["\n\n",Q:]', ["\n\n", "Q:"]),
        (r'evaluation.generation.stop=["a\\n"]', [r"a\n"]),
        (r'evaluation.generation.stop=["\u00e9\t"]', ["é\t"]),
        (r"evaluation.generation.stop=['\n']", [r"\n"]),
        (r'protocol.ending="\n"', "\n"),
        (r'protocol.ending="say \"so\"\n"', 'say "so"\n'),
        (r'protocol.prompt="{instruction}\n"', "{instruction}\n"),
        (r'protocol.replace={a: "\t"}', {"a": "\t"}),
        (r"method.adapter.target_modules=.*\.q_proj", r".*\.q_proj"),
        (r'method.adapter.target_modules=".*\d\.q_proj"', r".*\d\.q_proj"),
    ],
)
def test_text_in_double_quotes_is_read_as_in_yaml(argument: str, value: object) -> None:
    key = argument.partition("=")[0]
    assert by_name(plan([argument])[0].mapping)[key] == value
    assert by_name(set_values(plan([])[0], [argument]).mapping)[key] == value
    (swept,) = plan([f"{argument},{argument.partition('=')[2]}"])
    assert by_name(swept.mapping)[key] == value


def test_a_line_break_without_quotes_is_refused(fails_with: Fails) -> None:
    said = fails_with(lambda: plan([r"evaluation.generation.stop=[\n]"]))
    assert "for a line break put the text into double quotes" in said


@given(st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=20))
def test_every_text_can_be_written(text: str) -> None:
    quoted = (
        text.replace("\\", "\\\\").replace("\n", "\\n").replace("\t", "\\t").replace("\r", "\\r").replace('"', '\\"')
    )
    if "\\\\\\" in quoted or quoted.endswith("\\"):  # a backslash before a quote: the parser handles these differently
        return
    ((override,),) = sweep([f'protocol.ending="{quoted}"'])
    assert value_of(override) == text


# Sweeps and paths


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("method=glob(*)", "'method=glob(*)': no list of values: give them with commas"),
        ("seed=interval(0,1)", "'seed=interval(0,1)': no list of values"),
        ("seed=range(0,100000000)", "'seed=range(0,100000000)': more than 100,000 values: give fewer"),
        ("seed=range(0,1,1e-9)", "more than 100,000 values"),
        ("seed=range(0,10,0)", "'seed=range(0,10,0)': no list of values (range() arg 3 must not be zero)"),
        ("seed=range(3,3)", "'seed=range(3,3)': no value lies in this range"),
        ("runtime.runs_dir=/tmp/a=b", """write 'runtime.runs_dir="/tmp/a=b"'"""),
        ("runtime.runs_dir=/tmp/a(1)", """write 'runtime.runs_dir="/tmp/a(1)"'"""),
        ("my", "cannot read 'my': write key=value; a value with blanks in quotes"),
        ("seed=[1", "with every quote and bracket closed"),
        ("model@other=tiny", "a key has no @"),
    ],
)
def test_what_cannot_be_swept_or_read(argument: str, message: str, fails_with: Fails) -> None:
    assert message in fails_with(lambda: plan([argument]))


def test_the_product_of_sweeps_is_bounded(fails_with: Fails) -> None:
    said = fails_with(lambda: plan(["seed=range(0,1000)", "recipe.epochs=range(1,1000)"]))
    assert "1,000 of seed × 999 of recipe.epochs: more than 100,000 runs in one grid" in said


@pytest.mark.parametrize("path", ["/tmp/my runs", "/tmp/a=b", "/tmp/a(1)", "/tmp/é", "/tmp/[x]"])
def test_the_advised_quotes_take_every_path(path: str) -> None:
    assert plan([f'runtime.runs_dir="{path}"'])[0].runtime.runs_dir == path


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("common: 'a", "broken.yaml, line 1: while scanning a quoted scalar: found unexpected end of stream"),
        ("[1]", "broken.yaml: an experiment must be a map with title and grids"),
        ("title: x", "broken.yaml: grids is missing: give a list of lines"),
        ("grids: [seed=0]", "broken.yaml: title is missing"),
        ("title: [x]", "broken.yaml: title: ['x'] is not text: put it in quotes"),
        ("grids: [1]", "broken.yaml: grids: 1 is not a line of text: put it in quotes"),
        ("grids: seed=0", "broken.yaml: grids: 'seed=0' is not a list: write each line behind a -"),
        ("grids: {a: 1}", "broken.yaml: grids: {'a': 1} is not a list"),
        ("grids: [seed=0, seed=0]", "broken.yaml: grids: 'seed=0' is given twice: remove one"),
        ("grids: [seed=0]\ngrids: [seed=1]", "broken.yaml, line 2: grids is given twice"),
        ("grid: [seed=0]", "broken.yaml: grid: an experiment has no such part: did you mean grids?"),
        ("title: x\ngrids: ['seed=\"1']", "'seed=\"1' is not a line of key=value (No closing quotation)"),
        (
            "title: x\ngrids: [seed=0, method=dablo]",
            "broken.yaml, method=dablo: no method 'dablo': did you mean diab",
        ),
        (
            "title: x\ngrids: ['seed=${x}']",
            "seed=${x}: seed, of method diablo on task arith: ${x} refers to no setti",
        ),
        ("title: x\ngrids: ['model.path=${oc.env:NO}']", "the environment variable NO is not set: set it, or give"),
        ("title: x\ngrids: ['model.path=${no:1}']", "${no:…} is no reference: those with a colon are times, si"),
        (
            "title: x\nreference: diablo-N9\ngrids: [seed=0]",
            "reference: diablo-N9: no run has this label: did you mean",
        ),
        ("title: x\nlearning_rate_by: 3\ngrids: [seed=0]", "broken.yaml: learning_rate_by: 3 is not text"),
    ],
)
def test_a_broken_experiment_file_is_one_line(content: str, message: str, tmp_path: Path, fails_with: Fails) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(content, encoding="utf-8")
    assert message in fails_with(lambda: plan([f"experiment={path}"]))


def test_a_file_that_is_not_there_and_runs_without_the_reference(tmp_path: Path, fails_with: Fails) -> None:
    path = tmp_path / "own.yaml"
    said = fails_with(lambda: plan([f"experiment={path}"]))
    assert said == f"no experiment '{path}': give the path of an experiment's YAML file"
    path.write_text("title: x\nreference: diablo-N8\ngrids: [seed=0]", encoding="utf-8")
    assert plan([f"experiment={path}"])
    assert plan([f"experiment={path}", "method=lora"])  # chosen, so that nothing is compared


def test_a_frozen_config_is_checked_like_a_planned_one() -> None:
    """All configs made from the files pass, also after a round trip through YAML."""
    for method in options("method"):
        (overrides,) = sweep([f"method={method}"])
        config = resolve(overrides)
        again = yaml.safe_load(yaml.safe_dump(dict(config.mapping)))
        settings.check(again)
        assert settings.typed(again) == config
    assert (CONFIGS / "run.yaml").is_file()
