"""The commands that repeat a run: from its config back to arguments of `experiments.plan`."""

from __future__ import annotations

import json
import shlex

from experiments.config import RunConfig
from experiments.errors import UserError
from experiments.plan.compose import plan
from experiments.rules import Value
from experiments.runs.differences import flattened


def commands(config: RunConfig) -> list[str]:
    """Return the commands that plan, train and score this run; none if no arguments give its very config."""
    names = {"model": config.model.name, "task": config.task.name, "method": config.method.name}
    groups = [*(f"{group}={name}" for group, name in names.items()), f"seed={config.seed}"]
    if config.quantization is not None:
        groups += [f"quantization={config.quantization.method}", f"quantization.bits={config.quantization.bits}"]
    # Needed where the config files have no learning rate for this method, and where the protocol is not the task's own.
    rate, protocol = f"recipe.learning_rate={config.recipe.learning_rate}", f"{config.task.name}/{config.protocol.name}"
    more: tuple[list[str], ...] = ([], [rate], [f"protocol={protocol}"], [rate, f"protocol={protocol}"])
    for arguments in ([*groups, *further] for further in more):
        try:
            (start,) = plan(arguments)
            found = [*arguments, *_changed(start, config)]
            (again,) = plan(found)
        except (UserError, ValueError):
            continue
        if _settings(again) == _settings(config):
            run = f"runs/{config.run_id}"
            quoted = " ".join(shlex.quote(argument) for argument in found)
            return [
                f"python -m experiments.plan {quoted}",
                f"python -m experiments.train {run}",
                f"python -m eval.run {run}",
            ]
    return []


def _settings(config: RunConfig) -> dict[str, Value]:
    kept = {key: value for key, value in config.mapping.items() if key not in ("runtime", "run_id")}
    return flattened(kept)


def _changed(start: RunConfig, config: RunConfig) -> list[str]:
    before, after = _settings(start), _settings(config)
    return [f"{name}={_value(value)}" for name, value in after.items() if before.get(name, start) != value]


def _value(value: Value) -> str:
    """Return a value in Hydra's grammar."""
    if value is None or isinstance(value, bool | int | float):
        return json.dumps(value)
    if isinstance(value, str):
        plain = all(letter.isalnum() or letter in "_-./" for letter in value) and value
        return value if plain else "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
    if isinstance(value, list):
        return f"[{','.join(map(_value, value))}]"
    return "{" + ",".join(f"{key}:{_value(part)}" for key, part in value.items()) + "}"
