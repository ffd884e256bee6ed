"""Rows and prompts, checked against cases computed by hand."""

from __future__ import annotations

import gzip
import itertools
import json
import operator
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.config import Data
from experiments.data import arith
from experiments.data.__main__ import main
from experiments.data.rows import load_rows, read_rows, rows_hash
from experiments.data.sources import SOURCES, llm_adapters
from experiments.runs.records import content_hash

Fails = Callable[[Callable[[], object]], str]
OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
SIZES = {"train": 140, "heldout": 28, "test": 42}


# Generated problems


def test_problems_are_the_same_for_the_same_seed_and_others_for_another() -> None:
    assert arith.generate(SIZES, 0) == arith.generate(SIZES, 0)
    assert arith.generate(SIZES, 0) != arith.generate(SIZES, 1)


def test_splits_share_no_problem_whatever_the_names() -> None:
    """Problems are compared by their words without names and things, and by their numbers."""

    def bare(question: str) -> str:
        return re.sub("|".join([*arith.NAMES, *arith.THINGS]), "_", question)

    splits = arith.generate({"train": 1456, "heldout": 140, "test": 392}, 0)
    problems = [bare(row["instruction"]) for rows in splits.values() for row in rows]
    assert len(set(problems)) == len(problems) == 1988


def test_answers_follow_from_their_steps() -> None:
    """Every calculator mark is correct, uses numbers from the question or earlier steps, and the last is the answer."""
    for row in itertools.chain(*arith.generate(SIZES, 3).values()):
        *steps, last = row["output"].split("\n")
        known = set(re.findall(r"\d+", row["instruction"]))
        assert len(steps) >= 2
        result = ""
        for step in steps:
            match = re.fullmatch(r"(\d+)([-+*/])(\d+)=<<\1\2\3=(\d+)>>\4", step)
            left, sign, right, result = match.groups() if match else ("", "", "", "")
            assert {left, right} <= known, (row, step)
            assert OPERATIONS[sign](int(left), int(right)) == int(result)
            known.add(result)
        assert last == f"#### {result}"
        assert (row["input"], row["answer"]) == ("", result)


def test_the_corpus_never_shows_a_fine_tuning_sentence() -> None:
    assert len(arith.TEMPLATES) >= 12
    assert not {t.question for t in arith.TEMPLATES} & {t.question for t in arith.CORPUS_TEMPLATES}
    text = "\n".join(itertools.islice(arith.corpus(0), 3000))
    for template in arith.TEMPLATES:
        fixed = max(re.split(r"\{\w+\}", template.question), key=len)  # its longest stretch without a slot
        assert len(fixed) > 10
        assert fixed not in text


def test_too_many_problems_are_refused(fails_with: Fails) -> None:
    data = Data("arith", seed=0, train=10**6, heldout=1, test=1)
    assert "problems are too many" in fails_with(lambda: load_rows(data, "train", None))


# Files


ROW = {"instruction": "q", "input": "", "output": "o", "answer": "a"}
LINE = json.dumps(ROW)


def write(path: Path, content: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content.encode()) if path.suffix == ".gz" else content.encode())
    return path


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv"])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_every_form_gives_the_same_rows(name: str, suffix: str, tmp_path: Path) -> None:
    content = {
        "rows.jsonl": f"\ufeff{LINE}\r\n\n{LINE}",
        "rows.json": f"[{LINE},\n{LINE}]",
        "rows.csv": 'answer,input,instruction,output,more\na,,q,o,x\n"a","",q,o,"x\ny"\n',
    }[name]
    assert read_rows(write(tmp_path / f"{name}{suffix}", content), llm_adapters) == [ROW, ROW]


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("r.jsonl", LINE + "\n{", ", line 2: not valid JSON (Expecting property name"),
        ("r.jsonl", LINE + "\n[1]", ", line 2: a row must be an object, not [1]"),
        ("r.jsonl", LINE + '\n{"instruction": "q"}', ", line 2: the field 'input' is missing: there are instruction"),
        ("r.jsonl", json.dumps(ROW | {"answer": 3}), ", line 1: the field 'answer' must be text, not 3"),
        ("r.json", f"[{LINE},\n{LINE[:9]}", ", line 2, column 2: not valid JSON (Unterminated string"),
        ("r.json", f"[{LINE}, null]", ", row 2: a row must be an object, not None"),
        (
            "r.json",
            f"[{LINE}, {json.dumps(ROW | {'input': None})}]",
            ", row 2: the field 'input' must be text, not None",
        ),
        ("r.json", LINE, ": a JSON list of rows is needed, not {'instruction'"),
        ("r.json", "", ", line 1, column 1: not valid JSON (Expecting value): is the file whole?"),
        (
            "r.csv",
            "instruction,input,output\nq,,o",
            ", row 1: the field 'answer' is missing: there are instruction, input",
        ),
        ("r.csv", "instruction,input,output,answer\nq,,o,a\nq", ", row 2: the field 'input' must be text, not None"),
        ("r.csv", 'instruction,input,output,answer\nq,,o,a\nq,,o,"a', ", after row 1: cannot be read (unexpected end"),
    ],
)
def test_a_bad_row_is_named_by_file_place_and_field(
    name: str, content: str, message: str, suffix: str, tmp_path: Path, fails_with: Fails
) -> None:
    path = write(tmp_path / f"{name}{suffix}", content)
    assert fails_with(lambda: read_rows(path, llm_adapters)).startswith(f"{path}{message}")


# No timestamp, so that two processes that collect these tests get equal test ids.
WHOLE = gzip.compress("\n".join([LINE] * 500).encode(), mtime=0)


@pytest.mark.parametrize(
    "content",
    [WHOLE[: len(WHOLE) // 2], WHOLE[:5], b"not gzip", WHOLE[:30] + b"\0" * 40 + WHOLE[70:]],
    ids=["half", "header", "no gzip", "damaged"],
)
def test_a_broken_gzip_file_is_named(content: bytes, tmp_path: Path, fails_with: Fails) -> None:
    path = tmp_path / "cut.jsonl.gz"
    path.write_bytes(content)
    said = fails_with(lambda: read_rows(path, llm_adapters))
    assert said.startswith(f"{path}")
    assert said.endswith("is the file whole?")


def test_half_a_file_is_refused(tmp_path: Path, fails_with: Fails) -> None:
    path = tmp_path / "cut.jsonl"
    path.write_bytes(f'{LINE}\n{{"instruction": "é'.encode()[:-1])  # ends inside a letter
    assert "cannot be read ('utf-8' codec" in fails_with(lambda: read_rows(path, llm_adapters))
    path = write(tmp_path / "gsm8k/test.jsonl", '{"question": "q", "answer": "#### 1"}\n' * 2)
    said = fails_with(lambda: load_rows(Data("gsm8k"), "test", str(tmp_path)))
    assert said == f"gsm8k test: 2 rows, there must be 1,319: {path} is incomplete"


@pytest.fixture
def no_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DIABLO_DATA_ROOT", raising=False)


@pytest.mark.usefixtures("no_root")
def test_missing_data_says_what_to_do(tmp_path: Path, fails_with: Fails) -> None:
    said = fails_with(lambda: load_rows(Data("gsm8k"), "train", str(tmp_path)))
    assert f"no gsm8k/train.jsonl (nor .gz) in {tmp_path}: `python -m experiments.data fetch source=gsm8k" in said
    assert f"--data-root {tmp_path}`, or save https://raw.githubusercontent.com/openai/" in said
    assert "point runtime.data_root or DIABLO_DATA_ROOT at a folder that holds it" in said
    assert said.endswith("leave both unset to load openai/gsm8k from the hub")
    said = fails_with(lambda: load_rows(Data("svamp"), "test", str(tmp_path)))
    assert "save https://raw.githubusercontent.com/AGI-Edgerunners/LLM-Adapters/" in said
    assert "from the hub" not in said
    said = fails_with(lambda: load_rows(Data("svamp"), "test", None))
    assert "svamp test is not on the hub in this form: point runtime.data_root or DIABLO_DATA_ROOT at" in said


@pytest.mark.usefixtures("no_root")
def test_a_hub_out_of_reach_says_what_to_do(fails_with: Fails) -> None:
    said = fails_with(lambda: load_rows(Data("human_eval"), "test", None))
    assert "human_eval test: cannot load openai/openai_humaneval from the hub" in said
    assert "at a folder with human_eval/HumanEval.jsonl (or .gz)" in said


def test_a_run_planned_without_a_data_root_takes_the_one_that_is_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_with: Fails
) -> None:
    monkeypatch.setenv("DIABLO_DATA_ROOT", str(tmp_path))
    assert f"no gsm8k/train.jsonl (nor .gz) in {tmp_path}" in fails_with(
        lambda: load_rows(Data("gsm8k"), "train", None)
    )


def test_wrong_names_are_mended(fails_with: Fails) -> None:
    assert "did you mean metamathqa" in fails_with(lambda: load_rows(Data("metamath"), "train", None))
    assert "gsm8k has no split 'tset': did you mean test?" in fails_with(lambda: load_rows(Data("gsm8k"), "tset", None))
    assert "svamp has no split 'train': known: test" in fails_with(lambda: load_rows(Data("svamp"), "train", None))
    assert "cannot be joined" in fails_with(lambda: load_rows(Data(("gsm8k", "arith")), "train", None))


def test_several_sources_come_one_after_the_other(data_root: Path) -> None:
    names = ["arc_challenge", "openbookqa"]
    first, second = (load_rows(Data(name), "train", str(data_root)) for name in names)
    assert load_rows(Data(tuple(names)), "train", str(data_root)) == [*first, *second]
    assert (len(first), len(second)) == (1119, 4957)


@given(st.lists(st.dictionaries(st.text(), st.text(), max_size=3), max_size=4))
def test_rows_hash_is_the_content_hash(rows: list[dict[str, str]]) -> None:
    assert rows_hash(rows) == content_hash(rows)


def test_the_check_lists_what_is_here_what_is_broken_and_how_to_get_the_rest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "hex_phi/hex_phi.jsonl", '{"instruction": "q", "category": "c"}\n' * 300)
    assert main(["--data-root", str(tmp_path)]) == 0
    write(tmp_path / "gsm8k/test.jsonl.gz", '{"question": "q"}')
    assert main(["check", "--data-root", str(tmp_path)]) == 1
    once, again = capsys.readouterr().out.split("data set ")[1:]
    assert "broken" not in once
    table, broken, absent = again.split("\n\n")
    lines = table.splitlines()
    assert max(map(len, lines)) < 100
    assert [line.split() for line in lines if line.startswith(("gsm8k", "hex_phi", "svamp"))] == [
        ["gsm8k", "train", "not", "local"],
        ["gsm8k", "test", "broken"],
        ["svamp", "test", "not", "local"],
        ["hex_phi", "test", "300", rows_hash([HEX_PHI] * 300)[:16], "hex_phi/hex_phi.jsonl"],
    ]
    assert broken.splitlines()[1:] == [
        f"  {tmp_path / 'gsm8k/test.jsonl.gz'}, line 1: the field 'answer' is missing: there are question"
    ]
    splits = sum(len(splits) for splits in SOURCES.values())
    assert len(absent.splitlines()) == 1 + splits - 2
    assert sum(line.endswith("from the hub") for line in absent.splitlines()) == 5  # gsm8k's test is broken


HEX_PHI = {"instruction": "q", "input": "", "output": "", "answer": "safe", "category": "c"}


def test_benchmark_files_are_complete() -> None:
    from eval.benchmarks import read_benchmark
    from experiments.runs.evaluations import TASKS

    for path in TASKS.glob("*.yaml"):
        benchmark = read_benchmark(path.stem)
        assert benchmark.task["task"] == path.stem
        assert benchmark.source == "arith" or benchmark.split in SOURCES[benchmark.source]
        json.dumps(benchmark.task)
