"""The page of docs/evidence.md. Every number and verdict is computed; unfinished settings are listed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis import evidence_spectra
from analysis.evidence_against import findings
from analysis.evidence_runs import (
    BASE,
    PRIMARY,
    QUESTIONS,
    RETENTION,
    Comparison,
    Question,
    Setting,
    about,
    comparisons_of,
    settings_of,
)
from analysis.load import load_runs
from analysis.nll import MARGIN, SEEDS_FOR_A_VERDICT
from analysis.plots import Picture, save
from analysis.plots_evidence import differences, rates, trade_off
from analysis.tables import markdown
from experiments.runs.records import write_atomically


def write_evidence(directories: Sequence[Path], out: Path, spectra: Path | None = None) -> Path:
    """Write the page, its figures and its tables, and return the page's path.

    Args:
        spectra: the run that measured the theory's condition, question (h).
    """
    runs = load_runs(directories, quiet=True)
    settings = settings_of(runs)
    comparisons = comparisons_of(settings)
    pictures = [differences(comparisons), trade_off(settings), rates(settings)]
    condition: list[str] = []
    if spectra is not None:
        texts, picture = evidence_spectra.parts(spectra, "spectra")
        condition = [evidence_spectra.answer(spectra), *texts, _figure(picture)]
        pictures.append(picture)
    for picture in pictures:
        save(picture, out)
    write_atomically(out / "comparisons.csv", pd.DataFrame(map(_flat, comparisons)).to_csv(index=False))
    write_atomically(out / "settings.csv", _table(settings).to_csv(index=False))
    write_atomically(out / "evidence.md", page(settings, comparisons, pictures, about(runs), condition))
    return out / "evidence.md"


def page(
    settings: dict[str, Setting],
    comparisons: Sequence[Comparison],
    pictures: Sequence[Picture],
    about: dict[str, Any],
    condition: Sequence[str] = (),
) -> str:
    """Return the page in Markdown; its figures are files in the same folder.

    Args:
        condition: the answer to question (h), and the texts of its section.
    """
    answer_h, section_h = condition[:1], condition[1:]
    answers = [(question, [c for c in comparisons if c.question == question.letter]) for question in QUESTIONS]
    devices, torch, hours = " and ".join(about["devices"]), ", ".join(about["torch"]), about["seconds"] / 3600
    parts = [
        "# Evidence on real weights",
        f"SmolLM2-135M-Instruct, 64 steps of 16 rows of GSM8K and MAWPS: {about['runs']} runs, {about['scored']} of "
        f"them scored, on {devices} (torch {torch}), {hours:.1f} hours of training in all. Questions, design and "
        "tests were registered before the first run: [docs/evidence.md](../../docs/evidence.md).",
        "A difference is of NLL in nats per token, first minus second: below 0 the first is better. *Smallest* is "
        "the smallest difference that is found with 80 % power. Better or worse: Holm p < 0.05; equal: the interval "
        f"lies within ±{MARGIN}; otherwise, and with fewer than {SEEDS_FOR_A_VERDICT} seeds: cannot say. This page "
        "is written by `python -m analysis.evidence`.",
        "## Answers",
        "\n".join([*(_answer(question, found) for question, found in answers), *answer_h]),
        _figure(pictures[0]),
        "## What would count against DiaBlo",
        "As registered. *Yes*: it was found.",
        markdown(_against(settings, comparisons)),
        *(part for question, found in answers for part in _section(question, found)),
        *section_h,
        "## Gain and forgetting",
        _figure(pictures[1]),
        "## Settings",
        f"*NLL* is on GSM8K's 1,319 test solutions. *Forgotten* is the mean of {', '.join(RETENTION)}, after minus "
        "before. *MAWPS* is the accuracy of every seed on its 238 test problems, for the settings that were scored on "
        "it. A mark (!) means that the best learning rate is the smallest or largest one tried.",
        markdown(_settings(settings)),
        _figure(pictures[2]),
        "## What others measured at such sizes",
        "With its own learning rate each, five variants of LoRA on Qwen3-0.6B lie within 0.5 points, with a standard "
        "deviation of 0.2 to 0.4 over seeds (arXiv 2602.04998, MetaMathQA). In Thinking Machines' sweep of LoRA's rank "
        "the test NLL of repeated runs differs by at most 0.0003, and falls from 0.816 at rank 4 to 0.776 at 128: NLL "
        "separates what accuracy cannot.",
        "## Limits",
        "One model of 135 million parameters, one task, 1,024 rows per run: nothing here says how methods compare at "
        "7B, after a whole epoch, or on another task. Learning rates were chosen with one seed. Full fine-tuning is "
        "trained and scored in float32; the others are scored with bf16 base weights and unmerged adapters in float32. "
        "Forgetting is measured at the learning rate that is best for the task; at a smaller one a method would forget "
        "less and gain less. Holm's correction is within a question, not over the page.",
        f"## Commits\n\n{', '.join(about['commits'])}",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _answer(question: Question, found: Sequence[Comparison]) -> str:
    said = [f"{row.first} − {row.second}: **{row.verdict}** ({_signed(row.difference.mean)})" for row in found]
    missing = len(question.pairs) - len(found)
    if missing:
        said.append(f"{missing} {'comparison' if missing == 1 else 'comparisons'} not run yet")
    return f"* **({question.letter}) {question.title}.** {'; '.join(said)}. The paper: {question.paper}"


def _section(question: Question, found: Sequence[Comparison]) -> list[str]:
    if not found:
        return []
    on = "" if question.benchmarks == (PRIMARY,) else f" Measured on {', '.join(question.benchmarks)}."
    table = pd.DataFrame(
        [
            {
                "First − second": f"{row.first} − {row.second}",
                "Seeds": row.difference.seeds,
                "Difference": _signed(row.difference.mean),
                "95 % interval": f"{_signed(row.difference.low)} to {_signed(row.difference.high)}",
                "Smallest": f"{row.difference.smallest:.4f}",
                f"p, Holm over {len(found)}": f"{row.p_holm:.2g}",
                "The first is": row.verdict,
            }
            for row in found
        ]
    )
    lacking = [
        f"{first} − {second}"
        for first, second in question.pairs
        if (first, second) not in {(c.first, c.second) for c in found}
    ]
    rest = f"Not run yet: {'; '.join(lacking)}." if lacking else ""
    paper = f"The paper: {question.paper}{on}"
    return [f"## ({question.letter}) {question.title}", markdown(table), " ".join(filter(None, (paper, rest)))]


def _against(settings: dict[str, Setting], comparisons: Sequence[Comparison]) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {"Finding": one.registered, "Found": one.found, "First minus second, 95 % interval": one.numbers}
            for one in findings(settings, comparisons)
        ]
    )


def _settings(settings: dict[str, Setting]) -> pd.DataFrame:
    base = settings[BASE]
    rows = []
    for setting in sorted(settings.values(), key=lambda one: one.nll(PRIMARY)):
        rate = (
            ""
            if setting.rate is None
            else f"{setting.rate:g}{' (!)' if setting.at_edge else ''} of {len(setting.tried)}"
        )
        rows.append(
            {
                "Setting": setting.name,
                "Trained": f"{setting.percent:.3g} %",
                "Learning rate": rate,
                "Seeds": len(setting.seeds),
                "NLL": f"{setting.nll(PRIMARY):.4f}",
                "Each seed": " ".join(f"{value:.3f}" for value in setting.by_seed(PRIMARY)),
                "Forgotten": _signed(setting.nll(*RETENTION) - base.nll(*RETENTION)) if setting is not base else "",
                "MAWPS": " ".join(f"{100 * value:.0f} %" for value in setting.accuracy),
            }
        )
    return pd.DataFrame(rows)


def _figure(picture: Picture) -> str:
    return f"![{picture.alt}]({picture.name}.png)\n\n*{picture.caption}*"


def _signed(value: float) -> str:
    return f"{value:+.4f}".replace("-", "−")


def _flat(comparison: Comparison) -> dict[str, Any]:
    return {key: value for key, value in asdict(comparison).items() if key != "difference"} | asdict(
        comparison.difference
    )


def _table(settings: dict[str, Setting]) -> pd.DataFrame:
    rows = []
    for setting in settings.values():
        nll = {name: setting.nll(name) for name in (PRIMARY, *RETENTION)}
        seeds = " ".join(f"{value:.4f}" for value in setting.by_seed(PRIMARY))
        rows.append(
            {"setting": setting.name, "percent_of_base": setting.percent, "learning_rate": setting.rate}
            | {"tried": len(setting.tried), "at_edge": setting.at_edge, "seeds": len(setting.seeds)}
            | nll
            | {"each_seed": seeds, "accuracy": np.mean(setting.accuracy) if setting.accuracy else None}
        )
    return pd.DataFrame(rows)
