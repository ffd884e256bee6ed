"""Which of the findings that docs/evidence.md registered as counting against DiaBlo were made."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from analysis.evidence_runs import LOW_RANK, PRIMARY, RETENTION, SIZES, Comparison, Setting, common_seeds
from analysis.nll import MARGIN, Difference, nll_difference

YES, NO, UNKNOWN = "yes", "no", "cannot say"


@dataclass(frozen=True)
class Finding:
    """What would count against DiaBlo, whether it was found, and the numbers."""

    registered: str
    found: str
    numbers: str


def findings(settings: dict[str, Setting], comparisons: Sequence[Comparison]) -> list[Finding]:
    """Return the registered findings for which anything has been compared yet, in their order."""
    by_pair = {(row.question, row.first, row.second): row for row in comparisons}
    found = [_low_rank(by_pair), _full(by_pair), _blocks(by_pair), _shapes(by_pair), _sizes(settings)]
    return [finding for finding in [*found, _forgetting(settings)] if finding is not None]


Pairs = dict[tuple[str, str, str], Comparison]


def _low_rank(by_pair: Pairs) -> Finding | None:
    """The same method better at both sizes; "cannot say" unless it is not better anywhere."""
    rows = {
        name: [by_pair[key] for ours, rank in (SIZES[0], SIZES[2]) if (key := ("a", ours, f"{name}-{rank}")) in by_pair]
        for name in LOW_RANK
    }
    if not all(rows.values()):
        return None
    worse = {name: sum(row.verdict.startswith("worse") for row in of_name) for name, of_name in rows.items()}
    found = YES if 2 in worse.values() else UNKNOWN
    if all(_within(row.difference) or row.verdict.startswith("better") for each in rows.values() for row in each):
        found = NO
    numbers = "; ".join(f"{name} better at {count} of {len(rows[name])} sizes" for name, count in worse.items())
    return Finding("LoRA, DoRA, PiSSA or MiLoRA is better at both sizes", found, numbers)


def _full(by_pair: Pairs) -> Finding | None:
    rows = [row for (letter, _, second), row in by_pair.items() if letter == "a" and second == "full"]
    if not rows:
        return None
    if all(row.difference.low > MARGIN for row in rows):
        found = YES
    else:
        found = NO if all(row.difference.high < MARGIN for row in rows) else UNKNOWN
    return Finding(f"Full fine-tuning is better by more than {MARGIN}", found, _listed(rows))


def _blocks(by_pair: Pairs) -> Finding | None:
    rows = [row for (letter, _, second), row in by_pair.items() if letter == "b" and second.endswith("_block")]
    if not rows:
        return None
    as_good = any(_within(row.difference) or row.verdict == "worse" for row in rows)
    found = YES if as_good else NO if all(row.verdict == "better" for row in rows) else UNKNOWN
    return Finding(f"Random or permuted blocks are as good as the diagonal, within {MARGIN}", found, _listed(rows))


def _shapes(by_pair: Pairs) -> Finding | None:
    names = ("sparse-random_row", "sparse-random_column", "sparse-random_entry")
    rows = [row for (letter, _, second), row in by_pair.items() if letter == "b" and second in names]
    if not rows:
        return None
    if any(row.verdict.startswith("worse") for row in rows):
        found = YES
    else:
        found = NO if all(row.difference.high < MARGIN for row in rows) else UNKNOWN
    return Finding("Random rows, columns or entries are better", found, _listed(rows))


def _sizes(settings: dict[str, Setting]) -> Finding | None:
    """From fewer to more parameters: the NLL of each size, means over seeds."""
    sizes = [settings[ours] for ours, _ in SIZES if ours in settings]
    if len(sizes) < 2:
        return None
    nll = [setting.nll(PRIMARY) for setting in sizes]
    falls = all(more < fewer for fewer, more in pairwise(nll))
    numbers = ", ".join(f"{setting.name} {value:.4f}" for setting, value in zip(sizes, nll, strict=True))
    return Finding("The NLL does not fall with more parameters", NO if falls else YES, numbers)


def _forgetting(settings: dict[str, Setting]) -> Finding | None:
    """At every size of which neither method gains clearly more: the difference in what is forgotten."""
    rows = list(_forgotten_at_equal_gain(settings))
    if not rows:
        return None
    more = [difference.low > 0 for _, difference in rows]
    found = YES if all(more) else NO if not any(more) else f"{YES}, at {sum(more)} of {len(more)} sizes"
    numbers = "; ".join(f"{pair} {_interval(difference)}" for pair, difference in rows)
    return Finding("At an equal gain, more is forgotten than with LoRA", found, numbers)


def _forgotten_at_equal_gain(settings: dict[str, Setting]) -> Iterator[tuple[str, Difference]]:
    for ours, rank in SIZES:
        theirs = f"lora-{rank}"
        if ours not in settings or theirs not in settings:
            continue
        pair = settings[ours], settings[theirs]
        gain, forgotten = (common_seeds(*pair, names) for names in ((PRIMARY,), RETENTION))
        if gain is None or forgotten is None:
            continue
        difference = nll_difference(*gain)
        if difference.low <= MARGIN and difference.high >= -MARGIN:
            yield f"{ours} − {theirs}", nll_difference(*forgotten)


def _within(difference: Difference) -> bool:
    return difference.low > -MARGIN and difference.high < MARGIN


def _listed(rows: Sequence[Comparison]) -> str:
    return "; ".join(f"{row.first} − {row.second} {_interval(row.difference)}" for row in rows)


def _interval(difference: Difference) -> str:
    low, mean, high = (
        f"{value:+.3f}".replace("-", "−") for value in (difference.low, difference.mean, difference.high)
    )
    return f"{mean} ({low} to {high})"
