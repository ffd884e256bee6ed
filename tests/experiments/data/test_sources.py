"""The table of data sets: conversion of records, and the contents of the real files."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.config import Data
from experiments.data import sources
from experiments.data.rows import load_rows, rows_hash
from experiments.data.sources import HUBS, SOURCES, Row, boxed
from experiments.runs.sizes import counted

Fails = Callable[[Callable[[], object]], str]
FIELDS = ["instruction", "input", "output", "answer"]
FURTHER = {
    "math": ["level", "type"],
    "metamathqa": ["type"],
    "hex_phi": ["category"],
    "human_eval": ["test", "entry_point", "task_id"],
    "xstest_safe": ["category"],
    "xstest_unsafe": ["category"],
}
# Not in the data folder: too large, or gated.
ABSENT = {
    ("social_i_qa", "train"),
    ("hellaswag", "train"),
    ("hellaswag", "test"),
    ("commonsense_170k", "train"),
    ("metamathqa", "train"),
    ("math_10k", "train"),
    ("code_alpaca", "train"),
    ("saferpaca", "train"),
    ("hex_phi", "test"),
}
SPLITS = [(name, split) for name, splits in SOURCES.items() for split in splits]


@pytest.fixture(scope="module")
def rows_of(data_root: Path) -> Callable[..., list[Row]]:
    def load(name: str, split: str = "test") -> list[Row]:
        return load_rows(Data(name), split, str(data_root))

    return load


# Records


def test_gsm8k_keeps_the_solution_and_reads_its_number() -> None:
    assert sources.gsm8k({"question": "q", "answer": "6*200=<<6*200=1200>>1200\n#### -1,200"}) == {
        "instruction": "q",
        "input": "",
        "output": "6*200=<<6*200=1200>>1200\n#### -1,200",
        "answer": "-1200",
    }
    with pytest.raises(ValueError, match="has no '#### '"):
        sources.gsm8k({"question": "q", "answer": "1200"})


@pytest.mark.parametrize(
    ("ans", "answer"),
    [(2.0, "2"), ("12", "12"), ("12.0", "12"), (14.02, "14.02"), ("0.53", "0.53"), (2400000.0, "2400000")],
)
def test_mawps_writes_whole_numbers_without_a_point(ans: object, answer: str) -> None:
    row = sources.mawps_train({"original_text": "q", "equation": "X=a", "ans": ans})
    assert row == {"instruction": "q", "input": "", "output": f"X=a\n#### {answer}", "answer": answer}


@pytest.mark.parametrize("ans", [None, "six", [6]])
def test_mawps_needs_a_number(ans: object) -> None:
    with pytest.raises(ValueError, match="the field 'ans' must be a number, not"):
        sources.mawps_train({"original_text": "q", "equation": "X=a", "ans": ans})


def test_metamathqa() -> None:
    record = {"type": "GSM_SV", "query": "a\nb", "response": "r\nThe answer is: 5", "original_question": "a"}
    assert sources.metamathqa(record) == {
        "instruction": "a\nb",
        "input": "",
        "output": "r\nThe answer is: 5",
        "answer": "",
        "type": "GSM_SV",
    }


def test_math_without_an_answer_is_refused() -> None:
    with pytest.raises(ValueError, match="the field 'solution' has no"):
        sources.math({"problem": "p", "solution": "five", "level": "Level 1", "type": "Algebra"})


def test_xstest_keeps_one_label() -> None:
    record = {"id": "1", "prompt": "p", "type": "homonyms", "label": "safe"}
    made = sources.xstest("safe")(record)
    assert made == {"instruction": "p", "input": "", "output": "", "answer": "safe", "category": "homonyms"}
    assert sources.xstest("unsafe")(record) is None
    with pytest.raises(ValueError, match="the field 'label' must be safe or unsafe, not 'Safe'"):
        sources.xstest("safe")(record | {"label": "Safe"})


# The box


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        (r"so $\boxed{5}$.", "5"),
        (r"$\boxed{1}$ or rather $\boxed{\frac{1}{2}}$", r"\frac{1}{2}"),
        (r"$\boxed{\text{a {b} c}} + {d}$", r"\text{a {b} c}"),
        (r"$\boxed 5$", "5"),
        (r"$\boxed5$", "5"),
        (r"$\boxed {5}$", "5"),
        (r"\boxed 5 apples", "5"),
        (r"$\boxed{}$", ""),
        (r"$\fbox{7}$", "7"),
        (r"$\boxed{6}$ then \fbox{7}", "6"),
        (r"$\boxed{\{1,2\}}$", r"\{1,2\}"),
        (r"$\boxed{\frac{1}{2}$", None),
        (r"\boxed", None),
        (r"\boxed $$", None),
        ("5", None),
        ("", None),
    ],
)
def test_boxed(solution: str, answer: str | None) -> None:
    assert boxed(solution) == answer


plain = st.text(alphabet=st.characters(blacklist_characters="{}\\"), max_size=8)
balanced = st.recursive(
    plain, lambda inner: st.lists(inner | inner.map("{{{}}}".format), max_size=4).map("".join), max_leaves=12
)


@given(before=st.text(max_size=20), content=balanced, after=st.text(alphabet=" .$x{}", max_size=8))
def test_the_box_holds_what_was_put_in(before: str, content: str, after: str) -> None:
    assert boxed(rf"{before}\boxed{{{content}}}{after}") == content


@given(st.text(alphabet=r"{}\boxedf $5", max_size=40))
def test_the_box_never_raises(text: str) -> None:
    content = boxed(text)
    assert content is None or content in text


# The table


def test_the_table_is_complete() -> None:
    assert set(HUBS) <= set(SOURCES)
    for hub in HUBS.values():
        assert re.fullmatch("[0-9a-f]{40}", hub.revision)
    for name, split in SPLITS:
        part = SOURCES[name][split]
        assert part.file.endswith((".json", ".jsonl", ".csv"))
        assert part.how is None or "{file}" in part.how
        if name != "hex_phi":
            assert re.match(r"https://\S+/[0-9a-f]{40}/\S+$", part.url), part.url


def test_no_source_is_made_of_test_sets() -> None:
    assert not [part for splits in SOURCES.values() for part in splits.values() if "math_data" in part.file + part.url]


@pytest.mark.parametrize(("name", "split"), SPLITS)
def test_every_local_file_loads(name: str, split: str, data_root: Path, fails_with: Fails) -> None:
    part = SOURCES[name][split]
    if not any((data_root / f"{part.file}{suffix}").is_file() for suffix in ("", ".gz")):
        assert (name, split) in ABSENT
        said = fails_with(lambda: load_rows(Data(name), split, str(data_root)))
        assert f"no {part.file} (nor .gz) in {data_root}: " in said
        return
    rows = load_rows(Data(name), split, str(data_root))
    assert len(rows) in part.rows
    for row in rows:
        assert list(row) == [*FIELDS, *FURTHER.get(name, [])]
        assert all(type(value) is str for value in row.values())
        assert row["instruction"]


def test_no_two_splits_hold_the_same_rows(rows_of: Callable[..., list[Row]]) -> None:
    here = [key for key in SPLITS if key not in ABSENT]
    assert len({rows_hash(rows_of(*key)) for key in here}) == len(here) == 29


OPTIONS = {
    "boolq": ["true", "false"],
    "piqa": ["solution1", "solution2"],
    "social_i_qa": ["answer1", "answer2", "answer3"],
    "winogrande": ["option1", "option2"],
    "arc_easy": ["answer1", "answer2", "answer3", "answer4", "answer5"],
    "arc_challenge": ["answer1", "answer2", "answer3", "answer4"],
    "openbookqa": ["answer1", "answer2", "answer3", "answer4"],
    "hellaswag_sample": ["ending1", "ending2", "ending3", "ending4"],
}


@pytest.mark.parametrize(("name", "split"), [key for key in SPLITS if key[0] in OPTIONS and key not in ABSENT])
def test_commonsense_answers_are_options(name: str, split: str, rows_of: Callable[..., list[Row]]) -> None:
    from eval.benchmarks import read_benchmark

    rows = rows_of(name, split)
    found = {row["answer"] for row in rows}
    assert found <= set(OPTIONS[name])
    assert found <= set(read_benchmark(name).options)
    for row in rows:
        assert row["output"] == f"the correct answer is {row['answer']}"
        assert row["answer"] in row["instruction"].rpartition("Answer format: ")[2].split("/")
        assert row["input"] == ""


def test_the_six_commonsense_sets_that_are_here(data_root: Path) -> None:
    names = ["boolq", "piqa", "winogrande", "arc_easy", "arc_challenge", "openbookqa"]
    assert len(load_rows(Data(tuple(names)), "train", str(data_root))) == 74_265


def test_the_sizes_of_commonsense_170k_follow_from_its_parts() -> None:
    """Its parts with WinoGrande in all sizes (xs, s, m, l, xl, debiased) instead of only xl."""
    parts = ("boolq", "piqa", "social_i_qa", "hellaswag", "arc_easy", "arc_challenge", "openbookqa")
    winogrande = 160 + 640 + 2_558 + 10_234 + 40_398 + 9_248
    assert sum(SOURCES[name]["train"].rows[0] for name in parts) + winogrande == 170_420
    assert SOURCES["commonsense_170k"]["train"].rows == (170_420,)


def test_gsm8k_golds_are_integers(rows_of: Callable[..., list[Row]]) -> None:
    train, test = rows_of("gsm8k", "train"), rows_of("gsm8k", "test")
    for row in [*train, *test]:
        assert re.fullmatch(r"-?\d+", row["answer"])
        assert row["output"].replace(",", "").endswith(f"#### {row['answer']}")
    assert not {row["instruction"] for row in train} & {row["instruction"] for row in test}
    assert sum(int(row["answer"]) < 0 for row in test) == 2
    assert sum(int(row["answer"]) >= 1_000_000 for row in test) == 2


def test_math_golds(rows_of: Callable[..., list[Row]]) -> None:
    rows = rows_of("math")
    assert rows[0]["answer"] == "2"  # y = 2/(x² + x - 6) has the asymptotes x = -3 and x = 2
    for row in rows:
        assert row["answer"].count("{") == row["answer"].count("}")
        assert rf"\boxed{{{row['answer']}}}" in row["output"]
        assert row["answer"]
    assert Counter(row["type"] for row in rows) == {
        "Algebra": 1187,
        "Intermediate Algebra": 903,
        "Prealgebra": 871,
        "Precalculus": 546,
        "Number Theory": 540,
        "Geometry": 479,
        "Counting & Probability": 474,
    }
    assert {row["level"] for row in rows} == {f"Level {level}" for level in range(1, 6)}


def test_arithmetic_golds(rows_of: Callable[..., list[Row]]) -> None:
    for row in [*rows_of("svamp"), *rows_of("mawps"), *rows_of("mawps", "train")]:
        float(row["answer"])
    assert all(not row["answer"].endswith(".0") for row in rows_of("mawps", "train"))
    for row in rows_of("aqua"):
        assert row["answer"] in "ABCDE"
        assert "Answer Choices: (A)" in row["instruction"]


def test_human_eval_solutions_end_their_prompts(rows_of: Callable[..., list[Row]]) -> None:
    for number, row in enumerate(rows_of("human_eval")):
        assert row["task_id"] == f"HumanEval/{number}"
        assert f"def {row['entry_point']}(" in row["instruction"]
        assert row["test"].lstrip().startswith(("METADATA", "def check"))
        compile(row["instruction"] + row["output"] + row["test"], row["task_id"], "exec")


# Safety


def test_hex_phi_says_where_to_ask(tmp_path: Path, fails_with: Fails) -> None:
    for root in (str(tmp_path), None):
        said = fails_with(lambda root=root: load_rows(Data("hex_phi"), "test", root))
        assert "request access at https://huggingface.co/datasets/LLM-Tuning-Safety/HEx-PHI under its licence" in said
        assert "hex_phi/hex_phi.jsonl as JSON lines with instruction and category" in said
        assert "advbench and xstest_unsafe are the open stand-ins" in said
        assert "leave both unset" not in said


@pytest.mark.parametrize(("count", "whole"), [(330, True), (300, True), (320, False), (1, False)])
def test_hex_phi_is_read_from_the_users_file(count: int, whole: bool, tmp_path: Path, fails_with: Fails) -> None:
    (tmp_path / "hex_phi").mkdir()
    lines = ['{"instruction": "q", "category": "malware", "more": 1}\n'] * count
    (tmp_path / "hex_phi/hex_phi.jsonl").write_text("".join(lines), encoding="utf-8")
    if whole:
        rows = load_rows(Data("hex_phi"), "test", str(tmp_path))
        row = {"instruction": "q", "input": "", "output": "", "answer": "safe", "category": "malware"}
        assert rows == [row] * count
    else:
        said = fails_with(lambda: load_rows(Data("hex_phi"), "test", str(tmp_path)))
        assert f"{counted(count, 'row')}, there must be 330 or 300" in said


def test_stand_ins_are_not_called_hex_phi() -> None:
    for name, split in SPLITS:
        part = SOURCES[name][split]
        assert ("hex" in name) == ("hex" in part.file.lower()) == ("hex" in part.url.lower()) == (name == "hex_phi")


def test_safety_rows(rows_of: Callable[..., list[Row]]) -> None:
    for name in ("advbench", "xstest_safe", "xstest_unsafe"):
        for row in rows_of(name):
            assert (row["input"], row["output"], row["answer"]) == ("", "", "safe")
    safe, unsafe = rows_of("xstest_safe"), rows_of("xstest_unsafe")
    assert not {row["instruction"] for row in safe} & {row["instruction"] for row in unsafe}
    # The source names the categories of unsafe prompts after those of safe ones.
    assert {row["category"].startswith("contrast_") for row in unsafe} == {True}
    assert {row["category"].startswith("contrast_") for row in safe} == {False}


def test_alpaca_rows(rows_of: Callable[..., list[Row]]) -> None:
    with_input = {
        "code_alpaca_2k": 1006,
        "code_alpaca_new": 3580,
        "alpaca_5000": 1943,
        "safety_refusals": 0,
    }
    for name, count in with_input.items():
        rows = rows_of(name, "train")
        assert {row["answer"] for row in rows} == {""}
        assert sum(bool(row["input"]) for row in rows) == count
