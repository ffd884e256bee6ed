"""The settings that distinguish runs whose names differ only in the hash."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from experiments.config import RunConfig
from experiments.rules import Value
from experiments.runs.config_files import NOT_IN_THE_ID


def differing(configs: Sequence[RunConfig], leave_out: Sequence[str] = ()) -> dict[str, str]:
    """Return, by run id, how a run differs from those with the same name before the hash: `key=value …`.

    Args:
        leave_out: settings shown elsewhere.
    """
    named: dict[str, list[RunConfig]] = {}
    for config in configs:
        named.setdefault(config.run_id.rpartition("-")[0], []).append(config)
    found: dict[str, str] = {}
    for group in named.values():
        kept = [{key: part for key, part in config.mapping.items() if key not in NOT_IN_THE_ID} for config in group]
        flat = [flattened(settings) for settings in kept]
        keys = [key for key in {key: None for settings in flat for key in settings} if key not in leave_out]
        apart = [key for key in keys if len({repr(settings.get(key)) for settings in flat}) > 1]
        apart = _by_protocol(flat, apart)
        # A setting that others refer to (e.g. a recipe's dropout, used by an adapter) is shown once.
        shown = list({tuple(repr(settings.get(key)) for settings in flat): key for key in reversed(apart)}.values())
        for config, settings in zip(group, flat, strict=True):
            text = " ".join(f"{key}={_short(settings.get(key))}" for key in reversed(shown))
            if text:
                found[config.run_id] = text
    return found


def _by_protocol(flat: list[dict[str, Any]], apart: list[str]) -> list[str]:
    """Reduce a protocol's settings to its name, if that distinguishes the runs equally well."""
    named = [key for key in apart if not key.startswith("protocol.") or key == "protocol.name"]
    different = [len({tuple(repr(settings.get(key)) for key in keys) for settings in flat}) for keys in (named, apart)]
    return named if different[0] == different[1] else apart


def _short(value: Any) -> str:
    """Format a value on one line of limited length."""
    text = " ".join(str(value).split())
    return text if len(text) <= 40 else f"{text[:39]}…"


def flattened(value: Value, *path: str) -> dict[str, Any]:
    """Return all settings by their dotted names; a list is one value."""
    if not isinstance(value, dict) or not value:
        return {".".join(path): value}
    return {name: leaf for key, part in value.items() for name, leaf in flattened(part, *path, str(key)).items()}
