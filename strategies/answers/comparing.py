"""When two answers are equal, and the canonical form of an answer.

Each kind has its rule (docs/reference/strategies.md). "auto" and "expression" compare the structures of two
answers (`structures`) part by part: numbers exactly, units by `units`, formulas by `expressions`, words as
text. Leaves out reading answers from text (`reading`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from decimal import Decimal
from fractions import Fraction

from viaticum.strategies.answers import structures
from viaticum.strategies.answers.choices import labels
from viaticum.strategies.answers.dates import whole_date
from viaticum.strategies.answers.expressions import to_latex
from viaticum.strategies.answers.matching import Comparison, plain_text
from viaticum.strategies.answers.numbers import LATEX_TEXT, find_number, whole_number, write_number
from viaticum.strategies.answers.quantities import same_number, same_quantity
from viaticum.strategies.answers.units import split_unit
from viaticum.types import AnswerKind

VALUE_CHARACTERS = 300  # longest answer with a structure; longer ones are compared as text
TEXT_CHARACTERS = 20_000  # only the beginning of a text is compared
BOOLEAN = re.compile(r"\b(yes|no|true|false)\b", re.IGNORECASE)
YES_NO = {"yes": "yes", "true": "yes", "no": "no", "false": "no"}
_LABELLED = re.compile(r"^\(([A-Za-z])\)\s?(?=\S)|^([A-Z])[).:]\s(?=\S)")
_PLAIN_NUMBER = re.compile(r"[-+]?\d{1,1000}(?:\.\d{1,300})?")
_SCIENTIFIC = re.compile(r"[-+]?\d{1,30}(?:\.\d{1,30})?[eE][-+]?\d{1,9}")
_IRRATIONAL = re.compile(r"\\(?:sqrt|pi)(?![a-z])|[√π]|\bsqrt\(")


def normalise(value: str, kind: AnswerKind) -> str:
    """The canonical form of an answer.

    Numbers without separators, units and trailing zeros, choices as capital letters in order, booleans as
    yes or no, dates as YYYY-MM-DD, expressions in LaTeX without math delimiters, other text in lower case
    without outer punctuation.
    """
    value = value[:TEXT_CHARACTERS] if kind == "text" else value[:VALUE_CHARACTERS]
    number = _number_of(value, kind)
    if number is not None:
        return write_number(number)
    if kind in ("date", "auto") and (day := whole_date(value)):
        return day
    if kind == "expression":
        return to_latex(value) or plain_text(value)
    if kind == "choice" and (found := labels(value)):
        return found
    if kind in ("boolean", "auto"):
        words = BOOLEAN.findall(value)
        if words and (kind == "boolean" or plain_text(value) == words[0].lower()):
            return YES_NO[words[0].lower()]
    return plain_text(value)


def equivalent(a: str | None, b: str | None, kind: AnswerKind = "auto") -> bool:
    """Whether two answers are equal. Reflexive and symmetric; None equals only None.

    Integers and fractions are compared exactly; a decimal equals what it is rounded from, within one part in
    a million. A unit on one side only is ignored. "auto" takes numbers as they are written: 50% is not 0.5
    and 5 km is not 5000 m, as in "number" and "expression". Formulas take at most `expressions.SECONDS` of
    symbolic comparison in all, plus the start of the worker the first time; without the extra `math` they
    are equal if their texts are.
    """
    if a is None or b is None or a == b:
        return a == b
    a, b = sorted((a, b))
    if kind in ("text", "choice", "boolean", "date"):
        return normalise(a, kind) == normalise(b, kind)
    if _PLAIN_NUMBER.fullmatch(a) and _PLAIN_NUMBER.fullmatch(b):
        return same_number(Fraction(a), Fraction(b))
    if len(a) > VALUE_CHARACTERS or len(b) > VALUE_CHARACTERS:
        return (
            plain_text(a[:TEXT_CHARACTERS]) == plain_text(b[:TEXT_CHARACTERS])
            and len(a) + len(b) < TEXT_CHARACTERS
        )
    if kind == "number":
        return _same_found_number(a, b)
    if kind == "auto" and (verdict := _same_date_or_word(a, b)) is not None:
        return verdict
    return Comparison(kind).same(structures.parse(a), structures.parse(b))


def is_right(answer: str | None, accepted: Iterable[str], kind: AnswerKind = "auto") -> bool:
    """Whether an answer equals one of the accepted answers; no answer is never right."""
    return answer is not None and any(equivalent(answer, each, kind) for each in accepted)


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


def _same_found_number(a: str, b: str) -> bool:
    """Whether the numbers in two texts are equal, with their units where both have one."""
    if _IRRATIONAL.search(a) or _IRRATIONAL.search(b):
        return Comparison("expression").same(structures.parse(a), structures.parse(b))
    if _SCIENTIFIC.fullmatch(a) and _SCIENTIFIC.fullmatch(b):  # of any exponent
        return Decimal(a) == Decimal(b)
    x, y = find_number(a), find_number(b)
    if x is None or y is None:
        return x is y and plain_text(a) == plain_text(b)
    return same_quantity(x, split_unit(a.strip())[1], y, split_unit(b.strip())[1], convert=True)


def _same_date_or_word(a: str, b: str) -> bool | None:
    """The verdict on two dates, two booleans, or a letter and the option that it labels; None for others."""
    if a[:1].isalnum() or b[:1].isalnum():
        days = whole_date(a), whole_date(b)
        if days[0] and days[1]:
            return days[0] == days[1]
    x, y = plain_text(a), plain_text(b)
    if x in YES_NO and y in YES_NO:
        return YES_NO[x] == YES_NO[y]
    for letter, option in ((x, b), (y, a)):
        if len(letter) == 1 and (match := _LABELLED.match(LATEX_TEXT.sub(r"\1", option).strip())):
            return (match[1] or match[2]).casefold() == letter
    return None
