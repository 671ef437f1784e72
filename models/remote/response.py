"""A remote model's response, from LiteLLM's chunks or its whole response: text, tool calls, usage, cost.

Missing usage is None, never zero. LiteLLM fills it in from its own count, so the provider's usage is read
from the chunks themselves. Leaves out the call (`models.remote.model`).
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
_COST_HEADER = "llm_provider-x-litellm-response-cost"  # set by a LiteLLM proxy


class PartialResponse:
    """The response so far. hidden_text: reasoning and tool calls, which are billed like text."""

    def __init__(self) -> None:
        self.text, self.hidden_text = "", ""
        self.finish_reason: FinishReason = "stop"
        self.logprobs: list[Mapping[str, Any]] = []
        self._calls: dict[int, dict[str, Any]] = {}
        self._refused = False

    @property
    def has_output(self) -> bool:
        return bool(self.text or self.hidden_text)

    @property
    def tool_calls(self) -> tuple[Mapping[str, Any], ...]:
        return tuple(call for _, call in sorted(self._calls.items()))

    def add(self, chunk: Any) -> str:
        """Add one chunk, or a whole response, and return its text."""
        if not chunk.choices:
            return ""
        choice = chunk.choices[0]
        part = getattr(choice, "delta", None) or getattr(choice, "message", None)
        refusal = _text(getattr(part, "refusal", None))
        text = _text(getattr(part, "content", None)) + refusal
        self._refused = self._refused or bool(refusal)
        self.text += text
        self.hidden_text += _text(getattr(part, "reasoning_content", None))
        for position, call in enumerate(getattr(part, "tool_calls", None) or ()):
            self._add_call(position, call)
        logprobs = getattr(choice, "logprobs", None)
        for token in _field(logprobs, "content") or ():
            self.logprobs.append(token if isinstance(token, Mapping) else token.model_dump())
        if choice.finish_reason:
            self.finish_reason = (
                "refused" if self._refused else FINISH_REASONS.get(choice.finish_reason, "stop")
            )
        return text

    def _add_call(self, position: int, part: Any) -> None:
        """Add a tool call, or a piece of one: its id and name come first, its arguments in pieces."""
        index = _field(part, "index")
        empty = {"id": "", "type": "function", "function": {"name": "", "arguments": ""}}
        call = self._calls.setdefault(position if index is None else index, empty)
        call["id"] = call["id"] or _field(part, "id") or ""
        function = _field(part, "function")
        name, arguments = _text(_field(function, "name")), _text(_field(function, "arguments"))
        call["function"]["name"] += name
        call["function"]["arguments"] += arguments
        self.hidden_text += name + arguments

    def check_ended(self, response: Any, name: str) -> None:
        """Raise `ProviderUnavailable` for a stream without a finish reason (no error in LiteLLM)."""
        if hasattr(response, "received_finish_reason") and not (
            response.received_finish_reason or getattr(response, "intermittent_finish_reason", None)
        ):
            raise ProviderUnavailable(f"the answer of {name} broke off; try again")

    def usage(self, response: Any) -> TokenCount | None:
        """Return the tokens that the provider counted; None where it gave no usage."""
        usage = _reported_usage(response)
        if usage is None:
            return None
        output, prompt = _count(usage, "completion_tokens"), _count(usage, "prompt_tokens")
        cached = _count(_field(usage, "prompt_tokens_details"), "cached_tokens")
        reasoning = _count(_field(usage, "completion_tokens_details"), "reasoning_tokens")
        if reasoning and (reasoning > output or _count(usage, "total_tokens") == prompt + output + reasoning):
            output += reasoning  # some providers count reasoning apart from the answer
        return TokenCount(prompt, output, min(cached, prompt), reasoning)


def reported_cost(response: Any, litellm: Any, model: str | None) -> int | None:
    """Return a call's cost in nano-dollars by the provider or else LiteLLM's price list; None without both.

    model: its name in the price list; None where the list does not hold for this server.
    """
    usage = _reported_usage(response)
    hidden = getattr(response, "_hidden_params", None) or {}
    headers = hidden.get("additional_headers") or {}
    for cost in (_field(usage, "cost"), headers.get(_COST_HEADER)):
        cost = _field(cost, "total_cost") if isinstance(cost, Mapping) else cost
        if cost is not None and not isinstance(cost, bool):
            try:
                return nanousd(cost)
            except InputError:
                return None
    if usage is None or model is None:
        return None
    try:
        prompt_usd, output_usd = litellm.cost_per_token(model=model, usage_object=usage)
    except Exception:  # a model that is not listed: the error differs between versions
        return None
    return nanousd(prompt_usd + output_usd) or None


def _reported_usage(response: Any) -> Any | None:
    """The last usage in a stream's chunks, or that of a whole response; None where it is missing."""
    if hasattr(response, "received_finish_reason"):
        usages = [chunk.usage for chunk in response.chunks if getattr(chunk, "usage", None) is not None]
        return usages[-1] if usages else None
    usage = getattr(response, "usage", None)
    # LiteLLM fills in zeros where the provider gave none. A prompt of no tokens does not exist.
    return usage if _count(usage, "prompt_tokens") else None


def _field(owner: Any, name: str) -> Any:
    return owner.get(name) if isinstance(owner, Mapping) else getattr(owner, name, None)


def _count(owner: Any, name: str) -> int:
    number = _field(owner, name)
    return max(0, int(number)) if isinstance(number, int | float) else 0


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""
