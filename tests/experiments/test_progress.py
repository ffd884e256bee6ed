"""Progress bars on a terminal and in a log."""

from __future__ import annotations

import io
import re
import sys
import time
from collections.abc import Callable

import pytest

from experiments import ROOT
from experiments.progress import Bar


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Return a function that lets time pass, for the bar and for tqdm."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])

    def wait(seconds: float) -> None:
        now[0] += seconds

    return wait


def test_a_log_has_a_line_for_every_tenth(clock: Callable[[float], None], capsys: pytest.CaptureFixture[str]) -> None:
    with Bar(total=1000, desc="run", unit="step", leave=False, mininterval=0.5) as bar:
        for _ in range(1000):
            clock(1)
            bar.update()
    lines = capsys.readouterr().err.splitlines()
    assert [int(re.findall(r"(\d+)/1000", line)[0]) for line in lines] == list(range(100, 1001, 100))
    assert all(line.startswith("run: ") for line in lines)


def test_a_slow_one_has_a_line_in_ten_minutes_and_a_quick_one_none(
    clock: Callable[[float], None], capsys: pytest.CaptureFixture[str]
) -> None:
    for seconds, lines in ((300, 5), (0.1, 0)):
        for _ in Bar(range(10), total=1000):
            clock(seconds)
        assert len(capsys.readouterr().err.splitlines()) == lines


def test_a_bar_that_is_off_says_nothing(clock: Callable[[float], None], capsys: pytest.CaptureFixture[str]) -> None:
    for off in (True, None):
        for _ in Bar(range(100), disable=off):
            clock(60)
        assert capsys.readouterr().err == ""


def test_on_a_terminal_it_is_tqdms(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", terminal)
    for _ in Bar(range(3), desc="here", mininterval=0):
        pass
    assert terminal.getvalue().count("\r") >= 3
    assert "here: 100%" in terminal.getvalue()


def test_there_is_no_other_bar() -> None:
    """But of downloads, which are only shown on a terminal; diablo, which is installed alone, has tqdm's own."""
    for package in ("experiments", "eval", "analysis", "slurm"):
        for path in sorted((ROOT / package).rglob("*.py")):
            for call in re.findall(r"(?<![.\w])tqdm\(.*", path.read_text(encoding="utf-8")):
                assert "disable=None" in call, path
