"""A run's config.yaml: reading, writing (once, then frozen), and the hashes of its settings that name runs."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from experiments.config import RunConfig
from experiments.errors import UserError
from experiments.runs.received import check_folder, read_settings
from experiments.runs.records import RunPaths, content_hash, write_atomically
from experiments.settings import check, typed

NOT_IN_THE_ID = ("run_id", "runtime", "evaluation")  # settings that cannot change what is trained
# They change no result, and a run that ran out of memory goes on with others.
MEMORY_SETTINGS = (("runtime", "gradient_checkpointing"), ("runtime", "sharding"), ("evaluation", "batch_size"))


def config_hash(config: Mapping[str, Any]) -> str:
    """Hash every setting that can change the trained result. This and the next three take a config's mapping."""
    kept = {key: value for key, value in config.items() if key not in NOT_IN_THE_ID}
    method = kept["method"]
    if "prerequisite" in method:  # run ids are older than its name
        kept["method"] = {"first" if key == "prerequisite" else key: value for key, value in method.items()}
    return content_hash(kept)


def setting_hash(config: Mapping[str, Any]) -> str:
    """Hash what the runs of one setting share: everything but the seeds of the run and of its adapter."""
    method = config["method"]
    given: dict[str, Any] = method.get("adapter") or {}
    adapter = {key: value for key, value in given.items() if key != "seed"}
    return config_hash({**config, "seed": None, "method": {**method, "adapter": adapter}})


def group_hash(config: Mapping[str, Any]) -> str:
    """Hash what the runs share among which a learning rate is chosen: a setting without its learning rate."""
    return setting_hash({**config, "recipe": {**config["recipe"], "learning_rate": None}})


def run_id(config: Mapping[str, Any]) -> str:
    parts = (config["model"]["name"], config["method"]["label"], config["task"]["name"], f"s{config['seed']}")
    return "-".join([*parts, config_hash(config)[:8]])


def read_config(run: RunPaths) -> RunConfig:
    """Read the run's frozen config. A config that was edited by hand no longer matches its run id and is refused.

    So is a directory with files that no run has: experiments/runs/received.py.
    """
    if not run.config.is_file():
        raise UserError(
            f"{run.root}: no config.yaml, so not a run directory: plan one with `python -m experiments.plan`"
        )
    check_folder(run.root)
    settings = read_settings(run.config)
    try:
        check(settings)
        config, expected = typed(settings), run_id(settings)
    except UserError as error:
        raise UserError(f"{run.config}: {error}") from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{run.config}: not a run's config ({error}): plan the run again") from None
    if expected != config.run_id:
        raise UserError(
            f"{run.config}: edited after planning, its settings belong to {expected}: a run's config is frozen, "
            f"undo the edit or plan a new run"
        )
    if expected != run.root.name:
        raise UserError(
            f"{run.root}: the folder of run {expected} under another name: rename it back to {expected}; "
            f"a copy keeps that name too, in another folder"
        )
    return config


def write_config(run: RunPaths, config: Mapping[str, Any]) -> None:
    """Write a config's mapping."""
    import yaml

    dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)  # the same values, ten times sooner
    write_atomically(run.config, yaml.dump(dict(config), Dumper=dumper, sort_keys=False, allow_unicode=True))


def freeze_config(run: RunPaths, config: RunConfig) -> None:
    """Write a run's config. An existing one is checked and kept, except for `MEMORY_SETTINGS`.

    A value that a submission chose for `auto` is kept too.
    """
    if not run.config.is_file():
        write_config(run, config.mapping)
        return
    frozen = read_config(run).mapping
    renewed = copy.deepcopy(dict(frozen))
    for part, key in MEMORY_SETTINGS:
        if config.mapping[part][key] != "auto":
            renewed[part][key] = config.mapping[part][key]
    if renewed != frozen:
        write_config(run, renewed)
