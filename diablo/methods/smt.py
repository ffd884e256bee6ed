"""SMT, sparse matrix tuning (ICLR 2025; HectorHHZ/Sparse_Matrix_Tuning): trains the blocks with the largest gradients.

The target weights are cut into blocks of 256 × 256. Full fine-tuning runs for 100 steps while each weight's gradients
are summed; then only the blocks with the highest scores, over all layers together, are trained.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import check_target_module_exists
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from diablo.blocks.config import BlockConfig
from diablo.blocks.layer import layer_sides
from diablo.blocks.model import DiabloModel
from diablo.blocks.patterns import grid_positions
from diablo.blocks.positions import Positions
from diablo.field_help import documented
from diablo.quantize.quantized_linear import QuantizedLinear
from diablo.register import peft_type, register
from diablo.targets import check_targets

SMT = peft_type("SMT")
ATTENTION = ["q_proj", "k_proj", "v_proj"]  # the released code's default
SCORES = ("mean_abs", "abs_mean")


@documented
@dataclass
class SmtConfig(BlockConfig):
    """Configuration of [`SmtModel`]: how many blocks are trained, and which; `choose_blocks` fills in `blocks`.

    Args:
        num_blocks: Trained blocks in the whole model. The released code's 890 are 0.87 % of LLaMA2-7B.
        block_size: Side of a block; it must divide both sides of a layer.
        blocks: Layer name -> [row, column] of each trained block in the layer's grid; rows are blocks of input
            features. A layer without an entry is not adapted.

    Raises:
        ValueError: a number is below 1.
    """

    num_blocks: int = 890
    block_size: int = 256
    blocks: dict[str, list[list[int]]] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = SMT
        for name in ("num_blocks", "block_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")


class SmtModel(DiabloModel):
    """A model whose chosen blocks are trained."""

    target_module_mapping = dict.fromkeys(DiabloModel.target_module_mapping, ATTENTION)

    def _positions(self, config: BlockConfig, name: str, base_layer: nn.Module) -> Positions:
        assert isinstance(config, SmtConfig)
        if config.blocks is None:
            raise ValueError("no blocks are chosen yet: attach the config that diablo.smt.choose_blocks returns")
        rows, columns = grid(base_layer, config.block_size)
        chosen = torch.tensor(config.blocks.get(name, []), dtype=torch.int64, device="cpu").view(-1, 2)
        outside = (chosen < 0) | (chosen >= torch.tensor([rows, columns], device="cpu"))
        if outside.any():
            raise ValueError(
                f"blocks {chosen[outside.any(1)].tolist()} are not in the layer's grid of {rows} × {columns}"
            )
        return grid_positions(chosen[:, 0], chosen[:, 1], config.block_size, config.block_size)


def choose_blocks(
    model: PreTrainedModel,
    config: PeftConfig,
    backward: Callable[[], None] | None,
    prerequisite: Path | None = None,
    *,
    steps: int = 100,
    learning_rate: float = 9.65e-6,
    max_grad_norm: float = 1.0,
    score: str = "mean_abs",
) -> SmtConfig:
    """Return the config with the blocks that score highest in a warm-up of full fine-tuning (AdamW, betas 0.9, 0.95).

    Ties go to the block that is first by (layer name, row, column). The warm-up trains every weight in float32 and then
    restores the model bit for bit; only the choice remains. The released code continues from the weights after its
    warm-up; restarting here keeps one base for all methods. As there, gradients are summed unclipped and clipped for
    the step. The learning rate is constant; there it falls linearly over the whole training, by 1 % in 100 of 8,000
    steps.

    Args:
        model: the base model.
        config: an `SmtConfig`.
        backward: called once a step; adds the gradient of a batch's mean loss to the parameters' `grad`. None on the
            meta device, where only the number of blocks is meaningful. If it has a `sharded_copy`, a context manager
            that yields an FSDP2-sharded model, all processes together train that model instead of `model`.
        prerequisite: not used.
        score: score of a block of the summed gradient: "mean_abs" (magnitude of the mean) or "abs_mean" (mean of
            magnitudes).

    Raises:
        ValueError: `num_blocks` exceeds the number of blocks, `backward` is missing, or a gradient is not finite.
    """
    assert isinstance(config, SmtConfig)
    if score not in SCORES:
        raise ValueError(f"score={score!r}: choose one of {', '.join(SCORES)}")
    check_targets(model, config)
    layers = _targets(model, config)
    quantized = [name for name, layer in layers.items() if isinstance(layer, QuantizedLinear)]
    if quantized:
        raise ValueError(f"{quantized[0]} is quantised: its weights have no gradients, by which blocks are chosen")
    grids = {name: grid(layer, config.block_size) for name, layer in layers.items()}
    total = all_blocks(model, config)
    if config.num_blocks > total:
        size = config.block_size
        raise ValueError(f"num_blocks={config.num_blocks} exceeds the {total} blocks of {size} × {size} in the targets")
    if model.device.type == "meta":
        scores = {name: torch.zeros(shape, device="cpu") for name, shape in grids.items()}
    elif backward is None:
        raise ValueError(f"num_blocks={config.num_blocks}: choosing blocks needs {steps} steps on training rows")
    else:
        sums = _summed_gradients(model, list(layers), backward, steps, learning_rate, max_grad_norm)
        scores = {name: block_scores(_whole(total), config.block_size, score).cpu() for name, total in sums.items()}
    prepared = copy.deepcopy(config)
    prepared.blocks = top_blocks(scores, config.num_blocks)
    return prepared


def block_scores(total: Tensor, block_size: int, score: str) -> Tensor:
    """Return the score of every block of a summed gradient.

    Args:
        total: `(out_features, in_features)`, as `nn.Linear.weight`.

    Returns:
        `(rows, columns)`: blocks of input features by blocks of output features.
    """
    blocks = total.T.unflatten(1, (-1, block_size)).unflatten(0, (-1, block_size))  # (row, in, column, out)
    if score == "mean_abs":
        return blocks.mean((1, 3)).abs()
    if score == "abs_mean":
        return blocks.abs().mean((1, 3))
    raise ValueError(f"score={score!r}: choose one of {', '.join(SCORES)}")


def top_blocks(scores: dict[str, Tensor], number: int) -> dict[str, list[list[int]]]:
    """Return the `number` blocks with the highest scores, by layer; layers without any are left out."""
    for name, values in scores.items():
        if not values.isfinite().all():
            raise ValueError(f"the warm-up's gradient of {name} is not finite: lower its learning rate")
    ranked = sorted(
        (-value, name, row, column)
        for name, values in scores.items()
        for row, line in enumerate(values.tolist())
        for column, value in enumerate(line)
    )
    chosen: dict[str, list[list[int]]] = {}
    for _, name, row, column in sorted(ranked[:number], key=lambda block: block[1:]):
        chosen.setdefault(name, []).append([row, column])
    return chosen


def grid(base_layer: nn.Module, block_size: int) -> tuple[int, int]:
    """Return the numbers of blocks along a layer's input and output features."""
    in_features, out_features = layer_sides(base_layer)
    if in_features % block_size or out_features % block_size:
        raise ValueError(
            f"block_size={block_size} does not divide in_features={in_features} and out_features={out_features}"
        )
    return in_features // block_size, out_features // block_size


def all_blocks(model: PreTrainedModel, config: SmtConfig) -> int:
    """Return how many blocks the targets have together."""
    grids = [grid(layer, config.block_size) for layer in _targets(model, config).values()]
    return sum(rows * columns for rows, columns in grids)


def _targets(model: PreTrainedModel, config: SmtConfig) -> dict[str, nn.Linear]:
    if config.target_modules is None:
        config = copy.deepcopy(config)
        config.target_modules = SmtModel.target_module_mapping.get(model.config.model_type)
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and config.target_modules and check_target_module_exists(config, name)
    }
    if not layers:
        raise ValueError(f"target_modules={config.target_modules!r} matches no linear layer of {type(model).__name__}")
    return layers


def _summed_gradients(
    model: PreTrainedModel,
    names: list[str],
    backward: Callable[[], None],
    steps: int,
    learning_rate: float,
    max_grad_norm: float,
) -> dict[str, Tensor]:
    sharded_copy = getattr(backward, "sharded_copy", None)
    with _borrowed(model) if sharded_copy is None else sharded_copy() as trained:
        weights: dict[str, Any] = {name: trained.get_submodule(name).weight for name in names}
        sums = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        optimizer = torch.optim.AdamW(trained.parameters(), learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
        for _ in range(steps):
            backward()
            for name, weight in weights.items():
                if weight.grad is not None:
                    sums[name] += weight.grad
            nn.utils.clip_grad_norm_(trained.parameters(), max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        return {name: total.detach() for name, total in sums.items()}


def _whole(total: Tensor) -> Tensor:
    return total.full_tensor() if isinstance(total, DTensor) else total


@contextmanager
def _borrowed(model: nn.Module) -> Iterator[nn.Module]:
    """Prepare the model for full training in float32; on exit restore its weights, buffers, flags and modes."""
    parameters = {p: (p.data, p.requires_grad) for p in model.parameters()}
    buffers = {b: b.clone() for b in model.buffers()}
    modes = {module: module.training for module in model.modules()}
    try:
        for parameter in parameters:
            parameter.data = parameter.data.to(torch.float32, copy=True)
            parameter.requires_grad_(True)
        model.train()
        yield model
    finally:
        for parameter, (data, trained) in parameters.items():
            parameter.data, parameter.grad = data, None
            parameter.requires_grad_(trained)
        for buffer, values in buffers.items():
            buffer.copy_(values)
        for module, mode in modes.items():
            module.training = mode


register(SMT, SmtConfig, SmtModel)
