"""Configuration of DiaBlo."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from peft import PeftConfig

from diablo.card import WithCard
from diablo.field_help import documented
from diablo.register import peft_type

DIABLO = peft_type("DIABLO")


@documented
@dataclass
class BlockConfig(WithCard, PeftConfig):
    """Options that all methods that train blocks of weights share; `task_type` and the rest are `PeftConfig`'s.

    Args:
        mode: How the layer applies the blocks. 'in_place' trains them inside the weight: one matrix product, as in the
            frozen layer; it needs dropout 0, a plain nn.Linear and a single active adapter. 'adapter' adds a side
            branch. 'auto' uses in_place when possible, unless a side of a diagonal block is below 16.
        target_modules: Names (or suffixes) of the linear layers to adapt, or a regular expression, or 'all-linear'.
            None uses the method's default where the architecture is known; DiaBlo's is q, k, v, up and down.
        exclude_modules: Names (or suffixes) of modules not to adapt, or a regular expression.
        dropout: Dropout on the input of the blocks in training; the base layer's input is never dropped.
        modules_to_save: Modules trained in full and saved with the blocks, e.g. a new classifier.
        layers_to_transform: Indices of the layers to adapt; None adapts all. Needs target_modules as a list.
        layers_pattern: Name of the module list that layers_to_transform indexes, e.g. 'layers' or 'h'.
        recompute_inputs: Compute the layers' inputs again in the backward pass where autograd keeps what they were
            computed from (an RMSNorm, a product such as silu(gate) * up), instead of keeping them: the same gradients
            with less memory. No effect under gradient checkpointing, torch.compile and offloading hooks.
        init_weights: Start the blocks at zero, so that attaching changes no output. False: random (for tests).

    Raises:
        ValueError: a value is out of range, or `layers_to_transform` is set while `target_modules` is a string.
    """

    mode: Literal["auto", "adapter", "in_place"] = "auto"
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    dropout: float = 0.0
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    recompute_inputs: bool = False
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode not in ("auto", "adapter", "in_place"):
            raise ValueError(f"mode={self.mode!r}: choose 'auto', 'adapter' or 'in_place'")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout={self.dropout!r} must be at least 0 and below 1")
        if self.dropout and self.mode == "in_place":
            raise ValueError(
                f"mode='in_place' cannot drop the blocks' input: set mode='adapter' or dropout=0, not {self.dropout}"
            )
        for name in ("layers_to_transform", "layers_pattern"):
            # PEFT matches a string against the whole name and would silently ignore these two.
            if isinstance(self.target_modules, str) and getattr(self, name) is not None:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} has no effect with target_modules={self.target_modules!r}: "
                    "give target_modules as a list of names"
                )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(f"layers_pattern={self.layers_pattern!r} needs layers_to_transform as well")
        # Sets, as in PEFT's own configs, which test membership for every module of the model.
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))


@documented
@dataclass
class DiabloConfig(BlockConfig):
    """Configuration of [`DiabloModel`]: which layers get diagonal blocks, and how many.

    Example:

        model = get_peft_model(base, DiabloConfig(num_blocks=64, target_modules=["q_proj", "v_proj"]))

    Args:
        num_blocks: N, the number of diagonal blocks. A layer gets in_features * out_features / N parameters. A
            dictionary maps name suffixes to N, as suggest_num_blocks returns it; the longest match of a name counts.
        allow_uneven: Accept an N that does not divide a layer's sides: block sides are rounded up and the input is
            padded. False refuses such an N and names the nearest divisors.

    Raises:
        ValueError: a value is out of range, as for `BlockConfig`.
    """

    num_blocks: int | dict[str, int] = 64
    allow_uneven: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = DIABLO
        counts = self.num_blocks.values() if isinstance(self.num_blocks, dict) else [self.num_blocks]
        if not counts or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in counts):
            raise ValueError(f"num_blocks={self.num_blocks!r} must be a whole number of at least 1")

    def blocks_of(self, name: str) -> int:
        """Return N for the layer of this name.

        Raises:
            ValueError: `num_blocks` is a dictionary without an entry for the layer.
        """
        if not isinstance(self.num_blocks, dict):
            return self.num_blocks
        fitting = [key for key in self.num_blocks if name == key or name.endswith(f".{key}")]
        if not fitting:
            raise ValueError(f"num_blocks has no entry for this layer, only {', '.join(sorted(self.num_blocks))}")
        return self.num_blocks[max(fitting, key=len)]
