"""The body of a request in a provider's batch, and the completion in its result.

Both are made by LiteLLM, as those of a call are, over a connection that ends in this process: what a request
would have sent is taken down, and a result is handed back as the response. Leaves out the batches
(`models.remote.batch_api`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from functools import cache
from typing import Any

import httpx

from viaticum.errors import ProviderUnavailable
from viaticum.models.base import Generation, StreamPiece
from viaticum.models.remote.connection import RemoteCall
from viaticum.models.remote.errors import translate_error
from viaticum.models.remote.model import RemoteModel, RemoteStream
from viaticum.models.remote.request import load_litellm
from viaticum.types import Completion, Message

Handler = Callable[[httpx.Request], httpx.Response]
_handler: ContextVar[Handler] = ContextVar("_handler")


def request_body(model: RemoteModel, messages: Sequence[Message], generation: Generation) -> dict[str, Any]:
    """What a call would send, whole instead of as a stream.

    Raises:
        InputError: the model does not take it.
    """
    bodies: list[dict[str, Any]] = []

    def take_down(request: httpx.Request) -> httpx.Response:
        bodies.append(json.loads(request.content))
        return httpx.Response(400, json={"error": {"message": "taken down"}})

    try:
        with _handled_by(take_down):
            call = RemoteCall(load_litellm().acompletion, _request(model, messages, generation))
        for _ in call.chunks():
            pass
    except Exception as error:
        if not bodies:
            raise translate_error(error, model.spec) from error
    if not bodies:
        raise ProviderUnavailable(f"{model.name}: LiteLLM has sent no request that a batch could hold")
    return bodies[0]


def completion_of(
    model: RemoteModel, messages: Sequence[Message], generation: Generation, body: Mapping[str, Any]
) -> Completion:
    """The completion in the body of a result. It took no time of ours, and its cost is not the list's.

    Raises:
        ViaticumError: the body is no answer.
    """
    *_, completion = _RecordedStream(model, messages, generation, body)
    assert isinstance(completion, Completion)
    return replace(completion, usage=replace(completion.usage, seconds=0.0), reported_nanousd=None)


class _RecordedStream(RemoteStream):
    """A call whose response is there already."""

    def __init__(
        self, model: RemoteModel, messages: Sequence[Message], generation: Generation, body: Mapping[str, Any]
    ) -> None:
        super().__init__(model, messages, generation)
        self._body = body

    def _run(self) -> Generator[StreamPiece, None, None]:
        request = _request(self.model, self.messages, self.generation)
        try:
            with _handled_by(lambda _: httpx.Response(200, json=self._body)):
                response = yield from self._call(request)
            self._response.check_ended(response, self.model.name)
            yield from self._response.finish()
        except Exception as error:
            raise translate_error(error, self.model.spec) from error
        yield self._completion(response, 0.0)


def _request(model: RemoteModel, messages: Sequence[Message], generation: Generation) -> dict[str, Any]:
    """The arguments of a call that reaches the handler at hand instead of the provider."""
    request = model.request(messages, generation)
    for name in ("stream", "stream_options"):
        request.pop(name, None)
    return request | {"client": _client(model.spec.batch_form), "api_key": "none"}


@contextmanager
def _handled_by(handler: Handler) -> Iterator[None]:
    token = _handler.set(handler)
    try:
        yield
    finally:
        _handler.reset(token)


@cache
def _client(form: str | None) -> Any:
    """A client as LiteLLM takes it, whose requests go to the handler of their context."""
    load_litellm()
    http = httpx.AsyncClient(transport=httpx.MockTransport(lambda request: _handler.get()(request)))
    if form == "anthropic":
        from litellm.llms.custom_httpx.http_handler import AsyncHTTPHandler

        client = AsyncHTTPHandler()
        client.client = http
        return client
    import openai

    return openai.AsyncOpenAI(api_key="none", http_client=http, max_retries=0)
