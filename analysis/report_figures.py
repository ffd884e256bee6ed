"""The figures of a report, each with the entry that the page shows. They are saved by processes beside this one."""

from __future__ import annotations

import base64
import itertools
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import pandas as pd

from analysis.load import load_metrics, load_spectra, records
from analysis.plots import Picture, Trace, accuracy_by_parameters, gradient_norms, save
from analysis.plots_sweeps import accuracy_by_setting, learning_rates, time_and_memory
from analysis.plots_theory import condition_measured
from analysis.sweeps import failures, find_sweeps, sweep_table
from experiments.errors import UserError
from experiments.progress import WAIT, Bar
from experiments.runs.records import RunPaths

FEWEST_DRAWN = 3  # trained and scored settings that a figure of accuracy against size needs
COMPARED = ("lora", "diablo")  # methods whose gradients the paper's figure compares
Entry = dict[str, str]  # what the page shows of a figure: alt, caption and, when it is saved, source


class Figures:
    """Saves pictures; on leaving the context every entry has its `source`.

    An <img> keeps the ids of one SVG apart from the next one's.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._pool = ProcessPoolExecutor(mp_context=multiprocessing.get_context("fork"))
        self._begun: list[tuple[Entry, Future[tuple[Path, Path]]]] = []

    def add(self, picture: Picture) -> Entry:
        """Begin to save a picture and return its entry."""
        entry = {"alt": picture.alt, "caption": picture.caption}
        self._begun.append((entry, self._pool.submit(save, picture, self._folder)))
        return entry

    def __enter__(self) -> Figures:
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        self._pool.shutdown(cancel_futures=kind is not None)
        begun = self._begun if kind is None else []
        for entry, saved in Bar(begun, desc="figures", unit="figure", leave=False, delay=WAIT):
            svg, _png = saved.result()
            entry["source"] = "data:image/svg+xml;base64," + base64.b64encode(svg.read_bytes()).decode()


def accuracy_figure(
    number: int, heading: str, rows: pd.DataFrame, table: pd.DataFrame, figures: Figures
) -> Entry | None:
    """Return the figure of one section.

    None if there are so few settings that the table is enough, and for learning-rate sweeps, which have their own.
    """
    if rows.loc[rows["trainable_parameters"] > 0, "accuracy"].notna().sum() < FEWEST_DRAWN:
        return None
    if rows.drop_duplicates(["group", "learning_rate"])["group"].duplicated().any():
        return None
    if rows[["pattern", "quantizer"]].notna().to_numpy().any():
        return figures.add(accuracy_by_setting(f"accuracy_by_setting_{number}", heading, rows))
    methods = sorted(table["method"].unique())
    return figures.add(accuracy_by_parameters(f"accuracy_by_parameters_{number}", heading, rows, methods))


def gradient_pictures(frame: pd.DataFrame) -> tuple[list[Picture], list[str]]:
    """Return one picture for every model and task with runs of LoRA or DiaBlo, and a line for each that failed."""
    drawn: list[Picture] = []
    problems: list[str] = []
    trained = frame.dropna(subset=["trainable_parameters"]).drop_duplicates("run_id")
    for number, (_, part) in enumerate(trained.groupby(["model", "task"]), start=1):
        runs = records(part.sort_values(["label", "seed"]))
        model, task = runs[0]["model"], runs[0]["task"]
        chosen = _nearest_in_size(runs)
        traces = []
        for run in runs:
            if run["setting"] in chosen:
                try:
                    traces.append(Trace(run["label"], run["seed"], run["learning_rate"], load_metrics(run["path"])))
                except UserError as error:
                    problems.append(str(error))
        if traces:
            try:
                drawn.append(gradient_norms(f"gradient_norms_{number}", model, task, traces))
            except ValueError as error:
                problems.append(f"no gradient figure for {model} on {task}: {error}")
    return drawn, problems


def spectra_pictures(frame: pd.DataFrame) -> tuple[list[Picture], list[str]]:
    """Return one picture for every run that measured its spectra, and a line for each that cannot be read."""
    drawn: list[Picture] = []
    problems: list[str] = []
    about = frame.drop_duplicates("run_id").filter(["model", "task", "label", "seed", "run_id", "path"])
    for run in records(about.sort_values(["model", "task", "label", "seed"])):
        if RunPaths(run["path"]).spectra.is_file():
            title = f"{run['label']}, seed {run['seed']}, {run['model']} trained on {run['task']}"
            try:
                drawn.append(condition_measured(f"spectra_{run['run_id']}", title, load_spectra(run["path"])))
            except UserError as error:
                problems.append(str(error))
    return drawn, problems


def sweeps(frame: pd.DataFrame, figures: Figures) -> list[dict[str, Any]]:
    """Return every learning-rate sweep with its table, its figure and a line for each failed run."""
    methods = sorted(set(frame["method"]))
    return [
        {
            "title": f"{sweep.model} trained on {sweep.task}, {sweep.quantity}",
            "table": sweep_table(sweep),
            "figure": figures.add(learning_rates(f"learning_rates_{number}", sweep, methods)),
            "failures": failures(sweep),
        }
        for number, sweep in enumerate(find_sweeps(frame), start=1)
    ]


def cost_figures(frame: pd.DataFrame, figures: Figures) -> list[Entry]:
    """Return a figure of step time and memory for every model and task with several trained methods."""
    drawn: list[Entry] = []
    trained = frame.dropna(subset=["step_seconds"])
    for number, (model, task) in enumerate(sorted(set(zip(trained["model"], trained["task"], strict=True))), start=1):
        part = trained.loc[(trained["model"] == model) & (trained["task"] == task)]
        if len(set(part["label"])) >= FEWEST_DRAWN:
            title = f"{model} trained on {task}"
            drawn.append(figures.add(time_and_memory(f"time_and_memory_{number}", title, part)))
    return drawn


def _nearest_in_size(runs: Sequence[dict[str, Any]]) -> list[str]:
    """Return one setting of LoRA and one of DiaBlo with the nearest parameter counts, or the only one of them.

    Ties go to the pair with the lowest learning rates.
    """
    families = [{run["setting"]: run for run in runs if run["method"] == method} for method in COMPARED]
    pairs = itertools.product(*(family.values() for family in families if family))

    def distance(pair: Sequence[dict[str, Any]]) -> tuple[int, list[float]]:
        counts = [run["trainable_parameters"] for run in pair]
        return max(counts, default=0) - min(counts, default=0), [run["learning_rate"] for run in pair]

    return [run["setting"] for run in min(pairs, key=distance)]
