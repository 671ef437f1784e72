"""Usage and prices as the JSON text that the ledger stores and hashes: the same values, the same text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from functools import lru_cache
from typing import Any

from viaticum.money import Price, Tier
from viaticum.types import TokenCount


def json_text(value: Any) -> str:
    return _encode(value)


_encode = json.JSONEncoder(sort_keys=True).encode


def usage_text(usage: Mapping[str, TokenCount]) -> str:
    return _usage_text(tuple(usage.items()))


@lru_cache(maxsize=4096)  # a call's usage is written with its hold and with two of its entries
def _usage_text(usage: tuple[tuple[str, TokenCount], ...]) -> str:
    return json_text({model: _stored_fields(count, 2) for model, count in usage})


def usage_from(text: str) -> dict[str, TokenCount]:
    return dict(_usage_from(text))


@lru_cache(maxsize=1024)  # every reserve of a call with the same limits writes the same
def _usage_from(text: str) -> tuple[tuple[str, TokenCount], ...]:
    return tuple((model, TokenCount(**count)) for model, count in json.loads(text).items())


def prices_text(prices: Mapping[str, Price]) -> str:
    return _prices_text(tuple(prices.items()))


@lru_cache(maxsize=64)  # every call writes the same few price lists
def _prices_text(prices: tuple[tuple[str, Price], ...]) -> str:
    return json_text({model: price_json(price) for model, price in prices})


def price_json(price: Price) -> dict[str, Any]:
    """Return the price as JSON values, without fields at their default."""
    values = _stored_fields(price, 2)
    if price.tiers:
        values["tiers"] = [_stored_fields(tier, 3) for tier in price.tiers]
    return values


def prices_from(text: str) -> dict[str, Price]:
    return dict(_prices_from(text))


@lru_cache(maxsize=64)  # every call reads the same few price lists
def _prices_from(text: str) -> tuple[tuple[str, Price], ...]:
    return tuple((model, _price_from(price)) for model, price in json.loads(text).items())


def _price_from(values: dict[str, Any]) -> Price:
    return Price(**{**values, "tiers": tuple(Tier(**tier) for tier in values.get("tiers", ()))})


def _stored_fields(record: TokenCount | Price | Tier, always: int) -> dict[str, Any]:
    """The first `always` fields, and those others that differ from their default."""
    values = [(name, getattr(record, name), default) for name, default in _DEFAULTS[type(record)]]
    return {
        name: value
        for number, (name, value, default) in enumerate(values)
        if number < always or value != default
    }


_DEFAULTS = {kind: [(each.name, each.default) for each in fields(kind)] for kind in (TokenCount, Price, Tier)}
