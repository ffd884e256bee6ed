"""S2FT, structured sparse fine-tuning (arXiv 2412.06289; Infini-AI-Lab/S2FT): trains whole channels of few projections.

Channels are drawn at random over the whole model, the released code's default. That code permutes neurons and heads so
that the chosen ones are contiguous in every weight, which preserves the function; here they are gathered from their
places, which computes the same. Its permutation moves the heads of q, k, v and o alike, so it needs as many key and
value heads as query heads. A gather has no such limit: `o_ratio` and `v_ratio` also work with grouped-query attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from torch import nn

from diablo.blocks.config import BlockConfig
from diablo.blocks.layer import layer_sides
from diablo.blocks.model import DiabloModel
from diablo.blocks.patterns import draw_distinct, generator_for
from diablo.blocks.positions import Positions
from diablo.field_help import documented
from diablo.register import peft_type, register

S2FT = peft_type("S2FT")


class _Channels(NamedTuple):
    side: Literal["inputs", "outputs"]  # inputs are rows of the paper's W, outputs its columns
    are_heads: bool  # whether channels are grouped into whole heads


CHANNELS = {
    "down_proj": _Channels("inputs", False),
    "o_proj": _Channels("inputs", True),
    "up_proj": _Channels("outputs", False),
    "v_proj": _Channels("outputs", True),
}


@documented
@dataclass
class S2ftConfig(BlockConfig):
    """Configuration of [`S2ftModel`]: the trained share of neurons and heads per projection, which sets the targets.

    Args:
        down_ratio: Share of the neurons: inputs of down_proj.
        o_ratio: Share of the heads: inputs of o_proj.
        up_ratio: Share of the neurons: outputs of up_proj.
        v_ratio: Share of the key and value heads: outputs of v_proj.
        seed: Seed of the draw, which also depends on the model's shapes.

    Raises:
        ValueError: a share is out of range, all are 0, or `target_modules` contradicts them.
    """

    down_ratio: float = 0.03
    o_ratio: float = 0.0
    up_ratio: float = 0.0
    v_ratio: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = S2FT
        for projection in CHANNELS:
            if not 0 <= self.ratio(projection) <= 1:
                raise ValueError(f"the share of {projection} is {self.ratio(projection)}: must be from 0 to 1")
        targets = {projection for projection in CHANNELS if self.ratio(projection)}
        if not targets:
            raise ValueError("nothing is trained: one of down_ratio, o_ratio, up_ratio and v_ratio must be above 0")
        if self.target_modules not in (None, targets):
            raise ValueError(f"target_modules={self.target_modules!r} must be unset: the ratios give {sorted(targets)}")
        self.target_modules = targets  # pyright: ignore[reportAttributeAccessIssue]

    def ratio(self, projection: str) -> float:
        return getattr(self, f"{projection.removesuffix('_proj')}_ratio")


class S2ftModel(DiabloModel):
    """A model whose chosen channels are trained. A layer without chosen channels is not adapted."""

    def _positions(self, config: BlockConfig, name: str, base_layer: nn.Module) -> Positions:
        assert isinstance(config, S2ftConfig)
        in_features, out_features = layer_sides(base_layer)
        projection = name.rpartition(".")[2]
        chosen = self._chosen(config, projection)[name]
        side, size = CHANNELS[projection].side, self._channel_size(projection)
        features = (chosen[:, None] * size + torch.arange(size, device="cpu")).view(1, -1).to(torch.int32)
        every = torch.arange(out_features if side == "inputs" else in_features, dtype=torch.int32, device="cpu")[None]
        return Positions(features, every) if side == "inputs" else Positions(every, features)

    def _chosen(self, config: S2ftConfig, projection: str) -> dict[str, torch.Tensor]:
        """Return the chosen neurons or heads of each layer, drawn over those of all layers together."""
        side, size = CHANNELS[projection].side, self._channel_size(projection)
        numbers = {}
        for name, module in self.model.named_modules():
            if name.rpartition(".")[2] == projection and check_target_module_exists(config, name):
                layer = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
                sides = layer_sides(layer)
                numbers[name] = sides[0 if side == "inputs" else 1] // size
        total, ratio = sum(numbers.values()), config.ratio(projection)
        if not int(ratio * total):
            kind = "heads" if CHANNELS[projection].are_heads else "neurons"
            raise ValueError(f"the share {ratio} of {total} {kind} of {projection} rounds to zero: raise it")
        drawn = draw_distinct(total, int(ratio * total), generator_for(config.seed, projection))
        chosen, start = {}, 0
        for name, number in numbers.items():
            chosen[name] = drawn[(drawn >= start) & (drawn < start + number)] - start
            start += number
        return chosen

    def _channel_size(self, projection: str) -> int:
        """Return the number of features per channel."""
        if not CHANNELS[projection].are_heads:
            return 1
        config = self.model.config
        return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


register(S2FT, S2ftConfig, S2ftModel)
