"""The answer in what a program printed: a value, not Markdown.

A line that is a Python value is read as one: scalars of numpy, `Fraction`, `Decimal`, sympy's results, also
inside lists, tuples, sets and dicts. In a sentence with numbers of its own ("Rosa sold 72 clips in 2 months")
the answer is what the program put in. Only arithmetic of constants is evaluated (`2*sqrt(3)` for a number).
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction

from viaticum.strategies.answers import read_answer, whole_number, write_number
from viaticum.strategies.answers.dates import whole_date
from viaticum.strategies.programs.finding import prints_constant
from viaticum.strategies.sandbox.base import parse
from viaticum.types import AnswerKind
from viaticum.valid_text import valid_text

LINES = 50  # only the last lines are read
VALUE_CHARACTERS = 2_000  # longer values are read as text
POWER_BITS = 4_000

_POWER = re.compile(r"(?<=[\w)\]])(?:\*\*| \*\* )(?=[-\w(])")
_NO_VALUE = re.compile(r"^[-+]?(?:nan|inf|none|zoo|infinity|null|undefined)$", re.IGNORECASE)
_NUMBERS = re.compile(r"-?\d+(?:\.\d+)?(?: -?\d+(?:\.\d+)?)+")  # `print(3, 4)`
_ARRAY = re.compile(r"\[[\[\]\d\s.eE+-]*\]")  # as numpy prints one: without commas
_MARK = re.compile(r"\\boxed|####|answer|:", re.IGNORECASE)
_SCALARS = re.compile(
    r"(?:float|int|uint|bool|str|complex|longdouble|clongdouble)\d*_?|mpf|mpc|Integer|Float|Decimal|S"
)
_FRACTIONS = frozenset({"Fraction", "Rational", "mpq"})
_SEQUENCES = frozenset({"array", "list", "tuple", "deque", "dict_values", "dict_keys", "Tuple", "matrix"})
_SETS = frozenset({"set", "frozenset", "FiniteSet"})
_MAPPINGS = frozenset({"OrderedDict", "Counter", "dict"})
_MATRICES = frozenset({"Matrix", "ImmutableMatrix", "ImmutableDenseMatrix", "MutableDenseMatrix"})
_STRUCTURE = (ast.Call, ast.Name, ast.List, ast.Tuple, ast.Set, ast.Dict, ast.Pow)
_VALUE_NODES = (
    *_STRUCTURE,
    ast.Attribute,
    ast.Constant,
    ast.BinOp,
    ast.UnaryOp,
    ast.Compare,
    ast.keyword,
    ast.operator,
    ast.unaryop,
    ast.cmpop,
    ast.expr_context,
)
_IMAGINARY = re.compile(r"(?<=\d)j\b")
_NAMES = {"oo": r"\infty", "True_": "True", "False_": "False", "EmptySet": r"\emptyset"}
_Number = Fraction | float
_CONSTANTS = {"pi": math.pi, "E": math.e, "GoldenRatio": (1 + math.sqrt(5)) / 2}
_FUNCTIONS: dict[str, Callable[[float], float]] = {
    "sqrt": math.sqrt,
    "exp": math.exp,
    "log": math.log,
    "sin": math.sin,
    "cos": math.cos,
    "tan": math.tan,
    "Abs": abs,
    "asin": math.asin,
    "acos": math.acos,
    "atan": math.atan,
    "cbrt": math.cbrt,
}


def read_output(stdout: str, program: str, kind: AnswerKind) -> str | None:
    """The answer of that kind in what a program printed, or None.

    It is that of the last line that has one; a fixed text that is always printed ("Done") is passed over.
    """
    values = list(_values(stdout))
    fixed = _fixed_texts(program)
    computed = [value for value in values if " ".join(value.split()) not in fixed]
    for value in reversed(computed or values):
        answer = read_value(value, kind, program)
        if answer is not None:
            return valid_text(answer)  # a printed literal may spell half of a character
        if kind not in ("number", "choice", "boolean", "date"):
            return None
    return None


def read_value(text: str, kind: AnswerKind, program: str = "") -> str | None:
    """The answer of that kind in one printed value; program: the one that printed it."""
    text = text.strip()
    if _NO_VALUE.match(text):
        return None
    number = whole_number(text)
    if _NUMBERS.fullmatch(text):
        return {"number": None, "auto": ", ".join(text.split())}.get(kind, text)
    if number is not None and kind in ("number", "auto", "expression"):
        return write_number(number)
    tree = None if whole_date(text) or number is not None else _parse_value(text)
    if tree is not None:
        return _read_tree(tree, text, kind)
    for inserted in _computed_part(text, program, kind):
        answer = read_value(inserted, kind)
        if answer is not None:
            return answer
    return _read_text(_POWER.sub("^", text), kind)


# --- lines ----------------------------------------------------------------------------------------


def _values(stdout: str) -> Iterator[str]:
    """The printed values: lines, those of a value that stands on several lines joined."""
    lines = [line for line in stdout.splitlines() if line.strip()][-LINES:]
    pending: list[str] = []
    for line in lines:
        pending.append(line)
        text = "\n".join(pending)
        if _open_brackets(text) <= 0 or len(pending) == LINES:
            yield text
            pending = []
    yield from pending


def _open_brackets(text: str) -> int:
    return sum(text.count(each) for each in "[({") - sum(text.count(each) for each in "])}")


def _fixed_texts(program: str) -> set[str]:
    """What a program prints in any case: constants of `print` outside branches."""
    tree = parse(program)
    if tree is None:
        return set()
    bodies = [tree.body, *(node.body for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))]
    return {
        " ".join(
            " ".join(str(each.value) for each in node.value.args if isinstance(each, ast.Constant)).split()
        )
        for body in bodies
        for node in body
        if prints_constant(node) and isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    }


def _computed_part(line: str, program: str, kind: AnswerKind) -> list[str]:
    """What a program put into a sentence, best first; empty where that is not clear.

    From the last `print` that can have written the line: its only computed part, else the variable named
    `answer`, `result` or `total`.
    """
    tree = parse(program) if program else None
    prints = [
        node
        for node in (ast.walk(tree) if tree else ())
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    for call in sorted(prints, key=lambda node: node.lineno, reverse=True):
        pieces = list(_pieces(call.args))
        if any(isinstance(each, str) and each.strip() for each in pieces):
            computed = [each for each in pieces if not isinstance(each, str)]
            values = _inserted(pieces, line)
            if values is not None:
                return _best(computed, values, kind)
    return []


def _inserted(pieces: Sequence[str | ast.expr], line: str) -> list[str] | None:
    """What stands in a line for each expression of a `print`; None if that did not write the line."""
    values: list[str] = []
    texts = [""]
    for piece in pieces:
        if isinstance(piece, str):
            texts[-1] += piece
        else:
            texts.append("")
    texts[0], texts[-1] = texts[0].lstrip(), texts[-1].rstrip()
    if not line.startswith(texts[0]):
        return None
    at = len(texts[0])
    for index, text in enumerate(texts[1:], 1):
        end = line.find(text, at) if text and index < len(texts) - 1 else len(line) - len(text)
        if end < at or not line.startswith(text, end):
            return None
        values.append(line[at:end])
        at = end + len(text)
    return values if at == len(line) else None


def _pieces(arguments: Sequence[ast.expr]) -> Iterator[str | ast.expr]:
    """The texts and expressions that a `print` joins."""
    for index, argument in enumerate(arguments):
        if index:
            yield " "
        for part in argument.values if isinstance(argument, ast.JoinedStr) else [argument]:
            if isinstance(part, ast.Constant):
                yield str(part.value)
            else:
                yield part.value if isinstance(part, ast.FormattedValue) else part


def _best(computed: Sequence[ast.expr], values: Sequence[str], kind: AnswerKind) -> list[str]:
    named = [
        value
        for node, value in zip(computed, values, strict=True)
        if isinstance(node, ast.Name) and node.id in ("answer", "result", "total", "final_answer")
    ]
    numbers = [value for value in values if whole_number(value) is not None]
    if kind in ("number", "auto") and len(numbers) == 1:
        return numbers
    return named[:1] or (list(values) if len(values) == 1 else [])


def _read_text(text: str, kind: AnswerKind) -> str | None:
    if kind == "text" and _MARK.search(text) is None:
        return text.strip(" \"'") or None
    return read_answer(text, kind)


# --- values ---------------------------------------------------------------------------------------


def _parse_value(text: str) -> ast.expr | None:
    """The expression that a printed value is; None for sentences, and for values without structure."""
    if len(text) > VALUE_CHARACTERS:
        return None
    if _ARRAY.fullmatch(text) and "," not in text:
        text = re.sub(r"(?<=[\d.])\s+(?=[-+\d.])", ", ", re.sub(r"\]\s+\[", "], [", text))
        text = re.sub(r"(?<=\d\.)(?=[,\s\]])", "0", text)
    tree = parse(f"({text.strip()}\n)")
    node = tree.body[0] if tree and len(tree.body) == 1 else None
    if not isinstance(node, ast.Expr):
        return None
    inside = list(ast.walk(node.value))
    is_value = all(isinstance(each, _VALUE_NODES) for each in inside)
    if isinstance(node.value, ast.Attribute) and _name(node.value) not in _NAMES:
        return None  # "St. Louis"
    return node.value if is_value and any(map(_has_structure, inside)) else None


def _has_structure(node: ast.AST) -> bool:
    is_complex = isinstance(node, ast.Constant) and isinstance(node.value, complex)
    return is_complex or isinstance(node, _STRUCTURE)


def _read_tree(tree: ast.expr, text: str, kind: AnswerKind) -> str | None:
    try:
        items = _items(tree)
        if kind in ("number", "choice", "boolean", "date", "auto") and items is not None and len(items) == 1:
            return _read_tree(items[0], ast.unparse(items[0]), kind)
        if kind == "number":
            number = _number(tree)
            if number is not None:
                return write_number(number)
            return None if items is not None else _read_text(_POWER.sub("^", text), kind)
        value = render(tree)
        if isinstance(tree, ast.Tuple) and not text.startswith("("):
            value = value[1:-1]
    except (RecursionError, ValueError):  # nested too deep, or a number of thousands of digits
        return None
    if not value or _NO_VALUE.match(value):
        return None
    if kind in ("auto", "expression"):
        number = whole_number(value)
        return write_number(number) if number is not None else value
    return _read_text(value, kind)


def _items(node: ast.expr) -> list[ast.expr] | None:
    """The items of a container, the values of a dict; None for what is no container."""
    if isinstance(node, ast.List | ast.Tuple | ast.Set):
        return node.elts
    if isinstance(node, ast.Dict):
        return node.values
    if isinstance(node, ast.Call):
        name = _name(node.func)
        if name in _SETS and name == "FiniteSet":
            return node.args
        if name in _SEQUENCES | _SETS | _MAPPINGS | _MATRICES and node.args:
            return _items(node.args[0])
    return None


def _name(node: ast.expr) -> str:
    """The last part of a name: `float64` of `np.float64`."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def render(node: ast.expr) -> str:
    """A value in plain notation: `[3, 4]` of `[np.int64(3), np.int64(4)]`, `x^2` of `x**2`."""
    if isinstance(node, ast.List | ast.Tuple | ast.Set):
        brackets = "[]" if isinstance(node, ast.List) else "()" if isinstance(node, ast.Tuple) else "{}"
        return brackets[0] + ", ".join(map(_render_part, node.elts)) + brackets[1]
    if isinstance(node, ast.Dict):
        pairs = zip(node.keys, node.values, strict=True)
        return ", ".join(f"{render(key)}={_render_part(value)}" for key, value in pairs if key)
    if isinstance(node, ast.Constant):
        return str(node.value) if isinstance(node.value, str) else ast.unparse(node)
    if isinstance(node, ast.Name | ast.Attribute):
        name = _name(node)
        return _NAMES.get(name, name)
    if isinstance(node, ast.Call):
        return _render_call(node)
    return _render_formula(node)


def _render_part(node: ast.expr) -> str:
    """A part of a value: there `I` and `E` are sympy's constants, and no letters of choices."""
    return _render_formula(node) if isinstance(node, ast.Name) else render(node)


def _render_formula(node: ast.expr) -> str:
    """A formula of sympy: names and calls inside it are rendered, powers written with `^`."""

    class Names(ast.NodeTransformer):
        def visit_Name(self, name: ast.Name) -> ast.Name:
            return ast.Name({"I": "i", "E": "e"}.get(name.id, name.id))

    text = ast.unparse(Names().visit(node)).replace(" ** ", "^").replace("**", "^").replace("oo", r"\infty")
    return _IMAGINARY.sub("i", text.replace(" * ", "*").replace(" / ", "/"))


def _render_call(node: ast.Call) -> str:
    name, arguments = _name(node.func), node.args
    if _SCALARS.fullmatch(name) and arguments:
        return render(arguments[0])
    if name in _FRACTIONS and 1 <= len(arguments) <= 2:
        return "/".join(map(render, arguments))
    if name in ("date", "datetime", "Timestamp") and len(arguments) >= 3:
        parts = [each.value for each in arguments[:3] if isinstance(each, ast.Constant)]
        return "-".join(f"{part:02}" for part in parts if isinstance(part, int))
    if name in _MATRICES and arguments and (rows := _rows(arguments[0])):
        return r"\begin{pmatrix}" + r"\\".join("&".join(map(render, row)) for row in rows) + r"\end{pmatrix}"
    if name == "FiniteSet":
        return "{" + ", ".join(map(render, arguments)) + "}"
    if name in _SETS:
        return render(ast.Set(_items(arguments[0]) or [])) if arguments else r"\emptyset"
    if name in _SEQUENCES | _MAPPINGS and arguments:
        return render(arguments[0])
    if name == "Eq" and len(arguments) == 2:
        return f"{render(arguments[0])}={render(arguments[1])}"
    if name in ("Interval", "open", "Lopen", "Ropen") and len(arguments) >= 2:
        left = "(" if name in ("open", "Lopen") or _is_infinite(arguments[0]) else "["
        right = ")" if name in ("open", "Ropen") or _is_infinite(arguments[1]) else "]"
        return f"{left}{render(arguments[0])}, {render(arguments[1])}{right}"
    if name == "Union":
        return r" \cup ".join(map(render, arguments))
    return _render_formula(node)


def _is_infinite(node: ast.expr) -> bool:
    return any(isinstance(each, ast.Name) and each.id == "oo" for each in ast.walk(node))


def _rows(node: ast.expr) -> list[list[ast.expr]]:
    """Rows of a matrix; a flat list is a column."""
    rows = _items(node) or []
    return [_items(row) or [row] for row in rows]


def _number(node: ast.expr) -> Fraction | None:
    """The number that a value of constants is: `3*pi/4`, `2*sqrt(3)`, `Fraction(3, 4)`, `10**6`."""
    try:
        value = _evaluate(node)
        return value if isinstance(value, Fraction) else Fraction(value) if value is not None else None
    except (ArithmeticError, ValueError, TypeError):
        return None


def _evaluate(node: ast.expr) -> _Number | None:
    if isinstance(node, ast.Constant):
        if isinstance(node.value, int) and not isinstance(node.value, bool):
            return Fraction(node.value)
        if isinstance(node.value, float):
            return Fraction(repr(node.value))
        return whole_number(node.value) if isinstance(node.value, str) else None
    if isinstance(node, ast.Name | ast.Attribute):
        return _CONSTANTS.get(_name(node))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        value = _evaluate(node.operand)
        return None if value is None else -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.Call) and len(node.args) in (1, 2):
        return _evaluate_call(node)
    if isinstance(node, ast.BinOp):
        return _evaluate_operation(node)
    return None


def _power(base: _Number, exponent: _Number) -> _Number | None:
    """A power of at most `POWER_BITS`; None for larger ones and complex ones."""
    if exponent != int(exponent):
        return float(base) ** float(exponent) if base >= 0 else None
    exact = Fraction(base)
    bits = max(exact.numerator.bit_length(), exact.denominator.bit_length())
    return exact ** int(exponent) if bits * abs(int(exponent)) <= POWER_BITS else None


def _evaluate_call(node: ast.Call) -> _Number | None:
    name, values = _name(node.func), [_evaluate(each) for each in node.args]
    if None in values:
        return None
    first = values[0]
    assert first is not None
    if name in _FRACTIONS:
        return Fraction(first) / Fraction(values[1] or 0) if len(values) == 2 else first
    if _SCALARS.fullmatch(name):
        return first
    return _FUNCTIONS[name](float(first)) if name in _FUNCTIONS and len(values) == 1 else None


def _evaluate_operation(node: ast.BinOp) -> _Number | None:
    left, right = _evaluate(node.left), _evaluate(node.right)
    if left is None or right is None:
        return None
    if isinstance(node.op, ast.Pow):
        return _power(left, right)
    if isinstance(node.op, ast.Add):
        return left + right
    if isinstance(node.op, ast.Sub):
        return left - right
    if isinstance(node.op, ast.Mult):
        return left * right
    return left / right if isinstance(node.op, ast.Div) else None
