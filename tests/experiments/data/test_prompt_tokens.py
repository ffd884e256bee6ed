"""A prompt has the same ids in training and in evaluation, whatever special tokens a tokenizer adds by itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

from eval.backends import plain_generation
from eval.hf import Transformers
from experiments.config import Protocol, RunConfig
from experiments.data.arith import corpus
from experiments.data.prompts import encode, leading_tokens, prompt_text, prompt_tokens
from experiments.models.full_precision import load_tokenizer
from experiments.models.tiny import make_tokenizer
from experiments.plan.compose import _own_protocol, options, plan
from tests.eval.test_hf import ask

Fails = Callable[[Callable[[], object]], str]
ROWS = [
    {"instruction": text, "input": "", "output": "The answer is 7", "answer": "7"}
    for text in ("Q", "Ann has 3 apples and buys 4.  How many are there?", "Was it café or\n\ttea – 中文?")
]


def adds_bos(tokenizer: Any) -> None:
    """Make the tokenizer add a BOS, as LLaMA's does."""
    bos = tokenizer.bos_token
    _template(tokenizer, f"{bos} $A", bos)


def has_bos(tokenizer: Any) -> None:
    """Give the tokenizer a BOS that it does not add, as SmolLM2's, GPT-2's and Pythia's."""
    _template(tokenizer, "$A")


def without_bos(tokenizer: Any) -> None:
    """Remove the tokenizer's BOS, as in Qwen's."""
    _template(tokenizer, "$A")
    tokenizer.bos_token = None


def own_template(tokenizer: Any) -> None:
    """Make the tokenizer add two tokens before a text, as ChatGLM's does, and the end of sequence after it."""
    eos, pad = tokenizer.eos_token, tokenizer.pad_token
    _template(tokenizer, f"{pad} {eos} $A {eos}", eos, pad)


def _template(tokenizer: Any, single: str, *special: str) -> None:
    tokens = [(token, tokenizer.convert_tokens_to_ids(token)) for token in special]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=tokens)


def sentence_pieces() -> PreTrainedTokenizerFast:
    """Return a tokenizer like LLaMA 2's: a space belongs to the next word, also before the first one."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<pad>", "<s>", "</s>", "<unk>"], show_progress=False
    )  # fmt: skip
    tokenizer.train_from_iterator([text for text, _ in zip(corpus(0), range(200), strict=False)], trainer)
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def changed(tokenizer: Any, change: Callable[[Any], None]) -> Any:
    change(tokenizer)
    return tokenizer


BEHAVIOURS: dict[str, tuple[Callable[[], Any], list[int]]] = {  # a tokenizer, and the ids before its texts
    "adds BOS": (lambda: changed(make_tokenizer(400, 0), adds_bos), [1]),
    "has BOS": (lambda: changed(make_tokenizer(400, 0), has_bos), []),
    "no BOS": (lambda: changed(make_tokenizer(400, 0), without_bos), []),
    "own template": (lambda: changed(make_tokenizer(400, 0), own_template), [0, 2]),
    "sentence pieces": (lambda: changed(sentence_pieces(), adds_bos), [1]),
}
PROTOCOLS = {  # protocol: the first task with it
    name: next(task for task in options("task") if _own_protocol(task).split("/")[0] == name.split("/")[0])
    for name in options("protocol")
}


@lru_cache
def config_of(protocol: str) -> RunConfig:
    (config,) = plan([f"task={PROTOCOLS[protocol]}", f"protocol={protocol.split('/')[1]}", "method=base"])
    return config


def network(tokenizer: Any) -> Any:
    torch.manual_seed(0)
    sizes: Any = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=2048, **sizes)
    return plain_generation(AutoModelForCausalLM.from_config(config).eval(), tokenizer)


def in_training(protocol: Protocol, tokenizer: Any) -> list[list[int]]:
    """Return the rows' ids with empty targets, without the end of sequence."""
    asked = replace(protocol, target="", ending="", max_length=2048, max_prompt_length=None, max_target_length=None)
    examples = encode(asked, tokenizer, ROWS)
    assert all(example.input_ids[-1] == tokenizer.eos_token_id for example in examples)
    return [example.input_ids[:-1] for example in examples]


def in_evaluation(model: Any, tokenizer: Any, prompts: list[str], bos: bool) -> list[list[int]]:
    """Return the network's input without padding."""
    seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def spy(module: Any, arguments: Any, given: dict[str, Any]) -> None:
        ids, mask = given["input_ids"], given.get("attention_mask")  # rows of equal length need no mask
        seen.setdefault(0, (ids.clone(), torch.ones_like(ids) if mask is None else mask.clone()))

    hook = model.register_forward_pre_hook(spy, with_kwargs=True)
    try:
        ask(Transformers(model, tokenizer, len(prompts), bos=bos), prompts, max_gen_toks=1)
    finally:
        hook.remove()
    return [row[kept.bool()].tolist() for row, kept in zip(*seen[0], strict=True)]


def check_equal(protocol: Protocol, model: Any, tokenizer: Any, before: list[int]) -> None:
    trained = in_training(protocol, tokenizer)
    prompts = [prompt_text(protocol, row) for row in ROWS]
    assert sorted(in_evaluation(model, tokenizer, prompts, protocol.bos)) == sorted(trained)
    texts = [tokenizer.backend_tokenizer.encode(prompt, add_special_tokens=False).ids for prompt in prompts]
    assert trained == [[*(before if protocol.bos else []), *text] for text in texts]


@pytest.mark.parametrize("behaviour", BEHAVIOURS)
def test_a_prompt_has_the_same_ids_in_training_and_evaluation(behaviour: str) -> None:
    make, before = BEHAVIOURS[behaviour]
    tokenizer = make()
    assert leading_tokens(tokenizer) == before
    model = network(tokenizer)
    for name in PROTOCOLS:
        check_equal(config_of(name).protocol, model, tokenizer, before)


def test_a_protocol_asks_with_the_tokens_that_it_trains_with() -> None:
    """LoRI's code protocol is the exception, as in its source: no BOS in training, but one in the test."""
    differ = [name for name in PROTOCOLS if config_of(name).protocol.bos != config_of(name).evaluation.bos]
    assert differ == ["code/lori"]


def test_a_row_begins_with_its_prompt() -> None:
    """Also with a target. If both are tokenised as one text, a token may span the border."""
    tokenizer = BEHAVIOURS["adds BOS"][0]()
    for name in PROTOCOLS:
        protocol = replace(config_of(name).protocol, max_length=2048)
        prompts = prompt_tokens(tokenizer, [prompt_text(protocol, row) for row in ROWS], protocol.bos)
        for prompt, example in zip(prompts, encode(protocol, tokenizer, ROWS), strict=True):
            kept = len(prompt) - (1 if protocol.joined else 0)
            assert example.input_ids[:kept] == prompt[:kept], name


@pytest.mark.parametrize("template", ["$A <s> $A", "<s>"])
def test_a_tokenizer_whose_prefix_cannot_be_told_is_one_line(template: str, fails_with: Fails) -> None:
    tokenizer = make_tokenizer(400, 0)
    _template(tokenizer, template, "<s>")
    said = fails_with(lambda: prompt_tokens(tokenizer, ["some text"], True))
    assert "what it puts before a text is unknown: choose a protocol with bos: false" in said
    assert prompt_tokens(tokenizer, [], False) == []


@pytest.fixture(scope="module")
def real_tokenizer(smollm2: Path) -> Any:
    return load_tokenizer(plan(["model=smollm2_135m", "method=base"])[0].model, smollm2)


@pytest.mark.real
def test_smollm2_gets_no_bos_in_training_nor_in_evaluation(real_tokenizer: Any) -> None:
    """It has a BOS, `<|im_start|>` (1), but adds nothing before a text; its end of sequence is `<|im_end|>` (2)."""
    protocol = replace(config_of("math_10k/pyreft").protocol, prompt="{instruction}", joined=False)
    row = {"instruction": "The capital of France is", "input": "", "output": " Paris", "answer": ""}
    (example,) = encode(protocol, real_tokenizer, [row])
    assert real_tokenizer.bos_token_id == 1
    assert example.input_ids == [504, 3575, 282, 4649, 314, 7042, 2]
    asked = in_evaluation(network(real_tokenizer), real_tokenizer, [row["instruction"]], bos=True)
    assert asked == [[504, 3575, 282, 4649, 314]]


@pytest.mark.real
@pytest.mark.parametrize(
    ("change", "before"), [(adds_bos, [1]), (has_bos, []), (without_bos, []), (own_template, [2, 2])]
)
def test_the_real_tokenizer_with_every_behaviour(
    change: Callable[[Any], None], before: list[int], smollm2: Path
) -> None:
    tokenizer = changed(AutoTokenizer.from_pretrained(smollm2), change)
    assert leading_tokens(tokenizer) == before
    model = network(tokenizer)
    for name in PROTOCOLS:
        check_equal(config_of(name).protocol, model, tokenizer, before)
