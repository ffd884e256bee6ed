"""Training and test rows: from local files under a data root, from the Hugging Face hub, or generated.

    python -m experiments.data check                          # which data sets are here, and how to get the others
    python -m experiments.data check task=commonsense_170k    # a task's alone: its training data and benchmarks
    python -m experiments.data fetch task=commonsense_170k    # download what is missing of them (experiments/fetch.py)

`experiments.sources` has the table of data sets. Every field of every row is checked when a file is read.
"""

from __future__ import annotations

import argparse
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

import yaml

from experiments import arith, hub
from experiments.errors import UserError, nearest, run_command
from experiments.pinned import not_pinned
from experiments.sources import HUBS, SOURCES, Hub, Maker, Row, Split


def load_rows(data: dict[str, Any], split: str, data_root: str | None) -> list[Row]:
    """The rows of a task's `data` config in their own order; of several sources one after the other.

    With a data root they come from its files, without one from the hub. A run that was planned without one takes
    DIABLO_DATA_ROOT as it is now.
    """
    if data["source"] == "arith":
        return _generated(data, split)
    if split in ("train", "heldout"):
        kept, held_out = training_rows(data, data_root)
        return kept if split == "train" else held_out
    return _of_sources(data, split, data_root)


def training_rows(data: dict[str, Any], data_root: str | None) -> tuple[list[Row], list[Row]]:
    """The rows to train on, the split "train", and those to choose a learning rate by, the split "heldout".

    The second are what `heldout` keeps out of the first: so many rows with different questions, drawn with a fixed
    seed. Rows that ask the same leave the training rows with them.
    """
    if data["source"] == "arith":
        return _generated(data, "train"), _generated(data, "heldout")
    return _hold_out(_of_sources(data, "train", data_root), data.get("heldout", 0))


def _generated(data: dict[str, Any], split: str) -> list[Row]:
    sizes = {part: data[part] for part in arith.SPLITS}
    try:
        return arith.generate(sizes, data["seed"])[split]
    except (ValueError, KeyError) as error:
        raise UserError(f"task.data of arith: {error}") from None


def _of_sources(data: dict[str, Any], split: str, data_root: str | None) -> list[Row]:
    data_root = data_root or os.environ.get("DIABLO_DATA_ROOT")
    names = [data["source"]] if isinstance(data["source"], str) else data["source"]
    if "arith" in names:
        raise UserError("task.data.source: arith is generated and cannot be joined with other data sets")
    return [row for name in names for row in _load(name, split, data_root)]


def _hold_out(rows: list[Row], count: int) -> tuple[list[Row], list[Row]]:
    """The training rows, and `count` rows whose questions are not among them."""
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
    """`records.content_hash` of the rows, without their text in memory a second time."""
    digest = hashlib.sha256()
    for index, row in enumerate(rows):
        text = json.dumps(row, sort_keys=True, separators=(",", ":"))
        digest.update(f"{',' if index else '['}{text}".encode())
    digest.update(b"]" if rows else b"[]")
    return digest.hexdigest()


def read_rows(path: Path, make: Maker, columns: tuple[str, ...] | None = None) -> list[Row]:
    """The rows that `make` makes of a file's records. `columns` are those of a CSV file without a header."""
    return _made(((f"{path}, {place}", record) for place, record in read_records(path, columns)), make)


def _load(name: str, split: str, data_root: str | None) -> list[Row]:
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
    """The rows of a data set's file, which must be as many as the table says."""
    part = SOURCES[name][split]
    return _whole(name, split, read_rows(path, part.make, part.columns), path)


def _whole(name: str, split: str, rows: list[Row], place: Path | str) -> list[Row]:
    if len(rows) not in (counts := SOURCES[name][split].rows):
        expected = " or ".join(f"{count:,}" for count in counts)
        raise UserError(f"{name} {split}: {len(rows):,} rows, there must be {expected}: {place} is not whole")
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
    """How to get a file by hand."""
    if part.rebuild:
        return f"make {part.file} of the records of {part.url}"
    packed = ".gz" if part.url.endswith(".gz") else ""
    return (part.how or "save {url} as {file}").format(url=part.url, file=part.file + packed)


def read_records(path: Path, columns: tuple[str, ...] | None) -> Iterator[tuple[str, Any]]:
    """The records of a file, each with its place. Of JSON lines and CSV one is in memory at a time."""
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
                records = json.load(file)
                if not isinstance(records, list):
                    raise UserError(f"{path}: a JSON list of rows is needed, it holds {records!r:.40}")
                for index, record in enumerate(records):
                    yield f"row {index + 1}", record
                    records[index] = None  # the row that was made of it is kept instead
    except json.JSONDecodeError as error:
        place = place or f"line {error.lineno}, column {error.colno}"
        raise UserError(f"{path}, {place}: not valid JSON ({error.msg}): is the file whole?") from None
    except (csv.Error, UnicodeDecodeError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        after = f", after {place}" if place else ""
        raise UserError(f"{path}{after}: cannot be read ({error}): is the file whole?") from None


def _made(records: Iterable[tuple[str, Any]], make: Maker) -> list[Row]:
    rows = []
    for place, record in records:
        try:
            if not isinstance(record, dict):
                raise ValueError(f"a row must be an object, it is {record!r:.40}")
            row = make(record)
        except ValueError as error:
            raise UserError(f"{place}: {error}") from None
        if row is not None:
            rows.append(row)
    return rows


def _from_hub(place: Hub, name: str, split: str) -> list[Row]:
    import datasets

    part = SOURCES[name][split]
    reached, rows = hub.check(hub.data_file(place.name, place.revision)), []
    for configuration in place.configurations:
        try:
            loaded = datasets.load_dataset(place.name, configuration, split=split, revision=place.revision)
        except Exception as error:  # datasets, huggingface_hub and the HTTP client each raise their own
            reason = str(error).partition("\n")[0] or type(error).__name__ if reached else "it cannot be reached"
            raise UserError(
                f"{name} {split}: cannot load {place.name} from the hub ({reason}): connect, or point "
                f"runtime.data_root or DIABLO_DATA_ROOT at a folder with {part.file} (or .gz)"
            ) from None
        records = enumerate(cast(Iterable[Any], loaded), start=1)
        rows += _made(((f"{place.name} {configuration} {split}, row {n}", record) for n, record in records), part.make)
    return rows


def named_splits(words: list[str]) -> list[tuple[str, str]]:
    """Data sets and splits of `task=A,B`, which are its training data and its benchmarks', and of `source=C,D`.

    All there are, if none is named.
    """
    found: dict[tuple[str, str], None] = {}
    for word in words:
        kind, equals, names = word.partition("=")
        if kind not in ("task", "source") or not equals:
            raise UserError(f"{word}: give task=NAME,… or source=NAME,…")
        for name in names.split(","):
            found |= dict.fromkeys(_of_task(name) if kind == "task" else _of_source(name))
    return list(found) if words else [*_of_source("arith"), *(pair for name in SOURCES for pair in _of_source(name))]


def _of_task(name: str) -> list[tuple[str, str]]:
    from experiments import evaluations
    from experiments.plan import options

    if name not in (known := options("task")):
        raise UserError(f"task={name}: no such task: {nearest(name, known)}")
    task = yaml.safe_load((evaluations.CONFIGS / "task" / f"{name}.yaml").read_text(encoding="utf-8"))["task"]
    source = task["data"]["source"]
    found = [(source, "train")] if isinstance(source, str) else [(part, "train") for part in source]
    for benchmark in map(evaluations.task_of, task["benchmarks"]):
        found.append((benchmark["metadata"]["source"], benchmark["test_split"]))
    return found


def _of_source(name: str) -> list[tuple[str, str]]:
    if name == "arith":
        return [(name, "any")]
    if name not in SOURCES:
        raise UserError(f"source={name}: no such data set: {nearest(name, [*SOURCES, 'arith'])}")
    return [(name, split) for split in SOURCES[name]]


def check(splits: list[tuple[str, str]], data_root: str | None, from_hub: bool) -> int:
    """Print what the data sets have here, and how to get what is missing. 1 if a file that is there is not right."""
    if from_hub and not hub.check():
        raise UserError("the Hugging Face hub cannot be reached: connect, or leave out --hub")
    line = "{:16}  {:5}  {:>7}  {:16}  {}".format
    print(line("data set", "split", "rows", "sha256 of rows", "place"))
    absent, broken = [], []
    for name, split in splits:
        if name == "arith":
            print(line(name, split, "", "", "generated"))
            continue
        part = SOURCES[name][split]
        path = local_file(part, data_root) if data_root else None
        if path is None and not (from_hub and name in HUBS):
            print(line(name, split, "", "", "not local"))
            online = f"; without a data root a run loads {HUBS[name].name} from the hub" if name in HUBS else ""
            absent.append(f"  {name} {split}: {how(part)}{online}")
            continue
        try:
            rows = _load(name, split, data_root if path else None)
        except UserError as error:
            print(line(name, split, "", "", "broken" if path else "not to be had from the hub"))
            (broken if path else absent).append(f"  {error}")
            continue
        place = str(path.relative_to(data_root or "")) if path else f"hub: {HUBS[name].name}"
        if path and (problem := not_pinned(part.file, path)):
            place = "other bytes"
            broken.append(f"  {name} {split}: {path} has the right rows, but is not the pinned file: {problem}")
        print(line(name, split, f"{len(rows):,}", rows_hash(rows)[:16], place))
    if broken:
        print("\nbroken:", *broken, sep="\n")
    if absent:
        print(
            f"\nnot here; files belong under the data root ({data_root or 'DIABLO_DATA_ROOT, not set'}), "
            "`python -m experiments.data fetch task=… or source=…` puts them there:"
        )
        print(*absent, sep="\n")
    return 1 if broken else 0


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "command",
        nargs="?",
        choices=["check", "fetch"],
        default="check",
        help="check: list what is here (default); fetch: download what is missing, check it and put it in place",
    )
    parser.add_argument(
        "which",
        nargs="*",
        metavar="task=NAME,…|source=NAME,…",
        help="the data sets of these tasks, or these data sets; check takes all if none is named",
    )
    parser.add_argument("--data-root", default=os.environ.get("DIABLO_DATA_ROOT"), help="default: $DIABLO_DATA_ROOT")
    parser.add_argument("--hub", action="store_true", help="check: also load what is not local from the hub")
    options = parser.parse_intermixed_args(arguments)
    splits = named_splits(options.which)
    if options.command == "check":
        return check(splits, options.data_root, options.hub)
    if options.hub or not options.which:
        parser.error("--hub is for check alone" if options.hub else "fetch what? give task=NAME,… or source=NAME,…")
    from experiments.fetch import fetch

    return fetch(splits, options.data_root)


if __name__ == "__main__":
    run_command(main)
