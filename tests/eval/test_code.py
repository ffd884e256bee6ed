"""HumanEval's texts and pass@k, against cases computed by hand and an enumeration of all draws."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval.code import cut_at_stop, human_eval_program, pass_at_k

Fails = Callable[[Callable[[], object]], str]
STOPS = ["\nclass", "\ndef", "\n#", "\n```", "<file_sep>"]


@pytest.mark.parametrize(
    ("completion", "kept"),
    [
        ("\n    return 1\n", "\n    return 1\n"),
        ("\n    return 1\n\ndef g():\n    pass", "\n    return 1\n"),
        ("\n    a = 1  # one\n    # two\n    return a\n# three", "\n    a = 1  # one\n    # two\n    return a"),
        ("\n    return 1\n```\ndef g(): 0", "\n    return 1"),  # the earliest in the text, not the first in the list
        ("\n    return 1<file_sep>\nclass A", "\n    return 1"),
        ("\n    return classes\n", "\n    return classes\n"),
        ("\ndef g():\n    return 1", ""),
        ("", ""),
    ],
)
def test_a_completion_ends_at_its_earliest_stop_string(completion: str, kept: str) -> None:
    assert cut_at_stop(completion, STOPS) == kept
    assert cut_at_stop(completion, reversed(STOPS)) == kept
    assert cut_at_stop(completion, []) == completion


@given(st.text("\ndef#c ", max_size=30), st.lists(st.sampled_from(["\ndef", "\n#", "c"]), max_size=3))
def test_what_is_kept_is_the_longest_start_without_a_stop_string(completion: str, stops: list[str]) -> None:
    kept = cut_at_stop(completion, stops)
    assert completion.startswith(kept)
    assert not any(stop in kept for stop in stops)
    assert kept == completion or any(completion[len(kept) :].startswith(stop) for stop in stops)


def test_a_program_is_prompt_completion_tests_and_their_call() -> None:
    program = human_eval_program(
        prompt='\n\ndef two():\n    """Two."""\n',
        completion="\n    return 2",
        test="def check(candidate):\n    assert candidate() == 2\n",
        entry_point="two",
    )
    assert program == (
        'def two():\n    """Two."""\n    return 2\n\ndef check(candidate):\n    assert candidate() == 2\n\ncheck(two)'
    )


@pytest.mark.parametrize(
    ("n", "c", "k", "expected"),
    [
        (1, 0, 1, 0.0),
        (1, 1, 1, 1.0),
        (20, 5, 1, 0.25),  # k = 1 is the share of correct completions
        (4, 2, 2, 5 / 6),  # one of 6 pairs holds two wrong ones
        (5, 1, 2, 2 / 5),  # 6 = C(4, 2) of 10 pairs miss the correct one
        (5, 2, 3, 9 / 10),  # one = C(3, 3) of 10 triples holds only wrong ones
        (5, 3, 3, 1.0),  # two wrong ones cannot fill a draw of three
        (20, 10, 10, 184755 / 184756),  # one of C(20, 10) draws
        (20, 0, 10, 0.0),
        (20, 20, 10, 1.0),
    ],
)
def test_pass_at_k_by_hand(n: int, c: int, k: int, expected: float) -> None:
    assert pass_at_k(n, c, k) == pytest.approx(expected, abs=1e-15)


def test_pass_at_k_is_the_share_of_draws_with_a_right_completion() -> None:
    for n in range(1, 8):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            draws = list(itertools.combinations(range(n), k))  # the correct ones are 0 … c - 1
            share = sum(min(draw) < c for draw in draws) / len(draws)
            assert pass_at_k(n, c, k) == pytest.approx(share, abs=1e-12), (n, c, k)


@pytest.mark.parametrize(("n", "k"), [(20, 100), (1, 5), (20, 0)])
def test_more_draws_than_completions_are_refused(fails_with: Fails, n: int, k: int) -> None:
    message = fails_with(lambda: pass_at_k(n, 0, k))
    assert message == f"pass@{k} cannot be estimated from {n} completions per problem: choose k from 1 to {n}"


@pytest.mark.parametrize("c", [-1, 4])
def test_more_right_completions_than_there_are_is_a_mistake(c: int) -> None:
    with pytest.raises(ValueError, match="right completions of 3"):
        pass_at_k(3, c, 1)
