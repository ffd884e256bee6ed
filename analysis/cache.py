"""Caches the rows of many runs in one Parquet file between loads; only runs whose files changed are read again.

The cache is in `$DIABLO_CACHE` (default ~/.cache/diablo), one file per set of folders. It can be deleted at any time.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd

from experiments import cache_folder

JSON_COLUMNS = ["environment", "eval_environment", "extra_metrics", "commits", "problems"]
EVALUATION = ("score.json", "plan.json", "samples.jsonl", "judgements.jsonl")
LENGTHS = "item_lengths"  # lengths of the arrays in `items`: one for a single benchmark, several for a mean


def signature(directory: str) -> str:
    """Return names, times and sizes of the files a run's rows are read from; it changes whenever they change."""
    records = ("config.yaml", "learning_rate.json", "train.json", "held_out.json", "diverged.json")
    names = [f"{directory}/{name}" for name in records]
    try:
        for benchmark in sorted(os.listdir(f"{directory}/eval")):
            folder = f"{directory}/eval/{benchmark}"
            for evaluation in sorted(os.listdir(folder)):
                names += [f"{folder}/{evaluation}/{name}" for name in EVALUATION]
    except OSError:  # not evaluated, or a file in place of a folder: reading the run reports it
        pass
    parts = [directory]
    for name in names:
        try:
            found = os.stat(name)
        except OSError:
            parts.append("-")
        else:
            parts.append(f"{name.rpartition('/eval/')[2]} {found.st_mtime_ns} {found.st_size}")
    return "\n".join(parts)


def cached_rows(
    directories: Sequence[Path],
    read: Callable[[Sequence[Path]], list[list[dict[str, Any]]]],
    build: Callable[[Sequence[dict[str, Any]]], pd.DataFrame],
    version: str,
) -> pd.DataFrame:
    """Return the rows of all `directories`, in order; only those whose files changed go through `read`.

    `read` returns the rows of each directory (at least one), and `build` makes a frame from rows. `version` identifies
    what is read and how; another version uses another cache file.
    """
    from experiments.runs.records import content_hash

    parents = sorted(str(parent.resolve()) for parent in {directory.parent for directory in directories})
    path = cache_folder() / "runs" / f"{content_hash([version, parents])[:16]}.parquet"
    wanted = [signature(str(directory)) for directory in directories]
    known = _load(path)
    if known is not None and known["signature"].drop_duplicates().tolist() == wanted:
        return _decode(known)
    places = {} if known is None else known.groupby("signature", sort=False).indices
    missing = [number for number, name in enumerate(wanted) if name not in places]
    fresh = dict(zip(missing, read([directories[number] for number in missing]), strict=True))
    parts: list[pd.DataFrame] = []
    if known is not None:
        kept = [number for number in range(len(wanted)) if number not in fresh]
        rows = [np.asarray(places[wanted[number]]) for number in kept]
        order = np.repeat(kept, [len(found) for found in rows]) if kept else []
        parts.append(known.take(np.concatenate(rows) if rows else []).assign(order=order))
    if fresh:
        numbers = np.repeat(missing, [len(rows) for rows in fresh.values()])
        encoded = _encode(build([row for rows in fresh.values() for row in rows]))
        parts.append(encoded.assign(order=numbers, signature=[wanted[number] for number in numbers]))
    frame = pd.concat([part for part in parts if len(part)], ignore_index=True)
    frame = frame.sort_values("order", kind="stable", ignore_index=True).drop(columns="order")
    _save(frame, path)
    return _decode(frame)


def _encode(frame: pd.DataFrame) -> pd.DataFrame:
    """Return a copy that holds only types that Parquet supports."""
    lists = [[items] if isinstance(items, np.ndarray) else items for items in frame["items"]]
    several = [isinstance(items, list) for items in lists]
    encoded = frame.assign(
        path=frame["path"].map(str),
        items=[np.concatenate(parts) if ok else None for parts, ok in zip(lists, several, strict=True)],
        **{LENGTHS: [[len(part) for part in parts] if ok else None for parts, ok in zip(lists, several, strict=True)]},
    )
    for column in JSON_COLUMNS:
        encoded[column] = [json.dumps(value) if isinstance(value, dict | list) else None for value in frame[column]]
    return encoded


def _decode(frame: pd.DataFrame) -> pd.DataFrame:
    memo: dict[Any, Any] = {}

    def value(text: Any) -> Any:
        if not isinstance(text, str):
            return None
        if text not in memo:
            memo[text] = json.loads(text)
        return memo[text]

    decoded = frame.assign(path=[Path(path) for path in frame["path"]])
    for column in JSON_COLUMNS:
        decoded[column] = pd.Series([value(text) for text in frame[column]], dtype=object)
    decoded["items"] = pd.Series(
        [_parts(items, lengths) for items, lengths in zip(frame["items"], frame[LENGTHS], strict=True)], dtype=object
    )
    return decoded.drop(columns=[LENGTHS, "signature"])


def _parts(items: Any, lengths: Any) -> Any:
    if not isinstance(items, np.ndarray):
        return None
    return items if len(lengths) == 1 else np.split(items, np.cumsum(lengths)[:-1])


def _load(path: Path) -> pd.DataFrame | None:
    if not path.is_file():
        return None
    try:
        return pd.read_parquet(path)
    except (OSError, ValueError):  # incomplete: read everything again
        return None


def _save(frame: pd.DataFrame, path: Path) -> None:
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        frame.to_parquet(cast(Any, aside), index=False)
        os.replace(aside, path)
    except OSError:  # with a full or read-only disk, the next load is only slower
        aside.unlink(missing_ok=True)
