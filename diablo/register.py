"""Registers a tuner with PEFT from outside.

PEFT finds tuners in dictionaries keyed by members of its ``PeftType`` enum, which cannot be extended. A member is a
``str``, so a string with the two attributes that PEFT and transformers read (``value``, ``name``) serves as the key.
"""

from __future__ import annotations

from peft import PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner


class PeftTypeName(str):
    """A method's name in place of a member of ``PeftType``."""

    @property
    def name(self) -> str:
        return str(self)

    @property
    def value(self) -> str:
        return str(self)


def peft_type(name: str) -> PeftType:
    """Return PEFT's own member of this name if it exists (a future release may add it), else a stand-in string."""
    if name in PeftType.__members__:
        return PeftType[name]
    return PeftTypeName(name)  # pyright: ignore[reportReturnType]


def register(method: PeftType, config_class: type[PeftConfig], tuner_class: type[BaseTuner]) -> None:
    """Let PEFT create, save and load the method. Calling it again is safe."""
    PEFT_TYPE_TO_CONFIG_MAPPING[method] = config_class
    PEFT_TYPE_TO_TUNER_MAPPING[method] = tuner_class
    PEFT_TYPE_TO_PREFIX_MAPPING[method] = tuner_class.prefix
