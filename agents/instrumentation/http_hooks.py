"""Where model calls are met: `send` of the clients of httpx and httpx2, through which LiteLLM, LangChain, and
the SDKs of OpenAI, Anthropic and others send. Put in place once a process; outside a budget nothing changes.

Each attempt that a transport makes by itself has a hold of its own. A refused call gets a response in the
provider's own form with `x-should-retry: false`, so that its client reports it at once. Leaves out money
(`scope`), and what is not held but told or refused (`unheld_hooks`).
"""

from __future__ import annotations

import json
import threading
from collections.abc import AsyncIterator, Iterator, Mapping
from types import ModuleType
from typing import Any, NamedTuple

from viaticum.agents.instrumentation import aiohttp_hooks, bedrock_hooks, unheld_hooks
from viaticum.agents.instrumentation.context import Payer
from viaticum.agents.instrumentation.gemini import gemini_call
from viaticum.agents.instrumentation.holding import (
    Refused,
    SentCall,
    being_sent,
    hold,
    payer_for,
    sending,
    unknown,
)
from viaticum.agents.instrumentation.requests import Api, may_cost, model_call
from viaticum.agents.instrumentation.usage import UsageReader
from viaticum.errors import MissingExtra

try:
    import wrapt
except ImportError:
    raise MissingExtra("wrapt", "remote") from None

_CLIENTS = ("httpx", "httpx2")  # one interface, two packages
_NOT_SENT = ("ConnectError", "ConnectTimeout", "PoolTimeout", "UnsupportedProtocol")
_lock = threading.Lock()
_installed = False


def install() -> None:
    """Put the hooks in place, once in a process: now, or when a library is imported."""
    global _installed
    with _lock:
        if _installed:
            return
        _installed = True
    for name in _CLIENTS:
        wrapt.register_post_import_hook(_hook_client, name)
    unheld_hooks.install()
    wrapt.register_post_import_hook(aiohttp_hooks.hook, "aiohttp.client")
    wrapt.register_post_import_hook(bedrock_hooks.hook, "botocore.client")


class _Sent(NamedTuple):
    """What is sent in place of a request, and its hold if it is a model call."""

    request: Any
    held: SentCall | None


def _hook_client(httpx: ModuleType) -> None:
    def send(wrapped: Any, client: Any, args: Any, options: Any) -> Any:
        request = args[0] if args else options["request"]
        payer = _payer_of(request)
        if payer is None:
            return wrapped(*args, **options)
        met = _meet(httpx, payer, request, request.read() if _is_json(request) else b"")
        if not isinstance(met, _Sent):
            return met
        with sending(met.held, _NOT_SENT):
            response = wrapped(met.request, **_others(options))
        return _settled(httpx, met.held, response, options.get("stream", False))

    async def send_async(wrapped: Any, client: Any, args: Any, options: Any) -> Any:
        request = args[0] if args else options["request"]
        payer = _payer_of(request)
        if payer is None:
            return await wrapped(*args, **options)
        met = _meet(httpx, payer, request, await request.aread() if _is_json(request) else b"")
        if not isinstance(met, _Sent):
            return met
        with sending(met.held, _NOT_SENT):
            response = await wrapped(met.request, **_others(options))
        return _settled(httpx, met.held, response, options.get("stream", False))

    wrapt.wrap_function_wrapper(httpx, "Client.send", send)
    wrapt.wrap_function_wrapper(httpx, "AsyncClient.send", send_async)
    _hook_transports(httpx)


def _hook_transports(httpx: ModuleType) -> None:
    """Hook what sends: a transport around it may send a request of a client several times."""

    def handle(wrapped: Any, transport: Any, args: Any, options: Any) -> Any:
        request = args[0] if args else options["request"]
        if (sent := being_sent(request.url.path)) is None:
            return wrapped(*args, **options)
        if (refused := sent.begin()) is not None:
            return _refusal(httpx, request, sent.call.api, refused)
        with sent.attempt(_NOT_SENT):
            response = wrapped(*args, **options)
        sent.answered(response.status_code)
        return response

    async def handle_async(wrapped: Any, transport: Any, args: Any, options: Any) -> Any:
        request = args[0] if args else options["request"]
        if (sent := being_sent(request.url.path)) is None:
            return await wrapped(*args, **options)
        if (refused := sent.begin()) is not None:
            return _refusal(httpx, request, sent.call.api, refused)
        with sent.attempt(_NOT_SENT):
            response = await wrapped(*args, **options)
        sent.answered(response.status_code)
        return response

    wrapt.wrap_function_wrapper(httpx, "HTTPTransport.handle_request", handle)
    wrapt.wrap_function_wrapper(httpx, "AsyncHTTPTransport.handle_async_request", handle_async)


def _others(options: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `send` beside the request."""
    return {name: value for name, value in options.items() if name != "request"}


def _is_json(request: Any) -> bool:
    return "json" in request.headers.get("content-type", "")


def _payer_of(request: Any) -> Payer | None:
    """Who pays for a request; None where nobody does, or it cannot be a call that costs."""
    is_socket = request.headers.get("upgrade", "").lower() == "websocket"  # nobody sees the calls in it
    return payer_for(str(request.url)) if request.method == "POST" or is_socket else None


def _meet(httpx: ModuleType, payer: Payer, request: Any, content: bytes) -> Any:
    """What to send in place of a request (`_Sent`); or the response of one that is not sent."""
    url = str(request.url)
    call = model_call(request.method, url, content) or gemini_call(request.method, url, content)
    if call is None:
        verb = request.method if request.method == "POST" else "WebSocket"
        refused = (
            unknown(payer, f"{verb} {request.url.host}{request.url.path}") if may_cost("POST", url) else None
        )
        return _Sent(request, None) if refused is None else _refusal(httpx, request, None, refused)
    held = hold(payer, call, request.url.path)
    if held is None:
        return _Sent(request, None)
    if isinstance(held, Refused):
        return _refusal(httpx, request, call.api, held)
    limited = call.limited(held.limit)
    if limited == call.body and not call.streams:
        return _Sent(request, held)  # as its client made, and may have signed, it
    body = json.dumps(limited, ensure_ascii=False, separators=(",", ":")).encode()
    headers = request.headers.copy()
    headers["content-length"] = str(len(body))
    headers.pop("transfer-encoding", None)
    if call.streams:
        headers["accept-encoding"] = "identity"  # so that usage can be read as it passes
    sent = httpx.Request(
        request.method, request.url, headers=headers, content=body, extensions=request.extensions
    )
    return _Sent(sent, held)


def _settled(httpx: ModuleType, held: SentCall | None, response: Any, stream: bool) -> Any:
    """Settle what a response reports, now or when its stream ends."""
    if held is None:
        return response
    if response.status_code >= 400:
        held.void()
        return response
    call = held.call
    hides = call.streams and call.api in ("chat", "completions") and not call.wants_usage
    reader = UsageReader(call.api, hides_usage=hides, answers=call.answers)
    if not stream:
        if "event-stream" in response.headers.get("content-type", ""):
            reader.feed(response.content + b"\n\n")
        else:
            reader.read(response.content)
        held.settle(reader.count(), reader.kept)
    else:
        response.stream = _passing(httpx, _Watched(httpx, held, reader, response), response.stream)
    return response


class _Watched:
    """The body of a response that is read for its usage as it passes, and settled when it ends or is left."""

    def __init__(self, httpx: ModuleType, held: SentCall, reader: UsageReader, response: Any) -> None:
        self._httpx, self._held, self._reader, self._response = httpx, held, reader, response
        self._is_events = "event-stream" in response.headers.get("content-type", "")
        # A provider may compress although it was asked not to; such a stream passes unread.
        self._reads = (
            not self._is_events or response.headers.get("content-encoding", "identity") == "identity"
        )
        self._body = bytearray()

    def take(self, data: bytes) -> bytes:
        """What may be passed on of a piece."""
        if self._is_events:
            return self._reader.feed(data) if self._reads else data
        self._body += data
        return data

    def finish(self) -> bytes:
        """The whole body is there. Returns what was held back of it."""
        rest = self._reader.finish() if self._is_events and self._reads else b""
        if not self._is_events:
            self._reader.read(self._decoded())
        self._held.settle(self._reader.count() if self._reads else None, self._reader.kept)
        return rest

    def _decoded(self) -> bytes:
        try:
            whole = self._httpx.Response(200, headers=self._response.headers, content=bytes(self._body))
        except self._httpx.DecodingError:
            return b""
        content: bytes = whole.content
        return content

    def leave(self) -> None:
        """Settle a stream that is left early: by the report if it came, else at all that is held.

        A client that has read the last event does not wait for the end of the stream.
        """
        complete = self._is_events and self._reads and self._reader.is_complete
        self._held.settle(self._reader.count() if complete else None, self._reader.kept)


def _passing(httpx: ModuleType, watched: _Watched, inner: Any) -> Any:
    """The stream of a response, watched. Its class is that of the package, which checks for it."""

    class Passing(httpx.SyncByteStream, httpx.AsyncByteStream):  # type: ignore[misc, name-defined]
        def __iter__(self) -> Iterator[bytes]:
            try:
                for data in inner:
                    if passed := watched.take(data):
                        yield passed
                if rest := watched.finish():
                    yield rest
            finally:  # it may be left without being closed
                watched.leave()

        async def __aiter__(self) -> AsyncIterator[bytes]:
            try:
                async for data in inner:
                    if passed := watched.take(data):
                        yield passed
                if rest := watched.finish():
                    yield rest
            finally:
                watched.leave()

        def close(self) -> None:
            watched.leave()
            inner.close()

        async def aclose(self) -> None:
            watched.leave()
            await inner.aclose()

    return Passing()


def _refusal(httpx: ModuleType, request: Any, api: Api | None, refused: Refused) -> Any:
    """An error response in the provider's form."""
    message, code = f"viaticum: {refused.message}", refused.code
    error: dict[str, Any] = {"message": message, "type": code, "code": code, "param": None}
    body: Mapping[str, Any] = {"error": error}
    if api == "messages":
        body = {"type": "error", "error": {"type": code, "message": message}}
    headers = {"x-should-retry": "false"}
    return httpx.Response(refused.status, json=body, headers=headers, request=request)
