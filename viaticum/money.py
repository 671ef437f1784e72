"""Money as integer nano-dollars, and token prices.

Leaves out budgets, ledgers and currencies: see `viaticum.budgets`. It is part of the core because the
catalogue's prices need it too. A float never holds money: amounts enter as text, `Decimal` or a number read
through its shortest decimal form, and leave as integers or text.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from decimal import ROUND_CEILING, ROUND_HALF_EVEN, Context, Decimal, InvalidOperation
from typing import Any, TypeVar

from viaticum.errors import InputError

NANOUSD_PER_USD = 1_000_000_000
TOKENS_PER_MILLION = 1_000_000
MAX_NANOUSD = 2**63 - 1  # the largest integer of an SQLite or Postgres column: 9.2 billion dollars
WHOLE_BELOW = 100_000  # nano-dollars that are displayed with every digit: at most five
_ONE_NANOUSD = Decimal("1e-9")
_EXACT = Context(prec=40)  # enough digits for any amount in range, independent of the caller's context


def nanousd(dollars: str | int | float | Decimal) -> int:
    """Convert dollars to integer nano-dollars, rounded half to even: `nanousd("0.002") == 2_000_000`.

    Raises:
        InputError: `dollars` is not a finite number or does not fit 64 bits.
    """
    try:
        amount = Decimal(str(dollars).strip().removeprefix("$"))
        if not amount.is_finite():
            raise InvalidOperation
    except InvalidOperation:
        raise InputError(f"not an amount of dollars: {dollars!r}; write a number such as 0.002") from None
    # Compared before scaling: an exponent such as 1e999999 would overflow or exhaust memory.
    if amount.copy_abs() > MAX_NANOUSD // NANOUSD_PER_USD:
        raise InputError(
            f"amount out of range: {dollars!r}; at most {MAX_NANOUSD // NANOUSD_PER_USD} dollars"
        )
    return int(amount.quantize(_ONE_NANOUSD, ROUND_HALF_EVEN, _EXACT).scaleb(9, _EXACT))


def budget_nanousd(dollars: str | int | float | Decimal) -> int:
    """Convert the dollars of a budget, which are above zero.

    Raises:
        InputError: as `nanousd`, or the amount is zero or less.
    """
    amount = nanousd(dollars)
    if amount <= 0:
        raise InputError(f"a budget is above zero dollars, got {dollars}")
    return amount


def format_usd(amount: int) -> str:
    """Format nano-dollars exactly: `format_usd(2_000_000) == "$0.002"`."""
    sign = "-" if amount < 0 else ""
    return f"{sign}${usd_digits(abs(amount))}"


def usd_digits(amount: int) -> str:
    """Nano-dollars as dollars in digits alone, as JSON has them: `usd_digits(2_000_000) == "0.002"`."""
    whole, rest = divmod(abs(amount), NANOUSD_PER_USD)
    text = f"{whole}.{rest:09d}".rstrip("0").rstrip(".")
    return f"-{text}" if amount < 0 else text


def as_usd(amount: int) -> Decimal:
    """Nano-dollars as dollars, exactly: `as_usd(2_000_000) == Decimal("0.002")`."""
    return Decimal(usd_digits(amount))


def short_usd(amount: float) -> str:
    """Format nano-dollars for display: in cents, below a dollar with three significant digits.

    Below a hundredth of a cent, prices of single tokens and calls, every digit is kept.
    `short_usd(12_345_678_901) == "$12.35"`, `short_usd(961_234) == "$0.000961"`,
    `short_usd(15_450) == "$0.00001545"`. Not for sums.
    """
    whole = round(amount)
    if abs(whole) < WHOLE_BELOW:
        return format_usd(whole)
    short = round(whole, 3 - len(str(abs(whole))))
    if abs(short) < NANOUSD_PER_USD // 100 or (abs(short) < NANOUSD_PER_USD and short % 10_000_000):
        return format_usd(short)
    cents = Decimal(whole).scaleb(-9).quantize(Decimal("0.01"), ROUND_HALF_EVEN, _EXACT)
    return f"{'-' if cents < 0 else ''}${abs(cents):,}"


@dataclass(frozen=True, slots=True)
class Tier:
    """Prices of a whole call whose prompt is longer than `above_tokens`."""

    above_tokens: int
    input_nanousd_per_million: int
    output_nanousd_per_million: int
    cached_nanousd_per_million: int | None = None
    reasoning_nanousd_per_million: int | None = None
    cache_write_nanousd_per_million: int | None = None

    def __post_init__(self) -> None:
        _check_rates(self, self.above_tokens)


@dataclass(frozen=True, slots=True)
class Price:
    """Price of one model in integer nano-dollars per million tokens, and per second where time is billed.

    Attributes:
        cached_nanousd_per_million: for input tokens from the provider's cache; None: as other input tokens.
        reasoning_nanousd_per_million: for hidden reasoning tokens; None: as other output tokens.
        tiers: prices of longer prompts, sorted by `above_tokens`.
        version: name of the price list, stored with every entry.
        cache_write_nanousd_per_million: for input tokens that the provider writes into its cache; None: as
            other input tokens.
    """

    input_nanousd_per_million: int
    output_nanousd_per_million: int
    cached_nanousd_per_million: int | None = None
    reasoning_nanousd_per_million: int | None = None
    nanousd_per_second: int = 0
    tiers: tuple[Tier, ...] = ()
    version: str = ""
    cache_write_nanousd_per_million: int | None = None

    def __post_init__(self) -> None:
        _check_rates(self, self.nanousd_per_second)
        steps = [tier.above_tokens for tier in self.tiers]
        if steps != sorted(set(steps)):
            raise InputError(f"tiers of a price rise, each above another length: {steps}; sort them")

    @classmethod
    def per_million(
        cls, input_usd: str | int | float | Decimal, output_usd: str | int | float | Decimal
    ) -> Price:
        """A price as vendors quote it, in dollars per million tokens."""
        return cls(nanousd(input_usd), nanousd(output_usd))

    def discounted(self, discount: Decimal) -> Price:
        """The price without a share of every rate, each rounded up. discount: from 0 to below 1."""
        return replace(
            _discounted(self, discount), tiers=tuple(_discounted(tier, discount) for tier in self.tiers)
        )

    def cost(
        self,
        input_tokens: int,
        output_tokens: int,
        *,
        cached_input_tokens: int = 0,
        reasoning_tokens: int = 0,
        milliseconds: int = 0,
        cache_write_tokens: int = 0,
    ) -> int:
        """Cost of one call in nano-dollars, rounded up, so that a sum of parts is never less than the whole.

        `input_tokens` include those read from a cache and written to it, `output_tokens` the reasoning ones.
        """
        rates = self._rates(input_tokens)
        input_rate, output_rate = rates.input_nanousd_per_million, rates.output_nanousd_per_million
        cached_rate, reasoning_rate = rates.cached_nanousd_per_million, rates.reasoning_nanousd_per_million
        write_rate = rates.cache_write_nanousd_per_million
        total = (
            (input_tokens - cached_input_tokens - cache_write_tokens) * input_rate
            + cache_write_tokens * (input_rate if write_rate is None else write_rate)
            + cached_input_tokens * (input_rate if cached_rate is None else cached_rate)
            + (output_tokens - reasoning_tokens) * output_rate
            + reasoning_tokens * (output_rate if reasoning_rate is None else reasoning_rate)
        )
        return self._rounded_up(total, milliseconds)

    def worst_cost(self, input_tokens: int, output_tokens: int, milliseconds: int = 0) -> int:
        """Upper bound of the cost of a call of at most so many tokens: any caching, reasoning and tier."""
        reachable: list[Price | Tier] = [
            self,
            *(tier for tier in self.tiers if tier.above_tokens < input_tokens),
        ]
        input_rate = max(
            max(
                each.input_nanousd_per_million,
                each.cached_nanousd_per_million or 0,
                each.cache_write_nanousd_per_million or 0,
            )
            for each in reachable
        )
        output_rate = max(
            max(each.output_nanousd_per_million, each.reasoning_nanousd_per_million or 0)
            for each in reachable
        )
        return self._rounded_up(input_tokens * input_rate + output_tokens * output_rate, milliseconds)

    def _rates(self, input_tokens: int) -> Price | Tier:
        reached = [tier for tier in self.tiers if input_tokens > tier.above_tokens]
        return reached[-1] if reached else self

    def _rounded_up(self, millionths: int, milliseconds: int) -> int:
        millionths += milliseconds * self.nanousd_per_second * (TOKENS_PER_MILLION // 1000)
        return -(-millionths // TOKENS_PER_MILLION)


Rates = TypeVar("Rates", Price, Tier)


def _discounted(rates: Rates, discount: Decimal) -> Rates:
    def reduced(rate: int | None) -> Any:
        return None if rate is None else int((rate * (1 - discount)).to_integral_value(ROUND_CEILING))

    return replace(
        rates,
        **{each.name: reduced(getattr(rates, each.name)) for each in fields(rates) if "nanousd" in each.name},
    )


def as_price(given: Price | tuple[str | int | float | Decimal, str | int | float | Decimal]) -> Price:
    """A price, or dollars per million input and output tokens as one."""
    return given if isinstance(given, Price) else Price.per_million(*given)


def _check_rates(price: Price | Tier, other: int) -> None:
    rates = [price.input_nanousd_per_million, price.output_nanousd_per_million, other]
    rates += [
        rate
        for rate in (
            price.cached_nanousd_per_million,
            price.reasoning_nanousd_per_million,
            price.cache_write_nanousd_per_million,
        )
        if rate is not None
    ]
    if not all(isinstance(rate, int) and not isinstance(rate, bool) for rate in rates):
        raise InputError(f"a price is an integer of nano-dollars: {price}; Price.per_million() reads dollars")
    if min(rates) < 0:
        raise InputError(f"a price is never negative: {price}")
