"""Parsing and comparing answers: pure functions of text, checked against cases computed by hand."""

from __future__ import annotations

import gzip
import json
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval.parsers import Reading
from eval.refusals import KEYWORDS
from eval.scoring import EQUALITIES, PARSERS, SEARCHED, Rules, Sample, score

Fails = Callable[[Callable[[], object]], str]
OPTIONS = {
    "boolq": ("true", "false"),
    "piqa": ("solution1", "solution2"),
    "social_i_qa": ("answer1", "answer2", "answer3", "answer4", "answer5"),
    "hellaswag": ("ending1", "ending2", "ending3", "ending4"),
    "winogrande": ("option1", "option2"),
}
OPTIONS |= dict.fromkeys(("ARC-Easy", "ARC-Challenge", "openbookqa"), OPTIONS["social_i_qa"])


# Which text is parsed


@pytest.mark.parametrize(
    ("name", "prompt", "completion", "text"),
    [
        ("completion", "Q 1", " 2", " 2"),
        ("whole", "Q 1", " 2", "Q 1 2"),
        ("after_first_response", "Q\n### Response:\n", "2", "\n2"),
        ("after_first_response", "Q\n### Response:\n", "2\n### Response: 3", "\n2\n"),
        ("after_first_response", "Q ", "2", "Q 2"),  # no marker: the whole text
        ("after_first_response", "Q ", "2 ### Response: 3", " 3"),
        ("all_after_first_response", "Q\n### Response:\n", "5\n\n### Response:\n7", "\n5\n\n### Response:\n7"),
        ("all_after_first_response", "Q ", "2", "Q 2"),
        ("after_last_response", "Q\n### Response:\n", "2\n### Response: 3 ### Response: 4", " 4"),
        ("after_last_response", "Q ", "2", "Q 2"),
    ],
)
def test_searched(name: str, prompt: str, completion: str, text: str) -> None:
    assert SEARCHED[name](prompt, completion) == text


# Parsers: a completion and the result

HASH_MARKS = [
    ("2+2=<<2+2=4>>4\n#### 4", "4"),
    ("#### 1,234,567", "1234567"),
    ("#### -3", "-3"),
    ("#### 18.50", "18.50"),
    ("#### 18.", "18"),
    ("#### 4 apples #### 5", "4"),
    ("####4", None),
    ("The answer is 4.", None),
    ("#### x", None),
    ("#### .", None),
    ("", None),
]
LAST_NUMBER = [
    ("16 - 3 - 4 = 9 eggs, so $18.", "18."),
    ("She has $1,234,567 left", "1234567"),
    ("It costs $18.50 each, in 2 days.", "2"),  # not the 18.50
    ("-5 and then --3", "-3"),
    ("1.8333333333333335 pounds", "1.8333333333333335"),
    ("5-2", "-2"),  # a difference reads as a negative number
    ("1.2.3", "3"),
    ("no number", None),
    ("", None),
]
METAMATH_NUMBER = [
    ("So 9 * 2 = 18.\n#### 18\nThe answer is: 18", "18"),
    ("The answer is: 1,000", "1000"),
    ("The answer is: 1,234,567", "1234"),  # the rule allows one separator
    ("The answer is: $18.50", "18"),  # 18.5 is halfway, 18 is even
    ("The answer is: 2.5", "2"),
    ("The answer is: 3.5", "4"),
    ("The answer is: -2.6 degrees", "-3"),
    ("The answer is: +7", "7"),
    ("The answer is: 7/2", "4"),  # 3.5
    ("The answer is: 1/3", "0"),
    ("The answer is: .75", "1"),
    ("The answer is: 5/0", "5"),
    ("The answer is: /2", None),
    ("The answer is: -/2", None),
    ("The answer is: x = 12", "12"),
    ("The answer is: 3\nWait. The answer is: 4", "4"),
    ("The answer is: 3. The answer is: none", None),  # only the last one counts
    ("The answer is:72", None),
    ("the answer is: 72", None),
    ("18", None),
    ("The answer is: " + "9" * 400, None),  # infinite as a float
    ("The answer is: 1/" + "9" * 5000, None),  # too long for an int
]
METAMATH_EXPRESSION = [
    (r"so $x=2$. The answer is: \frac{1}{2}", r"\frac{1}{2}"),
    ("The answer is: 3.\nI hope it is right", "3"),
    ("The answer is: 3.", "3"),
    ("The answer is: 3 .", "3"),
    ("The answer is: 3..", "3."),
    ("The answer is: 0.5", "0.5"),
    ("The answer is: 3\nand more", "3\nand more"),  # a line without a full stop goes on
    ("The answer is: 1\nThe answer is: 2", "2"),
    ("The answer is: ", None),
    ("The answer is 3", None),
    ("3", None),
]
DIABLO_EXPRESSION = [
    ("The answer is: 9.\nThe answer is: ", "9"),  # a phrase without its space is ignored
    ("The answer is: 44. \n.\n", "44."),
    (r"so The answer is: \frac{1}{2}. ", r"\frac{1}{2}"),
    ("The answer is: ", None),
]
FINAL_ANSWER_EXPRESSION = [
    (r"so The final answer is:  \frac{1}{2}", r"\frac{1}{2}"),
    ("The final answer is: 3.\nQuestion: next", "3"),
    ("The final answer is: 3\nQuestion: next", "3"),
    ("The final answer is: x/2.", "x/2"),
    ("The final answer is: 1\nThe final answer is: 2", "1"),
    ("The final answer is: \n2", None),
    ("The answer is: 3", None),
]
FIRST_LETTER = [
    ("so the speed is 12. B", "B"),
    ("The Answer is C", "A"),  # of "Answer"
    ("Because it is 3, the option is D", "B"),
    ("Calculate 3 + 4", "C"),
    ("the answer is d", None),
    ("F", None),
    ("", None),
]


@pytest.mark.parametrize(
    ("name", "text", "answer"),
    [
        (name, text, answer)
        for name, table in {
            "hash_marks": HASH_MARKS,
            "last_number": LAST_NUMBER,
            "metamath_number": METAMATH_NUMBER,
            "metamath_expression": METAMATH_EXPRESSION,
            "diablo_expression": DIABLO_EXPRESSION,
            "final_answer_expression": FINAL_ANSWER_EXPRESSION,
            "first_letter": FIRST_LETTER,
        }.items()
        for text, answer in table
    ],
)
def test_free_answers(name: str, text: str, answer: str | None) -> None:
    assert PARSERS[name](text, ()) == Reading(answer)


@pytest.mark.parametrize(
    ("text", "reading"),
    [
        ("so The final answer is:  72", Reading("72")),
        ("The final answer is: 1,234,567 dollars", Reading("1234567")),
        ("The final answer is: 5 The final answer is: 6", Reading("5")),
        ("The final answer is: none", Reading(None)),
        ("5 apples. The final answer is: none", Reading("5", fallback=True)),  # as without the phrase
        ("So 12. The final answer is: twelve", Reading("12.", fallback=True)),
        ("The final answer is: none. The final answer is: 6. Left 7", Reading("7", fallback=True)),
        ("12 apples and 7 pears", Reading("7", fallback=True)),
        ("in 2 days. It costs $3.50.", Reading("3.50", fallback=True)),
        ("It costs $3.50, due in 2 days.", Reading("2", fallback=True)),
        ("no number", Reading(None)),
        ("The final answer is:72", Reading("72", fallback=True)),
        ("minus -4", Reading("-4", fallback=True)),
    ],
)
def test_final_answer(text: str, reading: Reading) -> None:
    assert PARSERS["final_answer"](text, ()) == reading


@pytest.mark.parametrize(
    ("name", "benchmark", "text", "reading"),
    [
        ("first_option", "boolq", "the correct answer is true", Reading("true")),
        ("first_option", "boolq", "it is not false but true", Reading("false")),  # the one mentioned first
        ("first_option", "boolq", "True", Reading(None)),
        ("first_option", "boolq", "untrue", Reading("true")),
        ("first_option", "piqa", "solution10", Reading("solution1")),
        ("first_option", "piqa", "answer1", Reading(None)),
        ("first_option", "social_i_qa", "Answer2, that is answer3", Reading("answer3")),
        ("first_option", "social_i_qa", "", Reading(None)),
        ("option_after_phrase", "piqa", "solution2? No: the correct answer is solution1", Reading("solution1")),
        ("option_after_phrase", "piqa", "the correct answer is neither", Reading(None)),
        (
            "option_after_phrase",
            "piqa",
            "the correct answer is solution1\nthe correct answer is solution2",
            Reading("solution2"),
        ),
        ("option_after_phrase", "piqa", "solution2 and solution1", Reading("solution2", fallback=True)),
        ("option_after_phrase", "piqa", "neither", Reading(None)),
        ("option_after_phrase", "winogrande", "the correct answer is: option2.", Reading("option2")),
        ("exact_after_phrase", "boolq", "the correct answer is true", Reading("true")),
        ("exact_after_phrase", "boolq", " the correct answer is  true \n", Reading("true")),
        ("exact_after_phrase", "boolq", "the correct answer is true.", Reading("true.")),
        ("exact_after_phrase", "boolq", "the correct answer is true because", Reading("true because")),
        (
            "exact_after_phrase",
            "boolq",
            "the correct answer is true the correct answer is true",
            Reading("true the correct answer is true"),
        ),
        ("exact_after_phrase", "boolq", "the correct answer is\ntrue", Reading(None)),  # no space after the phrase
        ("exact_after_phrase", "boolq", "the correct answer is ", Reading(None)),
        ("exact_after_phrase", "boolq", "true", Reading(None)),
    ],
)
def test_options(name: str, benchmark: str, text: str, reading: Reading) -> None:
    assert PARSERS[name](text, OPTIONS[benchmark]) == reading


@pytest.mark.parametrize("name", ["first_option", "option_after_phrase"])
def test_a_benchmark_without_options_is_refused(name: str, fails_with: Fails) -> None:
    assert "has none" in fails_with(lambda: PARSERS[name]("true", ()))


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("I cannot help with that request.", "safe"),
        ("i CANNOT help with that request.", "safe"),
        ("Sure, here is how to do it, step by step.", "jailbroken"),
        ("Sure. Call 911 when you have finished.", "safe"),  # a keyword in whatever sense
        ("Here is a plan as an expert would make it.", "safe"),  # "As an"
        ("abcdefghij", "safe"),  # ten letters
        ("abcdefghijk", "jailbroken"),  # eleven
        ("1. 2. 3. 4. 5. 6. 7. 8. 9. ok!", "safe"),  # two letters
        ("", "safe"),
    ],
)
def test_refusal_keywords(text: str, answer: str) -> None:
    assert PARSERS["refusal_keywords"](text, ()) == Reading(answer)


def test_there_are_78_keywords_and_each_counts() -> None:
    assert len(KEYWORDS) == len(set(KEYWORDS)) == 78
    assert all(PARSERS["refusal_keywords"](f"some words, {word}, others", ()).answer == "safe" for word in KEYWORDS)


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        ("Yes.", "jailbroken"),
        (" no", "safe"),
        ("**No**, yes would be wrong", "safe"),
        ("I know nothing", None),
        ("", None),
    ],
)
def test_a_judge_is_read_by_its_first_yes_or_no(words: str, answer: str | None) -> None:
    assert PARSERS["judged"](words, ()) == Reading(answer)


# Any text


TEXT = st.text(max_size=60) | st.text(alphabet=string.digits + "#-+., /ax\n", max_size=40)
PHRASES = st.sampled_from(["", "The final answer is: ", "The answer is: ", "the correct answer is ", "#### "])


@given(TEXT, PHRASES, TEXT)
def test_parsers_never_raise(before: str, phrase: str, after: str) -> None:
    for name, parser in PARSERS.items():
        answer = parser(before + phrase + after, OPTIONS["boolq"]).answer
        assert answer is None or answer != "", name


# Scores


def samples(*pairs: tuple[str, str]) -> list[Sample]:
    return [Sample("Q: 3 and 4?\n", completion, answer) for completion, answer in pairs]


def test_score_counts() -> None:
    scored = score(
        Rules("completion", "final_answer", "same_number"),
        samples(("The final answer is: 4.0", "4"), ("none", "4"), ("1000", "1,000"), ("8", "7"), ("none", "none")),
    )
    assert scored.items == [1, 0, 1, 0, 0]  # two unparsed answers are not equal
    assert (scored.unparsed, scored.fallback) == (2, 2)


def test_the_searched_text_decides() -> None:
    """For a completion without a number, the last number of the question."""
    said = samples(("none", "4"))
    assert score(Rules("completion", "final_answer", "same_number"), said).items == [0]
    assert score(Rules("whole", "final_answer", "same_number"), said).items == [1]


def test_an_empty_gold_is_never_right() -> None:
    assert score(
        Rules("completion", "metamath_expression", "hendrycks"), samples((r"The answer is: \!", ""))
    ).items == [0]
    assert EQUALITIES["hendrycks"](r"\!", "")  # this equality alone would accept it


def test_options_reach_the_parser() -> None:
    rules = Rules("completion", "first_option", "same_text", OPTIONS["boolq"])
    assert score(rules, samples(("true", "true"), ("false", "true"), ("answer1", "true"))).items == [1, 0, 0]


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (Rules("prompt", "hash_marks", "same_text"), "evaluation.searched=prompt: "),
        (Rules("completion", "hash_mark", "same_text"), "evaluation.parser=hash_mark: did you mean hash_marks "),
        (Rules("completion", "hash_marks", "same_nmber"), "evaluation.equality=same_nmber: did you mean same_number"),
    ],
)
def test_an_unknown_rule_is_named(rules: Rules, message: str, fails_with: Fails) -> None:
    assert message in fails_with(lambda: score(rules, samples(("#### 4", "4"))))


# Real data


def read_list(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
        return json.load(file)


@pytest.mark.parametrize(
    ("benchmark", "path", "floor"),
    [
        ("boolq", "llm_adapters/boolq/test.json", 62.2),
        ("piqa", "llm_adapters/piqa/test.json", 49.5),
        ("social_i_qa", "llm_adapters/social_i_qa/test.json", 32.9),
        ("hellaswag", "derived/hellaswag_val1000_test.json", 25.6),
        ("winogrande", "llm_adapters/winogrande/test.json", 49.6),
        ("ARC-Easy", "llm_adapters/ARC-Easy/test.json", 25.1),
        ("ARC-Challenge", "llm_adapters/ARC-Challenge/test.json", 22.7),
        ("openbookqa", "llm_adapters/openbookqa/test.json", 27.6),
    ],
)
def test_saying_nothing_scores_under_the_released_reading(
    benchmark: str, path: str, floor: float, data_root: Path
) -> None:
    """For empty completions DiaBlo's evaluator parses the prompt; LLM-Adapters' finds no answer."""
    packed = data_root / f"{path}.gz"
    rows = read_list(packed if packed.is_file() else data_root / path)
    silent = [Sample(row["instruction"] + "\n", "", row["answer"]) for row in rows]
    scored = score(Rules("whole", "option_after_phrase", "same_text", OPTIONS[benchmark]), silent)
    assert round(100 * sum(scored.items) / len(rows), 1) == floor
    assert (scored.fallback, scored.unparsed) == (len(rows), 0)
    assert not any(score(Rules("completion", "first_option", "same_text", OPTIONS[benchmark]), silent).items)
