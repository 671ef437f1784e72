"""When two answers are equal, and the canonical form of an answer.

`expressions` compares formulas; leaves out reading answers from text (`reading`).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from fractions import Fraction

from viaticum.strategies.answers.dates import whole_date
from viaticum.strategies.answers.expressions import is_symbolic, same_expression, to_latex
from viaticum.strategies.answers.numbers import LATEX_TEXT, clean, find_number, whole_number, write_number
from viaticum.types import AnswerKind

VALUE_CHARACTERS = 300  # only the beginning of an answer is compared
TOLERANCE = Fraction(1, 10**6)  # relative, for rounding errors of programs
CHOICE = re.compile(r"^\W{0,4}(?:option|choice|answer)?\s?\W{0,3}([A-Ja-j])(?:\W|$)")
BOOLEAN = re.compile(r"\b(yes|no|true|false)\b", re.IGNORECASE)
YES_NO = {"yes": "yes", "true": "yes", "no": "no", "false": "no"}
_ARTICLE = re.compile(r"^(?:the|an|a)\s(?=\S)")


def normalise(value: str, kind: AnswerKind) -> str:
    """The canonical form of an answer.

    Numbers without separators, units and trailing zeros, choices as one capital letter, booleans as yes or
    no, dates as YYYY-MM-DD, expressions in LaTeX without math delimiters, other text in lower case without
    outer punctuation.
    """
    value = value[:VALUE_CHARACTERS]
    number = _number_of(value, kind)
    if number is not None:
        return write_number(number)
    if kind in ("date", "auto") and (day := whole_date(value)):
        return day
    if kind == "expression":
        return to_latex(value) or plain_text(value)
    if kind == "choice" and (match := CHOICE.search(clean(value))):
        return match[1].upper()
    if kind in ("boolean", "auto"):
        words = BOOLEAN.findall(value)
        if words and (kind == "boolean" or plain_text(value) == words[0].lower()):
            return YES_NO[words[0].lower()]
    return plain_text(value)


def equivalent(a: str | None, b: str | None, kind: AnswerKind = "auto") -> bool:
    """Whether two answers are equal. Reflexive and symmetric; None equals only None.

    Numbers may differ by one part in a million, for floating-point rounding. "auto" compares as numbers,
    dates or expressions if both sides are entirely that, numbers with or without a unit. Expressions take at
    most `expressions.SECONDS` of symbolic comparison, plus the start of the worker the first time; without
    the extra `math` they are equal if their texts are.
    """
    if a is None or b is None or a == b:
        return a == b
    x, y = _number_of(a[:VALUE_CHARACTERS], kind), _number_of(b[:VALUE_CHARACTERS], kind)
    if x is not None and y is not None:
        return abs(x - y) <= TOLERANCE * max(abs(x), abs(y))
    if kind == "auto":
        formulas = is_symbolic(a) + is_symbolic(b)
        if formulas and formulas + (x is not None) + (y is not None) >= 2:
            kind = "expression"
    return normalise(a, kind) == normalise(b, kind) or (kind == "expression" and same_expression(a, b))


def agreement(answers: Iterable[str | None], kind: AnswerKind = "auto") -> float:
    """The fraction of answers that agree with the most frequent one; 0.0 without answers.

    An attempt without an answer (None) counts and agrees with no other.
    """
    answers = list(answers)
    return max(map(len, group(answers, kind)), default=0) / len(answers) if answers else 0.0


def group(answers: Iterable[str | None], kind: AnswerKind = "auto") -> list[list[str]]:
    """Group equal answers, in the order of their first; None is in no group."""
    groups: list[list[str]] = []
    for answer in answers:
        if answer is None:
            continue
        equal = next((group for group in groups if equivalent(group[0], answer, kind)), None)
        if equal is None:
            groups.append([answer])
        else:
            equal.append(answer)
    return groups


def _number_of(value: str, kind: AnswerKind) -> Fraction | None:
    """The number that an answer of that kind represents."""
    if kind == "number":
        return find_number(value)
    return whole_number(value, units=kind == "auto") if kind in ("auto", "expression") else None


def plain_text(value: str) -> str:
    """Text for comparison: one case, single spaces, no outer punctuation, no leading article."""
    text = unicodedata.normalize("NFKC", LATEX_TEXT.sub(r"\1", value)).casefold()
    text = " ".join(text.split()).strip(" .,;:!?\"'`()[]{}$*“”‘’")
    return _ARTICLE.sub("", text) or " ".join(value.split())
