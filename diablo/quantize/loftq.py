"""LoftQ (arXiv 2310.08659): normal-float weights and LoRA factors that together approximate a weight.

PEFT's LoftQ supports 4 and 8 bits, and only on a GPU; it leaves rounded full-precision weights in the base, which must
be recomputed wherever the adapter is loaded. Here the weights are packed and the factors are an adapter for them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diablo.quantize.apiq import LORA_ALPHA, RANK
from diablo.quantize.grids import QuantizedWeight, normal_float, working


def loftq(
    weight: Tensor,
    bits: int,
    group_size: int = 64,
    rank: int = RANK,
    lora_alpha: float = LORA_ALPHA,
    iterations: int = 5,
) -> tuple[QuantizedWeight, tuple[Tensor, Tensor]]:
    """Alternate between quantising W minus the factors and setting the factors to the error's largest triplets.

    Args:
        weight: W, `(out, in)`.
        iterations: 1 quantises W and then decomposes the error.

    Returns:
        Q, and A `(r, in)` and B `(out, r)` such that `Q + s B A` approximates W, with LoRA's `s = lora_alpha / rank`.

    Raises:
        ValueError: the weight has fewer singular values than `rank`.
    """
    weight = working(weight).float()
    if rank > min(weight.shape):
        raise ValueError(f"rank={rank} exceeds the {min(weight.shape)} singular values of the weight: lower it")
    scaling = lora_alpha / rank
    a, b = weight.new_zeros(rank, weight.shape[1]), weight.new_zeros(weight.shape[0], rank)
    quantized = normal_float(weight, bits, group_size)
    for step in range(iterations):
        if step:
            quantized = normal_float(weight - scaling * b @ a, bits, group_size)
        u, s, vt = torch.linalg.svd(weight - quantized.dequantize(), full_matrices=False)
        root = (s[:rank] / scaling).sqrt()
        a, b = root[:, None] * vt[:rank], u[:, :rank] * root
    return quantized, (a, b)
