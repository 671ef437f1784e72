"""A model with scripted answers, for tests of an app offline, without weights or keys.

A `ScriptedModel` runs through the same workflow, ledger and APIs as any other model. One token is one word. A
text that begins with a thought, as in "<think>2 + 2</think> The answer is 4.", is split as a real model's is.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from decimal import Decimal
from typing import Any

from viaticum.catalogue import ModelSpec
from viaticum.errors import InputError, PromptTooLong
from viaticum.models.base import Generation, Model, StreamPiece
from viaticum.stop_strings import AnswerStream
from viaticum.thinking import ThinkingSplitter
from viaticum.types import Completion, FinishReason, Message, TokenCount, Usage

Script = str | BaseException | Sequence[str | BaseException] | Callable[[Sequence[Message], Generation], str]

PRICE = Decimal(1)  # dollars per million tokens, of input and output
CONTEXT = 32_768  # tokens


class ScriptedModel(Model):
    """Answers with the texts of its script; `calls` records every call as (messages, generation).

    Args:
        script: a text; a list of texts, one for each call, of which the last is repeated; an exception,
            raised in place of a text; or a function of messages and `Generation`.
        name: catalogue name.
        pause: seconds before each word.
        spec: catalogue entry; by default one with a price of one dollar per million tokens.

    Raises:
        InputError: the script is an empty list.
    """

    runs_here = True

    def __init__(
        self,
        script: Script = "The answer is 42.",
        *,
        name: str = "scripted",
        pause: float = 0.0,
        spec: ModelSpec | None = None,
    ) -> None:
        if isinstance(script, Sequence) and not script:
            raise InputError("an empty script; give at least one text")
        self.spec = spec or ModelSpec(
            name=name,
            description="Says what its script says.",
            kind="scripted",
            context_length=CONTEXT,
            input_price=PRICE,
            output_price=PRICE,
        )
        self.name, self.members, self.script, self.pause = self.spec.name, (self.spec.name,), script, pause
        self.calls: list[tuple[Sequence[Message], Generation]] = []
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        """For workers in other processes: each copy records its own calls."""
        return {name: value for name, value in self.__dict__.items() if name not in ("calls", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self.calls, self._lock = [], threading.Lock()

    def catalogue_entry(self) -> ModelSpec:
        return self.spec

    def worst_case(self, messages: Sequence[Message], max_new_tokens: int) -> dict[str, TokenCount]:
        prompt = _count_words(messages)
        if prompt + max_new_tokens > self.spec.context_length:
            raise PromptTooLong(
                f"a prompt of {prompt} tokens and {max_new_tokens} new ones do not fit the context of "
                f"{self.name} ({self.spec.context_length}); shorten the question or lower max_new_tokens"
            )
        return {self.name: TokenCount(prompt, max_new_tokens)}

    def count(self, text: str) -> int:
        return len(text.split())

    def stream(self, messages: Sequence[Message], generation: Generation) -> Iterator[StreamPiece]:
        started = time.perf_counter()
        if generation.extra:
            raise InputError(
                f"{self.name} says what its script says and cannot do: {', '.join(generation.extra)}"
            )
        script = self._text(messages, generation)
        words = script.split(" ")
        finish_reason: FinishReason = "stop"
        if len(script.split()) > generation.max_new_tokens:
            words, finish_reason = words[: generation.max_new_tokens], "length"
        answer = AnswerStream(ThinkingSplitter(self.spec.thinking_format), generation.stop)
        for position, word in enumerate(words):
            if self.pause:
                time.sleep(self.pause)
            yield from answer.push(word if position == 0 else f" {word}")
            if answer.stopped:
                finish_reason = "stop"
                break
        yield from answer.finish(ended=finish_reason == "stop")
        text, reasoning = answer.text, len(answer.thinking.split())
        count = TokenCount(_count_words(messages), reasoning + len(text.split()), reasoning_tokens=reasoning)
        usage = Usage({self.name: count}, time.perf_counter() - started)
        yield Completion(text, usage, finish_reason, thinking=answer.thinking, stop_string=answer.stop_string)

    def _text(self, messages: Sequence[Message], generation: Generation) -> str:
        with self._lock:
            number = len(self.calls)
            self.calls.append((messages, generation))
        script = self.script
        if callable(script):
            return script(messages, generation)
        if not isinstance(script, str | BaseException):
            script = script[min(number, len(script) - 1)]
        if isinstance(script, BaseException):
            raise script
        return script


def _count_words(messages: Sequence[Message]) -> int:
    return sum(len(message["content"].split()) for message in messages)
