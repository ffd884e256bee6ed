"""A protocol's text: the prompt and target of a row, and their tokens. Training and evaluation both come here.

A protocol is data (`configs/protocol/*.yaml`): how a row becomes a prompt and a target, which tokens the loss sees, and
how a row that is too long is cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from experiments.errors import UserError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # the label of tokens that the loss leaves out, as in transformers


@dataclass(frozen=True)
class Example:
    """One training row in tokens; `labels` is as long as `input_ids`, with IGNORED where the loss does not look."""

    input_ids: list[int]
    labels: list[int]
    truncated: bool


def prompt_text(protocol: dict[str, Any], row: dict[str, str]) -> str:
    """What the model is given, in training and in evaluation."""
    return _fill(protocol, "prompt", row)


def target_text(protocol: dict[str, Any], row: dict[str, str]) -> str:
    """What the model is to write, without the end of sequence."""
    text = _fill(protocol, "target", row)
    for old, new in protocol["replace"].items():
        text = text.replace(old, new)
    return text


def encode(
    protocol: dict[str, Any], tokenizer: PreTrainedTokenizerBase, rows: Sequence[dict[str, str]]
) -> list[Example]:
    """Rows as tokens: [BOS] prompt, target, end of sequence.

    A row over `max_length` first has its prompt cut to its first `max_prompt_length` tokens, then its target, which
    then lacks its end of sequence.
    """
    prompts = tokenizer([prompt_text(protocol, row) for row in rows], add_special_tokens=False)["input_ids"]
    targets = tokenizer([target_text(protocol, row) for row in rows], add_special_tokens=False)["input_ids"]
    bos = [tokenizer.bos_token_id] if protocol["bos"] else []
    longest = protocol["max_length"]
    examples = []
    for prompt, target in zip(prompts, targets, strict=True):
        prompt, target = [*bos, *prompt], [*target, tokenizer.eos_token_id]
        truncated = len(prompt) + len(target) > longest
        if truncated and protocol["max_prompt_length"] is not None:
            prompt = prompt[: protocol["max_prompt_length"]]
        target = target[: max(0, longest - len(prompt))]
        prompt = prompt[:longest]
        labels = prompt if protocol["train_on_prompt"] else [IGNORED] * len(prompt)
        examples.append(Example([*prompt, *target], [*labels, *target], truncated))
    return examples


def collate(examples: list[Example], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Rows padded on the right to the longest: `input_ids`, `attention_mask` and `labels`, each (rows, tokens)."""
    import torch

    longest = max(len(example.input_ids) for example in examples)

    def pad(lists: list[list[int]], value: int) -> torch.Tensor:
        return torch.tensor([row + [value] * (longest - len(row)) for row in lists])

    return {
        "input_ids": pad([example.input_ids for example in examples], pad_token_id),
        "attention_mask": pad([[1] * len(example.input_ids) for example in examples], 0),
        "labels": pad([example.labels for example in examples], IGNORED),
    }


def _fill(protocol: dict[str, Any], part: str, row: dict[str, str]) -> str:
    try:
        return protocol[part].format_map(row)
    except KeyError as error:
        raise UserError(
            f"protocol {protocol['name']}: its {part} needs the field {error}, the row has {', '.join(row)}: "
            f"choose a protocol that fits the data"
        ) from None
