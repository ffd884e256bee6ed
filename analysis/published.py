"""The numbers printed in the paper, as data: `published.csv`, one row per number, with its provenance.

- `table`: the paper's table; commonsense_per_task is what the baselines' own papers print per benchmark.
- `model`, `method`, `setting`: as in configs; a setting is N=…, r=…, blocks=… (SMT's), or a pattern and its density.
- `quantizer`, `bits`: of a quantised base.
- `benchmark`, `unit`, `value`: "mean of 8" is the unweighted mean over a task's benchmarks.
- `provenance`: who trained the model behind the number: its authors' own, re-run by others, copied, not known.
- `copied_from`: where a copied number was first printed.
- `protocol`, `loss_on`: the protocol behind it, as in configs/protocol, and the tokens in its loss; empty: unknown.
- `printed_percent`, `computed_percent`: trainable parameters in percent of the base, as printed and from the shapes.
- `source`, `note`: where the number was read, and remarks.
"""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd

from experiments.errors import UserError, nearest

FILE = Path(__file__).with_name("published.csv")
KEY = ["table", "model", "method", "setting", "quantizer", "bits", "benchmark"]
WORDS = [*KEY, "unit", "provenance", "copied_from", "protocol", "loss_on", "source", "note"]
NUMBERS = ["value", "printed_percent", "computed_percent"]
COLUMNS = [
    *(*KEY, "unit", "value", "provenance", "copied_from", "protocol", "loss_on"),
    *("printed_percent", "computed_percent", "source", "note"),
]
KNOWN = {
    "table": {
        *("commonsense", "commonsense_per_task", "arithmetic", "code_safety", "quantized"),
        *("sparse_patterns", "efficiency"),
    },
    "unit": {"%", "minutes"},
    "provenance": {"its authors' own", "re-run by others", "copied", "not known"},
    "loss_on": {"", "answer", "prompt and answer"},
}


def read_published(path: Path = FILE) -> pd.DataFrame:
    """Return the rows of `published.csv`: text columns as text, numbers as floats (NaN if nothing is printed).

    UserError with file and line if a column is missing, a word is unknown, a number is invalid, out of range or
    duplicated, or a copied number lacks its origin.
    """
    try:
        frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    if list(frame.columns) != COLUMNS:
        raise UserError(f"{path}: has the columns {', '.join(frame.columns)}; expected {', '.join(COLUMNS)}")
    for column, known in KNOWN.items():
        for line, word in enumerate(frame[column], start=2):
            if word not in known:
                raise UserError(f"{path}, line {line}: {column} {word!r}, {nearest(word, known)}")
    for column in NUMBERS:
        numbers = [_number(text) for text in frame[column]]
        for line, (text, number) in enumerate(zip(frame[column], numbers, strict=True), start=2):
            if (text or column == "value") and not 0 <= number <= (100 if column != "value" else 1000):
                raise UserError(f"{path}, line {line}: {column} {text!r} is not a number in its range")
        frame[column] = numbers
    for line, (provenance, source) in enumerate(zip(frame["provenance"], frame["copied_from"], strict=True), start=2):
        if (provenance == "copied") != bool(source):
            raise UserError(f"{path}, line {line}: copied_from is required for copied numbers, and only there")
    for line, twice in enumerate(frame.duplicated(KEY), start=2):
        if twice:
            raise UserError(f"{path}, line {line}: this number is a duplicate: remove one")
    return frame


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
