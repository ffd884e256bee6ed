"""How well a trained model predicts the rows that were kept out of its training: what a learning rate is chosen by.

No text is generated, so that every task and method is measured alike and cheaply. `exact_match` is the share of rows
whose every target token is the likeliest one: greedy decoding would give the target word for word. Where a target is
the answer and nothing else, as in the commonsense tasks, that is the accuracy; where it holds a way to the answer, the
loss says more.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, cast

from experiments.prompts import IGNORED

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor
    from transformers import Trainer

    from experiments.tokens import Examples


def row_scores(logits: Any, labels: Tensor) -> Tensor:
    """Of every row the summed negative log-likelihood of its targets, their number, and whether all are the likeliest.

    Args:
        logits: `(rows, tokens, vocabulary)`, or a tuple that begins with them; prompt methods put virtual tokens first.
        labels: `(rows, tokens)`, IGNORED where nothing is to be predicted.

    Returns:
        `(rows, 3)` in float64.
    """
    import torch

    logits = logits[0] if isinstance(logits, tuple) else logits
    predictions, targets = logits[:, -labels.shape[1] : -1].float(), labels[:, 1:]
    counted = targets != IGNORED
    losses = torch.nn.functional.cross_entropy(predictions.mT, targets, ignore_index=IGNORED, reduction="none")
    likeliest = (predictions.argmax(-1) == targets) | ~counted
    columns = [losses.double().sum(1), counted.double().sum(1), likeliest.all(1).double()]
    return torch.stack(columns, dim=1)


def measure(trainer: Trainer, examples: Examples) -> dict[str, Any]:
    """`rows`, `loss` (mean over target tokens, None if it is not finite) and `exact_match` of a trainer's model.

    The trainer has `row_scores` as its `preprocess_logits_for_metrics`. All processes of a training have to call this.
    """
    # Not `predict`, which would tell wandb of a test set.
    batches = trainer.get_test_dataloader(cast(Any, examples))
    result = trainer.evaluation_loop(batches, description="held-out rows", prediction_loss_only=False)
    scores = cast("np.ndarray", result.predictions)
    loss, tokens, matches = (float(total) for total in scores.sum(axis=0))
    return {
        "rows": len(scores),
        "loss": loss / tokens if math.isfinite(loss) and tokens else None,
        "exact_match": matches / len(scores),
    }
