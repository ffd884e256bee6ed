"""Small copies of runs, and the notebooks that read them: only calls, stored without outputs, and executable."""

from __future__ import annotations

import json
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from analysis.export import FIRST, STEPS, committed_runs, export_run, main, thinned
from analysis.load import find_runs, load_metrics, load_runs, load_spectra
from experiments.errors import UserError
from experiments.runs.follows import FROM_HEADER
from experiments.runs.records import file_hash, read_json
from tests.analysis.analysis_runs import change, score_file, write_run, write_spectra
from tests.analysis.test_analysis_cache import same

NOTEBOOKS = sorted((Path(__file__).resolve().parent.parent / "analysis" / "notebooks").glob("*.ipynb"))


def test_a_small_copy_gives_the_same_rows(tmp_path: Path) -> None:
    run = write_run(tmp_path / "runs", "lora", items=[1, 0, 1], steps=200)
    write_spectra(run, steps=20)
    (run / "adapter").mkdir()
    (run / "adapter" / "adapter_model.safetensors").write_bytes(b"weights")
    samples, score = score_file(run).with_name("samples.jsonl"), read_json(score_file(run))
    samples.write_text(json.dumps({name: score[name] for name in FROM_HEADER}) + "\n", encoding="utf-8")
    change(score_file(run), samples_hash=file_hash(samples))
    copy = export_run(run, tmp_path / "out")
    names = {path.name for path in copy.rglob("*") if path.is_file()}
    assert names == {"config.yaml", "train.json", "score.json", "metrics.jsonl", "spectra.jsonl"}
    assert '"items":[1,0,1]' in score_file(copy).read_text(encoding="utf-8")
    score_file(run).with_name("samples.jsonl").unlink()  # invented, so that it contradicts the score
    first, second = load_runs([run]), load_runs([copy])
    first.frame["path"] = second.frame["path"]
    same(first, second)
    assert sorted(set(load_spectra(copy)["step"])) == [1, 3, 6, 9, 11, 14, 17, 20]
    whole, thin = load_metrics(run), load_metrics(copy)
    assert len(thin) == STEPS
    assert thin.index[:FIRST].tolist() == list(range(1, FIRST + 1))
    assert thin.index[-1] == 200
    assert (abs(thin / whole.loc[thin.index] - 1).fillna(0) < 1e-4).all().all()  # equal up to rounding


@pytest.mark.parametrize("out", ["runs", "runs/{name}", "runs/{name}/copy"])
def test_a_copy_is_never_written_into_the_run_itself(tmp_path: Path, out: str) -> None:
    run = write_run(tmp_path / "runs", "lora", steps=200)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="would be written into the run itself: give another folder"):
        main([str(run), "--out", str(tmp_path / out.format(name=run.name))])
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("count", [1, STEPS - 1, STEPS, STEPS + 1, 1000])
def test_thinned_keeps_order_and_both_ends(count: int) -> None:
    lines = [{"step": step} for step in range(count)]
    kept = [line["step"] for line in thinned(lines)]
    assert len(kept) == min(count, STEPS)
    assert kept == sorted(set(kept))
    assert (kept[0], kept[-1]) == (0, count - 1)


def test_paths_of_a_machine_stay_behind(tmp_path: Path) -> None:
    run = write_run(tmp_path / "runs", "lora")
    config = run / "config.yaml"
    config.write_text(
        config.read_text(encoding="utf-8").replace("device: cpu", "device: cpu\n  cache_dir: /some/where"),
        encoding="utf-8",
    )
    assert "/some/where" not in (export_run(run, tmp_path / "out") / "config.yaml").read_text(encoding="utf-8")


def test_the_command_says_what_it_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in (0, 1):
        write_run(tmp_path / "runs", seed=seed, items=[1, 0])
    main([str(tmp_path / "runs"), "--out", str(tmp_path / "out")])
    assert capsys.readouterr().out.startswith("2 runs, ")
    assert len(find_runs([tmp_path / "out"])) == 2


def test_missing_records_say_how_to_make_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIABLO_RESULTS", str(tmp_path))
    with pytest.raises(UserError, match=r"experiments\.reproduce quickstart.*analysis\.export runs --out"):
        committed_runs("quickstart")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_without_outputs(path: Path) -> None:
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None)
            assert "def " not in "".join(cell["source"])


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path) -> None:
    """On the committed records, as in a fresh clone."""
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(path.parent)}}).execute()
    shown = [output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", [])]
    assert shown
    kinds = {kind for data in shown for kind in data}
    assert ("image/png" in kinds) == (path.stem != "tables")
    assert ("text/markdown" in kinds) == (path.stem in ("tables", "sparse_patterns"))
