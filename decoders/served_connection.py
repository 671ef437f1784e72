"""HTTP to an inference server: requests, event streams, retries, errors, and a count of the traffic.

One thread of its own runs all requests of a connection at once. Leaves out what is asked
(`decoders.served_api`). Needs httpx, which transformers brings.
"""

from __future__ import annotations

import asyncio
import codecs
import json
import threading
import weakref
from collections.abc import AsyncGenerator, Coroutine
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from viaticum.errors import (
    AuthenticationFailed,
    MissingExtra,
    ModelError,
    ProviderTimeout,
    ProviderUnavailable,
    RateLimited,
)

Result = TypeVar("Result")
CONNECT_SECONDS = 5.0
KEEP_ALIVE_SECONDS = 4.0  # below the 5 of uvicorn, so that no request meets a connection that is closing
FIRST_DELAY, LONGEST_DELAY = 0.25, 8.0  # seconds before a request is repeated: doubled each time
LONGEST_RETRY_AFTER = 60.0  # seconds that a server may ask to wait
RETRIED = (408, 425, 429, 500, 502, 503, 504)


@dataclass(slots=True)
class Traffic:
    """What a served model cost on the wire.

    requests: sent, repetitions among them. retries: requests repeated after a failure. bytes_up, bytes_down:
    of bodies. answers: positions that the decoder asked for. streamed: those of them that needed no request.
    received: positions that came. wasted: those that were never asked for.
    """

    requests: int = 0
    retries: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    answers: int = 0
    streamed: int = 0
    received: int = 0
    wasted: int = 0

    def per_answer(self) -> dict[str, float]:
        """Requests, bytes and wasted positions for each answer."""
        count = max(1, self.answers)
        names = ("requests", "bytes_up", "bytes_down", "wasted")
        return {name: getattr(self, name) / count for name in names}


class Interrupted(Exception):
    """A request failed in a way that may pass. error: to raise in the end. retry_after: seconds, if known."""

    def __init__(self, error: ModelError, retry_after: float | None = None) -> None:
        super().__init__(str(error))
        self.error, self.retry_after = error, retry_after


class Connection:
    """Requests to one server.

    Args:
        api_base: address of its API, with or without "/v1" at the end.
        key: sent as a bearer token; None: none.
        timeout: seconds that the server may be silent.
        retries: repetitions of a request that failed in a way that may pass.

    Raises:
        MissingExtra: httpx is not installed.
    """

    def __init__(self, api_base: str, *, key: str | None = None, timeout: float, retries: int) -> None:
        try:
            import httpx
        except ImportError:
            raise MissingExtra("httpx", "local") from None
        self.root = api_base.rstrip("/").removesuffix("/v1")
        self.timeout, self.retries = timeout, retries
        self.traffic = Traffic()
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._http = httpx.AsyncClient(
            headers=headers | {"Accept-Encoding": "identity"},
            timeout=httpx.Timeout(timeout, connect=CONNECT_SECONDS),
            limits=httpx.Limits(
                max_connections=None, max_keepalive_connections=None, keepalive_expiry=KEEP_ALIVE_SECONDS
            ),
            # A proxy of the environment cannot reach this machine's own servers.
            mounts=dict.fromkeys(("all://127.0.0.1", "all://localhost", "all://[::1]")),
        )
        self._failures = httpx.TransportError
        self._timeouts = httpx.TimeoutException
        self.loop = asyncio.new_event_loop()
        thread = threading.Thread(target=_serve, args=(self.loop,), name="served-model", daemon=True)
        thread.start()
        self.close = weakref.finalize(self, _shut, self.loop, thread, self._http)

    def start(self, work: Coroutine[Any, Any, Result]) -> Future[Result]:
        """Run a coroutine in the connection's thread."""
        return asyncio.run_coroutine_threadsafe(work, self.loop)

    def call(self, work: Coroutine[Any, Any, Result]) -> Result:
        """`start`, and wait for the result."""
        future = self.start(work)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    async def request(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """The parsed JSON of an answer; repeats the request where that may help.

        Raises:
            ModelError: the server refuses, cannot be reached, or does not answer.
        """
        for attempt in range(self.retries + 1):
            try:
                return await self._request(method, path, body)
            except Interrupted as interruption:
                if attempt == self.retries:
                    raise interruption.error from None
                await self.pause(attempt, interruption)
        raise AssertionError("the last attempt returns or raises")

    async def pause(self, attempt: int, interruption: Interrupted) -> None:
        """Wait before a request is repeated: as long as the server asks, else longer each time."""
        self.traffic.retries += 1
        delay = min(FIRST_DELAY * 2**attempt, LONGEST_DELAY)
        if interruption.retry_after is not None:
            delay = min(interruption.retry_after, LONGEST_RETRY_AFTER)
        await asyncio.sleep(delay)

    async def _request(self, method: str, path: str, body: dict[str, Any] | None) -> Any:
        content = self._content(body)
        try:
            response = await self._http.request(
                method, self.root + path, content=content, headers=_HEADERS if content else None
            )
        except self._failures as error:
            raise self._lost(error) from None
        self.traffic.bytes_down += response.num_bytes_downloaded
        if response.status_code != 200:
            raise self._refusal(response)
        try:
            return response.json()
        except ValueError:
            raise Interrupted(
                ProviderUnavailable(f"{self.root}{path} answered with something other than JSON")
            ) from None

    async def events(self, path: str, body: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """The events of one streamed answer. Closing it closes the HTTP connection, which ends the work.

        Raises:
            Interrupted: the stream broke, or the server cannot answer now.
            ModelError: the server refuses.
        """
        content = self._content(body)
        request = self._http.build_request("POST", self.root + path, content=content, headers=_HEADERS)
        try:
            response = await self._http.send(request, stream=True)
        except self._failures as error:
            raise self._lost(error) from None
        try:
            if response.status_code != 200:
                await response.aread()
                raise self._refusal(response)
            # Only line feeds separate lines: a token's text may hold any other separator of Unicode, raw.
            rest = b""
            async for part in response.aiter_raw():
                *lines, rest = (rest + part).split(b"\n")
                for line in lines:
                    line = line.removeprefix(codecs.BOM_UTF8)  # may begin a stream
                    if line.startswith(b"data:") and (data := line[5:].strip()) != b"[DONE]":
                        yield self._event(data)
        except self._failures as error:
            raise self._lost(error) from None
        finally:
            self.traffic.bytes_down += response.num_bytes_downloaded
            await response.aclose()

    def _event(self, data: bytes) -> dict[str, Any]:
        try:
            event = json.loads(data)
        except ValueError:
            raise Interrupted(ProviderUnavailable(f"{self.root} sent half an event")) from None
        if not isinstance(event, dict):
            raise ModelError(f"{self.root} sent an event that is no object: {data[:80]!r}")
        if failure := event.get("error"):
            text = failure.get("message", failure) if isinstance(failure, dict) else failure
            code = failure.get("code") if isinstance(failure, dict) else None
            raise self._failure(code if isinstance(code, int) else 500, str(text), None)
        return event

    def _content(self, body: dict[str, Any] | None) -> bytes | None:
        self.traffic.requests += 1
        if body is None:
            return None
        content = json.dumps(body, separators=(",", ":")).encode()
        self.traffic.bytes_up += len(content)
        return content

    def _lost(self, error: Exception) -> Interrupted:
        if isinstance(error, self._timeouts):
            return Interrupted(ProviderTimeout(f"{self.root} did not answer within {self.timeout:g} s"))
        return Interrupted(
            ProviderUnavailable(
                f"{self.root} cannot be reached ({error or type(error).__name__}); is it running?"
            )
        )

    def _refusal(self, response: Any) -> Exception:
        with suppress(ValueError, AttributeError):
            body = response.json()
            failure = body.get("error", body)
            text = failure.get("message", failure) if isinstance(failure, dict) else failure
            return self._failure(response.status_code, str(text), response.headers.get("retry-after"))
        return self._failure(response.status_code, response.text[:200], response.headers.get("retry-after"))

    def _failure(self, status: int, text: str, retry_after: str | None) -> Exception:
        where = f"{self.root}: {text} (status {status})"
        if status in (401, 403):
            return AuthenticationFailed(f"{where}; name the variable that holds the key in api_key_env")
        if status == 404:
            return NotThere(f"{where}; check api_base and served_model")
        if status == 429:
            seconds = _seconds(retry_after)
            return Interrupted(RateLimited(where, seconds), seconds)
        if status in RETRIED:
            return Interrupted(ProviderUnavailable(where), _seconds(retry_after))
        if "greater than max allowed" in text:
            return ModelError(
                f"{where}; start the server with a larger --max-logprobs, or lower top_logprobs"
            )
        return ModelError(where)


class NotThere(ModelError):
    """The server knows no such address or model."""


_HEADERS = {"Content-Type": "application/json"}


def _seconds(retry_after: str | None) -> float | None:
    """A Retry-After header in seconds; a date is not read."""
    try:
        return max(0.0, float(retry_after)) if retry_after else None
    except ValueError:
        return None


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    loop.run_forever()
    pending = asyncio.all_tasks(loop)
    for task in pending:
        task.cancel()
    loop.run_until_complete(asyncio.gather(*pending, return_exceptions=True))
    loop.run_until_complete(loop.shutdown_asyncgens())
    loop.close()


def _shut(loop: asyncio.AbstractEventLoop, thread: threading.Thread, http: Any) -> None:
    if loop.is_closed():
        return
    if thread.is_alive() and threading.current_thread() is not thread:
        with suppress(Exception):
            asyncio.run_coroutine_threadsafe(http.aclose(), loop).result(2)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(5)
