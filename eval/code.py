"""HumanEval's programs and score: pure functions. `eval.sandbox` runs the programs."""

from __future__ import annotations

import math
from collections.abc import Iterable

from experiments.errors import UserError


def cut_at_stop(completion: str, stops: Iterable[str]) -> str:
    """Return the completion up to its earliest stop string, or all of it."""
    found = [completion.find(stop) for stop in stops]
    return completion[: min((place for place in found if place >= 0), default=len(completion))]


def human_eval_program(prompt: str, completion: str, test: str, entry_point: str) -> str:
    """Return a problem's program: it raises unless the completion, already cut at a stop string, passes the tests.

    The prompt is stripped as the model saw it (juzhengz/LoRI), so a completion begins with the line break and the
    indentation of the function's body.
    """
    return f"{prompt.strip()}{completion}\n\n{test}\ncheck({entry_point})"


def pass_at_k(n: int, c: int, k: int) -> float:
    """Return the probability that k of n completions, drawn without replacement, include one of the c right ones.

    1 - C(n - c, k) / C(n, k), the unbiased estimator of arXiv 2107.03374, section 2.1.
    """
    if not 0 <= c <= n:
        raise ValueError(f"{c} right completions of {n}")
    if not 1 <= k <= n:
        raise UserError(f"pass@{k} cannot be estimated from {n} completions per problem: choose k from 1 to {n}")
    return 1 - math.comb(n - c, k) / math.comb(n, k)
