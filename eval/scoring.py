"""Reading answers: pure functions of a completion's text, each named by the protocols that use it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from experiments.errors import UserError, nearest

NUMBER = r"-?\d+\.?\d*"
PHRASE = "The final answer is: "


@dataclass(frozen=True)
class Reading:
    """What a parser found: the answer's text or None, and whether it took its second rule to find it."""

    answer: str | None
    fallback: bool = False


@dataclass(frozen=True)
class Score:
    """`items` is 1 or 0 for every completion; the counts say how many had no answer or needed the second rule."""

    items: list[int]
    no_match: int
    fallback: int

    @property
    def accuracy(self) -> float:
        return sum(self.items) / len(self.items)

    @property
    def standard_error(self) -> float:
        """Of the accuracy, over items: sqrt(p (1 - p) / n)."""
        return math.sqrt(self.accuracy * (1 - self.accuracy) / len(self.items))


def hash_marks(completion: str) -> Reading:
    """The number after the first "####", as openai/grade-school-math dataset.py reads it; commas are dropped."""
    match = re.search(r"#### (-?[\d.,]+)", completion)
    return Reading(match[1].replace(",", "").rstrip(".") or None) if match else Reading(None)


def final_answer(completion: str) -> Reading:
    """The first number after the first "The final answer is: "; without the phrase the last number of the completion.

    juzhengz/LoRI and ziyangjoy/DiaBlo evaluate_gsm8k.py, commas dropped first. They also search the question.
    """
    text = completion.replace(",", "")
    before, phrase, after = text.partition(PHRASE)
    if phrase:
        match = re.search(NUMBER, after)
        return Reading(match[0] if match else None)
    numbers = re.findall(NUMBER, before)
    return Reading(numbers[-1], fallback=True) if numbers else Reading(None)


PARSERS: dict[str, Callable[[str], Reading]] = {"hash_marks": hash_marks, "final_answer": final_answer}


def score(parser: str, completions: Sequence[str], answers: Sequence[str]) -> Score:
    """Completions against the rows' own answers (GSM8K's format). Equal as numbers is right; no answer is wrong."""
    if parser not in PARSERS:
        raise UserError(f"evaluation.parser={parser}: {nearest(parser, PARSERS)}")
    readings = [PARSERS[parser](completion) for completion in completions]
    golds = [hash_marks(answer).answer for answer in answers]
    return Score(
        items=[int(_equal(reading.answer, gold)) for reading, gold in zip(readings, golds, strict=True)],
        no_match=sum(reading.answer is None for reading in readings),
        fallback=sum(reading.fallback for reading in readings),
    )


def _equal(answer: str | None, gold: str | None) -> bool:
    """Two answers that could not be read are not equal."""
    if answer is None or gold is None:
        return False
    try:
        return float(answer) == float(gold)
    except ValueError:  # "1.2.3" is not a number
        return False
