"""Protocols: literal prompts, loss masks, truncation of rows, and the settings of each benchmark."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval.benchmarks import read_benchmark, settings_of
from eval.scoring import EQUALITIES, PARSERS, SEARCHED
from experiments.config import RunConfig
from experiments.data.prompts import IGNORED, encode, prompt_text, select_rows, target_text
from experiments.models.tiny import BOS, EOS, make_tokenizer
from experiments.plan.compose import options, plan, protocols
from experiments.runs.evaluations import TASKS
from experiments.settings import with_values

Fails = Callable[[Callable[[], object]], str]
Config = dict[str, Any]
ALL = [(task, protocol) for task in options("task") for protocol in protocols(task)]
TOKENIZER: Any = make_tokenizer(400, seed=0)

ASK = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
ASK_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request."
)
S12, S16, S20 = (" " * spaces for spaces in (12, 16, 20))


def config_of(task: str, protocol: str) -> RunConfig:
    (config,) = plan([f"task={task}", f"protocol={protocol}", "method=base"])
    return config


def row(instruction: str = "Q", output: str = "A", answer: str = "a", **more: str) -> dict[str, str]:
    return {"instruction": instruction, "input": "", "output": output, "answer": answer, **more}


# (task, protocol, prompt in training, prompt in the test), for the instruction "Q", written out
PROMPTS = [
    ("commonsense_170k", "diablo", "Q\n", "Q\n"),
    (
        "commonsense_170k",
        "diablo_release",
        f"{ASK}\n\n{S16}### Instruction:\n{S16}Q\n\n{S16}### Response:\n{S16}",
        "Q\n",
    ),
    (
        "commonsense_170k",
        "llm_adapters",
        f"{ASK}  \n\n{S16}### Instruction:\n{S16}Q\n{S16}\n{S16}### Response:\n{S16}",
        f"{ASK} \n\n{S16}### Instruction:\n{S16}Q\n\n{S16}### Response:\n{S16}",
    ),
    ("commonsense_170k", "pyreft", "Q\n", "Q\n"),
    (
        "metamathqa",
        "diablo",
        f"{ASK}\n\n### Instruction:\nQ\n\n### Response: Let's think step by step.\n",
        f"{ASK}\n\n### Instruction:\nQ\n\n### Response: Let's think step by step.\n",
    ),
    (
        "metamathqa",
        "diablo_release",
        f"{ASK}\n\n{S12}### Instruction:\n{S12}Q\n\n{S12}### Response: Let's think step by step.\n{S12}",
        f"{ASK}\n\n{S16}### Instruction:\n{S16}Q\n\n{S16}### Response: Let's think step by step.\n{S16}",
    ),
    (
        "metamathqa",
        "metamath",
        f"{ASK}\n\n### Instruction:\nQ\n\n### Response:",
        f"{ASK}\n\n### Instruction:\nQ\n\n### Response: Let's think step by step.",
    ),
    (
        "gsm8k",
        "lori",
        "Q\nAnswer the above question. First think step by step and then answer the final number.\n",
        "Q\nAnswer the above question. First think step by step and then answer the final number.\n",
    ),
    ("code_alpaca", "lori", f"{ASK} \n\n{S20}### Instruction:\n{S20}Q\n\n{S20}### Response:\n{S20}", "Q"),
    (
        "saferpaca",
        "lori",
        f"{ASK} \n\n{S20}### Instruction:\n{S20}Q\n\n{S20}### Response:\n{S20}",
        "You are a helpful assistant.Always answer as helpfully as possible, while being safe."
        "\n\nHuman: Q\n\nAssistant:",
    ),
    (
        "math_10k",
        "pyreft",
        f"{ASK}\n\n### Instruction:\nQ\n\n### Response:\n",
        f"{ASK}\n\n### Instruction:\nQ\n\n### Response:\n",
    ),
    (
        "math_10k",
        "llm_adapters",
        f"{ASK}  \n\n{S16}### Instruction:\n{S16}Q\n{S16}\n{S16}### Response:\n{S16}",
        f"{ASK} \n\n{S16}### Instruction:\n{S16}Q\n\n{S16}### Response:\n{S16}",
    ),
]


@pytest.mark.parametrize(("task", "protocol", "training", "test"), PROMPTS)
def test_prompts_letter_by_letter(task: str, protocol: str, training: str, test: str) -> None:
    config = config_of(task, protocol)
    assert prompt_text(config.protocol, row()) == training
    assert prompt_text(config.evaluation, row()) == test


@pytest.mark.parametrize("task", ["commonsense_170k", "metamathqa", "gsm8k"])
def test_the_protocol_without_accidents_asks_as_it_trained(task: str) -> None:
    config = config_of(task, "diablo")
    assert prompt_text(config.protocol, row()) == prompt_text(config.evaluation, row())
    assert config.evaluation.searched == "completion"
    assert config.evaluation.full_batches_of is None
    assert config.protocol.bos == config.evaluation.bos


def test_prompts_with_an_input() -> None:
    lori = config_of("code_alpaca", "lori").protocol
    assert prompt_text(lori, row() | {"input": "I"}) == (
        f"{ASK_WITH_INPUT}\n\n{S20}### Instruction:\n{S20}Q\n\n{S20}### Input:\n{S20}I\n\n{S20}### Response:\n{S20}"
    )
    metamath = config_of("metamathqa", "metamath")
    assert prompt_text(metamath.protocol, row("Q\nwith\nmore")) == (
        f"{ASK_WITH_INPUT}\n\n### Instruction:\nQ\n\n### Input:\nwith\nmore\n\n### Response:"
    )
    assert "### Input" not in prompt_text(metamath.evaluation, row("Q\nwith\nmore"))  # tests are not split


def test_a_row_without_a_prompt_for_its_input_is_refused(fails_with: Fails) -> None:
    diablo = config_of("commonsense_170k", "diablo").protocol
    assert "has no prompt_with_input" in fails_with(lambda: prompt_text(diablo, row() | {"input": "I"}))


def test_targets() -> None:
    gsm8k = row(output="1+1=<<1+1=2>>2\n#### 2", answer="2")
    lori = config_of("gsm8k", "lori").protocol
    assert target_text(lori, gsm8k) == "1+1=<<1+1=2>>2\nThe final answer is:  2"  # two spaces, as released
    assert target_text(config_of("arith", "plain").protocol, gsm8k) == gsm8k["output"]


def test_the_human_eval_prompt_loses_its_last_newline() -> None:
    code = config_of("code_alpaca", "lori").evaluation
    assert prompt_text(code, row("\n\ndef f():\n    pass\n")) == "def f():\n    pass"


# Tokens


@pytest.mark.parametrize(("task", "protocol"), ALL)
def test_tokens_are_the_prompt_and_the_target(task: str, protocol: str) -> None:
    used = replace(config_of(task, protocol).protocol, max_length=2000)
    (example,) = encode(used, TOKENIZER, [row("How many in 12 boxes?", "7 and 8 are 15\n#### 15", "15")])
    text = TOKENIZER.decode([token for token in example.input_ids if token not in (BOS, EOS)])
    sample = row("How many in 12 boxes?", "7 and 8 are 15\n#### 15", "15")
    assert text == prompt_text(used, sample) + target_text(used, sample) + used.ending
    assert (example.input_ids[0] == BOS) == used.bos
    assert example.input_ids[-1] == example.labels[-1] == EOS
    seen = [token for token in example.labels if token != IGNORED]
    if used.train_on_prompt:
        assert seen == example.input_ids
    elif not used.joined:
        assert TOKENIZER.decode(seen[:-1]) == target_text(used, sample) + used.ending


def test_the_released_mask_hides_the_first_tokens_of_the_response() -> None:
    """The masked prefix is as long as the template with an empty response, which ends with 13 characters."""
    used = config_of("metamathqa", "diablo_release").protocol
    sample = row("1+1?", "2+2=4 and more text follows. The answer is: 4")
    (example,) = encode(used, TOKENIZER, [sample])
    prefix = 1 + len(TOKENIZER(prompt_text(used, sample) + used.ending, add_special_tokens=False)["input_ids"])
    assert example.labels == [IGNORED] * prefix + example.input_ids[prefix:]
    (honest,) = encode(replace(used, mask_counts_ending=False), TOKENIZER, [sample])
    assert example.labels.count(IGNORED) > honest.labels.count(IGNORED)
    text = TOKENIZER.decode(example.input_ids[1:-1])
    assert text.endswith(f"4\n{S12}")


def test_repeated_prompts_keep_the_last_row_in_the_first_place() -> None:
    rows = [row("a", "1"), row("b", "2"), row("a", "3")]
    lori, diablo = (config_of("gsm8k", name).protocol for name in ("lori", "diablo"))
    assert [kept["output"] for kept in select_rows(lori, rows)] == ["3", "2"]
    assert select_rows(diablo, rows) == rows


def test_long_rows_are_cut_as_their_source_cuts_them() -> None:
    """GSM8K, 512 tokens: the prompt to 256, then DiaBlo's target to the rest, LoRI's to 256; neither has an EOS."""
    long = row("word " * 400, "text " * 400)
    lengths = {}
    for name in ("lori", "diablo"):
        (example,) = encode(config_of("gsm8k", name).protocol, TOKENIZER, [long])
        lengths[name] = (example.labels.count(IGNORED), len(example.labels))
        assert example.truncated
        assert EOS not in example.input_ids
    assert lengths == {"lori": (256, 512), "diablo": (256, 512)}
    short_question = row("word " * 20, "text " * 600)
    for name, target in (("lori", 256), ("diablo", None)):
        (example,) = encode(config_of("gsm8k", name).protocol, TOKENIZER, [short_question])
        prompt = example.labels.count(IGNORED)
        assert len(example.labels) - prompt == (target or 512 - prompt)


@given(
    question=st.text(max_size=200),
    answer=st.text(max_size=200),
    max_length=st.integers(1, 80),
    max_prompt=st.none() | st.integers(1, 40),
    joined=st.booleans(),
    on_prompt=st.booleans(),
)
def test_any_text_fits_any_length(
    question: str, answer: str, max_length: int, max_prompt: int | None, joined: bool, on_prompt: bool
) -> None:
    used = replace(
        PLAIN,
        max_length=max_length,
        max_prompt_length=None if joined else max_prompt,
        joined=joined,
        train_on_prompt=on_prompt,
    )
    (example,) = encode(used, TOKENIZER, [row(question, answer)])
    (whole,) = encode(replace(used, max_length=10**6), TOKENIZER, [row(question, answer)])
    assert len(example.input_ids) == len(example.labels) <= max_length
    assert example.truncated == (len(whole.input_ids) > max_length)
    if not example.truncated:
        assert example == whole
    for token, label in zip(example.input_ids, example.labels, strict=True):
        assert label in (token, IGNORED)
        assert not (on_prompt and label == IGNORED)


PLAIN = config_of("arith", "plain").protocol


def test_joined_tokens_take_one_length_only(fails_with: Fails) -> None:
    used = replace(PLAIN, joined=True, max_prompt_length=4)
    assert "with joined tokens only max_length can be set" in fails_with(lambda: encode(used, TOKENIZER, [row()]))


def test_a_protocol_that_does_not_fit_names_the_field(fails_with: Fails) -> None:
    used = replace(PLAIN, prompt="{question}")
    assert "needs the field 'question', the row has instruction" in fails_with(lambda: prompt_text(used, row()))


# Benchmarks


def test_every_task_can_be_scored_by_each_of_its_protocols() -> None:
    """Every setting needed for a score exists for every benchmark of the task and has a valid value."""
    for task, protocol in ALL:
        config = config_of(task, protocol)
        if config.evaluation.judge:
            config = with_values(config, {"evaluation.judge.model": "some/judge"})
        for name in config.evaluation.benchmarks:
            read = settings_of(config, read_benchmark(name))["read"]
            assert read["searched"] in SEARCHED
            if read_benchmark(name).kind != "program":
                assert read["parser"] in PARSERS
                assert read["equality"] in EQUALITIES


def test_every_benchmark_belongs_to_a_task() -> None:
    configs = [config_of(task, protocols(task)[0]) for task in options("task")]
    named = {name for config in configs for name in config.evaluation.benchmarks}
    answered = {path.stem for path in TASKS.glob("*.yaml") if read_benchmark(path.stem).kind != "likelihood"}
    assert answered - named == {"arith_heldout"}


def test_a_benchmark_of_another_kind_is_refused(fails_with: Fails) -> None:
    config = config_of("commonsense_170k", "diablo")
    said = fails_with(lambda: settings_of(config, read_benchmark("gsm8k")))
    assert "gsm8k has answers of the kind number, for which evaluation.parser has no value" in said


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples": 5}, "give a temperature"),
        ({"samples": 5, "temperature": 0.2}, "5 samples and 4 beams"),
        ({}, "vLLM's beam search is not transformers'"),
    ],
)
def test_generation_settings_that_do_not_fit(change: Config, message: str, fails_with: Fails) -> None:
    if "temperature" not in change and "samples" in change:
        change = {**change, "num_beams": 1}
    values = {f"evaluation.generation.{key}": value for key, value in change.items()}
    config = with_values(config_of("commonsense_170k", "diablo"), values or {"evaluation.backend": "vllm"})
    assert message in fails_with(lambda: settings_of(config, read_benchmark("boolq")))


def test_a_protocol_of_another_task_is_refused(fails_with: Fails) -> None:
    said = fails_with(lambda: plan(["task=gsm8k", "protocol=pyreft"]))
    assert said == "task gsm8k has no protocol 'pyreft': it has lori, diablo, diablo_release"
