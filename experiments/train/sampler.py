"""The order of training rows: a function of the seed and the step, the same in every process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import cast

import numpy as np
import torch
from torch.utils.data import Sampler

WINDOW = 100  # micro-batches sorted together: padding below 2 %, while a row's neighbours still change every epoch


class EpochSampler(Sampler[int]):
    """A permutation of the rows for each epoch, which depends only on the seed and the epoch.

    Rows that do not fill a last batch are left out, different ones each epoch, so that every step has a full batch
    however many processes share it. `group_by_length` reorders an epoch's rows: rows of similar length (`lengths`, in
    tokens) share a micro-batch, and micro-batches are in random order, so that a step has short and long rows.
    """

    def __init__(
        self,
        lengths: Sequence[int] | np.ndarray,
        *,
        batch_size: int,
        micro_batch_size: int,
        seed: int,
        epoch: Callable[[], int],
        group_by_length: bool,
    ) -> None:
        self.lengths = torch.tensor(lengths)
        self.batch_size, self.micro_batch_size, self.group_by_length = batch_size, micro_batch_size, group_by_length
        self.seed, self.epoch = seed, epoch

    def __len__(self) -> int:
        return len(self.lengths) // self.batch_size * self.batch_size

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch())
        order = torch.randperm(len(self.lengths), generator=generator)[: len(self)]
        if self.group_by_length:
            windows = torch.split(order, WINDOW * self.micro_batch_size)
            ordered = [window[self.lengths[window].argsort(stable=True)] for window in windows]
            batches = torch.cat(ordered).view(len(order) // self.micro_batch_size, self.micro_batch_size)
            order = batches[torch.randperm(len(batches), generator=generator)].flatten()
        yield from cast(list[int], order.tolist())  # pyright: ignore[reportUnknownMemberType]
