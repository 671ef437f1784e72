"""What a provider reports of a call: tokens in a whole response, or in the events of a stream.

A report that is missing or impossible is None, never zero. Leaves out requests (`requests`) and money.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from viaticum.agents.instrumentation.requests import Api
from viaticum.types import TokenCount

_EVENT_END = re.compile(rb"\r\n\r\n|\n\n|\r\r")
_FINISHED = re.compile(rb'"finish_reason"\s*:\s*"')
_DETAILS = (
    "prompt_tokens_details",
    "input_tokens_details",
    "completion_tokens_details",
    "output_tokens_details",
)


class UsageReader:
    """Reads the usage of one call from its response, as it passes.

    Args:
        api: whose form the response has.
        hides_usage: whether events that hold usage and nothing else are left out, for a caller that did not
            ask for them.
        answers: that the call asks for.

    Attributes:
        is_complete: whether the last event of a stream has passed, or a report after the end of all answers.
    """

    def __init__(self, api: Api, *, hides_usage: bool = False, answers: int = 1) -> None:
        self.api, self._hides, self._answers = api, hides_usage, answers
        self._numbers: dict[str, int] = {}
        self._has_output = False
        self._waiting = self._held_back = b""
        self.is_complete = False
        self._finished, self._unfinished = set[str](), set[str]()  # choices of OpenAI's streams
        self.kept: dict[str, int] = {}  # what the provider keeps, by id: tokens that it counted

    def read(self, body: bytes) -> None:
        """Take a whole response."""
        value = _json(body)
        for each in value if isinstance(value, list) else [value]:  # Gemini's streams may be one list
            if isinstance(each, Mapping):
                self._take(each)

    def feed(self, data: bytes) -> bytes:
        """Take a piece of a stream of events; return what may be passed on.

        Many callers leave OpenAI's streams at the end of the answer, right before the report: the end is held
        back until the event after it has come.
        """
        self._waiting += data
        passed = bytearray()
        while (end := _EVENT_END.search(self._waiting)) is not None:
            event, self._waiting = self._waiting[: end.end()], self._waiting[end.end() :]
            is_end = self._ends_answer(event)
            may_pass = self._take_event(event)
            if may_pass and is_end:
                passed += self._held_back
                self._held_back = event
            elif self._held_back and (b"data:" in event):
                passed += self._held_back + (event if may_pass else b"")
                self._held_back = b""
            elif may_pass:
                passed += event
        return bytes(passed)

    def _ends_answer(self, event: bytes) -> bool:
        return (
            self.api in ("chat", "completions")
            and b"finish_reason" in event
            and _FINISHED.search(event) is not None
        )

    def finish(self) -> bytes:
        """The end of a stream, which may lack the empty line of its last event."""
        event, self._waiting = self._waiting, b""
        passed, self._held_back = self._held_back, b""
        return passed + (event if not event or self._take_event(event) else b"")

    def count(self) -> TokenCount | None:
        """The tokens that the provider counted; None where it gave no usage, or an impossible one."""
        numbers = self._numbers
        cached, written = numbers.get("cached", 0), numbers.get("cache_written", 0)
        read, output = numbers.get("read", 0), numbers.get("output", 0)
        reasoning = numbers.get("reasoning", 0)
        if self.api == "messages":  # Anthropic counts what is cached apart
            read += cached + written
        if self.api == "gemini":  # thoughts are apart, results of its own tools too; a number may be missing
            read += numbers.get("tools_read", 0)
            output = max(output + reasoning, numbers.get("total", 0) - read)
        if read <= 0 or (self._has_output and output <= 0):
            return None
        apart = reasoning > output or numbers.get("total", 0) == read + output + reasoning
        if apart and self.api != "gemini":
            output += reasoning  # some providers count reasoning apart from the answer
        cached = min(cached, read)
        return TokenCount(
            read, output, cached, min(reasoning, output), cache_write_tokens=min(written, read - cached)
        )

    def _take_event(self, event: bytes) -> bool:
        """Whether the event may be passed on."""
        lines = [line for line in event.splitlines() if line.startswith(b"data:")]
        text = b"\n".join(line[5:].strip() for line in lines)
        value = _json(text) if lines else None
        self.is_complete = self.is_complete or text == b"[DONE]" or _is_last(value)
        if not isinstance(value, Mapping):
            return True
        self._take(value)
        is_report = bool(value.get("usage")) and not value.get("choices")
        if self.api in ("chat", "completions"):
            self._note_choices(value.get("choices"))
            have_ended = len(self._finished) >= self._answers and not self._unfinished
            self.is_complete = self.is_complete or (bool(value.get("usage")) and have_ended)
        return not (self._hides and is_report)

    def _note_choices(self, choices: Any) -> None:
        for choice in choices if isinstance(choices, list) else ():
            if isinstance(choice, Mapping):
                self._unfinished.add(str(choice.get("index")))
                if choice.get("finish_reason"):
                    self._finished.add(str(choice.get("index")))
        self._unfinished -= self._finished

    def _take(self, value: Mapping[str, Any]) -> None:
        for name in ("message", "response"):  # where events of Anthropic and of the Responses API have it
            inside = value.get(name)
            if isinstance(inside, Mapping):
                self._take(inside)
        usage = value.get("usageMetadata" if self.api == "gemini" else "usage")
        if isinstance(usage, Mapping):
            for name, number in _numbers(usage):
                self._numbers[name] = max(self._numbers.get(name, 0), number)
        self._has_output = self._has_output or _has_output(value)
        if self.api == "responses" and isinstance(usage, Mapping):
            self._keep(value)

    def _keep(self, response: Mapping[str, Any]) -> None:
        count = self.count()
        if count is None:
            return
        if isinstance(name := response.get("id"), str):
            self.kept[name] = count.total
        output = response.get("output")
        for item in output if isinstance(output, list) else ():
            if (
                isinstance(item, Mapping)
                and item.get("type") == "reasoning"
                and isinstance(item.get("id"), str)
            ):
                self.kept[item["id"]] = count.output_tokens


def _numbers(usage: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    names = {
        "prompt_tokens": "read",
        "input_tokens": "read",
        "completion_tokens": "output",
        "output_tokens": "output",
        "total_tokens": "total",
        "cache_read_input_tokens": "cached",
        "cached_tokens": "cached",
        "prompt_cache_hit_tokens": "cached",
        "cache_creation_input_tokens": "cache_written",
        "cache_write_tokens": "cache_written",
        "reasoning_tokens": "reasoning",
        "promptTokenCount": "read",
        "candidatesTokenCount": "output",
        "thoughtsTokenCount": "reasoning",
        "cachedContentTokenCount": "cached",
        "toolUsePromptTokenCount": "tools_read",
        "totalTokenCount": "total",
    }
    for source in (usage, *(each for name in _DETAILS if isinstance(each := usage.get(name), Mapping))):
        for theirs, ours in names.items():
            number = source.get(theirs)
            if isinstance(number, int) and not isinstance(number, bool) and number > 0:
                yield ours, number


def _has_output(value: Mapping[str, Any]) -> bool:
    """Whether a response, or an event of one, has something that a provider charges as output."""
    candidates = value.get("candidates")
    for candidate in candidates if isinstance(candidates, list) else ():
        content = candidate.get("content") if isinstance(candidate, Mapping) else None
        if isinstance(content, Mapping) and content.get("parts"):
            return True
    choices = value.get("choices")
    for choice in choices if isinstance(choices, list) else ():
        part = choice.get("message") or choice.get("delta") or choice if isinstance(choice, Mapping) else {}
        if any(
            part.get(name) for name in ("content", "text", "tool_calls", "reasoning_content", "reasoning")
        ):
            return True
    return bool(
        value.get("output") or value.get("delta") or (value.get("type") == "message" and value.get("content"))
    )


def _is_last(event: Any) -> bool:
    candidates = event.get("candidates") if isinstance(event, Mapping) else None
    if isinstance(candidates, list) and candidates:
        return all(isinstance(each, Mapping) and each.get("finishReason") for each in candidates)
    delta = event.get("delta") if isinstance(event, Mapping) else None
    if isinstance(delta, Mapping) and event.get("type") == "message_delta" and delta.get("stop_reason"):
        return True
    return isinstance(event, Mapping) and event.get("type") in (
        "message_stop",
        "response.completed",
        "response.incomplete",
        "response.failed",
    )


def _json(text: bytes) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None
