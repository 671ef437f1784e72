"""How a completion is generated, as far as somebody said so: `GenerationSettings`, unset by default.

The same settings stand in a catalogue entry (`[models.NAME.generation]`), in a strategy and in a call.
`viaticum.models.settings` resolves them to one `Generation`: call, then strategy, entry, default.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import Annotated, Any, Self, TypedDict

from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
)

from viaticum.errors import InputError, UnknownName
from viaticum.weight_sources import FrozenModel

MAX_TOKENS = 10_000_000
MAX_BIASES = 1024  # tokens of a logit_bias
TokenId = Annotated[int, Field(ge=0)]
Bias = Annotated[float, Field(ge=-100, le=100)]
# Fields of a request body that decide what a call can cost; they have settings of their own, or none.
RESERVED_BODY = frozenset(
    (
        "model",
        "models",
        "messages",
        "prompt",
        "input",
        "max_tokens",
        "max_completion_tokens",
        "max_output_tokens",
        "max_new_tokens",
        "n",
        "best_of",
        "num_return_sequences",
        "use_beam_search",
        "stream",
        "stream_options",
        "tools",
        "functions",
        "response_format",
    )
)
# Arguments of transformers' `apply_chat_template`, which are no variables of a template.
RESERVED_TEMPLATE = frozenset(
    (
        "conversation",
        "messages",
        "tools",
        "documents",
        "chat_template",
        "add_generation_prompt",
        "continue_final_message",
        "tokenize",
        "padding",
        "truncation",
        "max_length",
        "return_tensors",
        "return_dict",
        "return_assistant_tokens_mask",
        "tokenizer_kwargs",
    )
)


class GenerationKeywords(TypedDict, total=False):
    """Settings of one call as keywords; meanings: `GenerationSettings`. max_tokens is max_new_tokens."""

    max_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    frequency_penalty: float | None
    presence_penalty: float | None
    repetition_penalty: float | None
    logit_bias: Mapping[int, float]
    seed: int | None
    stop: str | Iterable[str]
    system: str | None
    thinking_budget: int | None
    reasoning_effort: str | None
    chat_template_kwargs: Mapping[str, Any]
    extra_body: Mapping[str, Any]


class GenerationSettings(FrozenModel):
    """Settings of a completion; None, or empty, where nobody set them.

    Attributes:
        max_new_tokens: most tokens of a completion. In a call: of thought and answer together.
        temperature: 0 is greedy.
        top_p, top_k, min_p: limits on the sampled tokens; 1, 0 and 0 set none.
        frequency_penalty, presence_penalty: subtracted from a token's logit, the one as often as the token
            stands in the output, the other once; 0 subtracts nothing.
        repetition_penalty: makes tokens of prompt and output less likely where it is above 1.
        logit_bias: added to the logits of tokens, by token id; -100 bans a token, 100 bans all others.
        seed: of the first sample; each further one adds 1.
        stop: texts that end a completion, beside those of the other levels.
        system: the system turn; "" for none. In a call it takes the place of the strategy's. In an entry, a
            text stands before the strategy's instructions, and "" moves these into the first user turn.
        thinking_budget: most tokens of the thought; 0 asks for none.
        reasoning_effort: how long the model should think, in the provider's words.
        chat_template_kwargs: variables of the chat template, such as enable_thinking.
        extra_body: further fields of the request to a remote model. None that decides what a call can cost.
    """

    max_new_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    min_p: Annotated[float, Field(ge=0, lt=1)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    logit_bias: Annotated[dict[TokenId, Bias], Field(max_length=MAX_BIASES)] = Field(default_factory=dict)
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    system: str | None = None
    thinking_budget: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = None
    reasoning_effort: Annotated[str, Field(min_length=1, max_length=100)] | None = None
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    extra_body: dict[str, Any] = Field(default_factory=dict)

    @classmethod
    def of(cls, **values: Any) -> Self:
        """Settings from values, None for what is not set.

        Raises:
            InputError: a value is out of range; the message names it.
        """
        try:
            return cls.model_validate({name: value for name, value in values.items() if value is not None})
        except ValidationError as error:
            raise InputError(describe_problem(error, values)) from None

    @classmethod
    def from_keywords(cls, keywords: Mapping[str, Any]) -> Self:
        """Settings from `GenerationKeywords`. Raises `InputError` for an unknown keyword or a wrong value."""
        for name in keywords:
            if name not in GenerationKeywords.__annotations__:
                raise UnknownName("setting", name, GenerationKeywords.__annotations__)
        values = dict(keywords)
        if isinstance(values.get("stop"), str):
            values["stop"] = (values["stop"],)
        return cls.of(max_new_tokens=values.pop("max_tokens", None), **values)

    @property
    def given(self) -> dict[str, Any]:
        """What is set, by name."""
        values = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: value for name, value in values.items() if value not in _UNSET}

    def over(self, other: GenerationSettings) -> GenerationSettings:
        """These settings, and those of `other` where these are not set; mappings and stops are joined."""
        both = {**other.given, **self.given}
        for name in ("chat_template_kwargs", "extra_body", "logit_bias"):
            both[name] = {**getattr(other, name), **getattr(self, name)}
        both["stop"] = tuple(dict.fromkeys((*other.stop, *self.stop)))
        return type(self).model_construct(**both)

    def __hash__(self) -> int:
        return hash(self.model_dump_json())

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_value(cls, value: Any) -> Any:
        if isinstance(value, bool):
            raise ValueError(f"{str(value).lower()} is no value for it")
        return value

    @field_validator("chat_template_kwargs", "extra_body", mode="before")
    @classmethod
    def _plain_json(cls, value: Any) -> Any:
        try:
            return json.loads(json.dumps(_without_decimals(value)))
        except (TypeError, ValueError):
            raise ValueError("not plain JSON; use texts, numbers, true, false, lists and tables") from None

    @field_validator("extra_body")
    @classmethod
    def _nothing_reserved(cls, body: dict[str, Any]) -> dict[str, Any]:
        if reserved := sorted(RESERVED_BODY & body.keys()):
            raise ValueError(
                f"{reserved[0]} decides what a call can cost and cannot be set here; use the setting of "
                "that meaning, such as max_new_tokens"
            )
        return body

    @field_validator("chat_template_kwargs")
    @classmethod
    def _variables_alone(cls, variables: dict[str, Any]) -> dict[str, Any]:
        if reserved := sorted(RESERVED_TEMPLATE & variables.keys()):
            raise ValueError(f"{reserved[0]} is no variable of a chat template; leave it out")
        return variables

    @model_serializer(mode="wrap")
    def _only_given(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        dumped: dict[str, Any] = handler(self)
        return {name: value for name, value in dumped.items() if name in self.given}


_UNSET: tuple[Any, ...] = (None, (), {})
NO_SETTINGS = GenerationSettings()


def describe_problem(error: ValidationError, values: Mapping[str, Any]) -> str:
    """The first problem of a validation, in one line: the setting, its value, what is wrong."""
    first = error.errors(include_url=False)[0]
    name = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return str(UnknownName("setting", name, GenerationSettings.model_fields))
    problem = " ".join(first["msg"].removeprefix("Value error, ").split())
    return f"{name}: {problem}, got {values.get(str(first['loc'][0]))!r}"


def _without_decimals(value: Any) -> Any:
    if isinstance(value, Decimal):
        return float(value)
    if isinstance(value, Mapping):
        return {name: _without_decimals(each) for name, each in value.items()}
    return [_without_decimals(each) for each in value] if isinstance(value, list | tuple) else value
