"""Where requests of aiohttp are met, such as those of Google's SDK in asynchronous code.

Model calls in a known form are held as httpx's are (`http_hooks`), and so is each attempt that middleware
makes by itself; others are told where they go to a provider. What does not fit is a `ClientResponseError`
with the status of the refusal: aiohttp's responses come from a connection, so that none can be made up.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from types import ModuleType
from typing import Any

from viaticum.agents.instrumentation.gemini import gemini_call
from viaticum.agents.instrumentation.holding import (
    Refused,
    SentCall,
    being_sent,
    hold,
    payer_for,
    sending,
    tell,
)
from viaticum.agents.instrumentation.requests import ModelCall, model_call
from viaticum.agents.instrumentation.usage import UsageReader
from viaticum.errors import MissingExtra

try:
    import wrapt
except ImportError:
    raise MissingExtra("wrapt", "remote") from None

_NOT_SENT = ("ClientConnectorError", "ConnectionTimeoutError", "InvalidURL", "NonHttpUrlClientError")


def hook(module: ModuleType) -> None:
    """Hook a loaded `aiohttp.client`."""
    wrapt.wrap_function_wrapper(module, "ClientSession._request", _request)
    wrapt.wrap_function_wrapper(module, "ClientSession._ws_connect", _open_websocket)


async def _open_websocket(wrapped: Any, session: Any, args: Any, options: Any) -> Any:
    tell("aiohttp", "WebSocket", str(session._build_url(args[0] if args else options["url"])))
    return await wrapped(*args, **options)


async def _request(wrapped: Any, session: Any, args: Any, options: Any) -> Any:
    verb, given = args[0], args[1]
    address = session._build_url(given)
    url = str(address)
    payer = payer_for(url) if verb.upper() == "POST" else None
    call = None if payer is None else _model_call(url, options)
    if payer is None or call is None:
        tell("aiohttp", verb, url)
        return await wrapped(*args, **_watched(session, options))
    held = hold(payer, call, address.path)
    if isinstance(held, Refused):
        raise _refusal(url, held)
    if held is None:
        with sending(None, ()):
            return await wrapped(*args, **options)
    with sending(held, _NOT_SENT):
        try:
            response = await wrapped(*args, **_watched(session, _limited(held, options)))
        except Exception as error:
            if _is_refusal(error):
                held.void()
            raise
        await _settle(held, response)
    return response


def _watched(session: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a request, whose innermost middleware sees each attempt to send a call that is held."""
    given = options.get("middlewares")
    given = getattr(session, "_middlewares", None) if given is None else given
    if being_sent() is None or given is None:  # a version without middleware
        return dict(options)
    return {**options, "middlewares": (*given, _attempt)}


async def _attempt(request: Any, handler: Callable[[Any], Awaitable[Any]]) -> Any:
    if (sent := being_sent(request.url.path)) is None:
        return await handler(request)
    if (refused := sent.begin()) is not None:
        raise _refusal(str(request.url), refused)
    with sent.attempt(_NOT_SENT):
        response = await handler(request)
    sent.answered(response.status)
    return response


def _is_refusal(error: Exception) -> bool:
    """Whether a session that raises for a status raised for one of an error."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    return (
        "ClientResponseError" in kinds
        and "TooManyRedirects" not in kinds
        and getattr(error, "status", 0) >= 400
    )


def _model_call(url: str, options: Mapping[str, Any]) -> ModelCall | None:
    """The call that a post is; None for another one, or a body that is no JSON."""
    body = options.get("data")
    if options.get("json") is not None:
        body = json.dumps(options["json"])
    if isinstance(body, str):
        body = body.encode()
    if not isinstance(body, bytes):
        return None
    return model_call("POST", url, body) or gemini_call("POST", url, body)


def _limited(held: SentCall, options: Mapping[str, Any]) -> dict[str, Any]:
    limited = held.call.limited(held.limit)
    if options.get("json") is not None:
        return {**options, "json": limited}
    return {**options, "data": json.dumps(limited, ensure_ascii=False).encode()}


def _refusal(url: str, refused: Refused) -> Exception:
    import aiohttp
    from multidict import CIMultiDict, CIMultiDictProxy
    from yarl import URL

    address = URL(url)
    info = aiohttp.RequestInfo(address, "POST", CIMultiDictProxy(CIMultiDict[str]()), address)
    return aiohttp.ClientResponseError(
        info, (), status=refused.status, message=f"viaticum: {refused.message}"
    )


async def _settle(held: SentCall, response: Any) -> None:
    """Settle what a response reports, now or when its stream ends or is left."""
    if response.status >= 400:
        return held.void()
    call = held.call
    hides = call.streams and call.api in ("chat", "completions") and not call.wants_usage
    reader = UsageReader(call.api, hides_usage=hides, answers=call.answers)
    if not call.streams:
        reader.read(await response.read())
        return held.settle(reader.count(), reader.kept)
    content = WatchedContent(response.content, held, reader, "event-stream" in response.content_type)
    response.content = content
    for name in ("close", "release"):
        setattr(response, name, _leaving(content, getattr(response, name)))
    return None


def _leaving(content: WatchedContent, close: Callable[[], Any]) -> Callable[[], Any]:
    def leave() -> Any:
        content.leave()
        return close()

    return leave


class WatchedContent:
    """The body of a streamed response, read for its usage as it passes; settled when it ends or is left.

    It reads as aiohttp's `StreamReader` does.
    """

    def __init__(self, inner: Any, held: SentCall, reader: UsageReader, is_events: bool) -> None:
        self._inner, self._held, self._reader, self._is_events = inner, held, reader, is_events
        self._body = bytearray()  # of a stream that is one JSON value
        self._waiting, self._ended = bytearray(), False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def leave(self) -> None:
        """The caller reads no further: the report counts if it came, else all that was held."""
        complete = self._is_events and self._reader.is_complete
        self._held.settle(self._reader.count() if complete else None, self._reader.kept)

    async def readany(self) -> bytes:
        """Bytes that are there; b"" at the end."""
        if not self._waiting:
            return await self._next()
        data = bytes(self._waiting)
        self._waiting.clear()
        return data

    async def read(self, n: int = -1) -> bytes:
        if n == 0:
            return b""
        data = await self.readany()
        if n < 0:
            while more := await self.readany():
                data += more
            return data
        self._waiting += data[n:]
        return data[:n]

    async def readexactly(self, n: int) -> bytes:
        import asyncio

        data = b""
        while len(data) < n:
            more = await self.read(n - len(data))
            if not more:
                raise asyncio.IncompleteReadError(data, n)
            data += more
        return data

    async def readuntil(self, separator: bytes = b"\n") -> bytes:
        data = b""
        while True:
            more = await self.readany()
            data += more
            end = data.find(separator)
            if end >= 0:
                self._waiting += data[end + len(separator) :]
                return data[: end + len(separator)]
            if not more:
                return data

    async def readline(self) -> bytes:
        return await self.readuntil()

    async def readchunk(self) -> tuple[bytes, bool]:
        return await self.readany(), True

    def at_eof(self) -> bool:
        return self._ended and not self._waiting

    def iter_any(self) -> AsyncIterator[bytes]:
        return _iterate(self.readany)

    def iter_chunked(self, n: int) -> AsyncIterator[bytes]:
        return _iterate(lambda: self.read(n))

    async def iter_chunks(self) -> AsyncIterator[tuple[bytes, bool]]:
        async for data in self.iter_any():
            yield data, True

    def __aiter__(self) -> AsyncIterator[bytes]:
        return _iterate(self.readline)

    async def _next(self) -> bytes:
        """The next piece that may be passed on; b"" at the end."""
        while not self._ended:
            try:
                data = await self._inner.readany()
            except BaseException:
                self.leave()
                raise
            if not data:
                return self._finish()
            if not self._is_events:
                self._body += data
                return bytes(data)
            if passed := self._reader.feed(data):
                return passed
        return b""

    def _finish(self) -> bytes:
        """The whole body is there. Returns what was held back of it."""
        self._ended = True
        rest = self._reader.finish() if self._is_events else b""
        if not self._is_events:
            self._reader.read(bytes(self._body))
        self._held.settle(self._reader.count(), self._reader.kept)
        return rest


async def _iterate(read: Callable[[], Awaitable[bytes]]) -> AsyncIterator[bytes]:
    while data := await read():
        yield data
