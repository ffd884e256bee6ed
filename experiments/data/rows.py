# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
"""Training and test rows: from files under a data root, from the Hugging Face hub, or generated.

`experiments.data.sources` has the table of data sets. Reading a file checks every field of every row.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import os
import random
import shlex
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, cast

from experiments.config import Data
from experiments.data import arith, hub
from experiments.data.sources import HUBS, SOURCES, Hub, Maker, Row, Split
from experiments.errors import UserError, nearest
from experiments.rules import Value
from experiments.runs.sizes import counted


def load_rows(data: Data, split: str, data_root: str | None) -> list[Row]:
    """Return the rows of a task's `data` config in their own order; several sources are concatenated.

    With a data root they come from its files, otherwise from the hub. A run planned without one uses the current value
    of DIABLO_DATA_ROOT.
    """
    if data.source == "arith":
        return _generated(data, split)
    if split in ("train", "heldout"):
        kept, held_out = training_rows(data, data_root)
        return kept if split == "train" else held_out
    return _of_sources(data, split, data_root)


def training_rows(data: Data, data_root: str | None) -> tuple[list[Row], list[Row]]:
    """Return the training rows, split "train", and the rows for choosing a learning rate, split "heldout".

    The latter are `heldout` rows with different questions, drawn from the training rows with a fixed seed; all rows
    with the same questions are removed from the training rows.
    """
    if data.source == "arith":
        return _generated(data, "train"), _generated(data, "heldout")
    return _hold_out(_of_sources(data, "train", data_root), data.heldout)


def _generated(data: Data, split: str) -> list[Row]:
    sizes = {"train": data.train, "heldout": data.heldout, "test": data.test}
    given = {part: size for part, size in sizes.items() if size is not None}
    try:
        if data.seed is None or len(given) < len(sizes):
            raise ValueError("give seed, train, heldout and test")
        return arith.generate(given, data.seed)[split]
    except ValueError as error:
        raise UserError(f"task.data of arith: {error}") from None


def _of_sources(data: Data, split: str, data_root: str | None) -> list[Row]:
    data_root = data_root or os.environ.get("DIABLO_DATA_ROOT")
    names = [data.source] if isinstance(data.source, str) else data.source
    if "arith" in names:
        raise UserError("task.data.source: arith is generated and cannot be joined with other data sets")
    return [row for name in names for row in load_split(name, split, data_root)]


def _hold_out(rows: list[Row], count: int) -> tuple[list[Row], list[Row]]:
    """Return the training rows, and `count` rows whose questions are not in them."""
    if not count:
        return rows, []
    first = {(row["instruction"], row["input"]): index for index, row in reversed(list(enumerate(rows)))}
    if not 0 < count < len(first):
        raise UserError(f"task.data.heldout={count}: the training rows ask {len(first)} different questions")
    chosen = set(random.Random(0).sample(sorted(first), count))
    held_out = sorted(first[question] for question in chosen)
    kept = [row for row in rows if (row["instruction"], row["input"]) not in chosen]
    return kept, [rows[index] for index in held_out]


def rows_hash(rows: list[Row]) -> str:
    """Return `records.content_hash` of the rows without a second copy of their text in memory."""
    digest = hashlib.sha256()
    for index, row in enumerate(rows):
        text = json.dumps(row, sort_keys=True, separators=(",", ":"))
        digest.update(f"{',' if index else '['}{text}".encode())
    digest.update(b"]" if rows else b"[]")
    return digest.hexdigest()


def read_rows(path: Path, make: Maker, columns: tuple[str, ...] | None = None) -> list[Row]:
    """Return the rows that `make` makes from a file's records. `columns`: header of a CSV file without one."""
    return _made(((f"{path}, {place}", record) for place, record in read_records(path, columns)), make)


def load_split(name: str, split: str, data_root: str | None) -> list[Row]:
    if name not in SOURCES:
        raise UserError(f"task.data.source={name}: no such data set: {nearest(name, [*SOURCES, 'arith'])}")
    if split not in SOURCES[name]:
        raise UserError(f"{name} has no split {split!r}: {nearest(split, SOURCES[name])}")
    if data_root:
        path = local_file(SOURCES[name][split], data_root)
        if path is None:
            raise UserError(_missing(name, split, data_root))
        return read_split(name, split, path)
    if name in HUBS:
        return _whole(name, split, _from_hub(HUBS[name], name, split), HUBS[name].name)
    raise UserError(_missing(name, split, None))


def read_split(name: str, split: str, path: Path) -> list[Row]:
    """Return the rows of a data set's file, after checking their number against the table."""
    part = SOURCES[name][split]
    return _whole(name, split, read_rows(path, part.make, part.columns), path)


def _whole(name: str, split: str, rows: list[Row], place: Path | str) -> list[Row]:
    if len(rows) not in (counts := SOURCES[name][split].rows):
        expected = " or ".join(f"{count:,}" for count in counts)
        raise UserError(f"{name} {split}: {counted(len(rows), 'row')}, there must be {expected}: {place} is incomplete")
    return rows


def local_file(part: Split, data_root: str | Path) -> Path | None:
    path = Path(data_root) / part.file
    return next((file for file in (path, path.with_name(f"{path.name}.gz")) if file.is_file()), None)


def _missing(name: str, split: str, data_root: str | None) -> str:
    part = SOURCES[name][split]
    folder = "FOLDER" if data_root is None else shlex.quote(data_root)
    fetch = "" if part.how else f"`python -m experiments.data fetch source={name} --data-root {folder}`, or "
    if data_root is None:
        return (
            f"{name} {split} is not on the hub in this form: point runtime.data_root or DIABLO_DATA_ROOT at a folder "
            f"with {part.file} (or .gz): {fetch}{how(part)}"
        )
    hub = f", or leave both unset to load {HUBS[name].name} from the hub" if name in HUBS else ""
    return (
        f"{name} {split}: no {part.file} (nor .gz) in {data_root}: {fetch}{how(part)}, or point runtime.data_root or "
        f"DIABLO_DATA_ROOT at a folder that holds it{hub}"
    )


def how(part: Split) -> str:
    """Return how to get a file by hand."""
    if part.rebuild:
        return f"make {part.file} from the records in {part.url}"
    packed = ".gz" if part.url.endswith(".gz") else ""
    return (part.how or "save {url} as {file}").format(url=part.url, file=part.file + packed)


def read_records(path: Path, columns: tuple[str, ...] | None) -> Iterator[tuple[str, Any]]:
    """Yield the records of a file, each with its position; JSON lines and CSV are streamed."""
    form = path.name.removesuffix(".gz").rpartition(".")[2]
    opener = gzip.open if path.suffix == ".gz" else open
    place = ""
    try:
        with opener(path, "rt", encoding="utf-8-sig", newline="") as file:
            if form == "csv":
                for number, record in enumerate(csv.DictReader(file, columns, strict=True), start=1):
                    place = f"row {number}"
                    yield place, record
            elif form == "jsonl":
                for number, line in enumerate(file, start=1):
                    place = f"line {number}"
                    if line.strip():
                        yield place, json.loads(line)
            else:
                records: Value = json.load(file)
                if not isinstance(records, list):
                    raise UserError(f"{path}: a JSON list of rows is needed, not {records!r:.40}")
                for index, record in enumerate(records):
                    yield f"row {index + 1}", record
                    records[index] = None  # frees the record; its row is kept instead
    except json.JSONDecodeError as error:
        place = place or f"line {error.lineno}, column {error.colno}"
        raise UserError(f"{path}, {place}: not valid JSON ({error.msg}): is the file whole?") from None
    except (csv.Error, UnicodeDecodeError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        after = f", after {place}" if place else ""
        raise UserError(f"{path}{after}: cannot be read ({error}): is the file whole?") from None


def _made(records: Iterable[tuple[str, Any]], make: Maker) -> list[Row]:
    rows: list[Row] = []
    for place, record in records:
        try:
            if not isinstance(record, dict):
                raise ValueError(f"a row must be an object, not {record!r:.40}")
            row = make(cast(dict[str, Any], record))
        except ValueError as error:
            raise UserError(f"{place}: {error}") from None
        if row is not None:
            rows.append(row)
    return rows


def _from_hub(place: Hub, name: str, split: str) -> list[Row]:
    import datasets

    part = SOURCES[name][split]
    reached = hub.check(hub.data_file(place.name, place.revision))
    rows: list[Row] = []
    for configuration in place.configurations:
        try:
            loaded = datasets.load_dataset(place.name, configuration, split=split, revision=place.revision)
        except Exception as error:  # datasets, huggingface_hub and the HTTP client each raise their own exceptions
            reason = str(error).partition("\n")[0] or type(error).__name__ if reached else "it cannot be reached"
            raise UserError(
                f"{name} {split}: cannot load {place.name} from the hub ({reason}): connect, or point "
                f"runtime.data_root or DIABLO_DATA_ROOT at a folder with {part.file} (or .gz)"
            ) from None
        records = enumerate(cast(Iterable[Any], loaded), start=1)
        rows += _made(((f"{place.name} {configuration} {split}, row {n}", record) for n, record in records), part.make)
    return rows
