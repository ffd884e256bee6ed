"""ApiQ-bw (arXiv 2402.05147): trains a decoder layer's clipping factors and LoRA factors together.

The quantised layer gets the outputs of the quantised layers before it and learns to reproduce the outputs of the layer
it replaces. The grids are asymmetric, as in the paper's results, and always contain 0.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diablo.quantize.activations import Factors, first, moved
from diablo.quantize.grids import SMALLEST_SCALE, QuantizedWeight, check_bits, uniform, width_of_groups, working
from diablo.quantize.quantized_linear import set_module

CLIPPING_START = 4.0  # sigmoid(4) = 0.982 of the range
RANK, LORA_ALPHA, EPOCHS = 64, 16.0, 20
CLIPPING_RATE, FACTOR_RATE, WEIGHT_DECAY = 5e-3, 5e-4, 0.1


class Block(NamedTuple):
    """A quantised decoder layer, keyed by the names of its linear layers."""

    weights: dict[str, QuantizedWeight]
    factors: Factors
    losses: list[float]  # mean loss of each epoch


class ClippedLinear(nn.Module):
    """`y = x (Q(W) + s B A)ᵀ + b` where Q rounds to a grid with trained ends (straight-through gradient).

    A group's grid ends at `sigmoid(high)` times its greatest and `sigmoid(low)` times its least weight.
    """

    def __init__(self, linear: nn.Linear, bits: int, group_size: int, rank: int, scaling: float) -> None:
        super().__init__()
        check_bits(bits)
        self.bits, self.scaling = bits, scaling
        weight = working(linear.weight)
        self.groups = weight.view(weight.shape[0], -1, width_of_groups(weight.shape[1], group_size))
        self.bias = None if linear.bias is None else linear.bias.detach().float()
        self.high = nn.Parameter(torch.full_like(self.groups[..., 0], CLIPPING_START))
        self.low = nn.Parameter(torch.full_like(self.groups[..., 0], CLIPPING_START))
        self.factor_a = nn.Parameter(torch.empty(rank, linear.in_features, device=weight.device))
        self.factor_b = nn.Parameter(torch.zeros(linear.out_features, rank, device=weight.device))
        if rank:
            nn.init.kaiming_uniform_(self.factor_a, a=math.sqrt(5))

    def grid(self) -> tuple[Tensor, Tensor]:
        """Return scale and zero, each `(out, groups)`."""
        high = self.high.sigmoid() * self.groups.amax(-1).clamp(min=0)
        low = self.low.sigmoid() * self.groups.amin(-1).clamp(max=0)
        scale = (high - low) / (2**self.bits - 1)
        scale = scale + (scale.half().float().clamp(min=SMALLEST_SCALE) - scale).detach()  # the stored value
        return scale, (-low / scale).detach().round()

    def codes(self, scale: Tensor, zero: Tensor) -> Tensor:
        steps = self.groups / scale[..., None]
        steps = steps + (steps.round() - steps).detach()
        return (steps + zero[..., None]).clamp(0, 2**self.bits - 1)

    def forward(self, x: Tensor) -> Tensor:
        scale, zero = self.grid()
        weight = ((self.codes(scale, zero) - zero[..., None]) * scale[..., None]).flatten(1)
        return F.linear(x, weight, self.bias) + self.scaling * (x @ self.factor_a.T) @ self.factor_b.T

    def quantized(self) -> QuantizedWeight:
        with torch.no_grad():
            scale, zero = self.grid()
            return uniform(self.codes(scale, zero).flatten(1), scale, zero, self.bits)


def train_block(
    layer: nn.Module,
    inputs: list[Tensor],
    kwargs: list[dict[str, Any]],
    targets: list[list[Tensor]],
    bits: int,
    group_size: int,
    rank: int = RANK,
    lora_alpha: float = LORA_ALPHA,
    epochs: int = EPOCHS,
    seed: int = 0,
    target_modules: Collection[str] | None = None,
) -> Block:
    """Train a copy of a decoder layer, in float32, one sequence at a time.

    Args:
        layer: the full-precision layer; it does not change.
        inputs: for each sequence, `(1, length, hidden)`, from the quantised layers before this one.
        kwargs: for each sequence, the layer's other arguments.
        targets: for each sequence, the target outputs: the layer's outputs on the full-precision inputs, and on
            `inputs`.
        target_modules: see `gets_factors`.
    """
    trained = copy.deepcopy(layer).float()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        linears = {
            name: ClippedLinear(
                module, bits, group_size, rank if gets_factors(name, target_modules) else 0, lora_alpha / rank
            )
            for name, module in trained.named_modules()
            if isinstance(module, nn.Linear)
        }
    trained.requires_grad_(False)
    for name, module in linears.items():
        set_module(trained, name, module)
    clipping = [parameter for module in linears.values() for parameter in (module.high, module.low)]
    adapted = {name: module for name, module in linears.items() if gets_factors(name, target_modules)}
    factors = [parameter for module in adapted.values() for parameter in (module.factor_a, module.factor_b)]
    optimizer = torch.optim.AdamW(
        [{"params": clipping, "lr": CLIPPING_RATE}, {"params": factors, "lr": FACTOR_RATE}], weight_decay=WEIGHT_DECAY
    )
    losses, device = [], next(trained.parameters()).device
    for _ in range(epochs):
        total = 0.0
        for x, others, wanted in zip(inputs, kwargs, targets, strict=True):
            with torch.enable_grad():
                output = first(trained(moved(x, device, torch.float32), **moved(others, device, torch.float32)))
                loss = torch.stack([F.mse_loss(output, target.to(output)) for target in wanted]).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()
        losses.append(total / len(inputs))
    return Block(
        {name: module.quantized() for name, module in linears.items()},
        {name: (module.factor_a.detach(), module.factor_b.detach()) for name, module in adapted.items()},
        losses,
    )


def gets_factors(name: str, target_modules: Collection[str] | None) -> bool:
    """Return whether a linear layer gets LoRA factors, by the last part of its name; None means all do."""
    return target_modules is None or name.rpartition(".")[2] in target_modules
