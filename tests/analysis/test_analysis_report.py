"""The report made from runs: its table, its figures, and the page in a browser."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis.load import find_runs, load_metrics, load_runs, load_step_times, records
from analysis.plots import Trace, accuracy_by_parameters, gradient_norms
from analysis.report import write_report
from analysis.stats import wilson
from analysis.tables import display, method_table, to_csv, to_markdown
from experiments.errors import UserError
from experiments.runs.records import content_hash
from tests.analysis.analysis_runs import change, score_file, step_times_file, write_run

# The table


def test_table_values(tmp_path: Path) -> None:
    write_run(tmp_path, "lora", seed=0, items=[1, 1, 1, 0], parameters=1_234_5)
    write_run(tmp_path, "lora", seed=1, items=[1, 1, 1, 0], parameters=1_234_5)
    write_run(tmp_path, "lora", seed=2, parameters=1_234_5)
    table = method_table(load_runs(find_runs([tmp_path])).frame, load_step_times(step_times_file(tmp_path)))
    (row,) = records(table)
    assert (row["accuracy"], row["by_seed"], row["seeds"], row["planned_seeds"]) == (0.75, {0: 0.75, 1: 0.75}, 2, 3)
    assert (row["low"], row["high"]) == pytest.approx(wilson(0.75, 4))  # the seeds agree: 4 items, not 8
    assert row["train_seconds"] == 9  # the median of 8, 9 and 10
    assert display(table).iloc[0].to_dict() == {
        "Method": "lora",
        "N / r": "r=7",
        "Trainable": "12,345",
        "% of base": "1.234",
        "Learning rate": "0.001",
        "Rate chosen": "given",
        "Score, %": "75.0",
        "95 % interval": "30.1–95.4",
        "Interval over": "test items",
        "Each seed, %": "s0 75.0 · s1 75.0",
        "Seeds": "2 of 3",
        "Training, s": "9.0",
        "Step time ÷ frozen": "1.30 (1.20–1.40)",
    }
    assert "| lora     |     r=7 |       75.0 |" in to_markdown(table)
    assert "0=0.75 1=0.75" in to_csv(table)


def test_rows_are_sorted_by_name_and_size_and_cells_do_not_mix(tmp_path: Path) -> None:
    for method, size, rate, items in (
        ("lora", 7, 1e-3, [1, 1]),
        ("diablo", 16, 1e-3, [1, 0]),
        ("diablo", 4, 1e-3, [0, 0]),
        ("diablo", 4, 3e-3, [1, 1]),
        ("full", 0, 1e-3, [1, 1]),
    ):
        write_run(tmp_path, method, size=size, learning_rate=rate, items=items)
    table = display(method_table(load_runs(find_runs([tmp_path])).frame))
    assert table[["Method", "N / r", "Learning rate", "Score, %"]].to_numpy().tolist() == [
        ["diablo", "N=4", "0.001", "0.0"],
        ["diablo", "N=4", "0.003", "100.0"],
        ["diablo", "N=16", "0.001", "50.0"],
        ["full", "", "0.001", "100.0"],
        ["lora", "r=7", "0.001", "100.0"],
    ]


def test_likelihoods_change_no_page(tmp_path: Path) -> None:
    """Runs with and without NLL scores beside their accuracies give equal tables, comparisons, figures and page."""
    pages = []
    for folder, nll in (("without", None), ("with", [1.5, 2.5, 3.5, 0.5])):
        for method in ("lora", "diablo", "base"):
            for seed in range(2):
                items = [1, 0, seed, 1]
                write_run(tmp_path / folder, method, seed=seed, items=items, nll=nll, task="gsm8k", parameters=100)
        out = tmp_path / f"{folder} report"
        page = write_report(find_runs([tmp_path / folder]), out, None, "Runs")
        texts = {
            path.relative_to(out): path.read_text(encoding="utf-8")
            for path in out.rglob("*")
            if path.suffix in (".csv", ".md")
        }
        pages.append(texts)
        assert texts
        assert len(load_runs(find_runs([tmp_path / folder])).likelihood) == (6 if nll else 0)
        assert "gsm8k_nll" not in page.read_text(encoding="utf-8")
    assert pages[0] == pages[1]


def test_what_is_missing_is_blank(tmp_path: Path) -> None:
    write_run(tmp_path, "lora")
    (row,) = records(display(method_table(load_runs(find_runs([tmp_path])).frame)))
    blank = ("Score, %", "95 % interval", "Interval over", "Each seed, %", "Step time ÷ frozen")
    assert [row[name] for name in blank] == [""] * 5
    assert row["Seeds"] == "0 of 1"


def test_other_test_items_are_another_table(tmp_path: Path) -> None:
    write_run(tmp_path, "lora", items=[1, 0])
    change(score_file(write_run(tmp_path, "dora", items=[1, 1])), data_hash="0" * 64)
    text = to_markdown(method_table(load_runs(find_runs([tmp_path])).frame))
    assert text.count("## tiny trained on arith") == 2


def test_step_times_of_another_model_are_not_used(tmp_path: Path) -> None:
    write_run(tmp_path, "lora", items=[1, 0], model="large")
    table = method_table(load_runs(find_runs([tmp_path])).frame, load_step_times(step_times_file(tmp_path)))
    assert all(pd.isna(ratio) for ratio in table["step_time_ratio"])


# Figures


def test_gradient_figure_shows_three_layers_and_names_what_it_shows(tmp_path: Path) -> None:
    runs = [("lora-r7", 1e-3, write_run(tmp_path, "lora")), ("diablo-N8", 2e-3, write_run(tmp_path, "diablo", size=8))]
    traces = [Trace(label, 0, rate, load_metrics(run)) for label, rate, run in runs]
    picture = gradient_norms("norms", "tiny", "arith", traces)
    axes, below = picture.figure.axes[:3], picture.figure.axes[3:]
    assert [panel.get_title() for panel in axes] == [f"layer {layer}, q_proj" for layer in (0, 2, 3)]
    assert {panel.get_ylim() for panel in axes} == {axes[0].get_ylim()}
    column = "base_model.model.model.layers.2.self_attn.q_proj.lora_B.default.weight"
    (drawn,) = (line for line in axes[1].get_lines() if line.get_label() == "lora-r7: B")
    assert np.asarray(drawn.get_ydata()).tolist() == traces[0].norms[column].tolist()
    (variance,) = (line for line in below[1].get_lines() if line.get_label() == "lora-r7: B")
    assert np.isnan(np.asarray(variance.get_ydata())[:2]).all()  # a variance needs at least three steps here
    assert np.asarray(variance.get_ydata())[2] == pytest.approx(np.var(traces[0].norms[column], ddof=1))
    for words in ("tiny", "arith", "lora-r7 0.001", "diablo-N8 0.002", "3 norms of exactly 0"):
        assert words in picture.caption


def test_accuracy_figure_shows_every_seed_and_the_base(tmp_path: Path) -> None:
    for seed, items in enumerate(([1, 1, 0, 0], [1, 1, 1, 0])):
        write_run(tmp_path, "lora", seed=seed, items=items)
        write_run(tmp_path, "diablo", size=8, seed=seed, items=items)
    write_run(tmp_path, "base", parameters=0, items=[1, 1, 0, 0])
    table = method_table(load_runs(find_runs([tmp_path])).frame)
    axes = accuracy_by_parameters("accuracy", "title", table, ["base", "diablo", "lora"]).figure.axes[0]
    open_markers = [line for line in axes.get_lines() if line.get_markerfacecolor() == "white"]
    assert [np.asarray(line.get_ydata()).tolist() for line in open_markers] == [[50, 75], [50, 75]]
    places = [float(np.asarray(line.get_xdata())[0]) for line in open_markers]
    assert places[0] < 10_000 < places[1]  # two points of equal size, placed left and right of it
    assert [line.get_label() for line in axes.get_lines() if line.get_linestyle() == "--"] == ["base"]


# The page


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the page of eight settings, two seeds and the base model, with one score missing."""
    root = tmp_path_factory.mktemp("quickstart")
    generator = np.random.default_rng(0)
    for method, size in (("diablo", 4), ("diablo", 8), ("diablo", 16), ("lora", 7), ("dora", 7), ("full", 0)):
        for seed in (0, 1):
            items = generator.integers(0, 2, size=50).tolist() if (method, seed) != ("dora", 1) else None
            write_run(
                root / "runs", method, size=size, seed=seed, parameters=30_000 + 512 * size, items=items, steps=20
            )
    write_run(root / "runs", "base", parameters=0, items=[0] * 49 + [1])
    times = step_times_file(root)
    return write_report(find_runs([root / "runs"]), root / "report", times, "A <title>", ["Rates were chosen & fixed."])


def test_the_report_is_one_page_with_its_files(report: Path) -> None:
    text = report.read_text(encoding="utf-8")
    for words in (
        "A &lt;title&gt;",
        "Rates were chosen &amp; fixed.",
        "tiny, 1,000,000 parameters",
        "there is no seed-level interval",
        "It does not rank the methods",
        "no score for arith",
        "1 of 2",
        content_hash("arith test"),
        "2.13.0",
        "a CPU",
    ):
        assert words in text
    assert "http://" not in text.replace("http://www.w3.org", "")
    assert "https://" not in text
    assert "<script" not in text
    files = {path.relative_to(report.parent).as_posix() for path in report.parent.rglob("*") if path.is_file()}
    figures = {
        f"figures/{name}_1.{end}"
        for name in ("accuracy_by_parameters", "gradient_norms", "time_and_memory")
        for end in ("svg", "png")
    }
    assert files == {"index.html", "table.md", "table.csv", "comparisons.md", "comparisons.csv"} | figures
    assert len(pd.read_csv(report.with_name("table.csv"))) == 7


def test_the_page_names_the_size_in_the_first_column_and_has_no_empty_column(report: Path, tmp_path: Path) -> None:
    text = report.read_text(encoding="utf-8")
    assert '<th scope="row">diablo N=16</th>' in text
    assert '<th scope="col">Step time ÷ frozen</th>' in text
    assert "a training pass over the same pass of the frozen model" in text[: text.index("Step time ÷ frozen</th>")]
    assert "Smallest found" not in text, "nothing was tested with two seeds"


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_in_a_browser(report: Path, tmp_path: Path, width: int) -> None:
    """No horizontal scrolling in a frame of the given width (a window cannot be as narrow as a phone)."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("chromium is not installed")
    errors = """<script>window.seen = []; addEventListener("error", event => seen.push(String(event.message)), true);
        console.error = console.warn = (...words) => seen.push(words.join(" "));</script>"""
    probe = """<script>
        // Each table, scrolled to its right end: by how far, and how far its first column is from the left edge.
        const kept = () => [...document.querySelectorAll(".wide:has(table)")].map(region => {
            region.scrollLeft = 10000;
            const column = region.querySelector("tbody th").getBoundingClientRect();
            return [region.scrollLeft, column.left - region.getBoundingClientRect().left, column.width / innerWidth];
        });
        addEventListener("load", () => setTimeout(() => parent.postMessage(JSON.stringify({
        inner: innerWidth, scroll: document.documentElement.scrollWidth,
        images: [...document.images].map(image => [image.alt.length, image.naturalWidth]),
        tables: document.querySelectorAll("table").length, kept: kept(), errors: window.seen}), "*"), 100))</script>"""
    text = report.read_text(encoding="utf-8").replace("<head>", "<head>" + errors).replace("</body>", probe + "</body>")
    (tmp_path / "page.html").write_text(text, encoding="utf-8")
    (tmp_path / "frame.html").write_text(
        f"""<iframe src="page.html" style="border:0;width:{width}px;height:900px"></iframe><pre id="seen"></pre>
        <script>addEventListener("message", event => seen.textContent = event.data)</script>""",
        encoding="utf-8",
    )
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    flags += ["--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}"]
    flags += ["--window-size=1400,1000", "--virtual-time-budget=5000", "--dump-dom"]
    page = (tmp_path / "frame.html").as_uri()
    dom = subprocess.run(
        [chromium, *flags, page], capture_output=True, encoding="utf-8", timeout=240, check=True
    ).stdout
    seen = json.loads(dom.partition('<pre id="seen">')[2].partition("</pre>")[0])
    assert seen["inner"] == width
    assert seen["scroll"] <= width
    assert len(seen["images"]) == 3
    assert all(alt > 20 and pixels > 0 for alt, pixels in seen["images"])
    assert seen["tables"] == 6  # methods, differences, comparison with the paper, deviations, hashes, environment
    assert seen["errors"] == []
    assert all(abs(left) <= 2 for _, left, _ in seen["kept"]), "the first column stays in view"
    if width == 390:
        assert seen["kept"][0][0] > 100, "the table of methods is wider than a phone"
        assert all(share < 0.45 for *_, share in seen["kept"])


def test_a_report_of_unscored_runs_has_no_figure_and_says_why(tmp_path: Path) -> None:
    run = write_run(tmp_path, "full")
    text = write_report([run], tmp_path / "report", None, "Nothing scored").read_text(encoding="utf-8")
    assert "no score for arith" in text
    assert "an empty cell or a missing column" in text
    assert "Step time ÷ frozen" not in text
    assert "<img" not in text


def test_nothing_readable_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing to report"):
        write_report([tmp_path / "gone"], tmp_path / "report", None, "x")


def test_the_command_writes_the_page_without_torch(tmp_path: Path) -> None:
    write_run(tmp_path / "runs", items=[1, 0])
    program = (
        "import sys; from analysis.report import main; main(sys.argv[1:]); "
        "assert not {'torch', 'transformers', 'matplotlib.pyplot'} & set(sys.modules)"
    )
    command = [
        sys.executable,
        "-c",
        program,
        str(tmp_path / "runs"),
        "--out",
        str(tmp_path / "out"),
        "--note",
        "A note.",
    ]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=240, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, str(tmp_path / "out" / "index.html")), done.stderr


def test_help_answers_before_anything_heavy_is_imported() -> None:
    program = (
        "import sys; import analysis.report as report\n"
        "try: report.main(['--help'])\n"
        "except SystemExit: assert not {'pandas', 'matplotlib', 'numpy'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, encoding="utf-8", timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "--step-times" in done.stdout
