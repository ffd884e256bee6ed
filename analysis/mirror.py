"""Logs a report's tables to Weights & Biases, next to the runs that training mirrors there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.runs.records import content_hash

if TYPE_CHECKING:
    import pandas as pd

MODES = ("off", "offline", "online")


def mirror(mode: str, title: str, run_ids: Iterable[str], tables: Mapping[str, pd.DataFrame], out: Path) -> None:
    """Log `tables` under their names as one wandb run; a later report on the same runs updates that run.

    Args:
        mode: `off` does nothing, `offline` writes below `out`/wandb, `online` also uploads.
        run_ids: ids of the reported runs.
        tables: frames whose cells are text, numbers or empty; empty tables are skipped.
    """
    if mode == "off":
        return
    import wandb

    identity = f"report-{content_hash(sorted(set(run_ids)))[:16]}"
    out.mkdir(parents=True, exist_ok=True)
    settings = {"project": "diablo", "job_type": "report", "id": identity, "name": title, "resume": "allow"}
    with wandb.init(mode=mode, dir=out, **settings) as run:  # pyright: ignore[reportArgumentType]
        run.log({name: wandb.Table(dataframe=table) for name, table in tables.items() if len(table)})
