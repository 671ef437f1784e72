r"""What an answer is made of: one value, a list, a set, an interval, a union, a matrix or an equation.

`parse` splits a text at its brackets, commas and relations, in linear time, and leaves formulas as they are:
`x \in [-2, 7]` becomes an equation of `x` and an interval, `\pm 3` the list of 3 and -3, `x=3 or x=-2` a list
of equations. Leaves out when two of them are equal (`comparing`) and what a formula means (`expressions`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TypeAlias

from viaticum.strategies.answers.expressions import translate_symbols

DEPTH = 6  # of nested brackets; what is deeper stays one value
ITEMS = 64  # longest list


@dataclass(frozen=True)
class Value:
    """A number, a formula or words."""

    text: str


@dataclass(frozen=True)
class Collection:
    """Items between brackets: `()`, `[]`, `[)`, `(]`, `{}` for a set, none for a list without brackets."""

    brackets: str
    items: tuple[Node, ...]


@dataclass(frozen=True)
class Union:
    """A union of intervals and sets."""

    parts: tuple[Node, ...]


@dataclass(frozen=True)
class Matrix:
    """Rows of equal length."""

    rows: tuple[tuple[Node, ...], ...]


@dataclass(frozen=True)
class Equation:
    r"""What is on both sides of `=` or `\in`; an inequality in one variable is `\in` an interval."""

    left: str
    right: Node
    text: str


Node: TypeAlias = Value | Collection | Union | Matrix | Equation

_COMMAND = re.compile(
    r"\\\\|\\(?P<space>[,;:! ]|q?quad(?![A-Za-z]))"
    r"|\\(?P<nothing>[()\[\]]|(?:left|right|[bB]igg?[lr]?|displaystyle|limits)(?![A-Za-z])\.?)"
    r"|\\(?P<open>\{|lbrace(?![A-Za-z]))|\\(?P<close>\}|rbrace(?![A-Za-z]))"
    r"|\\(?P<angle>[lr]angle)(?![A-Za-z])|\\[dtc]frac(?![A-Za-z])"
    r"|\\(?P<relation>leqslant|leq|geqslant|geq|lt|gt|neq)(?![A-Za-z])"
)
_RELATIONS = {"leqslant": r"\le ", "leq": r"\le ", "geqslant": r"\ge ", "geq": r"\ge ", "lt": "<", "gt": ">"}
_TEXT = re.compile(
    r"\\(?:text|mathrm|mbox|textrm|textup|textbf|mathbf|textit|mathit|boldsymbol|operatorname\*?|rm|bf)"
    r"\s?\{([^{}]{0,200})\}"
)
_BOX = re.compile(r"^\\(?:boxed|fbox)\s?\{(.*)\}$", re.DOTALL)
_REMARK = re.compile(r"^([^()]{0,60}[^()\s])\s\((?=[^()]{0,20}[a-z]{2,20}[.,]?\s)[^()\\]{3,80}\)\.?$")
_THOUSANDS = re.compile(r"(?<=\d)(?:\\[,!;: ]|\{,\}|,\\!|\\,\\!)(?=\d{3}(?!\d))")
_DOLLAR = re.compile(r"(?<!\\)\$")
_NUMPY = re.compile(
    r"\b(?:np|numpy|sympy|sp)\.(?:u?int|float|Float|Integer|Rational)\d{0,3}\(([^()]{1,60})\)"
)
_DOTS = re.compile(r"\\(?:[lc]?dots|dotsc)(?![A-Za-z])|\.\.\.|…")
_BARE_COLLECTION = re.compile(
    r"^(?:np\.)?(?:array|Matrix|FiniteSet|set|frozenset|tuple|list)\((.*)\)$", re.DOTALL
)

_GROUPED = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?!\d)(?!,\d)")
_SEPARATOR = re.compile(
    r"\s*(?:[,;、，；]\s*(?:and|or)\b|[,;、，；]|(?<=\s)(?:and|or|&)(?=\s)|\\(?:lor|land|vee|wedge)(?![a-z])|或)\s*"
)
_UNION = re.compile(r"\s*(?:\\cup(?![a-z])|(?<=[)\]⦄])\s?(?:U|∪|or)\s?(?=[(\[⦃]))\s*")
_MEMBER = re.compile(r"\\in(?![a-z])")
_EQUALS = re.compile(r"(?<![<>!:=\\])={1,2}(?!=)")
_ORDER = re.compile(r"\\le(?![a-z])|\\ge(?![a-z])|<=|>=|<|>")
_CONDITION = re.compile(r"\\mid(?![a-z])|\||:")
_ENVIRONMENT = re.compile(
    r"^\\begin\{([pbBvV]?(?:small)?matrix|array)\}(?:\{[lcr|\s]{0,30}\})?(.*)\\end\{\1\}$", re.DOTALL
)
_TRANSPOSED = re.compile(r"\^\s?\{?\s?(?:T|\\top|\\intercal|\\mathsf\{T\})\s?\}?$")
_VARIABLE = re.compile(r"(?:[A-Za-z]|\\[a-z]{2,8})(?:_\{?\w{1,5}\}?)?(?:\s?\([A-Za-z]\))?")
_ORDINARY_COMMAND = re.compile(r"\\(?:frac|sqrt|pi|infty|cdot|times|log|ln|pm|binom)(?![a-z])|\be\b")
_EMPTY = frozenset(
    {"no solution", "no solutions", "no real solution", "no real solutions", "there are no solutions"}
    | {"empty set", "the empty set", r"\emptyset", r"\varnothing", "∅", "⦃⦄", "{}", "⦃ ⦄", "set()"}
)
_ITEM_SEPARATOR = re.compile(r"\s*[,;、，；]\s*|\s+(?:and|or)\s+")
_REALS = frozenset({r"\mathbb{r}", r"\r", "ℝ", "all real numbers", "all reals", "the real numbers"})
_PLUS_MINUS = re.compile(r"\\pm(?![a-z])|\\mp(?![a-z])")


def parse(text: str) -> Node:
    """The structure of an answer."""
    return _parse(tidy(text), 0)


def tidy(text: str) -> str:
    r"""A text without math delimiters, boxes, `\text{}`, sizes of brackets and spaces within numbers.

    Set brackets `\{` and `\}` become `⦃` and `⦄`, as other braces only group.
    """
    text = translate_symbols(text.strip().strip('`"“”').strip())
    if len(_DOLLAR.findall(text)) % 2 == 0:
        text = _DOLLAR.sub("", text)
    if remark := _REMARK.match(text):
        text = remark[1]
    while (box := _BOX.match(text.strip())) is not None:
        text = box[1]
    text = _TEXT.sub(r" \1 ", _THOUSANDS.sub("", text))
    text = _DOTS.sub(r"\\ldots ", _NUMPY.sub(r"\1", _COMMAND.sub(_simplify, text)))
    return " ".join(text.split()).rstrip(".,;: ").strip()


def is_variable(text: str) -> bool:
    """Whether a text is a variable or a function of one: `x`, `a_1`, `\\theta`, `f(x)`."""
    return _VARIABLE.fullmatch(text.strip()) is not None


def _simplify(match: re.Match[str]) -> str:
    if match["space"] or match["nothing"]:
        return " " if match["space"] else ""
    if match["open"]:
        return "⦃"
    if match["close"]:
        return "⦄"
    if match["angle"]:
        return "(" if match["angle"] == "langle" else ")"
    if match["relation"]:
        return _RELATIONS.get(match["relation"], r"\ne ")
    return match[0] if match[0] == r"\\" else r"\frac"


def _parse(text: str, depth: int) -> Node:
    text = text.strip()
    if depth > DEPTH or not text:
        return Value(text)
    if text.casefold() in _EMPTY:
        return Collection("{}", ())
    if text.casefold() in _REALS:
        return Collection("()", (Value(r"-\infty"), Value(r"\infty")))
    outside = _mask(text)
    for attempt in (_parse_parallel, _parse_list, _parse_member, _parse_union, _parse_equation, _parse_order):
        node = attempt(text, outside, depth)
        if node is not None:
            return node
    return _parse_brackets(text, outside, depth) or _parse_plus_minus(text, depth) or Value(text)


def _mask(text: str, *, grouped: bool = True) -> str:
    """The text with everything inside brackets replaced by NUL, and commas within `grouped` numbers."""
    level, letters = 0, list(text)
    for index, letter in enumerate(text):
        if letter in "([⦃{" or text.startswith(r"\begin", index):
            letters[index] = letter if not level else "\0"
            level += 1
        elif letter in ")]⦄}" or text.startswith(r"\end", index):
            level = max(0, level - 1)
            letters[index] = letter if not level else "\0"
        elif level:
            letters[index] = "\0"
    masked = "".join(letters)
    return _GROUPED.sub(lambda match: match[0].replace(",", "\0"), masked) if grouped else masked


def _split(pattern: re.Pattern[str], text: str, outside: str) -> list[str]:
    """The pieces of a text between the matches of a pattern outside brackets."""
    pieces, start = [], 0
    for match in pattern.finditer(outside):
        pieces.append(text[start : match.start()].strip())
        start = match.end()
    return [*pieces, text[start:].strip()]


def _parse_parallel(text: str, outside: str, depth: int) -> Node | None:
    """`x, y = 1, 2` and `n = 2, 3, 4`: one equation, although there are commas."""
    sides = _split(_EQUALS, text, outside)
    if len(sides) != 2 or not all(sides) or _SEPARATOR.search(outside) is None:
        return None
    names = _split(_SEPARATOR, sides[0], _mask(sides[0]))
    values = _split(_SEPARATOR, sides[1], _mask(sides[1]))
    if len(names) == 1 and is_variable(sides[0]) and not any(map(_is_condition, values)):
        return Equation(sides[0], _parse(sides[1], depth + 1), text)
    if len(names) == len(values) > 1 and all(map(is_variable, names)):
        return _parse(
            ", ".join(f"{name}={value}" for name, value in zip(names, values, strict=True)), depth + 1
        )
    return None


def _is_condition(text: str) -> bool:
    return _ORDER.search(text) is not None or r"\ne" in text or "=" in text


def _parse_list(text: str, outside: str, depth: int) -> Node | None:
    pieces = [piece for piece in _split(_SEPARATOR, text, outside) if piece]
    if len(pieces) < 2 or len(pieces) > ITEMS:
        return None
    items = tuple(_parse(piece, depth + 1) for piece in pieces)
    if re.search(r"\bor\b|或|\\lor|\\vee", outside) and all(_is_range(item) for item in items):
        ranges = [item for item in items if isinstance(item, Equation)]
        return Equation(ranges[0].left, Union(tuple(item.right for item in ranges)), text)
    return Collection("", items)


def _is_range(node: Node) -> bool:
    return isinstance(node, Equation) and "=" not in node.text and isinstance(node.right, Collection)


def _parse_member(text: str, outside: str, depth: int) -> Node | None:
    match = _MEMBER.search(outside)
    left, right = (text[: match.start()].strip(), text[match.end() :].strip()) if match else ("", "")
    return Equation(left, _parse(right, depth + 1), text) if left and right else None


def _parse_union(text: str, outside: str, depth: int) -> Node | None:
    """A union; its sets of items are one set, so that a union of nothing else is a set."""
    pieces = _split(_UNION, text, outside)
    if not 1 < len(pieces) <= ITEMS:
        return None
    items: list[Node] = []
    others: list[Node] = []
    for piece in pieces:
        node = _parse(piece, depth + 1)
        if isinstance(node, Collection) and node.brackets == "{}":
            items += node.items
        elif isinstance(node, Value) and piece.startswith(("⦃", "{")):  # a set of one
            items.append(node)
        else:
            others.append(node)
    if items:  # a set of one item is written as the item everywhere
        others.append(items[0] if len(items) == 1 else Collection("{}", tuple(items)))
    return Union(tuple(others)) if len(others) > 1 else others[0]


def _parse_equation(text: str, outside: str, depth: int) -> Node | None:
    sides = _split(_EQUALS, text, outside)
    if len(sides) < 2 or not all(sides):
        return None
    return Equation(sides[0], _parse(sides[-1], depth + 1), text)


def _parse_order(text: str, outside: str, depth: int) -> Node | None:
    r"""`-2 < x \le 7` and `3 > x` as a variable in an interval."""
    signs = [match[0].strip() for match in _ORDER.finditer(outside)]
    sides = _split(_ORDER, text, outside)
    if not 1 <= len(signs) <= 2 or not all(sides):
        return None
    less = [sign in ("<", r"\le", "<=") for sign in signs]
    closed = ["=" in sign or sign in (r"\le", r"\ge") for sign in signs]
    if len(signs) == 2:
        if (
            less[0] != less[1]
            or not is_variable(sides[1])
            or not (_is_bound(sides[0]) and _is_bound(sides[2]))
        ):
            return None
        low, high = (0, 1) if less[0] else (1, 0)
        ends = (sides[0], sides[2]) if less[0] else (sides[2], sides[0])
        brackets = ("[" if closed[low] else "(") + ("]" if closed[high] else ")")
        return Equation(sides[1], Collection(brackets, tuple(_parse(end, depth + 1) for end in ends)), text)
    variable, bound = sides if is_variable(sides[0]) else reversed(sides)
    if not is_variable(variable) or not _is_bound(bound):
        return None
    end = _parse(bound, depth + 1)
    if less[0] == (variable == sides[0]):
        return Equation(variable, Collection("(]" if closed[0] else "()", (Value(r"-\infty"), end)), text)
    return Equation(variable, Collection("[)" if closed[0] else "()", (end, Value(r"\infty"))), text)


def _is_bound(text: str) -> bool:
    """Whether a text has no variables."""
    return re.search(r"[A-Za-z]", _ORDINARY_COMMAND.sub("", text)) is None


def _parse_brackets(text: str, outside: str, depth: int) -> Node | None:
    if matrix := _ENVIRONMENT.match(text):
        return _parse_matrix(matrix[2], depth)
    if called := _BARE_COLLECTION.match(text):
        return _parse(called[1], depth + 1)
    transposed = _TRANSPOSED.search(text)
    if transposed and text[0] in "([" and outside[transposed.start() - 1] in ")]":
        return _parse(text[: transposed.start()], depth + 1)
    text = _turn_outward(text)
    if text[0] not in "([⦃{<" or text[-1] not in ")]⦄}>" or len(text) < 2:
        return None
    if text[0] != "<" and _mask(text)[1:-1].strip("\0"):
        return None  # two pairs of brackets, as in (a+b)(c+d)
    return _parse_inside(text, depth)


def _turn_outward(text: str) -> str:
    """`]a, b[` as `(a, b)`."""
    if text[0] not in "[]" or text[-1] not in "[]" or text[0] + text[-1] == "[]":
        return text
    return ("[" if text[0] == "[" else "(") + text[1:-1] + (")" if text[-1] == "[" else "]")


def _parse_inside(text: str, depth: int) -> Node | None:
    inside = text[1:-1].strip()
    masked = _mask(inside, grouped=", " in inside)  # (2,300) is a point, in (2,300, 5) is a thousand
    is_set = text[0] in "⦃{"
    if text[0] == "<" and "," not in masked:
        return None
    condition = _CONDITION.search(masked) if is_set else None
    if condition:
        return _parse_built_set(inside, masked, condition, depth)
    pieces = _split(_ITEM_SEPARATOR, inside, masked)
    if len(pieces) == 1 and text[0] == "[" and re.fullmatch(r"[-+\d.\se]+", inside) and " " in inside:
        pieces = inside.split()  # a printed array: [1 2 3]
    if len(pieces) == 1:
        return _parse(pieces[0], depth + 1)
    if len(pieces) > ITEMS:
        return None
    items = tuple(_parse(piece, depth + 1) for piece in pieces if piece)
    if text[0] == "[" and text[-1] == "]" and all(_is_row(item) for item in items):
        return _matrix_of(items) or Collection("[]", items)
    brackets = "{}" if is_set else "()" if text[0] == "<" else text[0] + text[-1]
    return Collection(brackets, items)


def _parse_built_set(inside: str, masked: str, condition: re.Match[str], depth: int) -> Node | None:
    r"""`{x | x > 2}` as its condition; `{x: 2, y: 1}`, printed by a program, as a list of equations."""
    if condition[0] == ":":
        pairs = [piece.partition(":") for piece in _split(_ITEM_SEPARATOR, inside, masked)]
        if (
            all(colon and is_variable(name.strip(" '\"")) for name, colon, _ in pairs)
            and _ORDER.search(masked) is None
        ):
            items = (Equation(n.strip(" '\""), _parse(v, depth + 1), f"{n}={v}") for n, _, v in pairs)
            equations = tuple(items)
            return equations[0] if len(equations) == 1 else Collection("", equations)
    name = inside[: condition.start()].partition(r"\in")[0].strip()
    return _parse(inside[condition.end() :], depth + 1) if is_variable(name) else None


def _is_row(node: Node) -> bool:
    return isinstance(node, Collection) and node.brackets == "[]"


def _matrix_of(rows: tuple[Node, ...]) -> Matrix | None:
    lists = tuple(row.items for row in rows if isinstance(row, Collection))
    return Matrix(lists) if len({len(row) for row in lists}) == 1 else None


def _parse_matrix(inside: str, depth: int) -> Node | None:
    inside = inside.replace(r"\hline", " ")
    rows = [row for row in re.split(r"\\\\(?:\s?\[[^\]]{0,10}\])?", inside) if row.strip()]
    cells = tuple(tuple(_parse(cell, depth + 1) for cell in row.split("&")) for row in rows)
    return Matrix(cells) if cells and len({len(row) for row in cells}) == 1 and len(cells) <= ITEMS else None


def _parse_plus_minus(text: str, depth: int) -> Node | None:
    if _PLUS_MINUS.search(text) is None:
        return None
    signs = {r"\pm": "+", r"\mp": "-"}
    upper = _PLUS_MINUS.sub(lambda match: signs[match[0]] + " ", text)
    lower = _PLUS_MINUS.sub(lambda match: "-+"[signs[match[0]] == "-"] + " ", text)
    return Collection("", tuple(_parse(each.lstrip("+ "), depth + 1) for each in (upper, lower)))
