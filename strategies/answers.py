"""Read the final answer out of text, and compare answers.

Answers are strings in a canonical form. Units, currency signs and the percent sign are ignored ("$5", "5
dollars" and "5" are equal, as are "50%" and "50"), and so are thousands separators, trailing zeros, simple
fractions and powers of ten ("1,200.00" is "1200", "3/4" is "0.75", "3 x 10^8" is "300000000"). `dates`
handles dates; `expressions` compares expressions by math-verify if the extra `math` is installed, otherwise
as text.

Every pattern runs in linear time, every text is truncated before it is searched, and symbolic comparison has
a time limit (`expressions.SECONDS`), so that nothing a model writes can raise an error or hang here.
"""

from __future__ import annotations

import re
import unicodedata
from collections import deque
from collections.abc import Iterable, Iterator
from fractions import Fraction

from viaticum.strategies.dates import find_dates, whole_date
from viaticum.strategies.expressions import SUPERSCRIPTS, is_symbolic, same_expression, to_latex
from viaticum.types import AnswerKind

TEXT_CHARACTERS = 20_000  # only the end of a text is read
VALUE_CHARACTERS = 300  # only the beginning of an answer is compared
NUMBER_DIGITS = 100
EXPONENT = 300
MARKS = 20  # only the last marks of a text are tried
TOLERANCE = Fraction(1, 10**6)  # relative, for rounding errors of programs

_MARKER = re.compile(
    r"\\boxed\s?\{|\\fbox\s?\{|####|\banswer(?: to the question)?(?: is| are|:| :| =|\s?\n)(?: equal to)?:?",
    re.IGNORECASE,
)
_NUMBER = re.compile(
    r"(?<![\w.])(?P<sign>[-+])?"
    r"(?:(?P<whole>\d{1,15})\s(?=\d{1,15}\s?/\s?\d))?"
    r"(?P<top>\d[\d,]*(?:\.\d+)?|\.\d+)(?P<exponent>[eE][-+]?\d{1,4}(?!\w))?"
    r"(?:\s?/\s?(?P<bottom>\d{1,100}(?:\.\d{1,100})?)(?![\w/]))?"
    r"(?:\s?(?P<scale>thousand|million|billion|trillion)\b)?"
)
_SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
# What `_clean` replaces; most answers contain none of it.
_UNCLEAN = re.compile(r"[^\x00-\x7f]|[\\^*~${]")
_GROUPED = re.compile(r"\d{1,3}(?:,\d{3})+(?:\.\d+)?")
_FRACTION = re.compile(r"\\[dt]?frac\s?\{\s?(-?[\d.]{1,50})\s?\}\s?\{\s?([\d.]{1,50})\s?\}")
_POWER_OF_TEN = re.compile(
    r"(?<![\w.,/^])(\d[\d,]{0,50}(?:\.\d{1,50})?)\s?(?:×|·|\*|x|\\times|\\cdot)\s?10\s?"
    r"(?:(?:\^|\*\*)\s?(\{\s?[-+]?\d{1,3}\s?\}|\([-+]?\d{1,3}\)|[-+]?\d{1,3}(?!\d))|([⁻⁺]?[⁰¹²³⁴⁵⁶⁷⁸⁹]{1,3}))"
)
_ONE_CHARACTER_FRACTION = re.compile(r"(\d\s?)?([¼-¾⅐-⅞])")
_DEGREES = re.compile(r"\s?\^\s?(?:\\circ(?![A-Za-z])|\{\s?\\circ\s?\})")
_MATH = re.compile(
    r"\$\$([^$]{1,300})\$\$|(?<!\\)\$([^$\n]{1,300})(?<!\\)\$|\\\(([^\n]{1,300}?)\\\)|\\\[(.{1,300}?)\\\]",
    re.DOTALL,
)
_VARIABLE = re.compile(r"(?<![\\A-Za-z])[A-Za-z](?![A-Za-z])")
_LATEX_TEXT = re.compile(r"\\(?:text|mathrm|mathbf|textbf|operatorname)\s?\{([^{}]*)\}")
_LATEX_SPACE = re.compile(r"\\[,;:! ]|~|\\\(|\\\)|\\\[|\\\]|\\left|\\right")
_SIGNED_CURRENCY = re.compile(r"(?<![\w.)])([-+])\s?\\?[$€£¥₹]\s?")
_CURRENCY = re.compile(r"\\?[$€£¥₹]")
_CHOICE = re.compile(r"^\W{0,4}(?:option|choice|answer)?\s?\W{0,3}([A-Ja-j])(?:\W|$)")
_LOOSE_CHOICE = re.compile(
    r"\(([A-Ja-j])\)|\b([A-J])\)|(?i:option|choice)\s\(?([A-Ja-j])\b|^\W{0,3}([A-J])\W{0,3}$", re.M
)
_BOOLEAN = re.compile(r"\b(yes|no|true|false)\b", re.IGNORECASE)
_YES_NO = {"yes": "yes", "true": "yes", "no": "no", "false": "no"}
_UNIT_WORD = r"[^-/\d\s=+*^()\[\]{}<>,;:?!]{1,20}(?:\^\{?-?\d\}?)?"
_UNIT = re.compile(rf"(?![xyz](?:\W|$)){_UNIT_WORD}(?:[ /-]{_UNIT_WORD}){{0,3}}")
_SENTENCE_END = re.compile(r"(?:(?<=\w{4})|(?<=\d))[.;!?]\s|\n")
_ARTICLE = re.compile(r"^(?:the|an|a)\s(?=\S)")


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
        return to_latex(value) or _plain(value)
    if kind == "choice" and (match := _CHOICE.search(_clean(value))):
        return match[1].upper()
    if kind in ("boolean", "auto"):
        words = _BOOLEAN.findall(value)
        if words and (kind == "boolean" or _plain(value) == words[0].lower()):
            return _YES_NO[words[0].lower()]
    return _plain(value)


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


def find_number(text: str) -> Fraction | None:
    """The first number of a text, or in an equation, the first after the last `=` followed by one."""
    text = _clean(text)
    left, equals, right = text.rpartition("=")
    if equals and (number := next(_numbers(right), None)) is not None:
        return number
    return next(_numbers(left if equals else text), None)


def whole_number(text: str, *, units: bool = True) -> Fraction | None:
    """The number that a text consists of, up to a unit and punctuation; None if it says anything else.

    Without `units`, only percent and degree signs are ignored: in an expression, `12x` is a product.
    """
    text = _clean(text).strip().strip("'\"`").rstrip(".,;:! ").lstrip("=≈~ ")
    match = _NUMBER.match(text)
    if match is None:
        return None
    rest = text[match.end() :].strip().rstrip(".")
    pieces = _values(match)
    may_follow = rest in ("", "%", "°") or (units and _UNIT.fullmatch(rest))
    return pieces[0] if len(pieces) == 1 and may_follow else None


def write_number(number: Fraction) -> str:
    """A number as a decimal, rounded to 12 places, or as a reduced fraction if no decimal is exact."""
    if number.denominator == 1:
        return str(number.numerator)
    nearest = round(number * 10**12)
    if (number and not nearest) or not _is_decimal(number):
        return str(number)
    sign, digits = "-" if nearest < 0 else "", str(abs(nearest)).rjust(13, "0")
    return f"{sign}{digits[:-12]}.{digits[-12:]}".rstrip("0").rstrip(".")


def _number_of(value: str, kind: AnswerKind) -> Fraction | None:
    """The number that an answer of that kind represents."""
    if kind == "number":
        return find_number(value)
    return whole_number(value, units=kind == "auto") if kind in ("auto", "expression") else None


def _is_decimal(number: Fraction) -> bool:
    rest = number.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    return rest == 1


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
        match = _CHOICE.search(_clean(candidate)) or _LOOSE_CHOICE.search(candidate)
        return next(group for group in match.groups() if group).upper() if match else None
    if kind == "boolean":
        match = _BOOLEAN.search(candidate)
        return _YES_NO[match[1].lower()] if match else None
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
    cleaned = _clean(candidate).lstrip(" =≈:")
    match = _NUMBER.match(cleaned)
    return match is not None and re.match(r"\s?[-:/]\s?\d|(?:st|nd|rd|th)\b", cleaned[match.end() :]) is None


def _says_one_number(candidate: str) -> bool:
    """Whether a sentence ("Rosa is 22 years old", "Total: $22") has one number, unlike "Apollo 11"."""
    is_sentence = ":" in candidate or len(candidate.split()) > 2
    return is_sentence and len(list(_numbers(_clean(candidate)))) == 1


def _first_sentence(candidate: str) -> str:
    """The first sentence without its period and quotes. A short word before a period is an abbreviation."""
    sentence = _SENTENCE_END.split(_LATEX_TEXT.sub(r"\1", candidate.strip()), maxsplit=1)[0]
    return sentence.strip(" \"'`$").rstrip(".").strip()


def _guess(text: str, kind: AnswerKind) -> str | None:
    """The last part of an unmarked text that could be its answer."""
    if kind in ("number", "auto"):
        lines = [line for line in text.splitlines() if line.strip()]
        if kind == "auto" and len(lines) == 1 and len(lines[0]) <= 100:
            return _read_auto(lines[0].strip())
        last_number = deque(_numbers(_clean(text)), maxlen=1)
        if last_number:
            return write_number(last_number[0])
    if kind == "choice":
        found = [group for match in _LOOSE_CHOICE.finditer(text) for group in match.groups() if group]
        lone = _CHOICE.search(_clean(text)) if len(text) <= 100 else None
        return found[-1].upper() if found else lone[1].upper() if lone else None
    if kind == "boolean":
        words = _BOOLEAN.findall(text)
        first = _BOOLEAN.match(text.strip())
        word = first[1] if first else words[-1] if words else None
        return _YES_NO[word.lower()] if word else None
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


def _numbers(cleaned: str) -> Iterator[Fraction]:
    for match in _NUMBER.finditer(cleaned):
        yield from _values(match)


def _values(match: re.Match[str]) -> list[Fraction]:
    """The numbers of one match: one, or several where commas separate a list rather than thousands."""
    top = match["top"].rstrip(",")
    if len(match[0]) > NUMBER_DIGITS or abs(int((match["exponent"] or "e0")[1:])) > EXPONENT:
        return []
    if "," in top and not _GROUPED.fullmatch(top):
        return [Fraction(piece) for piece in top.split(",") if piece]
    value = Fraction(top.replace(",", "") + (match["exponent"] or ""))
    if match["bottom"]:
        bottom = Fraction(match["bottom"])
        if not bottom:
            return []
        value /= bottom
    # Fraction arithmetic is slow, and most numbers need none of these steps.
    if match["whole"]:
        value += int(match["whole"])
    if match["scale"]:
        value *= _SCALES[match["scale"]]
    return [-value if match["sign"] == "-" else value]


def _clean(text: str) -> str:
    """Simplify LaTeX wrappers, currency signs, powers of ten, and typographic signs and spaces."""
    if _UNCLEAN.search(text) is None:
        return text
    text = (
        text.replace("−", "-")
        .replace("–", "-")
        .replace("\u00a0", " ")
        .replace("\u202f", " ")
        .replace("{,}", ",")
    )
    text = _ONE_CHARACTER_FRACTION.sub(_spell_fraction, _DEGREES.sub("°", text))
    text = _POWER_OF_TEN.sub(_write_exponent, text)
    text = _FRACTION.sub(r"\1/\2", _LATEX_TEXT.sub(r" \1", text))
    text = _LATEX_SPACE.sub(" ", text).replace("\\%", "%")
    return _CURRENCY.sub(" ", _SIGNED_CURRENCY.sub(r"\1", text))


def _write_exponent(match: re.Match[str]) -> str:
    """3 x 10^8 as 3e8."""
    exponent = (match[2] or match[3].translate(SUPERSCRIPTS)).strip("{}() ")
    return f"{match[1]}e{exponent} "


def _spell_fraction(match: re.Match[str]) -> str:
    """2½ as 2 1/2."""
    whole = f"{match[1].strip()} " if match[1] else ""
    return whole + unicodedata.normalize("NFKC", match[2]).replace("\N{FRACTION SLASH}", "/")


def _plain(value: str) -> str:
    """Text for comparison: one case, single spaces, no outer punctuation, no leading article."""
    text = unicodedata.normalize("NFKC", _LATEX_TEXT.sub(r"\1", value)).casefold()
    text = " ".join(text.split()).strip(" .,;:!?\"'`()[]{}$*“”‘’")
    return _ARTICLE.sub("", text) or " ".join(value.split())
