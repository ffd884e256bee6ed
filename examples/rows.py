"""Training rows for the examples: generated word problems, or your own file. Needs no network."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from experiments.data.arith import generate

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"


def parser(description: str | None, out: str) -> argparse.ArgumentParser:
    """Return a parser of the options that the examples share."""
    options = argparse.ArgumentParser(description=(description or "").split("\n\n")[0])
    options.add_argument("--model", default=SMOLLM2, help="hub id or folder of the base model; default: %(default)s")
    options.add_argument("--data", type=Path, help="JSON lines with prompt and completion; default: generated problems")
    options.add_argument("--rows", type=int, default=160, help="number of training rows; default: %(default)s")
    options.add_argument("--num-blocks", type=int, default=32, help="N of DiaBlo; default: %(default)s")
    options.add_argument("--learning-rate", type=float, default=5e-3, help="default: %(default)s")
    options.add_argument("--out", type=Path, default=Path(out), help="folder to write; default: %(default)s")
    return options


def load(path: Path | None, count: int, held_out: int = 16) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Return training and held-out rows of `prompt` and `completion`."""
    if path is None:
        splits = generate({"train": count, "heldout": held_out, "test": 0}, seed=0)
        return _texts(splits["train"]), _texts(splits["heldout"])
    with path.open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file if line.strip()]
    if len(rows) <= held_out:
        raise SystemExit(f"error: {path}: {len(rows)} rows: more than {held_out} are needed, which are held out")
    return rows[held_out:][:count], rows[:held_out]


def _texts(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    return [{"prompt": f"Question: {row['instruction']}\nAnswer:\n", "completion": row["output"]} for row in rows]
