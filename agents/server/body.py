"""What comes in: who asks, how often, and the body, its type, size and time, its compression undone.

Leaves out what is in the body (`agents.openai_api.requests`).
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Callable
from typing import TypeVar

from starlette.requests import Request

from viaticum.agents.openai_api.errors import APIError, rate_limit_exceeded, shutting_down
from viaticum.agents.server.admission import RateLimitExceeded
from viaticum.agents.server.auth import Caller
from viaticum.agents.server.run import Limits
from viaticum.agents.server.service import Service

_GZIP_OR_ZLIB = zlib.MAX_WBITS | 32
Parsed = TypeVar("Parsed")
ENCODINGS = ("gzip", "x-gzip", "deflate")


async def read_request(
    service: Service, request: Request, parse: Callable[[bytes], Parsed]
) -> tuple[Caller, Parsed]:
    """Authenticate, apply the rate limit, and parse the body in a thread. Raises `APIError`."""
    caller = await check_caller(service, request)
    body = await read_body(request, service.limits)
    return caller, await service.run_in_thread(parse, body)


async def check_caller(service: Service, request: Request) -> Caller:
    """Authenticate, and apply the rate limit. Raises `APIError`."""
    caller = await service.authenticator.authenticate(request, service.run_in_thread)
    if service.draining:
        raise shutting_down()
    try:
        service.rate_limits.consume(caller.name, caller.per_minute or service.limits.per_minute)
    except RateLimitExceeded as error:
        raise rate_limit_exceeded(error.retry_after) from None
    return caller


async def read_body(request: Request, limits: Limits) -> bytes:
    """The body of a JSON request, decompressed. Raises `APIError`."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # Also keeps web pages out: a browser sends JSON elsewhere only after a preflight, which is refused.
        raise APIError(400, f"send JSON with content-type application/json, not {kind or 'without one'!r}")
    encoding = request.headers.get("content-encoding", "").strip().lower()
    if encoding not in ("", "identity", *ENCODINGS):
        raise APIError(415, f"content-encoding {encoding!r}; send the body as it is, or as gzip or deflate")
    too_large = APIError(413, f"the body is larger than {limits.body_bytes} bytes", code="body_too_large")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > limits.body_bytes:
        raise too_large
    decoder = _Decoder(limits.body_bytes) if encoding in ENCODINGS else None
    body = bytearray()
    try:
        async with asyncio.timeout(limits.stall_timeout):
            async for part in request.stream():
                body += part if decoder is None else decoder.decode(part, len(body))
                if len(body) > limits.body_bytes:
                    raise too_large
    except TimeoutError:
        raise APIError(408, f"the body did not arrive within {limits.stall_timeout:g} seconds") from None
    except zlib.error as error:
        raise APIError(400, f"the body is not {encoding}: {error}") from None
    if decoder is not None and not decoder.is_complete:
        raise APIError(400, f"the {encoding} body is cut off")
    return bytes(body)


class _Decoder:
    """Decompresses up to one byte more than `limit` bytes: a small body can stand for gigabytes."""

    def __init__(self, limit: int) -> None:
        self._limit, self._decoder = limit, zlib.decompressobj(_GZIP_OR_ZLIB)

    @property
    def is_complete(self) -> bool:
        return self._decoder.eof

    def decode(self, part: bytes, length: int) -> bytes:
        """length: of what came before."""
        return self._decoder.decompress(part, self._limit + 1 - length)
