"""Numbers in text: find them, read them as exact fractions, write them in canonical form.

Leaves out which statement of a text is its answer (`reading`) and when two answers are equal (`comparing`).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from fractions import Fraction

from viaticum.strategies.answers.expressions import SUPERSCRIPTS
from viaticum.strategies.answers.units import is_product

NUMBER_DIGITS = 100
EXPONENT = 300
NUMBER = re.compile(
    r"(?<![\w.])(?P<sign>[-+])?"
    r"(?:(?P<whole>\d{1,15})\s(?=\d{1,15}\s?/\s?\d))?"
    r"(?P<top>\d[\d,]*(?:\.\d+)?|\.\d+)(?P<exponent>[eE][-+]?\d{1,4}(?!\w))?"
    r"(?:\s?/\s?(?P<bottom>\d{1,100}(?:\.\d{1,100})?)(?![\w/]))?"
    r"(?:\s?(?P<scale>thousand|million|billion|trillion)\b)?"
)
_SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
# What `clean` replaces; most answers contain none of it.
_UNCLEAN = re.compile(r"[^\x00-\x7f]|[\\^*~${]")
_GROUPED = re.compile(r"\d{1,3}(?:,\d{3})+(?:\.\d+)?")
_FRACTION = re.compile(r"\\[dt]?frac\s?\{\s?(-?[\d.]{1,50})\s?\}\s?\{\s?([\d.]{1,50})\s?\}")
_POWER_OF_TEN = re.compile(
    r"(?<![\w.,/^])(\d[\d,]{0,50}(?:\.\d{1,50})?)\s?(?:×|·|\*|x|\\times|\\cdot)\s?10\s?"
    r"(?:(?:\^|\*\*)\s?(\{\s?[-+]?\d{1,3}\s?\}|\([-+]?\d{1,3}\)|[-+]?\d{1,3}(?!\d))|([⁻⁺]?[⁰¹²³⁴⁵⁶⁷⁸⁹]{1,3}))"
)
_ONE_CHARACTER_FRACTION = re.compile(r"(\d\s?)?([¼-¾⅐-⅞])")
_DEGREES = re.compile(r"\s?\^\s?(?:\\circ(?![A-Za-z])|\{\s?\\circ\s?\})")
LATEX_TEXT = re.compile(r"\\(?:text|mathrm|mathbf|textbf|operatorname)\s?\{([^{}]*)\}")
_LATEX_SPACE = re.compile(r"\\[,;:! ]|~|\\\(|\\\)|\\\[|\\\]|\\left|\\right")
_SIGNED_CURRENCY = re.compile(r"(?<![\w.)])([-+])\s?\\?[$€£¥₹]\s?")
_CURRENCY = re.compile(r"\\?[$€£¥₹]")
_UNIT_WORD = r"[^-/\d\s=+*^()\[\]{}<>,;:?!]{1,20}(?:\^\{?-?\d\}?)?"
_UNIT = re.compile(rf"(?![xyz](?:\W|$)){_UNIT_WORD}(?:[ /-]{_UNIT_WORD}){{0,3}}")


def find_number(text: str) -> Fraction | None:
    """The first number of a text, or in an equation, the first after the last `=` followed by one."""
    text = clean(text)
    left, equals, right = text.rpartition("=")
    if equals and (number := next(numbers_in(right), None)) is not None:
        return number
    return next(numbers_in(left if equals else text), None)


def whole_number(text: str, *, units: bool = True) -> Fraction | None:
    """The number that a text consists of, up to a unit and punctuation; None if it says anything else.

    Without `units`, only percent and degree signs are ignored: in an expression, `12x` is a product.
    """
    text = clean(text).strip().strip("'\"`").rstrip(".,;:! ").lstrip("=≈~ ")
    match = NUMBER.match(text)
    if match is None:
        return None
    if is_product(text[match.end() :]):
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


def _is_decimal(number: Fraction) -> bool:
    rest = number.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    return rest == 1


def numbers_in(cleaned: str) -> Iterator[Fraction]:
    for match in NUMBER.finditer(cleaned):
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


def clean(text: str) -> str:
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
    text = _FRACTION.sub(r"\1/\2", LATEX_TEXT.sub(r" \1", text))
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
