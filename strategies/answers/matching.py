"""Two structures compared part by part: lists item by item, equations by their sides, values by their kind.

What has an order is compared in order, and brackets are part of an interval. Numbers are compared by
`quantities`, formulas by `expressions`, words as text. Leaves out what kinds of answers there are
(`comparing`) and splitting a text (`structures`).
"""

from __future__ import annotations

import re
import time
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction

from viaticum.strategies.answers import expressions, structures
from viaticum.strategies.answers.expressions import is_symbolic, same_expression, to_latex
from viaticum.strategies.answers.number_words import read_words
from viaticum.strategies.answers.numbers import LATEX_TEXT, whole_number
from viaticum.strategies.answers.quantities import may_be_same, same_quantity
from viaticum.strategies.answers.structures import Collection, Equation, Matrix, Node, Union, Value
from viaticum.strategies.answers.units import Unit, split_unit
from viaticum.types import AnswerKind

_ARTICLE = re.compile(r"^(?:the|an|a)\s(?=\S)")
_QUOTES = str.maketrans(
    {"’": "'", "‘": "'", "“": '"', "”": '"', "‐": "-", "‑": "-", "–": "-", "—": "-", "−": "-"}
)
_BASED = re.compile(r"([0-9A-Za-z.]{1,200})\s?_\s?\{?\s?(\d{1,2}|[a-z]{3,11})\s?\}?")
_BASES = {
    "two": "2",
    "three": "3",
    "four": "4",
    "five": "5",
    "six": "6",
    "seven": "7",
    "eight": "8",
    "nine": "9",
    "ten": "10",
    "twelve": "12",
    "sixteen": "16",
}
_RATIO = re.compile(r"[\s\w.\\^{}]*(?<=[\w}])\s?(?::|\\colon)\s?[\w\\].*", re.DOTALL)
_WORDS_AFTER = re.compile(r"(?<=[\s\d})!])\s?(?!(?:and|or)\b)[A-Za-z]{3,20}(?:[\s-][A-Za-z]{2,20}){0,3}\.?$")
_LETTERS = re.compile(r"[A-Za-z]")
_SAME_WORDS = {
    "inf": r"\infty",
    "infinity": r"\infty",
    "oo": r"\infty",
    "+oo": r"\infty",
    "positive infinity": r"\infty",
    "-inf": r"-\infty",
    "-infinity": r"-\infty",
    "-oo": r"-\infty",
    "negative infinity": r"-\infty",
    "dne": "does not exist",
    "ℕ": r"\mathbb{N}",
    "ℤ": r"\mathbb{Z}",
}
_TRIGONOMETRIC = re.compile(r"(?:sin|cos|tan|cot|sec|csc)(?![a-z])")
_FACTORIAL = re.compile(r"(?:[\d)}]|(?<![A-Za-z])[A-Za-z])\s?!")
_FEW_WORDS = re.compile(r"[^\W\d_]{2,20}(?:[\s-][^\W\d_]{2,20}){0,3}")
_COMMAND = re.compile(r"\\[A-Za-z]+")
_VARIABLE = re.compile(r"\\[A-Za-z]+|[A-Z]")


def plain_text(value: str) -> str:
    """Text for comparison: one case, single spaces, no outer punctuation, no leading article."""
    text = LATEX_TEXT.sub(r"\1", value).translate(_QUOTES)
    text = unicodedata.normalize("NFKC", text).casefold()
    text = " ".join(text.split()).strip(" .,;:!?\"'`()[]{}$*")
    return _ARTICLE.sub("", text) or " ".join(value.split())


@dataclass
class Comparison:
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
        if is_name(equation.left):
            return self.same(equation.right, other)
        if isinstance(equation.right, Value) and is_name(equation.right.text):  # 2x + 1 = y
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
        if kinds <= {"", "[]"} and "" in kinds and not _goes_on(a) and _has_names(a) == _has_names(b):
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
            index = next((index for index, other in enumerate(rest) if self.same(item, other)), None)
            if index is None:
                return False
            del rest[index]
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
        (a, unit), (b, other) = _split_unit(a, letters=letters), _split_unit(b, letters=letters)
        x, y = (self._number(each) for each in (a, b))
        if x is not None and y is not None:
            return same_quantity(x, unit, y, other, convert=self.kind == "expression")
        if not may_be_same(unit, other):
            return False
        a, b = (each if number is not None else _without_words(each) for each, number in ((a, x), (b, y)))
        return (
            _compact(a) == _compact(b)
            or (plain_text(a) == plain_text(b) != "" and _is_words(a) and _is_words(b))
            or self._same_formula(a, b)
        )

    def _number(self, text: str) -> Fraction | None:
        """The number that a text is, in digits or, in "auto", in words."""
        if _FACTORIAL.search(text):
            return None
        number = whole_number(text, units=self.kind == "auto")
        if number is None and self.kind == "auto" and _FEW_WORDS.fullmatch(text):
            return read_words(text)
        return number

    def _same_formula(self, a: str, b: str) -> bool:
        """Whether two formulas are equal; in "auto", one is symbolic and the other symbolic or a number."""
        a, b = _in_one_case(_plain_braces(a), _plain_braces(b))
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


def is_name(text: str) -> bool:
    """Whether the left side of an equation names the right one: `x`, `f(x)`, "Area", not `2x` or `xy`."""
    if structures.is_variable(text):
        return True
    return re.search(r"\d\s?[A-Za-z]|[-+*/^](?!\{?-1)|\\cdot|\\times|\\sqrt|^[xyz]{2,3}$", text) is None and (
        _LETTERS.search(text) is not None
    )


def _may_be_same_name(a: str, b: str) -> bool:
    x, y = ("".join(each.split()) for each in (a, b))
    if x == y:
        return True
    if not (is_name(a) and is_name(b)):
        return False
    short = [structures.is_variable(each) for each in (x, y)]
    if not all(short):  # "Area" and "A"
        return any(re.search(r"[A-Za-z]{3}", each) and "\\" not in each for each in (x, y))
    return (x[0] == y[0] and "(" in x + y and "_" not in x + y) or {x[:2], y[:2]} in (
        {"y", "f("},
        {"f(", "y("},
    )


def _has_names(node: Collection) -> bool:
    """Whether items are equations of different names: x = 4, y = 7 is (4, 7), not 7, 4."""
    return any(isinstance(item, Equation) for item in node.items)


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


def _split_unit(text: str, *, letters: bool) -> tuple[str, Unit | None]:
    r"""A value and its unit; in `\sin 30^\circ` the degrees are of the angle."""
    return (text, None) if _TRIGONOMETRIC.search(text) else split_unit(text, letters=letters)


def _without_words(text: str) -> str:
    """A formula without the words after it: `2\\pi square units`."""
    match = _WORDS_AFTER.search(text)
    value = text[: match.start()].strip() if match else ""
    return value if value and is_symbolic(value) and not is_symbolic(text) else text


def _is_words(text: str) -> bool:
    return not is_symbolic(text) and _FACTORIAL.search(text) is None


def _compact(text: str) -> str:
    """A formula's text without spaces that mean nothing."""
    return re.sub(r"\s+(?![A-Za-z])|(?<![A-Za-z])\s+", "", to_latex(_plain_braces(text)))


def _in_one_case(a: str, b: str) -> tuple[str, str]:
    """Two formulas with their variables in small letters, unless one has both `M` and `m`."""
    for text in (a, b):
        letters = set(_COMMAND.sub("", text))
        if any(letter.isupper() and letter.lower() in letters for letter in letters):
            return a, b
    a, b = (
        _VARIABLE.sub(lambda match: match[0].lower() if len(match[0]) == 1 else match[0], each)
        for each in (a, b)
    )
    return a, b


def _plain_braces(text: str) -> str:
    return text.replace("⦃", r"\{").replace("⦄", r"\}")


def _latex_of(matrix: Matrix) -> str:
    rows = (" & ".join(cell.text if isinstance(cell, Value) else "?" for cell in row) for row in matrix.rows)
    return r"\begin{pmatrix}" + r" \\ ".join(rows) + r"\end{pmatrix}"
