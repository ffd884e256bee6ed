"""The paper's tables with our runs beside them: published | ours | difference.

    python -m analysis.paper_tables runs --out report/paper     # <table>.md .tex .csv .html
    python -m analysis.paper_tables                             # without runs: what is published

Ours is blank where no run answers to a published row: the same model, method, size, task, benchmark and protocol.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.errors import run_command

if TYPE_CHECKING:
    import pandas as pd

    from analysis.stats import Interval

NAMES = {
    **{"llama2_7b": "LLaMA2-7B", "llama3_8b": "LLaMA3-8B", "llama_13b": "LLaMA-13B", "llama_7b": "LLaMA-7B"},
    **{"full": "Full fine-tuning", "lora": "LoRA", "dora": "DoRA", "pissa": "PiSSA", "milora": "MiLoRA", "smt": "SMT"},
    **{"diablo": "DiaBlo", "lori": "LoRI", "sparse": "Sparse", "chatgpt": "ChatGPT", "zero_shot": "no training"},
}


@dataclass(frozen=True)
class PaperTable:
    """One table: `numbers` for further work, `text` for readers, one row per published number in both."""

    name: str
    title: str
    numbers: pd.DataFrame
    text: pd.DataFrame

    @property
    def has_ours(self) -> bool:
        """Whether any published number has one of ours beside it."""
        return bool(self.numbers.filter(regex="^ours").notna().to_numpy().any())

    def markdown(self) -> str:
        from analysis.tables import markdown

        return f"## {self.title}\n\n{markdown(self.text)}"

    def latex(self) -> str:
        """A booktabs tabular; packages: booktabs."""
        text = self.text.replace({"−": "-", "–": "--", "×": "x", "†": "+"}, regex=True)
        style = text.style
        style.hide(axis="index").format(escape="latex").format_index(escape="latex", axis=1)
        return style.to_latex(hrules=True, column_format="l" * len(text.columns))

    def html(self) -> str:
        style = self.text.style.set_uuid(self.name).set_caption(self.title)
        style.hide(axis="index").format(escape="html").format_index(escape="html", axis=1)
        return style.to_html(cell_ids=False)

    def csv(self) -> str:
        return self.numbers.to_csv(index=False)


def commonsense(frame: pd.DataFrame) -> PaperTable:
    """Commonsense 170K, the mean of eight benchmarks, with both loss masks of ours.

    The LoRA and DoRA rows are the DoRA repository's, trained with the loss on prompt and answer; DiaBlo's own loss sees
    the answer alone. Ours has every method under both.
    """
    masks = {"loss on the answer": "diablo", "loss on prompt and answer": "llm_adapters"}
    return _paper_table("commonsense", "Commonsense 170K, mean of 8 benchmarks", "commonsense_170k", masks, frame)


def commonsense_per_task(frame: pd.DataFrame) -> PaperTable:
    """Commonsense 170K, every benchmark, as the baselines' own papers print it."""
    masks = {"loss on the answer": "diablo", "loss on prompt and answer": "llm_adapters"}
    return _paper_table("commonsense_per_task", "Commonsense 170K, the baselines", "commonsense_170k", masks, frame)


def arithmetic(frame: pd.DataFrame) -> PaperTable:
    """MetaMathQA to GSM8K and MATH. The baselines' MATH is scored by symbolic equality, DiaBlo's by Hendrycks' rule."""
    protocols = {"protocol diablo": "diablo", "protocol milora": "milora"}
    return _paper_table("arithmetic", "MetaMathQA to GSM8K and MATH", "metamathqa", protocols, frame)


def code_safety(frame: pd.DataFrame) -> PaperTable:
    """Code Alpaca to HumanEval, and SaferPaca to HEx-PHI."""
    title = "Code and safety: HumanEval and HEx-PHI"
    return _paper_table("code_safety", title, "code_alpaca saferpaca", {"protocol lori": "lori"}, frame)


def quantized(frame: pd.DataFrame) -> PaperTable:
    """Math 10K on quantised bases, the mean of four benchmarks."""
    title = "Math 10K on quantised bases, mean of 4 benchmarks"
    return _paper_table("quantized", title, "math_10k", {"protocol pyreft": "pyreft"}, frame)


def sparse_patterns(frame: pd.DataFrame) -> PaperTable:
    """The sparse patterns on GSM8K: accuracy, and training time over that of the diagonal blocks."""
    return _paper_table("sparse_patterns", "Sparse patterns, GSM8K", "gsm8k", {"protocol lori": "lori"}, frame)


def efficiency(frame: pd.DataFrame) -> PaperTable:
    """Training time over DiaBlo's. The paper's model and data are not known: ours has all that was trained."""
    trained = frame.dropna(subset=["step_seconds"]).drop_duplicates(["model", "task"])
    places = {f"{model} on {task}": f"{model} {task}" for model, task in trained[["model", "task"]].to_numpy()}
    tasks = " ".join(trained["task"])
    return _paper_table("efficiency", "Training time over DiaBlo's", tasks, places or {"": ""}, frame)


TABLES: tuple[Callable[[pd.DataFrame], PaperTable], ...] = (
    *(commonsense, commonsense_per_task, arithmetic, code_safety, quantized, sparse_patterns, efficiency),
)


def _paper_table(name: str, title: str, tasks: str, columns: dict[str, str], frame: pd.DataFrame) -> PaperTable:
    """`tasks`: the tasks of ours, by name; `columns`: heading → the protocol of ours below it, or its model and
    task.
    """
    import pandas as pd

    from analysis.load import records
    from analysis.published import read_published
    from analysis.tables import method_table

    published = read_published()
    rows = records(published.loc[published["table"] == name])
    ours = frame.loc[frame["task"].isin(tasks.split())]
    scored = method_table(ours) if len(ours) else pd.DataFrame()
    base = next((row["value"] for row in rows if row["method"] == "diablo" and row["unit"] == "minutes"), None)
    numbers, texts = [], []
    for row in rows:
        number, text = dict(row), _about(row)
        if row["unit"] == "minutes":
            number["ratio"] = row["value"] / base
            text["Published"] = f"{row['value']:g} min, {number['ratio']:.2f} × DiaBlo"
        for heading, wanted in columns.items():
            suffix = f", {heading}" if heading else ""
            if row["unit"] == "minutes":
                found = _time_ratio(ours, row, wanted if name == "efficiency" else f"{row['model']} {tasks}")
                text |= _time_texts(found, number["ratio"], suffix)
                number |= {f"ours{suffix}": found, f"difference{suffix}": found and found - number["ratio"]}
                continue
            cell = _cell(ours, scored, row, wanted)
            number |= {f"{key}{suffix}": value for key, value in cell.items() if key != "mixed"}
            text |= {f"{key}{suffix}": value for key, value in _score_texts(cell).items()}
        numbers.append(number)
        texts.append(text | {"Provenance": _provenance(row), "Note": row["note"]})
    frame_of_text = pd.DataFrame(texts).fillna("")
    told = [column for column in frame_of_text.columns if any(text.get(column) for text in texts)]
    kept = [name for name in frame_of_text.columns if name in told or name.startswith(("Ours", "Difference"))]
    return PaperTable(name, title, pd.DataFrame(numbers), frame_of_text.filter(kept))


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


def matching(frame: pd.DataFrame, row: dict[str, Any]) -> pd.DataFrame:
    """The rows of ours with the model, method, size or pattern, and quantised base of a published row."""
    same = frame["method"] == row["method"]
    if row["model"]:
        same &= frame["model"] == row["model"]
    if row["setting"]:
        same &= (frame["size"] == row["setting"]) | (frame["pattern"] == row["setting"])
    same &= frame["quantizer"].fillna("") == row["quantizer"]
    return frame.loc[same & (frame["bits"].astype("string").fillna("") == row["bits"])]


def _cell(ours: pd.DataFrame, scored: pd.DataFrame, row: dict[str, Any], protocol: str) -> dict[str, Any]:
    """Ours beside one published score, in percent. Of several settings that answer to it the one with most seeds."""
    from analysis.load import records

    empty = dict.fromkeys(("ours", "low", "high", "seeds", "learning_rate", "rate_chosen", "difference"))
    if scored.empty:
        return empty | {"mixed": []}
    benchmark, _, metric = row["benchmark"].partition(" pass@")
    found = matching(scored.dropna(subset=["accuracy"]), row)
    found = found.loc[(found["benchmark"] == benchmark) & (found["protocol"] == protocol)]
    if found.empty:
        return empty | {"mixed": []}
    best = records(found.sort_values("seeds", ascending=False, kind="stable"))[0]
    cell = {key: best[key] for key in ("seeds", "learning_rate", "rate_chosen", "mixed")}
    if metric in ("", "1"):
        cell |= {"ours": 100 * best["accuracy"], "low": 100 * best["low"], "high": 100 * best["high"]}
    else:
        runs = ours.loc[(ours["setting"] == best["setting"]) & (ours["benchmark"] == benchmark)]
        runs = runs.loc[runs["evaluation"] == best["evaluation"]]
        interval = _pass_at(runs.dropna(subset=["accuracy"]), int(metric))
        if interval is None:
            return empty | {"mixed": []}
        cell |= {"ours": 100 * interval.mean, "low": 100 * interval.low, "high": 100 * interval.high}
    return cell | {"difference": cell["ours"] - row["value"]}


def _pass_at(scored: pd.DataFrame, k: int) -> Interval | None:
    """pass@k of a setting's scored runs with its interval; None where a problem has fewer than k completions.

    A problem's item is the share of its completions that are right, so pass@k follows from it, problem by problem.
    """
    from analysis.load import records
    from analysis.stats import accuracy_interval
    from analysis.tables import item_arrays
    from eval.code import pass_at_k

    counts = {int(row["samples"]) for row in records(scored)}
    samples = min(counts, default=0)
    if len(counts) != 1 or samples < k:
        return None
    (items,) = item_arrays(scored)
    return accuracy_interval(np.vectorize(lambda share: pass_at_k(samples, round(share * samples), k))(items))


def _time_ratio(ours: pd.DataFrame, row: dict[str, Any], place: str) -> float | None:
    """Our median step time of a method over DiaBlo's, both on one machine; `place` is "model task"."""
    trained = ours.loc[(ours["model"] + " " + ours["task"]) == place]
    trained = trained.dropna(subset=["step_seconds"]).drop_duplicates("run_id")
    method, diablo = (matching(trained, row | {"method": name}) for name in (row["method"], "diablo"))
    if row["setting"] and row["method"] != "diablo":
        diablo = trained.loc[(trained["method"] == "diablo") & (trained["size"] == "N=64")]
    machines = {environment.get("device") for part in (method, diablo) for environment in part["environment"]}
    if method.empty or diablo.empty or len(machines) > 1:
        return None
    return float(np.median(method["step_seconds"]) / np.median(diablo["step_seconds"]))


def _time_texts(found: float | None, published: float, suffix: str) -> dict[str, str]:
    difference = "" if found is None else f"{found - published:+.2f}"
    return {
        f"Ours{suffix}": "" if found is None else f"{found:.2f} × DiaBlo",
        f"Difference{suffix}": difference,
    }


def _score_texts(cell: dict[str, Any]) -> dict[str, str]:
    from analysis.tables import marks

    if cell["ours"] is None:
        return dict.fromkeys(("Ours", "Difference", "Seeds", "Learning rate", "Rate chosen"), "")
    interval = "" if cell["low"] is None else f" ({cell['low']:.1f}–{cell['high']:.1f})"
    return {
        "Ours": f"{cell['ours']:.1f}{interval}{marks(cell['mixed'])}",
        "Difference": f"{cell['difference']:+.1f}",
        "Seeds": str(cell["seeds"]),
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
    """Every table as Markdown, LaTeX, CSV and HTML."""
    from experiments.records import write_atomically

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
