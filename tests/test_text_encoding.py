"""Text is UTF-8 in any locale: every call passes the encoding, and commands are run in a non-UTF-8 locale."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from experiments import ROOT
from experiments.plan.compose import plan
from experiments.runs.config_files import read_config
from experiments.runs.records import RunPaths, read_json
from tests.conftest import SMALL

FOLDERS = ("diablo", "experiments", "eval", "analysis", "slurm", "tests")
ASCII = {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
OPENERS = {"open", "fdopen", "read_text", "write_text", "NamedTemporaryFile", "TemporaryFile"}


def calls_without_encoding(source: str) -> Iterator[int]:
    """Yield the lines of calls that read, write or pipe text in the locale's encoding.

    Ruff's PLW1514 finds only calls on objects known to be paths.
    """
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        given = {keyword.arg: keyword.value for keyword in node.keywords}
        if {"encoding", None} & given.keys():  # or unknown keyword arguments
            continue
        constants = [value.value for value in [*node.args, *given.values()] if isinstance(value, ast.Constant)]
        modes = [text for text in constants if isinstance(text, str) and text and set(text) <= set("rwaxbt+")]
        text = getattr(given.get("text") or given.get("universal_newlines"), "value", False)
        if ast.unparse(node.func) == "os.open":  # a descriptor
            continue
        if name in OPENERS and not any("b" in mode for mode in modes):
            if name in ("NamedTemporaryFile", "TemporaryFile") and not modes:  # binary by default
                continue
            if name in ("read_text", "write_text") and len(node.args) > (name == "write_text"):
                continue
            yield node.lineno
        elif text:
            yield node.lineno


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_text_says_its_encoding(folder: str) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        for line in calls_without_encoding(path.read_text(encoding="utf-8"))
    ]
    assert found == []


@pytest.mark.parametrize(
    ("call", "seen"),
    [
        ("path.read_text()", True),
        ("path.read_text('utf-8')", False),
        ("path.write_text('é')", True),
        ("path.write_text('é', encoding='utf-8')", False),
        ("path.open()", True),
        ("open(path, 'rb')", False),
        ("os.open(path, 0)", False),
        ("subprocess.run(command, text=True)", True),
        ("subprocess.run(command, text=True, encoding='utf-8')", False),
        ("subprocess.run(command)", False),
        ("os.fdopen(handle, 'w')", True),
    ],
)
def test_the_calls_that_are_found(call: str, seen: bool) -> None:
    assert bool(list(calls_without_encoding(call))) == seen


def run(*command: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | ASCII
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, encoding="utf-8", check=False
    )


def test_the_locale_of_this_test_is_not_utf_8() -> None:
    assert "utf" not in run("-c", "import locale; print(locale.getpreferredencoding(False))").stdout.lower()


def test_planning_and_reporting_do_not_ask_the_locale(tmp_path: Path, cache_dir: Path) -> None:
    """With non-ASCII text in an experiment file, in a prompt on the command line and in a note."""
    experiment = tmp_path / "experiment.yaml"
    experiment.write_text(
        f"title: Ünïcode · 表\ncommon: runtime.runs_dir={tmp_path / 'runs'}\n"
        "grids:\n  - method=diablo 'protocol.ending=\"é ✓\\n\"'\n",
        encoding="utf-8",
    )
    arguments = [f"experiment={experiment}", *SMALL, f"runtime.cache_dir={cache_dir}", 'protocol.target="→ {output}"']
    planned = run("-m", "experiments.plan", *arguments)
    assert planned.returncode == 0, planned.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    protocol = read_config(RunPaths(folder)).protocol
    assert (protocol.ending, protocol.target) == ("é ✓\n", "→ {output}")
    (config,) = plan(arguments)
    assert folder.name == config.run_id
    reported = run("-m", "analysis.report", str(tmp_path / "runs"), "--out", str(tmp_path / "out"), "--note", "Ç · 表")
    assert reported.returncode == 0, reported.stderr
    assert "Ç · 表" in (tmp_path / "out" / "index.html").read_text(encoding="utf-8")


def test_a_path_that_the_locale_cannot_name_is_one_line(tmp_path: Path) -> None:
    planned = run("-m", "experiments.plan", f'runtime.runs_dir="{tmp_path / "läufe"}"')
    assert planned.returncode == 1
    assert "cannot be a path in ascii: set LC_ALL=C.UTF-8" in planned.stderr
    assert len(planned.stderr.splitlines()) == 1


@pytest.mark.slow
def test_training_and_scoring_do_not_ask_the_locale(tmp_path: Path, cache_dir: Path) -> None:
    settings = [*SMALL, f"runtime.runs_dir={tmp_path}", f"runtime.cache_dir={cache_dir}", "recipe.max_steps=4"]
    settings += ["evaluation.limit=2", 'protocol.ending=" ✓"', "protocol.joined=true"]
    planned = run("-m", "experiments.plan", *settings)
    assert planned.returncode == 0, planned.stderr
    (folder,) = (path for path in tmp_path.iterdir() if (path / "config.yaml").is_file())
    for stage in ("experiments.train", "eval.run", "eval.rescore"):
        done = run("-m", stage, str(folder))
        assert done.returncode == 0, done.stderr
    (score,) = folder.glob("eval/*/*/score.json")
    assert read_json(score)["n"] == 2
