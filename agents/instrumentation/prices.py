"""The price of a model that a request names, and the tokenizer that counts for it.

A price is, in this order: one that was given by name; that of the catalogue's entry for the same server and
model; LiteLLM's, where the request goes to a provider that its list has. The list holds for providers' own
servers alone, so a proxy's models need a price of their own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any
from urllib.parse import urlsplit

from viaticum.agents.instrumentation.requests import ModelCall, with_margin
from viaticum.catalogue import Catalogue
from viaticum.errors import InputError, MissingExtra, UnknownPrice
from viaticum.model_spec import ModelSpec
from viaticum.models.remote.prices import list_entry, with_litellm_price, with_litellm_prices
from viaticum.models.remote.prompt_tokens import TOKENIZERS, named_counter
from viaticum.money import Price, nanousd

# LiteLLM's names of providers, by the hosts of their servers.
_PROVIDERS = tuple(
    (re.compile(pattern), provider)
    for pattern, provider in (
        (r"^(.+\.)?api\.openai\.com$", "openai"),
        (r"^api\.anthropic\.com$", "anthropic"),
        (r"\.(openai|cognitiveservices)\.azure\.com$", "azure"),
        (r"^bedrock-runtime[.-].*\.amazonaws\.com$", "bedrock"),
        (r"^generativelanguage\.googleapis\.com$", "gemini"),
        (r"^api\.mistral\.ai$", "mistral"),
        (r"^api\.groq\.com$", "groq"),
        (r"^openrouter\.ai$", "openrouter"),
        (r"^api\.deepseek\.com$", "deepseek"),
        (r"^api\.x\.ai$", "xai"),
        (r"^api\.together\.(xyz|ai)$", "together_ai"),
        (r"^api\.fireworks\.ai$", "fireworks_ai"),
        (r"^api\.cerebras\.ai$", "cerebras"),
        (r"^api\.perplexity\.ai$", "perplexity"),
        (r"^api\.deepinfra\.com$", "deepinfra"),
        (r"^api\.voyageai\.com$", "voyage"),
        (r"^api\.cohere\.(com|ai)$", "cohere"),
    )
)

# Where a host names its region; "" for one whose region nobody can tell from it.
_REGIONS = (
    re.compile(r"^bedrock-runtime(?:-fips)?\.([a-z0-9-]+)\."),
    re.compile(r"^([a-z0-9-]+)\.api\.openai\.com$"),
    re.compile(r"()\.(?:openai|cognitiveservices)\.azure\.com$"),
)


class CallPrices:
    """Prices and counters of the models that requests name.

    Args:
        given: by model name.
        catalogue: whose remote entries are looked through; None for none.
        unpriced: names of models that cost nothing.
    """

    def __init__(
        self, given: Mapping[str, Price], catalogue: Catalogue | None, unpriced: tuple[str, ...]
    ) -> None:
        self._given, self._unpriced = dict(given), frozenset(unpriced)
        entries = with_litellm_prices(catalogue).values() if catalogue is not None else ()
        self._entries = [spec for spec in entries if spec.kind == "remote" and spec.price is not None]

    def within(
        self, given: Mapping[str, Price], catalogue: Catalogue | None, unpriced: tuple[str, ...]
    ) -> CallPrices:
        """The prices of a budget inside: what it was given goes first, and its catalogue in place of this."""
        inner = CallPrices(given, catalogue, unpriced)
        inner._given = {
            **{name: price for name, price in self._given.items() if name not in inner._unpriced},
            **inner._given,
        }
        inner._unpriced |= self._unpriced
        if catalogue is None:
            inner._entries = self._entries
        return inner

    def price(self, call: ModelCall) -> Price:
        """Return the price of a call's model.

        Raises:
            UnknownPrice: none is known.
        """
        if call.model in self._given:
            return self._given[call.model]
        if call.model in self._unpriced:
            return Price(0, 0, version="unpriced")
        spec = self._spec(call)
        if spec is not None and spec.price is not None:
            return spec.price
        listed = _listed_price(call.host, call.model)
        if listed is None:
            raise UnknownPrice(
                f"no price of {call.model!r} at {call.host} is known; give one in dollars per million "
                f"tokens (prices, or --price {call.model}=INPUT,OUTPUT), or name it as free (unpriced)"
            )
        return listed

    def labels(self, call: ModelCall) -> frozenset[str]:
        """Where the data of a call goes, by the catalogue.

        No labels where it has no entry, or one of another region than that of the host.
        """
        spec = self._spec(call)
        if spec is None or (spec.api_base is None and not _may_be_in(spec.region, call.host or "")):
            return frozenset()
        return spec.labels

    def _spec(self, call: ModelCall) -> ModelSpec | None:
        """The catalogue's entry of a call's model at its host."""
        names = {call.model, f"{_provider(call.host)}/{call.model}"}
        for spec in self._entries:
            known = spec.litellm_model or ""
            if spec.api_base is None:
                same = _provider(call.host) is not None and known in names
            else:
                base = urlsplit(spec.api_base)
                same = (base.hostname, base.port) == (call.host, call.port)
                same = same and known.partition("/")[2] == call.model
            if same:
                return spec
        return None

    def output_limit(self, call: ModelCall) -> int | None:
        """The most new tokens that LiteLLM's list gives the model; None where it says nothing."""
        limit = _entry(call.host, call.model).get("max_output_tokens")
        return limit if isinstance(limit, int) and limit > 0 else None


@lru_cache(maxsize=256)
def counter(host: str, model: str) -> Callable[[str], int] | None:
    """An upper bound of the tokens of a text for OpenAI's own models; None where no tokenizer is known."""
    if not host.endswith("openai.com"):
        return None
    try:
        import tiktoken

        encoding = tiktoken.encoding_name_for_model(model)
        return with_margin(named_counter(encoding)) if encoding in TOKENIZERS else None
    except (ImportError, KeyError, MissingExtra):
        return None


def count_bytes(text: str) -> int:
    """Every byte counts as a token: an upper bound of every tokenizer, several times too many."""
    return len(text.encode(errors="surrogatepass"))


def parse_price(text: str) -> tuple[str, Price]:
    """A model's price as the command line has it: `NAME=INPUT,OUTPUT` in dollars per million tokens.

    Raises:
        InputError: it has another form.
    """
    name, _, rates = text.rpartition("=")
    numbers = rates.split(",")
    if not name or len(numbers) != 2:
        raise InputError(
            f"not a price: {text!r}; write NAME=INPUT,OUTPUT in dollars per million tokens, as in "
            "gpt-4o=2.5,10"
        )
    return name, Price(nanousd(numbers[0].strip()), nanousd(numbers[1].strip()))


def _provider(host: str) -> str | None:
    """LiteLLM's name of the provider whose server this is."""
    return next((provider for pattern, provider in _PROVIDERS if pattern.search(host)), None)


@lru_cache(maxsize=256)
def _listed_price(host: str, model: str) -> Price | None:
    if not _entry(host, model):
        return None
    name = f"{_provider(host)}/{model}"
    spec = ModelSpec.model_validate(
        {"name": model, "description": name, "kind": "remote", "litellm_model": name, "context_length": 1}
    )
    try:
        return with_litellm_price(spec).price
    except UnknownPrice:
        return None


@lru_cache(maxsize=256)
def _entry(host: str, model: str) -> Mapping[str, Any]:
    """What LiteLLM's list says of a model of the provider whose server this is; {} for nothing."""
    provider = _provider(host)
    if provider is None:
        return {}
    try:
        entry = list_entry(f"{provider}/{model}")
    except MissingExtra:
        return {}
    return entry if provider in str(entry.get("litellm_provider")) else {}


def _may_be_in(region: str | None, host: str) -> bool:
    """Whether a host may be in a region, by its name: in "eu" is "eu-central-1" too."""
    named = next((found[1] for pattern in _REGIONS if (found := pattern.search(host))), None)
    return region is None or named is None or f"{named}-".startswith(f"{region}-")
