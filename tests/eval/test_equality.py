"""Equality of answers: pairs with known verdicts, hostile expressions, and the reference answers of MATH."""

from __future__ import annotations

import gzip
import json
import re
import signal
import string
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import sympy
from hypothesis import given
from hypothesis import strategies as st
from sympy.parsing.latex import LaTeXParsingError
from sympy.parsing.sympy_parser import parse_expr

from eval import comparisons, equality
from eval.comparisons import UNBOUNDED, compare
from eval.latex import parse_latex
from eval.scoring import EQUALITIES, Rules, Sample, score, verdicts_on
from experiments.errors import Preempted

Fails = Callable[[Callable[[], object]], str]
TEXT = st.text(max_size=60) | st.text(alphabet=string.digits + "#-+., /ax\n", max_size=40)
LATEX = st.lists(
    st.sampled_from([*string.digits, *r"\ x/.,=^{}()[]", r"\frac", r"\sqrt", r"\text{ ", r"\left(", r"\%", "\n", "٣"]),
    max_size=12,
).map("".join)


# Equalities of numbers and text


@pytest.mark.parametrize(
    ("name", "prediction", "gold", "equal"),
    [
        ("same_text", "answer1", "answer1", True),
        ("same_text", "true.", "true", False),
        ("same_text", "True", "true", False),
        ("same_number", "4.0", "4", True),
        ("same_number", "18.", "18", True),
        ("same_number", "1000", "1,000", True),
        ("same_number", "4.0001", "4", False),
        ("same_number", "1.2.3", "1.2.3", False),  # two texts that are not numbers
        ("same_number", "", "", False),
        ("same_number", "nan", "nan", False),
        ("same_number", "inf", "inf", False),
        ("near_number", "1.833", "1.8333333333333335", True),
        ("near_number", "1.83", "1.8333333333333335", False),
        ("near_number", "-1.833", "1.8333333333333335", False),
        ("near_number", "9" * 400, "9" * 400, False),  # both infinite
        ("near_number", "x", "x", False),
        ("metamath_integer", "18", "18.0", True),
        ("metamath_integer", "18", "18.5", False),  # only the prediction is rounded
        ("milora_number", "18", "18", True),
        ("milora_number", "18", "1800", True),
        ("milora_number", "1800", "18", True),
        ("milora_number", "20001", "20000", True),  # within 1e-4
        ("milora_number", "18", "19", False),
        ("milora_number", "x", "x", False),
    ],
)
def test_numbers_and_text(name: str, prediction: str, gold: str, equal: bool) -> None:
    assert EQUALITIES[name](prediction, gold) is equal


# Equalities of expressions: the verdicts of hendrycks, metamath, diablo, milora and milora_with_self_comparison

YES, NO = (True,) * 5, (False,) * 5
EXPRESSIONS = [
    (r"\frac{1}{2}", r"\frac{1}{2}", YES),
    (r"\dfrac12", r"\tfrac{1}{2}", YES),
    (r"\frac1{72}", r"\frac{1}{72}", YES),
    ("1/2", r"\frac{1}{2}", YES),
    ("-1/2", r"\frac{-1}{2}", YES),
    ("0.5", r"\frac{1}{2}", YES),
    (".5", "1/2", YES),
    (r"\sqrt3", r"\sqrt{3}", YES),
    (r"2\sqrt 3", r"2\sqrt{}3", YES),  # the braces are put around the space
    (r"\left( 1, 2 \right)", "(1,2)", YES),
    (r"90^\circ", "90", YES),
    (r"90^{\circ}", "90", YES),
    (r"\$18", "18", YES),
    (r"50\%", "50", YES),
    (r"575\text{ students}", "575", YES),
    ("x = 3", "3", YES),
    ("k=.25", "0.25", (False, False, False, True, True)),  # the zero is added before the name is removed
    ("x=y=3", "3", NO),
    ("1,\\!000", "1,000", YES),
    (r"x \\in A", r"x \in A", YES),
    ("3", "4", NO),
    ("Paris", "Rome", NO),
    # different notations, equal only as numbers or symbols
    ("2+x", "x+2", (False, False, False, True, True)),
    (r"\sqrt{4}", "2", (False, False, False, True, True)),
    ("2.645", r"\sqrt{7}", (False, False, False, True, True)),  # within 1e-3
    # as sympy's parse_latex: \pi is a symbol, words are products of letters, text after a comma is ignored
    ("31.42", r"10\pi", NO),
    ("C", r"\text{(C)}", NO),
    (r"\text{C}", r"\text{(C)}", (False, False, False, True, True)),
    ("6", "6, -2", (False, False, False, True, True)),
    ("6,-2,5", "6, -2", (False, False, False, True, True)),
    ("-2", "6, -2", NO),
    (r"x \in A", "Ainx", NO),
    ("0.25", r"\frac{1}{4}", (False, False, False, True, True)),
    ("25", "0.25", (False, False, False, True, True)),  # a factor of 100 is accepted
    ("1000", "1,000", (False, False, False, True, True)),
    ("[1,2]", "1,2", (False, False, False, True, True)),
    ("[1,2]", "(1,2)", NO),
    ("(1,0.3333333)", r"(1,\frac{1}{3})", (False, False, False, True, True)),
    ("(1,2,3)", "(1,2)", NO),
    ("12", "{1}2", (False, False, False, True, True)),  # braces are ignored
    # a/b that are not integers: MetaMath and MiLoRA cannot strip it
    ("x/2", "x/2", YES),
    ("x /2", "x/2", (True, False, True, True, True)),
    (r"x/2\text{ m}", "x/2", (True, False, True, False, True)),
    ("x/2", "7", (False, False, False, False, True)),  # the prediction is compared with itself
    ("7", "x/2", (False, False, False, False, True)),
    ("x/2", r"\frac{x}{2}", (False, False, False, True, True)),
    ("01/2", "1/2", NO),  # not written as Python writes it: left unchanged
    # two units: only DiaBlo can strip it
    (r"5\text{ m} 3\text{ cm}", "5", (False, False, True, False, True)),
    (r"5\text{ m} 3\text{ cm}", r"5\text{ m} 3\text{ cm}", YES),
    # an unclosed brace cannot be stripped
    (r"\frac", "7", (False, False, False, False, True)),
    (r"3\sqrt", "7", (False, False, False, False, True)),
    (r"\frac1", r"\frac1", YES),
    (r"\frac1 + \frac12", r"\frac1+\frac12", YES),  # left unchanged where a fraction has only one part
]
VARIANTS = ("hendrycks", "metamath", "diablo", "milora", "milora_with_self_comparison")


@pytest.mark.parametrize(("prediction", "gold", "verdicts"), EXPRESSIONS)
def test_expressions(prediction: str, gold: str, verdicts: tuple[bool, ...]) -> None:
    assert tuple(EQUALITIES[name](prediction, gold) for name in VARIANTS) == verdicts


def test_bombs_are_given_up_and_marked_within_one_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty get a tenth of a second each, two of them one more; the pairs between and after them are decided."""
    for name, value in (("QUICK", 0.1), ("SECONDS", 1.0), ("RETRIES", 2)):
        monkeypatch.setattr(comparisons, name, value)
    bombs = [("9^{9^{9^{9^9}}}", "7"), ("99999999!", "7")] * 10
    started = time.monotonic()
    verdicts = compare("milora", [("x+1", "1+x"), *bombs[:10], ("x+1", "2+x"), *bombs[10:], (r"\sqrt{8}", r"2\sqrt2")])
    assert verdicts == [True, *[None] * 10, False, *[None] * 10, True]
    assert time.monotonic() - started < 20  # 4 s of CPU time; one second for each would be 20
    scored = score(
        Rules("completion", "metamath_expression", "milora"),
        [Sample("", f"The answer is: {answer}", "7") for answer in ("9^{9^{9^{9^9}}}", "7", "8")],
    )
    assert (scored.items, scored.undecided) == ([0, 1, 0], 1)


def test_the_second_try_is_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparisons, "QUICK", 0.001)
    pairs = [(rf"\frac{{x^2-{n**2}}}{{x-{n}}}", f"x+{n}") for n in (31, 37, 41, 43)]  # a repeated pair is quick
    assert compare("milora", pairs[:2]) == [True, True]
    monkeypatch.setattr(comparisons, "RETRIES", 1)
    assert compare("milora", pairs[2:]) == [True, None]


def test_a_process_that_was_killed_is_told_and_replaced(fails_with: Fails) -> None:
    """Not as a broken pipe, which commands treat as a reader that has closed the output."""
    pairs = [("x+1", "1+x")]
    assert compare("milora", pairs) == [True]
    for comparer in comparisons._idle:
        comparer._process.kill()
        comparer._process.wait()
    for _ in range(len(comparisons._idle)):
        assert "ended with status -9" in fails_with(lambda: compare("milora", pairs))
    assert compare("milora", pairs) == [True]


def test_an_interruption_leaves_no_verdict_for_the_next_pairs() -> None:
    def interrupt(number: int, frame: object) -> None:
        raise Preempted

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 1.0)
    try:
        with pytest.raises(Preempted):
            compare("milora", [("9^{9^{9^{9^9}}}", "7")] * 40)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert compare("milora", [("x", "y"), ("x+1", "1+x"), ("x", "z")]) == [False, True, False]


@pytest.mark.parametrize("equal", UNBOUNDED.values())
def test_no_text_is_run(equal: Callable[[str, str], bool], tmp_path: Path) -> None:
    path = tmp_path / "made"
    assert not equal(f"The answer is: __import__('pathlib').Path('{path}').touch()", "7")
    assert not equal(f"__import__('pathlib').Path('{path}').touch()", "7")
    assert not path.exists()


@pytest.mark.parametrize(
    ("text", "gold", "equal"),
    [
        ("so x is a half. The answer is: 0.5", r"\frac{1}{2}", True),
        (r"The answer is: 2\sqrt{3}.", r"2\sqrt{3}", True),
        (r"The final answer is: \sqrt{12}", r"2\sqrt{3}", True),
        (r"Then $x = \boxed{1 + y}$.", "y+1", True),
        (r"The answer is: \$18.50.", r"\$18.50", True),
        (r"\boxed{7}", "8", False),
        (r"\boxed{5} wait. The answer is: $7$.", "5", False),
        (r"\boxed{5} wait. The answer is: $7$.", "7", True),
        ("The answer is: 3", r"\frac{1}{2}", False),
        ("x/2 The answer is: x/2", "7", False),
        ("nothing", "7", False),
        ("", "7", False),
        ("The answer is: ", "", False),
        ("The answer is: " + "1+" * 200 + "1", "201", False),  # too long to be parsed
    ],
)
def test_math_verify(text: str, gold: str, equal: bool) -> None:
    assert equality.math_verify_equal(text, gold) is equal


def test_comparisons_off_the_main_thread() -> None:
    found: list[bool | None] = []
    thread = threading.Thread(target=lambda: found.extend(compare("math_verify", [("The answer is: 1+1", "2")])))
    thread.start()
    thread.join()
    assert found == [True]


@given(LATEX | TEXT, LATEX | TEXT)
def test_equalities_never_raise_and_are_symmetric(left: str, right: str) -> None:
    for name in ("same_text", "same_number", "near_number", "metamath_integer", "hendrycks", "metamath", "diablo"):
        equal = EQUALITIES[name]
        assert equal(left, right) is equal(right, left), name


@given(LATEX, LATEX)
def test_the_equalities_that_ask_sympy_never_raise(left: str, right: str) -> None:
    for name in UNBOUNDED:
        assert compare(name, [(left, right)])[0] in (True, False, None)


@given(LATEX | TEXT)
def test_every_text_equals_itself(text: str) -> None:
    for name in ("same_text", *VARIANTS):
        assert verdicts_on(name, [(text, text)]) == [True], name


@given(st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(10**12), 10**12))
def test_every_number_equals_itself(number: float) -> None:
    for name in ("same_number", "near_number", "metamath_integer", "milora_number"):
        assert EQUALITIES[name](str(number), str(number)), name


@pytest.fixture(scope="module")
def math_golds(data_root: Path) -> list[str]:
    from experiments.data.sources import boxed

    with gzip.open(data_root / "math/test.jsonl.gz", "rt", encoding="utf-8") as file:
        golds = [boxed(json.loads(line)["solution"]) for line in file]
    assert len(golds) == 5000
    assert all(golds)
    return [gold for gold in golds if gold]


def test_every_gold_of_math_can_be_stripped(math_golds: list[str]) -> None:
    """A different notation of a reference answer equals it only if the rules can strip the reference."""
    for gold in math_golds:
        other = gold.replace(r"\frac", r"\dfrac") + " \n"
        assert equality.hendrycks(gold, gold)
        assert equality.hendrycks(other, gold), gold
        assert equality.diablo(other, gold), gold


@pytest.mark.slow
def test_what_milora_accepts_for_the_golds_of_math(math_golds: list[str]) -> None:
    """The counts in configs/protocol/metamathqa/milora.yaml."""

    def accepted(pairs: list[tuple[str, str]]) -> tuple[int, int]:
        verdicts = compare("milora", pairs)
        assert None not in verdicts
        return verdicts.count(True), len(pairs)

    def is_read(parse: Callable[[str], object], text: str) -> bool:
        try:
            return isinstance(parse(text), sympy.Basic)
        except Exception:
            return False

    stripped = [(equality._stripped_pair(gold, gold) or (gold, gold))[0] for gold in math_golds]
    assert sum(is_read(parse_latex, gold) for gold in stripped) == 4768
    assert sum(is_read(parse_expr, gold) for gold in stripped) == 3381
    bare = [gold for gold in math_golds if gold[0] not in "([" and r"\left" not in gold]
    lists = [gold for gold in bare if "," in gold and not re.search(r"\d,(\\!)?\d{3}(?!\d)", gold)]
    assert accepted([(gold.split(",")[0].strip(), gold) for gold in lists]) == (55, 86)
    letters = [gold for gold in math_golds if re.fullmatch(r"\\text\{\(.\)\}", gold)]
    assert accepted([(gold[7], gold) for gold in letters]) == (0, 16)
    decimals = []
    for gold, text in zip(math_golds, stripped, strict=True):
        if r"\pi" in gold and is_read(parse_latex, text):
            value = sympy.N(parse_latex(text).subs(sympy.Symbol("pi"), sympy.pi), 8)
            decimals += [(str(value), gold)] if value.is_number else []
    assert accepted(decimals) == (2, 100)


@pytest.mark.parametrize(
    ("text", "expression"),
    [
        ("6, -2", "6"),
        (r"\frac{1}{2}", "1/2"),
        (r"\sqrt{4}", "sqrt(4)"),
        (r"10\pi", "10*pi"),
        (r"\text{(C)}", "C*text"),
        ("x=3", "Eq(x, 3)"),
        ("1,000", "1000"),
        ("3!", "factorial(3)"),
        (r"\infty", "oo"),
    ],
)
def test_latex_is_read_as_sympy_reads_it(text: str, expression: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Against the results of sympy 1.12 and 1.14 with ANTLR's runtime 4.11."""
    assert str(parse_latex(text)) == expression
    assert capsys.readouterr() == ("", "")  # a runtime of another version prints warnings


@pytest.mark.parametrize("text", ["(1,2)", "[1,2]", r"5\%", r"\{1,2\}", r"\begin{pmatrix}1\\2\end{pmatrix}", "", "01"])
def test_what_is_no_latex_to_sympy(text: str) -> None:
    with pytest.raises((LaTeXParsingError, sympy.SympifyError)):
        parse_latex(text)


def test_math_verify_reads_nearly_every_gold_of_math(math_golds: list[str]) -> None:
    """On every 25th reference answer, 200 in total."""
    some = math_golds[::25]
    assert sum(equality.math_verify_equal(f"The answer is: {gold}.", gold) for gold in some) >= 198
