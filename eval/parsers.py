"""From text to an answer: pure functions, one for every way in which a protocol finds what a model answered.

Each takes the text to read and the benchmark's options (none where answers are free). The rules are those of the named
sources, accidents included, so that their numbers can be had again.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from experiments.errors import UserError

NUMBER = r"-?\d+\.?\d*"
METAMATH_NUMBER = r"[\-+]?\d*[\.,/]?\d+"  # one separator only: of "1,234,567" it takes "1,234"
FINAL_ANSWER = "The final answer is: "
METAMATH_ANSWER = "The answer is: "
CORRECT_ANSWER = "the correct answer is"


@dataclass(frozen=True)
class Reading:
    """What a parser found: the answer's text or None, and whether it took its second rule to find it."""

    answer: str | None
    fallback: bool = False


# Numbers


def hash_marks(text: str, options: Sequence[str] = ()) -> Reading:
    """The number after the first "####", as openai/grade-school-math dataset.py reads it; commas are dropped."""
    match = re.search(r"#### (-?[\d.,]+)", text)
    return Reading(match[1].replace(",", "").rstrip(".") or None) if match else Reading(None)


def final_answer(text: str, options: Sequence[str] = ()) -> Reading:
    """The first number between the first "The final answer is: " and a second; else the last number of the text.

    juzhengz/LoRI and ziyangjoy/DiaBlo evaluate_gsm8k.py, `extract_answer_gsm8k`, commas dropped first. The second rule
    counts without the phrase, and also where no number follows it.
    """
    text = text.replace(",", "")
    _, *after = text.split(FINAL_ANSWER, maxsplit=2)
    match = re.search(NUMBER, after[0]) if after else None
    if match:
        return Reading(match[0])
    answer = last_number(text).answer
    return Reading(answer, fallback=answer is not None)


def last_number(text: str, options: Sequence[str] = ()) -> Reading:
    """The last number, commas dropped: ziyangjoy/DiaBlo evaluate_math.py, LLM-Adapters evaluate.py, pyreft."""
    numbers = re.findall(NUMBER, text.replace(",", ""))
    return Reading(numbers[-1] if numbers else None)


def metamath_number(text: str, options: Sequence[str] = ()) -> Reading:
    """The first number after the last "The answer is: ", rounded to an integer, half to even.

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
    """What follows the last "The answer is: ", up to a full stop at the end of a line: MetaMath eval_math.py."""
    _, phrase, after = text.rpartition(METAMATH_ANSWER)
    return _expression(after) if phrase else Reading(None)


def diablo_expression(text: str, options: Sequence[str] = ()) -> Reading:
    """As `metamath_expression`, of the text without white space around it: ziyangjoy/DiaBlo evaluate_math.py.

    So a last "The answer is: " with nothing behind it is none, and a full stop that ends the text ends no line.
    """
    return metamath_expression(text.strip())


def final_answer_expression(text: str, options: Sequence[str] = ()) -> Reading:
    """What follows the first "The final answer is: " in its line. Ours: for MATH after training in GSM8K's format."""
    _, phrase, after = text.partition(FINAL_ANSWER)
    return _expression(after, whole_lines=False) if phrase else Reading(None)


def _expression(text: str, whole_lines: bool = True) -> Reading:
    """The text up to its first full stop at the end of a line, without white space around it and a last full stop."""
    text = text.split(".\n")[0]
    if not whole_lines:
        text = text.split("\n")[0]
    return Reading(text.strip().removesuffix(".").strip() or None)


# Options and letters


def first_option(text: str, options: Sequence[str] = ()) -> Reading:
    """The option mentioned first, in the same case: AGI-Edgerunners/LLM-Adapters commonsense_evaluate.py."""
    if not options:
        raise UserError("evaluation.parser reads options, of which this benchmark has none: choose one for its answers")
    match = re.search("|".join(re.escape(option) for option in options), text)
    return Reading(match[0] if match else None)


def option_after_phrase(text: str, options: Sequence[str] = ()) -> Reading:
    """The first option after the last "the correct answer is"; without the phrase the first of the whole text.

    ziyangjoy/DiaBlo evaluate_commonsense.py, which searches the prompt too: there the second rule finds the prompt's
    first option.
    """
    *before, after = text.split(CORRECT_ANSWER)
    answer = first_option(after, options).answer
    return Reading(answer, fallback=not before and answer is not None)


def exact_after_phrase(text: str, options: Sequence[str] = ()) -> Reading:
    """All that follows the first "the correct answer is ": stanfordnlp/pyreft and BaohaoLiao/ApiQ compute_metrics.py.

    More text than the option makes it another answer, and a wrong one.
    """
    _, _, after = text.partition(CORRECT_ANSWER + " ")
    return Reading(after.strip() or None)


def first_letter(text: str, options: Sequence[str] = ()) -> Reading:
    """The first capital A to E, be it the first letter of "Answer": LLM-Adapters evaluate.py (AQuA), also pyreft's."""
    match = re.search("A|B|C|D|E", text)
    return Reading(match[0] if match else None)
