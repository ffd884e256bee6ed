# pyright: reportUnknownMemberType=false
"""How well a trained model predicts the rows that were kept out of its training: what a learning rate is chosen by.

No text is generated, so that every task and method is measured alike and cheaply. `exact_match` is the share of rows
whose every target token is the argmax: greedy decoding would give the target word for word. Where a target is the
answer and nothing else, as in the commonsense tasks, that is the accuracy; where it holds a way to the answer, the loss
says more.
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
    """`rows`, `loss` (mean over target tokens, None if it is not finite) and `exact_match` of a trainer's model.

    Writes every row's into `path`, in the rows' order: `nll` (summed over its targets), `targets` (their number) and
    `exact` (1 or 0). All processes of a training have to call this.
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
