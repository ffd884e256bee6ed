r"""Whether an answer equals the right one: functions of the two texts, selected by the protocols.

A model's text is never evaluated as Python: numbers go through float, LaTeX through a grammar. Functions that use sympy
may run forever (9^{9^{9^9}}): `eval.comparisons` limits them.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, cast

from eval.parsers import final_answer_expression, metamath_expression

LONGEST = 200  # longest expression, in characters, that sympy gets; the longest answer of MATH has 81
UNITS = r"\text{ "  # units follow it
NO_BRACKETS = str.maketrans("", "", "{}()")


# Text and numbers


def same_text(prediction: str, gold: str) -> bool:
    return prediction == gold


def same_number(prediction: str, gold: str) -> bool:
    left, right = _number(prediction), _number(gold)
    return left is not None and left == right


def near_number(prediction: str, gold: str) -> bool:
    """At most 0.001 apart: LLM-Adapters evaluate.py, pyreft, ziyangjoy/DiaBlo evaluate_math.py."""
    left, right = _number(prediction), _number(gold)
    return left is not None and right is not None and abs(left - right) <= 0.001


def milora_number(prediction: str, gold: str) -> bool:
    """Equal or close numbers, also after a factor of 100: sufenlp/MiLoRA gsm8k_inference.py and grader.py."""
    left, right = _number(prediction), _number(gold)
    return left is not None and right is not None and _close(left, right)


def _number(text: str) -> float | None:
    """Parse a number, ignoring commas; None for "1.2.3", "" and non-finite numbers."""
    try:
        number = float(text.replace(",", ""))
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _close(left: float, right: float) -> bool:
    """Within 1e-4 (relative) of `right`, of a hundredth of it or of a hundred times it."""
    return any(math.isclose(left, number, rel_tol=1e-4) for number in (right, right / 100, right * 100))


# LaTeX: equal texts after normalising small differences in notation


def hendrycks(prediction: str, gold: str) -> bool:
    """hendrycks/math math_equivalence.py. If one text cannot be stripped, the two are compared unstripped."""
    pair = _stripped_pair(prediction, gold, any_slash=True)
    return prediction == gold if pair is None else pair[0] == pair[1]


def metamath(prediction: str, gold: str) -> bool:
    """meta-math/MetaMath util.py: as `hendrycks`, but a/b cannot be stripped unless both are integers."""
    pair = _stripped_pair(prediction, gold)
    return prediction == gold if pair is None else pair[0] == pair[1]


def diablo(prediction: str, gold: str) -> bool:
    r"""ziyangjoy/DiaBlo utils_math.py: as `hendrycks`, but a second "\text{ " is allowed."""
    pair = _stripped_pair(prediction, gold, any_slash=True, many_units=True)
    return prediction == gold if pair is None else pair[0] == pair[1]


def milora(prediction: str, gold: str) -> bool:
    """sufenlp/MiLoRA util.py: equal after stripping as in `metamath`, or equal as numbers, tuples or symbols."""
    left, right = _stripped_pair(prediction, gold) or (prediction, gold)
    return left == right or _math_equal(left, right)


def milora_with_self_comparison(prediction: str, gold: str) -> bool:
    """`milora` as released: if one text cannot be stripped, the prediction is compared with itself, and is right."""
    pair = _stripped_pair(prediction, gold)
    if pair is None:
        return prediction == gold or _math_equal(prediction, prediction)
    return pair[0] == pair[1] or _math_equal(*pair)


def _stripped_pair(
    prediction: str, gold: str, *, any_slash: bool = False, many_units: bool = False
) -> tuple[str, str] | None:
    """Strip both; None if a rule fails on one of them."""
    try:
        return _strip(prediction, any_slash, many_units), _strip(gold, any_slash, many_units)
    except _CannotStrip:
        return None


class _CannotStrip(ValueError):
    """A text on which the source's rules raise an error."""


def _strip(text: str, any_slash: bool, many_units: bool) -> str:
    """Apply the rules of hendrycks/math `_strip_string`, in their order."""
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
    r"""Write \sqrt3 as \sqrt{3}."""
    first, *roots = text.split(r"\sqrt")
    if "" in roots:
        raise _CannotStrip
    return r"\sqrt".join([first, *(root if root[0] == "{" else f"{{{root[0]}}}{root[1:]}" for root in roots)])


def _braced_fractions(text: str) -> str:
    r"""Write \frac12 and \frac1{2} as \frac{1}{2}; the text is unchanged if a fraction has no second part."""
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
    r"""Write a/b as \frac{a}{b} if both are integers as Python writes them; others stay or cannot be stripped."""
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
    """sufenlp/MiLoRA grader.py `math_equal`. Text that is not LaTeX is not equal; theirs evaluates it as Python."""
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
    """Equal without braces and parentheses, and without surrounding brackets unless these differ in kind."""
    brackets = prediction[0] + prediction[-1]
    if (brackets == "[]" and gold[:1] != "(") or (brackets == "()" and gold[:1] != "["):
        prediction, gold = prediction.strip("[]()"), gold.strip("[]()")
    return prediction.translate(NO_BRACKETS) == gold.translate(NO_BRACKETS)


def _same_parts(prediction: str, gold: str) -> bool:
    """Tuples or lists with equal elements."""
    brackets = prediction[0] + prediction[-1]
    if brackets not in ("()", "[]") or brackets != gold[:1] + gold[-1:]:
        return False
    left, right = prediction[1:-1].split(","), gold[1:-1].split(",")
    return len(left) == len(right) and all(map(_math_equal, left, right))


def _symbols_agree(prediction: str, gold: str) -> bool:
    """Equal for sympy, or the same value within 1e-3 (relative)."""
    import sympy  # pyright: ignore[reportMissingTypeStubs]

    from eval.latex import parse_latex

    left: Any = None
    right: Any = None
    library = cast(Any, sympy)
    with _failures_ignored():  # not LaTeX; the grammar raises many kinds of errors
        left, right = parse_latex(prediction), parse_latex(gold)
    if right is None:
        return False
    with _failures_ignored():  # equations cannot be subtracted
        if library.simplify(left - right) == 0:
            return True
    with _failures_ignored():  # symbols have no value
        return math.isclose(library.N(left), library.N(right), rel_tol=1e-3)
    return False


def math_verify_equal(text: str, gold: str) -> bool:
    """Return the verdict of the library math-verify on a completion or an answer, as a second opinion.

    It only finds LaTeX between dollar signs, so an answer after a protocol's phrase is put between dollar signs, and
    escaped ones (amounts of money) are removed. False if it finds or understands nothing.
    """
    text, gold = text.replace(r"\$", ""), gold.replace(r"\$", "")
    said = metamath_expression(text).answer or final_answer_expression(text).answer
    if said is not None:  # text before it, e.g. another \\boxed, is not the answer
        text = said if "$" in said else f"${said}$"
    return gold != "" and (said is None or len(said) <= LONGEST) and _verified(text, f"${gold}$")


def _verified(text: str, gold: str) -> bool:
    import math_verify  # pyright: ignore[reportMissingTypeStubs]

    library = cast(Any, math_verify)

    with _failures_ignored():  # the library's own time limits are off, because they use signals
        parsed = (library.parse(part, parsing_timeout=0) for part in (gold, text))
        return library.verify(*parsed, timeout_seconds=0)
    return False


@contextmanager
def _failures_ignored() -> Generator[None, None, None]:
    """Ignore these libraries' errors on a text, except running out of memory."""
    try:
        yield
    except MemoryError:
        raise
    except Exception:
        pass
