r"""Whether an answer that was read is the right one: functions of the two texts, named by the protocols.

No text of a model is ever evaluated as Python: numbers go through float, LaTeX through a grammar. Those that ask sympy
may take for ever (9^{9^{9^9}}): `eval.comparisons` limits them.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, cast

from eval.parsers import final_answer_expression, metamath_expression

LONGEST = 200  # characters of an expression that sympy is given; the longest answer of MATH has 81
UNITS = r"\text{ "  # units follow it
NO_BRACKETS = str.maketrans("", "", "{}()")


# Text and numbers


def same_text(prediction: str, gold: str) -> bool:
    return prediction == gold


def same_number(prediction: str, gold: str) -> bool:
    left, right = _number(prediction), _number(gold)
    return left is not None and left == right


def near_number(prediction: str, gold: str) -> bool:
    """No more than 0.001 apart: LLM-Adapters evaluate.py, pyreft, ziyangjoy/DiaBlo evaluate_math.py."""
    left, right = _number(prediction), _number(gold)
    return left is not None and right is not None and abs(left - right) <= 0.001


def milora_number(prediction: str, gold: str) -> bool:
    """Equal numbers, or close ones, or a hundred times one another: sufenlp/MiLoRA gsm8k_inference.py and grader.py."""
    left, right = _number(prediction), _number(gold)
    return left is not None and right is not None and _close(left, right)


def _number(text: str) -> float | None:
    """The number that a text is, its commas dropped; None for "1.2.3", "" and what is not finite."""
    try:
        number = float(text.replace(",", ""))
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _close(left: float, right: float) -> bool:
    """Within 1e-4 of one another, or of a hundredth or the hundredfold of `right`."""
    return any(math.isclose(left, number, rel_tol=1e-4) for number in (right, right / 100, right * 100))


# LaTeX: the same text after small differences of writing are stripped


def hendrycks(prediction: str, gold: str) -> bool:
    """hendrycks/math math_equivalence.py. Where one cannot be stripped the two are compared as they are."""
    pair = _stripped_pair(prediction, gold, any_slash=True)
    return prediction == gold if pair is None else pair[0] == pair[1]


def metamath(prediction: str, gold: str) -> bool:
    """meta-math/MetaMath util.py: as `hendrycks`, but an a/b not of integers cannot be stripped."""
    pair = _stripped_pair(prediction, gold)
    return prediction == gold if pair is None else pair[0] == pair[1]


def diablo(prediction: str, gold: str) -> bool:
    r"""ziyangjoy/DiaBlo utils_math.py: as `hendrycks`, but a second "\text{ " does no harm."""
    pair = _stripped_pair(prediction, gold, any_slash=True, many_units=True)
    return prediction == gold if pair is None else pair[0] == pair[1]


def milora(prediction: str, gold: str) -> bool:
    """sufenlp/MiLoRA util.py: the same after stripping as in `metamath`, or equal as numbers, tuples or symbols."""
    left, right = _stripped_pair(prediction, gold) or (prediction, gold)
    return left == right or _math_equal(left, right)


def milora_with_self_comparison(prediction: str, gold: str) -> bool:
    """`milora` as released: where one cannot be stripped the prediction is compared with itself, and is right."""
    pair = _stripped_pair(prediction, gold)
    if pair is None:
        return prediction == gold or _math_equal(prediction, prediction)
    return pair[0] == pair[1] or _math_equal(*pair)


def _stripped_pair(
    prediction: str, gold: str, *, any_slash: bool = False, many_units: bool = False
) -> tuple[str, str] | None:
    """Both stripped, or None where a rule does not fit one of them."""
    try:
        return _strip(prediction, any_slash, many_units), _strip(gold, any_slash, many_units)
    except _CannotStrip:
        return None


class _CannotStrip(ValueError):
    """A text on which the source's rules raise."""


def _strip(text: str, any_slash: bool, many_units: bool) -> str:
    """The rules of hendrycks/math `_strip_string`, in their order."""
    for old, new in (
        ("\n", ""),
        (r"\!", ""),
        (r"\\", "\\"),
        ("tfrac", "frac"),
        ("dfrac", "frac"),
        (r"\left", ""),
        (r"\right", ""),
        (r"^{\circ}", ""),
        (r"^\circ", ""),
        (r"\$", ""),
    ):
        text = text.replace(old, new)
    text, *units = text.split(UNITS)
    if len(units) > 1 and not many_units:
        raise _CannotStrip
    text = text.replace(r"\%", "").replace(" .", " 0.").replace("{.", "{0.")
    if text.startswith("."):
        text = "0" + text
    name, *value = text.split("=")
    if len(value) == 1 and len(name) <= 2:  # "x = 3"
        text = value[0]
    text = _braced_fractions(_braced_roots(text).replace(" ", ""))
    return _slash_as_fraction(r"\frac{1}{2}" if text == "0.5" else text, any_slash)


def _braced_roots(text: str) -> str:
    r"""\sqrt3 as \sqrt{3}."""
    first, *roots = text.split(r"\sqrt")
    if "" in roots:
        raise _CannotStrip
    return r"\sqrt".join([first, *(root if root[0] == "{" else f"{{{root[0]}}}{root[1:]}" for root in roots)])


def _braced_fractions(text: str) -> str:
    r"""\frac12 and \frac1{2} as \frac{1}{2}; all stays as it is where a fraction has no second part."""
    first, *fractions = text.split(r"\frac")
    pieces = [first]
    for fraction in fractions:
        if not fraction:
            raise _CannotStrip
        if fraction[0] == "{":
            pieces.append(fraction)
        elif len(fraction) == 1:
            return text
        else:
            over, under, rest = fraction[0], fraction[1], fraction[2:]
            pieces.append(f"{{{over}}}{under}{rest}" if under == "{" else f"{{{over}}}{{{under}}}{rest}")
    return r"\frac".join(pieces)


def _slash_as_fraction(text: str, any_slash: bool) -> str:
    r"""a/b as \frac{a}{b} if both are integers as Python writes them; others stay or cannot be stripped."""
    sides = text.split("/")
    if len(sides) != 2:
        return text
    try:
        over, under = int(sides[0]), int(sides[1])
    except ValueError:
        if any_slash:
            return text
        raise _CannotStrip from None
    return rf"\frac{{{over}}}{{{under}}}" if text == f"{over}/{under}" else text


# Numbers, tuples and symbols


def _math_equal(prediction: str, gold: str) -> bool:
    """sufenlp/MiLoRA grader.py `math_equal`. What is no LaTeX is not equal; theirs evaluates it as Python."""
    left, right = _number(prediction), _number(gold)
    if left is not None and right is not None:
        return _close(left, right)
    prediction, gold = prediction.strip(), gold.strip()
    if not prediction:
        return False
    if _same_inside(prediction, gold):
        return True
    if len(prediction) > LONGEST or len(gold) > LONGEST:
        return False
    return _same_parts(prediction, gold) or _symbols_agree(prediction, gold)


def _same_inside(prediction: str, gold: str) -> bool:
    """The same without braces and parentheses, and without brackets around them unless these differ in kind."""
    brackets = prediction[0] + prediction[-1]
    if (brackets == "[]" and gold[:1] != "(") or (brackets == "()" and gold[:1] != "["):
        prediction, gold = prediction.strip("[]()"), gold.strip("[]()")
    return prediction.translate(NO_BRACKETS) == gold.translate(NO_BRACKETS)


def _same_parts(prediction: str, gold: str) -> bool:
    """Tuples or lists whose elements are equal one by one."""
    brackets = prediction[0] + prediction[-1]
    if brackets not in ("()", "[]") or brackets != gold[:1] + gold[-1:]:
        return False
    left, right = prediction[1:-1].split(","), gold[1:-1].split(",")
    return len(left) == len(right) and all(map(_math_equal, left, right))


def _symbols_agree(prediction: str, gold: str) -> bool:
    """Equal to sympy, or the same value within 1e-3."""
    import sympy  # pyright: ignore[reportMissingTypeStubs]

    from eval.latex import parse_latex

    left: Any = None
    right: Any = None
    library = cast(Any, sympy)
    with _failures_ignored():  # no LaTeX; its grammar raises many kinds
        left, right = parse_latex(prediction), parse_latex(gold)
    if right is None:
        return False
    with _failures_ignored():  # an equation has no difference
        if library.simplify(left - right) == 0:
            return True
    with _failures_ignored():  # a symbol has no value
        return math.isclose(library.N(left), library.N(right), rel_tol=1e-3)
    return False


def math_verify_equal(text: str, gold: str) -> bool:
    """A second opinion, by the library math-verify: is the answer in a completion, or an answer alone, the right one?

    It finds LaTeX between dollar signs only, so an answer behind a protocol's phrase is put between some, amounts of
    dollars without theirs. False where it finds or understands nothing.
    """
    text, gold = text.replace(r"\$", ""), gold.replace(r"\$", "")
    said = metamath_expression(text).answer or final_answer_expression(text).answer
    if said is not None:  # what stands before it, such as another \\boxed, is not the answer
        text = said if "$" in said else f"${said}$"
    return gold != "" and (said is None or len(said) <= LONGEST) and _verified(text, f"${gold}$")


def _verified(text: str, gold: str) -> bool:
    import math_verify  # pyright: ignore[reportMissingTypeStubs]

    library = cast(Any, math_verify)

    with _failures_ignored():  # without the library's own time limits, which are signals
        parsed = (library.parse(part, parsing_timeout=0) for part in (gold, text))
        return library.verify(*parsed, timeout_seconds=0)
    return False


@contextmanager
def _failures_ignored() -> Generator[None, None, None]:
    """What these libraries cannot do with a text is no error, unless memory ran out."""
    try:
        yield
    except MemoryError:
        raise
    except Exception:
        pass
