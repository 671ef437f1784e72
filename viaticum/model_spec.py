"""An entry of the catalogue: `ModelSpec`, with its prices and tags.

Leaves out which fields each kind of entry takes (`viaticum.model_kinds`), reading the catalogue, and what
entries need of each other (`viaticum.catalogue`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Set
from dataclasses import replace
from decimal import Decimal
from typing import Annotated, Any, Literal, Self
from urllib.parse import quote, urlsplit

from pydantic import (
    Field,
    NonNegativeFloat,
    PositiveInt,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from viaticum.generation import NO_SETTINGS, GenerationSettings
from viaticum.local_settings import LOCAL_FIELDS, UNKEYED_FIELDS, LocalFields, LocalSettings
from viaticum.model_kinds import Kind, check_fields, check_router
from viaticum.model_prices import LITELLM_PRICES, PRICE_DETAILS, Dollars, PriceTier, optional_nanousd
from viaticum.money import Price, nanousd
from viaticum.residency import LOCAL, checked_label
from viaticum.thinking import FORMATS, PLAIN, Tags, ThinkingFormat, format_named, format_of_family
from viaticum.weight_sources import FrozenModel, Hub, Source, Wheels

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@-]*\+?")
_CAN = ("json_schema", "vision", "image_tokens")  # which change no answer
_LABELS = ("region", "tags")  # which change none either
_BATCH = ("batch_api", "batch_discount", "batch_hours")  # nor do these
BatchForm = Literal["openai", "anthropic"]  # of a provider's batch endpoint
BATCH_DISCOUNT, BATCH_HOURS = Decimal("0.5"), 24.0  # of both, where an entry says nothing else
_BATCH_NAMES = re.compile(r"(?P<openai>openai/|gpt-|o\d)|(?P<anthropic>anthropic/|claude-)")
# Fields that came later, with their values where they are not set.
_LATER: dict[str, Any] = {
    "thinking": "auto",
    "generation": {},
    "chat_template": None,
    "served_model": None,
    "top_logprobs": None,
    "tokenizer": None,
    "holds": None,
    "benchmarks": {},
    "tools": None,
    "json_schema": None,
    "vision": None,
    "image_tokens": None,
    "cache_write_price": None,
    "region": None,
    "tags": None,
    "batch_api": None,
    "batch_discount": None,
    "batch_hours": None,
    **dict.fromkeys(LOCAL_FIELDS),
}
_AFTER_LOCAL = ("served_model", "top_logprobs", "benchmarks")


class ThinkingTags(FrozenModel):
    """Tags around the thoughts of one model.

    opened: the text begins inside the thought; a local prompt gets the opening tag if the template does not
        write it.
    cue: what the answer begins with where the end of the thought was forced, such as "Final answer:".
    """

    open: Annotated[str, Field(pattern=r"^\S(.*\S)?$")]
    close: Annotated[str, Field(pattern=r"^\S(.*\S)?$")]
    opened: bool = False
    cue: str = ""


class ModelSpec(LocalFields):
    """One entry of the catalogue. Local models and pairs also take the fields of `LocalFields`.

    Attributes:
        description: what the model is good at, in a sentence or two; routers embed it (RTR, arXiv
            2505.19435).
        context_length: tokens of prompt and answer together.
        sources: where its weights come from, tried in order.
        thinking: how its text shows its thoughts. "auto": by the family of its name; a model of no known
            family is split where its text begins with a well-known tag. True: it always thinks, and may leave
            out the opening tag. False: its text is never split. Else the name of a format (see
            `viaticum.thinking.FORMATS`, and "harmony"), or a table of its tags.
        chat_template: of a local model, in place of the one with its weights: Jinja, or in the file the name
            of a Jinja file beside it. A pair has that of its large model.
        default: routed to, and fetched, unless names are given.
        generation: how it generates where neither call nor strategy says so (`viaticum.generation`).
        benchmarks: public figures by benchmark, shares of right answers such as {"mmlu-pro": 0.64}; the prior
            places a model by them before it has outcomes (`viaticum.routers.query.prior`).

        region, tags: where its data goes, such as "eu" and ["zero-retention"]; a restriction (`only`) names
            them. A pair has those that both its models have.

        served_model: of a local model with engine "served": its name at the server `api_base`.
        top_logprobs: of a local model with engine "served": log probabilities a token that are asked for.

        Prices are dollars for a million tokens:
        cached_input_price, reasoning_price: where they differ from input and output.
        cache_write_price: of prompt tokens that the provider writes into its cache, where that costs more.
        second_price: dollars for a second of work.
        price_tiers: prices above a length of prompt.
        price_version: name of the price list; "litellm" without prices takes those of LiteLLM's own list.

        Of pairs:
        router: which model writes a token: r-stitch, r-stitch+, r2r, or speculative (the large one writes all
            of them; the small one drafts what it verifies).
        tau: threshold of the router r-stitch; of r-stitch+, in place of the one its policy was learned with.
        router_path: folder of a trained router (r2r) or policy (r-stitch+); by default the one packaged for
            the pair.
        threshold: of r2r, in place of the calibrated one; of r-stitch+, in place of the learned one.
        share: of r2r, the large model's share of tokens, in place of the calibrated threshold.
        drift: of r2r, the share is kept while prompts change (see docs/how-to/token-routing.md).
        mode: "auto" (the fastest of: routed, speculative, the large model alone; by call times on this
            machine and for as many texts as there are, see docs/explanation/decoding.md; the default) or
            "routed" (the router always decides). None of the router speculative.

        Of scripted models:
        text: the answer.
        pause: seconds before each word.

        Of remote models:
        litellm_model: the model's name for LiteLLM.
        api_base: address of a server other than the provider's, or that of the engine "served".
        api_key_env: environment variable that holds the key.
        timeout_seconds: how long the provider may be silent.
        max_retries: retries of a call that failed before its first word.
        omit: which of temperature, top_p, top_k and seed the model does not take.
        streams: False where it only answers whole.
        tokenizer: counts prompts for holds: "cl100k_base", "o200k_base" or the full path of a tokenizer.json;
            by default OpenAI's own for its models, else every byte counts as a token.
        holds: "estimated" holds prompts without a known tokenizer by the ratio of tokens to bytes of earlier
            calls and a fifth more; overruns are then possible, and reported.
        tools: False where it cannot call tools: a call with tools is refused before it is made, and `auto`
            goes to other models with it.
        json_schema: False where it does not answer by a JSON schema, likewise.
        vision: False where it reads no images.
        image_tokens: the most tokens that an image has, for which one is held; without it none is taken.
        batch_api: the form of its batch endpoint, "openai" or "anthropic", or "none"; by default that of the
            provider where it is OpenAI's or Anthropic's own, and none at another `api_base`.
        batch_discount: the share of every price that a batch saves; by default 0.5.
        batch_hours: hours in which the provider promises to be through with a batch; by default 24.
    """

    name: str
    description: str = Field(min_length=1)
    kind: Kind
    context_length: PositiveInt
    sources: tuple[Source, ...] = ()
    input_price: Dollars | None = None
    output_price: Dollars | None = None
    cached_input_price: Dollars | None = None
    reasoning_price: Dollars | None = None
    cache_write_price: Dollars | None = None
    second_price: Dollars | None = None
    price_tiers: tuple[PriceTier, ...] = ()
    price_version: str = ""
    small: str | None = None
    large: str | None = None
    router: str | None = None
    tau: NonNegativeFloat | None = None
    router_path: str | None = None
    threshold: Annotated[float, Field(ge=0, le=1)] | None = None
    share: Annotated[float, Field(gt=0, lt=1)] | None = None
    drift: bool | None = None
    mode: Literal["routed", "auto"] | None = None
    litellm_model: str | None = None
    api_base: Annotated[str, Field(pattern=r"^https?://[^\s/]+\S*$")] | None = None
    api_key_env: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")] | None = None
    timeout_seconds: Annotated[float, Field(gt=0, le=3600)] | None = None
    max_retries: Annotated[int, Field(ge=0, le=10)] | None = None
    omit: tuple[Literal["temperature", "top_p", "top_k", "seed"], ...] = ()
    streams: bool | None = None
    tokenizer: Annotated[str, Field(pattern=r"^(cl100k_base|o200k_base|[/~].*|[A-Za-z]:.*)$")] | None = None
    holds: Literal["worst", "estimated"] | None = None
    tools: bool | None = None
    json_schema: bool | None = None
    vision: bool | None = None
    image_tokens: PositiveInt | None = None
    text: str | None = None
    pause: NonNegativeFloat = 0.0
    thinking: bool | str | ThinkingTags = "auto"
    chat_template: Annotated[str, Field(min_length=1)] | None = None
    default: bool = True
    generation: GenerationSettings = NO_SETTINGS
    served_model: Annotated[str, Field(min_length=1)] | None = None
    top_logprobs: Annotated[int, Field(ge=1, le=1000)] | None = None
    benchmarks: Mapping[str, float] = {}
    region: str | None = None
    tags: tuple[str, ...] | None = None
    batch_api: BatchForm | Literal["none"] | None = None
    batch_discount: Annotated[Decimal, Field(ge=0, lt=1, allow_inf_nan=False)] | None = None
    batch_hours: Annotated[float, Field(gt=0, le=24 * 30)] | None = None

    def __hash__(self) -> int:
        return hash(self.name)

    @property
    def local(self) -> LocalSettings:
        """How it runs on this machine."""
        return LocalSettings.model_construct(**{name: getattr(self, name) for name in LOCAL_FIELDS})

    @property
    def usable_context(self) -> int:
        """Tokens of prompt and answer together that this machine keeps memory for."""
        return min(self.context or self.context_length, self.context_length)

    @property
    def file_name(self) -> str:
        """The name as that of one file or folder: names such as openai/gpt-4o hold separators of paths."""
        return quote(self.name, safe="+")

    @property
    def identity(self) -> dict[str, Any]:
        """The entry for keys of answers: without what only says where, how fast and how well it runs.

        A hub's file with the hash of a wheels source is left out: the bytes are the same.
        """
        dumped = self.model_dump(
            mode="json",
            exclude={*UNKEYED_FIELDS, "benchmarks", "tokenizer", "holds", *_CAN, *_LABELS, *_BATCH},
        )
        same = {source.sha256 for source in self.sources if isinstance(source, Wheels)}
        dumped["sources"] = [
            source
            for source in dumped["sources"]
            if source["type"] != "hub" or source.get("sha256") not in same
        ]
        return dumped

    @property
    def price(self) -> Price | None:
        """Price of its tokens; None is unknown. A pair has none: each token costs what its model costs."""
        if self.input_price is None or self.output_price is None:
            return None
        return Price(
            nanousd(self.input_price),
            nanousd(self.output_price),
            optional_nanousd(self.cached_input_price),
            optional_nanousd(self.reasoning_price),
            nanousd(self.second_price or 0),
            tuple(tier.tier for tier in self.price_tiers),
            self.price_version,
            optional_nanousd(self.cache_write_price),
        )

    @property
    def batch_form(self) -> BatchForm | None:
        """The form of the provider's batch endpoint; None where it has none."""
        if self.kind != "remote" or self.batch_api == "none":
            return None
        if self.batch_api is not None:
            return self.batch_api
        found = None if self.api_base else _BATCH_NAMES.match(self.litellm_model or "")
        return None if found is None else ("openai" if found["openai"] else "anthropic")

    @property
    def batch_price(self) -> Price | None:
        """Price of its tokens in a provider's batch; None where its price is unknown."""
        discount = BATCH_DISCOUNT if self.batch_discount is None else self.batch_discount
        return None if self.price is None else self.price.discounted(discount)

    @property
    def batch_seconds(self) -> float:
        """In which the provider promises to be through with a batch."""
        return 3600 * (self.batch_hours or BATCH_HOURS)

    @property
    def thinking_format(self) -> ThinkingFormat:
        """The tags around its thoughts. Those of a pair: see `Catalogue.thinking_format`."""
        given = self.thinking
        if given is False:
            return PLAIN
        if isinstance(given, ThinkingTags):
            return ThinkingFormat((Tags((given.open,), (given.close,)),), True, given.opened, cue=given.cue)
        if isinstance(given, str) and given != "auto":
            return format_named(given)
        repositories = [source.repo for source in self.sources if isinstance(source, Hub)]
        found = format_of_family(self.litellm_model or "", *repositories, self.name)
        if given is True:
            return replace(found if found.thinks else format_named("think"), opened=True)
        return found

    @property
    def labels(self) -> frozenset[str]:
        """Region, tags, and `local` where nothing leaves this machine. Of a pair: see `Catalogue.labels`."""
        stays = self.kind in ("local", "scripted", "encoder")
        if self.engine == "served":
            stays = is_loopback(self.api_base or "")
        own = (*(self.tags or ()), *([self.region] if self.region else []))
        return frozenset((*own, LOCAL) if stays else own)

    @property
    def members(self) -> tuple[str, ...]:
        """The models that take part in an answer: (small, large) for a pair, else the model alone."""
        if self.small is not None and self.large is not None:
            return self.small, self.large
        return (self.name,)

    @field_validator("name")
    @classmethod
    def _usable_name(cls, name: str) -> str:
        if not _NAME.fullmatch(name):
            raise ValueError(
                f"not a model name: {name!r}; use letters, digits and . - _ : / @, a plus at the end at most"
            )
        if name == "auto":
            raise ValueError("the name auto stands for routing; choose another")
        return name

    @field_validator("region")
    @classmethod
    def _label(cls, region: str | None) -> str | None:
        return None if region is None else checked_label("region", region)

    @field_validator("tags")
    @classmethod
    def _tag_labels(cls, tags: tuple[str, ...] | None) -> tuple[str, ...] | None:
        return tuple(checked_label("tags", each) for each in tags) if tags else None

    @field_validator("benchmarks", mode="before")
    @classmethod
    def _shares(cls, figures: Any) -> Any:
        if not isinstance(figures, Mapping):
            raise ValueError('benchmarks is a table of shares, such as {"mmlu-pro" = 0.64}')
        shares: dict[str, float] = {}
        for name, share in figures.items():
            if isinstance(share, bool) or not isinstance(share, int | float | Decimal):
                raise ValueError(f"the figure of {name} is a number from 0 to 1, got {share!r}")
            if not (math.isfinite(share) and 0 <= share <= 1):
                raise ValueError(
                    f"the figure of {name} is a share of right answers from 0 to 1, got {share}; write 64% as"
                    " 0.64"
                )
            spelled = re.sub(r"[\s_]+", "-", str(name).strip().lower())
            if spelled in shares:
                raise ValueError(f"the figure of {spelled} is given twice")
            shares[spelled] = float(share)
        return shares

    @field_validator("thinking")
    @classmethod
    def _known_format(cls, thinking: bool | str | ThinkingTags) -> bool | str | ThinkingTags:
        known = ("auto", "harmony", *FORMATS)
        if isinstance(thinking, str) and thinking not in known:
            raise ValueError(
                f"unknown format {thinking!r} of thoughts; known: {', '.join(known)}; or give true,"
                " false or a table with open and close"
            )
        return thinking

    @model_serializer(mode="wrap")
    def _without_later_fields(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Fields that came later are left out where they are not set: keys of caches and journals stay."""
        dumped: dict[str, Any] = handler(self)
        # Some keys depend on the order: the fields of `LocalFields` follow those before `served_model`.
        later = (*LocalFields.model_fields, *_AFTER_LOCAL)
        last = {name: dumped.pop(name) for name in later if name in dumped}
        return {name: value for name, value in (dumped | last).items() if _LATER.get(name, self) != value}

    @model_validator(mode="after")
    def _fields_fit_kind(self) -> Self:
        given = {
            name for name, field in type(self).model_fields.items() if getattr(self, name) != field.default
        }
        self._check_prices(given)
        check_fields(self.kind, given, is_served=self.engine == "served")
        if self.kind == "pair":
            check_router(str(self.router), given)
            self._check_pair(given)
        if self.context is not None and self.context > self.context_length:
            raise ValueError(f"context is {self.context}, more than context_length ({self.context_length})")
        self._check_generation()
        return self

    def _check_prices(self, given: Set[str]) -> None:
        if len(given & {"input_price", "output_price"}) == 1:
            raise ValueError("give both input_price and output_price, or neither")
        details = given & {*PRICE_DETAILS}
        if self.kind == "remote" and self.price_version == LITELLM_PRICES:
            details -= {"price_version"}
        if self.input_price is None and any(getattr(self, field) for field in details):
            raise ValueError(
                "give input_price and output_price (0 where only time is billed) with other prices"
            )
        lengths = [tier.above_tokens for tier in self.price_tiers]
        if lengths != sorted(set(lengths)):
            raise ValueError("price_tiers rise: sort them by above_tokens, each length once")

    def _check_pair(self, given: Set[str]) -> None:
        if "input_price" in given:
            raise ValueError("a pair takes no price: each token costs what the model that made it costs")
        if given & {*_LABELS}:
            raise ValueError("a pair takes no region and no tags: its data goes where its models are")
        if self.small == self.large:
            raise ValueError(f"a pair needs two different models, not {self.small!r} twice")

    def _check_generation(self) -> None:
        given = self.generation.given
        if self.generation.extra_body and self.kind != "remote":
            raise ValueError(f"a {self.kind} entry takes no generation.extra_body; it is for remote models")
        for name in ("max_new_tokens", "thinking_budget"):
            if given.get(name, 0) > self.context_length:
                raise ValueError(
                    f"generation.{name} is {given[name]}, more than context_length ({self.context_length})"
                )


def is_loopback(address: str) -> bool:
    """Whether a server's address is of this machine."""
    host = (urlsplit(address).hostname or "").lower()
    return host in ("localhost", "::1") or re.fullmatch(r"127(\.\d{1,3}){3}", host) is not None
