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


@dataclass(frozen=True, slots=True)
class Price:
    """What tokens of one model cost, in integer nano-dollars for a million tokens."""

    input_nanousd_per_million: int
    output_nanousd_per_million: int

    def __post_init__(self) -> None:
        if not all(
            isinstance(n, int) for n in (self.input_nanousd_per_million, self.output_nanousd_per_million)
        ):
            raise InputError(
                f"a price is an integer of nano-dollars: {self}; Price.per_million() reads dollars"
            )
        if self.input_nanousd_per_million < 0 or self.output_nanousd_per_million < 0:
            raise InputError(f"a price is never negative: {self}")

    @classmethod
    def per_million(
        cls, input_usd: str | int | float | Decimal, output_usd: str | int | float | Decimal
    ) -> Price:
        """A price quoted the way vendors do, in dollars for a million tokens."""
        return cls(nanousd(input_usd), nanousd(output_usd))

    def cost(self, input_tokens: int, output_tokens: int) -> int:
        """Nano-dollars for so many tokens, rounded up, so that a sum of parts never falls below the whole."""
        total = (
            input_tokens * self.input_nanousd_per_million + output_tokens * self.output_nanousd_per_million
        )
        return -(-total // TOKENS_PER_MILLION)
