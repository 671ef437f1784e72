"""A remote model's response, from LiteLLM's chunks or its whole response: text, thought, tool calls, usage.

Missing and impossible usage is None, never zero. LiteLLM fills it in from its own count, so the provider's
usage is read from the chunks themselves. Leaves out the call (`models.remote.model`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from viaticum.errors import InputError, ProviderUnavailable
from viaticum.models.remote.tool_calls import LEGACY, ToolCalls, field_of, text_of
from viaticum.money import nanousd
from viaticum.stop_strings import AnswerStream
from viaticum.thinking import Piece
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
    """The response so far.

    A thought comes in fields of its own, or between tags in the text. Stop strings are looked for here, not
    by a provider that would find them in the thought too; what follows one is received and left out.

    Args:
        answer: knows the model's tags and the stop strings.
    """

    def __init__(self, answer: AnswerStream) -> None:
        self._answer = answer
        self._received: list[str] = []
        self.finish_reason: FinishReason = "stop"
        self.logprobs: list[Mapping[str, Any]] = []
        self._calls = ToolCalls()
        self._refused = False

    @property
    def has_output(self) -> bool:
        return bool(self._received)

    @property
    def received(self) -> str:
        """All that is billed: text, thought, tags and tool calls."""
        return "".join(self._received)

    @property
    def text(self) -> str:
        return self._answer.text

    @property
    def stop_string(self) -> str:
        """The stop string that was found here; "" also for one that the provider found, which it keeps."""
        return self._answer.stop_string

    @property
    def thinking(self) -> str:
        return self._answer.thinking

    @property
    def tool_calls(self) -> tuple[Mapping[str, Any], ...]:
        return self._calls.to_json()

    def add(self, chunk: Any) -> list[Piece]:
        """Add one chunk, or a whole response; return what may be shown."""
        if not chunk.choices:
            return []
        choice = chunk.choices[0]
        part = getattr(choice, "delta", None) or getattr(choice, "message", None)
        refusal = text_of(getattr(part, "refusal", None))
        text, thought = text_of(getattr(part, "content", None)) + refusal, _thought(part)
        self._refused = self._refused or bool(refusal)
        self._received += [each for each in (thought, text) if each]
        pieces = self._answer.follow_thought(thought) if thought else []
        pieces += self._answer.push(text)
        if self._answer.stopped:
            self.finish_reason = "stop"
        self._add_calls(part, whole=getattr(choice, "delta", None) is None)
        logprobs = getattr(choice, "logprobs", None)
        for token in field_of(logprobs, "content") or ():
            self.logprobs.append(token if isinstance(token, Mapping) else token.model_dump())
        if choice.finish_reason and not self._answer.stopped:
            self.finish_reason = (
                "refused" if self._refused else FINISH_REASONS.get(choice.finish_reason, "stop")
            )
        return pieces

    def finish(self) -> list[Piece]:
        """What was held back for a tag or a stop string."""
        pieces = self._answer.finish(ended=self.finish_reason != "length")
        if self._answer.stopped:
            self.finish_reason = "stop"
        self._calls.finish()
        if self._calls and self.finish_reason == "stop":
            self.finish_reason = "tool_calls"  # as some servers do not say
        return pieces

    def _add_calls(self, part: Any, *, whole: bool) -> None:
        """Add tool calls, or pieces of them."""
        calls = list(getattr(part, "tool_calls", None) or ())
        if not calls and (legacy := getattr(part, LEGACY, None)):
            calls = [{"function": legacy}]
        for position, call in enumerate(calls):
            self._received += self._calls.add(position, call, whole=whole)

    def check_ended(self, response: Any, name: str) -> None:
        """Raise `ProviderUnavailable` for a stream without a finish reason (no error in LiteLLM)."""
        if hasattr(response, "received_finish_reason") and not (
            response.received_finish_reason or getattr(response, "intermittent_finish_reason", None)
        ):
            raise ProviderUnavailable(f"the answer of {name} broke off; try again")

    def usage(self, response: Any) -> TokenCount | None:
        """Return the tokens that the provider counted; None where it gave no usage.

        In a stream each number is the largest of its chunks: they grow, some providers tell prompt and output
        in different chunks, and a last chunk of zeros takes nothing back. No output tokens beside a text are
        as good as no usage.
        """
        usages = _usages(response)
        output, prompt = _most(usages, "completion_tokens"), _most(usages, "prompt_tokens")
        read_details = [field_of(each, "prompt_tokens_details") for each in usages]
        cached = _most(read_details, "cached_tokens")
        written = max(  # LiteLLM names them in either place
            _most(read_details, "cache_creation_tokens"), _most(usages, "cache_creation_input_tokens")
        )
        details = [field_of(each, "completion_tokens_details") for each in usages]
        reasoning = _most(details, "reasoning_tokens")
        if not prompt or (self._received and not output + reasoning):
            return None
        if reasoning and (reasoning > output or _most(usages, "total_tokens") == prompt + output + reasoning):
            output += reasoning  # some providers count reasoning apart from the answer
        cached = min(cached, prompt)
        written = min(written, prompt - cached)
        return TokenCount(prompt, output, cached, reasoning, cache_write_tokens=written)

    def with_reasoning(self, count: TokenCount) -> TokenCount:
        """The count, with the thought's share of the output where the provider did not count its tokens."""
        if count.reasoning_tokens or not self.thinking:
            return count
        share = len(self.thinking) / max(1, sum(map(len, self._received)))
        return replace(count, reasoning_tokens=min(count.output_tokens, round(count.output_tokens * share)))


def reported_cost(response: Any, litellm: Any, model: str | None) -> int | None:
    """Return a call's cost in nano-dollars by the provider or else LiteLLM's price list; None without both.

    model: its name in the price list; None where the list does not hold for this server.
    """
    usages = _usages(response)
    hidden = getattr(response, "_hidden_params", None) or {}
    headers = hidden.get("additional_headers") or {}
    for cost in (*(field_of(each, "cost") for each in reversed(usages)), headers.get(_COST_HEADER)):
        cost = field_of(cost, "total_cost") if isinstance(cost, Mapping) else cost
        if cost is not None and not isinstance(cost, bool):
            try:
                return nanousd(cost)
            except InputError:
                return None
    counted = [each for each in usages if _count(each, "prompt_tokens")]
    if not counted or model is None:
        return None
    try:
        prompt_usd, output_usd = litellm.cost_per_token(model=model, usage_object=counted[-1])
    except Exception:  # a model that is not listed: the error differs between versions
        return None
    return nanousd(prompt_usd + output_usd) or None


def _usages(response: Any) -> list[Any]:
    """The usages in a stream's chunks, or that of a whole response; LiteLLM's zeros where there was none."""
    parts = response.chunks if hasattr(response, "received_finish_reason") else [response]
    return [usage for each in parts if (usage := getattr(each, "usage", None)) is not None]


def _thought(part: Any) -> str:
    """The thought in a message or its delta, under the first of the names that providers give it."""
    for name in ("reasoning_content", "reasoning"):
        if thought := text_of(getattr(part, name, None)):
            return thought
    blocks = getattr(part, "thinking_blocks", None) or getattr(part, "reasoning_details", None)
    if not isinstance(blocks, list):
        blocks = field_of(getattr(part, "provider_specific_fields", None), "reasoning_details") or []
    names = ("thinking", "text", "summary")
    return "".join(
        next((text for name in names if (text := text_of(field_of(each, name)))), "") for each in blocks
    )


def _most(owners: Sequence[Any], name: str) -> int:
    return max((_count(each, name) for each in owners), default=0)


def _count(owner: Any, name: str) -> int:
    number = field_of(owner, name)
    return max(0, int(number)) if isinstance(number, int | float) and math.isfinite(number) else 0
