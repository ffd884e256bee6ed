"""The data sets of a task, the ids of their files, and the real files fetched by task."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import constants

from experiments.config import Data
from experiments.data import fetch
from experiments.data import rows as data
from experiments.data.__main__ import main, named_splits
from experiments.data.pinned import GIT_IDS, git_id, not_pinned
from experiments.data.sources import SOURCES
from tests import web_server
from tests.web_server import serving

FailsWith = Callable[[Callable[[], object]], str]


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")


def in_place(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_a_task_stands_for_its_training_data_and_its_benchmarks() -> None:
    assert named_splits(["task=gsm8k_mawps"]) == [
        ("gsm8k", "train"),
        ("mawps", "train"),
        ("gsm8k", "test"),
        ("svamp", "test"),
        ("mawps", "test"),
        ("aqua", "test"),
    ]
    both = named_splits(["task=gsm8k,metamathqa", "source=xstest_safe"])
    assert both == [
        ("gsm8k", "train"),
        ("gsm8k", "test"),
        ("math", "test"),
        ("metamathqa", "train"),
        ("xstest_safe", "test"),
    ]


def test_every_task_of_the_configs_is_known() -> None:
    from experiments.plan.compose import options

    for name in options("task"):
        for source, split in named_splits([f"task={name}"]):
            assert source == "arith" or split in SOURCES[source]


def test_names_that_are_none(fails_with: FailsWith) -> None:
    said = fails_with(lambda: main(["fetch", "task=commonsense_17k"]))
    assert said.startswith("task=commonsense_17k: no such task: did you mean commonsense_170k")
    assert "source=boolqq: no such data set: did you mean boolq" in fails_with(lambda: main(["fetch", "source=boolqq"]))
    assert "gsm8k: give task=NAME" in fails_with(lambda: main(["check", "gsm8k"]))


def test_check_shows_a_task_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "task=saferpaca", "--data-root", str(tmp_path)]) == 0
    table, absent = capsys.readouterr().out.split("\n\n")
    assert [line.split()[:2] for line in table.splitlines()[1:]] == [
        ["saferpaca", "train"],
        ["hex_phi", "test"],
        ["xstest_safe", "test"],
    ]
    assert "`python -m experiments.data fetch task=… or source=…` downloads them" in absent
    assert "hex_phi test: it is gated" in absent


def test_check_tells_other_bytes_with_the_right_rows(
    data_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    part = SOURCES["svamp"]["test"]
    (tmp_path / part.file).parent.mkdir(parents=True)
    found = data.local_file(part, data_root)
    assert found is not None
    (tmp_path / part.file).write_bytes(found.read_bytes() + b"\n")
    assert main(["check", "source=svamp", "--data-root", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert "other bytes" in said
    assert "svamp test: " in said
    assert "has the right rows, but is not the pinned file: its git id is" in said


def test_every_file_of_the_table_has_an_id_or_none_can_be_known() -> None:
    files = {part.file for splits in SOURCES.values() for part in splits.values()}
    assert files - GIT_IDS.keys() == {"metamathqa/MetaMathQA-395K.json", "hex_phi/hex_phi.jsonl"}
    assert GIT_IDS.keys() <= files
    assert len(set(GIT_IDS.values())) == len(GIT_IDS)
    assert all(re.fullmatch("[0-9a-f]{40}", value) for value in GIT_IDS.values())


def test_the_real_files_are_the_pinned_ones(data_root: Path) -> None:
    here = [
        (part, path)
        for splits in SOURCES.values()
        for part in splits.values()
        if (path := data.local_file(part, data_root)) is not None
    ]
    assert len(here) == 29
    assert [(part.file, problem) for part, path in here if (problem := not_pinned(part.file, path))] == []


def test_gits_own_id_is_the_same(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for content in (b"", b"a line\n" * 300_000):
        path.write_bytes(content)
        said = subprocess.run(["git", "hash-object", str(path)], capture_output=True, encoding="utf-8")
        assert git_id(path) == said.stdout.strip()


@pytest.mark.parametrize("task", ["gsm8k", "code_alpaca_6k", "safety_7k"])
def test_real_files_are_fetched_by_task(
    task: str,
    data_root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """From a server that has them under the table's URLs and cuts the first response."""
    splits = named_splits([f"task={task}"])
    parts = {name: SOURCES[name] for name, _ in splits}
    contents: dict[str, bytes] = {}
    for name, split in splits:
        found = data.local_file(part := parts[name][split], data_root)
        assert found is not None
        packed = found.read_bytes()
        unpack = found.suffix == ".gz" and not part.url.endswith(".gz")
        contents[f"/{part.url.partition('://')[2]}"] = gzip.decompress(packed) if unpack else packed
    answers = {path: web_server.file(content, cuts=(1000,)) for path, content in contents.items()}
    with serving(lambda request: answers[request.path](request)) as server:
        for name, held in parts.items():
            there = {key: replace(part, url=part.url.replace("https:/", server.url)) for key, part in held.items()}
            monkeypatch.setitem(SOURCES, name, there)
        assert main(["fetch", f"task={task}", "--data-root", str(tmp_path)]) == 0
        assert len(server.asked) == 2 * len(contents)
    assert capsys.readouterr().out.count(" fetched ") == len(contents)
    for name, split in splits:
        source = Data(name)
        assert data.load_rows(source, split, str(tmp_path)) == data.load_rows(source, split, str(data_root))


# Files made from others' records


def requests_of(name: str, content: bytes) -> bytes:
    """Return the evaluation requests that the file was made from (the fields read): one line per option."""
    lines: list[str] = []
    for index, row in enumerate(json.loads(content)):
        if name == "winogrande":
            found = re.fullmatch(
                r".*?given sentence: (.*)\n\nOption1: (.*?) Option2: (.*) Answer format: option1/option2",
                row["instruction"],
                re.DOTALL,
            )
            assert found is not None
            doc = {
                "sentence": found[1],
                "option1": found[2],
                "option2": found[3],
                "answer": row["answer"][-1],
                "index": index,
            }
            options = 2
        else:
            body = row["instruction"].partition("given sentence: ")[2].rpartition("\n\nAnswer format: ")[0]
            query, _, endings = body.partition("\n\nEnding1: ")
            choices = re.split(r" Ending[234]: ", endings)
            doc = {"ind": row["ind"], "query": query, "choices": choices, "gold": int(row["answer"][-1]) - 1}
            options = 4
        lines += [json.dumps({"request_type": "loglikelihood", "doc": doc, "idx": idx}) for idx in range(options)]
    return gzip.compress("\n".join(lines).encode(), compresslevel=1)


@pytest.mark.parametrize(("name", "split"), [("winogrande", "train"), ("hellaswag_sample", "test")])
def test_files_are_made_of_evaluation_requests(
    name: str,
    split: str,
    data_root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    part = SOURCES[name][split]
    found = data.local_file(part, data_root)
    assert found is not None
    content = gzip.decompress(found.read_bytes())
    packed = requests_of(name, content)
    with serving(web_server.file(packed, cuts=(10_000,))) as server:
        there = {split: replace(part, url=f"{server.url}/requests.jsonl.gz")}
        monkeypatch.setitem(SOURCES, name, there)
        assert fetch.fetch([(name, split)], str(tmp_path), 5) == 0
        assert len(server.asked) == 2
    assert in_place(tmp_path) == {part.file: content}

    (tmp_path / part.file).unlink()
    other = gzip.compress(b'{"doc": {"other": 1}}\n')
    with serving(web_server.file(other)) as server:
        monkeypatch.setitem(SOURCES, name, {split: replace(part, url=f"{server.url}/requests.jsonl.gz")})
        assert fetch.fetch([(name, split)], str(tmp_path), 5) == 1
    assert "its records have another format (KeyError" in capsys.readouterr().err
    assert in_place(tmp_path) == {}
