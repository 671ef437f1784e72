"""The OpenAI-compatible server, as an ASGI application: `Service(client).app`.

A request is let in (`Doorman`), read, given a place (`Places`), and run in a thread of the server's own pool, where
the ledger and the models are used; the event loop only carries what comes out. A client that goes away closes its
channel: the call ends at the next piece, pays for what was read and written, and gives its place back then, not before.
Leaves out how the process listens, and ends (`serving`), and what the document says (`openapi`).
Needs the `server` extra.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from viaticum.agents.channel import Channel, Gone
from viaticum.agents.client import Viaticum
from viaticum.agents.doorman import Caller, Doorman
from viaticum.agents.doors import AUTO, Ask, Chosen, Written, ask, check_name, known_names
from viaticum.agents.keys import Keys
from viaticum.agents.limits import Full, Places, Rates, TooFast
from viaticum.agents.metrics import CONTENT_TYPE, Metrics
from viaticum.agents.openai_api import (
    DONE,
    ChatRequest,
    Refusal,
    Reply,
    event,
    read_request,
    refusal_of,
    unknown_model,
    usd,
)
from viaticum.agents.openapi import document
from viaticum.errors import InputError, UnknownName
from viaticum.routers.query import parse_policy

log = logging.getLogger("viaticum.server")


@dataclass(frozen=True)
class Limits:
    """concurrency: calls at once; queue: requests that wait for their turn; per_minute: requests of each key; timeout:
    seconds for a whole request; patience: seconds that a client may read nothing, or send no more of its body."""

    concurrency: int = 8
    queue: int = 64
    per_minute: int | None = None
    timeout: float = 600.0
    patience: float = 30.0
    body_bytes: int = 1 << 20

    def __post_init__(self) -> None:
        for name, least in (("concurrency", 1), ("queue", 0), ("body_bytes", 1)):
            if getattr(self, name) < least:
                raise InputError(f"{name} is {least} or more, got {getattr(self, name)}")
        for name in ("timeout", "patience"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} is above 0 seconds, got {getattr(self, name)}")
        if self.per_minute is not None and self.per_minute < 1:
            raise InputError(f"the rate is 1 request a minute or more, got {self.per_minute}")


@dataclass(frozen=True, slots=True)
class Bill:
    """The end of a request: what all its calls cost, and what is left; None where dollars are not limited."""

    cost: int
    left: int | None


Item = tuple[int, Chosen | str | Written] | Bill


@dataclass(eq=False)
class Run:
    """One request that has a place."""

    id: str
    asked: ChatRequest
    caller: Caller
    channel: Channel[Item]
    deadline: float
    began: float
    done: list[Written] = field(default_factory=list)
    route: str = ""


class Service:
    """What the requests share. keys: None serves everyone. public: whether other machines can reach it; without keys a
    request must then not name this machine as its own (see `Doorman`)."""

    def __init__(
        self,
        client: Viaticum,
        *,
        keys: Keys | None = None,
        limits: Limits | None = None,
        public: bool = False,
        within: str | None = None,
    ) -> None:
        self.client, self.limits = client, limits or Limits()
        self.doorman = Doorman(client.ledger, client.budget_name, keys, public=public, within=within)
        self.places = Places(self.limits.concurrency, self.limits.queue)
        self.rates = Rates()
        self.metrics = Metrics(self.places)
        self.threads = ThreadPoolExecutor(self.limits.concurrency, "viaticum-call")
        self.desk = ThreadPoolExecutor(2, "viaticum-desk")  # short reads of the ledger: never behind a call
        self.runs: set[Run] = set()
        self.draining = False
        self.idle = asyncio.Event()
        self.idle.set()
        self._models = {spec.name for spec in client.catalogue.models()}
        self.app = Starlette(
            routes=[
                Route("/v1/chat/completions", Chat(self), methods=["POST"]),
                Route("/v1/models", self._list_models, methods=["GET"]),
                Route("/v1/models/{name}", self._show_model, methods=["GET"]),
                Route("/health", self._health, methods=["GET"]),
                Route("/metrics", self._metrics, methods=["GET"]),
                Route("/openapi.json", self._openapi, methods=["GET"]),
            ],
            exception_handlers={HTTPException: _no_such_door, Refusal: _refused, Exception: _broken},
        )

    # --- draining -------------------------------------------------------------------------------------------

    async def drain(self, grace: float) -> int:
        """Take no more requests; let those that run end, for `grace` seconds, then cut them; return when all are
        settled. Returns how many were cut."""
        self.draining = True
        self.places.queue = 0
        with suppress(TimeoutError):
            await asyncio.wait_for(self.idle.wait(), grace)
        return await self.cut()

    async def cut(self) -> int:
        """End what runs, and wait until it is settled."""
        self.draining = True
        runs = list(self.runs)
        for run in runs:
            run.channel.close(_shutting_down())
        await self.idle.wait()
        return len(runs)

    def close(self) -> None:
        self.threads.shutdown()
        self.desk.shutdown()

    # --- small doors ----------------------------------------------------------------------------------------

    async def in_thread(self, work: Any, *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self.desk, work, *args)

    async def _list_models(self, request: Request) -> Response:
        caller = await self.doorman.admit(request, self.in_thread)
        names = await self.in_thread(known_names, self.client)
        allowed = [name for name in names if caller.allows(name)]
        return JSONResponse({"object": "list", "data": [_model(name) for name in allowed]})

    async def _show_model(self, request: Request) -> Response:
        caller = await self.doorman.admit(request, self.in_thread)
        name = request.path_params["name"]
        self.check_model(caller, name)
        return JSONResponse(_model(name))

    async def _health(self, request: Request) -> Response:
        state = "draining" if self.draining else "ok"
        told = {"status": state, "in_flight": self.places.taken, "queued": self.places.waiting}
        return JSONResponse(told, 503 if self.draining else 200)

    async def _metrics(self, request: Request) -> Response:
        await self.doorman.admit(request, self.in_thread)
        page = await self.in_thread(self.metrics.page, self.client.ledger, self.doorman.budgets())
        return Response(page, media_type=CONTENT_TYPE)

    async def _openapi(self, request: Request) -> Response:
        return JSONResponse(document())

    def check_model(self, caller: Caller, name: str) -> None:
        """The same words for a model that is not there and one that this key may not use."""
        try:
            check_name(self.client, name)
        except UnknownName as error:
            if not caller.models:
                raise unknown_model(str(error)) from None
            raise unknown_model(f"unknown model {name!r}") from None
        if not caller.allows(name):
            raise unknown_model(f"unknown model {name!r}")

    def label(self, name: str) -> str:
        """A model's name as metrics keep it: what people make up does not become a series of its own."""
        model = name.rpartition("+")[0] or name
        return name if name == AUTO or name in self._models or model in self._models else "unknown"

    # --- one request in a thread ----------------------------------------------------------------------------

    def start(self, run: Run) -> None:
        """Run it in a thread; its place is free again when that thread has settled it."""
        self.runs.add(run)
        self.idle.clear()
        loop = asyncio.get_running_loop()
        work = self.threads.submit(self._work, run)
        work.add_done_callback(lambda _: loop.call_soon_threadsafe(self._ended, run))

    def _ended(self, run: Run) -> None:
        self.runs.discard(run)
        self.places.give()
        if not self.runs:
            self.idle.set()

    def _work(self, run: Run) -> None:
        try:
            for item in self._items(run):
                run.channel.put(item)
            run.channel.end()
        except Gone:
            run.channel.end()
        except BaseException as error:
            run.channel.end(error)

    def _items(self, run: Run) -> Iterator[Item]:
        asked, scope = run.asked, run.caller.scope
        limit = asked.limit_nanousd
        if limit is not None:
            scope = f"{scope}/{run.id}"
            self.client.ledger.create(scope, limit_nanousd=limit, parent=run.caller.scope)
        generation = asked.generation()
        wanted = Ask(
            asked.model, asked.chat(), scope, run.id, asked.limit, generation,
            parse_policy(asked.policy) if asked.policy else None,
        )  # fmt: skip
        cost = 0
        for index in range(asked.n or 1):
            each = replace(
                wanted,
                key=f"{run.id}-{index}",
                generation=replace(generation, seed=generation.seed + index),
            )
            with closing(ask(self.client, each, run.channel)) as events:  # type: ignore[type-var]
                for event in events:
                    if isinstance(event, Written):
                        cost += event.cost
                        self.metrics.count_tokens(event.usage)
                    if event == "":
                        run.channel.wait()  # nothing to say, but a chance to go away
                    else:
                        yield index, event
        yield Bill(cost, self._left(scope))

    def _left(self, scope: str) -> int | None:
        left = [each.left_nanousd for each in self.client.ledger.lineage(scope)]
        return min((each for each in left if each is not None), default=None)


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
                refusal = _refusal(error)
                status = refusal.status
                await _answer(refusal)(scope, receive, send)
        except (Gone, ClientDisconnect, OSError):
            self.service.metrics.vanished.inc()
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
            raise _shutting_down()
        try:
            service.rates.spend(caller.name, caller.per_minute or service.limits.per_minute)
        except TooFast as error:
            raise Refusal(
                429, "too many requests; slow down", type="rate_limit_exceeded", code="rate_limit_exceeded",
                retry_after=error.retry_after,
            ) from None  # fmt: skip
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
            raise Gone if gone.done() else _too_late(service.limits.timeout)
        try:
            turn.result()
        except Full as error:
            raise Refusal(
                503, "the server is busy; try again", type="server_error", code="overloaded",
                retry_after=error.retry_after,
            ) from None  # fmt: skip
        if gone.done() or service.draining:
            service.places.give()
            raise Gone if gone.done() else _shutting_down()
        channel: Channel[Item] = Channel(loop, patience=service.limits.patience)
        run = Run(f"chatcmpl-{uuid.uuid4().hex}", asked, caller, channel, deadline, began)
        service.start(run)
        return run

    async def _take(self, run: Run, label: str) -> list[Item]:
        try:
            async with asyncio.timeout_at(run.deadline):
                items = await run.channel.take()
        except TimeoutError:
            raise _too_late(self.service.limits.timeout) from None
        for item in items:
            if isinstance(item, tuple) and isinstance(item[1], Chosen):
                if not run.route:
                    first = time.perf_counter() - run.began
                    self.service.metrics.first_seconds.labels(label).observe(first)
                run.route = run.route or item[1].route
            elif isinstance(item, tuple) and isinstance(item[1], Written):
                run.done.append(item[1])
        return items

    # --- the whole answer at once ---------------------------------------------------------------------------

    async def _whole(self, run: Run, send: Send, label: str) -> int:
        bill = Bill(0, None)
        while items := await self._take(run, label):
            bill = next((item for item in items if isinstance(item, Bill)), bill)
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
            refusal = _refusal(error)
            with suppress(OSError, TimeoutError):
                await self._push(send, event(refusal.body) + DONE, more=False)
            return refusal.status
        return 200

    def _events(self, run: Run, reply: Reply, opened: set[int], items: list[Item]) -> Iterator[bytes]:
        options = run.asked.stream_options
        for item in items:
            if isinstance(item, Bill):
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
            elif isinstance(what, Written) and index < (run.asked.n or 1) - 1:
                yield reply.closing(index, what, None)  # the last one is closed with the bill

    async def _push(self, send: Send, body: bytes, *, more: bool = True) -> None:
        """Raises `Gone` where the client reads nothing for too long."""
        try:
            async with asyncio.timeout(self.service.limits.patience):
                await send({"type": "http.response.body", "body": body, "more_body": more})
        except TimeoutError:
            raise Gone from None

    async def _send(self, response: Response, send: Send) -> None:
        await send(
            {"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers}
        )
        await self._push(send, bytes(response.body), more=False)


async def _body(request: Request, limits: Limits) -> bytes:
    """The body, as JSON announces itself. Raises `Refusal`."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # Also what keeps web pages out: a browser asks before it sends JSON elsewhere, and is not answered.
        raise Refusal(400, f"send JSON with content-type application/json, not {kind or 'without one'!r}")
    too_large = Refusal(413, f"the body is larger than {limits.body_bytes} bytes", code="body_too_large")
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
        raise Refusal(408, f"the body did not arrive within {limits.patience:g} seconds") from None
    return bytes(body)


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _told(run: Run, bill: Bill) -> dict[str, Any]:
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


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "viaticum"}


def _shutting_down() -> Refusal:
    return Refusal(
        503,
        "the server is shutting down; try again",
        type="server_error",
        code="shutting_down",
        retry_after=5,
    )


def _too_late(seconds: float) -> Refusal:
    return Refusal(
        504, f"no answer within {seconds:g} seconds; ask for less", type="server_error", code="timeout"
    )


def _refusal(error: Exception) -> Refusal:
    found = refusal_of(error)
    if found is None:
        log.error("a request broke", exc_info=error)
        return Refusal(500, "the server made a mistake; its log says which", type="server_error")
    return found


def _answer(refusal: Refusal) -> Response:
    return JSONResponse(refusal.body, refusal.status, headers=refusal.headers)


async def _refused(request: Request, error: Exception) -> Response:
    return _answer(_refusal(error))


async def _broken(request: Request, error: Exception) -> Response:
    return _answer(_refusal(error))


async def _no_such_door(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    told = "no such address" if error.status_code == 404 else f"{request.method} is not for this address"
    answer = _answer(Refusal(error.status_code, f"{told}: {request.url.path}"))
    answer.headers.update(error.headers or {})
    return answer
