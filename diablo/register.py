"""Makes a tuner known to PEFT from outside.

PEFT finds tuners in dictionaries keyed by members of its ``PeftType`` enum, which cannot be extended. A member is a
``str``, so a string with the two attributes that PEFT and transformers read (``value``, ``name``) serves as the key.
"""

from __future__ import annotations

from peft import PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner


class PeftTypeName(str):
    """A method's name that stands in for a member of ``PeftType``."""

    @property
    def name(self) -> str:
        return str(self)

    @property
    def value(self) -> str:
        return str(self)


def peft_type(name: str) -> PeftType:
    """PEFT's own member of this name if it has one (a future release may), else a string that stands in for it."""
    if name in PeftType.__members__:
        return PeftType[name]
    return PeftTypeName(name)  # pyright: ignore[reportReturnType]


def register(method: PeftType, config_class: type[PeftConfig], tuner_class: type[BaseTuner]) -> None:
    """Lets PEFT build, save and load the method. Safe to call again."""
    PEFT_TYPE_TO_CONFIG_MAPPING[method] = config_class
    PEFT_TYPE_TO_TUNER_MAPPING[method] = tuner_class
    PEFT_TYPE_TO_PREFIX_MAPPING[method] = tuner_class.prefix
