"""The cases of the speed benchmarks: layers and models as every method computes them, and their minimal cost.

The base weights are random, since speed does not depend on them, and are shared by all methods of a case: a 7B model is
in memory once, however many methods are compared.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from diablo import DiabloConfig, SparseConfig
from diablo.blocks.patterns import PATTERNS
from experiments.errors import UserError
from experiments.runs.environment import peak_memory, reset_peak_memory
from experiments.speed.timing import synchronize

FLOOR, FULL = "frozen floor", "full fine-tuning"
LORA, DORA, PISSA = "LoRA", "DoRA", "PiSSA"
ADAPTER, DROPOUT, IN_PLACE = "DiaBlo adapter", "DiaBlo adapter, dropout 0.05", "DiaBlo in place"
RECOMPUTED = "DiaBlo in place, inputs recomputed"  # in whole models: a single layer's input is a leaf
AUTHORS = "authors' layer"
OTHER_PATTERNS = tuple(pattern for pattern in PATTERNS if pattern != "diagonal")  # "diagonal" is DiaBlo in place
LABELS = (FLOOR, FULL, LORA, DORA, PISSA, ADAPTER, DROPOUT, IN_PLACE)


@dataclass(frozen=True)
class Cost:
    """The minimum of a forward and backward pass: floating-point operations, and bytes if each is moved once."""

    operations: float
    bytes: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.operations + other.operations, self.bytes + other.bytes)


def layer_cost(label: str, tokens: int, m: int, n: int, num_blocks: int, rank: int, element: int) -> Cost:
    """Return the cost of one linear layer m → n for `tokens` tokens, with `element` bytes per base number.

    Blocks and factors are in float32. A matrix product moves both operands and its result once, and also reads the
    result if it adds to it.
    """

    def product(a: int, b: int, c: int, adds: bool = False, wide: int = 0) -> Cost:
        """(a, b) @ (b, c); the operand or result with `wide` numbers is float32."""
        moved = element * (a * b + b * c + a * c * (2 if adds else 1) - wide) + 4 * wide
        return Cost(2.0 * a * b * c, moved)

    t = tokens
    floor = product(t, m, n) + product(t, n, m)
    d = m * n // num_blocks
    blocks = Cost(2.0 * t * d, element * t * (m + n) + 4 * d)
    if label == FLOOR:
        return floor
    if label == FULL:
        return floor + product(m, t, n)
    if label in (IN_PLACE, RECOMPUTED) or label in OTHER_PATTERNS:
        return floor + blocks
    if label in (ADAPTER, DROPOUT, AUTHORS):
        forward = Cost(2.0 * t * d, element * t * (m + 2 * n) + 4 * d)
        backward = Cost(2.0 * t * d, element * t * (n + 2 * m) + 4 * d)
        return floor + blocks + forward + backward
    r = rank
    lora = floor + product(t, m, r, wide=m * r) + product(t, r, n, adds=True, wide=r * n)
    lora += product(t, n, r, wide=r * n) + product(t, r, m, adds=True, wide=m * r)
    lora += product(r, t, n, wide=r * n) + product(m, t, r, wide=m * r)
    if label != DORA:
        return lora
    # The norm of W + BA in every forward pass (without its gradient), and scaling the output in both passes.
    return (
        lora + product(n, r, m, wide=r * (m + n)) + Cost(3.0 * m * n + 4.0 * t * n, element * (2 * m * n + 4 * t * n))
    )


def matched_rank(shapes: Sequence[tuple[int, int]], num_blocks: int) -> int:
    """Return the LoRA rank with as many parameters as N blocks, over layers of these shapes."""
    return max(1, round(sum(m * n for m, n in shapes) / num_blocks / sum(m + n for m, n in shapes)))


def sharing(module: nn.Module) -> Any:
    """Return a copy of the module whose frozen parameters are new objects sharing the same memory."""
    memo = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in module.parameters()}
    return copy.deepcopy(module, memo)


def attach(label: str, base: nn.Module, targets: list[str], num_blocks: int, rank: int, authors: Path | None) -> Any:
    """Return the base, not copied, as a method trains it. Dropout is 0 unless the label says otherwise.

    Raises:
        UserError: N does not divide a layer, or `authors` is not a checkout of the authors' repository.
    """
    if label == FLOOR:
        return base.requires_grad_(False)
    if label == FULL:
        return base.requires_grad_(True)
    if label == AUTHORS:
        return _attach_authors(base, targets, num_blocks, authors)
    if label in (LORA, DORA, PISSA):
        start: Any = "pissa_niter_2" if label == PISSA else True
        config: Any = LoraConfig(
            r=rank, lora_alpha=rank, target_modules=targets, use_dora=label == DORA, init_lora_weights=start
        )
    elif label in OTHER_PATTERNS:
        config = SparseConfig(pattern=label, density=f"1/{num_blocks}", target_modules=targets, mode="in_place")
    else:
        config = DiabloConfig(
            num_blocks=num_blocks,
            target_modules=targets,
            mode="in_place" if label in (IN_PLACE, RECOMPUTED) else "adapter",
            dropout=0.05 if label == DROPOUT else 0.0,
            recompute_inputs=label == RECOMPUTED,
        )
    try:
        return cast(Any, get_peft_model(cast(Any, base), config))
    except ValueError as error:
        raise UserError(f"{label}: {error}") from None


def _attach_authors(base: nn.Module, targets: list[str], num_blocks: int, authors: Path | None) -> nn.Module:
    """Attach ziyangjoy/DiaBlo's own layer, from a checkout that the user names, because importing it runs its code."""
    path = (authors or Path()) / "diablo" / "block_linear.py"
    if authors is None or not path.is_file():
        raise UserError(f"--authors-repo {authors}: {path} does not exist: give a checkout of ziyangjoy/DiaBlo")
    spec = importlib.util.spec_from_file_location("authors_block_linear", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    modules = list(cast("Iterator[tuple[str, nn.Module]]", base.named_modules()))
    weights = {name: layer.weight for name, layer in modules if isinstance(layer, nn.Linear)}
    module.replace_linear_with_blocklinear(base, num_blocks=num_blocks, target_modules=targets)
    base.requires_grad_(False)
    layers: Any = [
        (name, layer) for name, layer in cast(Any, base).named_modules() if isinstance(layer, module.BlockLinear)
    ]
    for name, layer in layers:
        layer.linear.weight = weights[name]  # their layer clones it; here all methods share one
        layer.block_A.requires_grad_(True)
    return base


def peak_bytes(work: Callable[[], object], leaves: Iterable[Tensor], device: str) -> int:
    """Return the peak memory of `work` beyond weights: activations, the gradients of `leaves`, and scratch space."""
    for leaf in leaves:
        leaf.grad = None  # from the previous pass: freeing it later would count against this one
    if device.startswith("cuda"):
        synchronize(device)
        reset_peak_memory(device)
        before = torch.cuda.memory_allocated(device)
        work()
        synchronize(device)
        return peak_memory(device) - before
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    assert recorded.profiler is not None
    results: Any = recorded.profiler.kineto_results
    events = [event for event in results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
