"""The inputs and outputs of lm-eval's transformers model: token by token and beam by beam those of transformers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance

from eval.backends import hf, plain_generation
from eval.run import evaluate
from experiments.config import RunConfig
from experiments.data.prompts import IGNORED, encode, prompt_text
from experiments.data.rows import load_rows
from experiments.models.tiny import make_base
from experiments.plan.compose import plan
from experiments.runs.records import RunPaths
from experiments.train.run import train
from tests.conftest import SMALL, planned

NEW = 48


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> tuple[RunPaths, Any, Any, RunConfig]:
    """Return a run with a model trained enough to end its texts, the model, its tokenizer and its config."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    arguments = [
        *(argument for argument in SMALL if "epochs" not in argument),
        *("method=full", "recipe.epochs=6", "recipe.learning_rate=5e-3", "task.data.train=256"),
        *(f"runtime.runs_dir={tmp_path_factory.mktemp('runs')}", f"runtime.cache_dir={cache_dir}"),
    ]
    run = planned(arguments)
    train(run)
    (config,) = plan(arguments)
    tokenizer = AutoTokenizer.from_pretrained(make_base(config.model, cache_dir))
    model: Any = AutoModelForCausalLM.from_pretrained(run.adapter)
    return run, plain_generation(model.eval(), tokenizer), tokenizer, config


def prompts_of(config: RunConfig, count: int) -> list[str]:
    rows = load_rows(config.task.data, "test", None)[:count]
    return [prompt_text(config.evaluation, row) for row in rows]


def ask(lm: Any, prompts: list[str], **settings: Any) -> list[str]:
    kwargs = {"until": [], "max_gen_toks": NEW, "do_sample": False, **settings}
    requests = [
        Instance(request_type="generate_until", doc={}, arguments=(prompt, dict(kwargs)), idx=number)
        for number, prompt in enumerate(prompts)
    ]
    return lm.generate_until(requests, disable_tqdm=True)


@pytest.mark.parametrize("batch_size", [1, 2, 8])
@pytest.mark.parametrize("beams", [1, 4])
def test_completions_are_transformers_own_whatever_the_batch(beams: int, batch_size: int, trained: Any) -> None:
    """Compared row by row with unpadded `generate`; some rows end long before others in their batch."""
    _, model, tokenizer, config = trained
    prompts = prompts_of(config, 16)
    expected = []
    for prompt in prompts:
        tokens = tokenizer(prompt, return_tensors="pt", add_special_tokens=True).input_ids
        with torch.no_grad():
            written = model.generate(tokens, max_new_tokens=NEW, num_beams=beams, do_sample=False)
        expected.append(tokenizer.decode(written[0, tokens.shape[1] :], skip_special_tokens=True))
    lengths = {len(tokenizer(text).input_ids) for text in expected}
    assert len(lengths) > 1  # otherwise the batch would test nothing
    lm = hf(model, tokenizer, batch_size, bos=True)
    assert ask(lm, prompts, **({"num_beams": beams} if beams > 1 else {})) == expected


def test_stop_strings_end_a_completion(trained: Any) -> None:
    _, model, tokenizer, config = trained
    prompts = prompts_of(config, 8)
    lm = hf(model, tokenizer, 4, bos=True)
    free = ask(lm, prompts)
    cut = ask(lm, prompts, until=["="])
    assert any("=" in text for text in free)
    assert cut == [text.split("=")[0] for text in free]


@pytest.mark.parametrize("bos", [True, False])
def test_a_prompt_is_the_tokens_that_were_trained_on(bos: bool, trained: Any) -> None:
    """The network's input is what `encode` made in training, BOS included, padded on the left and masked."""
    _, model, tokenizer, config = trained
    rows = load_rows(config.task.data, "test", None)[:3]
    protocol = replace(config.protocol, bos=bos)
    seen = []

    def spy(module: Any, arguments: Any, settings: dict[str, Any]) -> None:
        if not seen and settings.get("input_ids") is not None:
            seen.append((settings["input_ids"].clone(), settings["attention_mask"].clone()))

    hook = model.register_forward_pre_hook(spy, with_kwargs=True)
    ask(hf(model, tokenizer, 3, bos=bos), [prompt_text(config.evaluation, row) for row in rows])
    hook.remove()
    ((tokens, mask),) = seen
    found = sorted(row[kept.bool()].tolist() for row, kept in zip(tokens, mask, strict=True))
    expected = []
    for example in encode(protocol, tokenizer, rows):
        expected.append(
            [token for token, label in zip(example.input_ids, example.labels, strict=True) if label == IGNORED]
        )
    assert found == sorted(expected)
    assert mask[:, -1].all()  # padding is on the left


def test_a_models_own_generation_settings_do_not_count(trained: Any) -> None:
    """A base model may ship its own penalty or length; only the protocol's settings apply."""
    _, model, tokenizer, config = trained
    prompts = prompts_of(config, 4)
    expected = ask(hf(model, tokenizer, 4, bos=True), prompts)
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.max_new_tokens = 3
    assert ask(hf(model, tokenizer, 4, bos=True), prompts) != expected
    assert ask(hf(plain_generation(model, tokenizer), tokenizer, 4, bos=True), prompts) == expected


def test_beams_score_the_same_in_every_batch(trained: Any) -> None:
    run, *_ = trained
    beams = ["evaluation.generation.num_beams=4", f"evaluation.generation.max_new_tokens={NEW}"]
    (one,) = evaluate(run, [*beams, "evaluation.batch_size=1"])
    (seven,) = evaluate(run, [*beams, "evaluation.batch_size=7", "evaluation.limit=28"])
    assert one.items == seven.items
    assert one.unparsed == seven.unparsed
