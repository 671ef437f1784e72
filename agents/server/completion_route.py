"""The route of an API of completions: reads the request, waits for a slot, sends the response or its stream.

Runs on the event loop. Leaves out the form of requests and responses (`agents.openai_api.api`), models and
ledger (`service`) and the other routes (`app`).
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator
from contextlib import suppress

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from viaticum.agents.cancellation import CallerGone
from viaticum.agents.openai_api.api import CompletionAPI, CompletionBody, ResponseWriter
from viaticum.agents.openai_api.errors import overloaded, request_timeout, shutting_down
from viaticum.agents.openai_api.responses import to_usd
from viaticum.agents.server.admission import QueueFull, fair_share
from viaticum.agents.server.auth import Caller
from viaticum.agents.server.body import read_request
from viaticum.agents.server.channel import Channel
from viaticum.agents.server.completion_run import (
    checked_completion,
    extension_of,
    keep,
    receive,
    whole_response,
)
from viaticum.agents.server.run import CostSummary, Run, RunItem, api_error, error_response
from viaticum.agents.server.service import Service
from viaticum.agents.workflow.deadlines import Deadline

SESSION_HEADER, SESSION_LENGTH = "x-viaticum-session", 200
CLIENT_CLOSED_REQUEST = 499  # nginx's status, in metrics only: no response reaches the client


class CompletionRoute:
    """The route as an ASGI application of its own, so that it sees when the client disconnects."""

    def __init__(self, service: Service, api: CompletionAPI) -> None:
        self.service, self.api = service, api

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = time.perf_counter()
        label, status = "unknown", 500
        disconnect: asyncio.Task[None] | None = None
        try:
            try:
                http_request = Request(scope, receive)
                caller, request = await self._read(http_request)
                session = request.session or http_request.headers.get(SESSION_HEADER, "")[:SESSION_LENGTH]
                label = self.service.model_label(request.model)
                disconnect = asyncio.create_task(_wait_for_disconnect(receive))
                run = await self._start(request, caller, started, disconnect, session or None)
                disconnect.add_done_callback(lambda _: run.channel.close())
                try:
                    status = await (self._stream if request.stream else self._respond)(run, send)
                finally:
                    run.channel.close()  # without effect after the end
            except ClientDisconnect:
                raise
            except Exception as error:
                refused = api_error(error)
                status = refused.status
                await error_response(refused, self.api)(scope, receive, send)
        except (CallerGone, ClientDisconnect, OSError):
            self.service.metrics.disconnected.inc()
            status = CLIENT_CLOSED_REQUEST
        finally:
            if disconnect is not None:
                disconnect.cancel()
            self.service.metrics.requests.labels(label, str(status)).inc()
            self.service.metrics.seconds.labels(label).observe(time.perf_counter() - started)

    # --- before the run -----------------------------------------------------------------------------------

    async def _read(self, http_request: Request) -> tuple[Caller, CompletionBody]:
        """Authenticate, apply the rate limit, and parse the body. Raises `APIError`."""
        service = self.service
        caller, request = await read_request(service, http_request, self.api.parse)
        request = await checked_completion(service, self.api, caller, request)
        service.rate_limits.charge(caller.name, (request.n or 1) - 1)
        return caller, request

    async def _start(
        self,
        request: CompletionBody,
        caller: Caller,
        started: float,
        disconnect: asyncio.Task[None],
        session: str | None,
    ) -> Run:
        """Wait for a slot and start the run in a thread. Raises `APIError` or `CallerGone`."""
        service, loop = self.service, asyncio.get_running_loop()
        limit = None if request.max_seconds is None else Deadline.after(request.max_seconds)
        deadline = loop.time() + service.limits.timeout
        timeout = min(service.limits.timeout, request.max_seconds or math.inf)
        await self._acquire_slot(caller, disconnect, timeout)
        if disconnect.done() or service.draining:
            service.limiter.release(caller.name)
            raise CallerGone if disconnect.done() else shutting_down()
        channel: Channel[RunItem] = Channel(loop, stall_timeout=service.limits.stall_timeout)
        run = Run(self.api.new_id(), request, caller, channel, deadline, started, limit, session)
        service.start(run)
        return run

    async def _acquire_slot(self, caller: Caller, disconnect: asyncio.Task[None], timeout: float) -> None:
        """Wait for a slot until the client disconnects or the request times out."""
        limiter = self.service.limiter
        share = None if caller.is_alone else fair_share(limiter.max_running)
        acquire = asyncio.create_task(limiter.acquire(caller.name, share))
        try:
            await asyncio.wait({acquire, disconnect}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            if not acquire.cancel() and not acquire.cancelled() and acquire.exception() is None:
                limiter.release(caller.name)
            raise
        if not acquire.done():
            acquire.cancel()
            raise CallerGone if disconnect.done() else request_timeout(timeout)
        try:
            acquire.result()
        except QueueFull as error:
            raise overloaded(error.retry_after) from None

    # --- the whole completion at once ---------------------------------------------------------------------

    async def _respond(self, run: Run, send: Send) -> int:
        """Send the completion. Returns the HTTP status."""
        body, extension, summary = await whole_response(self.service, self.api, run)
        headers = {
            "x-viaticum-route": extension["route"],
            "x-viaticum-cost": str(summary.cost),
            "x-viaticum-cost-usd": f"{to_usd(summary.cost):.9f}",
        }
        if summary.left is not None:
            headers["x-viaticum-left"] = str(summary.left)
        response = JSONResponse(body, headers=headers)
        await send({"type": "http.response.start", "status": 200, "headers": response.raw_headers})
        await self._send_body(send, bytes(response.body), more=False)
        return 200

    # --- the completion as a stream -----------------------------------------------------------------------

    async def _stream(self, run: Run, send: Send) -> int:
        """Send server-sent events. Returns the HTTP status, or that of the error which ended the stream.

        An error before the first event is an HTTP error; a later one is an event, and ends the stream. Where
        a model is silent, comments keep the connection open; the stream then begins with one.
        """
        items = await self._receive_soon(run)
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        if run.route:
            headers["x-viaticum-route"] = run.route
        start = Response(media_type="text/event-stream", headers=headers)
        raw_headers = [(name, value) for name, value in start.raw_headers if name != b"content-length"]
        await send({"type": "http.response.start", "status": 200, "headers": raw_headers})
        writer = self.api.writer(run.id, run.request)
        try:
            while items is None or items:
                events = [event async for event in self._events(run, writer, items or [])]
                await self._send_body(send, b"".join(events) if items else writer.keep_alive)
                items = await self._receive_soon(run)
            await self._send_body(send, writer.last, more=False)
        except Exception as error:
            failure = api_error(error)
            with suppress(OSError, TimeoutError):
                await self._send_body(send, writer.failure(failure) + writer.last, more=False)
            return failure.status
        return 200

    async def _events(self, run: Run, writer: ResponseWriter, items: list[RunItem]) -> AsyncIterator[bytes]:
        """The events of these items."""
        for item in items:
            if isinstance(item, CostSummary):
                extension = extension_of(run, item)
                ending = writer.ending(run.finished, extension)
                await keep(self.service, self.api, run, writer, extension)
                yield ending
            else:
                yield writer.events(*item)

    # --- both ---------------------------------------------------------------------------------------------

    async def _receive_soon(self, run: Run) -> list[RunItem] | None:
        """As `receive`; None where nothing came for `keep_alive` seconds."""
        limit = asyncio.timeout(self.service.limits.keep_alive)
        try:
            async with limit:
                return await receive(self.service, run)
        except TimeoutError:
            if limit.expired():
                return None
            raise

    async def _send_body(self, send: Send, body: bytes, *, more: bool = True) -> None:
        """Raises `CallerGone` where the client reads nothing for `stall_timeout` seconds."""
        try:
            async with asyncio.timeout(self.service.limits.stall_timeout):
                await send({"type": "http.response.body", "body": body, "more_body": more})
        except TimeoutError:
            raise CallerGone from None


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
