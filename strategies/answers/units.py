r"""Units of measurement and of money: which unit follows a value, and whether two units are the same.

`split_unit` separates a value from its unit: `36\sqrt{7}cm^{3}` is `36\sqrt{7}` and cubic centimetres. A unit
is a product of powers of base units with a factor, so that "m/s^2" and "metres per second squared" are one
unit, and a kilometre is 1000 metres. Leaves out offsets of temperature scales and exchange rates.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

UNIT_CHARACTERS = 60  # longest text of a unit
_PREFIXES = {
    "femto": -15,
    "pico": -12,
    "nano": -9,
    "micro": -6,
    "milli": -3,
    "centi": -2,
    "deci": -1,
    "hecto": 2,
    "kilo": 3,
    "mega": 6,
    "giga": 9,
    "tera": 12,
}
_SHORT_PREFIXES = {
    "f": -15,
    "p": -12,
    "n": -9,
    "μ": -6,
    "u": -6,
    "m": -3,
    "c": -2,
    "d": -1,
    "k": 3,
    "M": 6,
    "G": 9,
    "T": 12,
}
# Names, factor, base units with exponents. These names take long prefixes, the symbols below short ones.
_METRIC: dict[str, tuple[int | Fraction, str]] = {
    "meter metre": (1, "m"),
    "gram gramme": (Fraction(1, 1000), "kg"),
    "second": (1, "s"),
    "liter litre": (Fraction(1, 1000), "m3"),
    "newton": (1, "kg m s-2"),
    "joule": (1, "kg m2 s-2"),
    "watt": (1, "kg m2 s-3"),
    "pascal": (1, "kg m-1 s-2"),
    "hertz": (1, "s-1"),
    "ampere amp": (1, "A"),
    "volt": (1, "kg m2 s-3 A-1"),
    "ohm": (1, "kg m2 s-3 A-2"),
    "coulomb": (1, "s A"),
    "farad": (1, "kg-1 m-2 s4 A2"),
    "tesla": (1, "kg s-2 A-1"),
    "mole": (1, "mol"),
    "electronvolt": (Fraction("1.602176634e-19"), "kg m2 s-2"),
    "byte": (8, "bit"),
    "bit": (1, "bit"),
    "calorie": (Fraction("4.184"), "kg m2 s-2"),
}
_METRIC_SYMBOLS = {
    "m": "meter",
    "g": "gram",
    "s": "second",
    "L": "liter",
    "l": "liter",
    "N": "newton",
    "J": "joule",
    "W": "watt",
    "Pa": "pascal",
    "Hz": "hertz",
    "A": "ampere",
    "V": "volt",
    "Ω": "ohm",
    "C": "coulomb",
    "F": "farad",
    "T": "tesla",
    "mol": "mole",
    "eV": "electronvolt",
    "cal": "calorie",
    "B": "byte",
}
_OTHER: dict[str, tuple[int | Fraction, str]] = {
    "minute min": (60, "s"),
    "hour hr h": (3600, "s"),
    "day": (86_400, "s"),
    "week wk": (604_800, "s"),
    "month": (1, "month"),
    "year yr": (12, "month"),
    "sec": (1, "s"),
    "inch in": (Fraction("0.0254"), "m"),
    "foot feet ft": (Fraction("0.3048"), "m"),
    "yard yd": (Fraction("0.9144"), "m"),
    "mile mi": (Fraction("1609.344"), "m"),
    "pound lb": (Fraction("0.45359237"), "kg"),
    "ounce oz": (Fraction("0.028349523125"), "kg"),
    "ton tonne": (1000, "kg"),
    "acre": (Fraction("4046.8564224"), "m2"),
    "hectare ha": (10_000, "m2"),
    "gallon gal": (Fraction("0.003785411784"), "m3"),
    "quart qt": (Fraction("0.000946352946"), "m3"),
    "pint pt": (Fraction("0.000473176473"), "m3"),
    "kelvin K": (1, "K"),
    "celsius °C ℃": (1, "celsius"),
    "fahrenheit °F ℉": (1, "fahrenheit"),
    "atm atmosphere": (101_325, "kg m-1 s-2"),
    "bar": (100_000, "kg m-1 s-2"),
    "percent % percentage": (Fraction(1, 100), ""),
    "degree deg °": (1, "degree"),
    "radian rad": (1, "radian"),
    "dollar $ usd USD buck US$": (1, "dollar"),
    "cent ¢": (Fraction(1, 100), "dollar"),
    "euro eur EUR €": (1, "euro"),
    "quid gbp GBP £": (1, "pound sterling"),
    "yen jpy JPY ¥ 円": (1, "yen"),
    "yuan cny CNY RMB 元": (1, "yuan"),
    "rupee inr INR Rs ₹": (1, "rupee"),
    "unit": (1, "unit"),
    "am a.m. AM": (1, "morning"),
    "pm p.m. PM": (1, "afternoon"),
    "mph": (Fraction("0.44704"), "m s-1"),
    "kph kmph": (Fraction(1000, 3600), "m s-1"),
    "rpm": (Fraction(1, 60), "s-1"),
}
_IRREGULAR = {
    "a.m": "am",
    "p.m": "pm",
    "inches": "inch",
    "kgs": "kg",
    "lbs": "lb",
    "hrs": "hr",
    "secs": "sec",
    "mins": "min",
}
_POWER_WORD = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}
_AFTER_POWER = {"squared": 2, "cubed": 3}

_NAME = r"[A-Za-zμΩ°%$€£¥₹¢℃℉元円]+(?:\.(?=[A-Za-z])[a-z]\b)?"
_TOKEN = re.compile(
    rf"\s*(?:(?P<per>/|\bper\b)|(?P<times>\*|·|⋅|-(?=[A-Za-z]))"
    rf"|(?P<name>a\.m\.|p\.m\.|US\$|°[CF]\b|{_NAME})\.?(?:\s?(?:\^"
    rf"|\*\*)?\s?\{{?(?P<power>-?[1-9])\}}?(?!\d))?)"
)
_WRAPPED = re.compile(
    r"\\(?:text|mathrm|mbox|textrm|textup|operatorname|mathbf|textbf|rm)\s?\{([^{}]{0,100})\}"
)
_CLEANED = str.maketrans({"²": "^2", "³": "^3", "µ": "μ", "~": " ", "\u00a0": " ", "\u202f": " "})
_SPACE = re.compile(r"\\[,;:! ]|\\q?quad(?![A-Za-z])")
_LATEX_UNIT = re.compile(
    r"\^\s?\{?\s?\\circ\s?\}?(?![A-Za-z])(?:\s?[CF]\b)?"
    r"|\\(?:(?:Omega|ohm|mu|cdot|times|circ|degrees?|pounds|euro|per)(?![A-Za-z])|[%$])"
)
_SPELLED = {
    "Omega": "Ω",
    "ohm": "Ω",
    "mu": "μ",
    "cdot": "·",
    "times": "·",
    "degree": "°",
    "degrees": "°",
    "%": "%",
    "$": "$",
    "pounds": "£",
    "euro": "€",
    "per": " per ",
}
# The longest unit at the end of a text. What comes before ends in a digit, a bracket or a space.
_TRAILING = re.compile(
    r"(?<=[\s\d})\]!%a-z])(?<!\\)(?:(?<=[\s\d})\]!])|(?=[°%]))"
    r"[A-Za-zμΩ°%$€£¥₹¢℃℉元円](?:[A-Za-zμΩ°%$€£¥₹¢./*·⋅ ]|(?<=[a-zA-Z])\^?\{?-?[1-9]\}?(?!\d)|-(?=[A-Za-z]))"
    rf"{{0,{UNIT_CHARACTERS}}}$"
)
_LEADING_CURRENCY = re.compile(
    r"^\s*([-+−]?)\s*(US\$|\\?\$|€|£|¥|₹|\\pounds|\\euro|Rs\.?(?=\s?\d))\s*(?=[-+−.\d])"
)
_ATTACHED = re.compile(
    r"(?!(?:st|nd|rd|th)\b)[A-Za-z]{1,3}(?![A-Za-z])|\s?(?:\\[A-Za-z]|[πθ√∞αβγλφωσ])|\s?\^|\s?!\s?$"
)


@dataclass(frozen=True)
class Unit:
    """A product of base units: "km/h" is 5/18 of {m: 1, s: -1}."""

    factor: Fraction
    exponents: tuple[tuple[str, int], ...]

    @property
    def is_percent(self) -> bool:
        return not self.exponents and self.factor == Fraction(1, 100)


def split_unit(text: str, *, letters: bool = True) -> tuple[str, Unit | None]:
    r"""The value and the unit of a text; None without a unit that is known.

    Args:
        text: A value in LaTeX or plain notation: `36\sqrt{7}cm^{3}`, `$5`, `9.8 \, \mathrm{m/s^2}`.
        letters: Whether one letter is a unit also directly after a number ("5m") and after a formula and a
            space; within `\text{}` it always is.
    """
    leading = _LEADING_CURRENCY.match(text)
    if leading:
        if text.rstrip().endswith("$"):  # a formula between dollar signs
            return text, None
        return leading[1] + text[leading.end() :], parse_unit(leading[2].lstrip("\\").rstrip("."))
    wrapped = _WRAPPED.search(text) is not None
    plain = spell(text).strip().rstrip(".,; ")
    match = _TRAILING.search(plain, max(0, len(plain) - UNIT_CHARACTERS))
    while match and match.start():
        unit_text, value = plain[match.start() :], plain[: match.start()].rstrip()
        unit = parse_unit(unit_text)
        looks = {"attached": plain[match.start() - 1] != " ", "plain": _is_plain(value)}
        if unit and value and _may_be_unit(unit_text, letters=letters or wrapped, **looks):
            return value, unit
        match = _TRAILING.search(plain, match.start() + 1)
    return text, None


def parse_unit(text: str) -> Unit | None:
    """The unit that a text names, None if any part of it is unknown."""
    return _parse(" ".join(text.translate(_CLEANED).split()).rstrip("., "))


def spell(text: str) -> str:
    r"""A text without `\text{}` around words, LaTeX spaces, and with units' LaTeX commands spelled out."""
    if "\\" in text:
        text = _SPACE.sub(" ", _WRAPPED.sub(r" \1 ", text))
        text = _LATEX_UNIT.sub(_spell_command, text)
    text = text.translate(_CLEANED)
    return re.sub(r"\s+(?=\^)", "", " ".join(text.split()))


def is_product(rest: str) -> bool:
    """Whether what directly follows a number is variables rather than a unit: `2ab` and `3x`, not `2cm`."""
    match = _ATTACHED.match(rest)
    return match is not None and parse_unit(spell(rest)) is None


def _spell_command(match: re.Match[str]) -> str:
    command = re.sub(r"[\\^{} ]", "", match[0])
    return "°" + command[4:] if command.startswith("circ") else _SPELLED[command]


def _may_be_unit(unit: str, *, attached: bool, plain: bool, letters: bool) -> bool:
    """`\\pi m` and `(a+b)mg` are products; `5 m`, `\\pi cm` and `5%` have a unit."""
    name = unit.rstrip(". ")
    if not name[0].isalpha() or not name[0].isascii():
        return True
    if len(name) == 1:
        return plain and not attached if not letters else plain or not attached
    return not attached or plain or name != "mg"


def _is_plain(value: str) -> bool:
    return value.lstrip("+-−").replace(".", "").replace(",", "").isdecimal()


@lru_cache(2_000)
def _parse(text: str) -> Unit | None:
    if not text or len(text) > UNIT_CHARACTERS:
        return None
    factor, exponents = Fraction(1), dict[str, int]()
    position, sign, power = 0, 1, 1
    last: Unit | None = None
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None or match.end() == position:
            return None
        position = match.end()
        if match["per"]:
            sign = -1
        elif name := match["name"]:
            if name.lower() in _POWER_WORD:
                power = _POWER_WORD[name.lower()]
                continue
            if name.lower() in _AFTER_POWER and last is not None:
                power = _AFTER_POWER[name.lower()] - 1
            else:
                last = _named(name)
            if last is None:
                return None
            power *= sign * int(match["power"] or 1)
            factor *= last.factor**power
            for base, exponent in last.exponents:
                exponents[base] = exponents.get(base, 0) + exponent * power
            power = 1
    if last is None or power != 1:
        return None
    return Unit(factor, tuple(sorted((base, exponent) for base, exponent in exponents.items() if exponent)))


def _named(name: str) -> Unit | None:
    names = _names()
    name = _IRREGULAR.get(name.lower(), name)
    singular = name[:-1] if len(name) > 3 and name.endswith("s") else name
    return next(
        (names[each] for each in (name, singular, name.lower(), singular.lower()) if each in names), None
    )


@lru_cache(1)
def _names() -> dict[str, Unit]:
    """Every unit by its name, with prefixes."""
    units: dict[str, Unit] = {}
    for spellings, (factor, base) in _METRIC.items():
        unit = Unit(Fraction(factor), _exponents(base))
        for name in spellings.split():
            units[name] = unit
            for prefix, exponent in _PREFIXES.items():
                units[prefix + name] = Unit(unit.factor * Fraction(10) ** exponent, unit.exponents)
    for symbol, name in _METRIC_SYMBOLS.items():
        unit = units[symbol] = units[name]
        for prefix, exponent in _SHORT_PREFIXES.items():
            units[prefix + symbol] = Unit(unit.factor * Fraction(10) ** exponent, unit.exponents)
    for spellings, (factor, base) in _OTHER.items():
        for name in spellings.split():
            units[name] = Unit(Fraction(factor), _exponents(base))
    return units


def _exponents(base: str) -> tuple[tuple[str, int], ...]:
    """ "kg m2 s-2" as exponents by base unit."""
    if not any(letter.isdigit() for letter in base) and base not in ("s A",):
        return ((base, 1),) if base else ()
    matches = (re.fullmatch(r"([A-Za-z]+)(-?\d)?", part) for part in base.split())
    return tuple(sorted((match[1], int(match[2] or 1)) for match in matches if match))
