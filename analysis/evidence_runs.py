"""The questions of docs/evidence.md, the settings run to answer them, and their comparisons."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import pandas as pd
from statsmodels.stats.multitest import multipletests

from analysis.load import Runs, records
from analysis.nll import Difference, Items, nll_difference, verdict
from experiments.errors import UserError
from experiments.runs.config_files import read_config
from experiments.runs.records import RunPaths, TrainRecord, read_record

PRIMARY = "gsm8k_nll"
RETENTION = ("alpaca_nll", "arc_easy_nll", "code_alpaca_nll")
ACCURACY = "mawps"
OURS, BASE = "diablo-N24", "base"
MODULES = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
BATCH = 16


@dataclass(frozen=True)
class Question:
    """Pairs of settings compared on `benchmarks` (several: their unweighted mean), and the paper's statement."""

    letter: str
    title: str
    pairs: tuple[tuple[str, str], ...]
    paper: str
    benchmarks: tuple[str, ...] = (PRIMARY,)


def _against(ours: str, *others: str) -> tuple[tuple[str, str], ...]:
    return tuple((ours, other) for other in others)


SIZES = (("diablo-N96", "r4"), ("diablo-N48", "r7"), (OURS, "r14"), ("diablo-N12", "r28"))  # of about equal budgets
LOW_RANK = ("lora", "dora", "pissa", "milora")
METHODS = tuple(  # the pairs of question (a)
    (ours, other) for ours, rank in (SIZES[2], SIZES[0]) for other in (*(f"{name}-{rank}" for name in LOW_RANK), "full")
)
PATTERNS = ("permuted_block", "random_block", "random_row", "random_column", "random_entry")
MASKED = ", loss on prompt and answer"
QUESTIONS = (
    Question(
        "a",
        "DiaBlo against low-rank methods at equal parameters, and against full fine-tuning",
        METHODS,
        "DiaBlo is above LoRA, DoRA, PiSSA and MiLoRA, and at or above full fine-tuning.",
    ),
    Question(
        "b",
        "The diagonal against other patterns of the same density",
        _against(OURS, *(f"sparse-{pattern}" for pattern in PATTERNS), "smt-n709"),
        "GSM8K with LLaMA3-8B at 1/64: the diagonal is best; random blocks, rows, columns and entries are below it.",
    ),
    Question(
        "c",
        "N against rank",
        tuple((ours, f"lora-{rank}") for ours, rank in SIZES),
        "N=64 and N=128 score alike; scores rise slowly with more parameters.",
    ),
    Question(
        "d",
        "On one base quantised by MagR to 2 bits",
        (("diablo-N24-magr2", "lora-r14-magr2"),),
        "MagR + DiaBlo is above the other methods' rows, which use other quantisers.",
    ),
    Question(
        "e",
        "Loss on prompt and answer, against loss on the answer only",
        ((f"{OURS}{MASKED}", OURS), (f"lora-r14{MASKED}", "lora-r14"), (f"{OURS}{MASKED}", f"lora-r14{MASKED}")),
        "Not compared: the paper's rows mix both.",
    ),
    Question(
        "f",
        "Which modules, at 2.1 to 2.2 million parameters",
        _against("diablo-N32", "diablo-N8, q k v", "diablo-N24, up down", "diablo-N48, q k v o gate up down"),
        "Not compared.",
    ),
    Question(
        "g",
        "Forgetting: the NLL of three other kinds of text",
        METHODS,
        "Not measured.",
        RETENTION,
    ),
    Question(
        "batch",
        "Batches of 64 rows",
        ((f"{OURS}, batch 64", "lora-r14, batch 64"), (f"{OURS}, batch 64", OURS), ("lora-r14, batch 64", "lora-r14")),
        "Not compared.",
    ),
)


@dataclass(frozen=True)
class Setting:
    """A setting at its chosen learning rate: its seeds, and the NLL of every row, `(seeds, rows)` per benchmark."""

    name: str
    percent: float
    rate: float | None
    tried: list[tuple[float, float]]  # learning rate, loss on the held-out rows; NaN if it diverged
    seeds: list[int]
    items: dict[str, Items]
    evaluations: dict[str, str]  # the folder under eval/ of each benchmark, which names protocol and settings
    in_place: float = 0.0  # share of the trained layers whose blocks are in the weight
    accuracy: list[float] = field(default_factory=list)

    def nll(self, *benchmarks: str) -> float:
        return float(np.mean([self.items[name].mean() for name in benchmarks]))

    def by_seed(self, *benchmarks: str) -> Items:
        return np.mean([self.items[name].mean(axis=1) for name in benchmarks], axis=0)

    @property
    def at_edge(self) -> bool:
        rates = [rate for rate, _ in self.tried]
        return len(rates) > 1 and self.rate in (min(rates), max(rates))


@dataclass(frozen=True)
class Comparison:
    """First minus second, for one question; `verdict` is about the first."""

    question: str
    first: str
    second: str
    difference: Difference
    p_holm: float
    verdict: str


def settings_of(runs: Runs) -> dict[str, Setting]:
    """Return every setting with a finished seed, by name."""
    scored, answered = runs.likelihood.dropna(subset=["nll"]), runs.frame.loc[runs.frame["benchmark"] == ACCURACY]
    every = pd.concat([runs.frame, runs.likelihood]).drop_duplicates("run_id")
    found: dict[str, Setting] = {}
    for _, of_group in every.groupby("group", sort=False):
        part = scored.loc[scored["run_id"].isin(of_group["run_id"])]
        if part.empty:
            continue
        rates = part["learning_rate"].unique()
        if len(rates) > 1:  # the chosen rate changed when the grid grew: use the registered choice
            rates = of_group.loc[of_group["held_out_loss"].idxmin(), ["learning_rate"]].to_numpy()
            part = part.loc[part["learning_rate"] == rates[0]]
        whole = part.groupby("seed").filter(lambda rows: set(rows["benchmark"]) >= {PRIMARY, *RETENTION})
        if whole.empty:
            continue
        first = records(of_group)[0]
        seeds = sorted(int(seed) for seed in whole["seed"].unique())
        tried = of_group.sort_values("seed").drop_duplicates("learning_rate").sort_values("learning_rate")
        hits = answered.loc[answered["run_id"].isin(whole["run_id"])].sort_values("seed")["accuracy"].dropna()
        name = _name(first)
        if name in found:
            raise UserError(f"{first['path']}: a second setting named {name}: distinguish their names")
        folders = whole.groupby("benchmark")["evaluation"].unique()
        if several := [list(of_one) for of_one in folders if len(of_one) > 1]:
            raise UserError(f"{name} was scored in several ways: {' and '.join(several[0])}: score it again")
        found[name] = Setting(
            name=name,
            percent=float(first["percent_of_base"]),
            rate=None if name == BASE else float(rates[0]),
            tried=[(row["learning_rate"], row["held_out_loss"]) for row in records(tried)] if name != BASE else [],
            seeds=seeds,
            items={
                str(benchmark): np.stack(list(rows.sort_values("seed")["items"]))
                for benchmark, rows in whole.groupby("benchmark")
            },
            in_place=_in_place(RunPaths(first["path"])),
            evaluations={str(benchmark): str(of_one[0]) for benchmark, of_one in folders.items()},
            accuracy=[float(value) for value in hits],
        )
    if BASE not in found:
        raise UserError("no finished run of method=base: forgetting is measured against it")
    return found


def _name(row: dict[str, Any]) -> str:
    """Return a setting's label, with whatever distinguishes it from the other settings."""
    config = read_config(RunPaths(row["path"]))
    name, modules = row["label"], list(config.task.target_modules or ())
    if row["method"] not in (BASE, "full", "smt") and modules != MODULES:
        name += ", " + " ".join(module.removesuffix("_proj") for module in modules)
    if config.recipe.batch_size != BATCH:
        name += f", batch {config.recipe.batch_size}"
    if row["loss_on"] != "answer":
        name += MASKED
    return name


def _in_place(run: RunPaths) -> float:
    modes = list(read_record(run.train_record, TrainRecord).forward_modes.values())
    return modes.count("in_place") / len(modes) if modes else 0.0


def comparisons_of(settings: dict[str, Setting]) -> list[Comparison]:
    """Return the registered comparisons of settings with at least two common seeds, Holm-corrected per question."""
    found = []
    for question in QUESTIONS:
        family = []
        for first, second in question.pairs:
            if first in settings and second in settings:
                _check_same_targets(settings[first], settings[second], question.benchmarks)
                pair = common_seeds(settings[first], settings[second], question.benchmarks)
                if pair is not None:
                    family.append((first, second, nll_difference(*pair)))
        if not family:
            continue
        corrected = cast(Sequence[float], multipletests([row[2].p for row in family], method="holm")[1])
        for (first, second, difference), p in zip(family, corrected, strict=True):
            found.append(Comparison(question.letter, first, second, difference, float(p), verdict(difference, p)))
    return found


def _check_same_targets(first: Setting, second: Setting, names: Sequence[str]) -> None:
    """Raise a UserError if two settings were scored by other protocols or settings, so on other tokens."""
    for name in names:
        ours, theirs = first.evaluations[name], second.evaluations[name]
        if ours != theirs:
            raise UserError(
                f"{first.name} was scored as {ours} and {second.name} as {theirs}: their NLL is of different tokens: "
                f"score one of them again"
            )


def common_seeds(first: Setting, second: Setting, names: Sequence[str]) -> tuple[list[Items], list[Items]] | None:
    """Return both settings' NLL of the seeds that they share, one array per benchmark; None if it is fewer than two."""
    seeds = [seed for seed in first.seeds if seed in second.seeds]
    if len(seeds) < 2:
        return None
    return (
        [first.items[name][[first.seeds.index(seed) for seed in seeds]] for name in names],
        [second.items[name][[second.seeds.index(seed) for seed in seeds]] for name in names],
    )


def about(runs: Runs) -> dict[str, Any]:
    """Return the devices, torch versions, commits, training seconds and number of runs behind the page."""
    frame = runs.frame.drop_duplicates("run_id").dropna(subset=["steps"])
    environments = [row for row in frame["environment"] if isinstance(row, dict)]
    return {
        "runs": len(frame),
        "scored": len(set(runs.likelihood.dropna(subset=["nll"])["run_id"])),
        "devices": sorted({row["device"] for row in environments}),
        "torch": sorted({row["torch"] for row in environments}),
        "commits": sorted({row["commit"] or "unknown" for row in environments}),
        "seconds": math.fsum(frame["train_seconds"].dropna()),
    }
