"""Calls in Gemini's own form (`models/NAME:generateContent`), of Google's SDK and of LiteLLM over HTTP.

Fields may be written in camel or snake case, as Google's servers take both. Leaves out the other forms
(`requests`), prices and usage.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import unquote, urlsplit

from viaticum.agents.instrumentation.call_settings import CallSettings
from viaticum.agents.instrumentation.requests import ModelCall, count_json
from viaticum.agents.instrumentation.sent_parts import no_bound
from viaticum.errors import InputError
from viaticum.models.remote.model import MESSAGE_TOKENS, REQUEST_TOKENS, TOOLS_TOKENS
from viaticum.types import TokenCount

_PATH = re.compile(r"/(?:models|tunedModels)/([^/:]+):(generateContent|streamGenerateContent)$")
# Parts whose tokens are in their own text, and what stands beside them.
_TEXTUAL = frozenset(
    (
        *("text", "thought", "thought_signature", "part_metadata"),
        *("function_call", "function_response", "executable_code", "code_execution_result"),
    )
)


class GeminiCall(ModelCall):
    """A call of `generateContent`, streamed or not."""

    @property
    def answers(self) -> int:
        return self._settings.answers

    @property
    def _settings(self) -> CallSettings:
        config = {
            name: each for name, each in _snake(_config(self.body)).items() if name != "max_output_tokens"
        }
        return CallSettings(None, {**_snake(self.body), "generation_config": config})

    @property
    def limit_name(self) -> str:
        return "maxOutputTokens"

    @property
    def wants_usage(self) -> bool:
        return True

    def worst_case(
        self,
        limit: int,
        count: Callable[[str], int],
        *,
        image_tokens: int | None,
        kept: Mapping[str, int],
    ) -> TokenCount:
        """As of `ModelCall`. Thoughts are part of the limit."""
        body = _snake(self.body)
        self._settings.check(limit, self.limit_name)
        for tool in body.get("tools") or ():
            for name in _snake(tool) if isinstance(tool, Mapping) else ():
                if name != "function_declarations":
                    raise InputError(
                        f"the tool {name} is run by the provider, and what it reads is not known before"
                    )
        if {"generation_config", "generationConfig"} <= set(self.body):
            raise InputError("the request has its generation config twice, and which one holds is not known")
        if body.get("cached_content"):
            raise InputError(
                f"{body['cached_content']!r} lies with the provider, and its tokens are not known"
            )
        images = 0

        def without_images(value: Any) -> Any:
            nonlocal images
            if isinstance(value, list):
                return [without_images(each) for each in value]
            if not isinstance(value, Mapping):
                return value
            fields = _snake(value)
            if isinstance(fields.get("file_data"), Mapping):
                raise no_bound("file_data")
            data = fields.get("inline_data")
            if isinstance(data, Mapping):
                kind = str(_snake(data).get("mime_type"))
                if not kind.startswith("image/"):
                    raise no_bound(kind)
                images += 1
            kept = {name: each for name, each in value.items() if each is not data}
            return {name: without_images(each) for name, each in kept.items()}

        contents = body.get("contents")
        contents = contents if isinstance(contents, list) else [contents]
        for content in (*contents, body.get("system_instruction")):
            _check_parts(content)
        read = REQUEST_TOKENS + count_json(without_images(self.body), count) + MESSAGE_TOKENS * len(contents)
        if images and image_tokens is None:
            raise InputError(
                "an image's tokens are not known before; say how many it has at most: image_tokens"
            )
        read += images * (image_tokens or 0) + (TOOLS_TOKENS if body.get("tools") else 0)
        return TokenCount(read * self.answers, limit * self.answers)

    def limited(self, limit: int) -> dict[str, Any]:
        name = "generation_config" if "generation_config" in self.body else "generationConfig"
        config = {
            key: value for key, value in _config(self.body).items() if _snake_name(key) != "max_output_tokens"
        }
        return {**self.body, name: {**config, self.limit_name: limit}}


def gemini_call(method: str, url: str, body: bytes) -> GeminiCall | None:
    """The call in Gemini's form that a request is; None for another one."""
    parts = urlsplit(url)
    found = _PATH.search(parts.path)
    if method != "POST" or found is None:
        return None
    try:
        values = json.loads(body)
    except ValueError:
        return None
    if not isinstance(values, dict) or "contents" not in values:
        return None
    limit = _snake(_config(values)).get("max_output_tokens")
    limit = limit if isinstance(limit, int) and limit > 0 else None
    streams = found[2] == "streamGenerateContent"
    return GeminiCall("gemini", parts.hostname or "", unquote(found[1]), values, limit, streams, parts.port)


def _config(body: Mapping[str, Any]) -> Mapping[str, Any]:
    config = body.get("generation_config") or body.get("generationConfig")
    return config if isinstance(config, Mapping) else {}


def _check_parts(content: Any) -> None:
    """Raises `InputError` for a part without a bound. Images are counted elsewhere."""
    parts = content.get("parts") if isinstance(content, Mapping) else None
    for part in parts if isinstance(parts, list) else [parts]:
        names = set(_snake(part)) if isinstance(part, Mapping) else set[str]()
        if unknown := names - _TEXTUAL - {"inline_data"}:
            raise no_bound(", ".join(sorted(unknown)))


def _snake(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {_snake_name(name): value for name, value in fields.items()}


def _snake_name(name: str) -> str:
    return re.sub(r"(?<=[a-z])([A-Z])", r"_\1", name).lower()
