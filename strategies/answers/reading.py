"""Which statement of a text is its answer, and the answer that it states.

Every pattern runs in linear time and every text is truncated before it is searched, so that nothing a model
writes can raise an error or hang here. Leaves out comparing answers (`comparing`).
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator

from viaticum.strategies.answers.comparing import BOOLEAN, CHOICE, VALUE_CHARACTERS, YES_NO
from viaticum.strategies.answers.dates import find_dates
from viaticum.strategies.answers.expressions import is_symbolic
from viaticum.strategies.answers.numbers import (
    LATEX_TEXT,
    NUMBER,
    clean,
    find_number,
    numbers_in,
    whole_number,
    write_number,
)
from viaticum.types import AnswerKind

TEXT_CHARACTERS = 20_000  # only the end of a text is read
MARKS = 20  # only the last marks of a text are tried
_MARKER = re.compile(
    r"\\boxed\s?\{|\\fbox\s?\{|####|\banswer(?: to the question)?(?: is| are|:| :| =|\s?\n)(?: equal to)?:?",
    re.IGNORECASE,
)
_MATH = re.compile(
    r"\$\$([^$]{1,300})\$\$|(?<!\\)\$([^$\n]{1,300})(?<!\\)\$|\\\(([^\n]{1,300}?)\\\)|\\\[(.{1,300}?)\\\]",
    re.DOTALL,
)
_VARIABLE = re.compile(r"(?<![\\A-Za-z])[A-Za-z](?![A-Za-z])")
_LOOSE_CHOICE = re.compile(
    r"\(([A-Ja-j])\)|\b([A-J])\)|(?i:option|choice)\s\(?([A-Ja-j])\b|^\W{0,3}([A-J])\W{0,3}$", re.M
)
_SENTENCE_END = re.compile(r"(?:(?<=\w{4})|(?<=\d))[.;!?]\s|\n")


def read_answer(text: str, kind: AnswerKind, *, marked_only: bool = False) -> str | None:
    r"""The final answer of a text in canonical form, or None.

    It follows the last `\boxed{`, `####`, "the answer is" or "Answer:" after which an answer of that kind
    can be read. Without such a mark it is the last number, choice or yes/no, or the last line if that is
    short; `marked_only` excludes these guesses.
    """
    text = text[-TEXT_CHARACTERS:].replace("**", "")
    for candidate in reversed(deque(_marked(text), maxlen=MARKS)):
        value = _read_value(candidate, kind)
        if value:
            return value
    return None if marked_only else _guess(text, kind)


def _marked(text: str) -> Iterator[str]:
    """The text after each mark: inside the braces of a box, else to the end of the line."""
    for match in _MARKER.finditer(text):
        rest = text[match.end() : match.end() + VALUE_CHARACTERS]
        if match[0].endswith("{"):
            yield _inside_braces(rest)
        else:
            yield rest.lstrip(" \t\n:").partition("\n")[0]


def _inside_braces(text: str) -> str:
    depth = 1
    for index, letter in enumerate(text):
        depth += {"{": 1, "}": -1}.get(letter, 0)
        if not depth:
            return text[:index]
    return text.partition("\n")[0]


def _read_value(candidate: str, kind: AnswerKind) -> str | None:
    """The answer at the start of a marked candidate."""
    if kind == "number":
        number = find_number(candidate)
        return None if number is None else write_number(number)
    if kind == "choice":
        match = CHOICE.search(clean(candidate)) or _LOOSE_CHOICE.search(candidate)
        return next(group for group in match.groups() if group).upper() if match else None
    if kind == "boolean":
        match = BOOLEAN.search(candidate)
        return YES_NO[match[1].lower()] if match else None
    if kind == "auto":
        return _read_auto(candidate)
    if kind == "date":
        return next(find_dates(candidate), None) or _first_sentence(candidate) or None
    if kind == "expression":
        return _read_expression(candidate) or None
    return _first_sentence(candidate) or None


def _read_auto(candidate: str) -> str | None:
    """The number that a candidate is, starts with, equates to or states; else its first sentence."""
    number = whole_number(candidate)
    if number is None and (formula := _formula(candidate)):
        return formula
    if number is None and ("=" in candidate or _starts_with_number(candidate) or _says_one_number(candidate)):
        number = find_number(candidate)
    return write_number(number) if number is not None else _first_sentence(candidate) or None


def _formula(candidate: str) -> str | None:
    """The expression that a candidate is; None for words and for `variable = value`."""
    expression = _read_expression(candidate)
    left, equals, right = expression.rpartition("=")
    one_variable = "," not in left or len(set(_VARIABLE.findall(left))) == 1
    ends_in_value = equals and one_variable and whole_number(right) is not None
    return expression if is_symbolic(expression) and not ends_in_value else None


def _read_expression(candidate: str) -> str:
    """The formula at the start of a candidate, or its first sentence, without math delimiters."""
    candidate = candidate.strip()
    formula = _MATH.match(candidate)
    if formula:
        return _inside(formula)
    sentence = _SENTENCE_END.split(candidate, maxsplit=1)[0].strip(" \"'`$")
    return sentence.removeprefix("\\(").removesuffix("\\)").rstrip(".").strip()


def _inside(formula: re.Match[str]) -> str:
    return next(group for group in formula.groups() if group).strip().rstrip(".,;").strip()


def _starts_with_number(candidate: str) -> bool:
    """Whether a number comes first that is not part of a date, ratio or range."""
    cleaned = clean(candidate).lstrip(" =≈:")
    match = NUMBER.match(cleaned)
    return match is not None and re.match(r"\s?[-:/]\s?\d|(?:st|nd|rd|th)\b", cleaned[match.end() :]) is None


def _says_one_number(candidate: str) -> bool:
    """Whether a sentence ("Rosa is 22 years old", "Total: $22") has one number, unlike "Apollo 11"."""
    is_sentence = ":" in candidate or len(candidate.split()) > 2
    return is_sentence and len(list(numbers_in(clean(candidate)))) == 1


def _first_sentence(candidate: str) -> str:
    """The first sentence without its period and quotes. A short word before a period is an abbreviation."""
    sentence = _SENTENCE_END.split(LATEX_TEXT.sub(r"\1", candidate.strip()), maxsplit=1)[0]
    return sentence.strip(" \"'`$").rstrip(".").strip()


def _guess(text: str, kind: AnswerKind) -> str | None:
    """The last part of an unmarked text that could be its answer."""
    if kind in ("number", "auto"):
        lines = [line for line in text.splitlines() if line.strip()]
        if kind == "auto" and len(lines) == 1 and len(lines[0]) <= 100:
            return _read_auto(lines[0].strip())
        last_number = deque(numbers_in(clean(text)), maxlen=1)
        if last_number:
            return write_number(last_number[0])
    if kind == "choice":
        found = [group for match in _LOOSE_CHOICE.finditer(text) for group in match.groups() if group]
        lone = CHOICE.search(clean(text)) if len(text) <= 100 else None
        return found[-1].upper() if found else lone[1].upper() if lone else None
    if kind == "boolean":
        words = BOOLEAN.findall(text)
        first = BOOLEAN.match(text.strip())
        word = first[1] if first else words[-1] if words else None
        return YES_NO[word.lower()] if word else None
    if kind == "number":
        return None
    if kind == "date" and (days := deque(find_dates(text), maxlen=1)):
        return days[0]
    if kind == "expression":
        formulas = deque(_MATH.finditer(text), maxlen=1)
        if formulas and (formula := _inside(formulas[0])):
            return formula
    last = next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")
    if len(last) > 100:
        return None
    return (_read_expression(last) if kind == "expression" else _first_sentence(last)) or None
