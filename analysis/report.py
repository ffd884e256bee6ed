"""Writes one page from run directories: what was run, tables, figures, what is missing, environment and hashes.

    python -m analysis.report runs --out report
    python -m analysis.report runs/tiny-* --out report --step-times step_times.json --note "Learning rates: see …"

Writes `index.html`, which is self-contained and needs no network, `table.md`, `table.csv`, `comparisons.md`,
`comparisons.csv` and `figures/`. The page shows what was measured; it ranks nothing.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.mirror import MODES, mirror
from experiments.errors import UserError, check_installed, run_command

if TYPE_CHECKING:
    import pandas as pd

DIFFERENCES = Path(__file__).with_name("differences.csv")
TEMPLATE = Path(__file__).with_name("report.html.j2")


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m analysis.report", description="Tables and figures from runs.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUNS", help="run directories, or folders of them")
    parser.add_argument("--out", type=Path, default=Path("report"), help="folder to write into (default: report)")
    parser.add_argument("--step-times", type=Path, metavar="FILE", help="measurement of experiments.speed.timing")
    parser.add_argument("--title", default="Fine-tuning methods compared", help="heading of the page")
    parser.add_argument(
        "--note", action="append", default=[], metavar="TEXT", help="a paragraph for the page; repeatable"
    )
    parser.add_argument("--wandb", choices=MODES, default="off", help="also log the tables there (default: off)")
    parser.add_argument("--reference", metavar="LABEL", help="compare every method with this one, e.g. lora-r32")
    options = parser.parse_args(arguments)

    from analysis.load import find_runs

    page = write_report(
        find_runs(options.runs),
        options.out,
        options.step_times,
        options.title,
        options.note,
        options.reference,
        wandb=options.wandb,
    )
    print(page)


def write_report(
    run_directories: Sequence[Path],
    out: Path,
    step_times: Path | None,
    title: str,
    notes: Sequence[str] = (),
    reference: str | None = None,
    tried: Sequence[Path] = (),
    wandb: str = "off",
) -> Path:
    """Write the report of these runs into `out` and return the path of its `index.html`.

    `step_times` is a measurement of `experiments.speed.timing`, or None for blank cells. `notes` are paragraphs of
    plain text for what the records do not contain, e.g. how the learning rates were chosen. `reference` is the label
    that `analysis.comparisons` compares with. `tried` are the runs by which learning rates were chosen; without them,
    the sweeps among the reported runs are drawn. `wandb`: a mode of analysis/mirror.py, for the tables. UserError if no
    run can be read.
    """
    if wandb != "off":
        check_installed("wandb", f"--wandb {wandb}")

    import jinja2
    import pandas as pd

    from analysis import comparisons, paper_tables, report_figures, tables
    from analysis.load import load_runs, load_step_times
    from experiments.runs.records import write_atomically

    runs = load_runs(run_directories)
    if runs.frame.empty:
        raise UserError(f"nothing to report: none of the {len(run_directories)} directories is a readable run")
    times = load_step_times(step_times) if step_times else None
    table = tables.method_table(runs.frame, times)
    compared = comparisons.comparison_table(runs.frame, reference)
    pairs = {heading: comparisons.display(rows) for heading, rows in tables.by_section(compared)}
    with report_figures.Figures(out / "figures") as figures:
        sections = [
            {
                "title": heading,
                "table": _compact(tables.display(rows)),
                "figure": report_figures.accuracy_figure(number, heading, rows, table, figures),
                "pairs": _compact(pairs[heading]) if heading in pairs else None,
            }
            for number, (heading, rows) in enumerate(tables.by_section(table), start=1)
        ]
        costs = report_figures.cost_figures(runs.frame, figures)
        gradients, not_drawn = report_figures.gradient_pictures(runs.frame)
        spectra, unread = report_figures.spectra_pictures(runs.frame)
        drawn = [figures.add(picture) for picture in [*gradients, *spectra]]
        swept = load_runs(tried, quiet=True).frame if tried else runs.frame  # those that were tried have no scores
        sweeps = report_figures.sweeps(swept, figures)
        papers = [paper for paper in (table(runs.frame) for table in paper_tables.TABLES) if paper.has_ours]
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=title,
        notes=notes,
        facts=_facts(runs.frame),
        papers=papers,
        sweeps=sweeps,
        costs=costs,
        wide=[{"title": heading, "table": _compact(wide)} for heading, wide in tables.wide_tables(table)],
        legend=tables.legend([*table["mixed"], *compared["mixed"]]),
        sections=sections,
        interval_kinds=set(table["interval_over"]),
        difference_kinds={*compared["over"]},
        times=times,
        gradients=drawn[: len(gradients)],
        spectra=drawn[len(gradients) :],
        differences=list(csv.DictReader(DIFFERENCES.read_text(encoding="utf-8").splitlines())),
        problems=runs.problems + not_drawn + unread,
        hashes=_hashes(runs.frame),
        environment=_environment(runs.frame),
    )
    write_atomically(out / "table.md", tables.to_markdown(table))
    write_atomically(out / "table.csv", tables.to_csv(table))
    write_atomically(out / "comparisons.md", comparisons.to_markdown(compared))
    write_atomically(out / "comparisons.csv", comparisons.to_csv(compared))
    write_atomically(out / "index.html", page)
    numbers = {"methods": tables.to_csv(table), "comparisons": comparisons.to_csv(compared)}
    logged = {name: pd.read_csv(io.StringIO(text)) for name, text in numbers.items()}
    logged |= {f"paper/{paper.name}": paper.text for paper in papers}
    mirror(wandb, title, runs.frame["run_id"], logged, out)
    return out / "index.html"


def _compact(table: pd.DataFrame) -> pd.DataFrame:
    """Return a table for the page: the size with the method, in the column that stays in view, and no empty column."""
    if "N / r" in table:
        sized = (table["Method"] + " " + table["N / r"]).str.strip()
        table = table.assign(Method=sized).drop(columns="N / r")
    return table.loc[:, (table != "").any()]


def _facts(frame: pd.DataFrame) -> list[tuple[str, str]]:
    """Return what was run, as (name, text)."""
    from analysis.load import records

    scored = frame.dropna(subset=["accuracy"])
    scored = scored.loc[scored["benchmark"].isin(_benchmarks(frame))]
    models = records(frame.dropna(subset=["base_parameters"]).drop_duplicates(["model", "base_parameters"]))
    evaluations = records(scored.drop_duplicates(["evaluation", "test_data_hash"]))
    completions = (scored["n"] * scored["samples"]).sum()
    unanswered = f"{scored['unparsed'].sum():,} of {completions:,}, counted as wrong" if len(scored) else ""
    return [
        ("Base model", "; ".join(f"{row['model']}, {row['base_parameters']:,} parameters" for row in models)),
        ("Trained on", ", ".join(sorted(set(frame["task"])))),
        (
            "Scored on",
            "; ".join(
                f"{row['benchmark']}, {row['n']:,} test items, protocol {row['protocol']}" for row in evaluations
            ),
        ),
        ("Methods", ", ".join(sorted(set(frame["method"])))),
        ("Seeds", ", ".join(str(seed) for seed in sorted(set(frame["seed"])))),
        ("Runs", f"{frame['run_id'].nunique()}, of which {scored['run_id'].nunique()} trained and scored"),
        ("Completions without an answer", unanswered),
    ]


def _benchmarks(frame: pd.DataFrame) -> list[str]:
    """Return the names of the single benchmarks, without the means over them."""
    of_one = frame["items"].map(lambda items: not isinstance(items, list))
    return sorted(set(frame.loc[of_one, "benchmark"].dropna()))


def _hashes(frame: pd.DataFrame) -> list[tuple[str, list[str]]]:
    """Return (name, hashes): one hash each, unless the runs differ."""
    rows = []
    for words, by, column in (
        ("Base weights of", "model", "base_hash"),
        ("Training rows of", "task", "train_data_hash"),
        ("Test rows of", "benchmark", "test_data_hash"),
    ):
        known = frame.dropna(subset=[column])
        known = known.loc[known["learning_rate"].notna()] if by == "task" else known  # the base reads no training rows
        if by == "benchmark":
            known = known.loc[known[by].isin(_benchmarks(frame))]
        for name, part in known.groupby(by):
            rows.append((f"{words} {name}", sorted(set(part[column]))))
    return rows


def _environment(frame: pd.DataFrame) -> list[tuple[str, str, str]]:
    """Return (key, training, evaluation); if values differ between runs, all are listed."""
    training, evaluation = (_values(frame[column].dropna()) for column in ("environment", "eval_environment"))
    return [(key, training.get(key, ""), evaluation.get(key, "")) for key in training | evaluation]


def _values(environments: Iterable[dict[str, Any]]) -> dict[str, str]:
    found: dict[str, list[str]] = {}
    for environment in environments:
        for key, value in environment.items():
            text = value if isinstance(value, str) else json.dumps(value)
            if text not in found.setdefault(key, []):
                found[key].append(text)
    return {key: "; ".join(values) for key, values in found.items()}


if __name__ == "__main__":
    run_command(main)
