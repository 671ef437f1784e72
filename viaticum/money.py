"""Money as integers: nano-dollars, and the price of a token.

Leaves out budgets, ledgers and currencies: see `viaticum.budgets`. It sits on the ground floor because
the catalogue's prices need it too. A float never holds money: amounts enter as text, `Decimal` or a
number read through its shortest decimal form, and leave as integers or text.
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import ROUND_HALF_EVEN, Context, Decimal, InvalidOperation

from viaticum.errors import InputError

NANOUSD_PER_USD = 1_000_000_000
TOKENS_PER_MILLION = 1_000_000
MAX_NANOUSD = 2**63 - 1  # what an SQLite or Postgres integer column holds: 9.2 billion dollars
_ONE_NANOUSD = Decimal("1e-9")
_EXACT = Context(prec=40)  # digits enough for any amount in range, whatever the caller's context says


def nanousd(dollars: str | int | float | Decimal) -> int:
    """Dollars as integer nano-dollars, rounded half to even: `nanousd("0.002") == 2_000_000`.

    Raises `InputError` where `dollars` is not a finite number or does not fit 64 bits.
    """
    try:
        amount = Decimal(str(dollars).strip().removeprefix("$"))
        if not amount.is_finite():
            raise InvalidOperation
    except InvalidOperation:
        raise InputError(f"not an amount of dollars: {dollars!r}; write a number such as 0.002") from None
    # Compared before it is scaled: an exponent such as 1e999999 would overflow or fill the memory.
    if amount.copy_abs() > MAX_NANOUSD // NANOUSD_PER_USD:
        raise InputError(
            f"amount out of range: {dollars!r}; at most {MAX_NANOUSD // NANOUSD_PER_USD} dollars"
        )
    return int(amount.quantize(_ONE_NANOUSD, ROUND_HALF_EVEN, _EXACT).scaleb(9, _EXACT))


def format_usd(amount: int) -> str:
    """Nano-dollars as text, exact: `format_usd(2_000_000) == "$0.002"`."""
    whole, rest = divmod(abs(amount), NANOUSD_PER_USD)
    text = f"{whole}.{rest:09d}".rstrip("0").rstrip(".")
    return f"{'-' if amount < 0 else ''}${text}"


def short_usd(amount: float) -> str:
    """Nano-dollars as text for people: cents, and below a dollar three digits that count.

    `short_usd(12_345_678_901) == "$12.35"`, `short_usd(96_123) == "$0.0000961"`. For reading, not for adding up.
    """
    whole = round(amount)
    short = round(whole, 3 - len(str(abs(whole))))
    if abs(short) < NANOUSD_PER_USD // 100 or (abs(short) < NANOUSD_PER_USD and short % 10_000_000):
        return format_usd(short)
    cents = Decimal(whole).scaleb(-9).quantize(Decimal("0.01"), ROUND_HALF_EVEN, _EXACT)
    return f"{'-' if cents < 0 else ''}${abs(cents):,}"


@dataclass(frozen=True, slots=True)
class Tier:
    """Prices from a length of prompt on: they hold for the whole of a call that reads more than `above_tokens`."""

    above_tokens: int
    input_nanousd_per_million: int
    output_nanousd_per_million: int
    cached_nanousd_per_million: int | None = None
    reasoning_nanousd_per_million: int | None = None

    def __post_init__(self) -> None:
        _check_rates(self, self.above_tokens)


@dataclass(frozen=True, slots=True)
class Price:
    """What one model costs: integer nano-dollars for a million tokens, and for a second where time is billed.

    cached: input tokens that the provider had kept; reasoning: output tokens that were thought and not
    shown. None: as any other input or output token. tiers: in order of `above_tokens`. version: which price
    list this is from, as its owner names it; it is kept with every entry.
    """

    input_nanousd_per_million: int
    output_nanousd_per_million: int
    cached_nanousd_per_million: int | None = None
    reasoning_nanousd_per_million: int | None = None
    nanousd_per_second: int = 0
    tiers: tuple[Tier, ...] = ()
    version: str = ""

    def __post_init__(self) -> None:
        _check_rates(self, self.nanousd_per_second)
        steps = [tier.above_tokens for tier in self.tiers]
        if steps != sorted(set(steps)):
            raise InputError(f"tiers of a price rise, each above another length: {steps}; sort them")

    @classmethod
    def per_million(
        cls, input_usd: str | int | float | Decimal, output_usd: str | int | float | Decimal
    ) -> Price:
        """A price quoted the way vendors do, in dollars for a million tokens."""
        return cls(nanousd(input_usd), nanousd(output_usd))

    def cost(
        self,
        input_tokens: int,
        output_tokens: int,
        *,
        cached_input_tokens: int = 0,
        reasoning_tokens: int = 0,
        milliseconds: int = 0,
    ) -> int:
        """Nano-dollars for one call, rounded up, so that a sum of parts never falls below the whole.

        Cached tokens are among the input tokens, reasoning tokens among the output tokens.
        """
        rates = self._rates(input_tokens)
        read, made = rates.input_nanousd_per_million, rates.output_nanousd_per_million
        cached, thought = rates.cached_nanousd_per_million, rates.reasoning_nanousd_per_million
        total = (
            (input_tokens - cached_input_tokens) * read
            + cached_input_tokens * (read if cached is None else cached)
            + (output_tokens - reasoning_tokens) * made
            + reasoning_tokens * (made if thought is None else thought)
        )
        return self._rounded_up(total, milliseconds)

    def worst_cost(self, input_tokens: int, output_tokens: int, milliseconds: int = 0) -> int:
        """The most that a call of at most so many tokens can cost, whatever is cached or thought, in any tier."""
        reachable: list[Price | Tier] = [
            self,
            *(tier for tier in self.tiers if tier.above_tokens < input_tokens),
        ]
        read = max(
            max(each.input_nanousd_per_million, each.cached_nanousd_per_million or 0) for each in reachable
        )
        made = max(
            max(each.output_nanousd_per_million, each.reasoning_nanousd_per_million or 0)
            for each in reachable
        )
        return self._rounded_up(input_tokens * read + output_tokens * made, milliseconds)

    def _rates(self, input_tokens: int) -> Price | Tier:
        reached = [tier for tier in self.tiers if input_tokens > tier.above_tokens]
        return reached[-1] if reached else self

    def _rounded_up(self, millionths: int, milliseconds: int) -> int:
        millionths += milliseconds * self.nanousd_per_second * (TOKENS_PER_MILLION // 1000)
        return -(-millionths // TOKENS_PER_MILLION)


def _check_rates(price: Price | Tier, other: int) -> None:
    rates = [price.input_nanousd_per_million, price.output_nanousd_per_million, other]
    rates += [
        rate
        for rate in (price.cached_nanousd_per_million, price.reasoning_nanousd_per_million)
        if rate is not None
    ]
    if not all(isinstance(rate, int) for rate in rates):
        raise InputError(f"a price is an integer of nano-dollars: {price}; Price.per_million() reads dollars")
    if min(rates) < 0:
        raise InputError(f"a price is never negative: {price}")
