"""When two answers are equal, and the canonical form of an answer.

Each kind has its rule (docs/reference/strategies.md). "auto" and "expression" compare the structures of two
answers (`structures`) part by part: numbers exactly, units by `units`, formulas by `expressions`, words as
text. Leaves out reading answers from text (`reading`).
"""

from __future__ import annotations

import re
import time
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

from viaticum.strategies.answers import expressions, structures
from viaticum.strategies.answers.dates import whole_date
from viaticum.strategies.answers.expressions import is_symbolic, same_expression, to_latex
from viaticum.strategies.answers.numbers import LATEX_TEXT, clean, find_number, whole_number, write_number
from viaticum.strategies.answers.structures import Collection, Equation, Matrix, Node, Union, Value
from viaticum.strategies.answers.units import Unit, split_unit
from viaticum.types import AnswerKind

VALUE_CHARACTERS = 300  # longest answer with a structure; longer ones are compared as text
TEXT_CHARACTERS = 20_000  # only the beginning of a text is compared
TOLERANCE = Fraction(1, 10**6)  # relative, between a decimal and what it is rounded from
FLOAT_ERROR = Fraction(1, 10**12)  # relative, between two decimals
CHOICE = re.compile(r"^\W{0,4}(?:option|choice|answer)?\s?\W{0,3}([A-Ja-j])(?:\W|$)")
BOOLEAN = re.compile(r"\b(yes|no|true|false)\b", re.IGNORECASE)
YES_NO = {"yes": "yes", "true": "yes", "no": "no", "false": "no"}
_LETTER = re.compile(
    r"^\W{0,4}(?:(?:option|choice|answer)(?![a-z]))?[\s:]{0,3}[(\[]?\s?([A-Z]|\d{1,2})\s?(?:[)\].:]|\W{0,4}$)",
    re.IGNORECASE,
)
_LABELLED = re.compile(r"^\(([A-Za-z])\)\s?(?=\S)|^([A-Z])[).:]\s(?=\S)")
_ARTICLE = re.compile(r"^(?:the|an|a)\s(?=\S)")
_QUOTES = str.maketrans(
    {"’": "'", "‘": "'", "“": '"', "”": '"', "‐": "-", "‑": "-", "–": "-", "—": "-", "−": "-"}
)
_PLAIN_NUMBER = re.compile(r"[-+]?\d{1,1000}(?:\.\d{1,300})?")
_BASED = re.compile(r"([0-9A-Za-z.]{1,200})\s?_\s?\{?\s?(\d{1,2}|[a-z]{3,11})\s?\}?")
_BASES = {"two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7", "eight": "8", "nine": "9",
          "ten": "10", "twelve": "12", "sixteen": "16"}  # fmt: skip
_RATIO = re.compile(r"[\s\w.\\^{}]*(?<=[\w}])\s?(?::|\\colon)\s?[\w\\].*", re.DOTALL)
_WORDS_AFTER = re.compile(r"(?<=[\s\d})!])\s?(?!(?:and|or)\b)[A-Za-z]{3,20}(?:[\s-][A-Za-z]{2,20}){0,3}\.?$")
_LETTERS = re.compile(r"[A-Za-z]")
_TEMPERATURES = frozenset({"celsius", "fahrenheit", "degree"})
_SAME_WORDS = {
    "inf": r"\infty", "infinity": r"\infty", "oo": r"\infty", "+oo": r"\infty", "positive infinity": r"\infty",
    "-inf": r"-\infty", "-infinity": r"-\infty", "-oo": r"-\infty", "negative infinity": r"-\infty",
    "dne": "does not exist", "all real numbers": r"\mathbb{R}", "all reals": r"\mathbb{R}", "ℝ": r"\mathbb{R}",
    "ℕ": r"\mathbb{N}", "ℤ": r"\mathbb{Z}",
}  # fmt: skip


def normalise(value: str, kind: AnswerKind) -> str:
    """The canonical form of an answer.

    Numbers without separators, units and trailing zeros, choices as one capital letter, booleans as yes or
    no, dates as YYYY-MM-DD, expressions in LaTeX without math delimiters, other text in lower case without
    outer punctuation.
    """
    value = value[:TEXT_CHARACTERS] if kind == "text" else value[:VALUE_CHARACTERS]
    number = _number_of(value, kind)
    if number is not None:
        return write_number(number)
    if kind in ("date", "auto") and (day := whole_date(value)):
        return day
    if kind == "expression":
        return to_latex(value) or plain_text(value)
    if kind == "choice" and (match := _LETTER.search(clean(value).strip())):
        return match[1].upper()
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
        return _same_number(Fraction(a), Fraction(b))
    if len(a) > VALUE_CHARACTERS or len(b) > VALUE_CHARACTERS:
        return (
            plain_text(a[:TEXT_CHARACTERS]) == plain_text(b[:TEXT_CHARACTERS])
            and len(a) + len(b) < TEXT_CHARACTERS
        )
    if kind == "number":
        return _same_found_number(a, b)
    if kind == "auto" and (verdict := _same_date_or_word(a, b)) is not None:
        return verdict
    return _Comparison(kind).same(structures.parse(a), structures.parse(b))


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


def plain_text(value: str) -> str:
    """Text for comparison: one case, single spaces, no outer punctuation, no leading article."""
    text = LATEX_TEXT.sub(r"\1", value).translate(_QUOTES)
    text = unicodedata.normalize("NFKC", text).casefold()
    text = " ".join(text.split()).strip(" .,;:!?\"'`()[]{}$*")
    return _ARTICLE.sub("", text) or " ".join(value.split())


def _number_of(value: str, kind: AnswerKind) -> Fraction | None:
    """The number that an answer of that kind represents."""
    if kind == "number":
        return find_number(value)
    return whole_number(value, units=kind == "auto") if kind in ("auto", "expression") else None


def _same_number(x: Fraction, y: Fraction) -> bool:
    """Exactly equal, or one is a decimal to which the other is rounded or cut off.

    0.333333 is 1/3, and 0.30000000000000004 is 0.3; 123456.7 is not 123456.8, and no integer is another.
    """
    if x == y:
        return True
    places = [decimals for each in (x, y) if (decimals := _decimals(each)) is not None]
    if not any(places):
        return False
    error, size = abs(x - y), max(abs(x), abs(y))
    return error <= FLOAT_ERROR * size or (
        error <= TOLERANCE * size and error < Fraction(1, 10 ** max(2, min(places)))
    )


def _decimals(number: Fraction) -> int | None:
    """How many decimal places write a number exactly; None for 1/3."""
    rest, twos, fives = number.denominator, 0, 0
    while rest % 2 == 0:
        rest, twos = rest // 2, twos + 1
    while rest % 5 == 0:
        rest, fives = rest // 5, fives + 1
    return max(twos, fives) if rest == 1 else None


def _same_found_number(a: str, b: str) -> bool:
    """Whether the numbers in two texts are equal, with their units where both have one."""
    x, y = find_number(a), find_number(b)
    if x is None or y is None:
        return x is y and plain_text(a) == plain_text(b)
    return _same_quantity(x, split_unit(a.strip())[1], y, split_unit(b.strip())[1], convert=True)


def _same_quantity(x: Fraction, unit: Unit | None, y: Fraction, other: Unit | None, *, convert: bool) -> bool:
    """Whether two numbers with units are equal; `convert` takes 50% for 0.5 too, and 5 km for 5000 m."""
    if convert and unit != other:
        factors = [each.factor if each and each.is_percent else Fraction(1) for each in (unit, other)]
        if _same_number(x * factors[0], y * factors[1]):
            return True
        if unit and other and unit.exponents == other.exponents:
            return _same_number(x * unit.factor, y * other.factor)
    return _same_number(x, y) and _may_be_same(unit, other)


def _may_be_same(unit: Unit | None, other: Unit | None) -> bool:
    if unit is None or other is None or unit == other:
        return True
    bases = [{base for base, _ in each.exponents} for each in (unit, other)]
    if any("unit" in each for each in bases):
        return True
    return {"degree"} in bases and all(each <= _TEMPERATURES for each in bases)


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


@dataclass
class _Comparison:
    """One comparison of two structures, with one time limit for all its formulas."""

    kind: AnswerKind
    deadline: float = field(default_factory=lambda: time.monotonic() + expressions.SECONDS)

    def same(self, a: Node, b: Node) -> bool:
        if a == b:
            return True
        if isinstance(a, Equation) or isinstance(b, Equation):
            return self._same_equations(a, b)
        a, b = _without_names(a), _without_names(b)
        if isinstance(a, Matrix) or isinstance(b, Matrix):
            return self._same_matrices(a, b)
        if isinstance(a, Union) and isinstance(b, Union):
            return self._same_in_any_order(a.parts, b.parts)
        if isinstance(a, Collection) and isinstance(b, Collection):
            return self._same_collections(a, b)
        return isinstance(a, Value) and isinstance(b, Value) and self._same_values(a.text, b.text)

    def _same_equations(self, a: Node, b: Node) -> bool:
        """Equations of one name by their right sides, others up to a factor; a name may be left out."""
        if isinstance(a, Equation) and isinstance(b, Equation):
            if _may_be_same_name(a.left, b.left) and self.same(a.right, b.right):
                return True
            if isinstance(a.right, Value) and isinstance(b.right, Value):
                return self._same_formula(a.text, b.text)
            return False
        equation, other = (a, b) if isinstance(a, Equation) else (b, a)
        assert isinstance(equation, Equation)
        if _is_name(equation.left):
            return self.same(equation.right, other)
        if isinstance(equation.right, Value) and _is_name(equation.right.text):  # 2x + 1 = y
            return self.same(structures.parse(equation.left), other)
        return not _LETTERS.search(equation.left) and self.same(equation.right, other)

    def _same_matrices(self, a: Node, b: Node) -> bool:
        """Cell by cell; a row or column equals the tuple of its cells, a list of lists its matrix."""
        if isinstance(a, Matrix) and isinstance(b, Matrix):
            return len(a.rows) == len(b.rows) and all(map(self._same_in_order, a.rows, b.rows))
        matrix, other = (a, b) if isinstance(a, Matrix) else (b, a)
        assert isinstance(matrix, Matrix)
        cells = [cell for row in matrix.rows for cell in row]
        if isinstance(other, Collection) and other.brackets in ("()", "[]", ""):
            if 1 in (len(matrix.rows), len(matrix.rows[0])):
                return self._same_in_order(cells, other.items)
            rows = [row.items for row in other.items if isinstance(row, Collection)]
            return len(rows) == len(other.items) == len(matrix.rows) and all(
                map(self._same_in_order, matrix.rows, rows)
            )
        if isinstance(other, Value):
            return (len(cells) == 1 and self.same(cells[0], other)) or self._same_formula(
                _latex_of(matrix), other.text
            )
        return False

    def _same_collections(self, a: Collection, b: Collection) -> bool:
        """In order for tuples and intervals, in any order for sets and lists without brackets."""
        kinds = {a.brackets, b.brackets}
        if "{}" in kinds and kinds != {"{}"}:
            longer = len(a.items) != 2 and kinds in ({"{}", ""}, {"{}", "[]"})
            if kinds != {"{}", ""} and not longer:
                return False
            return self._same_in_any_order(a.items, b.items)
        if kinds == {"{}"}:
            return self._contains(a.items, b.items) and self._contains(b.items, a.items)
        if kinds <= {"", "[]"} and "" in kinds and not _goes_on(a):
            return self._same_in_any_order(a.items, b.items)
        if len(kinds) > 1 and ((len(a.items) == 2 and "" not in kinds) or kinds & {"[)", "(]"}):
            return False  # one bracket is part of an interval
        return self._same_in_order(a.items, b.items)

    def _same_in_order(self, a: Sequence[Node], b: Sequence[Node]) -> bool:
        return len(a) == len(b) and all(map(self.same, a, b))

    def _same_in_any_order(self, a: Sequence[Node], b: Sequence[Node]) -> bool:
        if len(a) != len(b):
            return False
        rest = list(b)
        for item in a:
            place = next((place for place, other in enumerate(rest) if self.same(item, other)), None)
            if place is None:
                return False
            del rest[place]
        return True

    def _contains(self, a: Sequence[Node], b: Sequence[Node]) -> bool:
        return all(any(self.same(item, other) for other in a) for item in b)

    def _same_values(self, a: str, b: str) -> bool:
        """Two values: numbers, digits in a base, ratios, formulas with units, or words."""
        a, b = (_SAME_WORDS.get(each.casefold(), each) for each in (a, b))
        if _compact(a) == _compact(b):
            return True
        if (verdict := _same_in_base(a, b)) is not None:
            return verdict
        if _RATIO.fullmatch(a) or _RATIO.fullmatch(b):
            return plain_text(a).replace(" ", "") == plain_text(b).replace(" ", "")
        letters = self.kind == "auto"
        (a, unit), (b, other) = split_unit(a, letters=letters), split_unit(b, letters=letters)
        x, y = whole_number(a, units=letters), whole_number(b, units=letters)
        if x is not None and y is not None:
            return _same_quantity(x, unit, y, other, convert=self.kind == "expression")
        if not _may_be_same(unit, other):
            return False
        a, b = (each if number is not None else _without_words(each) for each, number in ((a, x), (b, y)))
        return (
            _compact(a) == _compact(b)
            or (plain_text(a) == plain_text(b) != "" and _is_words(a))
            or self._same_formula(a, b)
        )

    def _same_formula(self, a: str, b: str) -> bool:
        """Whether two formulas are equal; in "auto", one is symbolic and the other symbolic or a number."""
        a, b = _plain_braces(a), _plain_braces(b)
        if self.kind == "auto":
            formulas = [is_symbolic(each) or whole_number(each) is not None for each in (a, b)]
            if not all(formulas):
                return False
        return time.monotonic() < self.deadline and same_expression(a, b)


def _without_names(node: Node) -> Node:
    """A list `x = 3 or x = -2` as the list of its values; a list of equations of several names as it is."""
    if not isinstance(node, Collection) or node.brackets or not node.items:
        return node
    first = node.items[0]
    if not isinstance(first, Equation):
        return node
    if all(
        (isinstance(item, Equation) and item.left == first.left) or isinstance(item, Value)
        for item in node.items
    ):
        return Collection(
            "", tuple(item.right if isinstance(item, Equation) else item for item in node.items)
        )
    return node


def _is_name(text: str) -> bool:
    """Whether the left side of an equation only names the right one: `x`, `f(x)`, "Area", not `2x` or `xy`."""
    if structures.is_variable(text):
        return True
    return re.search(r"\d\s?[A-Za-z]|[-+*/^](?!\{?-1)|\\cdot|\\times|\\sqrt|^[xyz]{2,3}$", text) is None and (
        _LETTERS.search(text) is not None
    )


def _may_be_same_name(a: str, b: str) -> bool:
    x, y = ("".join(each.split()) for each in (a, b))
    if x == y:
        return True
    if not (_is_name(a) and _is_name(b)):
        return False
    short = [structures.is_variable(each) for each in (x, y)]
    if not all(short):  # "Area" and "A"
        return any(re.search(r"[A-Za-z]{3}", each) and "\\" not in each for each in (x, y))
    return (x[0] == y[0] and "(" in x + y and "_" not in x + y) or {x[:2], y[:2]} in (
        {"y", "f("},
        {"f(", "y("},
    )


def _goes_on(node: Collection) -> bool:
    r"""Whether a list has `\ldots`, so that its order is part of it."""
    return any(isinstance(item, Value) and r"\ldots" in item.text for item in node.items)


def _same_in_base(a: str, b: str) -> bool | None:
    """The verdict on digits in a base, such as `1254_6`; None if neither is. A missing base is forgiven."""
    matches = [_BASED.fullmatch(each.strip()) for each in (a, b)]
    bases = [_BASES.get(match[2], match[2]) if match and match[1][0].isdigit() else None for match in matches]
    if not any(bases):
        return None
    digits = [
        match[1] if match and base else each.strip()
        for match, base, each in zip(matches, bases, (a, b), strict=True)
    ]
    return digits[0].lower() == digits[1].lower() and (None in bases or bases[0] == bases[1])


def _without_words(text: str) -> str:
    """A formula without the words after it: `2\\pi square units`."""
    match = _WORDS_AFTER.search(text)
    value = text[: match.start()].strip() if match else ""
    return value if value and is_symbolic(value) and not is_symbolic(text) else text


def _is_words(text: str) -> bool:
    return not is_symbolic(text)


def _compact(text: str) -> str:
    """A formula's text without spaces that mean nothing."""
    return re.sub(r"\s+(?![A-Za-z])|(?<![A-Za-z])\s+", "", to_latex(_plain_braces(text)))


def _plain_braces(text: str) -> str:
    return text.replace("⦃", r"\{").replace("⦄", r"\}")


def _latex_of(matrix: Matrix) -> str:
    rows = (" & ".join(cell.text if isinstance(cell, Value) else "?" for cell in row) for row in matrix.rows)
    return r"\begin{pmatrix}" + r" \\ ".join(rows) + r"\end{pmatrix}"
