"""POST /v1/chat/completions: from a request that has come in to the last event that goes out.

Runs on the event loop and carries what a thread of the `Service` writes. Leaves out models, ledger and the other doors.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from viaticum.agents.cancellation import CallerGone
from viaticum.agents.completions import CompletionFinished, CompletionStarted
from viaticum.agents.openai_api.requests import DONE, APIError, ChatRequest, Reply, event, read_request, usd
from viaticum.agents.server.admission import QueueFull, RateLimitExceeded
from viaticum.agents.server.auth import Caller
from viaticum.agents.server.channel import Channel
from viaticum.agents.server.run import (
    CostSummary,
    Item,
    Limits,
    Run,
    answer_of,
    refusal,
    shutting_down,
    too_late,
)

if TYPE_CHECKING:
    from viaticum.agents.server.service import Service


class Chat:
    """POST /v1/chat/completions, as an ASGI application of its own: it has to see that a client went away."""

    def __init__(self, service: Service) -> None:
        self.service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        began = time.perf_counter()
        label, status = "unknown", 500
        gone: asyncio.Task[None] | None = None
        try:
            try:
                request = Request(scope, receive)
                caller, asked = await self._read(request)
                label = self.service.label(asked.model)
                gone = asyncio.create_task(_until_gone(receive))
                run = await self._place(asked, caller, began, gone)
                gone.add_done_callback(lambda _: run.channel.close())
                try:
                    status = await (self._stream if asked.stream else self._whole)(run, send, label)
                finally:
                    run.channel.close()  # after the end this does nothing
            except Exception as error:
                found = refusal(error)
                status = found.status
                await answer_of(found)(scope, receive, send)
        except (CallerGone, ClientDisconnect, OSError):
            self.service.metrics.disconnected.inc()
            status = 499
        finally:
            if gone is not None:
                gone.cancel()
            self.service.metrics.requests.labels(label, str(status)).inc()
            self.service.metrics.seconds.labels(label).observe(time.perf_counter() - began)

    async def _read(self, request: Request) -> tuple[Caller, ChatRequest]:
        service = self.service
        caller = await service.doorman.admit(request, service.in_thread)
        if service.draining:
            raise shutting_down()
        try:
            service.rates.spend(caller.name, caller.per_minute or service.limits.per_minute)
        except RateLimitExceeded as error:
            raise APIError(
                429,
                "too many requests; slow down",
                type="rate_limit_exceeded",
                code="rate_limit_exceeded",
                retry_after=error.retry_after,
            ) from None
        asked = read_request(await _body(request, service.limits))
        service.check_model(caller, asked.model)
        return caller, asked

    async def _place(self, asked: ChatRequest, caller: Caller, began: float, gone: asyncio.Task[None]) -> Run:
        """Wait for a place, unless the client goes away or its time is up, and start."""
        service, loop = self.service, asyncio.get_running_loop()
        deadline = loop.time() + service.limits.timeout
        turn = asyncio.create_task(service.places.take())
        try:
            await asyncio.wait(
                {turn, gone}, timeout=service.limits.timeout, return_when=asyncio.FIRST_COMPLETED
            )
        except asyncio.CancelledError:
            if not turn.cancel() and not turn.cancelled() and turn.exception() is None:
                service.places.give()
            raise
        if not turn.done():
            turn.cancel()
            raise CallerGone if gone.done() else too_late(service.limits.timeout)
        try:
            turn.result()
        except QueueFull as error:
            raise APIError(
                503,
                "the server is busy; try again",
                type="server_error",
                code="overloaded",
                retry_after=error.retry_after,
            ) from None
        if gone.done() or service.draining:
            service.places.give()
            raise CallerGone if gone.done() else shutting_down()
        channel: Channel[Item] = Channel(loop, patience=service.limits.patience)
        run = Run(f"chatcmpl-{uuid.uuid4().hex}", asked, caller, channel, deadline, began)
        service.start(run)
        return run

    async def _take(self, run: Run, label: str) -> list[Item]:
        try:
            async with asyncio.timeout_at(run.deadline):
                items = await run.channel.take()
        except TimeoutError:
            raise too_late(self.service.limits.timeout) from None
        for item in items:
            if isinstance(item, tuple) and isinstance(item[1], CompletionStarted):
                if not run.route:
                    first = time.perf_counter() - run.began
                    self.service.metrics.first_seconds.labels(label).observe(first)
                run.route = run.route or item[1].route
            elif isinstance(item, tuple) and isinstance(item[1], CompletionFinished):
                run.done.append(item[1])
        return items

    # --- the whole answer at once ---------------------------------------------------------------------------

    async def _whole(self, run: Run, send: Send, label: str) -> int:
        bill = CostSummary(0, None)
        while items := await self._take(run, label):
            bill = next((item for item in items if isinstance(item, CostSummary)), bill)
        told = _told(run, bill)
        headers = {
            "x-viaticum-route": run.done[-1].routes[-1] if run.done[-1].routes else run.route,
            "x-viaticum-cost": str(bill.cost),
            "x-viaticum-cost-usd": f"{usd(bill.cost):.9f}",
        }
        if bill.left is not None:
            headers["x-viaticum-left"] = str(bill.left)
        body = Reply(run.id, run.asked.model).whole(run.done, told)
        await self._send(JSONResponse(body, headers=headers), send)
        return 200

    # --- the answer as it comes -----------------------------------------------------------------------------

    async def _stream(self, run: Run, send: Send, label: str) -> int:
        """Errors before the first piece are errors of HTTP; later ones are an event, and end the stream."""
        items = await self._take(run, label)
        headers = {"x-viaticum-route": run.route, "cache-control": "no-store", "x-accel-buffering": "no"}
        start = Response(media_type="text/event-stream", headers=headers)
        raw = [(name, value) for name, value in start.raw_headers if name != b"content-length"]
        await send({"type": "http.response.start", "status": 200, "headers": raw})
        reply, opened = Reply(run.id, run.asked.model), set[int]()
        try:
            while items:
                await self._push(send, b"".join(self._events(run, reply, opened, items)))
                items = await self._take(run, label)
            await self._push(send, DONE, more=False)
        except Exception as error:
            found = refusal(error)
            with suppress(OSError, TimeoutError):
                await self._push(send, event(found.body) + DONE, more=False)
            return found.status
        return 200

    def _events(self, run: Run, reply: Reply, opened: set[int], items: list[Item]) -> Iterator[bytes]:
        options = run.asked.stream_options
        for item in items:
            if isinstance(item, CostSummary):
                told = _told(run, item)
                yield reply.closing(len(run.done) - 1, run.done[-1], told)
                if options is not None and options.include_usage:
                    yield reply.usage(run.done, told)
                continue
            index, what = item
            if index not in opened:
                opened.add(index)
                yield reply.opening(index)
            if isinstance(what, str):
                yield reply.piece(index, what)
            elif isinstance(what, CompletionFinished) and index < (run.asked.n or 1) - 1:
                yield reply.closing(index, what, None)  # the last one is closed with the bill

    async def _push(self, send: Send, body: bytes, *, more: bool = True) -> None:
        """Raises `CallerGone` where the client reads nothing for too long."""
        try:
            async with asyncio.timeout(self.service.limits.patience):
                await send({"type": "http.response.body", "body": body, "more_body": more})
        except TimeoutError:
            raise CallerGone from None

    async def _send(self, response: Response, send: Send) -> None:
        await send(
            {"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers}
        )
        await self._push(send, bytes(response.body), more=False)


async def _body(request: Request, limits: Limits) -> bytes:
    """The body, as JSON announces itself. Raises `APIError`."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # Also what keeps web pages out: a browser asks before it sends JSON elsewhere, and is not answered.
        raise APIError(400, f"send JSON with content-type application/json, not {kind or 'without one'!r}")
    too_large = APIError(413, f"the body is larger than {limits.body_bytes} bytes", code="body_too_large")
    told = request.headers.get("content-length", "")
    if told.isdecimal() and int(told) > limits.body_bytes:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(limits.patience):
            async for part in request.stream():
                body += part
                if len(body) > limits.body_bytes:
                    raise too_large
    except TimeoutError:
        raise APIError(408, f"the body did not arrive within {limits.patience:g} seconds") from None
    return bytes(body)


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _told(run: Run, bill: CostSummary) -> dict[str, Any]:
    """The `viaticum` object of an answer."""
    last = run.done[-1]
    return {
        "route": last.routes[-1] if last.routes else run.route,
        "routes": list(last.routes),
        "answer": last.answer,
        "reason": last.reason,
        "cost_nanousd": bill.cost,
        "cost_usd": usd(bill.cost),
        "left_nanousd": bill.left,
        "usage": {
            name: {"input_tokens": count.input_tokens, "output_tokens": count.output_tokens}
            for name, count in last.usage.models.items()
        },
    }
