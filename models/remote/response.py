"""What a remote model wrote, gathered from LiteLLM's chunks or its whole response: text, tool calls, usage, cost.

Usage that is missing is None, never zero: LiteLLM fills it in from its own count, so what the provider said is looked
for in the chunks themselves. Leaves out the call (`models.remote.model`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from viaticum.errors import InputError, ProviderUnavailable
from viaticum.money import nanousd
from viaticum.types import FinishReason, TokenCount

FINISH_REASONS: dict[str, FinishReason] = {
    "stop": "stop",
    "eos": "stop",
    "length": "length",
    "tool_calls": "tool_calls",
    "function_call": "tool_calls",
    "content_filter": "refused",
}
_COST_HEADER = "llm_provider-x-litellm-response-cost"  # a LiteLLM proxy says its cost in a header


class Written:
    """What came so far. unseen: thoughts and tool calls, which are paid for like text."""

    def __init__(self) -> None:
        self.text, self.unseen = "", ""
        self.finish_reason: FinishReason = "stop"
        self.logprobs: list[Mapping[str, Any]] = []
        self._calls: dict[int, dict[str, Any]] = {}
        self._refused = False

    @property
    def anything(self) -> bool:
        return bool(self.text or self.unseen)

    @property
    def tool_calls(self) -> tuple[Mapping[str, Any], ...]:
        return tuple(call for _, call in sorted(self._calls.items()))

    def take(self, chunk: Any) -> str:
        """Note one chunk, or a whole response; returns its text."""
        if not chunk.choices:
            return ""
        choice = chunk.choices[0]
        part = getattr(choice, "delta", None) or getattr(choice, "message", None)
        refusal = _text(getattr(part, "refusal", None))
        text = _text(getattr(part, "content", None)) + refusal
        self._refused = self._refused or bool(refusal)
        self.text += text
        self.unseen += _text(getattr(part, "reasoning_content", None))
        for place, call in enumerate(getattr(part, "tool_calls", None) or ()):
            self._take_call(place, call)
        logprobs = getattr(choice, "logprobs", None)
        for token in _field(logprobs, "content") or ():
            self.logprobs.append(token if isinstance(token, Mapping) else token.model_dump())
        if choice.finish_reason:
            self.finish_reason = (
                "refused" if self._refused else FINISH_REASONS.get(choice.finish_reason, "stop")
            )
        return text

    def _take_call(self, place: int, part: Any) -> None:
        """A tool call, or a piece of one: its id and name come first, its arguments in pieces."""
        index = _field(part, "index")
        empty = {"id": "", "type": "function", "function": {"name": "", "arguments": ""}}
        call = self._calls.setdefault(place if index is None else index, empty)
        call["id"] = call["id"] or _field(part, "id") or ""
        function = _field(part, "function")
        name, arguments = _text(_field(function, "name")), _text(_field(function, "arguments"))
        call["function"]["name"] += name
        call["function"]["arguments"] += arguments
        self.unseen += name + arguments

    def check_ended(self, response: Any, name: str) -> None:
        """Raises `ProviderUnavailable` for a stream that ended without saying why: LiteLLM takes that for an end."""
        if hasattr(response, "received_finish_reason") and not (
            response.received_finish_reason or getattr(response, "intermittent_finish_reason", None)
        ):
            raise ProviderUnavailable(f"the answer of {name} broke off; try again")

    def usage(self, response: Any) -> TokenCount | None:
        """What the provider counted; None where it did not say."""
        said = _reported_usage(response)
        if said is None:
            return None
        made, read = _count(said, "completion_tokens"), _count(said, "prompt_tokens")
        cached = _count(_field(said, "prompt_tokens_details"), "cached_tokens")
        thought = _count(_field(said, "completion_tokens_details"), "reasoning_tokens")
        if thought and (thought > made or _count(said, "total_tokens") == read + made + thought):
            made += thought  # some providers count thoughts beside the answer
        return TokenCount(read, made, min(cached, read), thought)


def reported_cost(response: Any, litellm: Any, model: str | None) -> int | None:
    """Nano-dollars that the provider says the call cost, or else LiteLLM's price list; None where neither knows.

    model: the name to look up in that list; None where the list says nothing of this server.
    """
    said = _reported_usage(response)
    hidden = getattr(response, "_hidden_params", None) or {}
    headers = hidden.get("additional_headers") or {}
    for cost in (_field(said, "cost"), headers.get(_COST_HEADER)):
        cost = _field(cost, "total_cost") if isinstance(cost, Mapping) else cost
        if cost is not None and not isinstance(cost, bool):
            try:
                return nanousd(cost)
            except InputError:
                return None
    if said is None or model is None:
        return None
    try:
        read, made = litellm.cost_per_token(model=model, usage_object=said)
    except Exception:  # a model that the list does not know: a different error in each version
        return None
    return nanousd(read + made) or None


def _reported_usage(response: Any) -> Any | None:
    """Of a stream, the last usage that came in a chunk; of a whole response its usage, unless it says nothing."""
    if hasattr(response, "received_finish_reason"):
        usages = [chunk.usage for chunk in response.chunks if getattr(chunk, "usage", None) is not None]
        return usages[-1] if usages else None
    said = getattr(response, "usage", None)
    # LiteLLM writes zeros where the provider wrote nothing. A prompt of no tokens does not exist.
    return said if _count(said, "prompt_tokens") else None


def _field(thing: Any, name: str) -> Any:
    return thing.get(name) if isinstance(thing, Mapping) else getattr(thing, name, None)


def _count(thing: Any, name: str) -> int:
    number = _field(thing, name)
    return max(0, int(number)) if isinstance(number, int | float) else 0


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""
