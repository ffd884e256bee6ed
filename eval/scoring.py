"""Scores: pure functions of completions. A protocol selects the searched text, the parser and the equality."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from eval.comparisons import UNBOUNDED, compare
from eval.equality import (
    diablo,
    hendrycks,
    metamath,
    milora,
    milora_number,
    milora_with_self_comparison,
    near_number,
    same_number,
    same_text,
)
from eval.parsers import (
    Reading,
    diablo_expression,
    exact_after_phrase,
    final_answer,
    final_answer_expression,
    first_letter,
    first_option,
    hash_marks,
    last_number,
    metamath_expression,
    metamath_number,
    option_after_phrase,
)
from eval.refusals import judged, refusal_keywords
from experiments.errors import UserError, nearest

RESPONSE = "### Response:"
Named = TypeVar("Named")


@dataclass(frozen=True)
class Rules:
    """How a protocol reads and judges answers, by name; `options` are the benchmark's, if answers are options."""

    searched: str
    parser: str
    equality: str
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sample:
    """The prompt, the model's completion, and the right answer."""

    prompt: str
    completion: str
    answer: str


@dataclass(frozen=True)
class Score:
    """`items` is 1 or 0 for every sample; the counts are of samples without an answer, read by the parser's second
    rule, or wrong because their comparison exceeded its limits."""

    items: list[int]
    unparsed: int
    fallback: int
    undecided: int


def completion_only(prompt: str, completion: str) -> str:
    return completion


def whole(prompt: str, completion: str) -> str:
    return prompt + completion


def after_first_response(prompt: str, completion: str) -> str:
    """Return the text after the first "### Response:", up to a second one: LLM-Adapters evaluate.py."""
    pieces = (prompt + completion).split(RESPONSE, maxsplit=2)
    return pieces[min(1, len(pieces) - 1)]


def all_after_first_response(prompt: str, completion: str) -> str:
    """Return all text after the first "### Response:", including later ones: stanfordnlp/pyreft and BaohaoLiao/ApiQ."""
    return (prompt + completion).split(RESPONSE, maxsplit=1)[-1]


def after_last_response(prompt: str, completion: str) -> str:
    return (prompt + completion).split(RESPONSE)[-1]


# Prompt and completion → the searched text.
SEARCHED: dict[str, Callable[[str, str], str]] = {
    "completion": completion_only,
    "whole": whole,
    "after_first_response": after_first_response,
    "all_after_first_response": all_after_first_response,
    "after_last_response": after_last_response,
}
# The searched text and the benchmark's options → the answer.
PARSERS: dict[str, Callable[[str, Sequence[str]], Reading]] = {
    "hash_marks": hash_marks,
    "final_answer": final_answer,
    "last_number": last_number,
    "metamath_number": metamath_number,
    "metamath_expression": metamath_expression,
    "diablo_expression": diablo_expression,
    "final_answer_expression": final_answer_expression,
    "first_option": first_option,
    "option_after_phrase": option_after_phrase,
    "exact_after_phrase": exact_after_phrase,
    "first_letter": first_letter,
    "refusal_keywords": refusal_keywords,
    "judged": judged,
}
# The answer and the right one → whether they are equal.
EQUALITIES: dict[str, Callable[[str, str], bool]] = {
    "same_text": same_text,
    "same_number": same_number,
    "near_number": near_number,
    "metamath_integer": same_number,  # metamath_number has already rounded
    "milora_number": milora_number,
    "hendrycks": hendrycks,
    "metamath": metamath,
    "diablo": diablo,
    "milora": milora,
    "milora_with_self_comparison": milora_with_self_comparison,
}


def check_rules(rules: Rules) -> None:
    """Raise a UserError unless all three names are known."""
    _lookup("searched", rules.searched, SEARCHED)
    _lookup("parser", rules.parser, PARSERS)
    _lookup("equality", rules.equality, EQUALITIES)


def score(rules: Rules, samples: Sequence[Sample]) -> Score:
    """Read and judge every sample. A sample without a readable answer is wrong, whatever the right answer."""
    searched = _lookup("searched", rules.searched, SEARCHED)
    parser = _lookup("parser", rules.parser, PARSERS)
    _lookup("equality", rules.equality, EQUALITIES)
    readings = [parser(searched(sample.prompt, sample.completion), rules.options) for sample in samples]
    pairs = {
        number: (reading.answer, sample.answer)
        for number, (reading, sample) in enumerate(zip(readings, samples, strict=True))
        if reading.answer is not None and sample.answer != ""
    }
    verdicts = dict(zip(pairs, verdicts_on(rules.equality, list(pairs.values())), strict=True))
    return Score(
        items=[int(verdicts.get(number) is True) for number in range(len(samples))],
        unparsed=sum(reading.answer is None for reading in readings),
        fallback=sum(reading.fallback for reading in readings),
        undecided=sum(verdict is None for verdict in verdicts.values()),
    )


def verdicts_on(equality: str, pairs: Sequence[tuple[str, str]]) -> list[bool | None]:
    """Return whether every answer equals its gold; None if sympy exceeded its limits."""
    if equality in UNBOUNDED:
        return compare(equality, pairs)
    return [EQUALITIES[equality](answer, gold) for answer, gold in pairs]


def _lookup(setting: str, name: str, known: Mapping[str, Named]) -> Named:
    if name not in known:
        raise UserError(f"evaluation.{setting}={name}: {nearest(name, known)}")
    return known[name]
