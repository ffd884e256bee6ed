"""Methods whose run needs another run first: `prerequisite` in a method's file names the method of that run.

`plan` freezes that method and its learning rate into the config, so that the prerequisite run has all its settings and
is the same run, with the same id, as if it were planned separately. Its directory is next to that of the later run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from experiments.config import RunConfig
from experiments.errors import UserError
from experiments.runs.config_files import freeze_config, run_id
from experiments.runs.records import RunPaths, trained_record
from experiments.settings import typed

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

Config = dict[str, Any]


def freeze_prerequisite(
    settings: Config, overrides: Iterable[Override], resolve: Callable[[Iterable[Override]], RunConfig]
) -> Config:
    """Return the settings with `method.prerequisite`, a name, replaced by that method and its learning rate.

    Both are resolved with the same choices, except the method, its settings and the learning rate.
    """
    method = settings["method"]
    if method.get("prerequisite") is not None:
        from hydra.core.override_parser.overrides_parser import OverridesParser

        if method["prerequisite"] == method["name"]:
            raise UserError(f"method.prerequisite={method['name']}: a method cannot come before itself")
        shared = [override for override in overrides if not _of_the_method(override.key_or_group)]
        parse = OverridesParser.create().parse_override
        try:
            before = resolve([parse(f"method={method['prerequisite']}"), *shared]).mapping
        except UserError as error:
            where = f"configs/method/{method['prerequisite']}.yaml"
            told = str(error).replace("give recipe.learning_rate=…", "add it there")  # that override is for this run
            raise UserError(f"the run that {method['name']} needs first is set only by {where}: {told}") from None
        method["prerequisite"] = {"method": before["method"], "learning_rate": before["recipe"]["learning_rate"]}
    return settings


def _of_the_method(key: str) -> bool:
    return key in ("method", "recipe.learning_rate") or key.startswith("method.")


def prerequisite_config(config: RunConfig) -> RunConfig | None:
    """Return the config of the prerequisite run; None if there is none."""
    before = config.method.prerequisite
    if before is None:
        return None
    method, recipe = config.mapping["method"]["prerequisite"]["method"], config.mapping["recipe"]
    settings = {**config.mapping, "method": method, "recipe": {**recipe, "learning_rate": before.learning_rate}}
    return typed({**settings, "run_id": run_id(settings)})


def prerequisite_run(run: RunPaths, config: RunConfig) -> RunPaths | None:
    """Return the directory of the prerequisite run, planned if it is missing; None if there is none."""
    settings = prerequisite_config(config)
    if settings is None:
        return None
    prerequisite = RunPaths(run.root.parent / settings.run_id)
    freeze_config(prerequisite, settings)
    return prerequisite


def check_base(run: RunPaths, prerequisite: RunPaths, base_hash: str) -> None:
    """Raise a UserError unless the prerequisite run has the same base and its adapter is as training wrote it."""
    trained = trained_record(prerequisite).base_hash
    if trained != base_hash:
        raise UserError(
            f"{run.root.name}: mask from another base: {prerequisite.root.name} was trained on a base model with hash "
            f"{trained[:12]}, this run's base has {base_hash[:12]}: give the same weights (model.path, "
            f"model.revision), or delete {prerequisite.root} to train it again"
        )
