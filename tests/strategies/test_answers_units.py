"""Units: separated from values, told apart, and not taken from products of variables."""

from __future__ import annotations

import pytest

from viaticum.strategies.answers.numbers import whole_number
from viaticum.strategies.answers.units import parse_unit, split_unit


@pytest.mark.parametrize(
    ("text", "value", "unit"),
    [
        (r"48\sqrt{5}cm^{3}", r"48\sqrt{5}", "cubic centimeters"),
        (r"6\pi\text{ mm}", r"6\pi", "mm"),
        (r"19.6 \, \mathrm{m/s^2}", "19.6", "meters per second squared"),
        ("7 km/h", "7", "kilometres per hour"),
        (r"\$12", "12", "dollars"),
        ("-$12", "-12", "USD"),
        ("12 cents", "12", "¢"),
        (r"30^\circ", "30", "degrees"),
        (r"18^\circ C", "18", "°C"),
        (r"85\%", "85", "percent"),
        (r"14\mbox{ ft}^2", "14", "square feet"),
        ("9 p.m.", "9", "pm"),
        ("8m", "8", "meters"),
    ],
)
def test_a_value_and_its_unit(text: str, value: str, unit: str) -> None:
    assert split_unit(text) == (value, parse_unit(unit))
    assert parse_unit(unit) is not None


@pytest.mark.parametrize("text", ["3ab", "4x", r"3\pi r", "8 apples", "Rome", "$9$", "", "km", "6mg q"])
def test_what_has_no_unit(text: str) -> None:
    assert split_unit(text) == (text, None)


def test_a_letter_after_a_formula_is_a_variable_unless_it_is_marked_as_text() -> None:
    assert split_unit(r"7\pi m", letters=False) == (r"7\pi m", None)
    assert split_unit("7m", letters=False) == ("7m", None)
    assert split_unit(r"7\pi \text{ m}", letters=False) == (r"7\pi", parse_unit("m"))


def test_units_differ_by_factor_and_dimension() -> None:
    assert parse_unit("km") != parse_unit("m")
    assert parse_unit("dollar") != parse_unit("cent")
    assert parse_unit("cm^2") != parse_unit("cm")
    assert parse_unit("am") != parse_unit("pm")
    assert parse_unit("N") == parse_unit("kg m/s^2")
    assert parse_unit("furlongs per fortnight") is None


def test_a_product_of_variables_is_no_number() -> None:
    assert whole_number("3ab") is None
    assert whole_number("3 ab") == whole_number("3rd") == whole_number("3cm") == 3
