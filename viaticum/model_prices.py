"""Prices as an entry of the catalogue states them, in dollars for a million tokens.

Leaves out the price of a call, in nano-dollars (`viaticum.money`).
"""

from __future__ import annotations

from decimal import Decimal
from typing import Annotated, Any

from pydantic import Field, PositiveInt, SerializerFunctionWrapHandler, model_serializer

from viaticum.money import Tier, nanousd
from viaticum.weight_sources import FrozenModel

Dollars = Annotated[Decimal, Field(ge=0, allow_inf_nan=False)]

PRICE_DETAILS = (
    "cached_input_price",
    "reasoning_price",
    "cache_write_price",
    "second_price",
    "price_tiers",
    "price_version",
)
PRICES = ("input_price", "output_price", *PRICE_DETAILS)  # the fields of a price
LITELLM_PRICES = "litellm"  # the price_version that asks for the prices in LiteLLM's own list


class PriceTier(FrozenModel):
    """Prices for calls that read more than `above_tokens`, in dollars for a million tokens."""

    above_tokens: PositiveInt
    input_price: Dollars
    output_price: Dollars
    cached_input_price: Dollars | None = None
    reasoning_price: Dollars | None = None
    cache_write_price: Dollars | None = None

    @model_serializer(mode="wrap")
    def _without_later_fields(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        dumped: dict[str, Any] = handler(self)
        return {
            name: value for name, value in dumped.items() if name != "cache_write_price" or value is not None
        }

    @property
    def tier(self) -> Tier:
        return Tier(
            self.above_tokens,
            nanousd(self.input_price),
            nanousd(self.output_price),
            optional_nanousd(self.cached_input_price),
            optional_nanousd(self.reasoning_price),
            optional_nanousd(self.cache_write_price),
        )


def optional_nanousd(dollars: Decimal | None) -> int | None:
    return None if dollars is None else nanousd(dollars)
