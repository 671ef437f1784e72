"""Which statement of a text is its answer, the answer that it states, and why.

`statements` finds the candidates and ranks them; here each is read as the kind of answer that was asked for,
and the last one of the highest rank that can be read is taken. Without any, the text is guessed from: its
last number, choice, formula or short line. Every pattern runs in linear time and every text is cut before it
is searched, so that nothing a model writes can raise an error or hang here. Leaves out comparing answers
(`comparing`).
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from viaticum.strategies.answers.choices import (
    guess_boolean,
    guess_choice,
    read_boolean,
    read_choice,
)
from viaticum.strategies.answers.dates import find_dates
from viaticum.strategies.answers.expressions import is_symbolic
from viaticum.strategies.answers.languages import (
    DECLINED,
    GOES_ON,
    REFUSAL,
    SENTENCE_END,
    UNDECIDED,
    UNKNOWN,
    decimal_comma,
    groups_by_comma,
)
from viaticum.strategies.answers.markup import plain, spoken
from viaticum.strategies.answers.matching import is_name
from viaticum.strategies.answers.numbers import (
    LATEX_TEXT,
    NUMBER,
    clean,
    concluded_number,
    decimal_points,
    find_number,
    numbers_in,
    whole_number,
    write_number,
)
from viaticum.strategies.answers.statements import (
    GUESSED,
    LABELLED,
    REMARKED,
    Statement,
    statements,
    without_next_question,
)
from viaticum.strategies.answers.structures import Collection, Equation, Value, parse
from viaticum.strategies.answers.units import split_unit
from viaticum.types import AnswerKind

TEXT_CHARACTERS = 20_000  # only the end of a text is read
SHORT_LINE = 100  # a longer last line is no answer
_NOTHING = ""  # read from a statement that says there is no answer
_MATH = re.compile(
    r"\$\$([^$]{1,600})\$\$|(?<!\\)\$([^$\n]{1,300})(?<!\\)\$|\\\(([^\n]{1,300}?)\\\)|\\\[(.{1,600}?)\\\]",
    re.DOTALL,
)
_EQUALS_SIGN = re.compile(r"(?<![<>!:])=(?!=)")
_VARIABLE = re.compile(r"(?<![\\A-Za-z])[A-Za-z](?![A-Za-z])")
_BOLD = re.compile(r"\*\*([^*\n]{1,60})\*\*|__([^_\n]{1,60})__")
_NUM = r"[-+]?\d[\d.,/]{0,30}"
_COMPOUND = re.compile(
    rf"{_NUM}\s?[^\W\d_]{{1,15}}\s?(?:,\s|and\s|\s|,\sand\s)\s?{_NUM}\s?[^\W\d_]{{1,15}}\.?"
)
_LIST = re.compile(rf"{_NUM}(?:(?:,?\s?(?:and|or|&|und|et|y|e|o|и|和)\s|[,;、]\s?){_NUM})+\.?")
_RATIO = re.compile(rf"({_NUM})\s?(?::|to|zu|à)\s?({_NUM})\.?")
_RANGE = re.compile(
    rf"\W{{0,4}}(?:somewhere |always )?between\s\W?{_NUM}\sand\s\W?{_NUM}(?:\s[^\W\d]{{1,15}})?\W{{0,2}}"
)
_BECAUSE = re.compile(r"(\([A-Z]\)),?\s(?:because|since|as)\b")
_EQUATIONS = re.compile(  # "x = 3 or x = -2", whose last right side is not the answer
    r"[$({]{0,2}[A-Za-z](?:_\{?\d\}?)?\s?=[^=]{1,60}(?:,|;|\b(?:and|or|und|oder|et|ou|y|o)\b)[\s$]{0,3}"
    r"[A-Za-z](?:_\{?\d\}?)?\s?="
)
_SEPARATOR = re.compile(r"(?:\s|,|;|\.|\b(?:and|or|und|oder|et|ou|y|e|o|und)\b)*", re.IGNORECASE)
_LEAD = re.compile(
    r"^(?:that|then|therefore|thus|also|simply|indeed|precisely|exactly|just)\s|^(?:\\?approx|≈|\\simeq"
    r"|\\sim)(?![A-Za-z])\s?|^[:=]\s?",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A statement that could give the answer.

    Attributes:
        rule: what marks it: "box", "the answer is", "last number" ...
        rank: 3 stated, 2 labelled, 1 guessed, 0 a remark.
        text: the words.
        value: what was read from them; None if nothing could be.
        verdict: "the answer", or why it is not.
    """

    rule: str
    rank: int
    text: str
    value: str | None
    verdict: str


@dataclass(frozen=True, slots=True)
class Explanation:
    """How a text was read: its candidates in the order in which they count, and the answer."""

    kind: AnswerKind
    candidates: tuple[Candidate, ...]
    value: str | None


def read_answer(text: str, kind: AnswerKind, *, marked_only: bool = False) -> str | None:
    r"""The final answer of a text in canonical form, or None.

    It is the last box, tag, answer field, "The answer is" or "Answer:" (in many languages) from which an
    answer of that kind can be read, however the text goes on. Without such a mark it is the last number,
    choice or yes/no, or the last line if that is short; `marked_only` excludes these guesses, and a box that
    the end of the text cut off. A thought (`<think>`) is not read.
    """
    return explain(text, kind, marked_only=marked_only, first_only=True).value


def explain(
    text: str, kind: AnswerKind, *, marked_only: bool = False, first_only: bool = False
) -> Explanation:
    """Every candidate of a text with its rule and what was read from it, and the answer.

    Args:
        text, kind, marked_only: as for `read_answer`.
        first_only: stop at the answer.
    """
    raw = spoken(text)[-TEXT_CHARACTERS:]
    reader = _Reader(without_next_question(plain(raw)), raw, kind)
    candidates: list[Candidate] = []
    answer: str | None = None
    found = False
    for statement in reader.candidates():
        value, verdict = None, ""
        if statement.rank == REMARKED:
            verdict = "a remark about an answer"
        elif marked_only and (statement.rank <= GUESSED or statement.cut):
            verdict = "cut off" if statement.cut else "only a guess, and the text was cut off"
        elif statement.rank == GUESSED:
            value = statement.text or None
            verdict = "only a guess"
        else:
            value = reader.read(statement)
            verdict = "earlier or weaker" if found else f"no {kind} in it"
        if value == _NOTHING:
            verdict, found = "says that there is no single answer", True
        elif value is not None and not found and statement.rank > REMARKED:
            answer, found, verdict = value, True, "the answer"
        elif value is not None and found and statement.rank == GUESSED:
            verdict = "only a guess"
        candidates.append(Candidate(statement.rule, statement.rank, statement.text, value or None, verdict))
        if found and first_only:
            break
    return Explanation(kind, tuple(candidates), answer)


class _Reader:
    """One text, read as one kind of answer."""

    def __init__(self, text: str, raw: str, kind: AnswerKind) -> None:
        self.text, self.raw, self.kind = text, raw, kind
        self.comma = decimal_comma(text)
        self.grouped = self.comma and groups_by_comma(text)

    def candidates(self) -> Iterator[Statement]:
        """Statements from the one that counts most, then guesses, then remarks."""
        found = statements(self.text)
        if self.kind not in ("auto", "expression", "text"):
            found = [each for each in found if each.rule != "boxes"]
        yield from (each for each in reversed(found) if each.rank >= LABELLED)
        yield from self._guesses()
        yield from (each for each in reversed(found) if each.rank == REMARKED)

    def read(self, statement: Statement) -> str | None:
        """The answer in a statement; empty if it says that there is none."""
        text = _LEAD.sub("", statement.text, count=1)
        if self.kind == "number":
            return self._number(text)
        if self.kind == "choice":
            return read_choice(text, digits=statement.rank > LABELLED)
        if self.kind == "boolean":
            return read_boolean(text)
        if self.kind == "auto":
            return self._auto(text, exact=statement.exact)
        if self.kind == "date":
            return next(find_dates(text, day_first=self.comma), None) or _first_sentence(text) or None
        if self.kind == "expression":
            return (text if statement.exact else read_expression(text)) or None
        return (_unwrapped(text) if statement.exact else _first_sentence(text)) or None

    def _number(self, text: str) -> str | None:
        if (UNKNOWN.match(text) and not GOES_ON.search(text)) or _RANGE.fullmatch(text):
            return _NOTHING
        for sentence in SENTENCE_END.split(text):
            number = find_number(sentence, comma=self.comma, groups_by_comma=self.grouped)
            if number is not None:
                percent = re.search(r"\d\s?\\?%", sentence) is not None and "=" not in sentence
                return write_number(number) + (
                    "%" if percent and len(list(numbers_in(clean(sentence)))) == 1 else ""
                )
        return _NOTHING if REFUSAL.search(text) else None

    def _whole(self, text: str) -> str | None:
        number = whole_number(text, comma=self.comma, groups_by_comma=self.grouped)
        return None if number is None else write_number(number)

    def _auto(self, text: str, *, exact: bool = False) -> str:
        """The number that a candidate is, starts with, equates to or states; else its first sentence."""
        sentence = text if exact else _first_sentence(text)
        if not exact and UNKNOWN.match(text) and not GOES_ON.search(text):
            return _NOTHING
        if (number := self._whole(sentence)) is not None:
            return number
        if formula := _formula(text if not exact else sentence):
            return formula
        if exact and _is_structure(sentence):
            return sentence
        if label := _BECAUSE.match(sentence):
            return label[1]
        bare = " ".join(clean(sentence).split()).strip(" .")
        if ratio := _RATIO.fullmatch(bare):
            return f"{ratio[1]}:{ratio[2]}" if ratio[0].count(":") <= 1 else bare
        if (
            _COMPOUND.fullmatch(bare)
            or _LIST.fullmatch(bare)
            or (exact and re.search(r"\d[,;]|^[(\[\\{]", bare))
        ):
            return sentence
        sums = re.search(r"=|\bequals?\b|等于", sentence) is not None
        if sums and _EQUATIONS.match(sentence):
            return sentence
        if sums or self._starts_with_number(sentence) or _says_one_number(sentence):
            number = self._find(sentence)
        return number if number is not None else _unwrapped(sentence)

    def _find(self, text: str) -> str | None:
        number = find_number(text, comma=self.comma, groups_by_comma=self.grouped)
        return None if number is None else write_number(number)

    def _starts_with_number(self, sentence: str) -> bool:
        """Whether a number comes first that is not part of a date, ratio or range."""
        cleaned = decimal_points(clean(sentence), self.comma, self.grouped).lstrip(" =≈:")
        match = NUMBER.match(cleaned)
        return (
            match is not None and re.match(r"\s?[-:/]\s?\d|(?:st|nd|rd|th)\b", cleaned[match.end() :]) is None
        )

    # --- guesses: their text is the answer ------------------------------------------------------------------

    def _guesses(self) -> Iterator[Statement]:
        for rule, value in self._guessed():
            if value:
                yield Statement(rule, GUESSED, 0, 0, value)

    def _guessed(self) -> Iterator[tuple[str, str | None]]:
        lines = [line.strip() for line in self.text.split("\n") if line.strip()]
        if not lines or (self.kind != "text" and self._refuses()):
            return
        last, kind = lines[-1], self.kind
        if kind == "choice":
            yield "last choice", guess_choice(self.text)
        elif kind == "boolean":
            yield "yes or no", guess_boolean(self.text)
        elif kind == "number" or (kind == "auto" and not (len(lines) == 1 and len(last) <= SHORT_LINE)):
            yield "bold", self._bold()
            yield "conclusion", self._conclusion(last)
            yield "last number", self._last_number(lines)
        elif kind == "date":
            yield "last date", next(iter(deque(find_dates(self.text, day_first=self.comma), maxlen=1)), None)
        elif kind == "expression":
            formulas = deque(_MATH.finditer(self.text), maxlen=1)
            yield "last formula", _inside(formulas[0]) if formulas else None
        if kind == "text":
            yield "bold", self._bold_words()
        if kind in ("auto", "date", "expression", "text") and len(last) <= SHORT_LINE:
            yield "last line", self._last_line(last, one_line=len(lines) == 1)

    def _refuses(self) -> bool:
        """Whether the text declines to answer in its first or last sentence, or ends undecided."""
        sentences = [each for each in SENTENCE_END.split(self.text) if each.strip()]
        for sentence in (*sentences[:2], *sentences[-1:]):
            declined = DECLINED.search(sentence)
            if declined and not (GOES_ON.search(sentence, declined.end()) and re.search(r"\d", sentence)):
                return True
        undecided = UNDECIDED.search(sentences[-1]) if sentences else None
        return (
            undecided is not None
            and self.kind in ("number", "auto", "date")
            and not GOES_ON.search(sentences[-1], undecided.end())
            and re.search(r"\d", sentences[-1][: undecided.start()]) is None
        )

    def _bold_words(self) -> str | None:
        """The only bold words of the last line, if there are others: "The capital is **Paris**."."""
        line = next((line for line in reversed(self.raw.split("\n")) if line.strip()), "")
        bold = list(_BOLD.finditer(line[-1000:]))
        words = (bold[0][1] or bold[0][2]).strip() if len(bold) == 1 else ""
        return (
            words
            if words and not words.endswith(":") and len(line) > bold[0].end() - bold[0].start() + 6
            else None
        )

    def _last_line(self, last: str, *, one_line: bool) -> str:
        if self.kind == "auto" and one_line:
            return self._auto(last)
        return read_expression(last) if self.kind == "expression" else _first_sentence(last)

    def _bold(self) -> str | None:
        """A number in bold in the last paragraph, if it is the only one there."""
        lines = [line for line in self.raw.split("\n") if line.strip()]
        bold = [(m[1] or m[2]).strip() for m in _BOLD.finditer(lines[-1][-1000:])] if lines else []
        values = list(
            dict.fromkeys(value for each in bold if (value := self._whole(each.rstrip(".:"))) is not None)
        )
        return values[0] if len(values) == 1 and len(lines[-1]) > len(bold[0]) + 6 else None

    def _conclusion(self, last: str) -> str | None:
        """What the last sentence comes to: "Thus there are 92 - 35 = 57 seats after the 2nd stop."."""
        sentences = [each for each in SENTENCE_END.split(last[-1000:]) if each.strip()]
        number = (
            concluded_number(sentences[-1], comma=self.comma, groups_by_comma=self.grouped)
            if sentences
            else None
        )
        return None if number is None else write_number(number)

    def _last_number(self, lines: list[str]) -> str | None:
        """The right side of the last line's equation, else the last number of the text."""
        sentences = [each for each in SENTENCE_END.split(lines[-1][-1000:]) if each.strip()]
        if sentences and REFUSAL.search(sentences[-1]) and not re.search(r"\d", sentences[-1]):
            return None
        text = decimal_points(clean("\n".join(lines)), self.comma, self.grouped)
        last_number = deque(numbers_in(text), maxlen=1)
        if last_number:
            return write_number(last_number[0])
        return self._find(lines[-1]) if self.kind == "number" else None


def _is_structure(text: str) -> bool:
    """Whether a boxed text is a list, a set or equations of numbers and formulas, not a number with words."""
    node = parse(text)
    if isinstance(node, Equation):
        return whole_number(text.rpartition("=")[2]) is None and re.search(r"\d", text) is not None
    if isinstance(node, Collection):
        return all(
            not isinstance(item, Value) or whole_number(item.text) is not None or is_symbolic(item.text)
            for item in node.items
        )
    return not isinstance(node, Value)


def _formula(text: str) -> str | None:
    """The expression that a candidate is; None for words and for `variable = value`."""
    expression = read_expression(text)
    *lefts, right = _EQUALS_SIGN.split(expression)
    left = "=".join(lefts)
    one_variable = "," not in left or len(set(_VARIABLE.findall(left))) == 1
    several = re.search(r"\b(?:or|and)\b|\\(?:text\{\s?(?:or|and)|pm)", left) is not None
    named = is_name(lefts[0] if lefts else "") or (is_name(left.rpartition(",")[2]) and "," in left)
    names = named or not set("xyz") & {
        name.lower() for name in _VARIABLE.findall(left)
    }  # a + b = 7, not x + y = 7
    ends_in_value = left and names and one_variable and not several and whole_number(right) is not None
    is_formula = is_symbolic(expression) or is_symbolic(split_unit(expression)[0])
    return expression if is_formula and not ends_in_value else None


def read_expression(text: str) -> str:
    """The formula at the start of a candidate, or its first sentence, without math delimiters.

    Several formulas joined by "and", "or" or commas are one expression; the only formula of a sentence is
    the expression that it states.
    """
    text = text.strip()
    matches = list(_MATH.finditer(text[:1000]))
    sentence = _first_sentence(text)
    matches = [match for match in matches if match.start() < max(len(sentence), 1) or match is matches[0]]
    if matches and matches[0].start() == 0:
        end, parts = matches[0].end(), [_inside(matches[0])]
        for match in matches[1:]:
            between = text[end : match.start()]
            if not between.strip() or not _SEPARATOR.fullmatch(between):
                break
            parts.append(_inside(match))
            end = match.end()
        return parts[0] if len(parts) == 1 else ", ".join(parts)
    if len(matches) == 1 and matches[0].end() <= len(sentence) + 2 and is_symbolic(_inside(matches[0])):
        return _inside(matches[0])
    sentence = sentence.strip("$ ").removeprefix("\\(").removesuffix("\\)")
    return _LEAD.sub("", sentence).strip()


def _inside(formula: re.Match[str]) -> str:
    return next(group for group in formula.groups() if group).strip().rstrip(".,;").strip()


def _says_one_number(sentence: str) -> bool:
    """Whether a sentence ("Rosa is 22 years old", "Total: $22") has one number, unlike "Apollo 11"."""
    is_sentence = ":" in sentence or len(sentence.split()) > 2
    return is_sentence and len(list(numbers_in(clean(sentence)))) == 1


def _unwrapped(text: str) -> str:
    r"""Text without `\text{}` around words, quotes and dollars."""
    for _ in range(2):
        text = LATEX_TEXT.sub(r"\1", text)
    return text.strip().strip("\"'`$“”").rstrip(".").strip()


def _first_sentence(text: str) -> str:
    """The first sentence without its period and quotes. A short word before a period is an abbreviation."""
    return _unwrapped(SENTENCE_END.split(_unwrap_once(text.strip()), maxsplit=1)[0].strip(" \"'`"))


def _unwrap_once(text: str) -> str:
    return LATEX_TEXT.sub(r"\1", text)
