"""Training rows for the examples: generated word problems, or your own file. Needs no network."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
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


def parse(options: argparse.ArgumentParser) -> argparse.Namespace:
    """Return the command line's options, after a look at the model and the file that they name."""
    found = options.parse_args()
    if found.data is not None and not found.data.is_file():
        options.error(f"--data {found.data}: no such file")
    if found.rows < 1 or found.num_blocks < 1:
        options.error(f"--rows {found.rows} --num-blocks {found.num_blocks}: both must be at least 1")
    if found.model is not None:
        from transformers import AutoConfig

        try:
            AutoConfig.from_pretrained(found.model)
        except (OSError, ValueError):
            options.error(f"--model {found.model}: neither a folder with a config.json nor a hub id that can be loaded")
    return found


def run(main: Callable[[], None]) -> None:
    """Run an example. Sizes that do not divide the model's layers end in one line, other errors in a traceback."""
    try:
        main()
    except ValueError as error:
        if not any(size in str(error) for size in ("num_blocks", "group_size")):
            raise
        raise SystemExit(f"error: {error}") from None


def load(path: Path | None, count: int, held_out: int = 16) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Return training and held-out rows of `prompt` and `completion`."""
    if path is None:
        splits = generate({"train": count, "heldout": held_out, "test": 0}, seed=0)
        return _texts(splits["train"]), _texts(splits["heldout"])
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = [_row(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1) if line.strip()]
    if len(rows) <= held_out:
        raise SystemExit(f"error: {path}: more rows than its {len(rows)} are needed: {held_out} are held out")
    return rows[held_out:][:count], rows[:held_out]


def _row(line: str, where: str) -> dict[str, str]:
    try:
        row = json.loads(line)
        if all(isinstance(row[name], str) for name in ("prompt", "completion")):
            return row
    except (ValueError, KeyError, TypeError):
        pass
    raise SystemExit(f'error: {where}: not of the form {{"prompt": "…", "completion": "…"}}')


def _texts(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    return [{"prompt": f"Question: {row['instruction']}\nAnswer:\n", "completion": row["output"]} for row in rows]
