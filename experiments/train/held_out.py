# pyright: reportUnknownMemberType=false
"""Measures how well a trained model predicts the rows kept out of its training, by which learning rates are chosen.

No text is generated, so the measure is cheap and the same for every task and method. `exact_match` is the share of rows
whose every target token is the argmax, i.e. for which greedy decoding gives the exact target. If the target is only the
answer, as in the commonsense tasks, it is the accuracy; if the target includes reasoning, the loss is more informative.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from experiments.runs.records import write_atomically

if TYPE_CHECKING:
    from experiments.data.tokens import Examples
    from experiments.train.trainer import RunTrainer


def measure(trainer: RunTrainer, examples: Examples, path: Path) -> dict[str, Any]:
    """Return `rows`, `loss` (mean over target tokens, None if not finite) and `exact_match` of a trainer's model.

    Writes into `path`, in the rows' order: `nll` (summed over a row's targets), `targets` (their number) and `exact` (1
    or 0). All processes of a training must call this.
    """
    scores = trainer.score_rows(examples)
    columns = cast(list[list[float]], [scores[:, 0].tolist(), scores[:, 1].int().tolist(), scores[:, 2].int().tolist()])
    if trainer.args.should_save:
        nll = [float(f"{value:.7g}") if math.isfinite(value) else None for value in columns[0]]
        rows = {"nll": nll, "targets": columns[1], "exact": columns[2]}
        write_atomically(path, json.dumps(rows) + "\n")
    loss, targets, matches = map(sum, columns)
    return {
        "rows": len(scores),
        "loss": loss / targets if math.isfinite(loss) and targets else None,
        "exact_match": matches / len(scores),
    }
