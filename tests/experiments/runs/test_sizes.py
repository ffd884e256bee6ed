"""Numbers as text."""

from __future__ import annotations

from experiments.runs.sizes import counted


def test_one_is_singular() -> None:
    assert [counted(n, "run") for n in (0, 1, 2, 1000)] == ["0 runs", "1 run", "2 runs", "1,000 runs"]
