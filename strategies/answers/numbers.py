"""Numbers in text: find them, read them as exact fractions, write them in canonical form.

`latex` spells what is read here in plain ASCII, `number_words` reads words. Leaves out which statement of a
text is its answer (`reading`) and when two answers are equal (`comparing`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from fractions import Fraction

from viaticum.strategies.answers.expressions import SUPERSCRIPTS
from viaticum.strategies.answers.latex import LATEX_TEXT, clean
from viaticum.strategies.answers.number_words import find_words, read_words
from viaticum.strategies.answers.units import is_product

__all__ = [
    "LATEX_TEXT",
    "NUMBER",
    "clean",
    "concluded_number",
    "decimal_places",
    "find_number",
    "numbers_in",
    "whole_number",
    "write_number",
]

NUMBER_DIGITS = 100
EXPONENT = 300
POWER_DIGITS = 300  # longest power that is worked out
_SCALES = {
    **dict.fromkeys(("thousand", "thousands", "тыс", "тысяч", "тысячи", "tausend", "mila", "mil"), 10**3),
    **dict.fromkeys(
        (
            "million",
            "millions",
            "mio",
            "millionen",
            "millones",
            "millón",
            "milhões",
            "milhão",
            "milioni",
            "млн",
            "миллион",
            "миллиона",
            "миллионов",
            "mln",
            "miljoen",
        ),
        10**6,
    ),
    **dict.fromkeys(
        (
            "billion",
            "billions",
            "mrd",
            "milliarde",
            "milliarden",
            "milliard",
            "milliards",
            "miliardi",
            "млрд",
            "миллиардов",
            "bn",
            "mld",
        ),
        10**9,
    ),
    **dict.fromkeys(("trillion", "trillions"), 10**12),
    **dict.fromkeys(("lakh", "lakhs", "लाख"), 10**5),
    **dict.fromkeys(("crore", "crores", "करोड़"), 10**7),
    "hundred": 100,
}
_SCALE_WORDS = "|".join(sorted(_SCALES, key=len, reverse=True))
NUMBER = re.compile(
    r"(?<![A-Za-z0-9_.])(?P<sign>[-+])?"
    r"(?:(?P<whole>\d{1,15})\s(?:and\s)?(?=\d{1,15}\s?/\s?\d))?"
    r"(?P<top>\d[\d,]*(?:\.\d+)?|\.\d+)(?P<exponent>[eE][-+]?\d{1,4}(?!\w))?"
    r"(?:\s?/\s?(?P<bottom>\d{1,100}(?:\.\d{1,100})?)(?![\w/]))?"
    rf"(?:\s?(?P<scale>(?i:{_SCALE_WORDS}))(?![^\W\d_]))?"
)
_GROUPED = re.compile(r"\d{1,3}(?:,\d{3})+(?:\.\d+)?")
_UNIT_WORD = r"[^-/\d\s=+*^()\[\]{}<>,;:?!]{1,20}(?:\^\{?-?\d\}?)?"
_UNIT = re.compile(rf"(?![xyz](?:\W|$)){_UNIT_WORD}(?:[ /-]{_UNIT_WORD}){{0,3}}")
_LETTER_SCALE = re.compile(r"(?<=\d)([kKMB]|bn|mn)(?![A-Za-z0-9])")
_LETTER_SCALES = {"k": "thousand", "m": "million", "b": "billion"}
_POWER = re.compile(
    r"(?<![\w.^])(-?\d{1,20})\s?(?:\^|\*\*)\s?"
    r"(?:\{\s?(-?\d{1,4})\s?\}|\((-?\d{1,4})\)|(-?\d{1,4})(?!\d))"
    r"|(?<![\w.^])(-?\d{1,20})([⁻⁺]?[⁰¹²³⁴⁵⁶⁷⁸⁹]{1,4})"
)
_EQUALS = re.compile(
    r"=|≡|\b(?:equals?(?:\sto)?|is equal to)\b|等于|равн[оа]\b|\bégale? à\b|\bes igual a\b", re.I
)
_ABOUT = re.compile(r"\\?approx|≈|\\simeq|≃|≅|\\sim(?![A-Za-z])")
_START = re.compile(
    r"[\s$=≈~:({\[\"'*+]{0,10}(?:(?:about|approximately|roughly|around|exactly|nearly|just|only|a total"
    r" of|total of|still|now"
    r"|\\?approx|up to|at (?:least|most)|a|some|indeed|also|simply|equal"
    r" to)\s){0,3}(?:[A-Za-z]\s?[=≈]\s?)?[$(\s]{0,3}",
    re.IGNORECASE,
)
_VERB_NUMBER = re.compile(
    r"\b(?:is|are|was|were|equals?|costs?|makes?|made|gets?|has|have|had|takes?|took|needs?|earns?|earned"
    r"|pays?|paid"
    r"|(?:comes?|came)\s(?:out\s)?to|amount(?:s|ed)?\sto|add(?:s|ed)?\sup\sto|sums?\s(?:up\s)?to"
    r"|works?\sout\s(?:to|at|as)"
    r"|ends?\s(?:up\s)?(?:with|at)|holds?|contains?|owes?|receives?"
    r"|spends?|spent|sold|sells?|saves?|gives?|leaves?|left with|totals?|be|becomes?|remain|bought|buys?"
    r"|weighs?)\s{1,3}"
    r"(?:(?:a|about|approximately|exactly|only|total|of|now|still|in|all|the|just|around|equal"
    r"|to)\s{1,3}){0,4}(?=\(?[-+]?[\d.])",
    re.IGNORECASE,
)
_IN_ALL = re.compile(
    r"\d\D{1,40}\d[\d.,]*\s(?:\w{1,15}\s)?(?:in all|in total|altogether|total)\b", re.IGNORECASE
)
_BECAUSE = re.compile(r",?\s(?:because|since|as there)\b", re.IGNORECASE)
_SO = re.compile(  # what follows is the conclusion of a sentence
    r"[,;—–]\s?(?:and\s)?(?:so|therefore|thus|hence|consequently|which means|meaning|giving|making"
    r"|leaving|bringing"
    r"|for a total of)(?:\sthat)?,?\s",
    re.IGNORECASE,
)
_COMPARED = re.compile(  # "which is 2 more than before"
    r",?\s(?:which|that)\s(?:is|are|was"
    r"|were)\s(?:\w{1,12}\s){0,2}?\$?\d[\d.,/]{0,20}\s?%?\s?(?:[^\W\d]{1,15}\s){0,2}?"
    r"(?:more|less|fewer|higher|lower|greater|smaller|larger|times|longer|shorter|older|younger|above"
    r"|below|short"
    r"|ahead|apart|over|under)\b[^=]*$",
    re.IGNORECASE,
)
_NAMELY = re.compile(  # "between 3 and 5, namely 4"
    r"\b(?:between|range|about|around|roughly|approximately|nearly|almost|(?:more|less|fewer) than|over"
    r"|under)\s"
    r"[^.;\n]{0,60}?\b(?:namely|to be (?:more )?(?:exact|precise)|(?:more )?(?:exactly|precisely)|that is"
    r"|i\.e\.)[,:]?\s"
    r"(?=[-+$€£]{0,2}\d[\d.,/]{0,20}\D*$)",
    re.IGNORECASE,
)
_ROUNDED = re.compile(
    r"\b(?:rounds?|rounded|rounding)\s(?:it\s)?(?:(?:up|down|off)\s)?to\s(?:about\s)?(?=[-\d])"
    r"(?![\d.]+\s(?:decimal|significant|places?|digits?|d\.?p))",
    re.IGNORECASE,
)
_OR_RATHER = re.compile(r"\b(?:which is|that is|or)\b[^=]{0,40}\d", re.IGNORECASE)
_SPACED_SIGN = re.compile(r"^\s{0,3}-\s{1,3}(?=[\d.])")
_NOT_BUT = re.compile(r"\bnot\s[^.;\n]{1,40}?\bbut\s", re.IGNORECASE)
_EUROPEAN = re.compile(r"(?<![\d.,])\d{1,3}(?:[. ]\d{3})+,\d{1,12}(?![\d,]|\.\d)")
_COMMA_DECIMAL = re.compile(r"(?<![\d.,])\d{1,15},\d{1,12}(?![\d,]|\.\d)")
_POINT_GROUPS = re.compile(r"(?<![\d.,])[1-9]\d{0,2}(?:\.\d{3})+(?![\d.]|,\d)")
_ZERO_COMMA = re.compile(r"(?<![\d.,\w])0,\d{1,12}(?![\d,]|\.\d)")


def find_number(text: str, *, comma: bool = False, groups_by_comma: bool = False) -> Fraction | None:
    """The number that a text states.

    After its last `=` if a number follows; else the one it begins with; else the one after its last verb of
    having or being ("3 books cost $45"); else its first. Words count where there are no digits.

    Args:
        comma: the text's language writes 3,5 for three and a half.
        groups_by_comma: such a language, but 12,500 is twelve thousand.
    """
    text = _spell_powers(_LETTER_SCALE.sub(_spell_scale, decimal_points(clean(text), comma, groups_by_comma)))
    pieces = _EQUALS.split(text)
    for piece in reversed(pieces):
        number = _stated(piece)
        if number is not None:
            return number
    return find_words(text)


def _stated(text: str) -> Fraction | None:
    text = _NOT_BUT.sub("", text)
    if (rounded := _ROUNDED.search(text)) and (
        number := next(numbers_in(text[rounded.end() :]), None)
    ) is not None:
        return number
    text = _SPACED_SIGN.sub("-", text)
    if (namely := _NAMELY.search(text)) and (
        number := next(numbers_in(text[namely.end() :]), None)
    ) is not None:
        return number
    exact, about, rest = _split_about(text)
    if about and (number := next(numbers_in(rest), None)) is not None and whole_number(exact) is None:
        return number
    begin = _START.match(text)
    if begin is not None and (match := NUMBER.match(text, begin.end())) and (found := _values(match)):
        return found[0]
    if (number := read_words(text)) is not None:
        return number
    if (number := _after_verb(text)) is not None:
        return number
    return next(numbers_in(text), None)


def concluded_number(sentence: str, *, comma: bool = False, groups_by_comma: bool = False) -> Fraction | None:
    """The number that a sentence without a mark comes to: after its last `=`, or its last verb of having.

    Only what follows a ", so" counts, and a reason or comparison at its end is left out: "He spends $5
    because 10 * 0.5 = 5.", "5 + 3 = 8, which is 2 more than before".
    """
    text = " ".join(decimal_points(clean(sentence), comma, groups_by_comma).split())
    text = _SO.split(text)[-1] if any(numbers_in(_SO.split(text)[-1])) else text
    shorter = _COMPARED.sub("", text)
    if shorter != text and any(numbers_in(shorter)):
        text = shorter
        if len(found := list(numbers_in(text))) == 1:
            return found[0]
    if namely := _NAMELY.search(text):
        return next(numbers_in(text[namely.end() :]), None)
    result = _BECAUSE.split(text, maxsplit=1)[0]
    if result != text and any(numbers_in(result)) and not re.search(r",[^=]*=", text[len(result) :]):
        text = result
        found = list(numbers_in(result))
        if len(found) == 1:
            return found[0]
    if _EQUALS.search(text):
        number = _stated(_EQUALS.split(_spell_powers(text))[-1])
        return None if number is None or _OR_RATHER.search(text) else number
    return None if _IN_ALL.search(text) else _after_verb(text)


def _after_verb(text: str) -> Fraction | None:
    for verb in reversed(list(_VERB_NUMBER.finditer(text))):
        match = NUMBER.search(text, verb.end())
        if match is not None and match.start() <= verb.end() + 1 and (found := _values(match)):
            return found[0]
    return None


def _split_about(text: str) -> tuple[str, bool, str]:
    match = _ABOUT.search(text)
    return (text, False, "") if match is None else (text[: match.start()], True, text[match.end() :])


def whole_number(
    text: str, *, units: bool = True, comma: bool = False, groups_by_comma: bool = False
) -> Fraction | None:
    """The number that a text consists of, up to a unit and punctuation; None if it says anything else.

    Without `units`, only percent and degree signs are ignored: in an expression, `12x` is a product. The
    other arguments are those of `find_number`.
    """
    text = decimal_points(clean(text), comma, groups_by_comma)
    text = _SPACED_SIGN.sub("-", text)
    text = _ABOUT.sub(" ", text, count=1) if _ABOUT.match(text.lstrip()) else text
    text = text.strip().strip("'\"`").rstrip(".,;:!。 ").lstrip("=≈~ ")
    if text.startswith("(") and text.endswith(")") and text[1:2] in "-+" and "," not in text:
        text = text[1:-1].strip()
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
    if (number and not nearest) or decimal_places(number) is None:
        return str(number)
    sign, digits = "-" if nearest < 0 else "", str(abs(nearest)).rjust(13, "0")
    return f"{sign}{digits[:-12]}.{digits[-12:]}".rstrip("0").rstrip(".")


def decimal_places(number: Fraction) -> int | None:
    """How many decimal places write a number exactly; None for 1/3."""
    rest, twos, fives = number.denominator, 0, 0
    while rest % 2 == 0:
        rest, twos = rest // 2, twos + 1
    while rest % 5 == 0:
        rest, fives = rest // 5, fives + 1
    return max(twos, fives) if rest == 1 else None


def numbers_in(cleaned: str) -> Iterator[Fraction]:
    for match in NUMBER.finditer(cleaned):
        yield from _values(match)


def decimal_points(text: str, comma: bool = False, groups_by_comma: bool = False) -> str:
    """Cleaned text with decimal points: 1.200,50 and 0,5 everywhere, 3,5 and 1.200 where `comma` says so."""
    if "," not in text and not (comma and "." in text):
        return text
    text = _ZERO_COMMA.sub(lambda match: match[0].replace(",", "."), _EUROPEAN.sub(_exchange, text))
    if not comma:
        return text
    text = _POINT_GROUPS.sub(_exchange, text)
    return _COMMA_DECIMAL.sub(
        lambda match: match[0] if groups_by_comma and _GROUPED.fullmatch(match[0]) else _exchange(match), text
    )


def _exchange(match: re.Match[str]) -> str:
    return match[0].replace(".", "").replace(" ", "").replace(",", ".")


def _spell_scale(match: re.Match[str]) -> str:
    return f" {_LETTER_SCALES[match[1][0].lower()]}"


def _spell_powers(text: str) -> str:
    return _POWER.sub(_power, text) if "^" in text or "**" in text or not text.isascii() else text


def _power(match: re.Match[str]) -> str:
    """2^10 as 1024 and 10^-3 as 1/1000, unless that is very long. A sign before is not part of the base."""
    written = match[1] or match[5]
    base, sign = int(written.lstrip("-")), "-" if written.startswith("-") else ""
    exponent = int(match[2] or match[3] or match[4] or match[6].translate(SUPERSCRIPTS))
    if len(str(base)) * abs(exponent) > POWER_DIGITS or (exponent < 0 and not base):
        return match[0]
    return f"{sign}{base**exponent}" if exponent >= 0 else f"{sign}1/{base**-exponent}"


def _values(match: re.Match[str]) -> list[Fraction]:
    """The numbers of one match: one, or several where commas separate a list rather than thousands."""
    top = match["top"].rstrip(",")
    if (
        len(match[0]) > max(NUMBER_DIGITS, POWER_DIGITS)
        or abs(int((match["exponent"] or "e0")[1:])) > EXPONENT
    ):
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
        value *= _SCALES[match["scale"].lower()]
    return [-value if match["sign"] == "-" else value]
