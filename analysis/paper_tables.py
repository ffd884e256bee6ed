"""The paper's tables next to our runs: published | ours | difference.

    python -m analysis.paper_tables runs --out report/paper     # <table>.md .tex .csv .html
    python -m analysis.paper_tables                             # without runs: published numbers only

Ours is blank if no run matches a published row in model, method, size, task, benchmark and protocol.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.errors import run_command

if TYPE_CHECKING:
    import pandas as pd

    from analysis.paper_cells import Wanted

NAMES = {
    **{"llama2_7b": "LLaMA2-7B", "llama3_8b": "LLaMA3-8B", "llama_13b": "LLaMA-13B", "llama_7b": "LLaMA-7B"},
    **{"full": "Full fine-tuning", "lora": "LoRA", "dora": "DoRA", "pissa": "PiSSA", "milora": "MiLoRA", "smt": "SMT"},
    **{"diablo": "DiaBlo", "lori_d": "LoRI-D", "sparse": "Sparse", "chatgpt": "ChatGPT", "zero_shot": "no training"},
}


WORDY = ("Provenance", "Note")  # columns of sentences
LATEX = {
    **{"−": "-", "–": "--", "×": r"$\times$", "·": r"$\cdot$"},
    **{"†": r"\textdagger{}", "‡": r"\textdaggerdbl{}", "§": r"\S{}", "¶": r"\P{}"},
}


@dataclass(frozen=True)
class PaperTable:
    """One table: `numbers` for computing, `text` for readers, both with one row per published number.

    `legend` explains the marks in `text`.
    """

    name: str
    title: str
    numbers: pd.DataFrame
    text: pd.DataFrame
    legend: list[str]

    @property
    def has_ours(self) -> bool:
        """Whether any published number has one of ours next to it."""
        return bool(self.numbers.filter(regex="^ours").notna().to_numpy().any())

    def markdown(self) -> str:
        from analysis.tables import markdown

        return "\n".join([f"## {self.title}\n", markdown(self.text), *(f"{line}\n" for line in self.legend)])

    def latex(self) -> str:
        """Return a booktabs tabular followed by the legend; needs the packages booktabs and array (p columns)."""
        style = self.text.style
        style.hide(axis="index").format(escape="latex").format_index(escape="latex", axis=1)
        columns = "".join("p{4cm}" if name in WORDY else "l" for name in self.text.columns)
        table = style.to_latex(hrules=True, column_format=columns)
        text = "\n\n".join([table, *(line.replace("%", r"\%") for line in self.legend)])
        return "".join(LATEX.get(letter, letter) for letter in text)

    def html(self) -> str:
        style = self.text.style.set_uuid(self.name).set_caption(self.title)
        style.hide(axis="index").format(escape="html").format_index(escape="html", axis=1)
        return style.to_html(cell_ids=False) + "".join(f"<p>{line}</p>\n" for line in self.legend)

    def csv(self) -> str:
        from analysis.tables import csv_text

        return csv_text(self.numbers)


def commonsense(frame: pd.DataFrame) -> PaperTable:
    """Commonsense 170K, the mean of eight benchmarks; ours with both loss masks.

    The LoRA and DoRA rows are the DoRA repository's, trained with the loss on prompt and answer; DiaBlo's own loss is
    on the answer only. Ours has every method with both.
    """
    return _paper_table("commonsense", "Commonsense 170K, mean of 8 benchmarks", "commonsense_170k", _masks(), frame)


def commonsense_per_task(frame: pd.DataFrame) -> PaperTable:
    """Commonsense 170K, each benchmark, as printed in the baselines' own papers."""
    return _paper_table("commonsense_per_task", "Commonsense 170K, the baselines", "commonsense_170k", _masks(), frame)


def arithmetic(frame: pd.DataFrame) -> PaperTable:
    """MetaMathQA to GSM8K and MATH. The baselines' MATH is scored by symbolic equality, DiaBlo's by Hendrycks' rule."""
    columns = _protocols("diablo", "milora", "metamath")
    return _paper_table("arithmetic", "MetaMathQA to GSM8K and MATH", "metamathqa", columns, frame)


def code_safety(frame: pd.DataFrame) -> PaperTable:
    """Code Alpaca to HumanEval, and SaferPaca to HEx-PHI."""
    title = "Code and safety: HumanEval and HEx-PHI"
    return _paper_table("code_safety", title, "code_alpaca saferpaca", _protocols("lori"), frame)


def quantized(frame: pd.DataFrame) -> PaperTable:
    """Math 10K on quantised bases, the mean of four benchmarks."""
    title = "Math 10K on quantised bases, mean of 4 benchmarks"
    return _paper_table("quantized", title, "math_10k", _protocols("pyreft"), frame)


def sparse_patterns(frame: pd.DataFrame) -> PaperTable:
    """The sparse patterns on GSM8K: accuracy, and training time relative to the diagonal blocks."""
    return _paper_table("sparse_patterns", "Sparse patterns, GSM8K", "gsm8k", _protocols("lori"), frame)


def efficiency(frame: pd.DataFrame) -> PaperTable:
    """Training time relative to DiaBlo. The paper's model and data are unknown: ours covers all trained runs."""
    return _paper_table("efficiency", "Training time over DiaBlo's", " ".join(set(frame["task"])), {}, frame)


def _masks() -> dict[str, Wanted]:
    from analysis.paper_cells import Wanted

    both = ("diablo", "llm_adapters")
    return {f"loss on {tokens}": Wanted(both, tokens) for tokens in ("answer", "prompt and answer")}


def _protocols(*names: str) -> dict[str, Wanted]:
    from analysis.paper_cells import Wanted

    return {f"protocol {name}": Wanted((name,)) for name in names}


TABLES: tuple[Callable[[pd.DataFrame], PaperTable], ...] = (
    *(commonsense, commonsense_per_task, arithmetic, code_safety, quantized, sparse_patterns, efficiency),
)


def _paper_table(name: str, title: str, tasks: str, columns: dict[str, Wanted], frame: pd.DataFrame) -> PaperTable:
    """Build a table. `tasks`: names of our tasks; `columns`: heading → which of our runs it shows."""
    import pandas as pd

    from analysis.load import records
    from analysis.paper_cells import score_cell
    from analysis.published import read_published
    from analysis.tables import legend, method_table

    published = read_published()
    rows = records(published.loc[published["table"] == name])
    ours = frame.loc[frame["task"].isin(tasks.split())]
    scored = method_table(ours) if columns and len(ours) else pd.DataFrame()
    numbers, texts, mixed = [], [], []
    for row in rows:
        number, text = dict(row), _about(row)
        if row["unit"] == "minutes":
            _add_times(number, text, rows, ours)
        for heading, wanted in columns.items() if row["unit"] != "minutes" else ():
            cell = score_cell(ours, scored, row, wanted)
            mixed.append(cell["mixed"] or ())
            number |= {f"{key}, {heading}": value for key, value in _plain(cell).items()}
            text |= {f"{key}, {heading}": value for key, value in _score_texts(cell).items()}
        numbers.append(number)
        texts.append(text | {"Provenance": _provenance(row), "Note": row["note"]})
    frame_of_text = pd.DataFrame(texts).fillna("")
    told = [column for column in frame_of_text.columns if any(text.get(column) for text in texts)]
    kept = [name for name in frame_of_text.columns if name in told or name.startswith(("Ours", "Difference"))]
    return PaperTable(name, title, pd.DataFrame(numbers), frame_of_text.filter(kept), legend(mixed))


def _add_times(
    number: dict[str, Any], text: dict[str, Any], rows: Sequence[dict[str, Any]], ours: pd.DataFrame
) -> None:
    """Add the published time relative to the diagonal blocks, and ours for every trained model and task."""
    from analysis.paper_cells import time_ratio

    base = next(row["value"] for row in rows if row["unit"] == "minutes" and row["setting"] in ("", "diagonal 1/64"))
    number["ratio"] = number["value"] / base
    text["Published"] = f"{number['value']:g} min, {number['ratio']:.2f} × DiaBlo"
    trained = ours.dropna(subset=["step_seconds"]).drop_duplicates(["model", "task"])
    for model, task in trained[["model", "task"]].to_numpy():
        found = time_ratio(ours, number, f"{model} {task}")
        number[f"ours, {model} on {task}"] = found and found[0]
        text[f"Ours, {model} on {task}"] = f"{found[0]:.2f} ({found[1]})" if found else ""


def _about(row: dict[str, Any]) -> dict[str, Any]:
    decimals = 2 if row["table"] == "sparse_patterns" else 1
    return {
        "Model": NAMES.get(row["model"], row["model"]),
        "Method": NAMES.get(row["method"], row["method"]),
        "Setting": row["setting"],
        "Base": f"{row['quantizer']}, {row['bits']} bits" if row["quantizer"] else "",
        "Benchmark": row["benchmark"],
        "Trainable, printed": _percent(row["printed_percent"], 2),
        "Trainable, computed": _percent(row["computed_percent"], 2),
        "Published": _percent(row["value"], decimals),
    }


def _plain(cell: dict[str, Any]) -> dict[str, Any]:
    """Return a cell for the CSV, with maps and lists as text."""
    seeds = " ".join(f"{seed}={score}" for seed, score in (cell["by_seed"] or {}).items())
    return cell | {"by_seed": seeds or None, "mixed": "; ".join(cell["mixed"] or ()) or None}


def _score_texts(cell: dict[str, Any]) -> dict[str, str]:
    from analysis.tables import each_seed, marks

    if cell["ours"] is None:
        return dict.fromkeys(
            ("Ours", "Difference", "Interval over", "Each seed, %", "Learning rate", "Rate chosen"), ""
        )
    return {
        "Ours": f"{cell['ours']:.1f} ({cell['low']:.1f}–{cell['high']:.1f}){marks(cell['mixed'])}",
        "Difference": f"{cell['difference']:+.1f}",
        "Interval over": cell["interval_over"],
        "Each seed, %": each_seed(cell["by_seed"]),
        "Learning rate": f"{cell['learning_rate']:g}",
        "Rate chosen": cell["rate_chosen"],
    }


def _provenance(row: dict[str, Any]) -> str:
    parts = [f"copied from {row['copied_from']}" if row["copied_from"] else row["provenance"]]
    parts += [f"protocol {row['protocol']}"] if row["protocol"] else []
    parts += [f"loss on {row['loss_on']}"] if row["loss_on"] else []
    return ", ".join(parts)


def _percent(value: float, decimals: int) -> str:
    return "" if value != value else f"{value:.{decimals}f}"


def write_tables(tables: Sequence[PaperTable], out: Path) -> None:
    """Write every table as Markdown, LaTeX, CSV and HTML."""
    from experiments.runs.records import write_atomically

    for table in tables:
        for ending, text in (("md", table.markdown()), ("tex", table.latex()), ("csv", table.csv())):
            write_atomically(out / f"{table.name}.{ending}", text)
        write_atomically(out / f"{table.name}.html", table.html())


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m analysis.paper_tables", description="The paper's tables and ours.")
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUNS", help="run directories, or folders of them")
    parser.add_argument("--out", type=Path, default=Path("report/paper"), help="folder to write into")
    options = parser.parse_args(arguments)

    from analysis.load import find_runs, load_runs

    frame = load_runs(find_runs(options.runs)).frame
    write_tables([table(frame) for table in TABLES], options.out)
    print(options.out)


if __name__ == "__main__":
    run_command(main)
