"""The published numbers as data, and the paper's tables with our numbers beside them."""

from __future__ import annotations

import io
import json
from pathlib import Path
from statistics import fmean
from typing import Any

import pandas as pd
import pytest
import yaml

from analysis.load import find_runs, load_runs, records
from analysis.paper_cells import matching
from analysis.paper_tables import (
    TABLES,
    code_safety,
    commonsense,
    commonsense_per_task,
    efficiency,
    main,
    sparse_patterns,
)
from analysis.published import FILE, KNOWN, read_published
from eval.code import pass_at_k
from experiments.errors import UserError
from experiments.plan.compose import plan, write_runs
from experiments.runs.follows import standard_error
from experiments.runs.records import RunPaths
from tests.analysis.analysis_runs import change, score_file, write_run

MODELS = Path(__file__).resolve().parents[2] / "configs" / "model"
QKVUD = ("q", "k", "v", "u", "d")


def frame_of(*folders: Path) -> pd.DataFrame:
    return load_runs(find_runs(folders)).frame


def parameters(row: dict[str, Any]) -> float:
    """Return the trainable parameters of a published row, computed from the model's shapes."""
    architecture = yaml.safe_load((MODELS / f"{row['model']}.yaml").read_text(encoding="utf-8"))["architecture"]
    h, i = architecture["hidden_size"], architecture["intermediate_size"]
    kv = h * architecture["num_key_value_heads"] // architecture["num_attention_heads"]
    shapes = {"q": (h, h), "k": (h, kv), "v": (h, kv), "o": (h, h), "g": (h, i), "u": (h, i), "d": (i, h)}
    targets = "qkvogud" if row["table"] == "code_safety" else QKVUD
    size = int(row["setting"][2:])
    per_matrix = {
        "diablo": lambda a, b: a * b // size,
        "lori_d": lambda a, b: size * b,
        "dora": lambda a, b: size * (a + b) + b,
    }
    count = per_matrix.get(row["method"], lambda a, b: size * (a + b))
    return architecture["num_hidden_layers"] * sum(count(*shapes[target]) for target in targets)


TOTALS = {
    "llama_7b": 6_738_415_616,
    "llama2_7b": 6_738_415_616,
    "llama3_8b": 8_030_261_248,
    "llama_13b": 13_015_864_320,
}


def test_computed_shares_are_the_shapes() -> None:
    rows = [row for row in records(read_published()) if row["computed_percent"] > 0 and row["method"] != "full"]
    assert len(rows) > 100
    for row in rows:
        percent = 100 * parameters(row) / TOTALS[row["model"]]
        assert row["computed_percent"] == pytest.approx(percent, abs=1e-4), row


def test_means_are_those_of_their_benchmarks() -> None:
    """As printed: to one decimal, from values rounded to one decimal."""
    frame = read_published().query("table in ('commonsense_per_task', 'arithmetic')")
    for key, part in frame.groupby(["table", "model", "method", "setting"]):
        mean = part["benchmark"].str.startswith("mean of")
        assert part.loc[mean, "value"].item() == pytest.approx(part.loc[~mean, "value"].mean(), abs=0.11), key


def test_every_table_has_a_function_and_its_numbers() -> None:
    empty = load_runs([]).frame
    tables = [table(empty) for table in TABLES]
    assert {table.name for table in tables} == KNOWN["table"]
    assert sum(len(table.numbers) for table in tables) == len(read_published())
    assert not any(table.has_ours for table in tables)


def broken(folder: Path, old: str, new: str) -> Path:
    path = folder / "published.csv"
    text = FILE.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("table,model", "tabel,model", "expected table"),
        ("commonsense,llama2_7b,full", "comonsense,llama2_7b,full", "line 2: table 'comonsense', did you mean common"),
        ("%,83.5", "%,", "line 2: value '' is not a number"),
        ("%,83.5", "%,-1", "line 2: value '-1'"),
        ("0.83,0.8325", "183,0.8325", "line 3: printed_percent '183'"),
        ("copied,NVlabs/DoRA README", "copied,", "line 3: copied_from"),
        ("commonsense,llama2_7b,dora,r=16", "commonsense,llama2_7b,lora,r=32", "line 4: this number is a duplicate"),
    ],
)
def test_a_fault_in_the_file_is_named_by_its_line(tmp_path: Path, old: str, new: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        read_published(broken(tmp_path, old, new))


def row_of(numbers: pd.DataFrame, **key: str) -> dict[str, Any]:
    (row,) = [row for row in records(numbers) if all(row[name] == value for name, value in key.items())]
    return row


def test_both_masks_stand_beside_a_copied_row(tmp_path: Path) -> None:
    """LoRA on LLaMA2-7B, printed as 77.6 with the loss on the prompt: our numbers for each mask in separate columns."""
    for protocol, items in (("diablo", [1, 1, 1, 1, 0]), ("llm_adapters", [1, 1, 1, 0, 0])):
        for seed in (0, 1):
            run = write_run(
                *(tmp_path, "lora"),
                **{"size": 32, "model": "llama2_7b", "task": "commonsense_170k", "protocol": protocol},
                **{"benchmark": "mean of 8", "items": items, "seed": seed},
            )
    change(score_file(run), protocol_version=2)
    table = commonsense(frame_of(tmp_path))
    row = row_of(table.numbers, model="llama2_7b", method="lora")
    assert row["ours, loss on answer"] == pytest.approx(80)
    assert row["difference, loss on answer"] == pytest.approx(80 - 77.6)
    assert row["ours, loss on prompt and answer"] == pytest.approx(60)
    text = row_of(table.text, Model="LLaMA2-7B", Method="LoRA")
    assert text["Ours, loss on answer"].startswith("80.0 (")
    assert (text["Difference, loss on answer"], text["Each seed, %, loss on answer"]) == ("+2.4", "s0 80.0 · s1 80.0")
    assert text["Interval over, loss on answer"] == "test items"
    assert [line.split()[0] for line in table.legend] == ["‡"]
    assert row["mixed, loss on prompt and answer"] == "protocols"
    assert r"\textdaggerdbl{}" in table.latex()
    assert text["Ours, loss on prompt and answer"].endswith("‡")
    assert "copied from NVlabs/DoRA README, protocol llm_adapters, loss on prompt and answer" in text["Provenance"]
    other = row_of(table.text, Model="LLaMA3-8B", Method="LoRA")
    assert other["Ours, loss on answer"] == ""
    assert pd.isna(row_of(table.numbers, model="llama3_8b", method="lora")["ours, loss on answer"])


@pytest.mark.parametrize(
    "table", ["commonsense", "arithmetic", "code_safety", "quantized", "sparse_patterns", "efficiency"]
)
def test_what_is_published_is_planned(table: str, tmp_path: Path) -> None:
    """Each of the paper's numbers has a run of ours, under the names that the tables use."""
    write_runs(plan([f"experiment={table}", "seed=0", f"runtime.runs_dir={tmp_path}"]))
    ours = frame_of(tmp_path)
    for row in records(read_published()):
        if row["table"] == table and not (table == "quantized" and not row["bits"]):
            assert not matching(ours, row).empty, row
    masks = {row["loss_on"] for row in records(ours) if row["method"] == "lora"}
    assert table != "commonsense" or masks == {"answer", "prompt and answer"}


def test_pass_at_10_comes_from_the_share_of_right_completions_of_each_problem(tmp_path: Path) -> None:
    run = write_run(
        *(tmp_path, "lora"),
        **{"size": 32, "model": "llama3_8b", "task": "code_alpaca", "protocol": "lori", "benchmark": "human_eval"},
        items=[1, 0],
    )
    shares = [0.0, 0.05, 0.5, 1.0]  # shares of 20 completions
    change(
        score_file(run),
        items=shares,
        n=4,
        samples=20,
        accuracy=fmean(shares),
        standard_error=standard_error(shares),
        extra_metrics={},
    )
    numbers = code_safety(frame_of(tmp_path)).numbers
    found = {name: row_of(numbers, method="lora", benchmark=f"human_eval {name}") for name in ("pass@1", "pass@10")}
    at_10 = fmean(pass_at_k(20, right, 10) for right in (0, 1, 10, 20))
    assert [row["ours, protocol lori"] for row in found.values()] == pytest.approx([38.75, 100 * at_10])
    for row in found.values():
        assert row["low, protocol lori"] < row["ours, protocol lori"] < row["high, protocol lori"]
    items = [0.0, 0.2, 0.6, 1.0]
    change(score_file(run), samples=5, items=items, accuracy=0.45, standard_error=standard_error(items))
    numbers = code_safety(frame_of(tmp_path)).numbers
    assert pd.isna(row_of(numbers, method="lora", benchmark="human_eval pass@10")["ours, protocol lori"])


def test_patterns_and_their_time_over_the_diagonal(tmp_path: Path) -> None:
    common: dict[str, Any] = {"model": "llama3_8b", "task": "gsm8k", "protocol": "lori", "items": [1, 1, 1, 0]}
    write_run(tmp_path, "sparse", pattern="diagonal", size=64, **common)
    write_run(tmp_path, "sparse", pattern="random_entry", size=2, **common)  # another density
    entries = write_run(tmp_path, "sparse", pattern="random_entry", size=64, **common)
    change(score_file(entries), items=[1, 1, 0, 0], accuracy=0.5, standard_error=0.25)
    change(entries / "train.json", step_seconds=0.06)
    table = sparse_patterns(frame_of(tmp_path))
    score = row_of(table.numbers, setting="random_entry 1/64", benchmark="gsm8k")
    assert score["ours, protocol lori"] == pytest.approx(50)
    time = row_of(table.numbers, setting="random_entry 1/64", benchmark="training time")
    assert time["ratio"] == pytest.approx(26.51 / 17.26)
    assert time["ours, llama3_8b on gsm8k"] == pytest.approx(2)
    text = row_of(table.text, Setting="random_entry 1/64", Benchmark="training time")
    assert text["Ours, llama3_8b on gsm8k"] == "2.00 (sparse-random_entry over sparse-diagonal)"
    other = row_of(table.text, Setting="random_block 1/64", Benchmark="training time")
    assert other["Ours, llama3_8b on gsm8k"] == ""


def test_of_several_sizes_those_nearest_to_each_other_are_timed(tmp_path: Path) -> None:
    for method, size, parameters, seconds in (
        ("diablo", 4, 40_000, 0.03),
        ("diablo", 64, 2_500, 0.09),
        ("lora", 7, 2_600, 0.045),
    ):
        run = write_run(tmp_path, method, size=size, parameters=parameters)
        change(run / "train.json", step_seconds=seconds)
    text = row_of(efficiency(frame_of(tmp_path)).text, Method="LoRA")
    assert text["Ours, tiny on arith"] == "0.50 (lora-r7 over diablo-N64)"


def test_what_was_not_scored_whole_or_was_swept_is_not_beside_the_paper(tmp_path: Path) -> None:
    common: dict[str, Any] = {
        "size": 32,
        "model": "llama2_7b",
        "task": "commonsense_170k",
        "protocol": "diablo",
        "benchmark": "boolq",
    }
    run = write_run(tmp_path, "lora", items=[1, 1], **common)
    column = "ours, loss on answer"

    def ours() -> Any:
        table = commonsense_per_task(frame_of(tmp_path))
        return row_of(table.numbers, model="llama2_7b", method="lora", benchmark="boolq")[column]

    assert ours() == 100
    path = score_file(run)
    generation = json.loads(path.read_text(encoding="utf-8"))["generation"]
    change(path, generation=generation | {"limit": 16})
    assert pd.isna(ours())
    change(path, generation=generation)
    other = write_run(tmp_path, "lora", items=[0, 0], learning_rate=2e-3, **common)
    assert pd.isna(ours())  # two learning rates, none chosen
    RunPaths(other).learning_rate.write_text(
        '{"by": "loss", "seed": 0, "at_edge": false, "tried": [1, 2]}', encoding="utf-8"
    )
    assert ours() == 0


def test_times_of_two_machines_are_not_divided(tmp_path: Path) -> None:
    write_run(tmp_path, "diablo", items=[1, 0])
    run = write_run(tmp_path, "lora", items=[1, 0])
    assert row_of(efficiency(frame_of(tmp_path)).numbers, method="lora")["ours, tiny on arith"] == 1
    change(run / "train.json", environment={"device": "another"})
    assert pd.isna(row_of(efficiency(frame_of(tmp_path)).numbers, method="lora")["ours, tiny on arith"])


def test_four_formats(tmp_path: Path) -> None:
    main(["--out", str(tmp_path)])
    assert len(list(tmp_path.iterdir())) == 4 * len(TABLES)
    latex = (tmp_path / "sparse_patterns.tex").read_text(encoding="utf-8")
    assert all(words in latex for words in (r"\toprule", r"random\_entry", r"\bottomrule"))
    html = pd.read_html(io.StringIO((tmp_path / "arithmetic.html").read_text(encoding="utf-8")))[0]
    csv = pd.read_csv(tmp_path / "arithmetic.csv")
    markdown = (tmp_path / "arithmetic.md").read_text(encoding="utf-8")
    assert len(html) == len(csv) == len(read_published().query("table == 'arithmetic'"))
    assert html["Published"].tolist() == csv["value"].tolist()
    assert "| LLaMA2-7B |" in markdown
