"""Methods scored unmerged, and IA3, from training to score; the virtual tokens that prompt methods prepend."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from eval.backends import language_model, load
from eval.hf import Transformers
from eval.run import evaluate
from experiments.errors import UserError
from experiments.models.load import load_base
from experiments.runs.config_files import read_config
from experiments.runs.records import RunPaths, read_json, read_lines, trained_record
from experiments.speed.timing import forward_backward
from experiments.train import methods
from experiments.train.run import train
from tests.conftest import SMALL, planned
from tests.eval.test_hf import NEW, ask, prompts_of

PROMPT_METHODS = ("prompt", "prefix")
METHODS = (*PROMPT_METHODS, "ia3", "bottleneck")
every_method = pytest.mark.parametrize("name", METHODS)
prompt_methods = pytest.mark.parametrize("name", PROMPT_METHODS)
VIRTUAL = {"prompt": 20, "prefix": 10}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> dict[str, RunPaths]:
    """Return one trained and scored run of each method; a step has two micro-batches."""
    folder = tmp_path_factory.mktemp("prompt_methods")
    found = {}
    for name in METHODS:
        settings = [f"method={name}", "recipe.micro_batch_size=4", f"runtime.runs_dir={folder}"]
        found[name] = planned([*SMALL, *settings, f"runtime.cache_dir={cache_dir}"])
        train(found[name])
        evaluate(found[name])
    return found


def scored(run: RunPaths) -> Any:
    return load(read_config(run), run, trained_record(run), allow_identity=False)


@every_method
def test_a_run_is_trained_and_scored(name: str, runs: dict[str, RunPaths]) -> None:
    run = runs[name]
    (score,) = evaluate(run)
    record = trained_record(run)
    assert record.changed
    assert record.steps == 16
    assert record.held_out is not None
    assert record.held_out["loss"] is not None
    assert score.n == 28
    (plan,) = run.root.rglob("plan.json")
    assert read_json(plan)["settings"]["asked"]["merge"] == (name == "ia3")
    lines = list(read_lines(run.metrics))
    assert len(lines) == record.steps
    for line in lines:
        assert len(line["gradient_norms"]) == len(record.tensors)
    assert all(sum(norms) > 0 for norms in zip(*(line["gradient_norms"] for line in lines), strict=True))


@prompt_methods
def test_a_batch_is_completed_as_its_rows_alone(name: str, runs: dict[str, RunPaths]) -> None:
    """Padding between prompt tuning's virtual tokens and a shorter row changes nothing; probabilities are compared,
    since texts of a hardly trained model rarely differ.
    """
    found = scored(runs[name])
    tokenizer = found.tokenizer
    prompts = ["7", "Tom has 3 apples and buys 4 more.", prompts_of(read_config(runs[name]), 1)[0]]
    rows = [tokenizer(prompt, return_tensors="pt", add_special_tokens=True) for prompt in prompts]
    tokenizer.padding_side = "left"
    batch = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=True)
    assert not batch.attention_mask.all()

    def complete(inputs: Any) -> Any:
        settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
        with torch.no_grad():
            return found.model.generate(
                input_ids=inputs.input_ids,
                attention_mask=inputs.attention_mask,
                **settings,
                output_logits=True,
                return_dict_in_generate=True,
            )

    together = complete(batch)
    for number, row in enumerate(rows):
        alone = complete(row)
        written = alone.sequences[0, row.input_ids.shape[1] :]
        assert torch.equal(together.sequences[number, batch.input_ids.shape[1] :], written)
        for one, other in zip(together.logits, alone.logits, strict=True):
            torch.testing.assert_close(one[number], other[0], rtol=1e-4, atol=1e-4)
        # And as in training: the whole text in one pass, without a cache or padding.
        with torch.no_grad():
            whole = peft_model(runs[name])(input_ids=alone.sequences).logits[0, -7:-1]
        torch.testing.assert_close(torch.cat(alone.logits), whole, rtol=1e-4, atol=1e-4)


def peft_model(run: RunPaths) -> Any:
    config = read_config(run)
    return methods.load(config.method, load_base(config)[0], run.adapter, merge=False).eval()


@prompt_methods
@pytest.mark.parametrize("beams", [1, 4])
def test_completions_are_the_same_whatever_the_batch(name: str, beams: int, runs: dict[str, RunPaths]) -> None:
    config = read_config(runs[name])
    found = scored(runs[name])
    prompts = ["7", "12 + 5", *prompts_of(config, 6)]
    settings = {"num_beams": beams} if beams > 1 else {}
    texts = [ask(Transformers(found.model, found.tokenizer, size, True), prompts, **settings) for size in (1, 8)]
    assert texts[0] == texts[1]
    assert any(texts[0])


@prompt_methods
def test_virtual_tokens_take_room_in_the_context(name: str, runs: dict[str, RunPaths]) -> None:
    """A prompt that is too long is cut on the left, so that the completion fits."""
    config = read_config(runs[name])
    found = scored(runs[name])
    assert found.context == 1024 - VIRTUAL[name]
    seen = []

    def spy(module: Any, arguments: Any, settings: dict[str, Any]) -> None:
        asked = settings["input_ids"] if settings.get("inputs_embeds") is None else settings["inputs_embeds"]
        seen.append(settings["past_key_values"].get_seq_length() + asked.shape[1])

    inner: Any = found.model.get_base_model().model
    with language_model(config, runs[name], found) as lm:
        inner.register_forward_pre_hook(spy, with_kwargs=True)
        ask(lm, ["7 + 5 = 12. " * 400])
    assert seen[0] == 1024 - NEW  # tokens before the first new one: virtual tokens and prompt
    assert max(seen) == 1023  # the last new token is not read


@every_method
def test_a_timed_pass_reaches_every_tensor(name: str, runs: dict[str, RunPaths]) -> None:
    config = read_config(runs[name])
    model = methods.attach(config.method, load_base(config)[0]).train()
    forward_backward(model, torch.arange(24).view(2, 12))
    assert all(tensor.grad is not None for tensor in methods.trained_tensors(model).values())


@pytest.mark.parametrize("name", ["prompt", "prefix", "bottleneck"])
def test_what_cannot_be_merged_is_refused_to_who_asks(name: str, runs: dict[str, RunPaths]) -> None:
    with pytest.raises(UserError, match=r"evaluation.merge=true: \S+ cannot be merged into the base's weights"):
        evaluate(runs[name], ["evaluation.merge=true"])
    with pytest.raises(UserError, match=r"evaluation.merge=false: vLLM serves the exported merged model"):
        evaluate(runs[name], ["evaluation.backend=vllm"])


def test_prefix_tuning_is_not_trained_under_checkpointing(small: list[str]) -> None:
    with pytest.raises(UserError, match=r"runtime.gradient_checkpointing=true: prefix-v10 trains tensors in the cache"):
        train(planned([*small, "method=prefix", "runtime.gradient_checkpointing=true"]))


@pytest.mark.parametrize("name", ["prompt", "ia3", "bottleneck"])
def test_the_others_train_alike_under_checkpointing(name: str, small: list[str], tmp_path: Path) -> None:
    settings = [*small, f"method={name}", "recipe.max_steps=4"]
    records = []
    for checkpointing in ("true", "false"):
        folder = f"runtime.runs_dir={tmp_path / checkpointing}"
        run = planned([*settings, f"runtime.gradient_checkpointing={checkpointing}", folder])
        records.append(train(run).adapter_files)
    assert records[0] == records[1]
