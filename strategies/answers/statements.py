"""The statements of a text that could give its answer, each with a named rule and a rank.

A box, a tag, an answer field, "####", "The answer is" or a heading "Answer" in many languages is a statement
of the model's answer (`STATED`). "Result: ..." and the like are weaker (`LABELLED`), and "this answer is
correct" is a remark (`REMARKED`) that is never read. Leaves out what a statement says (`reading`).
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from viaticum.strategies.answers.languages import (
    CHOOSE_MARKER,
    ENGLISH_MARKER,
    FOREIGN_MARKER,
    NO_ANSWER_BEFORE,
    REMARK,
    UNIT_REMARK,
    WEAK_LABEL,
)

STATED, LABELLED, GUESSED, REMARKED = 3, 2, 1, 0
BOX_CHARACTERS = 2_000
MARKS = 40  # only so many last marks of each kind are looked at
LINE_CHARACTERS = 400  # of a statement that is not a box
_BOX = re.compile(
    r"(?:\\(?:boxed|fbox|framebox)|(?<![A-Za-z\\])boxed(?=\s?\{))\s{0,3}(?:(\\?\{)|(\()|(?=[-\dA-Za-z\\$]))"
)
_BARE_BOX = re.compile(r"-?(?:\\[dt]?frac\s?\d{2}|\\[A-Za-z]{1,10}\{[^{}\n]{0,60}\}|\d[\d.,]*\d|\w)")
_TAG = re.compile(r"<(?:final_?)?(answer|ans|result|solution|response|final)>", re.IGNORECASE)
_HASHES = re.compile(r"(?:^|(?<=[\s.]))####[ \t]{0,4}(?!#)", re.MULTILINE)
_HASH_VALUE = re.compile(r"\W{0,8}(?:\d|\\|[A-Z]\W{0,3}$)|[^\n]{0,60}$")
_HEADING = re.compile(
    r"^\W{0,10}(?:step|part|case|note|solution|explanation|method|check|verif\w*)\b", re.IGNORECASE
)
_FIELD = re.compile(
    r"[\"'](?:final[_ ]?)?(?:answer|result|solution|response|choice|ans|prediction|output"
    r"|final)[\"']\s?:\s{0,3}"
    r"(?:\"((?:[^\"\\\n]|\\.){0,2000})\"|'((?:[^'\\\n]|\\.){0,2000})'|(-?\d[\d.eE+-]{0,60}|true|false|null)"
    r"|(\[[^\[\]]{0,1000}\]))",
    re.IGNORECASE,
)
_UNESCAPE = re.compile(r"\\([\"'/\\])|\\n(?![a-z])")
_WORDS_BELOW = re.compile(r"\n[^\n]*\w")
_NEXT_QUESTION = re.compile(
    r"\n[\s*#]{0,6}(?:Question|Q|Problem|Human|User|Input|Instruction)(?:\s?\d{1,3})?\s?:", re.IGNORECASE
)
_BETWEEN_BOXES = re.compile(
    r"[\s$,;&()\[\]\\.]{0,12}(?:(?:\\text\s?\{\s?)?(?:and|or|und|oder|et|ou|y|o|e|и|или|和|或|及|、)\s?\}?)?"
    r"[\s$,;&(\[\\]{0,8}"
    r"(?:[A-Za-z](?:_\{?\d\}?)?\s?=\s?)?[\s$]{0,4}",
    re.IGNORECASE,
)
_PLACEHOLDER = re.compile(
    r"[\s.…?_*\\{}$-]{0,12}(?:(?:text\s?\{)?\W{0,4}(?:your |the |final |my |insert |numerical |correct )*"
    r"(?:answer|ans|result|value|letter|number)(?: here)?\W{0,6}|\\?[lc]?dots)?[\s.…?_*{}$]{0,8}",
    re.IGNORECASE,
)
_DISPLAY = (("$$", "$$"), ("\\[", "\\]"), ("\\begin{", "\\end{"))
_EMPTY = re.compile(r"[\s:*_#=.,—–。：>|-]*")
_BULLET = re.compile(r"^(?:[-*•>✅✓→]|\d{1,2}\.(?=\s\D))\s{1,4}")


@dataclass(frozen=True, slots=True)
class Statement:
    """A place that could give the answer.

    Attributes:
        rule: what marks it, such as "box" or "the answer is".
        rank: how much it counts; among the highest rank that can be read the last one wins.
        start, end: where it stands in the text.
        text: the words that may hold the answer.
        exact: those words are the answer and nothing else.
        cut: the text ended before the statement did.
    """

    rule: str
    rank: int
    start: int
    end: int
    text: str
    exact: bool = False
    cut: bool = False


def statements(text: str) -> list[Statement]:
    """All statements of a text in the order in which they count: the last of the highest rank comes last."""
    found = _all(text)
    return sorted(found, key=lambda each: (each.rank, each.start))


def without_next_question(text: str) -> str:
    """The text up to where a model that has answered goes on with a question of its own."""
    if _NEXT_QUESTION.search(text) is None:
        return text
    stated = [each.end for each in _all(text) if each.rank == STATED]
    for match in _NEXT_QUESTION.finditer(text):
        if stated and min(stated) <= match.start() + 1:
            return text[: match.start()]
    return text


def _all(text: str) -> list[Statement]:
    return [*_boxes(text), *_tags(text), *_fields(text), *_hashes(text), *_sentences(text)]


def _last(pattern: re.Pattern[str], text: str) -> deque[re.Match[str]]:
    return deque(pattern.finditer(text), maxlen=MARKS)


def _boxes(text: str) -> Iterator[Statement]:
    """Boxes, and lists of boxes ("\\boxed{2} and \\boxed{3}") as one statement after the last of them."""
    row: list[Statement] = []
    for match in _last(_BOX, text):
        rest = text[match.end() : match.end() + BOX_CHARACTERS]
        if match[1] or match[2]:
            inside, closed = _inside(rest, *(("{", "}") if match[1] else ("(", ")")))
            inside = inside.removesuffix("\\") if match[1] == "\\{" else inside
        else:
            bare = _BARE_BOX.match(rest)
            inside, closed = (bare[0] if bare else ""), True
        box = Statement(
            "box", STATED, match.start(), match.end() + len(inside) + 1, inside.strip(), True, not closed
        )
        if _PLACEHOLDER.fullmatch(inside[:60]) and len(inside) <= 60:
            continue
        yield box
        between = text[row[-1].end : box.start] if row else None
        if between is None or len(between) > 40 or not _BETWEEN_BOXES.fullmatch(between):
            row = []
        row.append(box)
        values = list(dict.fromkeys(each.text for each in row))
        if len(values) > 1:
            yield Statement("boxes", STATED, box.start, box.end, ", ".join(values), True, box.cut)


def _inside(text: str, opening: str, closing: str) -> tuple[str, bool]:
    """The text up to the closing bracket, without one up to the end of the line; and whether there is one."""
    depth, escaped = 1, False
    for index, letter in enumerate(text):
        if escaped:
            escaped = False
        elif letter == "\\":
            escaped = True
        else:
            depth += (letter == opening) - (letter == closing)
            if not depth:
                return text[:index], True
    depth = 1
    for index, letter in enumerate(text):  # escaped brackets may have been meant as such
        depth += (letter == opening) - (letter == closing)
        if not depth:
            return text[:index], True
    return text.strip().partition("\n")[0].rstrip("$ ."), False


def _tags(text: str) -> Iterator[Statement]:
    for match in _last(_TAG, text):
        rest = text[match.end() : match.end() + BOX_CHARACTERS]
        inside, closing, _ = rest.partition("</")
        if inside.strip() and not _PLACEHOLDER.fullmatch(inside[:60]):
            yield Statement(
                "tag", STATED, match.start(), match.end() + len(inside), inside.strip(), True, not closing
            )


def _fields(text: str) -> Iterator[Statement]:
    """The answer field of a JSON object; of a text that is an object, it stands after all other words."""
    whole = text.strip()
    is_object = whole.startswith("{") and whole.endswith("}")
    for match in _last(_FIELD, text):
        value = next((group for group in match.groups() if group is not None), "")
        value = _UNESCAPE.sub(lambda each: each[1] or "\n", value).strip()
        if value and value.lower() != "null":
            start = len(text) if is_object else match.start()
            yield Statement("answer field", STATED, start, match.end(), value, True)


def _hashes(text: str) -> Iterator[Statement]:
    for match in _last(_HASHES, text):
        line = text[match.end() : match.end() + LINE_CHARACTERS].partition("\n")[0].strip()
        is_last = not text[match.end() + len(line) :].strip(" \n\t")
        if line and not _HEADING.match(line) and (is_last or _HASH_VALUE.match(line)):
            yield Statement("####", STATED, match.start(), match.end() + len(line), line)


def _sentences(text: str) -> Iterator[Statement]:
    patterns = [("the answer is", ENGLISH_MARKER, STATED), ("I choose", CHOOSE_MARKER, STATED)]
    patterns.append(("label", WEAK_LABEL, LABELLED))
    if not text.isascii() or _MAY_BE_FOREIGN.search(text):
        patterns.insert(1, ("the answer is", FOREIGN_MARKER, STATED))
    for rule, pattern, rank in patterns:
        for match in _last(pattern, text):
            value, end, heading = value_after(text, match.end())
            before = text[max(0, match.start() - 60) : match.start()]
            if not value:
                continue
            if rank == LABELLED and len(_WORDS_BELOW.findall(text, end)) > 1:
                continue  # "Total: 5" in the middle of the work
            if heading:
                rule = "heading" if rank == STATED else "label"
            if (
                is_remark(value)
                or _is_question(value)
                or (pattern in (ENGLISH_MARKER, CHOOSE_MARKER) and NO_ANSWER_BEFORE.search(before))
            ):
                yield Statement("remark", REMARKED, match.start(), end, value)
            else:
                yield Statement(rule, rank, match.start(), end, value)


_MAY_BE_FOREIGN = re.compile(
    r"\b(?:antwort|ergebnis|endergebnis|antwoord|svar|slutsvar|vastaus|respuesta|resultado|resposta|risposta"
    r"|soluzione|odgovor"
    r"|atsakymas|cevap|cavab|javob|jawaban|jawapan|jibu|sagot|raspuns|reponse|odpowiedz)",
    re.IGNORECASE,
)


def is_remark(value: str) -> bool:
    """Whether words after "the answer is" only speak about the answer ("correct", "in square meters")."""
    line = value.partition("\n")[0][:120]
    return REMARK.match(line) is not None or UNIT_REMARK.match(re.split(r"[.;]", line)[0]) is not None


def _is_question(value: str) -> bool:
    end = re.search(r"[?？؟]|[.!;](?=\s|$)|\n", value[:80])
    return end is not None and end[0] in "?？؟"


def value_after(text: str, position: int) -> tuple[str, int, bool]:
    """The words after a mark: the rest of its line, or the next line with words; a displayed formula whole.

    Returns:
        the words, where they end, and whether they stand below the mark.
    """
    line_end = text.find("\n", position)
    line_end = len(text) if line_end < 0 else line_end
    line = text[position:line_end]
    below = _EMPTY.fullmatch(line) is not None
    if below:
        rest = text[line_end : line_end + BOX_CHARACTERS]
        position = line_end + len(rest) - len(rest.lstrip(" \t\n:*_#=—–。>|"))
        line_end = text.find("\n", position)
        line_end = len(text) if line_end < 0 else line_end
        line = text[position:line_end]
        bullet = _BULLET.match(line)
        position += bullet.end() if bullet else 0
    start = position + len(text[position:line_end]) - len(text[position:line_end].lstrip(" \t:"))
    head = text[start : start + 12].lstrip(" $")
    for opening, closing in _DISPLAY:
        if text.startswith(opening, start) or (opening == "\\begin{" and head.startswith(opening)):
            end = text.find(closing, start + len(opening), start + BOX_CHARACTERS)
            if end >= 0:
                stop = text.find("\n", end)
                line_end = max(line_end, len(text) if stop < 0 else stop)
    return (
        text[
            start : min(line_end, start + (BOX_CHARACTERS if "\\begin" in head else LINE_CHARACTERS))
        ].strip(),
        line_end,
        below,
    )
