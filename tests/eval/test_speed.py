"""The speed of generation: what is measured, and that every back end was asked the same."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from eval.speed import main, table
from experiments.runs.records import RunPaths, read_json
from experiments.train.run import train
from tests.conftest import planned
from tests.real_runs import settings

Fails = Callable[[Callable[[], object]], str]


def measured(run: RunPaths, out: Path, *options: str) -> dict[str, Any]:
    main([str(run.root), "--rounds", "2", "--out", str(out), *options])
    return read_json(out / "generation.json")


def test_every_back_end_completes_the_same_rows(
    finished: RunPaths, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = measured(finished, tmp_path, "--rows", "10", "evaluation.batch_size=4")
    assert set(record["entries"]) == {"hf", "lm-eval", "transformers"}
    for entry in record["entries"].values():
        assert len(entry["seconds"]) == 2
        assert entry["equal_to_hf"] == 10
        assert entry["completion_tokens"] == record["entries"]["hf"]["completion_tokens"] > 0
    assert (record["rows"], record["samples"], record["batch_size"]) == (10, 1, 4)
    text = capsys.readouterr().out.strip()
    assert text == table(record)
    assert re.search(r"\| hf +\| [\d.]+ +\| \d+ +\| 1\.00 \(1\.00 to 1\.00\) +\| 10/10", text)
    assert not list(finished.root.glob(".merged-*"))
    assert len(list((finished.root / "eval").glob("*/*"))) == 1  # it scores nothing


def test_several_samples_of_each_row(finished: RunPaths, tmp_path: Path) -> None:
    record = measured(finished, tmp_path, "--rows", "3", "--samples", "4", "evaluation.generation.stop=['=']")
    assert record["generation"]["samples"] == 4
    assert record["generation"]["temperature"] == 0.8
    assert all(entry["completion_tokens"] > 0 for entry in record["entries"].values())


def test_mistakes_are_one_line(finished: RunPaths, tmp_path: Path, fails_with: Fails) -> None:
    run = str(finished.root)
    assert fails_with(lambda: main([run, "--rows", "0"])) == "--rows 0: give one or more"
    missing = tmp_path / "python"
    said = fails_with(lambda: main([run, "--rows", "2", "--vllm", str(missing)]))
    assert said == f"--vllm {missing}: No such file or directory: give the interpreter of .venv-vllm"
    said = fails_with(lambda: main([run, "--rows", "2", "--vllm", sys.executable]))
    assert said.startswith(f"--vllm {sys.executable}: evaluation.backend=vllm: vLLM is not installed here")
    assert not list(finished.root.glob(".merged-*"))


@pytest.mark.real
def test_vllm_on_real_weights(smollm2_slice: list[str], tmp_path: Path, data_root: Path) -> None:
    python = os.environ.get("DIABLO_VLLM_PYTHON")
    if not python or not Path(python).is_file():
        pytest.skip("vLLM is not installed: `make install-vllm`, and name .venv-vllm/bin/python in DIABLO_VLLM_PYTHON")
    run = planned([*smollm2_slice, *settings(tmp_path, data_root), "method=base", "task=gsm8k"])
    train(run)
    more = ["evaluation.generation.max_new_tokens=24", f"runtime.data_root={data_root}"]
    entries = measured(run, tmp_path, "--rows", "6", "--vllm", python, *more)["entries"]
    assert entries["lm-eval"]["equal_to_hf"] == entries["transformers"]["equal_to_hf"] == 6
    assert entries["vllm"]["equal_to_hf"] >= 4  # another order of sums: a near tie may end otherwise
