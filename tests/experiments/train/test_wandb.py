"""Data mirrored in Weights & Biases, read back from the files of offline runs."""

from __future__ import annotations

import importlib.util
import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from analysis.load import find_runs
from analysis.report import main, write_report
from experiments.errors import UserError
from experiments.runs.records import read_lines
from experiments.train.run import train
from tests.analysis.analysis_runs import write_run
from tests.conftest import planned
from tests.experiments.train.test_run import train_until

BLOCK, HEADER, LAST = 32768, 7, (1, 4)  # LevelDB's log: sizes in bytes; types of a full record and a last part


def records_of(folder: Path) -> Iterator[Any]:
    """Yield the protobuf records of one offline run."""
    from wandb.proto import wandb_internal_pb2  # generated from .proto files: type checkers do not see its classes

    (path,) = folder.glob("*.wandb")
    data, place, parts = path.read_bytes(), HEADER, b""
    assert data[:4] == b":W&B"
    while place + HEADER <= len(data):
        if BLOCK - place % BLOCK < HEADER:  # the rest of the block is too short for a header
            place += BLOCK - place % BLOCK
        _, length, kind = struct.unpack("<IHB", data[place : place + HEADER])
        parts += data[place + HEADER : place + HEADER + length]
        place += HEADER + length
        if kind in LAST:
            yield wandb_internal_pb2.Record.FromString(parts)  # pyright: ignore[reportAttributeAccessIssue]
            parts = b""


def history_of(folder: Path) -> list[dict[str, Any]]:
    """Return the logged data, one dictionary per call."""
    rows = [record.history.item for record in records_of(folder) if record.HasField("history")]
    return [{item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in row} for row in rows]


def id_of(folder: Path) -> str:
    """Return the run's id, waiting for wandb's separate writer process, which may be late on a busy machine."""
    for _ in range(300):
        found = [record.run.run_id for record in records_of(folder) if record.HasField("run")]
        if found:
            return found[0]
        time.sleep(0.1)
    raise AssertionError(f"{folder}: no run was written")


def test_training_mirrors_its_metrics_under_one_id(small: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    run = planned([*small, "runtime.checkpoint_every=4", "runtime.wandb=offline"])
    train_until(run, 6, monkeypatch)
    train(run)
    attempts = sorted((run.root / "wandb").glob("offline-run-*"))
    assert len(attempts) == 2
    assert {id_of(folder) for folder in attempts} == {run.root.name}
    last = [row for row in history_of(attempts[-1]) if "train/loss" in row]
    metrics = [line for line in read_lines(run.metrics) if line["step"] > 4]
    assert [row["train/loss"] for row in last] == pytest.approx([line["loss"] for line in metrics])
    assert [row["train/global_step"] for row in last] == [line["step"] for line in metrics]


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    for method in ("lora", "diablo"):
        write_run(tmp_path / "runs", method, items=[1, 0, 1, 1])
    return find_runs([tmp_path / "runs"])


def test_a_report_logs_its_tables_and_again_into_the_same_run(runs: list[Path], tmp_path: Path) -> None:
    for _ in range(2):
        write_report(runs, tmp_path / "report", None, "Two methods", wandb="offline")
    first, second = sorted((tmp_path / "report" / "wandb").glob("offline-run-*"))
    assert id_of(first) == id_of(second)
    assert id_of(first).startswith("report-")
    (row,) = [row for row in history_of(first) if "methods/_type" in row]
    assert row["methods/_type"] == "table-file"
    table = json.loads((first / "files" / row["methods/path"]).read_text(encoding="utf-8"))
    columns = table["columns"]
    assert [line[columns.index("label")] for line in table["data"]] == ["diablo-N7", "lora-r7"]
    assert [line[columns.index("accuracy")] for line in table["data"]] == [0.75, 0.75]
    assert row["comparisons/nrows"] == 1


def test_without_the_package_nothing_is_begun(
    small: list[str], runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    run = planned([*small, "runtime.wandb=online"])
    with pytest.raises(
        UserError, match=r"^runtime\.wandb=online: the package wandb is not installed: pip install wandb"
    ):
        train(run)
    with pytest.raises(UserError, match=r"^--wandb offline: the package wandb is not installed"):
        write_report(runs, tmp_path / "report", None, "Two methods", wandb="offline")
    assert not (tmp_path / "report").exists()


def test_by_default_nothing_is_logged(runs: list[Path], tmp_path: Path) -> None:
    main([*map(str, runs), "--out", str(tmp_path / "report")])
    assert not (tmp_path / "report" / "wandb").exists()
