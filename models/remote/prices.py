"""LiteLLM's list of models: their prices where an entry asks for them, and which think by default.

The list is the file that LiteLLM's package ships. It is read without importing LiteLLM, which takes seconds,
and is never fetched. Checks costs that providers report, and that cache writes have a price. Leaves out how
prices become costs (`viaticum.money`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from decimal import Decimal
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from viaticum.catalogue import Catalogue
from viaticum.errors import InputError, MissingExtra, UnknownPrice
from viaticum.model_prices import LITELLM_PRICES
from viaticum.model_spec import BATCH_DISCOUNT, ModelSpec
from viaticum.money import Price, format_usd

TOLERANCE = 100  # a reported cost may differ from ours by 1 / TOLERANCE before a warning
HOUR_FACTOR = 2  # Anthropic's price of a token written for an hour, in those of an input token
_FILE = "model_prices_and_context_window_backup.json"
_SEARCHES = re.compile(r"search-(?:preview|api)|deep-research|-online$")  # in names of models that search
_TIER = re.compile(r"input_cost_per_token_above_(\d+)k_tokens")


def with_litellm_prices(catalogue: Catalogue) -> Catalogue:
    """Return the catalogue with LiteLLM's prices for unpriced entries with `price_version = "litellm"`.

    An entry whose price is not to be found stays as it is: the others can be used without it.
    """
    priced = []
    for spec in catalogue.values():
        if spec.price is None and spec.price_version == LITELLM_PRICES:
            with suppress(UnknownPrice, MissingExtra):
                priced.append(with_litellm_price(spec))
    return catalogue.with_models(*priced) if priced else catalogue


def with_litellm_price(spec: ModelSpec) -> ModelSpec:
    """Return the entry with LiteLLM's prices, also of cached and reasoning tokens and of long prompts.

    Raises:
        UnknownPrice: the list has no price for the tokens of the model, or lists them as free, or each call
            costs more than its tokens.
        MissingExtra: LiteLLM, whose list it is, is not installed.
    """
    listed = list_entry(spec.litellm_model or "")
    if not listed.get("input_cost_per_token") and not listed.get("output_cost_per_token"):
        raise UnknownPrice(
            f"{spec.name}: litellm's list has no price for {spec.litellm_model!r}; give input_price and "
            "output_price in your catalogue (0 if it is free)"
        )
    if has_fee(spec.litellm_model or "", listed):
        raise UnknownPrice(
            f"{spec.name}: {spec.litellm_model!r} takes a fee for what it searches, beside the prices of "
            "tokens in litellm's list; give input_price and output_price in your catalogue that cover it"
        )
    return ModelSpec.model_validate({**spec.model_dump(), **listed_rates(listed)})


def has_fee(model: str, listed: Mapping[str, Any]) -> bool:
    """Whether a call of a model costs a fee beside its tokens whatever is asked of it, such as for searches.

    Other models of the list have a price of searches too, which they make where a request has that tool.
    """
    is_answer_engine = listed.get("litellm_provider") == "perplexity"
    always = is_answer_engine and bool(listed.get("search_context_cost_per_query"))
    return always or bool(listed.get("input_cost_per_request")) or _SEARCHES.search(model) is not None


def listed_rates(listed: Mapping[str, Any]) -> dict[str, Any]:
    """The prices of an entry of the list, as fields of a catalogue entry; {} where it has none."""
    if "input_cost_per_token" not in listed and "output_cost_per_token" not in listed:
        return {}
    tiers = [
        {"above_tokens": int(match[1]) * 1000, **_rates(listed, f"_above_{match[1]}k_tokens")}
        for match in map(_TIER.fullmatch, listed)
        if match
    ]
    fields: dict[str, Any] = _rates(listed, "")
    if discount := _batch_discount(listed):
        fields["batch_discount"] = discount
    if tiers:
        fields["price_tiers"] = sorted(tiers, key=lambda tier: tier["above_tokens"])
    return fields


def _batch_discount(listed: Mapping[str, Any]) -> Decimal | None:
    """What a batch saves of the price, the least of input and output; None where it is the usual half."""
    shares = [
        1 - Decimal(listed[f"{name}_batches"]) / Decimal(listed[name])
        for name in ("input_cost_per_token", "output_cost_per_token")
        if listed.get(name) and listed.get(f"{name}_batches") is not None
    ]
    found = round(min(shares), 4) if shares else BATCH_DISCOUNT
    return found if found != BATCH_DISCOUNT and 0 <= found < 1 else None


def _rates(listed: Mapping[str, Decimal], suffix: str) -> dict[str, Decimal]:
    """Dollars per million tokens, by our names. A tier's missing rates are those of short prompts."""
    names = {
        "input_price": "input_cost_per_token",
        "output_price": "output_cost_per_token",
        "cached_input_price": "cache_read_input_token_cost",
        "reasoning_price": "output_cost_per_reasoning_token",
        "cache_write_price": "cache_creation_input_token_cost",
    }
    rates = {ours: listed.get(theirs + suffix, listed.get(theirs)) for ours, theirs in names.items()}
    if not rates["cache_write_price"]:  # a list that says 0 means no price of its own
        del rates["cache_write_price"]
    rates["output_price"] = rates["output_price"] or Decimal(0)
    rates["input_price"] = rates["input_price"] or Decimal(0)
    return {name: rate * 1_000_000 for name, rate in rates.items() if rate is not None}


def thinks_by_default(spec: ModelSpec) -> bool:
    """Whether LiteLLM's list says that a remote model thinks where nobody asks it to, as o3 and gpt-5 do.

    Claude thinks only where it is asked. An entry that says what its thoughts look like is not looked up.
    """
    name = spec.litellm_model or ""
    if spec.kind != "remote" or spec.thinking != "auto" or "claude" in name or find_spec("litellm") is None:
        return False
    listed = list_entry(name) or list_entry(name.rpartition("/")[2])
    return bool(listed.get("supports_reasoning")) and listed.get("default_reasoning_effort") != "none"


def list_entry(litellm_model: str) -> dict[str, Any]:
    """What the list says of a model; {} where it does not know it.

    Raises:
        MissingExtra: LiteLLM is not installed.
    """
    prices = _price_list()
    entry: dict[str, Any] = prices.get(litellm_model) or prices.get(litellm_model.partition("/")[2]) or {}
    return entry


def listed_names() -> list[str]:
    """The models of the list."""
    return [name for name in _price_list() if name != "sample_spec"]


@cache
def _price_list() -> dict[str, Any]:
    package = find_spec("litellm")
    if package is None or package.origin is None:
        raise MissingExtra("litellm", "remote")
    text = (Path(package.origin).parent / _FILE).read_text(encoding="utf-8")
    prices: dict[str, Any] = json.loads(text, parse_float=Decimal)
    return prices


def cost_mismatch(reported: int | None, computed: int | None) -> str | None:
    """Return a warning where two costs of a call, in nano-dollars, differ by more than 1%."""
    if (
        reported is None
        or computed is None
        or abs(reported - computed) * TOLERANCE <= max(reported, computed)
    ):
        return None
    return (
        f"the provider says that this call cost {format_usd(reported)}, the catalogue's prices say "
        f"{format_usd(computed)}; check the prices in the catalogue"
    )


def check_cache_writes(values: Any, price: Price | None, name: str) -> None:
    """Check that the price knows what it costs to write into the provider's cache, where a request does so.

    Raises:
        InputError: it has no price for that, or a lower one than that of an hour where an hour is asked for.
    """
    lifetimes = {str(mark.get("ttl", "5m")) for mark in _cache_marks(values)}
    if not lifetimes or price is None:
        return
    written = price.cache_write_nanousd_per_million
    if written is None:
        raise InputError(
            f"cache_control: the price of {name} has no cache_write_price; set it, to the price of input "
            "tokens where the provider takes no more for what it caches"
        )
    if lifetimes - {"5m"} and written < HOUR_FACTOR * price.input_nanousd_per_million:
        raise InputError(
            f"cache_control with ttl {', '.join(sorted(lifetimes - {'5m'}))}: tokens written for longer than "
            f"five minutes cost {HOUR_FACTOR} times as much as input tokens; set cache_write_price of "
            f"{name} to that, or leave ttl out"
        )


def may_write_cache(values: Any, price: Price | None) -> bool:
    """Whether the price covers all that a request marks for the provider's cache."""
    try:
        check_cache_writes(values, price, "")
    except InputError:
        return False
    return True


def _cache_marks(values: Any) -> Iterator[Mapping[str, Any]]:
    if isinstance(values, Mapping):
        for name, value in values.items():
            if name == "cache_control" and isinstance(value, Mapping):
                yield value
            elif name == "cachePoint":
                yield {}
            else:
                yield from _cache_marks(value)
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _cache_marks(value)
