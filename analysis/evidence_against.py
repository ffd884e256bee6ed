"""Which of the findings that docs/evidence.md registered as counting against DiaBlo were made.

The findings were registered; how each is decided, below, was written after the runs. With fewer than
`SEEDS_FOR_A_VERDICT` common seeds a comparison decides nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from analysis.evidence_runs import LOW_RANK, OURS, PRIMARY, RETENTION, SIZES, Comparison, Setting, common_seeds
from analysis.nll import MARGIN, Difference, nll_difference
from analysis.results_tables import signed

YES, NO, UNKNOWN = "yes", "no", "cannot say"
Test = Callable[[Difference], bool]


@dataclass(frozen=True)
class Finding:
    """What would count against DiaBlo, whether it was found, and the numbers: first minus second, 95 % interval."""

    registered: str
    found: str
    numbers: str


def findings(settings: dict[str, Setting], comparisons: Sequence[Comparison]) -> list[Finding]:
    """Return the registered findings for which anything has been compared yet, in their order."""
    low_rank = [row for row in comparisons if row.question == "a" and row.second != "full"]
    full = [row for row in comparisons if row.question == "a" and row.second == "full"]
    blocks = [row for row in comparisons if row.question == "b" and row.second.endswith("_block")]
    names = ("sparse-random_row", "sparse-random_column", "sparse-random_entry")
    shapes = [row for row in comparisons if row.question == "b" and row.second in names]
    smallest, largest = SIZES[0][0], SIZES[-1][0]
    forgotten = {ours: _forgotten(settings, ours, f"lora-{rank}") for ours, rank in SIZES}
    found = [
        (
            "LoRA, DoRA, PiSSA or MiLoRA is better at both sizes",
            _better_at_both(low_rank),
            _listed([row for row in low_rank if row.difference.low > 0]) or "no interval above 0" * bool(low_rank),
        ),
        (
            f"Full fine-tuning is better by more than {MARGIN}",
            _any_or_none(full, lambda d: d.low > MARGIN, lambda d: d.high < MARGIN),
            _listed(full),
        ),
        (
            f"Random or permuted blocks are as good as the diagonal, within {MARGIN}",
            _any_or_none(blocks, lambda d: d.low > -MARGIN, lambda d: d.high < -MARGIN),
            _listed(blocks),
        ),
        (
            f"Random rows, columns or entries are better, by more than {MARGIN}",
            _any_or_none(shapes, lambda d: d.low > MARGIN, lambda d: d.high < MARGIN),
            _listed(shapes),
        ),
        ("The NLL does not fall with more parameters", *_falls(settings, largest, smallest)),
        (
            f"At an equal gain, within {MARGIN}, more is forgotten than with LoRA",
            _all_or_none([pair[1] for pair in forgotten.values() if pair is not None and pair[0].is_within_margin]),
            "; ".join(_told_of(ours, rank, *pair) for ours, rank in SIZES if (pair := forgotten[ours]) is not None),
        ),
    ]
    return [Finding(*row) for row in found if row[2]]


def _better_at_both(rows: Sequence[Comparison]) -> str:
    """The same method better at both sizes; "no" once every method is not better at one of them, within the margin."""
    sizes = (OURS, SIZES[0][0])
    by_method = [
        [
            row
            for row in rows
            if row.second.startswith(f"{name}-") and row.first in sizes and row.difference.has_enough_seeds
        ]
        for name in LOW_RANK
    ]
    if not any(by_method):
        return UNKNOWN
    if any(len(each) == len(sizes) and all(row.verdict.startswith("worse") for row in each) for each in by_method):
        return YES
    return NO if all(any(row.difference.high < MARGIN for row in each) for each in by_method) else UNKNOWN


def _any_or_none(rows: Sequence[Comparison], yes: Test, no: Test) -> str:
    """One comparison is enough for the finding; every one is needed against it."""
    known = [row.difference for row in rows if row.difference.has_enough_seeds]
    if any(yes(difference) for difference in known):
        return YES
    return NO if known and len(known) == len(rows) and all(no(difference) for difference in known) else UNKNOWN


def _all_or_none(differences: Sequence[Difference]) -> str:
    known = [difference for difference in differences if difference.has_enough_seeds]
    if not known:
        return UNKNOWN
    if all(difference.low > 0 for difference in known):
        return YES
    return NO if all(difference.high < 0 for difference in known) else UNKNOWN


def _falls(settings: dict[str, Setting], most: str, fewest: str) -> tuple[str, str]:
    """From the fewest to the most parameters; the numbers are empty if the two cannot be compared."""
    difference = _difference(settings, most, fewest, PRIMARY)
    if difference is None:
        return UNKNOWN, ""
    found = NO if difference.high < 0 else YES if difference.low > -MARGIN else UNKNOWN
    return found if difference.has_enough_seeds else UNKNOWN, f"{most} − {fewest} {_interval(difference)}"


def _forgotten(settings: dict[str, Setting], ours: str, theirs: str) -> tuple[Difference, Difference] | None:
    """Return the differences in gain and in what is forgotten."""
    gain, forgotten = (_difference(settings, ours, theirs, *names) for names in ((PRIMARY,), RETENTION))
    return None if gain is None or forgotten is None else (gain, forgotten)


def _difference(settings: dict[str, Setting], first: str, second: str, *benchmarks: str) -> Difference | None:
    """Return the difference of two settings, or None if one was not run or they share fewer than two seeds."""
    if first not in settings or second not in settings:
        return None
    pair = common_seeds(settings[first], settings[second], benchmarks)
    return None if pair is None else nll_difference(*pair)


def _told_of(ours: str, rank: str, gain: Difference, forgotten: Difference) -> str:
    equal = "equal gain" if gain.is_within_margin else "gain not shown to be equal"
    return f"{ours} − lora-{rank} {_interval(forgotten)}, {equal}"


def _listed(rows: Sequence[Comparison]) -> str:
    return "; ".join(f"{row.first} − {row.second} {_interval(row.difference)}" for row in rows)


def _interval(difference: Difference) -> str:
    low, mean, high = (signed(value, 3) for value in (difference.low, difference.mean, difference.high))
    return f"{mean} ({low} to {high})"
