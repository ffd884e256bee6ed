# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
"""Completions by transformers, behind lm-eval's interface.

Rows are completed in batches, longest prompt first, padded on the left. A batch is generated in segments of a few
tokens: after each, rows that have ended leave it, so that one long completion does not hold up the rest. Equal prompts,
as of several samples, are read once. A batch that does not fit into memory is halved.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.models.utils import handle_stop_sequences, postprocess_generated_text
from torch import Tensor
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from experiments.data.prompts import prompt_tokens
from experiments.models.shapes import context_length
from experiments.runs.environment import free_memory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SEGMENT = 16  # tokens; between two, finished rows leave
LOOK_BACK = 2  # tokens more than a stop string has: it may be written with others

Settings = dict[str, Any]


class Asked(NamedTuple):
    """A row to complete: its prompt's tokens, the most new ones, and lm-eval's settings (`until`, `do_sample`, …)."""

    prompt: list[int]
    room: int
    settings: Settings


class Transformers(LM):
    """A transformers model as lm-eval's evaluator asks it: for completions, with prompts tokenised as in training.

    Args:
        batch_size: most rows at once.
        bos: a protocol's `bos`.
        context: most tokens of a prompt and its completion, by default the model's; longer prompts lose their start.
    """

    def __init__(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, batch_size: int, bos: bool, context: int | None = None
    ) -> None:
        super().__init__()
        self.model, self.tokenizer, self.bos = model, tokenizer, bos
        self.rows_at_once, self.context = batch_size, context or context_length(model.config)

    def loglikelihood(self, requests: Any) -> Any:
        raise NotImplementedError("this model only completes: likelihoods are measured by eval.likelihood")

    loglikelihood_rolling = loglikelihood

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return the completion of each request up to its first stop string."""
        prompts = prompt_tokens(self.tokenizer, [cast(str, _arguments(request)[0]) for request in requests], self.bos)
        asked: list[Asked] = []
        for request, tokens in zip(requests, prompts, strict=True):
            settings: Settings = dict(_arguments(request)[1])
            room = cast(int, settings.pop("max_gen_toks"))
            settings["until"] = handle_stop_sequences(list(settings["until"]), cast(str, self.tokenizer.eos_token))
            asked.append(Asked(tokens[-(self.context - room) :], room, settings))
        texts = [""] * len(asked)
        for part in _alike(asked):
            for index, tokens in self._in_batches(asked, part):
                text = cast(str, self.tokenizer.decode(tokens, skip_special_tokens=True))
                texts[index] = postprocess_generated_text(text, asked[index].settings["until"], None)
        return texts

    def _in_batches(self, asked: Sequence[Asked], part: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
        """Yield the index and the new tokens of each row in `part`, which share their settings."""
        part = sorted(part, key=lambda index: (-len(asked[index].prompt), asked[index].prompt))
        while part:
            batch = part[: self.rows_at_once]
            rows = [asked[index] for index in batch]
            try:
                found = complete(self.model, self.tokenizer, rows)
            except torch.OutOfMemoryError:
                if len(batch) == 1:
                    raise
                self.rows_at_once = len(batch) // 2
                free_memory()
                continue
            yield from zip(batch, found, strict=True)
            part = part[len(batch) :]


def _alike(asked: Sequence[Asked]) -> list[list[int]]:
    """Group the rows that can share a batch. Beams of different lengths cannot: their scores depend on it."""
    groups: list[tuple[Any, list[int]]] = []
    for index, row in enumerate(asked):
        key = (row.settings, row.room if row.settings.get("num_beams", 1) > 1 else None)
        group = next((members for other, members in groups if other == key), None)
        if group is None:
            groups.append((key, group := []))
        group.append(index)
    return [members for _, members in groups]


def complete(model: Any, tokenizer: Any, asked: Sequence[Asked]) -> list[list[int]]:
    """Return the new tokens of rows with equal settings, without the end of text.

    After a stop string there may be more tokens: the text is cut later.
    """
    settings = dict(asked[0].settings)
    until, rooms = settings.pop("until"), [row.room for row in asked]
    pad: Any = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True, padding_side="left")
    rows = [torch.tensor(row.prompt, device=model.device) for row in asked]
    tokens, mask = pad(rows, padding_value=tokenizer.pad_token_id), pad([torch.ones_like(row) for row in rows])
    generate = partial(model.generate, pad_token_id=tokenizer.pad_token_id, use_cache=True, **settings)
    own: Any = model.generation_config.eos_token_id
    ends: set[int] = set() if own is None else {own} if isinstance(own, int) else set(own)
    if settings.get("num_beams", 1) > 1:  # its tokens so far are not those that a row ends with
        written = generate(input_ids=tokens, attention_mask=mask, max_new_tokens=max(rooms))[:, tokens.shape[1] :]
        return [_before(new, ends)[:room] for new, room in zip(written.tolist(), rooms, strict=True)]
    # A prompt method's model is PEFT's, and a model without a growing cache has a state of its own: neither continues
    # from a cache.
    continues = isinstance(model, PreTrainedModel) and model._supports_default_dynamic_cache()  # pyright: ignore
    segment = SEGMENT if continues else max(rooms)
    texts = [text for text in until if text and text != tokenizer.eos_token]  # there transformers itself ends the row
    found: list[list[int]] = [[] for _ in asked]
    start, left, cache = tokens.shape[1], list(range(len(asked))), _read(generate, tokens, mask) if continues else None
    while left:
        stop = _Stop(tokenizer, texts, start, len(left))
        written = generate(
            input_ids=tokens,
            attention_mask=mask,
            past_key_values=cache,
            max_new_tokens=min(segment, max(rooms[row] for row in left) - (tokens.shape[1] - start)),
            stopping_criteria=StoppingCriteriaList([stop] if texts else []),
            return_dict_in_generate=True,
        )
        tokens, cache = written.sequences, written.past_key_values
        going: list[int] = []
        for place, new in enumerate(tokens[:, start:].tolist()):
            row = left[place]
            found[row] = _before(new, ends)[: rooms[row]]
            if len(found[row]) == len(new) < rooms[row] and not stop.ended[place]:
                going.append(place)
        if len(going) < len(left):
            left, places = [left[place] for place in going], torch.tensor(going, device=tokens.device)
            if left:
                tokens, mask = tokens[places], mask[places]
                cache.batch_select_indices(places)
        mask = torch.nn.functional.pad(mask, (0, tokens.shape[1] - mask.shape[1]), value=1)
    return found


def _read(generate: Any, tokens: Tensor, mask: Tensor) -> Any:
    """Return the cache of all tokens but the last of each row, with equal rows read once; None if no rows are equal."""
    width = tokens.shape[1]
    both: Any = torch.cat([tokens, mask], 1)
    unique, places = both.unique(dim=0, return_inverse=True)
    if len(unique) == len(tokens) or width < 2 or not mask[:, -2].all():
        return None
    # The next token is not used, and drawing it must not change the rows' own random numbers.
    with torch.random.fork_rng([tokens.device] if tokens.is_cuda else []):
        first, seen = unique[:, : width - 1], unique[:, width:-1]
        output = generate(input_ids=first, attention_mask=seen, max_new_tokens=1, return_dict_in_generate=True)
    output.past_key_values.batch_select_indices(places)
    return output.past_key_values


def _arguments(request: Instance) -> tuple[Any, ...]:
    return cast("tuple[Any, ...]", request.args)


def _before(new: list[int], ends: Collection[int]) -> list[int]:
    """Return the tokens before the first end of text."""
    return list(itertools.takewhile(lambda token: token not in ends, new))


class _Stop(StoppingCriteria):
    """Ends a row when its completion contains one of the texts; `ended` says which rows have."""

    def __init__(self, tokenizer: Any, texts: Sequence[str], start: int, rows: int) -> None:
        lengths = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
        self.tokenizer, self.texts, self.start = tokenizer, texts, start
        self.last, self.ended = max(lengths, default=0) + LOOK_BACK, [False] * rows

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Any:
        recent = self.tokenizer.batch_decode(input_ids[:, self.start :][:, -self.last :])
        self.ended = [
            ended or any(text in tail for text in self.texts) for ended, tail in zip(self.ended, recent, strict=True)
        ]
        return torch.tensor(self.ended, device=input_ids.device)
