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
    OURS,
    PRIMARY,
    QUESTIONS,
    RETENTION,
    SIZES,
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
from analysis.results_tables import signed
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
        answer, texts, picture = evidence_spectra.parts(spectra, "spectra")
        condition = [answer, *texts, _figure(picture)]
        pictures.append(picture)
    for picture in pictures:
        save(picture, out)
    write_atomically(out / "comparisons.csv", pd.DataFrame(map(_flat, comparisons)).to_csv(index=False))
    write_atomically(out / "settings.csv", _table(settings).to_csv(index=False))
    write_atomically(out / "rates.csv", _rates(settings).to_csv(index=False))
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
        "the smallest difference that is found with 80 % power, before Holm's correction. Better or worse: Holm "
        f"p < 0.05 (*by less than {MARGIN}* if the interval lies within it); equal: it lies within ±{MARGIN}; "
        f"otherwise, and with fewer than {SEEDS_FOR_A_VERDICT} seeds: cannot say. *The paper* speaks of scores, where "
        "higher is better. This page is written by `python -m analysis.evidence`.",
        "## Answers",
        "\n".join([*(_answer(question, found) for question, found in answers), *answer_h]),
        _figure(pictures[0]),
        "## What would count against DiaBlo",
        "The findings are the registered ones. How each is decided was written after the runs "
        "(`analysis/evidence_against.py`), by intervals without Holm's correction; "
        f"fewer than {SEEDS_FOR_A_VERDICT} seeds decide nothing.",
        markdown(_against(settings, comparisons)),
        *(part for question, found in answers for part in _section(question, found, settings)),
        *section_h,
        "## Gain and forgetting",
        _figure(pictures[1]),
        "## Settings",
        "*NLL* is on GSM8K's 1,319 test solutions. *Forgotten* is the mean of what follows it: the NLL of Alpaca's "
        "instructions, ARC-easy's questions and Code Alpaca, after minus before. *MAWPS* is the accuracy of every seed "
        "on its 238 test problems, for the settings that were scored on it. A mark (!) means that the best rate is the "
        "smallest or largest one tried.",
        markdown(_settings(settings)),
        _figure(pictures[2]),
        "## What others measured at such sizes",
        "With its own learning rate each, five variants of LoRA on Qwen3-0.6B lie within 0.5 points, with a standard "
        "deviation of 0.2 to 0.4 over seeds (arXiv 2602.04998, MetaMathQA). In Thinking Machines' sweep of LoRA's rank "
        "the test NLL of repeated runs differs by at most 0.0003, and falls from 0.816 at rank 4 to 0.776 at 128: NLL "
        "separates what accuracy cannot.",
        "## Limits",
        "One model of 135 million parameters, one task, 1,024 rows per run: nothing here says how methods compare at "
        "7B, after a whole epoch, or on another task. Learning rates were chosen with one seed, and are half a decade "
        "apart: lora-r7 at its chosen rate is worse than lora-r4 at a higher one, so a step of the grid can cost as "
        "much as the margin. Parameters are exactly equal at rank 14 only. Full fine-tuning is trained and scored in "
        "float32; the others are scored with bf16 base weights and unmerged adapters in float32, but blocks in the "
        f"weight are rounded with it to bf16 ({_in_place(settings)}): what that costs was not measured. "
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


def _section(question: Question, found: Sequence[Comparison], settings: dict[str, Setting]) -> list[str]:
    if not found:
        return []
    beside = {"a": _accuracies, "c": _by_size, "g": _by_text}.get(question.letter, lambda _: "")(settings)
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
    paper = f"The paper: {question.paper}"
    return [f"## ({question.letter}) {question.title}", markdown(table), " ".join(filter(None, (beside, paper, rest)))]


def _accuracies(settings: dict[str, Setting]) -> str:
    """Return the secondary measure in a sentence."""
    scored = sorted((one for one in settings.values() if one.accuracy), key=lambda one: -float(np.mean(one.accuracy)))
    means = ", ".join(f"{one.name} {100 * float(np.mean(one.accuracy)):.1f} %" for one in scored)
    spread = [float(np.std(one.accuracy, ddof=1)) for one in scored if len(one.accuracy) > 1]
    told = f"MAWPS, 238 problems, mean over seeds: {means}"
    return f"{told}; seeds spread by {100 * float(np.mean(spread)):.0f} points." if spread else f"{told}."


def _by_size(settings: dict[str, Setting]) -> str:
    """Return the NLL of every size in a sentence."""
    sizes = [(ours, f"lora-{rank}") for ours, rank in SIZES]
    lines = [[settings[name] for name in names if name in settings] for names in zip(*sizes, strict=True)]
    told = ["; ".join(f"{one.name} ({one.percent:.2g} %) {one.nll(PRIMARY):.4f}" for one in line) for line in lines]
    return f"From fewer to more parameters: {'. '.join(told)}."


def _by_text(settings: dict[str, Setting]) -> str:
    """Return what DiaBlo forgets of each text in a sentence."""
    base, ours = settings[BASE], settings.get(OURS)
    if ours is None:
        return ""
    each = ", ".join(f"{name} {_signed(ours.nll(name) - base.nll(name))}" for name in RETENTION)
    return (
        "A mean of three texts, of which ARC-easy's answers, a fixed phrase of 7 tokens, change most: for "
        f"{OURS} {each}; the table of settings has each."
    )


def _against(settings: dict[str, Setting], comparisons: Sequence[Comparison]) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {"Finding": one.registered, "Found": one.found, "Differences, 95 % interval": one.numbers}
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
                **{
                    column: signed(setting.nll(name) - base.nll(name), 2) if setting is not base else ""
                    for column, name in zip(("Alpaca", "ARC-easy", "Code"), RETENTION, strict=True)
                },
                "MAWPS": " ".join(f"{100 * value:.0f} %" for value in setting.accuracy),
            }
        )
    return pd.DataFrame(rows)


def _in_place(settings: dict[str, Setting]) -> str:
    """Return the settings with blocks in the weight, by the share of their layers."""
    whole = [one.name for one in settings.values() if one.in_place == 1]
    partly = [f"{100 * one.in_place:.0f} % of {one.name}'s layers" for one in settings.values() if 0 < one.in_place < 1]
    return ", ".join([*whole, *partly]) or "none"


def _figure(picture: Picture) -> str:
    return f"![{picture.alt}]({picture.name}.png)\n\n*{picture.caption}*"


def _signed(value: float) -> str:
    return signed(value, 4)


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


def _rates(settings: dict[str, Setting]) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {"setting": name, "learning_rate": rate, "held_out_loss": loss, "chosen": rate == setting.rate}
            for name, setting in settings.items()
            for rate, loss in setting.tried
        ]
    )
