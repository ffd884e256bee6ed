"""What a user can set about DiaBlo."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from peft import PeftConfig

from diablo.register import peft_type

DIABLO = peft_type("DIABLO")


@dataclass
class BlockConfig(PeftConfig):
    """What all methods that train blocks of weights have in common.

    Raises:
        ValueError: a value out of range, or `layers_to_transform` with a `target_modules` that is a string.
    """

    mode: Literal["auto", "adapter", "in_place"] = field(
        default="auto",
        metadata={
            "help": "How the blocks are computed with. 'in_place' trains them inside the weight, with one matrix "
            "product as the frozen layer; it needs dropout 0, a plain nn.Linear and a single active adapter. 'adapter' "
            "adds a side branch. 'auto' takes in_place where it can be had, unless a diagonal block's side is below 16."
        },
    )
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Names (or endings) of the linear layers to adapt, or a regular expression, or 'all-linear'. "
            "None takes the method's own choice where the architecture is known; DiaBlo's is q, k, v, up and down."
        },
    )
    exclude_modules: list[str] | str | None = field(
        default=None,
        metadata={"help": "Names (or endings) of modules not to adapt, or a regular expression."},
    )
    dropout: float = field(
        default=0.0,
        metadata={"help": "Dropout on the blocks' input while training; the base layer's input is never dropped."},
    )
    modules_to_save: list[str] | None = field(
        default=None,
        metadata={"help": "Modules that are trained in full and saved beside the blocks, such as a new classifier."},
    )
    layers_to_transform: list[int] | int | None = field(
        default=None,
        metadata={"help": "Indices of the layers to adapt; None adapts all. Needs target_modules as a list."},
    )
    layers_pattern: list[str] | str | None = field(
        default=None,
        metadata={"help": "Name of the list of layers that layers_to_transform counts in, such as 'layers' or 'h'."},
    )
    init_weights: bool = field(
        default=True,
        metadata={"help": "Blocks start at zero, so that attaching changes nothing. False draws them (for tests)."},
    )

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
            # PEFT matches a string against the whole name and would ignore these two without a word.
            if isinstance(self.target_modules, str) and getattr(self, name) is not None:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} has no effect with target_modules={self.target_modules!r}: "
                    "give target_modules as a list of names"
                )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(f"layers_pattern={self.layers_pattern!r} needs layers_to_transform as well")
        # Sets, as in PEFT's own configs: it tests membership for every module of the model.
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))


@dataclass
class DiabloConfig(BlockConfig):
    """Configuration of [`DiabloModel`]: which layers get diagonal blocks, and how many.

    Example:

        model = get_peft_model(base, DiabloConfig(num_blocks=64, target_modules=["q_proj", "v_proj"]))

    Raises:
        ValueError: a value out of range, as for `BlockConfig`.
    """

    num_blocks: int | dict[str, int] = field(
        default=64,
        metadata={
            "help": "N, the number of diagonal blocks. A layer gets in_features * out_features / N parameters. A "
            "dictionary gives each layer the N of the name that its own name ends with, as suggest_num_blocks makes it."
        },
    )
    allow_uneven: bool = field(
        default=False,
        metadata={
            "help": "Accept an N that does not divide a layer's sides: blocks are rounded up and the input is padded. "
            "False refuses such an N and names the nearest ones that divide."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = DIABLO
        counts = self.num_blocks.values() if isinstance(self.num_blocks, dict) else [self.num_blocks]
        if not counts or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in counts):
            raise ValueError(f"num_blocks={self.num_blocks!r} must be a whole number of at least 1")

    def blocks_of(self, name: str) -> int:
        """N of the layer of this name.

        Raises:
            ValueError: `num_blocks` is a dictionary without an entry for it.
        """
        if not isinstance(self.num_blocks, dict):
            return self.num_blocks
        fitting = [key for key in self.num_blocks if name == key or name.endswith(f".{key}")]
        if not fitting:
            raise ValueError(f"num_blocks has no entry for this layer, only {', '.join(sorted(self.num_blocks))}")
        return self.num_blocks[max(fitting, key=len)]
