"""Gradient steps on a run's own rows, for methods that look at gradients before they are attached."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from experiments.loss import TargetForward
from experiments.prompts import IGNORED
from experiments.tokens import Examples
from experiments.trainer import EpochSampler

Batch = dict[str, Tensor]  # input_ids, attention_mask and labels, as in training


def row_steps(
    examples: Examples, config: dict[str, Any], collator: Callable[[list[Any]], Batch], device: Any
) -> Iterator[list[Batch]]:
    """Steps of `recipe.batch_size` rows without end, in an order the seed decides, the same in every process.

    `recipe.micro_batch_size` decides how many rows are padded together, and not which rows a step sees.
    """
    recipe = config["recipe"]
    for epoch in itertools.count():
        sampler = EpochSampler(
            examples.lengths,
            batch_size=recipe["batch_size"],
            micro_batch_size=recipe["micro_batch_size"],
            seed=config["seed"],
            epoch=partial(int, epoch),
            group_by_length=False,  # which puts rows into steps by the size of the micro-batches
        )
        for rows in torch.tensor(list(sampler)).split(recipe["batch_size"]):
            rows = rows[sampler.lengths[rows].argsort(stable=True)]  # less padding
            parts = rows.split(recipe["micro_batch_size"])
            batches = [collator([examples[row] for row in part.tolist()]) for part in parts]
            yield [{name: tensor.to(device) for name, tensor in batch.items()} for batch in batches]


class Backward:
    """Each call adds to the parameters' gradients that of the mean loss over the targets of the next step.

    The loss is the trainer's: over the labelled positions, a chunk at a time, under autocast on a base of 16 bits.
    """

    def __init__(self, model: Any, steps: Iterator[list[Batch]]) -> None:
        self.model, self.steps = model, steps
        self.device, self.dtype = model.device.type, model.dtype
        self.forward = TargetForward(model)

    def __call__(self) -> None:
        batches = next(self.steps)
        targets = sum(int((batch["labels"][:, 1:] != IGNORED).sum()) for batch in batches)
        for batch in batches:
            with torch.autocast(self.device, self.dtype, enabled=self.dtype in (torch.float16, torch.bfloat16)):
                loss = self.forward(self.model, {**batch, "use_cache": cast(Any, False)}).loss(max(1, targets))
            loss.backward()
