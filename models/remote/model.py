"""Remote models behind the `Model` contract, through LiteLLM.

A call is retried only while none of its text has come, and only for errors where a retry can help. The
max_tokens that is sent is the number that was reserved. LiteLLM's own retries are off, so that every request
is made here. While nothing can be shown (the provider is silent, arguments of a tool arrive, a retry waits),
a stream yields an empty piece every quarter of a second, so that its caller can end it. Needs the extra
`remote`; LiteLLM is imported at the first call, with its price list from its package instead of the network.

Leaves out prices (`models.remote.prices`), the meaning of errors (`models.remote.errors`) and budgets.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from importlib.util import find_spec
from typing import Any

from viaticum.catalogue import ModelSpec
from viaticum.errors import InputError, MissingExtra, PromptTooLong, ProviderWait
from viaticum.messages import images_in
from viaticum.models.api_keys import require_key
from viaticum.models.base import Generation, Model, StreamPiece
from viaticum.models.remote.connection import HEARTBEAT_SECONDS, RemoteCall
from viaticum.models.remote.errors import retry_after, translate_error, wait_before_retry
from viaticum.models.remote.prices import cost_mismatch
from viaticum.models.remote.prompt_tokens import TOKENIZERS, PromptRatio, named_counter, ratio_file
from viaticum.models.remote.rate_limits import ProviderRateLimiter, check_wait, headers_of
from viaticum.models.remote.request import RequestBuilder, load_litellm
from viaticum.models.remote.response import PartialResponse, reported_cost
from viaticum.stop_strings import AnswerStream
from viaticum.thinking import ThinkingSplitter
from viaticum.types import Completion, Message, TokenCount, Usage
from viaticum.valid_text import valid_text

RETRIES = 2  # tries after the first
# Tokens of a prompt beside its text: the markup of a request and of each message, and the instructions that
# providers put before tools and schemas.
REQUEST_TOKENS, MESSAGE_TOKENS, TOOLS_TOKENS = 64, 16, 512
# 1 / MARGIN is added to a known tokenizer's count: the provider may use a newer one, or another chat
# template.
MARGIN = 20
CHUNK_CHARACTERS = 4_000  # LiteLLM extrapolates the tokens of longer texts, which may give too few
_log = logging.getLogger("viaticum")


def check_usable(spec: ModelSpec) -> None:
    """Check that a remote model can be called.

    Raises:
        MissingExtra: LiteLLM is not installed.
        AuthenticationFailed: the environment variable of the API key is not set.
    """
    if find_spec("litellm") is None:
        raise MissingExtra("litellm", "remote")
    require_key(spec)


class RemoteModel(Model):
    """A catalogue entry of kind `remote`. Threads may share one object.

    Args:
        key: API key; by default the one in the environment variable that the entry names.
        sleep: waits before a try, in place of the clock; for tests.
    """

    def __init__(
        self, spec: ModelSpec, *, key: str | None = None, sleep: Callable[[float], None] | None = None
    ) -> None:
        if spec.kind != "remote":
            raise InputError(f"{spec.name} is a {spec.kind} model, not a remote one")
        self.spec, self.name, self.members = spec, spec.name, (spec.name,)
        self.thinking = spec.thinking_format
        self._requests, self._sleep = RequestBuilder(spec, key), sleep
        self._tokenizer_known: bool | None = None
        self._rate_limiter = ProviderRateLimiter()
        kept = ratio_file(spec.litellm_model or "", spec.api_base) if spec.holds == "estimated" else None
        self._ratio = PromptRatio(kept)

    def worst_case(self, messages: Sequence[Message], max_new_tokens: int) -> dict[str, TokenCount]:
        return self.worst_case_of(messages, Generation(max_new_tokens))

    def worst_case_of(self, messages: Sequence[Message], generation: Generation) -> dict[str, TokenCount]:
        """As `Model.worst_case_of`.

        Text is counted by `count`, tools and schemas by their bytes, images by the bound of the entry.
        Where the tokenizer is unknown the provider checks the context: bytes are far more than tokens. With
        `holds = "estimated"` the prompt is then an estimate instead of an upper bound.

        Raises:
            InputError: something makes the call dearer than the entry's price says.
        """
        self._requests.check_price(messages, generation)
        images, prompt = self._image_tokens(messages), self._prompt(messages, generation)
        if self._estimates:
            prompt = self._ratio.estimate(prompt)
        prompt += images
        limit = self.spec.context_length
        if generation.max_new_tokens > limit or (
            self._has_known_tokenizer and prompt + generation.max_new_tokens > limit * (1 + 1 / MARGIN)
        ):
            raise PromptTooLong(
                f"a prompt of up to {prompt} tokens and {generation.max_new_tokens} new ones do not fit the "
                f"context of {self.name} ({limit}); shorten the question or lower max_new_tokens"
            )
        return {self.name: TokenCount(prompt, generation.max_new_tokens)}

    def prompt_tokens(self, messages: Sequence[Message], generation: Generation) -> int:
        prompt = self._prompt(messages, generation)
        if not self._has_known_tokenizer:
            prompt = self._ratio.likely(prompt)
        return prompt + self._image_tokens(messages)

    def _prompt(self, messages: Sequence[Message], generation: Generation) -> int:
        """Upper bound of the tokens of a whole request without its images."""
        prompt = REQUEST_TOKENS + sum(
            MESSAGE_TOKENS + self.count(message["content"]) + _bytes(_fields_beside_content(message))
            for message in messages
        )
        schemas = {name: generation.extra.get(name) for name in ("tools", "response_format", "tool_choice")}
        return prompt + TOOLS_TOKENS + _bytes(schemas) if any(schemas.values()) else prompt

    def _image_tokens(self, messages: Sequence[Message]) -> int:
        """Upper bound of the tokens of all images, by the entry. Raises `InputError` where it states none."""
        images = sum(map(images_in, messages))
        if images and (self.spec.image_tokens is None or self.spec.vision is False):
            raise InputError(
                f"{self.name} takes no images: its entry in the catalogue states no image_tokens, the most "
                "that one has"
                if self.spec.vision is not False
                else f"{self.name} reads no images, as its entry in the catalogue says"
            )
        return images * (self.spec.image_tokens or 0)

    @property
    def _estimates(self) -> bool:
        return self.spec.holds == "estimated" and not self._has_known_tokenizer

    def count(self, text: str) -> int:
        """Return an upper bound: the tokenizer's count plus a twentieth, or bytes where none is known."""
        if not self._has_known_tokenizer:
            return len(text.encode())
        chunks = (text[start : start + CHUNK_CHARACTERS] for start in range(0, len(text), CHUNK_CHARACTERS))
        if self.spec.tokenizer is not None:
            named = named_counter(self.spec.tokenizer)
            return math.ceil(sum(map(named, chunks)) * (MARGIN + 1) / MARGIN)
        litellm = load_litellm()
        counted: int = sum(
            litellm.token_counter(model=self.spec.litellm_model, text=chunk) for chunk in chunks
        )
        if counted == 0:  # LiteLLM's counter can be switched off
            return len(text.encode())
        return math.ceil(counted * (MARGIN + 1) / MARGIN)

    @property
    def counting_hint(self) -> str:
        if self._has_known_tokenizer:
            return ""
        return (
            f"no tokenizer of {self.name} is known, so every byte counts as a token, which is several times "
            'too many: name one in its entry (tokenizer), or hold by estimates (holds = "estimated")'
        )

    @property
    def _has_known_tokenizer(self) -> bool:
        if self._tokenizer_known is None:
            self._tokenizer_known = self.spec.tokenizer is not None or (
                self.spec.api_base is None and _knows_tokenizer(self.spec.litellm_model or "")
            )
        return self._tokenizer_known

    def stream(self, messages: Sequence[Message], generation: Generation) -> RemoteStream:
        return RemoteStream(self, messages, generation)

    def request(self, messages: Sequence[Message], generation: Generation) -> dict[str, Any]:
        """Return the arguments of `litellm.acompletion`.

        Raises:
            InputError: `generation.extra` has a parameter that is not passed on.
        """
        return self._requests.build(messages, generation)

    @property
    def cuts_stops(self) -> bool:
        """Whether stop strings are cut here."""
        return self._requests.cuts_stops


class RemoteStream(Iterator[StreamPiece]):
    """The stream of one call. received: all that is billed so far: text, thought, tool calls.

    is_sent: whether the provider is at work, and not only waited for.
    """

    is_sent = False

    def __init__(self, model: RemoteModel, messages: Sequence[Message], generation: Generation) -> None:
        self.model, self.messages, self.generation = model, messages, generation
        self._response = self._new_response()
        self._events = self._run()

    @property
    def received(self) -> str:
        return self._response.received

    def _new_response(self) -> PartialResponse:
        thinking = self.model.thinking
        inside = False if _without_thinking(self.generation) else None
        stops = self.generation.stop if self.model.cuts_stops else ()
        return PartialResponse(AnswerStream(ThinkingSplitter(thinking, inside), stops))

    def __next__(self) -> StreamPiece:
        return next(self._events)

    def close(self) -> None:
        """End the call, and its HTTP response with it."""
        self._events.close()

    def _run(self) -> Generator[StreamPiece, None, None]:
        started, spec = time.perf_counter(), self.model.spec
        request = self.model.request(self.messages, self.generation)
        for tries in itertools.count(1):
            self._response = self._new_response()
            waits: list[float] = []
            try:
                with self.model._rate_limiter.acquire(waits.append):
                    if waits and tries == 1:  # a retry has waited already
                        check_wait(spec.name, waits[0])
                        yield from self._wait(waits[0])
                    response = yield from self._call(request)
                self._response.check_ended(response, spec.name)
                yield from self._response.finish()
                break
            except ProviderWait:
                raise
            except Exception as error:
                retries = RETRIES if spec.max_retries is None else spec.max_retries
                wait = wait_before_retry(error, tries)
                if (requested := retry_after(error)) is not None:
                    self.model._rate_limiter.block(requested)
                has_begun = self._response.has_output
                translated = translate_error(error, spec, request.get("api_key"), has_begun=has_begun)
                if has_begun or wait is None or tries > retries:
                    raise translated from error
                self.is_sent = False
                check_wait(spec.name, wait, translated)
            _log.info("%s: try %d failed; next try in %.1f s", spec.name, tries, wait)
            yield from self._wait(wait)
        yield self._completion(response, time.perf_counter() - started)

    def _call(self, request: dict[str, Any]) -> Generator[StreamPiece, None, Any]:
        """Make one request and yield what may be shown; return LiteLLM's response.

        Closed early, it takes what had arrived by then: the provider charges for it.
        """
        self.is_sent = True
        call, has_begun, shown = RemoteCall(load_litellm().acompletion, request), False, time.monotonic()
        try:
            for chunk in call.chunks():
                if not has_begun and call.response is not None:
                    has_begun = True
                    self.model._rate_limiter.update(headers_of(call.response))
                pieces = self._response.add(chunk) if chunk is not None else []
                if not pieces and time.monotonic() - shown >= HEARTBEAT_SECONDS:
                    pieces = [""]
                if pieces:
                    yield from pieces
                    shown = time.monotonic()
        finally:
            for chunk in call.close():
                self._response.add(chunk)
        return call.response

    def _wait(self, seconds: float) -> Generator[StreamPiece, None, None]:
        if self.model._sleep is not None:
            self.model._sleep(seconds)
            return
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            time.sleep(min(left, HEARTBEAT_SECONDS))
            yield ""

    def _completion(self, response: Any, seconds: float) -> Completion:
        partial, spec = self._response, self.model.spec
        warnings = []
        count = partial.usage(response)
        if count is None:
            worst = self.model.worst_case_of(self.messages, self.generation)[spec.name]
            output = self.model.count(valid_text(partial.received))
            count = TokenCount(worst.input_tokens, min(output, worst.output_tokens))
            warnings.append(
                "the provider gave no usage, or an impossible one; the tokens were counted, rather too many "
                "than too few"
            )
        elif not self.model._has_known_tokenizer and not any(map(images_in, self.messages)):
            self.model._ratio.learn(self.model._prompt(self.messages, self.generation), count.input_tokens)
        count = partial.with_reasoning(count)
        known_to_litellm = spec.litellm_model if spec.api_base is None else None
        reported = reported_cost(response, load_litellm(), known_to_litellm)
        computed = (
            None
            if spec.price is None
            else spec.price.cost(
                count.input_tokens,
                count.output_tokens,
                cached_input_tokens=count.cached_input_tokens,
                reasoning_tokens=count.reasoning_tokens,
                cache_write_tokens=count.cache_write_tokens,
            )
        )
        if warning := cost_mismatch(reported, computed):
            warnings.append(warning)
        for warning in warnings:
            _log.warning("%s: %s", spec.name, warning)
        return Completion(
            partial.text,
            Usage({spec.name: count}, seconds),
            partial.finish_reason,
            tool_calls=partial.tool_calls,
            logprobs=tuple(partial.logprobs),
            reported_nanousd=reported,
            warnings=tuple(warnings),
            thinking=partial.thinking,
            stop_string=partial.stop_string,
        )


def _without_thinking(generation: Generation) -> bool:
    """Whether a call asks for no thought, so that the text does not begin inside one."""
    template = generation.chat_template_kwargs
    return (
        generation.thinking_budget == 0
        or generation.reasoning_effort == "none"
        or any(template.get(name) is False for name in ("enable_thinking", "thinking"))
    )


def _knows_tokenizer(litellm_model: str) -> bool:
    """Whether the model is OpenAI's own and its tokenizer is in LiteLLM's package."""
    litellm = load_litellm()
    try:
        import tiktoken

        name, provider, _, _ = litellm.get_llm_provider(litellm_model)
        return provider == "openai" and tiktoken.encoding_name_for_model(name) in TOKENIZERS
    except Exception:  # unknown providers and models raise different errors
        return False


def _fields_beside_content(message: Message) -> dict[str, Any]:
    fields: dict[str, Any] = {
        name: value for name, value in message.items() if name not in ("role", "content")
    }
    if "parts" in fields:
        parts = [part for part in fields["parts"] if part.get("type") != "image_url"]  # counted by themselves
        fields["parts"] = [{**part, "text": ""} for part in parts]
    return fields


def _bytes(value: Any) -> int:
    return len(json.dumps(value, ensure_ascii=False).encode()) if value else 0
