"""Prompts and targets: the text of a row under a protocol, and its tokens, for training and evaluation alike.

A protocol is data (`configs/protocol/<task>/<name>.yaml`; experiments/config.py explains every field): how a row
becomes a prompt and a target, which tokens are in the loss, how a row that is too long is cut, and how tests are
prompted, read and judged.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, cast

from experiments.config import Evaluation, Protocol
from experiments.errors import UserError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # label of tokens that are not in the loss, as in transformers


@dataclass(frozen=True)
class Example:
    """A tokenised training row; `labels` has the length of `input_ids`, with IGNORED for tokens not in the loss."""

    input_ids: list[int]
    labels: list[int]
    truncated: bool


@dataclass(frozen=True)
class Asked:
    """How the rows of an evaluation's plan are asked: settings of `Evaluation`."""

    protocol: str
    prompt: str | None
    prompt_with_input: str | None
    strip_prompt: bool


def prompt_text(rules: Protocol | Evaluation | Asked, row: dict[str, str]) -> str:
    """Return the prompt, in training (`rules`: a `Protocol`) or in a test."""
    if isinstance(rules, Protocol) and rules.split_query:
        instruction, _, rest = row["instruction"].partition("\n")
        row = {**row, "instruction": instruction, "input": rest}
    part = "prompt_with_input" if row.get("input") else "prompt"
    template = rules.prompt_with_input if row.get("input") else rules.prompt
    if template is None:
        raise UserError(f"protocol {_name(rules)} has no {part}, which the row {row} needs: choose another protocol")
    text = _fill(rules, part, template, row)
    return text.strip() if not isinstance(rules, Protocol) and rules.strip_prompt else text


def target_text(protocol: Protocol, row: dict[str, str]) -> str:
    """Return the target, without the protocol's ending and the end of sequence."""
    text = _fill(protocol, "target", protocol.target, row)
    for old, new in protocol.replace.items():
        text = text.replace(old, new)
    return text


def select_rows(protocol: Protocol, rows: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """Return the rows to train on: all, or of rows with one prompt the last, in the first one's position."""
    if protocol.repeated_prompts == "all":
        return list(rows)
    return list({prompt_text(protocol, row): row for row in rows}.values())


def encode(protocol: Protocol, tokenizer: PreTrainedTokenizerBase, rows: Sequence[dict[str, str]]) -> list[Example]:
    """Tokenise rows: [BOS] prompt, target, ending, end of sequence; cut to `max_length` tokens.

    With `joined` the three texts are tokenised as one, so that tokens may span their borders; the prompt then has as
    many tokens as the prompt text alone. Otherwise each is tokenised separately; in a row that is too long, first the
    prompt is cut to its first `max_prompt_length` tokens, then the target to `max_target_length` or to what is left.
    """
    prompts = [prompt_text(protocol, row) for row in rows]
    answers = [target_text(protocol, row) + protocol.ending for row in rows]
    if protocol.joined:
        return _encode_joined(protocol, tokenizer, prompts, answers)
    longest, longest_prompt, longest_target = (
        protocol.max_length,
        protocol.max_prompt_length,
        protocol.max_target_length,
    )
    examples: list[Example] = []
    encoded = prompt_tokens(tokenizer, prompts, protocol.bos)
    for prompt, target in zip(encoded, _tokens(tokenizer, answers), strict=True):
        target = [*target, cast(int, tokenizer.eos_token_id)]
        truncated = len(prompt) + len(target) > longest
        if truncated and longest_prompt is not None:
            prompt = prompt[:longest_prompt]
        prompt = prompt[:longest]
        left = longest - len(prompt)
        if len(target) > left:
            target = target[: left if longest_target is None else min(left, longest_target)]
        examples.append(_example(protocol, [*prompt, *target], len(prompt), truncated))
    return examples


def _encode_joined(
    protocol: Protocol, tokenizer: PreTrainedTokenizerBase, prompts: list[str], answers: list[str]
) -> list[Example]:
    if protocol.max_prompt_length is not None or protocol.max_target_length is not None:
        raise UserError(
            f"protocol {protocol.name}: with joined tokens only max_length can be set, not max_prompt_length or "
            f"max_target_length"
        )
    longest = protocol.max_length
    hidden = [prompt + protocol.ending for prompt in prompts] if protocol.mask_counts_ending else prompts
    texts = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    examples: list[Example] = []
    encoded = (prompt_tokens(tokenizer, part, protocol.bos) for part in (texts, hidden))
    for tokens, prompt in zip(*encoded, strict=True):
        tokens = [*tokens, cast(int, tokenizer.eos_token_id)]
        prompt_length = min(len(prompt), longest, len(tokens))
        examples.append(_example(protocol, tokens[:longest], prompt_length, len(tokens) > longest))
    return examples


def _example(protocol: Protocol, tokens: list[int], prompt_length: int, truncated: bool) -> Example:
    labels = tokens if protocol.train_on_prompt else [IGNORED] * prompt_length + tokens[prompt_length:]
    return Example(tokens, labels, truncated)


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], bos: bool) -> list[list[int]]:
    """Return the token ids of each prompt, for training and tests alike.

    Args:
        bos: a protocol's `bos`: begin with the tokens that the tokenizer itself puts before a text.
    """
    start = leading_tokens(tokenizer) if bos else []
    return [[*start, *tokens] for tokens in _tokens(tokenizer, prompts)]


def leading_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that a tokenizer puts before a text by itself: LLaMA's its BOS; GPT-2's, Pythia's and SmolLM2's
    none, although they have a BOS; ChatGLM's two. Tokens it appends are not part of a prompt.
    """
    text = "a"
    alone, whole = (cast("list[int]", tokenizer(text, add_special_tokens=add)["input_ids"]) for add in (False, True))
    for start in range(len(whole) - len(alone) + 1):
        if alone and whole[start : start + len(alone)] == alone:
            return whole[:start]
    raise UserError(
        f"{type(tokenizer).__name__}: {text!r} becomes {whole} with special tokens and {alone} without them, so what "
        f"it puts before a text is unknown: choose a protocol with bos: false"
    )


def _tokens(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    return tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []


def collate(examples: list[Example], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Pad rows on the right to the longest: `input_ids`, `attention_mask` and `labels`, each (rows, tokens)."""
    import torch

    longest = max(len(example.input_ids) for example in examples)

    def pad(lists: list[list[int]], value: int) -> torch.Tensor:
        return torch.tensor([row + [value] * (longest - len(row)) for row in lists])

    return {
        "input_ids": pad([example.input_ids for example in examples], pad_token_id),
        "attention_mask": pad([[1] * len(example.input_ids) for example in examples], 0),
        "labels": pad([example.labels for example in examples], IGNORED),
    }


def _name(rules: Protocol | Evaluation | Asked) -> str:
    return rules.name if isinstance(rules, Protocol) else rules.protocol


def _fill(rules: Protocol | Evaluation | Asked, part: str, template: str, row: dict[str, str]) -> str:
    try:
        return fill(template, row)
    except KeyError as error:
        raise UserError(
            f"protocol {_name(rules)}: its {part} needs the field {error}, the row has {', '.join(row)}: "
            f"choose a protocol that fits the data"
        ) from None
    except ValueError as error:
        raise UserError(f"protocol {_name(rules)}: its {part} cannot be filled: {error}") from None


def fill(template: str, fields: dict[str, str]) -> str:
    """Fill in a template's fields. KeyError for a missing field, ValueError for anything beyond `{name}`.

    Python's format syntax could reach into objects and request a width of gigabytes.
    """
    return "".join(text + (fields[name] if name is not None else "") for text, name in _parts(template))


@lru_cache
def _parts(template: str) -> tuple[tuple[str, str | None], ...]:
    parts: list[tuple[str, str | None]] = []
    for text, name, form, conversion in string.Formatter().parse(template):
        if name is not None and (form or conversion or not name.isidentifier()):
            raise ValueError(
                f"{{{name}}} with a format or an index: write a field as {{name}}, a literal brace as {{{{ or }}}}"
            )
        parts.append((text, name))
    return tuple(parts)
