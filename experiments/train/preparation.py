# pyright: reportUnknownMemberType=false
"""Gradient steps on a run's own rows, for methods that use gradients before they are attached."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
import torch.distributed
from torch import Tensor

from experiments.config import RunConfig
from experiments.data.prompts import IGNORED
from experiments.data.tokens import Examples
from experiments.train.loss import TargetForward
from experiments.train.sampler import EpochSampler
from experiments.train.sharding import shard_layers

Batch = dict[str, Tensor]  # input_ids, attention_mask and labels, as in training


def row_steps(
    examples: Examples, config: RunConfig, collator: Callable[[list[Any]], Batch], device: Any
) -> Iterator[list[Batch]]:
    """Yield endless steps of `recipe.batch_size` rows, in an order set by the seed, the same in every process.

    `recipe.micro_batch_size` only decides how many rows are padded together, not which rows a step has.
    """
    recipe = config.recipe
    for epoch in itertools.count():
        sampler = EpochSampler(
            examples.lengths,
            batch_size=recipe.batch_size,
            micro_batch_size=recipe.micro_batch_size,
            seed=config.seed,
            epoch=partial(int, epoch),
            group_by_length=False,  # grouping would make a step's rows depend on the micro-batch size
        )
        for rows in torch.split(torch.tensor(list(sampler)), recipe.batch_size):
            rows = rows[sampler.lengths[rows].argsort(stable=True)]  # less padding
            parts = torch.split(rows, recipe.micro_batch_size)
            batches = [collator([examples[row] for row in cast(list[int], part.tolist())]) for part in parts]
            yield [{name: tensor.to(device) for name, tensor in batch.items()} for batch in batches]


class Backward:
    """Each call adds to the parameters' gradients that of the mean loss over the next step's targets.

    The loss is the trainer's: over the labelled positions, in chunks, under autocast if the base has 16 bits.

    Args:
        processes: number of processes of a sharded training, which share the model of `sharded_copy`.
    """

    def __init__(self, model: Any, steps: Iterator[list[Batch]], processes: int = 1) -> None:
        self.model, self.steps = model, steps
        self.device, self.dtype = model.device.type, model.dtype
        self.in_16_bits = self.dtype in (torch.float16, torch.bfloat16)
        self.forward: TargetForward = TargetForward(model)
        if processes > 1:
            self.sharded_copy = partial(self._sharded_copy, processes)
        self._rank, self._share = 0, 1  # this process's share of a step's micro-batches

    def __call__(self) -> None:
        batches = next(self.steps)
        targets = sum(int((batch["labels"][:, 1:] != IGNORED).sum()) for batch in batches)
        for batch in batches[self._rank :: self._share]:
            with torch.autocast(self.device, self.dtype, enabled=self.in_16_bits):
                loss = self.forward(self.model, {**batch, "use_cache": cast(Any, False)}).loss(max(1, targets))
            (loss * self._share).backward()  # gradients are averaged over the processes

    @contextmanager
    def _sharded_copy(self, processes: int) -> Generator[Any, None, None]:
        """Yield a copy of the model for full training in float32, sharded over the processes; calls use it meanwhile.

        The model itself is on the CPU afterwards.
        """
        model, forward = self.model, self.forward
        copied = copy.deepcopy(model.to("cpu")).to(torch.promote_types(self.dtype, torch.float32))
        copied.requires_grad_(True).train()
        shard_layers(copied, self.device, processes, self.dtype if self.in_16_bits else None)
        self.model, self.forward = copied, copy.copy(forward)
        self.forward.head = copied.get_output_embeddings()
        self._rank, self._share = torch.distributed.get_rank(), processes
        try:
            yield copied
        finally:
            self.model, self.forward, self._rank, self._share = model, forward, 0, 1
