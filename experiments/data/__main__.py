"""Lists the local data sets, and fetches missing ones.

python -m experiments.data check                          # list local data sets, and how to get the others
python -m experiments.data check task=commonsense_170k    # only those of a task: training data and benchmarks
python -m experiments.data fetch task=commonsense_170k    # download the missing ones
"""

from __future__ import annotations

import argparse
import os

import yaml

from experiments import CONFIGS
from experiments.data import hub
from experiments.data.pinned import not_pinned
from experiments.data.rows import how, load_split, local_file, rows_hash
from experiments.data.sources import HUBS, SOURCES
from experiments.errors import UserError, nearest, run_command
from experiments.plan.compose import options
from experiments.runs.evaluations import task_of


def named_splits(words: list[str]) -> list[tuple[str, str]]:
    """Return the (data set, split) pairs of `task=A,B` (training data and benchmarks) and of `source=C,D`.

    All pairs if no words are given.
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
    if name not in (known := options("task")):
        raise UserError(f"task={name}: no such task: {nearest(name, known)}")
    task = yaml.safe_load((CONFIGS / "task" / f"{name}.yaml").read_text(encoding="utf-8"))["task"]
    source = task["data"]["source"]
    found = [(source, "train")] if isinstance(source, str) else [(part, "train") for part in source]
    for benchmark in map(task_of, task["benchmarks"]):
        found.append((benchmark["metadata"]["source"], benchmark["test_split"]))
    return found


def _of_source(name: str) -> list[tuple[str, str]]:
    if name == "arith":
        return [(name, "any")]
    if name not in SOURCES:
        raise UserError(f"source={name}: no such data set: {nearest(name, [*SOURCES, 'arith'])}")
    return [(name, split) for split in SOURCES[name]]


def check(splits: list[tuple[str, str]], data_root: str | None, from_hub: bool) -> int:
    """Print what is local, and how to get what is missing. Returns 1 if a local file is wrong, else 0."""
    if from_hub and not hub.check():
        raise UserError("the Hugging Face hub cannot be reached: connect, or leave out --hub")
    line = "{:16}  {:5}  {:>7}  {:16}  {}".format
    print(line("data set", "split", "rows", "sha256 of rows", "place"))
    absent: list[str] = []
    broken: list[str] = []
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
            rows = load_split(name, split, data_root if path else None)
        except UserError as error:
            print(line(name, split, "", "", "broken" if path else "unavailable on the hub"))
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
            f"\nmissing; files belong under the data root ({data_root or 'DIABLO_DATA_ROOT, not set'}), "
            "`python -m experiments.data fetch task=… or source=…` downloads them:"
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
        help="check: list local data sets (default); fetch: download missing ones and check them",
    )
    parser.add_argument(
        "which",
        nargs="*",
        metavar="task=NAME,…|source=NAME,…",
        help="data sets of these tasks, or these data sets; check lists all if none is given",
    )
    parser.add_argument("--data-root", default=os.environ.get("DIABLO_DATA_ROOT"), help="default: $DIABLO_DATA_ROOT")
    parser.add_argument("--hub", action="store_true", help="check: also load missing data sets from the hub")
    options = parser.parse_intermixed_args(arguments)
    splits = named_splits(options.which)
    if options.command == "check":
        return check(splits, options.data_root, options.hub)
    if options.hub or not options.which:
        parser.error("--hub is only for check" if options.hub else "fetch needs task=NAME,… or source=NAME,…")
    from experiments.data.fetch import fetch

    return fetch(splits, options.data_root)


if __name__ == "__main__":
    run_command(main)
