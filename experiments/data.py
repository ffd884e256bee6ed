"""Training and test rows: from the Hugging Face hub, from local files under a data root, or generated.

    python -m experiments.data          # which data sets are to be had here

A row is a flat object of strings. Every row is checked for its fields when it is read.
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from experiments import arith
from experiments.errors import UserError, nearest, run_command
from experiments.records import content_hash

Row = dict[str, str]


@dataclass(frozen=True)
class Source:
    """A data set's places: on the hub, and its files under a data root (JSON lines, or gzip of them)."""

    hub: str
    configuration: str
    revision: str
    files: dict[str, str]  # split -> path under the data root
    rows: dict[str, int]  # split -> how many there must be
    fields: tuple[str, ...]


SOURCES = {
    "gsm8k": Source(
        hub="openai/gsm8k",
        configuration="main",
        revision="e53f048856ff4f594e959d75785d2c2d37b678ee",
        files={"train": "gsm8k/train.jsonl.gz", "test": "gsm8k/test.jsonl.gz"},
        rows={"train": 7473, "test": 1319},
        fields=("question", "answer"),
    ),
}


def load_rows(data: dict[str, Any], split: str, data_root: str | None) -> list[Row]:
    """The rows of a task's `data` config, in their own order."""
    name = data["source"]
    if name == "arith":
        sizes = {part: data[part] for part in arith.SPLITS}
        try:
            return arith.generate(sizes, data["seed"])[split]
        except (ValueError, KeyError) as error:
            raise UserError(f"task.data of arith: {error}") from None
    if name not in SOURCES:
        raise UserError(f"task.data.source={name}: no loader for it yet: {nearest(name, [*SOURCES, 'arith'])}")
    source = SOURCES[name]
    if split not in source.files:
        raise UserError(f"{name} has no split {split!r}: {nearest(split, source.files)}")
    rows = _from_files(name, source, split, Path(data_root)) if data_root else _from_hub(name, source, split)
    if len(rows) != source.rows[split]:
        raise UserError(f"{name} {split}: {len(rows)} rows, there must be {source.rows[split]}: the file is not whole")
    return rows


def rows_hash(rows: list[Row]) -> str:
    return content_hash(rows)


def read_rows(path: Path, fields: tuple[str, ...]) -> list[Row]:
    """Rows of a JSON-lines file, plain or gzipped, with just the fields asked for."""
    rows = []
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line)
                rows.append({field: row[field] for field in fields})
            except ValueError as error:
                raise UserError(f"{path}, line {number}: not valid JSON ({error})") from None
            except (KeyError, TypeError):
                raise UserError(f"{path}, line {number}: a row needs {' and '.join(fields)}") from None
            if not all(isinstance(value, str) for value in rows[-1].values()):
                raise UserError(f"{path}, line {number}: {' and '.join(fields)} must be text")
    return rows


def _from_files(name: str, source: Source, split: str, root: Path) -> list[Row]:
    path = root / source.files[split]
    plain = path.with_suffix("")
    for candidate in (path, plain):
        if candidate.is_file():
            return read_rows(candidate, source.fields)
    raise UserError(
        f"{name} {split}: no {path} (nor {plain.name}): point runtime.data_root or DIABLO_DATA_ROOT at a folder that "
        f"holds it, or leave both unset to load {source.hub} from the hub"
    )


def _from_hub(name: str, source: Source, split: str) -> list[Row]:
    import datasets

    try:
        loaded = datasets.load_dataset(source.hub, source.configuration, split=split, revision=source.revision)
    except Exception as error:  # datasets, huggingface_hub and the HTTP client each raise their own
        raise UserError(
            f"{name} {split}: cannot load {source.hub} from the hub ({str(error).splitlines()[0]}): connect, or point "
            f"runtime.data_root or DIABLO_DATA_ROOT at a folder with {source.files[split]}"
        ) from None
    return [{field: row[field] for field in source.fields} for row in cast(Iterable[Row], loaded)]


def main(arguments: list[str]) -> None:
    import os

    parser = argparse.ArgumentParser(prog="python -m experiments.data", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data-root", default=os.environ.get("DIABLO_DATA_ROOT"), help="default: $DIABLO_DATA_ROOT")
    root = parser.parse_intermixed_args(arguments).data_root
    print("arith        generated, nothing to download")
    for name, source in SOURCES.items():
        for split in source.files:
            try:
                rows = load_rows({"source": name}, split, root)
                place = root or source.hub
                print(f"{name:12} {split:6} {len(rows):>8,} rows  sha256 {rows_hash(rows)[:16]}  from {place}")
            except UserError as error:
                print(f"{name:12} {split:6}  missing: {error}")


if __name__ == "__main__":
    run_command(main)
