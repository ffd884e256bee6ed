"""Downloads of data sets from a server that stalls, cuts connections, resends and sends wrong ranges."""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import constants

from experiments.config import Data
from experiments.data import fetch
from experiments.data import rows as data
from experiments.data.pinned import GIT_IDS, git_id
from experiments.data.sources import SOURCES, Split, gsm8k
from experiments.errors import UserError
from tests import web_server
from tests.web_server import Answer, Server, serving

FailsWith = Callable[[Callable[[], object]], str]
ROWS = [{"question": f"What is {number} + 1?", "answer": f"#### {number + 1}"} for number in range(3_000)]
CONTENT = "".join(f"{json.dumps(row)}\n" for row in ROWS).encode()
FILE = "made_up/train.jsonl"
SECONDS = 0.4


def id_of(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")


@pytest.fixture
def take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Return a function fetching a data set of 3,000 rows; `expected` is its content according to the table."""

    def run(server: Server, expected: bytes | None = CONTENT, path: str = "train.jsonl") -> int:
        monkeypatch.setitem(SOURCES, "made_up", {"train": Split(FILE, (len(ROWS),), gsm8k, f"{server.url}/{path}")})
        if expected is not None:
            monkeypatch.setitem(GIT_IDS, FILE, id_of(expected))
        return fetch.fetch([("made_up", "train")], str(tmp_path), SECONDS)

    return run


def in_place(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


# A file


def test_a_file_is_fetched_once(take: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(web_server.file(CONTENT)) as server:
        assert take(server) == 0
        assert in_place(tmp_path) == {FILE: CONTENT}
        assert capsys.readouterr().out == f"made_up train: fetched {tmp_path / FILE} ({len(CONTENT) / 1e6:.1f} MB)\n"
        assert len(data.load_rows(Data("made_up"), "train", str(tmp_path))) == 3_000
        assert take(server) == 0
        assert server.asked == [("GET", "/train.jsonl")]
        assert capsys.readouterr().out == f"made_up train: {tmp_path / FILE} is already here\n"


@pytest.mark.parametrize("length", [True, False])
def test_connections_that_break_are_taken_up_where_they_broke(
    length: bool, take: Callable[..., int], tmp_path: Path
) -> None:
    with serving(web_server.file(CONTENT, cuts=(50_000, 30_000) if length else (), length=length)) as server:
        assert take(server) == 0
        assert server.ranges == ([None, "bytes=50000-", "bytes=80000-"] if length else [None])
        assert in_place(tmp_path) == {FILE: CONTENT}


def test_a_connection_that_falls_silent_is_taken_up(take: Callable[..., int], tmp_path: Path) -> None:
    with serving(web_server.file(CONTENT, cuts=(50_000,), silent=5)) as server:
        started = time.monotonic()
        assert take(server) == 0
        assert time.monotonic() - started < 3
        assert server.ranges == [None, "bytes=50000-"]
        assert in_place(tmp_path) == {FILE: CONTENT}


def test_a_server_that_keeps_breaking_is_left_and_its_bytes_are_kept(
    take: Callable[..., int], tmp_path: Path, fails_with: FailsWith
) -> None:
    with serving(web_server.file(CONTENT, cuts=(10_000,) * 6)) as server:
        said = fails_with(lambda: take(server))
        assert f"{server.url}/train.jsonl: the connection broke (" in said
        assert said.endswith(") after 60,000 bytes: the same command resumes")
        assert [len(content) for content in in_place(tmp_path).values()] == [60_000]
        with pytest.raises(Exception, match="no made_up/train"):
            data.load_rows(Data("made_up"), "train", str(tmp_path))
        assert take(server) == 0
        assert server.ranges[-1] == "bytes=60000-"
        assert in_place(tmp_path) == {FILE: CONTENT}


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (web_server.silent(5), "cannot be reached (no answer within 0.4 seconds): connect"),
        (web_server.file(CONTENT, cuts=(0,), silent=5), "the server is silent for 0.4 seconds after 0 bytes"),
        (web_server.file(CONTENT, every=0.01), "the connection is too slow ("),
    ],
)
def test_a_server_that_stalls(
    answer: Answer, said: str, take: Callable[..., int], fails_with: FailsWith, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "RESUMED", 0)
    with serving(answer) as server:
        started = time.monotonic()
        assert said in fails_with(lambda: take(server))
        assert time.monotonic() - started < 3


def test_a_server_without_ranges_begins_again(take: Callable[..., int], tmp_path: Path) -> None:
    with serving(web_server.file(CONTENT, cuts=(50_000,), ranges=False)) as server:
        assert take(server) == 0
        assert server.ranges == [None, "bytes=50000-"]
        assert in_place(tmp_path) == {FILE: CONTENT}


@pytest.mark.parametrize("here", [CONTENT, CONTENT + b"more", b"x" * len(CONTENT), b"x" * 1000])
def test_what_was_there_of_a_download_is_not_trusted(here: bytes, take: Callable[..., int], tmp_path: Path) -> None:
    """A complete partial file is only renamed; one that is too long or of another file is downloaded again."""
    with serving(web_server.file(CONTENT)) as server:
        url = f"{server.url}/train.jsonl"
        with fetch._aside(tmp_path, url) as (file, partial):
            file.write(here)
        target = tmp_path / FILE
        target.parent.mkdir()
        partial.rename(target.parent / partial.name)
        assert take(server) == 0
        assert in_place(tmp_path) == {FILE: CONTENT}
        assert server.ranges == [f"bytes={len(here)}-"] + ([] if here == CONTENT else [None])


@pytest.mark.parametrize(
    ("content", "expected", "why"),
    [
        (CONTENT[:-1], CONTENT, f"its git id is {id_of(CONTENT[:-1])[:12]}, it must be {id_of(CONTENT)[:12]}"),
        (CONTENT[: CONTENT.index(b"\n") + 1], None, "1 row, there must be 3,000"),
        (b"<html>sign in to the network</html>", None, "line 1: not valid JSON"),
        (b"", None, "0 rows, there must be 3,000"),
    ],
)
def test_a_wrong_file_is_not_put_in_place(
    content: bytes,
    expected: bytes | None,
    why: str,
    take: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with serving(web_server.file(content)) as server:
        assert take(server, expected) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: made_up train: {server.url}/train.jsonl has changed: ")
        assert why in line
        assert line.endswith("nothing was installed")
        assert in_place(tmp_path) == {}


def test_a_wrong_file_that_is_there_stays(
    take: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / FILE).parent.mkdir()
    for content in (CONTENT[::-1], CONTENT[:-1]):
        (tmp_path / FILE).write_bytes(content)
        with serving(web_server.file(CONTENT)) as server:
            assert take(server) == 1
            assert server.asked == []
        (line,) = capsys.readouterr().err.splitlines()
        assert f"made_up train: {tmp_path / FILE} exists but is not right: its git id is" in line
        assert in_place(tmp_path) == {FILE: content}


def test_a_packed_file_is_right_by_its_content(
    take: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    packed = tmp_path / f"{FILE}.gz"
    packed.parent.mkdir()
    packed.write_bytes(gzip.compress(CONTENT))
    with serving(web_server.file(CONTENT)) as server:
        assert take(server) == 0
        packed.write_bytes(gzip.compress(CONTENT)[:-20])
        assert take(server) == 1
        assert "cannot be unpacked" in capsys.readouterr().err
        packed.unlink()
        assert server.asked == []
    with serving(web_server.file(gzip.compress(CONTENT), cuts=(5_000,))) as server:
        assert take(server, path="train.jsonl.gz") == 0
        assert in_place(tmp_path).keys() == {f"{FILE}.gz"}
        assert git_id(packed) == id_of(CONTENT)


@pytest.mark.parametrize("code", [404, 410])
def test_a_file_that_is_gone_does_not_stop_the_others(
    code: int,
    take: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = web_server.file(CONTENT)
    gone = web_server.status(code)
    with serving(lambda request: (gone if "gone" in request.path else whole)(request)) as server:
        other = Split("other/train.jsonl", (3_000,), gsm8k, f"{server.url}/gone.jsonl")
        monkeypatch.setitem(SOURCES, "other", {"train": other})
        monkeypatch.setitem(SOURCES, "made_up", {"train": replace(other, file=FILE, url=f"{server.url}/train.jsonl")})
        assert fetch.fetch([("other", "train"), ("hex_phi", "test"), ("made_up", "train")], str(tmp_path), SECONDS) == 1
        said = capsys.readouterr()
        gone_line, gated_line = said.err.splitlines()
        assert gone_line.startswith(f"error: {server.url}/gone.jsonl: the file no longer exists ({code})")
        assert "hex_phi test: it is gated: request access at https://huggingface.co/" in gated_line
        assert said.out.startswith("made_up train: fetched")
        assert in_place(tmp_path) == {FILE: CONTENT}


@pytest.mark.parametrize("code", [500, 502, 503, 429, 403, 407])
def test_a_server_that_cannot_answer_now_is_asked_once(
    code: int, take: Callable[..., int], fails_with: FailsWith
) -> None:
    with serving(web_server.status(code)) as server:
        started = time.monotonic()
        assert f"/train.jsonl: the server answers {code} " in fails_with(lambda: take(server))
        assert time.monotonic() - started < 1
        assert len(server.asked) == 1


@pytest.mark.parametrize("code", [401, 403])
def test_a_gated_file_of_the_hub_says_how_to_get_access(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The hub's files are requested from HF_ENDPOINT."""
    with serving(web_server.status(code)) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        assert fetch.fetch([("metamathqa", "train")], str(tmp_path), SECONDS) == 1
        assert f"MetaMathQA-395K.json: no access ({code}): request it on the hub" in capsys.readouterr().err
        ((method, path),) = server.asked
        assert (method, path[:59]) == ("GET", "/datasets/meta-math/MetaMathQA/resolve/aa4f34d3d2d3231299b5")


# Without a network


def test_offline_is_respected(
    take: Callable[..., int], tmp_path: Path, fails_with: FailsWith, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with serving(web_server.file(CONTENT)) as server:
        assert f"no {FILE} in {tmp_path}, and HF_HUB_OFFLINE is set: unset it" in fails_with(lambda: take(server))
        assert server.asked == []


def command(*arguments: str, **environment: str) -> tuple[int, str, str, float]:
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "experiments.data", *arguments],
        capture_output=True,
        encoding="utf-8",
        env={**os.environ, **environment},
    )
    return done.returncode, done.stdout, done.stderr, time.monotonic() - started


@pytest.mark.parametrize("proxy", ["http://127.0.0.1:9", "http://nowhere.invalid:80"])
def test_without_a_network_one_line_says_so(proxy: str, tmp_path: Path) -> None:
    """No server listens, or the name does not resolve."""
    offline = {"HF_HUB_OFFLINE": "0", "HTTPS_PROXY": proxy, "https_proxy": proxy, "NO_PROXY": "", "no_proxy": ""}
    status, out, error, seconds = command("fetch", "task=commonsense_170k", "--data-root", str(tmp_path), **offline)
    assert (status, out, len(error.splitlines())) == (1, "", 1)
    assert re.match(r"error: https://raw\S+/commonsense_170k.json cannot be reached \(", error)
    assert in_place(tmp_path) == {}
    assert seconds < 15


def test_the_full_disk_is_told(take: Callable[..., int], tmp_path: Path, fails_with: FailsWith) -> None:
    with serving(web_server.file(CONTENT)) as server:
        (tmp_path / FILE).parent.mkdir()
        with fetch._aside(tmp_path, f"{server.url}/train.jsonl") as (_, partial):
            name = partial.name
        (tmp_path / FILE).with_name(name).symlink_to("/dev/full")
        said = fails_with(lambda: take(server))
        assert said.startswith(
            f"{tmp_path}: No space left on device: fix that, or give another folder with --data-root"
        )


def test_a_file_that_does_not_fit_is_told_before(
    take: Callable[..., int], tmp_path: Path, fails_with: FailsWith
) -> None:
    def huge(request: web_server.BaseHTTPRequestHandler) -> None:
        request.send_response(200)
        request.send_header("Content-Length", str(10**18))
        request.end_headers()

    with serving(huge) as server:
        assert "1,000,000,000,000.0 MB are missing and " in fails_with(lambda: take(server))


def test_a_folder_that_cannot_be_is_told(tmp_path: Path, fails_with: FailsWith) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "root"):
        said = fails_with(lambda folder=folder: fetch.fetch([("svamp", "test")], str(folder)))
        assert said.startswith(f"{folder}/llm_adapters/SVAMP: Not a directory")
    assert "set DIABLO_DATA_ROOT or give --data-root" in fails_with(lambda: fetch.fetch([("svamp", "test")], None))


def test_one_process_fetches_a_file(take: Callable[..., int], tmp_path: Path, fails_with: FailsWith) -> None:
    with serving(web_server.file(CONTENT)) as server:
        (tmp_path / FILE).parent.mkdir()
        with fetch._aside((tmp_path / FILE).parent, f"{server.url}/train.jsonl") as (file, partial):
            assert f"{partial}: another process is fetching this file" in fails_with(lambda: take(server))
            fcntl.flock(file, fcntl.LOCK_UN)
        assert take(server) == 0


def test_two_commands_at_once_put_one_whole_file_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes: list[object] = []

    def work() -> None:
        try:
            outcomes.append(fetch.fetch([("made_up", "train")], str(tmp_path), 5))
        except UserError as error:
            outcomes.append("another process" in str(error))

    with serving(web_server.file(CONTENT, cuts=(1000, 1000, 1000), silent=0.2)) as server:
        part = Split(FILE, (len(ROWS),), gsm8k, f"{server.url}/train.jsonl")
        monkeypatch.setitem(SOURCES, "made_up", {"train": part})
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert outcomes.count(0) >= 1
    assert set(outcomes) <= {0, True}
    assert in_place(tmp_path) == {FILE: CONTENT}
