"""Parsers: pure functions from text to an answer, one for each way in which a protocol reads answers.

Each takes the text and the benchmark's options (none for free answers). The rules are those of the named sources,
including their quirks, so that their numbers can be reproduced.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from experiments.errors import UserError

NUMBER = r"-?\d+\.?\d*"
METAMATH_NUMBER = r"[\-+]?\d*[\.,/]?\d+"  # only one separator: in "1,234,567" it matches "1,234"
FINAL_ANSWER = "The final answer is: "
METAMATH_ANSWER = "The answer is: "
CORRECT_ANSWER = "the correct answer is"


@dataclass(frozen=True)
class Reading:
    """A parser's result: the answer's text or None, and whether the parser's second rule found it."""

    answer: str | None
    fallback: bool = False


# Numbers


def hash_marks(text: str, options: Sequence[str] = ()) -> Reading:
    """Return the number after the first "####", as openai/grade-school-math dataset.py does; commas are dropped."""
    match = re.search(r"#### (-?[\d.,]+)", text)
    return Reading(match[1].replace(",", "").rstrip(".") or None) if match else Reading(None)


def final_answer(text: str, options: Sequence[str] = ()) -> Reading:
    """Return the first number between the first "The final answer is: " and a second one; else the text's last number.

    juzhengz/LoRI and ziyangjoy/DiaBlo evaluate_gsm8k.py, `extract_answer_gsm8k`; commas are dropped first. The second
    rule applies without the phrase, and also if no number follows it.
    """
    text = text.replace(",", "")
    _, *after = text.split(FINAL_ANSWER, maxsplit=2)
    match = re.search(NUMBER, after[0]) if after else None
    if match:
        return Reading(match[0])
    answer = last_number(text).answer
    return Reading(answer, fallback=answer is not None)


def last_number(text: str, options: Sequence[str] = ()) -> Reading:
    """Return the last number, commas dropped: ziyangjoy/DiaBlo evaluate_math.py, LLM-Adapters evaluate.py, pyreft."""
    numbers = re.findall(NUMBER, text.replace(",", ""))
    return Reading(numbers[-1] if numbers else None)


def metamath_number(text: str, options: Sequence[str] = ()) -> Reading:
    """Return the first number after the last "The answer is: ", rounded to an integer, half to even.

    meta-math/MetaMath eval_gsm8k.py, also MiLoRA's and PiSSA's. "a/b" is a fraction, "a/0" is a.
    """
    _, phrase, after = text.rpartition(METAMATH_ANSWER)
    match = re.search(METAMATH_NUMBER, after) if phrase else None
    if match is None:
        return Reading(None)
    over, slash, under = match[0].replace(",", "").partition("/")
    try:
        number = float(Fraction(int(over), int(under))) if slash and under != "0" else float(over)
        return Reading(str(round(number)))
    except (ValueError, OverflowError, ZeroDivisionError):  # "/2"; infinite; "1/00"
        return Reading(None)


# Expressions


def metamath_expression(text: str, options: Sequence[str] = ()) -> Reading:
    """Return the text after the last "The answer is: ", up to a full stop at a line's end: MetaMath eval_math.py."""
    _, phrase, after = text.rpartition(METAMATH_ANSWER)
    return _expression(after) if phrase else Reading(None)


def diablo_expression(text: str, options: Sequence[str] = ()) -> Reading:
    """As `metamath_expression`, on the text stripped of white space: ziyangjoy/DiaBlo evaluate_math.py.

    So a final "The answer is: " followed by nothing is no answer, and a full stop at the text's end ends no line.
    """
    return metamath_expression(text.strip())


def final_answer_expression(text: str, options: Sequence[str] = ()) -> Reading:
    """Return the rest of the line after the first "The final answer is: ". Ours, for MATH after training on GSM8K."""
    _, phrase, after = text.partition(FINAL_ANSWER)
    return _expression(after, whole_lines=False) if phrase else Reading(None)


def _expression(text: str, whole_lines: bool = True) -> Reading:
    """Return the text up to its first full stop at a line's end, without outer white space and a final full stop."""
    text = text.split(".\n")[0]
    if not whole_lines:
        text = text.split("\n")[0]
    return Reading(text.strip().removesuffix(".").strip() or None)


# Options and letters


def first_option(text: str, options: Sequence[str] = ()) -> Reading:
    """Return the option mentioned first, case-sensitively: AGI-Edgerunners/LLM-Adapters commonsense_evaluate.py."""
    if not options:
        raise UserError("evaluation.parser reads options, of which this benchmark has none: choose one for its answers")
    match = re.search("|".join(re.escape(option) for option in options), text)
    return Reading(match[0] if match else None)


def option_after_phrase(text: str, options: Sequence[str] = ()) -> Reading:
    """Return the first option after the last "the correct answer is"; without the phrase, the first in the whole text.

    ziyangjoy/DiaBlo evaluate_commonsense.py, which also searches the prompt: there the second rule finds the prompt's
    first option.
    """
    *before, after = text.split(CORRECT_ANSWER)
    answer = first_option(after, options).answer
    return Reading(answer, fallback=not before and answer is not None)


def exact_after_phrase(text: str, options: Sequence[str] = ()) -> Reading:
    """Return all text after the first "the correct answer is ": pyreft and BaohaoLiao/ApiQ compute_metrics.py.

    More text than the option makes it a different, wrong answer.
    """
    _, _, after = text.partition(CORRECT_ANSWER + " ")
    return Reading(after.strip() or None)


def first_letter(text: str, options: Sequence[str] = ()) -> Reading:
    """Return the first capital A to E, even the one in "Answer": LLM-Adapters evaluate.py (AQuA), and pyreft."""
    match = re.search("A|B|C|D|E", text)
    return Reading(match[0] if match else None)
