"""Tables of docs/results.md whose rows are scored runs, from the CSV files and run directories in results/."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import pandas as pd

from analysis.load import load_spectra
from analysis.published import read_published
from analysis.tables import markdown
from experiments import ROOT
from experiments.runs.records import read_json

RESULTS = ROOT / "results"
REFERENCE = "diablo-N24"  # of the registered comparison
RETENTION = ("alpaca_nll", "arc_easy_nll", "code_alpaca_nll")
NAMES = {
    **{"diablo": "DiaBlo", "lora": "LoRA", "dora": "DoRA", "pissa": "PiSSA", "milora": "MiLoRA", "lora_ga": "LoRA-GA"},
    **{"full": "full fine-tuning", "base": "untrained", "smt": "SMT", "s2ft": "S2FT", "paca": "PaCA", "ia3": "IA3"},
    **{"lori_d": "LoRI-D", "lori_s": "LoRI-S", "sparse": "sparse"},
}
QUANTIZERS = {
    **{("lora", ""): "LoRA", ("diablo", ""): "DiaBlo"},
    **{("lora", "nf"): "LoRA on NF (QLoRA)", ("lora", "gptq"): "LoRA on GPTQ", ("lora", "magr"): "LoRA on MagR"},
    **{("lora", "loftq"): "LoftQ", ("lora", "apiq"): "ApiQ-bw", ("diablo", "nf"): "DiaBlo on NF"},
    **{("diablo", "gptq"): "DiaBlo on GPTQ", ("diablo", "magr"): "DiaBlo on MagR"},
}


@cache
def read(name: str) -> pd.DataFrame:
    """Return a CSV file in results/; missing text is empty."""
    frame = pd.read_csv(RESULTS / name)
    texts = [column for column in frame if not pd.api.types.is_numeric_dtype(frame[column])]
    return frame.fillna(dict.fromkeys(texts, ""))


def each(frame: Any) -> list[Any]:
    """Return the rows of a frame, with its columns as attributes."""
    return list(frame.itertuples())


def groups(frame: Any, by: list[str]) -> list[tuple[Any, Any]]:
    """Return the parts of a frame with equal values of columns, in the frame's order, each behind these values."""
    return list(frame.groupby(by, sort=False))


def percent(value: Any) -> str:
    return f"{100 * value:.1f}"


def signed(value: float, digits: int = 1) -> str:
    return f"{value:+.{digits}f}".replace("-", "−")


def _score(row: Any) -> str:
    return f"{percent(row.accuracy)} ({percent(row.low)}–{percent(row.high)})"


def _seeds(row: Any) -> str:
    return " · ".join(percent(float(pair.split("=")[1])) for pair in str(row.by_seed).split())


def _name(row: Any) -> str:
    name = NAMES.get(row.method, row.method)
    return f"{name} {row.size}".strip() if row.method != "sparse" else str(row.size)


def methods(experiment: str, best_first: bool = False) -> str:
    """Return the table of an experiment that has one benchmark."""
    frame = read(f"{experiment}/table.csv")
    if best_first:
        frame = frame.sort_values("accuracy", ascending=False)
    rows = [
        {
            "Method": _name(row),
            "Trained": f"{row.trainable_parameters:,}",
            "Of base": f"{row.percent_of_base:.2f} %",
            "Learning rate": "" if pd.isna(row.learning_rate) else f"{row.learning_rate:g}",
            "Accuracy, % (95 %)": _score(row),
            "Each seed": _seeds(row),
            "Step ÷ frozen floor": ""
            if pd.isna(row.step_time_ratio)
            else f"{row.step_time_ratio:.2f} ({row.step_time_low:.2f}–{row.step_time_high:.2f})",
        }
        for row in each(frame)
    ]
    return markdown(pd.DataFrame(rows))


def items(experiment: str) -> str:
    """Return the number of test items of an experiment that has one benchmark."""
    (number,) = set(read(f"{experiment}/table.csv")["n"])
    return f"{number:,}"


def base_parameters(experiment: str) -> str:
    """Return the size of the base model, which full fine-tuning trains."""
    (number,) = read(f"{experiment}/table.csv").query("method == 'full'")["trainable_parameters"]
    return f"{number:,}"


def seed_gap(experiment: str, label: str, benchmark: str = "arith") -> str:
    """Return how far the seeds of a setting lie apart, in points."""
    (text,) = read(f"{experiment}/table.csv").query("label == @label and benchmark == @benchmark")["by_seed"]
    scores = [float(pair.split("=")[1]) for pair in text.split()]
    return f"{100 * (max(scores) - min(scores)):.1f}"


def patterns() -> str:
    """Return the sparse patterns with their difference to the diagonal."""
    compared = {row.first_label: row for row in each(read("sparse_patterns_tiny/comparisons.csv"))}
    rows = []
    for row in each(read("sparse_patterns_tiny/table.csv").sort_values("accuracy", ascending=False)):
        other = compared.get(row.label)
        rows.append(
            {
                "Pattern": row.pattern,
                "Learning rate": f"{row.learning_rate:g}",
                "Accuracy, % (95 %)": _score(row),
                "Each seed": _seeds(row),
                "Minus diagonal, points": "" if other is None else _interval(other),
                "p (Holm)": "" if other is None else f"{other.p_holm:.2f}",
                "Smallest found": "" if other is None else f"{100 * other.smallest:.1f}",
            }
        )
    return markdown(pd.DataFrame(rows))


def _interval(row: Any) -> str:
    return f"{signed(100 * row.mean)} ({signed(100 * row.low)} to {signed(100 * row.high)})"


def standing(experiment: str) -> list[str]:
    """Return the comparisons of an experiment whose Holm p is below 0.05, as lines."""
    found = read(f"{experiment}/comparisons.csv").query("p_holm < 0.05").sort_values("p_holm")
    return [
        f"{row.first_label} − {row.second_label}: {_interval(row)} points, p = {row.p_holm:.2g} "
        f"(Holm over {row.family:.0f} tests)"
        for row in each(found)
    ]


def quantised() -> str:
    frame = read("quantized_tiny/table.csv")
    frame = frame.assign(row=[QUANTIZERS[row.method, row.quantizer] for row in each(frame)])
    frame = frame.assign(bits=frame["bits"].map(lambda bits: "" if pd.isna(bits) else f"{float(bits):.0f} bits"))
    cells = {(row.row, row.bits): _score(row) for row in each(frame)}
    columns = {"": "full precision", "4 bits": "4 bits", "2 bits": "2 bits"}
    return markdown(
        pd.DataFrame(
            {"Adapter on base": name, **{title: cells.get((name, key), "") for key, title in columns.items()}}
            for name in dict.fromkeys(QUANTIZERS.values())
        )
    )


def evidence() -> str:
    """Return the settings of the registered comparison with their difference to DiaBlo in question (a) or (b)."""
    settings = read("evidence/settings.csv").sort_values("gsm8k_nll")
    base = settings.query("setting == 'base'").iloc[0]
    pairs = [row for row in each(read("evidence/comparisons.csv")) if row.question in "abc"]
    compared = {row.second: row for row in sorted(pairs, key=lambda row: (row.first == REFERENCE, row.question != "c"))}
    rows = []
    for row in each(settings):
        other = compared.get(row.setting)
        forgotten = sum(getattr(row, name) - base[name] for name in RETENTION) / len(RETENTION)
        difference = (
            "" if other is None else f"{signed(-other.mean, 4)} ({signed(-other.high, 4)} to {signed(-other.low, 4)})"
        )
        rows.append(
            {
                "Setting": row.setting,
                "Trained": f"{row.percent_of_base:.3g} %",
                "Learning rate": "" if pd.isna(row.learning_rate) else f"{row.learning_rate:g}, best of {row.tried}",
                "Seeds": row.seeds,
                "NLL": f"{row.gsm8k_nll:.4f}",
                "Minus DiaBlo": difference,
                "DiaBlo is": "" if other is None else f"{other.verdict} ({other.first.removeprefix('diablo-')})",
                "Forgotten": "" if row.setting == "base" else signed(forgotten, 3),
            }
        )
    return markdown(pd.DataFrame(rows))


def verdict(other: str) -> str:
    """Return the registered verdict on DiaBlo against a setting on the primary measure."""
    return str(_registered(other).verdict)


def smallest(other: str) -> str:
    """Return the smallest difference to a setting that could have been found, in nats per token."""
    return f"{_registered(other).smallest:.3f}"


def _registered(other: str) -> Any:
    found = read("evidence/comparisons.csv")
    (row,) = each(
        found.loc[found["question"].isin(["a", "b"]) & (found["first"] == REFERENCE) & (found["second"] == other)]
    )
    return row


def benchmarks(experiment: str) -> str:
    """Return an experiment of several tasks: benchmarks as rows, settings as columns."""
    frame = read(f"{experiment}/table.csv")
    frame = frame.assign(column=[_name(row) for row in each(frame)])
    columns = list(dict.fromkeys(frame["column"]))
    rows = []
    for (task, protocol, benchmark, metric), part in groups(frame, ["task", "protocol", "benchmark", "metric"]):
        cells = {row.column: _score(row) for row in each(part)}
        rows.append(
            {
                "Task, protocol": f"{task}, {protocol}",
                "Benchmark": benchmark if metric == "accuracy" else f"{benchmark}, {metric}",
                "Rows": f"{part['n'].iloc[0]:,}",
                **{f"{name}, %": cells.get(name, "") for name in columns},
            }
        )
    return markdown(pd.DataFrame(rows))


def rates(experiment: str) -> str:
    """Return the learning rates that were chosen, with the held-out loss of each rate tried."""
    rows = []
    for (task, method), part in groups(read(f"{experiment}/learning_rates.csv"), ["task", "method"]):
        tried = part.sort_values("learning_rate")
        chosen = tried.loc[tried["chosen"], "learning_rate"].item()
        at_edge = chosen in (tried["learning_rate"].min(), tried["learning_rate"].max())
        rows.append(
            {
                "Task": task,
                "Method": method,
                "Chosen": f"{chosen:g}{', at the edge of the grid' if at_edge else ''}",
                "Held-out loss at each rate": " · ".join(f"{r.learning_rate:g}: {r.loss:.3f}" for r in each(tried)),
            }
        )
    return markdown(pd.DataFrame(rows))


def spectra() -> str:
    """Return what one block covers of the inputs and output gradients, at the first and last measured step."""
    rows = []
    for path in sorted((RESULTS / "spectra_tiny" / "runs").iterdir()):
        frame = load_spectra(path)
        for (step, side), part in groups(frame, ["step", "side"]):
            if step not in (frame["step"].min(), frame["step"].max()):
                continue
            rows.append(
                {
                    "Trained": NAMES[path.name.split("-")[1]],
                    "Step": step,
                    "Of": "inputs X" if side == "X" else "output gradients g_Y",
                    "One block covers, %": percent(part["covered"].mean()),
                    "Least": percent(part["covered_least"].min()),
                    "Most": percent(part["covered_most"].max()),
                    "As many largest directions, %": percent(part["energy"].mean()),
                }
            )
    return markdown(pd.DataFrame(rows))


def parameters() -> str:
    """Return the trained shares that the paper prints and those counted by the plan from the architecture."""
    from experiments.plan.compose import plan
    from experiments.plan.counting import count

    frame = read_published().dropna(subset=["printed_percent"])
    frame = frame.loc[frame["method"].isin(["diablo", "lora"])]
    rows = []
    for row in each(frame.drop_duplicates(["table", "model", "method", "setting"])):
        task = {"commonsense": "commonsense_170k", "arithmetic": "metamathqa", "code_safety": "code_alpaca"}[row.table]
        size, number = str(row.setting).split("=")
        key = {"N": "num_blocks", "r": "r"}[size]
        (config,) = plan(
            [f"model={row.model}", f"method={row.method}", f"task={task}", "recipe.learning_rate=1e-3",
             f"method.adapter.{key}={number}"]
        )  # fmt: skip
        found = count(config)
        grouped = found.ungrouped
        rows.append(
            {
                "Model": row.model,
                "Method": f"{NAMES[row.method]} {row.setting}",
                "Target modules": " ".join(
                    name.split("_")[0] for name in config.mapping["method"]["adapter"]["target_modules"]
                ),
                "The paper prints": f"{row.printed_percent:g} %",
                "Counted": f"{found.trainable:,} = {found.percent:.3f} %",
                "Counted without grouped-query attention": ""
                if grouped is None
                else f"{grouped:,} = {100 * grouped / found.base:.3f} %",
            }
        )
    return markdown(pd.DataFrame(rows))


def provenance(folder: str) -> str:
    """Return on which device and by which commits the records of a folder of runs were made."""
    found = [read_json(path)["environment"] for path in sorted((RESULTS / folder / "runs").glob("*/train.json"))]
    return f"{len(found)} runs on {', '.join(_distinct(e['device'] for e in found))}; {described(found)}"


def described(environments: Iterable[dict[str, Any]]) -> str:
    """Return versions and commits of records; a commit whose tree was not clean has a plus sign."""
    found = list(environments)
    commits = _distinct(f"`{e['commit'][:7]}{'+' if e['dirty'] else ''}`" for e in found)
    torch = _distinct(e["torch"] for e in found)
    return f"torch {', '.join(torch)}; {'commit' if len(commits) == 1 else 'commits'} {', '.join(commits)}"


def _distinct(values: Iterable[str]) -> list[str]:
    return sorted(set(values))


FUNCTIONS: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        *(
            methods,
            items,
            base_parameters,
            seed_gap,
            patterns,
            standing,
            quantised,
            evidence,
            verdict,
            smallest,
            benchmarks,
            rates,
        ),
        *(spectra, parameters, provenance),
    )
}
