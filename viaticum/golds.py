"""The right answers of a row: one function for every kind of input file.

A gold answer may be a text, a number, true or false, a worked solution with its answer in a box or after
`####`, a letter, index or text of an option. What cannot be read in one way only is refused, with what to
write instead: an answer that is read wrong makes every accuracy wrong, and nothing shows it. Leaves out
comparing answers (`strategies.answers`).
"""

from __future__ import annotations

import ast
import datetime
import json
import math
import re
import string
from collections.abc import Mapping
from decimal import Decimal
from typing import Any, NamedTuple

from viaticum.checks import shown
from viaticum.errors import DataError
from viaticum.types import AnswerKind

GOLD_MARK = "####"
LONGEST_GOLD = 300  # longer texts are compared by their beginnings, so no longer answer is compared right

_BOX = re.compile(r"\\(?:boxed|fbox)\s?(?:\{|(?=\d|\w\b))")
_BETWEEN_BOXES = re.compile(r"(?:[\s,;$.]|\\[()\[\],;]|and|or)*")
_SAYS = re.compile(
    r"^(?:so,? |therefore,? |thus,? )?(?:the )?(?:final |correct )?answer(?: is:?|:) ?", re.IGNORECASE
)
_MISSING = ("nan", "none", "null", "<na>", "n/a")
_YES_NO = {"yes": "yes", "true": "yes", "no": "no", "false": "no", "1": "yes", "0": "no"}
_LETTER = re.compile(
    r"\W{0,4}(?:(?:option|choice|answer)\s)?\W{0,3}([A-Z]|\d{1,2})\s*(?:[).:,\]}*].*)?",
    re.IGNORECASE | re.DOTALL,
)
_CODED = re.compile(
    r"\s*(?:\[\s*['\"\[{]|\{\s*['\"]\w+['\"]\s*:)"
)  # a list or object that was written as text
_HOW_LIST = (
    'several accepted answers are written "answers": ["a", "b"], and an answer that is a list is a text: '
    '"answer": "[1, 2]"'
)


class Golds(NamedTuple):
    """The accepted answers of a row, none where it is not known; and the kind and options that they imply."""

    accepted: tuple[str, ...]
    kind: AnswerKind | None
    options: tuple[str, ...]


def parse_golds(row: Mapping[str, Any], kind: AnswerKind | None) -> Golds:
    """The accepted answers of a row: `answer` (one) and `answers` (several, any of which is right).

    Args:
        row: with `answer`, `answers`, `options` or `choices`; missing, null, NaN and "" mean: not known.
        kind: as the row states it, or None.

    Raises:
        DataError: an answer can be read in no way, or in more than one; without the location.
    """
    options, labels = _options(row)
    values = [*_items(row.get("answer"), several=False), *_items(row.get("answers"), several=True)]
    if kind is None and values:
        kind = _implied_kind(values[0], bool(options))
    accepted = [_gold(value, kind or "auto", options, labels) for value in values]
    return Golds(tuple(dict.fromkeys(accepted)), kind, options)


def _implied_kind(value: object, has_options: bool) -> AnswerKind | None:
    if has_options:
        return "choice"
    if isinstance(value, bool):
        return "boolean"
    return "number" if isinstance(value, str) and GOLD_MARK in value else None


def _items(value: object, *, several: bool) -> list[object]:
    """The single values in an answer column: none where it is missing."""
    if isinstance(value, str) and _CODED.match(value):
        value = _decoded(value)
    if _is_missing(value):
        return []
    if isinstance(value, Mapping):
        return _items_of_struct(value, several=several)
    if not isinstance(value, list | tuple):
        return [value]
    found = [item for each in value for item in _items(each, several=False)]
    if not several and len({str(each) for each in found}) > 1:
        raise DataError(f"the answer {shown(value)} is a list; {_HOW_LIST}")
    return found[: None if several else 1]


def _items_of_struct(value: Mapping[str, Any], *, several: bool) -> list[object]:
    """A value with its aliases (`{"value": ..., "aliases": [...]}`), or texts (`{"text": [...]}`)."""
    if "value" in value:
        return [*_items(value["value"], several=several), *_items(value.get("aliases"), several=True)]
    if "text" in value:
        return _items(value["text"], several=True)
    raise DataError(
        f"the answer {shown(value)} is an object; write the answer alone, or "
        '{"value": ..., "aliases": [...]}'
    )


def _decoded(text: str) -> object:
    """A list or object that was written as text, as pandas does in CSV; the text itself if it is none."""
    if len(text) > 10_000:
        return text
    for decode in (json.loads, ast.literal_eval):
        try:
            value: object = decode(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
            continue
        return value if isinstance(value, list | Mapping) else text
    return text


def _is_missing(value: object) -> bool:
    return (
        value is None
        or (isinstance(value, str) and not value.strip())
        or (isinstance(value, float | Decimal) and math.isnan(value))
    )


# --- one value ------------------------------------------------------------------------------------


def _gold(value: object, kind: AnswerKind, options: tuple[str, ...], labels: tuple[str, ...]) -> str:
    if options:
        return _choice(value, options, labels)
    text = _final_answer(value, kind) if isinstance(value, str) else _scalar(value, kind)
    if kind == "choice":
        found = _LETTER.fullmatch(text)
        if found is None or not isinstance(value, str):
            raise DataError(f"the answer {shown(value)} names no choice; write its letter, or give `options`")
        return found[1].upper()
    if kind == "boolean":
        word = _YES_NO.get(text.lower().strip(" ."))
        if word is None:
            raise DataError(f"the answer {shown(value)} is neither yes nor no; correct it, or its kind")
        return word
    return text


def _scalar(value: object, kind: AnswerKind) -> str:
    """A number, boolean or date as text; integral floats without their point."""
    if isinstance(value, bool):
        if kind not in ("boolean", "auto", "text"):
            raise DataError(
                f"the answer {shown(value)} is a truth value, its kind is {kind}; correct one of them"
            )
        return "yes" if value else "no"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float | Decimal) and math.isfinite(value):
        return str(int(value)) if value == int(value) and -(10**16) < value < 10**16 else str(value)
    if isinstance(value, datetime.datetime):
        return (value.date() if value.time() == datetime.time() else value).isoformat()
    if isinstance(value, datetime.date):
        return value.isoformat()
    raise DataError(f"the answer {shown(value)} is no text, number, date or truth value; write one of those")


def _final_answer(text: str, kind: AnswerKind) -> str:
    """The answer of a text: in its last box, after `####`, after "The answer is", or all of it."""
    boxed = _boxed(text)
    if boxed is not None:
        answer = boxed
    elif GOLD_MARK in text:
        answer = text.rpartition(GOLD_MARK)[2].strip()
        if not answer or "\n" in answer:
            raise DataError(f"no answer in one line after the last {GOLD_MARK}; write it there")
    else:
        answer = _SAYS.sub("", text.strip())
        answer = answer if answer and answer != text.strip() else text.strip()
    if kind != "text" and answer.lower() in _MISSING:
        raise DataError(
            f'the answer is the word {answer!r}; leave it out where it is not known, or write "kind": "text"'
        )
    if kind != "text" and len(answer) > LONGEST_GOLD:
        raise DataError(
            f"the answer has {len(answer)} characters; write the final answer alone, in \\boxed{{}} or after "
            f"{GOLD_MARK}"
        )
    return answer


def _boxed(text: str) -> str | None:
    """The content of the last box; of several with only commas or `and` between them, all of them."""
    contents: list[str] = []
    end = 0
    for match in _BOX.finditer(text):
        if match.start() < end:
            continue  # a box inside a box
        if contents and not _BETWEEN_BOXES.fullmatch(text[end : match.start()]):
            contents = []
        if not match[0].endswith("{"):
            contents.append(text[match.end()])
            end = match.end() + 1
            continue
        closing = _closing_brace(text, match.end())
        contents.append(text[match.end() : closing].strip())
        end = closing + 1
    if not contents:
        return None
    if not all(contents):
        raise DataError("the answer's box is empty; write the answer into it")
    return ", ".join(dict.fromkeys(contents))


def _closing_brace(text: str, start: int) -> int:
    depth = 1
    for found in re.finditer(r"\\.|[{}]", text[start:], re.DOTALL):
        depth += {"{": 1, "}": -1}.get(found[0], 0)
        if not depth:
            return start + found.start()
    raise DataError("the answer's box is not closed; the text was cut, write all of it")


# --- choices --------------------------------------------------------------------------------------


def _options(row: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The texts of the options of a row, and their labels where they have some."""
    given = next((row[name] for name in ("options", "choices") if not _is_missing(row.get(name))), None)
    if isinstance(given, str):
        given = _decoded(given)
    labels: object = ()
    if isinstance(given, Mapping):
        if "text" in given:
            given, labels = given["text"], given.get("label", ())
        else:
            given, labels = list(given.values()), list(given)
    if given is None or given == []:
        return (), ()
    if not isinstance(given, list) or not isinstance(labels, list | tuple) or not 2 <= len(given) <= 26:
        raise DataError(f'the options {shown(given)} are no list of 2 to 26; write "options": ["...", "..."]')
    return tuple(str(each).strip() for each in given), tuple(str(each).strip() for each in labels)


def _choice(value: object, options: tuple[str, ...], labels: tuple[str, ...]) -> str:
    """The letter of the option that a gold answer names by letter, label, index from 0, or text."""
    text = _final_answer(value, "text") if isinstance(value, str) else str(value)
    letters = string.ascii_uppercase[: len(options)]
    found = {letters[index] for index, each in enumerate(options) if _plain(each) == _plain(text)}
    found |= {letters[index] for index, each in enumerate(labels) if each == text}
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(options) and not labels:
        found.add(letters[value])
    if (
        not found
        and isinstance(value, str)
        and (letter := _LETTER.fullmatch(text))
        and letter[1].upper() in letters
    ):
        found.add(letter[1].upper())
    if len(found) != 1:
        which = "more than one" if found else "none"
        raise DataError(
            f"the answer {shown(value)} names {which} of the {len(options)} options; write the letter, A "
            "for the first (a number is an index from 0)"
        )
    return found.pop()


def with_options(question: str, options: tuple[str, ...]) -> str:
    """The question with its options, one a line after a letter; unchanged where it holds them already."""
    if not options or all(re.search(rf"(?<!\w){re.escape(each)}(?!\w)", question) for each in options):
        return question
    lines = [f"{letter}) {each}" for letter, each in zip(string.ascii_uppercase, options, strict=False)]
    return "\n".join([question.rstrip(), *lines])


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).strip(" .")
