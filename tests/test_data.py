"""Rows, prompts and scores: pure functions of text, checked against cases worked out by hand."""

from __future__ import annotations

import gzip
import itertools
import json
import operator
import re
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval.scoring import Reading, final_answer, hash_marks, score
from experiments import arith
from experiments.data import SOURCES, load_rows, read_rows
from experiments.plan import plan
from experiments.prompts import IGNORED, encode, prompt_text, target_text
from experiments.tiny import BOS, EOS, make_tokenizer

Fails = Callable[[Callable[[], object]], str]
OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
SIZES = {"train": 140, "heldout": 28, "test": 42}


def protocol(name: str) -> dict[str, Any]:
    (config,) = plan(["task=gsm8k", f"protocol={name}"])
    return config["protocol"]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer(720, seed=0)


# Generated problems


def test_problems_are_the_same_for_the_same_seed_and_others_for_another() -> None:
    assert arith.generate(SIZES, 0) == arith.generate(SIZES, 0)
    assert arith.generate(SIZES, 0) != arith.generate(SIZES, 1)


def test_splits_share_no_problem_whatever_the_names() -> None:
    """A problem is its words without names and things, and with its numbers."""

    def bare(question: str) -> str:
        return re.sub("|".join([*arith.NAMES, *arith.THINGS]), "_", question)

    splits = arith.generate({"train": 1456, "heldout": 140, "test": 392}, 0)
    problems = [bare(row["question"]) for rows in splits.values() for row in rows]
    assert len(set(problems)) == len(problems) == 1988


def test_answers_follow_from_their_steps() -> None:
    """Every calculator mark is right, uses numbers of the question or of steps before, and the last is the answer."""
    for row in itertools.chain(*arith.generate(SIZES, 3).values()):
        *steps, last = row["answer"].split("\n")
        known = set(re.findall(r"\d+", row["question"]))
        assert len(steps) >= 2
        result = ""
        for step in steps:
            match = re.fullmatch(r"(\d+)([-+*/])(\d+)=<<\1\2\3=(\d+)>>\4", step)
            left, sign, right, result = match.groups() if match else ("", "", "", "")
            assert {left, right} <= known, (row, step)
            assert OPERATIONS[sign](int(left), int(right)) == int(result)
            known.add(result)
        assert last == f"#### {result}"


def test_the_corpus_never_shows_a_fine_tuning_sentence() -> None:
    assert len(arith.TEMPLATES) >= 12
    assert not {t.question for t in arith.TEMPLATES} & {t.question for t in arith.CORPUS_TEMPLATES}
    text = "\n".join(itertools.islice(arith.corpus(0), 3000))
    for template in arith.TEMPLATES:
        fixed = max(re.split(r"\{\w+\}", template.question), key=len)  # its longest stretch without a slot
        assert len(fixed) > 10
        assert fixed not in text


def test_too_many_problems_are_refused(fails_with: Fails) -> None:
    data = {"source": "arith", "seed": 0, "train": 10**6, "heldout": 1, "test": 1}
    assert "problems are too many" in fails_with(lambda: load_rows(data, "train", None))


# Files


def write(path: Path, lines: list[str]) -> Path:
    with gzip.open(path, "wt") as file:
        file.write("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("{", "line 2: not valid JSON"),
        ('{"question": "q"}', "line 2: a row needs question and answer"),
        ("[1]", "line 2: a row needs question and answer"),
        ('{"question": "q", "answer": 3}', "line 2: question and answer must be text"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(bad: str, message: str, tmp_path: Path, fails_with: Fails) -> None:
    path = write(tmp_path / "rows.jsonl.gz", ['{"question": "q", "answer": "#### 1"}', bad])
    said = fails_with(lambda: read_rows(path, ("question", "answer")))
    assert message in said
    assert str(path) in said


def test_missing_data_says_what_to_do(tmp_path: Path, fails_with: Fails) -> None:
    said = fails_with(lambda: load_rows({"source": "gsm8k"}, "train", str(tmp_path)))
    assert "point runtime.data_root or DIABLO_DATA_ROOT at a folder that holds it" in said
    assert "openai/gsm8k" in said


def test_half_a_file_is_refused(tmp_path: Path, fails_with: Fails) -> None:
    (tmp_path / "gsm8k").mkdir()
    write(tmp_path / SOURCES["gsm8k"].files["test"], ['{"question": "q", "answer": "#### 1"}'])
    assert "1 rows, there must be 1319" in fails_with(lambda: load_rows({"source": "gsm8k"}, "test", str(tmp_path)))


def test_a_task_without_a_loader_says_so(fails_with: Fails) -> None:
    assert "no loader for it yet" in fails_with(lambda: load_rows({"source": "metamathqa"}, "train", None))


def test_real_gsm8k(data_root: Path) -> None:
    train = load_rows({"source": "gsm8k"}, "train", str(data_root))
    test = load_rows({"source": "gsm8k"}, "test", str(data_root))
    assert (len(train), len(test)) == (7473, 1319)
    golds = [hash_marks(row["answer"]).answer for row in [*train, *test]]
    assert all(gold is not None and float(gold) == int(float(gold)) for gold in golds)
    assert not {row["question"] for row in train} & {row["question"] for row in test}


# Prompts


def test_lori_prompt_and_target() -> None:
    row = {"question": "How many?", "answer": "1+1=<<1+1=2>>2\n#### 2"}
    lori = protocol("lori")
    assert prompt_text(lori, row) == (
        "How many?\nAnswer the above question. First think step by step and then answer the final number.\n"
    )
    assert target_text(lori, row) == "1+1=<<1+1=2>>2\nThe final answer is:  2"  # two spaces, as released


@pytest.mark.parametrize("name", ["plain", "lori"])
def test_tokens_are_the_prompts_and_the_targets(name: str, tokenizer: Any) -> None:
    used = protocol(name)
    rows = arith.generate(SIZES, 0)["train"]
    for row, example in zip(rows, encode(used, tokenizer, rows), strict=True):
        assert len(example.input_ids) == len(example.labels)
        trained = [token for token in example.labels if token != IGNORED]
        assert trained[-1] == EOS
        assert tokenizer.decode(trained[:-1]) == target_text(used, row)
        prompt = example.input_ids[: -len(trained)]
        assert (prompt[0] == BOS) == used["bos"]
        assert tokenizer.decode(prompt, skip_special_tokens=True) == prompt_text(used, row)
        # What evaluation feeds the model is what it was trained on.
        assert tokenizer(prompt_text(used, row), add_special_tokens=used["bos"])["input_ids"] == prompt


@given(
    question=st.text(max_size=200),
    answer=st.text(max_size=200),
    max_length=st.integers(1, 80),
    max_prompt=st.none() | st.integers(1, 40),
    on_prompt=st.booleans(),
)
def test_any_text_fits_any_length(
    question: str, answer: str, max_length: int, max_prompt: int | None, on_prompt: bool
) -> None:
    used = protocol("plain") | {
        "max_length": max_length,
        "max_prompt_length": max_prompt,
        "train_on_prompt": on_prompt,
    }
    (example,) = encode(used, TOKENIZER, [{"question": question, "answer": answer}])
    (whole,) = encode(used | {"max_length": 10**6}, TOKENIZER, [{"question": question, "answer": answer}])
    assert len(example.input_ids) == len(example.labels) <= max_length
    assert example.truncated == (len(whole.input_ids) > max_length)
    if not example.truncated:
        assert example == whole
    for token, label in zip(example.input_ids, example.labels, strict=True):
        assert label in (token, IGNORED)
        assert not (on_prompt and label == IGNORED)


TOKENIZER = make_tokenizer(300, seed=0)


def test_a_protocol_that_does_not_fit_names_the_field(fails_with: Fails) -> None:
    assert "needs the field 'question', the row has query" in fails_with(
        lambda: prompt_text(protocol("plain"), {"query": "q"})
    )


# Scores. The last column is worked out by hand from the rule.

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
FINAL_ANSWER = [
    ("so The final answer is:  72", Reading("72")),
    ("The final answer is: 1,234,567 dollars", Reading("1234567")),
    ("The final answer is: 5 The final answer is: 6", Reading("5")),
    ("The final answer is: none", Reading(None)),
    ("12 apples and 7 pears", Reading("7", fallback=True)),
    ("in 2 days. It costs $3.50.", Reading("3.50", fallback=True)),
    ("no number", Reading(None)),
    ("The final answer is:72", Reading("72", fallback=True)),
    ("minus -4", Reading("-4", fallback=True)),
]


@pytest.mark.parametrize(("text", "answer"), HASH_MARKS)
def test_hash_marks(text: str, answer: str | None) -> None:
    assert hash_marks(text) == Reading(answer)


@pytest.mark.parametrize(("text", "reading"), FINAL_ANSWER)
def test_final_answer(text: str, reading: Reading) -> None:
    assert final_answer(text) == reading


def test_score_counts() -> None:
    golds = ["#### 4", "#### 4", "#### 1,000", "#### 7", "broken"]
    scored = score("final_answer", ["The final answer is: 4.0", "none", "1000", "8", "none"], golds)
    assert scored.items == [1, 0, 1, 0, 0]  # two answers that cannot be read are not equal
    assert (scored.no_match, scored.fallback) == (2, 2)
    assert scored.accuracy == pytest.approx(0.4)
    assert scored.standard_error == pytest.approx((0.4 * 0.6 / 5) ** 0.5)


@given(st.text(alphabet=string.digits + "#-., ax\n", max_size=60))
def test_parsers_never_raise(text: str) -> None:
    for parser in ("hash_marks", "final_answer"):
        assert score(parser, [text], ["#### 4"]).items[0] in (0, 1)


def test_an_unknown_parser_is_named(fails_with: Fails) -> None:
    assert "did you mean hash_marks?" in fails_with(lambda: score("hash_mark", ["x"], ["#### 1"]))


def test_benchmark_files_are_complete() -> None:
    from eval.run import TASKS, read_benchmark

    for path in TASKS.glob("*.yaml"):
        benchmark = read_benchmark(path.stem)
        assert benchmark["task"] == path.stem
        assert benchmark["metadata"]["source"] in {*SOURCES, "arith"}
        json.dumps(benchmark)
