"""What a user can set about DiaBlo."""

from __future__ import annotations

from dataclasses import dataclass, field

from peft import PeftConfig

from diablo.register import peft_type

DIABLO = peft_type("DIABLO")


@dataclass
class DiabloConfig(PeftConfig):
    """Configuration of [`DiabloModel`]: which layers get diagonal blocks, and how many.

    Example:

        model = get_peft_model(base, DiabloConfig(num_blocks=64, target_modules=["q_proj", "v_proj"]))

    Raises:
        ValueError: a value out of range, or `layers_to_transform` with a `target_modules` that is a string.
    """

    num_blocks: int = field(
        default=64,
        metadata={"help": "N, the number of diagonal blocks. A layer gets in_features * out_features / N parameters."},
    )
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Names (or endings) of the linear layers to adapt, or a regular expression, or 'all-linear'. "
            "None takes the paper's choice where the architecture is known: q, k, v, up and down projections."
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
    allow_uneven: bool = field(
        default=False,
        metadata={
            "help": "Accept an N that does not divide a layer's sides: blocks are rounded up and the input is padded. "
            "False refuses such an N and names the nearest ones that divide."
        },
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
        self.peft_type = DIABLO
        if isinstance(self.num_blocks, bool) or not isinstance(self.num_blocks, int) or self.num_blocks < 1:
            raise ValueError(f"num_blocks={self.num_blocks!r} must be a whole number of at least 1")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout={self.dropout!r} must be at least 0 and below 1")
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
