"""Generated word problems in GSM8K's format: the task `arith`, and the corpus that pretrains the base model `tiny`.

A problem is a row of `instruction` (the question), `input` (empty), `output` (its steps with calculator marks, ending
in `#### 42`, as in GSM8K, openai/grade-school-math) and `answer` ("42"). The fine-tuning splits use `TEMPLATES`, the
pretraining corpus uses `CORPUS_TEMPLATES`: they share no template, and no two splits share a problem (a template with
its numbers).
"""

from __future__ import annotations

import functools
import itertools
import operator
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

SPLITS = ("train", "heldout", "test")
NUMBERS = range(2, 11)  # the numbers a question states
RESULTS = range(1, 41)  # the results of its steps

NAMES = ("Ann", "Ben", "Cara", "Dan", "Eva", "Finn", "Gina", "Hugo", "Ida", "Jack", "Kim", "Leo", "Mia", "Ned")
THINGS = ("apples", "books", "cards", "coins", "cups", "eggs", "keys", "pens", "shells", "stamps", "stones", "toys")


@dataclass(frozen=True)
class Template:
    """A problem with placeholders for its numbers.

    `question` has placeholders for a name, a thing and the numbers `a`, `b`, `c`. `steps` are operations, e.g. `a*b`;
    in them, `x` and `y` are the results of the first and the second step.
    """

    question: str
    steps: tuple[str, ...]


TEMPLATES = (
    Template(
        "{name} fills {a} boxes with {b} {thing} each and then loses {c} of the {thing}. How many are left?",
        ("a*b", "x-c"),
    ),
    Template(
        "A shelf holds {a} {thing}. {name} brings {b} more every day for {c} days. How many does the shelf hold now?",
        ("b*c", "a+x"),
    ),
    Template(
        "{name} owns {a} {thing}. A friend owned {b} times as many but broke {c}. How many do they own together?",
        ("a*b", "x-c", "a+y"),
    ),
    Template(
        "{a} red and {b} blue {thing} are shared equally among {c} children by {name}. How many does each child get?",
        ("a+b", "x/c"),
    ),
    Template(
        "Before lunch {name} sold {a} {thing}, after lunch {b} fewer, and at night {c}. How many were sold in all?",
        ("a-b", "a+x", "y+c"),
    ),
    Template(
        "One of the {thing} costs {a} dollars. {name} takes {b} of them and hands over {c} extra dollars as a tip. "
        "How many dollars is that?",
        ("a*b", "x+c"),
    ),
    Template(
        "{name} owns {a} {thing}, which is {b} fewer than a neighbour owns. The neighbour throws {c} of them out. "
        "How many does the neighbour keep?",
        ("a+b", "x-c"),
    ),
    Template(
        "{name} packs {a} {thing} in the first bag, {b} more than that in the second, and takes {c} out again. "
        "How many are in the bags?",
        ("a+b", "a+x", "y-c"),
    ),
    Template(
        "There are {a} rows of {b} {thing}. {name} puts them into {c} equal piles. How big is a pile?",
        ("a*b", "x/c"),
    ),
    Template(
        "In the morning {name} counts {a} {thing}; by noon {b} are gone, by evening {c} new ones came. "
        "How many are there by evening?",
        ("a-b", "x+c"),
    ),
    Template(
        "{name} earns {a} {thing} an hour, works {b} hours, and splits them into {c} equal parts for the family. "
        "How many are in one part?",
        ("a*b", "x/c"),
    ),
    Template(
        "Each of {a} tables needs {b} {thing} and the kitchen needs {c}. How many should {name} buy?",
        ("a*b", "x+c"),
    ),
    Template(
        "A crate of {a} {thing} and a crate of {b} arrive, {c} of all are broken. How many can {name} use?",
        ("a+b", "x-c"),
    ),
    Template(
        "{name} is {a} years old. The cousin is {b} years older and the aunt {c} times the age of the cousin. "
        "How old is the aunt?",
        ("a+b", "x*c"),
    ),
)

CORPUS_TEMPLATES = (
    Template(
        "{name} has {a} {thing} and finds {b}. Then {name} gives away {c}. How many {thing} does {name} have?",
        ("a+b", "x-c"),
    ),
    Template(
        "{name} buys {a} bags of {b} {thing} and finds {c}. How many {thing} does {name} have?",
        ("a*b", "x+c"),
    ),
    Template(
        "{name} has {a} {thing} and gives away {b}. Then {name} buys {c}. How many {thing} does {name} have?",
        ("a-b", "x+c"),
    ),
    Template(
        "{name} has {a} bags of {b} {thing} and gives away {c}. How many {thing} does {name} have?",
        ("a*b", "x-c"),
    ),
    Template(
        "{name} puts {a} and then {b} {thing} into {c} bags. How many {thing} are in a bag?",
        ("a+b", "x/c"),
    ),
    Template(
        "{name} puts {a} piles of {b} {thing} into {c} bags. How many {thing} are in a bag?",
        ("a*b", "x/c"),
    ),
    Template(
        "{name} has {a} {thing}, loses {b} and loses {c}. How many {thing} does {name} have?",
        ("a-b", "x-c"),
    ),
    Template(
        "{name} has {a} {thing}, finds {b} and finds {c}. How many {thing} does {name} have?",
        ("a+b", "x+c"),
    ),
    Template(
        "{name} has {a} {thing} and finds {b}. Now {name} gets {c} times as many. How many is that?",
        ("a+b", "x*c"),
    ),
    Template(
        "{name} finds {a} {thing}, buys {b} times {c} and puts them there. How many {thing} are there?",
        ("b*c", "a+x"),
    ),
)

_OPERATIONS: dict[str, Callable[[int, int], float]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": lambda first, second: first / second,
}


def solve(template: Template, numbers: dict[str, int]) -> list[tuple[str, int]] | None:
    """Return the computed steps, as ("5*7", 35) pairs, or None if a result is not an integer in `RESULTS`."""
    values = dict(numbers)
    worked: list[tuple[str, int]] = []
    for variable, operation in zip("xyz", template.steps, strict=False):
        first, second = (values[letter] if letter in values else int(letter) for letter in operation[::2])
        result = _OPERATIONS[operation[1]](first, second)
        if result not in RESULTS:
            return None
        values[variable] = int(result)
        worked.append((f"{first}{operation[1]}{second}", int(result)))
    return worked


@functools.cache
def problems(template: Template) -> tuple[dict[str, int], ...]:
    """Return all choices of a template's numbers that `solve` accepts, in a fixed order."""
    letters = [letter for letter in "abc" if f"{{{letter}}}" in template.question]
    choices = (dict(zip(letters, numbers, strict=True)) for numbers in itertools.product(NUMBERS, repeat=len(letters)))
    return tuple(numbers for numbers in choices if solve(template, numbers) is not None)


def write(template: Template, numbers: dict[str, int], rng: random.Random) -> tuple[str, list[str], int]:
    """Write a problem in words: the question, the lines of its solution, and the result."""
    words = {"name": rng.choice(NAMES), "thing": rng.choice(THINGS)}
    worked = solve(template, numbers)
    assert worked is not None
    return template.question.format(**words, **numbers), [_mark(*step) for step in worked], worked[-1][1]


def generate(sizes: dict[str, int], seed: int) -> dict[str, list[dict[str, str]]]:
    """Generate the splits of `arith`: rows of instruction, input, output and answer, determined by sizes and seed.

    Every template's problems are shuffled and dealt in turn, so that no two splits share a problem, whatever its names.
    """
    rng = random.Random(f"arith-{seed}")
    pools = [rng.sample(problems(template), len(problems(template))) for template in TEMPLATES]
    splits: dict[str, list[dict[str, str]]] = {}
    for split in SPLITS:
        rows = splits[split] = []
        for index in range(sizes[split]):
            turn = index % len(TEMPLATES)
            if not pools[turn]:
                raise ValueError(f"arith: {sum(sizes.values())} problems are too many, template {turn} has no more")
            question, lines, result = write(TEMPLATES[turn], pools[turn].pop(), rng)
            output = "\n".join([*lines, f"#### {result}"])
            rows.append({"instruction": question, "input": "", "output": output, "answer": str(result)})
    return splits


def corpus(seed: int) -> Iterator[str]:
    """Generate an endless stream of pretraining documents: sums, stories with "The answer is 42.", and word strings.

    The word strings give the tokenizer and the embeddings the vocabulary of `TEMPLATES`, as a real base model knows
    English, but none of their sentences.
    """
    rng = random.Random(f"corpus-{seed}")
    words = sorted({"####"}.union(*(_words(template) for template in TEMPLATES)))
    while True:
        kind = rng.random()
        if kind < 0.45:
            yield "\n".join(_sum(rng) for _ in range(4))
        elif kind < 0.9:
            template = rng.choice(CORPUS_TEMPLATES)
            question, lines, result = write(template, rng.choice(problems(template)), rng)
            yield "\n".join([question, *lines, f"The answer is {result}."])
        else:
            yield " ".join(rng.choices(words, k=20))


def _words(template: Template) -> list[str]:
    return [word.strip(",.;?") for word in template.question.split() if "{" not in word]


def _sum(rng: random.Random) -> str:
    while True:
        sign, first, second = rng.choice("+-*/"), rng.choice(RESULTS), rng.choice(NUMBERS)
        result = _OPERATIONS[sign](first, second)
        if result in RESULTS:
            return _mark(f"{first}{sign}{second}", int(result))


def _mark(operation: str, result: int) -> str:
    """Return a step with GSM8K's calculator mark."""
    return f"{operation}=<<{operation}={result}>>{result}"
