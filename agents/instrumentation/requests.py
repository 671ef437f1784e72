"""Model calls among HTTP requests: what one asks for, how many tokens it can cost, and how to limit it.

A request is known by the end of its path and the fields of its JSON body, whatever host it goes to: OpenAI's
chat completions, completions, responses and embeddings, and Anthropic's messages. Leaves out Gemini's form
(`gemini`), prices (`prices`), responses (`usage`) and who pays (`scope`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple
from urllib.parse import unquote, urlsplit

from viaticum.agents.instrumentation.call_settings import (
    OWN_TOOL_TOKENS,
    CallSettings,
    own_tools,
    provider_tools,
)
from viaticum.agents.instrumentation.sent_parts import check_parts, no_bound
from viaticum.errors import InputError
from viaticum.models.remote.model import MARGIN, MESSAGE_TOKENS, REQUEST_TOKENS, TOOLS_TOKENS
from viaticum.types import TokenCount

Api = Literal["chat", "completions", "responses", "messages", "embeddings", "gemini", "converse"]


class _Form(NamedTuple):
    """Of one API: the field that holds the prompt, and those that limit the output, the usual one first."""

    prompt: str
    limits: tuple[str, ...]


_FORMS: dict[Api, _Form] = {
    "chat": _Form("messages", ("max_completion_tokens", "max_tokens")),
    "completions": _Form("prompt", ("max_tokens",)),
    "responses": _Form("input", ("max_output_tokens",)),
    "messages": _Form("messages", ("max_tokens",)),
    "embeddings": _Form("input", ()),
}
_PATHS: tuple[tuple[str, Api], ...] = (
    ("/chat/completions", "chat"),
    ("/completions", "completions"),
    ("/responses", "responses"),
    ("/messages", "messages"),
    ("/embeddings", "embeddings"),
)
_DEPLOYMENT = re.compile(r"/deployments/([^/]+)/")  # Azure's: the model stands in the path
# Posts to providers that cost nothing.
_FREE = re.compile(
    r"/(?:count_tokens|input_tokens|moderations|files|uploads(?:/.*)?|cancel|threads|feedback)$|:countTokens$"
)
# Hosts where a post that is no known model call may cost money: it is told, or refused.
PROVIDER_HOSTS = re.compile(
    r"(?:^|\.)(?:openai\.com|anthropic\.com|openai\.azure\.com|cognitiveservices\.azure\.com"
    r"|generativelanguage\.googleapis\.com|aiplatform\.googleapis\.com|mistral\.ai|cohere\.(?:com|ai)"
    r"|groq\.com|openrouter\.ai|deepseek\.com|x\.ai|together\.(?:xyz|ai)|fireworks\.ai|cerebras\.ai"
    r"|perplexity\.ai|replicate\.com|huggingface\.co|voyageai\.com|nvidia\.com|sambanova\.ai|deepinfra\.com)$"
    r"|bedrock(?:-runtime)?[.-].*amazonaws\.com$"
)
_IMAGES = frozenset(("image_url", "image", "input_image"))
_SHORT = 24  # characters: shorter texts are counted by bytes, which costs little and no tokenizer


@dataclass(frozen=True)
class ModelCall:
    """A model call that is about to be sent.

    Attributes:
        api: whose form it has.
        host: that it goes to.
        model: as the request names it.
        body: the JSON object that is sent.
        limit: most new tokens that the request allows; None where it says nothing.
        streams: whether the answer comes in pieces.
        port: that it goes to; None for that of its scheme.
    """

    api: Api
    host: str
    model: str
    body: Mapping[str, Any] = field(repr=False)
    limit: int | None
    streams: bool
    port: int | None = None

    @property
    def answers(self) -> int:
        """The answers that the call asks for."""
        if self.api == "completions" and isinstance(self.body.get("prompt"), list):
            prompts = self.body["prompt"]
            each = len(prompts) if any(isinstance(one, str | list) for one in prompts) else 1
            return max(1, each) * self._settings.answers
        return self._settings.answers

    @property
    def _settings(self) -> CallSettings:
        hidden = ("prompt",) if self.api in ("completions", "embeddings") else ("previous_response_id",)
        return CallSettings(None, {name: value for name, value in self.body.items() if name not in hidden})

    def worst_case(
        self,
        limit: int,
        count: Callable[[str], int],
        *,
        image_tokens: int | None,
        kept: Mapping[str, int],
    ) -> TokenCount:
        """Return an upper bound of what the call costs.

        Args:
            limit: most new tokens of an answer.
            count: an upper bound of the tokens of a text.
            image_tokens: an upper bound of those of an image; None refuses images.
            kept: tokens of what the provider keeps, by its id: thoughts, and whole earlier responses.

        Raises:
            InputError: something in the call has no bound; the message names it.
        """
        settings = self._settings
        if self.api != "embeddings":
            settings.check(limit, self.limit_name)
        for tool in provider_tools(settings.tools):
            raise InputError(f"the tool {tool} is run by the provider, and what it reads is not known before")
        read = REQUEST_TOKENS + self._kept_tokens(kept)
        if settings.tools or any(map(self.body.get, ("response_format", "text", "output_config"))):
            read += TOOLS_TOKENS + OWN_TOOL_TOKENS * own_tools(settings.tools)
        body, images = self._without_images()
        if images and image_tokens is None:
            raise InputError(
                "an image's tokens are not known before; say how many it has at most: image_tokens"
            )
        read += images * (image_tokens or 0) + count_json(body, count)
        prompt = self.body.get(_FORMS[self.api].prompt)
        read += MESSAGE_TOKENS * (len(prompt) if isinstance(prompt, list) else 1)
        answers = self.answers
        return TokenCount(read * answers, limit * answers)

    @property
    def limit_name(self) -> str:
        """The field that limits the new tokens: the one that the request has, else the usual one."""
        names = _FORMS[self.api].limits
        given = [name for name in names if self.body.get(name) is not None]
        if given:
            return given[0]
        # Servers that imitate OpenAI's may not know the newer name.
        return names[0] if re.search(r"(?:openai|azure)\.com$", self.host) else names[-1]

    def limited(self, limit: int) -> dict[str, Any]:
        """The body to send: with the limit, and with a report of usage at the end of a stream."""
        body = dict(self.body)
        if self.api == "embeddings":
            return body
        body[self.limit_name] = limit
        if self.streams and self.api in ("chat", "completions"):
            options = body.get("stream_options")
            body["stream_options"] = {**(options if isinstance(options, dict) else {}), "include_usage": True}
        return body

    @property
    def wants_usage(self) -> bool:
        """Whether the caller asked for the report of usage at the end of a stream."""
        options = self.body.get("stream_options")
        return isinstance(options, dict) and bool(options.get("include_usage"))

    def _parts(self) -> Iterator[Any]:
        """The parts of all messages."""
        prompt = self.body.get(_FORMS[self.api].prompt)
        if self.api in ("completions", "embeddings") or not isinstance(prompt, list):
            return
        system = self.body.get("system")
        yield from system if isinstance(system, list) else ()
        for message in prompt:
            if not isinstance(message, Mapping):
                continue
            content = message.get("content")
            if self.api == "responses" and message.get("type", "message") != "message":
                yield message
            elif isinstance(content, list):
                yield from content

    def _without_images(self) -> tuple[dict[str, Any], int]:
        """The body without images, and how many there are. Raises `InputError` for a part without bound."""
        found = 0

        def strip(value: Any) -> Any:
            nonlocal found
            if isinstance(value, Mapping):
                if value.get("type") in _IMAGES:
                    found += 1
                    return {"type": "text", "text": ""}
                return {name: strip(each) for name, each in value.items()}
            return [strip(each) for each in value] if isinstance(value, list) else value

        for message in self.body.get("messages") or ():
            if isinstance(message, Mapping) and message.get("audio"):
                raise no_bound("audio")
        stripped = strip(
            {name: value for name, value in self.body.items() if name not in ("tools", "functions")}
        )
        check_parts(list(ModelCall(self.api, self.host, self.model, stripped, None, False)._parts()))
        return {**self.body, **stripped}, found

    def _kept_tokens(self, kept: Mapping[str, int]) -> int:
        """Tokens that a request only refers to."""
        if self.api != "responses":
            return 0
        ids = [self.body["previous_response_id"]] if self.body.get("previous_response_id") else []
        for part in self._parts():
            if part.get("type") == "reasoning" and not part.get("encrypted_content"):
                ids.append(part.get("id") or "")
        for each in ids:
            if each not in kept:
                raise InputError(
                    f"{each!r} lies with the provider, and how many tokens it has is not known here"
                )
        return sum(kept[each] for each in ids)


def model_call(method: str, url: str, body: bytes) -> ModelCall | None:
    """The model call that a request is; None for another one."""
    parts = urlsplit(url)
    path = parts.path.rstrip("/")
    api = next((api for end, api in _PATHS if path.endswith(end)), None)
    if method != "POST" or api is None or "/threads/" in path:
        return None
    try:
        values = json.loads(body)
    except ValueError:
        return None
    if not isinstance(values, dict):
        return None
    deployment = _DEPLOYMENT.search(path)
    model = values.get("model") or (unquote(deployment[1]) if deployment else None)
    form = _FORMS[api]
    if not isinstance(model, str) or (form.prompt not in values and "previous_response_id" not in values):
        return None
    limits = [limit for name in form.limits if isinstance(limit := values.get(name), int) and limit > 0]
    limit, streams = max(limits, default=None), values.get("stream") is True
    return ModelCall(api, parts.hostname or "", model, values, limit, streams, parts.port)


def may_cost(method: str, url: str) -> bool:
    """Whether a request that is no known model call goes where it may cost money."""
    parts = urlsplit(url)
    return (
        method == "POST"
        and PROVIDER_HOSTS.search(parts.hostname or "") is not None
        and _FREE.search(parts.path.rstrip("/")) is None
    )


def with_margin(count: Callable[[str], int]) -> Callable[[str], int]:
    """A tokenizer's count as an upper bound: the provider may use a newer one, or another chat template."""
    return lambda text: -(-count(text) * (MARGIN + 1) // MARGIN)


def count_json(value: Any, count: Callable[[str], int]) -> int:
    """An upper bound of the tokens of a JSON value: long texts by `count`, the rest by its bytes."""
    if isinstance(value, str):
        return count(value) if len(value) > _SHORT else len(value.encode(errors="surrogatepass"))
    if isinstance(value, Mapping):
        return sum(
            len(str(name).encode(errors="surrogatepass")) + 4 + count_json(each, count)
            for name, each in value.items()
        )
    if isinstance(value, list):
        return sum(1 + count_json(each, count) for each in value)
    return len(json.dumps(value))
