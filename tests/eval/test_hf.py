"""The transformers back end: token by token and beam by beam what transformers gives, with less work."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance

from eval.backends import plain_generation
from eval.hf import SEGMENT, Transformers
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
    lm = Transformers(model, tokenizer, batch_size, bos=True)
    assert ask(lm, prompts, **({"num_beams": beams} if beams > 1 else {})) == expected


def test_stop_strings_end_a_completion(trained: Any) -> None:
    _, model, tokenizer, config = trained
    prompts = prompts_of(config, 8)
    lm = Transformers(model, tokenizer, 4, bos=True)
    free = ask(lm, prompts)
    cut = ask(lm, prompts, until=["="])
    assert any("=" in text for text in free)
    assert cut == [text.split("=")[0] for text in free]


class Forwards:
    """Counts rows and tokens of every forward pass of a model, padding included."""

    def __init__(self, model: Any) -> None:
        self.shapes: list[tuple[int, int]] = []
        self.most: int | None = None  # rows that "fit into memory"
        self.hook = model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module: Any, arguments: Any, settings: dict[str, Any]) -> None:
        rows, tokens = settings["input_ids"].shape
        if self.most is not None and rows > self.most:
            raise torch.OutOfMemoryError(f"{rows} rows")
        self.shapes.append((rows, tokens))

    @property
    def tokens(self) -> int:
        return sum(rows * tokens for rows, tokens in self.shapes)


@pytest.fixture
def forwards(trained: Any) -> Iterator[Forwards]:
    counted = Forwards(trained[1])
    yield counted
    counted.hook.remove()


def test_a_row_that_has_ended_leaves_its_batch(trained: Any, forwards: Forwards) -> None:
    _, model, tokenizer, config = trained
    prompts = prompts_of(config, 16)
    lm = Transformers(model, tokenizer, 16, bos=True)
    free = ask(lm, prompts, max_gen_toks=3 * SEGMENT)
    lengths = [len(tokenizer(text).input_ids) for text in free]
    assert min(lengths) // SEGMENT < max(lengths) // SEGMENT  # they end in different segments
    alone = sum(rows for rows, tokens in forwards.shapes if tokens == 1)
    # A row goes on until the end of the segment in which it ends, or until all have ended.
    assert alone <= sum(min(-(-(length + 1) // SEGMENT) * SEGMENT, max(lengths) + 1) for length in lengths)
    assert alone < len(prompts) * max(lengths)


def test_rows_with_room_of_their_own_share_a_batch(trained: Any, forwards: Forwards) -> None:
    _, model, tokenizer, config = trained
    prompts = prompts_of(config, 6)
    rooms = [1, 5, SEGMENT, SEGMENT + 1, 2 * SEGMENT, 40]
    lm = Transformers(model, tokenizer, 8, bos=True)
    alone = [ask(lm, [prompt], max_gen_toks=room)[0] for prompt, room in zip(prompts, rooms, strict=True)]
    forwards.shapes.clear()
    requests = [
        Instance("generate_until", {}, (prompt, {"until": [], "max_gen_toks": room, "do_sample": False}), number)
        for number, (prompt, room) in enumerate(zip(prompts, rooms, strict=True))
    ]
    assert lm.generate_until(requests) == alone
    assert forwards.shapes[0][0] == 6


@pytest.mark.parametrize("text", ["=", " =", "= ", "1", "the", ")."])
def test_a_row_ends_at_its_stop_string_however_it_is_tokenised(text: str, trained: Any, forwards: Forwards) -> None:
    _, model, tokenizer, config = trained
    prompts = prompts_of(config, 8)
    lm = Transformers(model, tokenizer, 8, bos=True)
    free = ask(lm, prompts)
    forwards.shapes.clear()
    assert ask(lm, prompts, until=[text, "not in any text"]) == [whole.split(text)[0] for whole in free]


def test_stop_strings_save_the_rest(trained: Any, forwards: Forwards) -> None:
    _, model, tokenizer, config = trained
    prompts = prompts_of(config, 8)
    lm = Transformers(model, tokenizer, 8, bos=True)
    ask(lm, prompts)
    whole = forwards.tokens
    forwards.shapes.clear()
    ask(lm, prompts, until=["="])
    assert forwards.tokens < whole


SAMPLED = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 0}


def test_a_prompt_of_several_samples_is_read_once(trained: Any, forwards: Forwards) -> None:
    _, model, tokenizer, config = trained
    one, two = prompts_of(config, 2)
    widths = {prompt: len(tokenizer(prompt, add_special_tokens=True).input_ids) for prompt in (one, two)}
    lm = Transformers(model, tokenizer, 10, bos=True)
    torch.manual_seed(0)
    texts = ask(lm, [one] * 5 + [two] * 5, **SAMPLED, max_gen_toks=24)
    assert len(set(texts)) > 5
    assert forwards.shapes[:2] == [(2, max(widths.values()) - 1), (10, 1)]


def test_sampling_depends_on_the_seed_alone(trained: Any) -> None:
    """Also after a shared reading of the prompts, which draws nothing from the rows' random numbers."""
    _, model, tokenizer, config = trained
    (prompt,) = prompts_of(config, 1)
    lm = Transformers(model, tokenizer, 4, bos=True)
    texts: list[list[str]] = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        texts.append(ask(lm, [prompt] * 4, **SAMPLED))
    assert texts[0] == texts[1] != texts[2]
    tokens = tokenizer([prompt] * 4, return_tensors="pt", add_special_tokens=True).input_ids
    torch.manual_seed(1)
    settings: Any = {**SAMPLED, "pad_token_id": tokenizer.pad_token_id}
    written = model.generate(tokens, max_new_tokens=SEGMENT, **settings)[:, tokens.shape[1] :]
    torch.manual_seed(1)
    assert ask(lm, [prompt] * 4, **SAMPLED, max_gen_toks=SEGMENT) == tokenizer.batch_decode(written, True)


def test_greedy_rows_that_are_equal_complete_equally(trained: Any) -> None:
    _, model, tokenizer, config = trained
    prompts = prompts_of(config, 3)
    lm = Transformers(model, tokenizer, 8, bos=True)
    alone = ask(lm, prompts)
    assert ask(lm, [*prompts, *prompts]) == [*alone, *alone]


def test_a_batch_that_does_not_fit_is_halved_and_stays_so(trained: Any, forwards: Forwards) -> None:
    _, model, tokenizer, config = trained
    prompts = prompts_of(config, 12)
    expected = ask(Transformers(model, tokenizer, 12, bos=True), prompts)
    forwards.shapes.clear()
    forwards.most = 3
    lm = Transformers(model, tokenizer, 12, bos=True)
    assert ask(lm, prompts) == expected
    assert lm.rows_at_once == 3
    assert max(rows for rows, _ in forwards.shapes) == 3
    forwards.most = 0
    with pytest.raises(torch.OutOfMemoryError):
        ask(lm, prompts[:2])


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
    ask(Transformers(model, tokenizer, 3, bos=bos), [prompt_text(config.evaluation, row) for row in rows])
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
    expected = ask(Transformers(model, tokenizer, 4, bos=True), prompts)
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.max_new_tokens = 3
    assert ask(Transformers(model, tokenizer, 4, bos=True), prompts) != expected
    assert ask(Transformers(plain_generation(model, tokenizer), tokenizer, 4, bos=True), prompts) == expected


def test_beams_score_the_same_in_every_batch(trained: Any) -> None:
    run, *_ = trained
    beams = ["evaluation.generation.num_beams=4", f"evaluation.generation.max_new_tokens={NEW}"]
    (one,) = evaluate(run, [*beams, "evaluation.batch_size=1"])
    (seven,) = evaluate(run, [*beams, "evaluation.batch_size=7", "evaluation.limit=28"])
    assert one.items == seven.items
    assert one.unparsed == seven.unparsed
