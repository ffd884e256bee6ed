"""Question (h) of docs/evidence.md: the theory's condition on real activations, from the spectra of one run."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from analysis.load import load_spectra
from analysis.plots import Picture
from analysis.plots_theory import condition_measured
from analysis.results_tables import described, groups, percent
from analysis.tables import markdown
from experiments.runs.records import RunPaths, TrainRecord, read_record

TITLE = "Does the theory's condition hold on real activations?"
PAPER = "If each block of X, or of g_Y, has the column space of the whole, the blocks reach the optimum of all of W."
HOLDS = 0.999  # of the squared norm, which rounding leaves of 1
SIDES = {"X": "inputs X", "g_Y": "output gradients g_Y"}
SAME_INPUT = ("q_proj", "k_proj", "v_proj")


def answer(spectra: pd.DataFrame) -> str:
    """Return the answer in one line, of the last measured step; `spectra` is from `load_spectra`."""
    last = spectra.loc[spectra["step"] == spectra["step"].max()]
    held = [part["covered_least"].max() >= HOLDS for _, part in groups(last, ["layer", "module"])]
    found = f"**{'yes' if all(held) else 'no'}**, it does in {sum(held)} of {len(held)} layers"
    shares = [f"{percent(part['covered'].mean())} % of the {SIDES[side]}" for (side,), part in groups(last, ["side"])]
    return f"* **(h) {TITLE}** {found}: one block covers {' and '.join(shares)} on average. The paper: {PAPER}"


def parts(run: Path, name: str) -> tuple[str, list[str], Picture]:
    """Return the answer, the section's texts and its figure, called `name`."""
    spectra = load_spectra(run)
    ends = (spectra["step"].min(), spectra["step"].max())
    rows = []
    for (side, module, step), part in groups(spectra, ["side", "module", "step"]):
        if step not in ends or (side == "X" and module in SAME_INPUT[1:]):
            continue
        named = " ".join(SAME_INPUT) if side == "X" and module in SAME_INPUT else str(module)
        rows.append(
            {
                "Of": SIDES[side],
                "Layers": named.replace("_proj", ""),
                "Step": step,
                "Tokens": part["tokens"].iloc[0],
                "Stable rank": f"{part['stable_rank'].mean():.1f}",
                "Of a block": f"{part['block_stable_rank'].mean():.1f}",
                "One block covers, %": percent(part["covered"].mean()),
                "Least": percent(part["covered_least"].min()),
                "Most": percent(part["covered_most"].max()),
                "As many largest directions, %": percent(part["energy"].mean()),
            }
        )
    blocks, environment = spectra["blocks"].max(), read_record(RunPaths(run).train_record, TrainRecord).environment
    texts = [
        f"## (h) {TITLE}",
        "One DiaBlo run of the setting diablo-N24, in float32. Inputs and output gradients of each trained layer, cut "
        f"into {blocks} blocks. *Covers*: the share of the squared norm inside the column space of one block, mean over"
        " layers and blocks, with the least and most of any; a hundred percent would meet the condition. Beside it the "
        "share of as many of the largest directions, which no block can exceed. More tokens span more directions, so "
        "rows of different numbers of tokens do not show a trend. First and last of "
        f"{spectra['step'].nunique()} measured steps; {environment['device']}, {described([environment])}. "
        f"The paper: {PAPER}",
        markdown(pd.DataFrame(rows).sort_values("Of", kind="stable")),
    ]
    return answer(spectra), texts, condition_measured(name, "SmolLM2-135M, while DiaBlo is trained", spectra)
