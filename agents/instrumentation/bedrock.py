"""Calls of Amazon Bedrock in its own form, `Converse`, and what they report.

Leaves out `InvokeModel`, whose body is in the form of each model's maker, and how calls are met
(`bedrock_hooks`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from viaticum.agents.instrumentation.call_settings import CallSettings
from viaticum.agents.instrumentation.requests import ModelCall, count_json
from viaticum.agents.instrumentation.sent_parts import no_bound
from viaticum.errors import InputError
from viaticum.models.remote.model import MESSAGE_TOKENS, REQUEST_TOKENS, TOOLS_TOKENS
from viaticum.types import TokenCount

# Blocks whose tokens are in their own text, and marks for the provider's cache, which the price has to know.
_TEXTUAL = frozenset(
    ("text", "toolUse", "toolResult", "json", "reasoningContent", "citationsContent", "cachePoint")
)
_TIERS = ("default", "flex", "standard")


class ConverseCall(ModelCall):
    """A call of `Converse`, streamed or not. body: the parameters of the operation."""

    @property
    def answers(self) -> int:
        return 1

    @property
    def limit_name(self) -> str:
        return "maxTokens"

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
        self._check_settings(limit)
        messages = self.body.get("messages") or []
        images = 0
        for block in self._blocks():
            kinds = [name for name, value in block.items() if value is not None]
            for kind in kinds:
                images += kind == "image"
                if kind not in _TEXTUAL and kind != "image":
                    raise no_bound(kind)
            if "redactedContent" in (block.get("reasoningContent") or {}):
                raise no_bound("redactedContent")
        if images and image_tokens is None:
            raise InputError(
                "an image's tokens are not known before; say how many it has at most: image_tokens"
            )
        tools = (self.body.get("toolConfig") or {}).get("tools") or []
        sent = {name: value for name, value in self.body.items() if name != "modelId"}
        read = REQUEST_TOKENS + MESSAGE_TOKENS * len(messages) + count_json(_without_images(sent), count)
        return TokenCount(read + images * (image_tokens or 0) + (TOOLS_TOKENS if tools else 0), limit)

    def limited(self, limit: int) -> dict[str, Any]:
        config = self.body.get("inferenceConfig") or {}
        return {**self.body, "inferenceConfig": {**config, self.limit_name: limit}}

    def _check_settings(self, limit: int) -> None:
        """Raises `InputError` for what can make the call dearer than its hold."""
        body = self.body
        if ":prompt/" in self.model or body.get("promptVariables"):
            raise InputError("the prompt lies with the provider, and its tokens are not known")
        if body.get("guardrailConfig"):
            raise InputError("guardrailConfig has a price of its own, which is not known; leave it out")
        if (body.get("performanceConfig") or {}).get("latency", "standard") != "standard":
            raise InputError("performanceConfig changes what a call can cost; leave it out")
        if (body.get("serviceTier") or {}).get("type", "default") not in _TIERS:
            raise InputError("serviceTier changes what a call can cost; leave it out")
        CallSettings(None, body.get("additionalModelRequestFields") or {}).check(limit, self.limit_name)
        for tool in (body.get("toolConfig") or {}).get("tools") or ():
            for name in set(tool) - {"toolSpec", "cachePoint"}:
                raise InputError(
                    f"the tool {name} is run by the provider, and what it reads is not known before"
                )

    def _blocks(self) -> Iterator[Mapping[str, Any]]:
        """All blocks of content, those in results of tools too."""
        waiting = [*(self.body.get("system") or ())]
        for message in self.body.get("messages") or ():
            waiting += message.get("content") or ()
        while waiting:
            block = waiting.pop()
            yield block
            waiting += (block.get("toolResult") or {}).get("content") or ()


def _without_images(value: Any) -> Any:
    """The parameters as JSON without the bytes of images."""
    if isinstance(value, Mapping):
        return {name: _without_images(each) for name, each in value.items() if name != "image"}
    if isinstance(value, list | tuple):
        return [_without_images(each) for each in value]
    if isinstance(value, bytes):
        raise no_bound("bytes")
    return value


def converse_count(usage: Any, *, has_output: bool = True) -> TokenCount | None:
    """The tokens that `Converse` reports; None for no report, or an impossible one.

    What is cached is counted apart from inputTokens.
    """
    if not isinstance(usage, Mapping):
        return None
    names = ("inputTokens", "outputTokens", "cacheReadInputTokens", "cacheWriteInputTokens")
    read, written, cached, stored = (_number(usage.get(name)) for name in names)
    read += cached + stored
    if read <= 0 or (has_output and written <= 0):
        return None
    return TokenCount(read, written, cached, cache_write_tokens=stored)


def _number(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0
