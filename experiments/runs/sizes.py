"""Memory sizes and counts as text."""

from __future__ import annotations

import re
from typing import Any

from experiments.errors import UserError

UNITS = {"M": 2**20, "G": 2**30, "T": 2**40}


def read_bytes(text: Any) -> int:
    """Parse bytes such as `80G`, which is 80 × 2^30, as in Slurm and on a GPU's data sheet."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([MGT])B?", str(text))
    if match is None or not float(match[1]):
        raise UserError(f"{text!r} is not a size: write e.g. 80G; if GPUs differ, that of the smallest")
    return int(float(match[1]) * UNITS[match[2]])


def counted(count: int, noun: str) -> str:
    """Return a number of things: 1 run, 2 runs, 1,000 rows."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def gibibytes(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
