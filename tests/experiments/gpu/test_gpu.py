"""`python -m experiments.gpu` on the CPU: every part runs, keeps to its time, and survives simulated GPU failures."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from experiments import ROOT
from experiments.errors import UserError
from experiments.gpu import processes as gpu
from experiments.gpu.__main__ import main, read_options
from experiments.gpu.parts import ITEMS, run_part
from experiments.gpu.processes import run_parts
from experiments.gpu.runs import Item, ItemFailed, different_bits
from experiments.plan.compose import options as choices
from experiments.runs.records import read_json

TINY = [
    *("model=tiny", "model.pretraining.steps=4", "task.data.train=64", "task.data.heldout=14", "task.data.test=28"),
    *("recipe.batch_size=8", "recipe.micro_batch_size=8", "recipe.warmup_steps=2"),
    "evaluation.generation.max_new_tokens=8",
]

QUEUE = """
title: Two learning rates
common: model=tiny task=arith seed=0
learning_rate_by: loss
grids: ["method=diablo recipe.learning_rate=1e-3,2e-2"]
"""


@pytest.fixture
def part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that runs items as a part with a limit in seconds, and returns the record."""

    def run(items: list[Item], seconds: float) -> dict[str, Any]:
        monkeypatch.setitem(ITEMS, "speed", lambda options, done: iter(items))
        gpu.keep_earlier(tmp_path / "speed.json")
        run_part("speed", argparse.Namespace(device="cpu", out=tmp_path, until=time.time() + seconds))
        return read_json(tmp_path / "speed.json")

    return run


def takes(seconds: float) -> dict[str, Any]:
    time.sleep(seconds)
    return {"line": "done"}


def names(record: dict[str, Any]) -> list[str]:
    return [item["name"] for item in record["items"]]


def test_nothing_is_begun_that_does_not_fit(part: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Its expected time is its estimate, the longest item so far and, in a second run, its measured time."""
    items = [
        Item("long", partial(takes, 0.0), 100.0, like_others=False),
        Item("first", partial(takes, 2.0)),
        Item("like the first", partial(takes, 0.0)),
        Item("another kind", partial(takes, 0.0), 0.1, like_others=False),
    ]
    record = part(items, 4.0)
    assert names(record) == ["first", "another kind"]
    assert record["left_out"] == {"long": 100.0, "like the first": pytest.approx(2.5, abs=0.5)}
    assert (record["status"], record["reason"]) == ("finished", "2 items did not fit")
    assert "did not fit: long (100 s), like the first (" in capsys.readouterr().out
    assert names(part(items, 60.0)) == ["first", "like the first", "another kind"]
    record = part([Item("first", partial(takes, 0.0), 0.0), Item("another kind", partial(takes, 0.0), 50.0)], 1.5)
    assert names(record) == ["another kind"]  # known to take no time, while the first is known to take 2 s


def test_an_item_that_fails_is_one_line_and_the_others_go_on(part: Any) -> None:
    def out_of_memory() -> dict[str, Any]:
        torch.empty(2**47, dtype=torch.uint8)
        return {}

    def wrong() -> dict[str, Any]:
        raise ItemFailed("1 of 2 tests failed", {"passed": 1})

    def unknown() -> dict[str, Any]:
        raise ValueError("two\nlines")

    work = {"memory": out_of_memory, "wrong": wrong, "unknown": unknown, "last": partial(takes, 0.0)}
    record = part([Item(name, action) for name, action in work.items()], 60.0)
    errors = [item["error"] for item in record["items"]]
    assert errors[0].startswith("the machine is out of memory (")
    assert errors[1:] == ["1 of 2 tests failed", "ValueError: two lines", None]
    assert record["items"][1]["passed"] == 1
    assert (record["status"], record["reason"]) == ("failed", "3 of 4 items: memory, wrong, unknown")
    assert record["environment"]["torch"] == torch.__version__


def test_an_earlier_record_is_kept(part: Any, tmp_path: Path) -> None:
    for _ in range(2):
        part([Item("one", partial(takes, 0.0))], 60.0)
        time.sleep(1.1)  # it is named by the second in which it started
    earlier = list(tmp_path.glob("speed-*.json"))
    assert [names(read_json(path)) for path in earlier] == [["one"]]


def test_bits_are_counted_by_tensor(tmp_path: Path) -> None:
    tensors = {"a": torch.tensor([1.0, 2.0]), "b": torch.zeros(3, dtype=torch.bfloat16), "same": torch.ones(2)}
    others = {"a": torch.tensor([1.0, -2.0]), "b": torch.zeros(3, dtype=torch.bfloat16), "same": torch.ones(2)}
    others["b"][1] = 1.0  # 0x3f80: seven bits set
    save_file(tensors, tmp_path / "left")
    save_file(others, tmp_path / "right")
    assert different_bits(tmp_path / "left", tmp_path / "right") == {"a": 1, "b": 7}
    assert different_bits(tmp_path / "left", tmp_path / "left") == {}
    save_file({"a": tensors["a"]}, tmp_path / "other")
    with pytest.raises(UserError, match=r"hold different tensors: \['b', 'same'\]"):
        different_bits(tmp_path / "left", tmp_path / "other")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"--device cuda: no CUDA device answers here \(.+\): use --device cpu for a dry run"
    ):
        main(["--out", str(tmp_path)])


def test_bad_arguments_are_told_before_anything_is_run() -> None:
    with pytest.raises(UserError, match="no experiment 'quickstrat': did you mean quickstart"):
        read_options(["--queue", "quickstrat"])
    with pytest.raises(UserError, match="--minutes 0: give more than 0"):
        read_options(["--minutes", "0"])


def test_a_copy_inside_another_repository_has_no_commit(tmp_path: Path) -> None:
    copy = tmp_path / "outer" / "copy"
    shutil.copytree(ROOT / "experiments", copy / "experiments", ignore=shutil.ignore_patterns("__pycache__"))
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "."], [*identity, "commit", "-qm", "outer"]):
        subprocess.run(["git", *command], cwd=copy.parent, check=True)
    code = "from experiments.runs.environment import _commit; print(_commit())"
    done = subprocess.run([sys.executable, "-c", code], cwd=copy, capture_output=True, encoding="utf-8", check=True)
    assert done.stdout == "(None, None)\n"


def while_it_runs(path: Path, number: int, when: Any, arguments: list[str]) -> list[dict[str, Any]]:
    """Run all parts and signal the first one's process once `when` accepts its record; return the records."""
    options = read_options(arguments)
    options.out = options.out.resolve()
    processes: list[subprocess.Popen[Any]] = []
    start = subprocess.Popen

    def watch() -> None:
        while not (path.is_file() and when(json.loads(path.read_text("utf-8")))):
            time.sleep(0.05)
        processes[0].send_signal(number)

    class Watched(start):  # pyright: ignore[reportGeneralTypeIssues, reportUntypedBaseClass]
        def __init__(self, *positional: Any, **named: Any) -> None:
            super().__init__(*positional, **named)
            processes.append(self)

    threading.Thread(target=watch, daemon=True).start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, "Popen", Watched)
        return run_parts(options, arguments)


@pytest.mark.slow
def test_a_part_that_dies_takes_no_other_along(tmp_path: Path, cache_dir: Path) -> None:
    arguments = [*TINY, f"runtime.cache_dir={cache_dir}", "--device", "cpu", "--out", str(tmp_path), "--minutes", "4"]
    arguments += ["--parts", "methods", "speed"]
    died, spared = while_it_runs(tmp_path / "methods.json", signal.SIGKILL, lambda record: record["items"], arguments)
    assert (died["status"], died["reason"]) == ("failed", "ended by SIGKILL")
    record = read_json(tmp_path / "methods.json")
    assert record["status"] == "failed"
    assert record["items"][0]["name"] == choices("method")[0]
    assert record["items"][0]["error"] is None
    assert (spared["part"], spared["status"]) == ("speed", "finished")
    assert read_json(tmp_path / "speed" / "benchmark.json")["models"][0]["model"] == "tiny"


@pytest.mark.slow
def test_a_part_that_hangs_is_ended_when_the_time_is_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stopped process simulates a driver that hangs."""
    monkeypatch.setattr(gpu, "GRACE", 1.0)
    arguments = ["--device", "cpu", "--out", str(tmp_path), "--minutes", "1.7", "--parts", "speed", "queue"]
    arguments += ["--queue", "quickstart"]
    started = time.time()
    hung, other = while_it_runs(tmp_path / "speed.json", signal.SIGSTOP, lambda record: record["item"], arguments)
    assert time.time() - started < 135
    assert (hung["status"], hung["reason"]) == ("stopped", "the time was up in this machine")
    assert (other["status"], other["reason"]) == ("left out", "no time is left")
    assert read_json(tmp_path / "speed.json")["status"] == "stopped"


@pytest.fixture
def source(tmp_path: Path) -> Iterator[Path]:
    """Yield a copy of the repository's files without its history."""
    if not (ROOT / ".git").exists():
        pytest.skip("this is no git checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    files = [name.decode() for name in listed.split(b"\0") if name and (ROOT / name.decode()).is_file()]
    for name in files:
        (tmp_path / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, tmp_path / "source" / name)
    assert sum((ROOT / name).stat().st_size for name in files) < 60e6
    yield tmp_path / "source"
    shutil.rmtree(tmp_path / "source")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("bwrap") is None, reason="bwrap is not installed")
def test_all_parts_run_without_network_and_write_only_in_their_folders(source: Path, tmp_path: Path) -> None:
    """From a copy without .git, on a file system that is read-only except for the output and the cache."""
    out, cache = tmp_path / "out", tmp_path / "cache"
    out.mkdir()
    cache.mkdir()
    writable = [part for folder in (out, cache) for part in ("--bind", str(folder), str(folder))]
    walls = ["bwrap", "--ro-bind", "/", "/", "--dev", "/dev", "--proc", "/proc", *writable, "--unshare-net"]
    queue = tmp_path / "queue.yaml"
    queue.write_text(QUEUE, encoding="utf-8")
    command = [*walls, sys.executable, "-m", "experiments.gpu", *TINY, "--out", str(out)]
    command += ["--device", "cpu", "--minutes", "15", "--queue", str(queue)]
    environment = {**os.environ, "DIABLO_CACHE": str(cache), "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(command, cwd=source, env=environment, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    summary = json.loads((out / "gpu.json").read_text("utf-8"))
    assert [(part["part"], part["status"]) for part in summary] == [(part, "finished") for part in gpu.PARTS]
    records = {part: read_json(out / f"{part}.json") for part in gpu.PARTS}
    assert all(record["environment"]["commit"] is None for record in records.values())
    assert records["correctness"]["items"][0]["passed"] >= 40
    assert (out / "correctness.xml").is_file()
    quantizers = [f"on {name}" for name in choices("quantization") if name != "none"]
    assert names(records["methods"]) == [*choices("method"), *quantizers]
    assert records["resume"]["items"][0]["resumed"]["bits"] == {}  # on the CPU
    assert records["resume"]["items"][0]["resumed_at"][0] >= 8
    assert [item.get("suite") for item in records["speed"]["items"]] == [None, "models", "layers"]
    assert (out / "speed" / "benchmark.md").is_file()
    *tried, chosen = [run["run_id"] for run in records["queue"]["items"][0]["runs"]]
    assert len(tried) == 2
    assert chosen in tried
    assert [bool(list((out / "runs" / name).glob("eval/*/*/score.json"))) for name in tried] == [
        name == chosen for name in tried
    ]
