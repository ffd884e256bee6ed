"""Small copies of runs, and the notebooks that read them: only calls, stored with the outputs of their code."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
from pathlib import Path

import nbformat
import pytest

from analysis.execute import HASH, code_hash, execute, text_outputs
from analysis.export import FIRST, STEPS, committed_runs, export_run, main, thinned
from analysis.load import find_runs, load_metrics, load_runs, load_spectra
from experiments import ROOT
from experiments.errors import UserError
from experiments.runs.follows import FROM_HEADER
from experiments.runs.records import file_hash, read_json
from tests.analysis.analysis_runs import change, score_file, write_run, write_spectra
from tests.analysis.test_analysis_cache import same

NOTEBOOKS = sorted((ROOT / "analysis" / "notebooks").glob("*.ipynb"))
EXAMPLE = ROOT / "examples" / "diablo_and_lora.ipynb"


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


@pytest.mark.parametrize("path", [*NOTEBOOKS, EXAMPLE], ids=lambda path: path.stem)
def test_what_a_notebook_imports_exists(path: Path) -> None:
    """Type checkers do not read notebooks, and executing all of them takes minutes."""
    cells = [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    lines = "\n".join(line for cell in cells for line in "".join(cell["source"]).splitlines() if line[:1] not in "%!")
    imports = [node for node in ast.walk(ast.parse(lines)) if isinstance(node, ast.ImportFrom)]
    assert imports
    for node in imports:
        module = importlib.import_module(str(node.module))
        for name in (name.name for name in node.names):
            assert hasattr(module, name) or importlib.util.find_spec(f"{node.module}.{name}"), name


@pytest.mark.parametrize("path", [*NOTEBOOKS, EXAMPLE], ids=lambda path: path.stem)
def test_a_notebook_is_stored_executed_and_small(path: Path) -> None:
    notebook = json.loads(path.read_text(encoding="utf-8"))
    told = f"run `python -m analysis.execute {path.relative_to(ROOT)}`"
    assert notebook["metadata"].get(HASH) == code_hash(notebook), told
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1)), told
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert outputs
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert path.stat().st_size < 300_000
    assert "/tmp/" not in path.read_text(encoding="utf-8")
    if path != EXAMPLE:
        assert not any("def " in "".join(cell["source"]) for cell in cells)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_shows_what_it_gives_today(path: Path) -> None:
    """On the committed records, as in a fresh clone. Pictures are drawn, but their bytes depend on the fonts."""
    stored, today = json.loads(path.read_text(encoding="utf-8")), execute(path)
    assert text_outputs(stored) == text_outputs(today), f"run `python -m analysis.execute {path.relative_to(ROOT)}`"
    shown = [output.get("data", {}) for cell in today.cells for output in cell.get("outputs", [])]
    kinds = {kind for data in shown for kind in data}
    assert ("image/png" in kinds) == (path.stem != "tables")
    assert ("text/markdown" in kinds) == (path.stem in ("tables", "sparse_patterns"))


def test_changed_code_is_noticed(tmp_path: Path) -> None:
    notebook = json.loads(EXAMPLE.read_text(encoding="utf-8"))
    before = code_hash(notebook)
    assert code_hash(nbformat.read(EXAMPLE, as_version=4)) == before
    next(cell for cell in notebook["cells"] if cell["cell_type"] == "code")["source"].append("\n1")
    assert code_hash(notebook) != before


@pytest.mark.real
def test_the_example_notebook_runs_on_smollm2(smollm2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With fewer rows. What it says must have the stored form; its numbers and generated texts are this machine's."""
    monkeypatch.setenv("MODEL", str(smollm2))
    monkeypatch.setenv("ROWS", "48")
    stored, today = text_outputs(json.loads(EXAMPLE.read_text(encoding="utf-8"))), text_outputs(execute(EXAMPLE))
    assert len(stored) == len(today)
    for before, after in zip(stored[:-1], today[:-1], strict=True):  # the last cell generates text
        assert [re.sub(r"[\d.,]+", "#", text) for text in before] == [re.sub(r"[\d.,]+", "#", text) for text in after]
    (table,) = (text for texts in today for text in texts if text.startswith("| method"))
    losses = {row.split("|")[1].strip(): float(row.split("|")[3]) for row in table.splitlines()[2:]}
    assert losses["DiaBlo"] < losses["none"] > losses["LoRA"]
