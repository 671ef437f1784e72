"""When two numbers and two units are equal.

Integers and fractions are compared exactly; a decimal equals what it is rounded from. Leaves out reading them
(`numbers`, `units`).
"""

from __future__ import annotations

from fractions import Fraction

from viaticum.strategies.answers.numbers import decimal_places
from viaticum.strategies.answers.units import Unit

TOLERANCE = Fraction(1, 10**6)  # relative, between a decimal and what it is rounded from
FLOAT_ERROR = Fraction(1, 10**12)  # relative, between two decimals
_TEMPERATURES = frozenset({"celsius", "fahrenheit", "degree"})


def same_number(x: Fraction, y: Fraction) -> bool:
    """Exactly equal, or one is a decimal to which the other is rounded or cut off.

    0.333333 is 1/3, and 0.30000000000000004 is 0.3; 123456.7 is not 123456.8, and no integer is another.
    """
    if x == y:
        return True
    places = [decimals for each in (x, y) if (decimals := decimal_places(each)) is not None]
    if not any(places):
        return False
    error, size = abs(x - y), max(abs(x), abs(y))
    return error <= FLOAT_ERROR * size or (
        error <= TOLERANCE * size and error < Fraction(1, 10 ** max(2, min(places)))
    )


def same_quantity(x: Fraction, unit: Unit | None, y: Fraction, other: Unit | None, *, convert: bool) -> bool:
    """Whether two numbers with units are equal; `convert` takes 50% for 0.5 too, and 5 km for 5000 m."""
    if convert and unit != other:
        if unit and other and unit.exponents == other.exponents:
            return same_number(x * unit.factor, y * other.factor)
        factors = [each.factor if each and each.is_percent else 1 for each in (unit, other)]
        if None in (unit, other) and same_number(x * factors[0], y * factors[1]):
            return True
    return same_number(x, y) and may_be_same(unit, other)


def may_be_same(unit: Unit | None, other: Unit | None) -> bool:
    if unit is None or other is None or unit == other:
        return True
    bases = [{base for base, _ in each.exponents} for each in (unit, other)]
    if any("unit" in each for each in bases):
        return True
    return {"degree"} in bases and all(each <= _TEMPERATURES for each in bases)
