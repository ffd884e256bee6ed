"""Settings of a quantisation, and the text it is calibrated with."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from diablo.quantize.apiq import LORA_ALPHA, RANK, gets_factors, train_block
from diablo.quantize.gptq import gptq
from diablo.quantize.grids import QuantizedWeight, check_bits, normal_float, round_to_nearest
from diablo.quantize.loftq import loftq
from diablo.quantize.magr import magr

METHODS: dict[str, Callable[..., Any]] = {
    "rtn": round_to_nearest,
    "nf": normal_float,
    "gptq": gptq,
    "magr": magr,
    "loftq": loftq,
    "apiq": train_block,
}
DATA_FREE = ("rtn", "nf", "loftq")
NORMAL_FLOAT = ("nf", "loftq")
WITH_FACTORS = ("loftq", "apiq")  # methods that also return LoRA factors
# Arguments of those functions that do not come from `options`.
GIVEN = ("weight", "gram", "layer", "inputs", "kwargs", "targets", "bits", "group_size", "sym", "target_modules")


@dataclass(frozen=True)
class QuantizationSettings:
    """How the linear layers in a model's decoder layers are quantised.

    Attributes:
        method: rtn (round to nearest), nf (normal-float), gptq, magr (with GPTQ), loftq or apiq.
        group_size: weights of a row that share a scale; -1 for whole rows.
        sym: use grids symmetric around 0; for rtn, gptq and magr.
        options: other arguments of the method, e.g. `damp_percent` of gptq or `epochs` of apiq.
        target_modules: linear layers, by the last part of their names, to which loftq and apiq give factors; None for
            all. The others are only quantised.

    Raises:
        ValueError: a setting is impossible.
    """

    method: str
    bits: int
    group_size: int = 64
    sym: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    target_modules: list[str] | None = None

    def __post_init__(self) -> None:
        check_bits(self.bits)
        if self.method not in METHODS:
            raise ValueError(f"method={self.method}: choose from {', '.join(METHODS)}")
        if self.sym and "sym" not in self._parameters():
            raise ValueError(f"sym=True: {self.method} has no symmetric grid: leave it out")
        if self.target_modules is not None and not isinstance(self.target_modules, list):
            raise ValueError(f"target_modules={self.target_modules}: give a list of names, or None for all")
        if self.target_modules is not None and self.method not in WITH_FACTORS:
            raise ValueError(f"target_modules: {self.method} makes no factors: leave it out")
        known = [name for name in self._parameters() if name not in GIVEN]
        for name in self.options:
            if name not in known:
                raise ValueError(f"options.{name}: {self.method} takes {', '.join(known) or 'no options'}")

    def quantize(
        self, name: str, weight: Tensor, gram: Tensor | None
    ) -> tuple[QuantizedWeight, tuple[Tensor, Tensor] | None]:
        """Quantise one weight by any method but apiq; also return the factors of loftq.

        Args:
            name: name of its linear layer.
            gram: `XᵀX` of its inputs, for the methods that use it.
        """
        if self.method == "loftq" and not gets_factors(name, self.target_modules):
            return normal_float(weight, self.bits, self.group_size), None
        given = {"gram": gram, "sym": self.sym}
        arguments = {name: value for name, value in given.items() if name in self._parameters()}
        result = METHODS[self.method](weight, bits=self.bits, group_size=self.group_size, **arguments, **self.options)
        return result if self.method in WITH_FACTORS else (result, None)

    @property
    def lora(self) -> tuple[int, float]:
        """Rank and alpha of the LoRA of loftq and apiq."""
        return self.options.get("rank", RANK), self.options.get("lora_alpha", LORA_ALPHA)

    def _parameters(self) -> list[str]:
        return list(inspect.signature(METHODS[self.method]).parameters)


def calibration_windows(tokens: Tensor, samples: int, length: int, seed: int = 0) -> Tensor:
    """Draw random windows of a long text, as GPTQ does from WikiText-2.

    Args:
        tokens: ids of the text, `(n,)`.

    Returns:
        `(samples, length)`.

    Raises:
        ValueError: the text is empty or shorter than one window.
    """
    if tokens.numel() < length or samples < 1 or length < 1:
        raise ValueError(
            f"calibration: {tokens.numel()} tokens do not give {samples} sequences of {length}: give a longer text"
        )
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(tokens.numel() - length + 1, (samples,), generator=generator)
    return torch.stack([tokens.view(-1)[start : start + length] for start in starts.tolist()])
