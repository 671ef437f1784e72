"""Money: dollars in, integers kept, text out, nothing lost on the way."""

from __future__ import annotations

from decimal import Decimal, localcontext

import pytest
from hypothesis import given
from hypothesis import strategies as st

from viaticum.errors import InputError
from viaticum.money import MAX_NANOUSD, Price, Tier, format_usd, nanousd, short_usd, usd_digits


@pytest.mark.parametrize(
    ("dollars", "nano"),
    [
        ("0.002", 2_000_000),
        ("$5", 5_000_000_000),
        (0.1, 100_000_000),
        (3, 3_000_000_000),
        (Decimal("-2.5"), -2_500_000_000),
        (" 1e-9 ", 1),
        ("0.0000000005", 0),  # half to even
        ("0.0000000015", 2),
        ("1e-999999999", 0),
        ("9223372036", 9_223_372_036_000_000_000),
    ],
)
def test_dollars_become_nano_dollars(dollars: str | int | float | Decimal, nano: int) -> None:
    assert nanousd(dollars) == nano


@pytest.mark.parametrize(
    "dollars", ["", "five", "nan", "inf", True, None, "1e999999999", "9223372037", -(10**30)]
)
def test_what_is_no_amount_is_refused(dollars: str) -> None:
    with pytest.raises(InputError):
        nanousd(dollars)


@given(st.integers(-MAX_NANOUSD // 2, MAX_NANOUSD // 2))
def test_text_and_back_loses_nothing(amount: int) -> None:
    text = format_usd(amount)
    assert nanousd(text.replace("$", "")) == amount
    assert "e" not in text.lower()


def test_digits_have_no_exponent() -> None:
    assert [usd_digits(each) for each in (1, 0, 12_000_000_000, -1_500)] == [
        "0.000000001",
        "0",
        "12",
        "-0.0000015",
    ]


def test_the_callers_decimal_context_does_not_matter() -> None:
    with localcontext() as context:
        context.prec = 3
        assert nanousd("123456789.123456789") == 123_456_789_123_456_789
        assert format_usd(123_456_789_123_456_789) == "$123456789.123456789"


tokens = st.integers(0, 10**18)


@given(tokens, tokens, tokens, tokens, st.integers(0, 10**15), st.integers(0, 10**15))
def test_parts_never_cost_less_than_the_whole(a: int, b: int, c: int, d: int, read: int, made: int) -> None:
    price = Price(read, made)
    assert price.cost(a, b) + price.cost(c, d) >= price.cost(a + c, b + d)
    assert 0 <= price.cost(a, b) * 10**6 - (a * read + b * made) < 10**6


def test_a_price_is_quoted_in_dollars_for_a_million_tokens() -> None:
    price = Price.per_million("0.15", "0.60")
    assert price == Price(150_000_000, 600_000_000)
    assert price.cost(1_000_000, 0) == nanousd("0.15")
    assert price.cost(1, 0) == 150
    assert Price(1, 0).cost(1, 0) == 1  # a millionth of a nano-dollar still counts as one


@pytest.mark.parametrize("amounts", [(-1, 0), (0, -1), (0.5, 0), ("1", 0)])
def test_a_price_is_a_whole_number_and_never_negative(amounts: tuple[int, int]) -> None:
    with pytest.raises(InputError):
        Price(*amounts)


RATES = st.integers(0, 10**12)
OPTIONAL = st.none() | RATES
COUNTS = st.integers(0, 10**6)


@st.composite
def prices(draw: st.DrawFn) -> Price:
    steps = sorted(draw(st.sets(COUNTS, max_size=3)))
    tiers = tuple(Tier(step, draw(RATES), draw(RATES), draw(OPTIONAL), draw(OPTIONAL)) for step in steps)
    return Price(draw(RATES), draw(RATES), draw(OPTIONAL), draw(OPTIONAL), draw(RATES), tiers)


@given(prices(), st.data())
def test_no_call_costs_more_than_the_worst_case(price: Price, data: st.DataObject) -> None:
    most_read, most_made, most_time = data.draw(COUNTS), data.draw(COUNTS), data.draw(COUNTS)
    read, made = data.draw(st.integers(0, most_read)), data.draw(st.integers(0, most_made))
    cost = price.cost(
        read,
        made,
        cached_input_tokens=data.draw(st.integers(0, read)),
        reasoning_tokens=data.draw(st.integers(0, made)),
        milliseconds=data.draw(st.integers(0, most_time)),
    )
    assert 0 <= cost <= price.worst_cost(most_read, most_made, most_time)


def test_a_tier_prices_the_whole_call_above_its_length() -> None:
    price = Price(
        1_000_000,
        2_000_000,
        500_000,
        tiers=(Tier(100, 2_000_000, 4_000_000), Tier(200, 3_000_000, 6_000_000)),
    )
    assert price.cost(100, 10) == 100 + 20
    assert price.cost(100, 10, cached_input_tokens=50) == 50 + 25 + 20
    assert (
        price.cost(101, 10, cached_input_tokens=50) == 202 + 40
    )  # the tier names no price for cached tokens
    assert price.cost(201, 10) == 603 + 60
    assert price.worst_cost(201, 10) == 603 + 60


def test_seconds_are_billed_by_the_millisecond_rounded_up() -> None:
    price = Price(0, 0, nanousd_per_second=1000)
    assert [price.cost(0, 0, milliseconds=time) for time in (0, 1, 1500)] == [0, 1, 1500]
    assert Price(0, 0, nanousd_per_second=1).cost(0, 0, milliseconds=1) == 1


@pytest.mark.parametrize("steps", [(5, 5), (9, 5)])
def test_tiers_rise(steps: tuple[int, int]) -> None:
    with pytest.raises(InputError, match="tiers of a price rise"):
        Price(1, 1, tiers=tuple(Tier(step, 1, 1) for step in steps))


@pytest.mark.parametrize(
    ("amount", "text"),
    [
        (0, "$0"),
        (5, "$0.000000005"),
        (96_123, "$0.000096123"),
        (15_450, "$0.00001545"),
        (7_500, "$0.0000075"),
        (961_234, "$0.000961"),
        (-96_123.4, "-$0.000096123"),
        (20_000_000, "$0.02"),
        (300_000_000, "$0.30"),
        (214_321_000, "$0.214"),
        (999_999_999, "$1.00"),
        (12_345_678_901, "$12.35"),
        (-1_234_567_890_123, "-$1,234.57"),
    ],
)
def test_amounts_for_people_are_short(amount: float, text: str) -> None:
    assert short_usd(amount) == text


def test_tokens_written_into_a_cache_have_a_price_of_their_own() -> None:
    """Of a call of 100 prompt tokens 60 were written to the cache and 30 read from it."""
    price = Price(3_000_000, 0, 300_000, cache_write_nanousd_per_million=3_750_000)
    cost = price.cost(100, 0, cached_input_tokens=30, cache_write_tokens=60)
    assert cost == 10 * 3 + 9 + 225
    assert price.worst_cost(100, 0) == 375
    assert Price(3_000_000, 0).cost(100, 0, cache_write_tokens=60) == 300
    tier = Tier(50, 6_000_000, 0, None, None, 7_500_000)
    assert Price(3_000_000, 0, tiers=(tier,)).cost(100, 0, cache_write_tokens=100) == 750
    with pytest.raises(InputError, match="never negative"):
        Price(1, 1, cache_write_nanousd_per_million=-1)
