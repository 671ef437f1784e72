"""The OpenAI-compatible server, as an ASGI application: `Service(client).app`.

A request is let in (`Authenticator`), read, given a place (`ConcurrencyLimiter`), and run in a thread of the server's own pool, where
the ledger and the models are used; the event loop only carries what comes out. A client that goes away closes its
channel: the call ends at the next piece, pays for what was read and written, and gives its place back then, not before.
Leaves out how the process listens, and ends (`serving`), and what the document says (`openapi`).
Needs the `server` extra.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import replace
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from viaticum.agents.cancellation import CallerGone
from viaticum.agents.client import Viaticum
from viaticum.agents.completions import (
    AUTO,
    CompletionFinished,
    CompletionRequest,
    available_names,
    check_name,
    complete,
)
from viaticum.agents.openai_api.openapi import document
from viaticum.agents.openai_api.requests import APIError, unknown_model
from viaticum.agents.server.admission import ConcurrencyLimiter, TokenBuckets
from viaticum.agents.server.api_keys import Keys
from viaticum.agents.server.auth import Authenticator, Caller
from viaticum.agents.server.chat_completions import Chat
from viaticum.agents.server.metrics import CONTENT_TYPE, Metrics
from viaticum.agents.server.run import CostSummary, Item, Limits, Run, answer_of, refusal, shutting_down
from viaticum.errors import UnknownName
from viaticum.routers.query import parse_policy
from viaticum.types import split_model


class Service:
    """What the requests share. keys: None serves everyone. public: whether other machines can reach it; without keys a
    request must then not name this machine as its own (see `Authenticator`)."""

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
        self.doorman = Authenticator(client.ledger, client.budget_name, keys, public=public, within=within)
        self.places = ConcurrencyLimiter(self.limits.concurrency, self.limits.queue)
        self.rates = TokenBuckets()
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
            exception_handlers={HTTPException: _not_found, APIError: _refused, Exception: _broken},
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
            run.channel.close(shutting_down())
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
        names = await self.in_thread(available_names, self.client)
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
        model, _ = split_model(name)
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
        except CallerGone:
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
        wanted = CompletionRequest(
            asked.model,
            asked.chat(),
            scope,
            run.id,
            asked.limit,
            generation,
            parse_policy(asked.policy) if asked.policy else None,
        )
        cost = 0
        for index in range(asked.n or 1):
            each = replace(
                wanted,
                key=f"{run.id}-{index}",
                generation=replace(generation, seed=generation.seed + index),
            )
            with closing(complete(self.client, each, run.channel)) as events:  # type: ignore[type-var]
                for event in events:
                    if isinstance(event, CompletionFinished):
                        cost += event.cost
                        self.metrics.count_tokens(event.usage)
                    if event == "":
                        run.channel.wait()  # nothing to say, but a chance to go away
                    else:
                        yield index, event
        yield CostSummary(cost, self._left(scope))

    def _left(self, scope: str) -> int | None:
        left = [each.left_nanousd for each in self.client.ledger.lineage(scope)]
        return min((each for each in left if each is not None), default=None)


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "viaticum"}


async def _refused(request: Request, error: Exception) -> Response:
    return answer_of(refusal(error))


async def _broken(request: Request, error: Exception) -> Response:
    return answer_of(refusal(error))


async def _not_found(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    told = "no such address" if error.status_code == 404 else f"{request.method} is not for this address"
    answer = answer_of(APIError(error.status_code, f"{told}: {request.url.path}"))
    answer.headers.update(error.headers or {})
    return answer
