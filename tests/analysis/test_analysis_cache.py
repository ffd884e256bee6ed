"""Many runs are read by all processors, cached, and read again only where a file changed."""

from __future__ import annotations

import os
import re
import resource
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from analysis import load
from analysis.load import Runs, find_runs, load_runs, records
from experiments.errors import UserError
from experiments.runs.config_files import config_hash, run_id
from experiments.runs.records import RunPaths
from tests.analysis.analysis_runs import change, score_file, write_run


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let three runs count as many, and return the folder of the cached rows."""
    monkeypatch.setattr(load, "MANY", 3)
    monkeypatch.setenv("DIABLO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "runs"


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """A plain run, one with a mean, a pattern, an unscored, an untrained, a damaged one and one without a config."""
    folder = tmp_path / "runs"
    write_run(folder, "lora", items=[1, 0, 1])
    several = RunPaths(write_run(folder, "dora", items=[1, 1, 0], mean_with="other"))
    other = several.evaluation("other", "plain", {}).score
    other.parent.mkdir(parents=True)
    other.write_text(score_file(several.root).read_text(encoding="utf-8"), encoding="utf-8")
    change(
        other,
        benchmark="other",
        items=[0.5, 1.0],
        n=2,
        accuracy=0.75,
        standard_error=0.25,
        extra_metrics={"pass@5": 0.5},
    )
    write_run(folder, "sparse", pattern="banded", items=[1, 0])
    write_run(folder, "pissa")
    RunPaths(write_run(folder, "milora", items=[0, 1])).train_record.unlink()
    score_file(write_run(folder, "full", items=[0, 1])).write_text('{"half', encoding="utf-8")
    (folder / "broken").mkdir()
    (folder / "broken" / "config.yaml").write_text("[", encoding="utf-8")
    return find_runs([folder])


def same(first: load.Runs, second: load.Runs) -> None:
    assert sorted(first.problems) == sorted(second.problems)
    columns = ["path", "items", "extra_metrics", "commits", "environment", "eval_environment"]
    pd.testing.assert_frame_equal(first.frame.drop(columns=columns), second.frame.drop(columns=columns))
    for one, other in zip(records(first.frame), records(second.frame), strict=True):
        for column in columns:
            if column == "items" and isinstance(one[column], list):
                assert all(np.array_equal(a, b) for a, b in zip(one[column], other[column], strict=True))
            elif column == "items" and isinstance(one[column], np.ndarray):
                assert np.array_equal(one[column], other[column])
            elif isinstance(one[column], dict | list | Path):
                assert one[column] == other[column]
            else:
                assert pd.isna(one[column])
                assert pd.isna(other[column])


def test_what_was_kept_is_what_was_read(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: Path
) -> None:
    monkeypatch.setattr(load, "MANY", 100)
    plain = load_runs(runs)
    assert len(plain.problems) == 5
    monkeypatch.setattr(load, "MANY", 3)
    same(load_runs(runs), plain)
    (file,) = kept.iterdir()
    before = file.stat().st_mtime_ns
    monkeypatch.setattr(load, "read_run", lambda directory: pytest.fail("nothing changed"))
    same(load_runs(runs), plain)
    assert file.stat().st_mtime_ns == before


def test_only_what_changed_is_read_again(runs: list[Path], monkeypatch: pytest.MonkeyPatch, kept: Path) -> None:
    load_runs(runs)
    read_run, read = load.read_run, []
    monkeypatch.setattr(load, "read_run", lambda directory: read.append(directory) or read_run(directory))
    lora = next(run for run in runs if "lora" in run.name)
    change(score_file(lora), items=[1.0, 1.0, 1.0], accuracy=1.0, standard_error=0.0)
    new = write_run(lora.parent, "lora", seed=5, items=[1, 0])
    wanted = [new, *runs[::-1]][:-1]
    again = load_runs(wanted)
    assert read == [new, lora]
    order = [row["run_id"] for row in records(again.frame.drop_duplicates("run_id"))]
    assert order == [run.name for run in wanted if run.name != "broken"]
    changed = again.frame.loc[again.frame["run_id"] == lora.name, "accuracy"]
    assert changed.tolist() == [1.0]


@pytest.mark.parametrize("damage", [b"", b"PAR1 no more", None])
def test_a_kept_file_that_cannot_be_used_is_made_anew(runs: list[Path], kept: Path, damage: bytes | None) -> None:
    first = load_runs(runs)
    (file,) = kept.iterdir()
    if damage is None:
        file.unlink()
        file.mkdir()  # can be neither read nor replaced
    else:
        file.write_bytes(damage)
    same(load_runs(runs), first)


def test_one_id_with_two_configs_shows_the_difference(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", items=[1, 0])
    copy = shutil.copytree(run, tmp_path / "b" / run.name)
    config = copy / "config.yaml"
    config.write_text(
        config.read_text(encoding="utf-8").replace("epochs: 1", "epochs: 2").replace("device: cpu", "device: cuda"),
        encoding="utf-8",
    )
    with pytest.raises(UserError, match=r"different configs: recipe\.epochs is 1 and 2$"):
        load_runs([run, copy])
    config.write_text(
        (run / "config.yaml").read_text(encoding="utf-8").replace("device: cpu", "device: cuda"), encoding="utf-8"
    )
    assert load_runs([run, copy]).problems == [f"{copy}: the same run as {run}, left out"]


def timed_load(folder: Path) -> tuple[Runs, float]:
    """Load a folder of runs; return them and the processor time of this process and its children, in seconds."""

    def seconds() -> float:
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(usage.ru_utime + usage.ru_stime for usage in used)

    before = seconds()
    return load_runs(find_runs([folder])), seconds() - before


@pytest.mark.slow
def test_ten_thousand_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """10 s on two processors, then 1 s, as processor time, which other load affects less, and doubled for a slow
    machine, where the ratio to the first load must hold."""
    monkeypatch.setenv("DIABLO_CACHE", str(tmp_path / "cache"))
    model = write_run(tmp_path / "model", items=[1, 0] * 200, steps=0)
    written = (model / "config.yaml").read_text(encoding="utf-8")
    config = yaml.safe_load(written)
    texts = {
        path.relative_to(model): path.read_text(encoding="utf-8") for path in (model / "train.json", score_file(model))
    }
    own = config_hash(config)
    for seed in range(10_000):
        seeded = config | {"seed": seed}
        name, digest = run_id(seeded), config_hash(seeded)
        run = tmp_path / "runs" / name
        run.mkdir(parents=True)
        text = re.sub("^seed: 0$", f"seed: {seed}", written, flags=re.MULTILINE).replace(model.name, name)
        (run / "config.yaml").write_text(text, encoding="utf-8")
        for relative, record in texts.items():
            (run / relative).parent.mkdir(parents=True, exist_ok=True)
            (run / relative).write_text(record.replace(model.name, name).replace(own, digest), encoding="utf-8")
    first, reading = timed_load(tmp_path / "runs")
    again = [timed_load(tmp_path / "runs") for _ in range(3)]
    assert (len(first.frame), first.problems) == (10_000, [])
    for second, _ in again:
        assert first.frame["accuracy"].tolist() == second.frame["accuracy"].tolist()
    best = min(duration for _, duration in again)
    assert reading / min(2, os.cpu_count() or 1) < 20
    assert best < min(2, reading / 5)
