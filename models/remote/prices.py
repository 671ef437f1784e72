"""Prices of remote models: LiteLLM's list where an entry asks for it, and the check of what a call was said to cost.

LiteLLM's list is the file that its package ships: it is read without importing LiteLLM, which takes seconds, and never
fetched. Leaves out how prices become costs (`viaticum.money`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from decimal import Decimal
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from viaticum.catalogue import LITELLM_PRICES, Catalogue, ModelSpec, PriceTier
from viaticum.errors import MissingExtra, UnknownPrice
from viaticum.money import format_usd

TOLERANCE = 100  # a hundredth: what a reported cost may differ from ours before it is told
_FILE = "model_prices_and_context_window_backup.json"
_TIER = re.compile(r"input_cost_per_token_above_(\d+)k_tokens")


def with_litellm_prices(catalogue: Catalogue) -> Catalogue:
    """The catalogue, its entries without a price but with `price_version = "litellm"` priced from LiteLLM's list.

    Raises `UnknownPrice` where the list has no price for tokens of that model, or says that they are free.
    """
    asking = [
        spec for spec in catalogue.values() if spec.price is None and spec.price_version == LITELLM_PRICES
    ]
    return catalogue.with_models(*map(priced, asking)) if asking else catalogue


def priced(spec: ModelSpec) -> ModelSpec:
    """The entry with LiteLLM's prices: cached and reasoning tokens and long prompts among them."""
    listed = _listed(spec.litellm_model or "")
    if not listed.get("input_cost_per_token") and not listed.get("output_cost_per_token"):
        raise UnknownPrice(
            f"{spec.name}: litellm's list has no price for {spec.litellm_model!r}; give input_price and "
            "output_price in your catalogue (0 if it is free)"
        )
    tiers = [
        PriceTier(above_tokens=int(match[1]) * 1000, **_rates(listed, f"_above_{match[1]}k_tokens"))
        for match in map(_TIER.fullmatch, listed)
        if match
    ]
    fields = {**_rates(listed, ""), "price_tiers": tuple(sorted(tiers, key=lambda tier: tier.above_tokens))}
    return ModelSpec.model_validate({**spec.model_dump(), **fields})


def _rates(listed: Mapping[str, Decimal], suffix: str) -> dict[str, Decimal]:
    """Dollars for a million tokens, under our names; a tier's that are not listed are those of short prompts."""
    names = {
        "input_price": "input_cost_per_token",
        "output_price": "output_cost_per_token",
        "cached_input_price": "cache_read_input_token_cost",
        "reasoning_price": "output_cost_per_reasoning_token",
    }
    found = {ours: listed.get(theirs + suffix, listed.get(theirs)) for ours, theirs in names.items()}
    found["output_price"] = found["output_price"] or Decimal(0)
    found["input_price"] = found["input_price"] or Decimal(0)
    return {name: rate * 1_000_000 for name, rate in found.items() if rate is not None}


def _listed(litellm_model: str) -> dict[str, Any]:
    prices = _list()
    found: dict[str, Any] = prices.get(litellm_model) or prices.get(litellm_model.partition("/")[2]) or {}
    return found


@cache
def _list() -> dict[str, Any]:
    package = find_spec("litellm")
    if package is None or package.origin is None:
        raise MissingExtra("litellm", "remote")
    text = (Path(package.origin).parent / _FILE).read_text(encoding="utf-8")
    prices: dict[str, Any] = json.loads(text, parse_float=Decimal)
    return prices


def difference(reported: int | None, ours: int | None) -> str | None:
    """What to tell where the provider's cost of a call and ours differ by more than 1%; amounts in nano-dollars."""
    if reported is None or ours is None or abs(reported - ours) * TOLERANCE <= max(reported, ours):
        return None
    return (
        f"the provider says that this call cost {format_usd(reported)}, the catalogue's prices say "
        f"{format_usd(ours)}; check the prices in the catalogue"
    )
