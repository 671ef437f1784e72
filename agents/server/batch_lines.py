"""One line of a batch is answered as a live request would be: same checks, routes, budget and response.

Its calls have ledger keys that follow from the batch and the line, so that a line that is asked again, after
a failure or a kill, pays once. It waits for a background slot, which live requests have first, and without
slot and hold for the limit of its provider. Leaves out the files, and which line is next (`batch_run`).
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from viaticum.agents.cancellation import CallerGone
from viaticum.agents.openai_api.api import CompletionAPI
from viaticum.agents.openai_api.batches import Line
from viaticum.agents.openai_api.embeddings import parse_embeddings
from viaticum.agents.openai_api.errors import model_not_found, shutting_down
from viaticum.agents.server.admission import RateLimitExceeded
from viaticum.agents.server.auth import Caller
from viaticum.agents.server.batch_budget import may_fit
from viaticum.agents.server.channel import Channel
from viaticum.agents.server.completion_run import whole_response
from viaticum.agents.server.embeddings import Embeddings
from viaticum.agents.server.run import REQUEST_ID, Run, RunItem, api_error
from viaticum.agents.server.service import Service
from viaticum.agents.workflow.calls import posted_nanousd
from viaticum.agents.workflow.deadlines import Deadline
from viaticum.agents.workflow.settings import AUTO
from viaticum.budgets.tagging import tagged
from viaticum.errors import BudgetClosed, BudgetExceeded, LedgerError, ProviderWait

TRIES = 6  # of a line whose provider is busy or away, and that cost nothing yet
REFUSALS = 3 * TRIES  # by its provider that a line waits after, between which its calls do not try again
FAILOVER_AFTER = 3  # refusals of a line that any model may answer
LONGEST_WAIT = 60.0  # seconds between two of them
RECALL_SECONDS = 5.0  # after which the rights of a line's key are looked up again while it waits
LONGEST_BUDGET_WAIT = 10.0  # seconds until a line that did not fit beside running calls is asked again
BUSY = (429, 502, 503)
SHUTTING_DOWN = "shutting_down"


Recall = Callable[[], Awaitable[Caller]]


class Interrupted(Exception):
    """The line was not answered, since its batch stops or the server does; it can be asked again."""


@dataclass(frozen=True, slots=True)
class LineAnswer:
    """status: as of HTTP; body: the response, or an error."""

    status: int
    request_id: str
    body: Mapping[str, Any]


@dataclass(eq=False)
class LinesAtWork:
    """The lines of one caller that run, so that one that does not fit the budget waits for what they hold."""

    running: int = 0
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    def begin(self) -> None:
        self.running += 1

    def end(self) -> None:
        """Count one less, and wake those who wait."""
        self.running -= 1
        self.ended.set()
        self.ended = asyncio.Event()


class LineAnswers:
    """Answers lines.

    Args:
        apis: by the endpoint.
    """

    def __init__(self, service: Service, embeddings: Embeddings, apis: Mapping[str, CompletionAPI]) -> None:
        self.service, self.embeddings, self.apis = service, embeddings, apis
        self._at_work: dict[str, LinesAtWork] = {}

    async def answer(
        self, recall: Recall, endpoint: str, batch: str, line: Line, halt: asyncio.Event
    ) -> LineAnswer:
        """The answer, or the error that stands for it.

        Args:
            recall: returns the caller with what its key may do by now, or raises `Interrupted`.
            batch: its id.
            halt: set where lines that are not running yet shall not begin.

        Raises:
            Interrupted: there is none.
        """
        key = line_key(batch, line)
        request_id = f"req_{key}"
        REQUEST_ID.set(request_id)
        caller = await recall()
        at_work = self._at_work.setdefault(caller.scope, LinesAtWork())
        tries = waits = refusals = 0
        while True:
            refusal: BudgetExceeded | None = None
            try:
                with tagged(batch=batch):
                    body = await self._ask(recall, endpoint, key, line, halt, at_work, refusals)
                return LineAnswer(200, request_id, body)
            except Interrupted:
                raise
            except ProviderWait as error:
                refusals += error.is_refusal
                if refusals < REFUSALS:
                    await self._wait(recall, halt, error.seconds)
                    continue
                found = api_error(error.__cause__ if isinstance(error.__cause__, Exception) else error)
                return LineAnswer(found.status, request_id, found.body)
            except Exception as error:
                found = api_error(error)
                refusal = error if isinstance(error, BudgetExceeded) else None
            code = found.error["code"]
            if code == SHUTTING_DOWN or self.service.draining:
                raise Interrupted
            if refusal is not None and (at_work.running or await self._may_fit(caller, refusal)):
                wait = min(LONGEST_BUDGET_WAIT, 0.25 * 2.0 ** min(waits, 6))
                await unless(halt, _woken(at_work.ended, wait))
                waits += 1
                continue
            tries += 1
            if found.status not in BUSY or tries == TRIES or await self._has_cost(endpoint, key):
                return LineAnswer(found.status, request_id, found.body)
            await self._wait(recall, halt, max(found.retry_after or 0, 2.0 ** (tries - 1)))

    async def _wait(self, recall: Recall, halt: asyncio.Event, seconds: float) -> None:
        """Wait for a provider while the line's key may have it asked, and pay. Raises `Interrupted`."""
        loop = asyncio.get_running_loop()
        until = loop.time() + min(LONGEST_WAIT, seconds)
        while (left := until - loop.time()) > 0:
            await unless(halt, asyncio.sleep(min(left, RECALL_SECONDS)))
            with suppress(LedgerError):  # it is asked for again, at the latest with the line
                if await self._is_closed(await recall()):
                    return

    async def _is_closed(self, caller: Caller) -> bool:
        try:
            await self.service.run_in_thread(self.service.client.ledger.check_open, caller.scope)
        except BudgetClosed:
            return True
        return False

    async def _may_fit(self, caller: Caller, refusal: BudgetExceeded) -> bool:
        ledger = self.service.client.ledger
        return await self.service.run_in_thread(may_fit, ledger, caller.scope, refusal)

    async def _has_cost(self, endpoint: str, key: str) -> bool:
        """Whether tries of a line were charged, of which a further one would be charged again."""
        api = self.apis.get(endpoint)
        if api is None:
            return False  # an encoder that fails costs nothing
        ledger, first = self.service.client.ledger, f"{response_id(api, key)}-0"
        return bool(await self.service.run_in_thread(posted_nanousd, ledger, first))

    async def _ask(
        self,
        recall: Recall,
        endpoint: str,
        key: str,
        line: Line,
        halt: asyncio.Event,
        at_work: LinesAtWork,
        refusals: int,
    ) -> Mapping[str, Any]:
        """One try. Raises `Interrupted`, or any error of a request. refusals: by its provider before."""
        began, label, status = time.perf_counter(), "unknown", 500
        api = self.apis.get(endpoint)
        try:
            if api is None:
                label, body = await self._embed(recall, key, line, halt, at_work)
            else:
                label, body = await self._complete(api, recall, key, line, halt, at_work, refusals)
            status = 200
            return body
        except (Interrupted, ProviderWait):
            status = 0
            raise
        except Exception as error:
            status = api_error(error).status
            raise
        finally:
            if status:
                self.service.metrics.requests.labels(label, str(status)).inc()
                self.service.metrics.seconds.labels(label).observe(time.perf_counter() - began)

    async def _complete(
        self,
        api: CompletionAPI,
        recall: Recall,
        key: str,
        line: Line,
        halt: asyncio.Event,
        at_work: LinesAtWork,
        refusals: int,
    ) -> tuple[str, Mapping[str, Any]]:
        service, loop = self.service, asyncio.get_running_loop()
        caller = await self._take_rate(recall, halt)
        request = await service.run_for_lines(api.parse, line.body)
        service.rate_limits.charge(_rate_name(caller), (request.n or 1) - 1)
        service.check_model(caller, request.model)
        request = await service.run_for_lines(api.load, request, caller.owner)
        caller = await self._take_slot(recall, request.model, halt)
        channel: Channel[RunItem] = Channel(loop, stall_timeout=service.limits.timeout)
        run = Run(
            response_id(api, key),
            request,
            caller,
            channel,
            loop.time() + service.limits.timeout,
            time.perf_counter(),
            None if request.max_seconds is None else Deadline.after(request.max_seconds),
            request.session,
            is_batch_line=True,
            waits_aside=refusals < FAILOVER_AFTER or request.model.partition("+")[0] != AUTO,
        )
        at_work.begin()
        try:
            service.start(run)
            body, _, _ = await whole_response(service, api, run)
        except CallerGone:
            raise shutting_down() from None
        finally:
            channel.close()  # without effect after the end
            at_work.end()
        return service.model_label(request.model), body

    async def _embed(
        self, recall: Recall, key: str, line: Line, halt: asyncio.Event, at_work: LinesAtWork
    ) -> tuple[str, Mapping[str, Any]]:
        caller = await self._take_rate(recall, halt)
        request = await self.service.run_for_lines(parse_embeddings, line.body)
        self.embeddings.check_model(caller, request.model)
        caller = await self._take_slot(recall, request.model, halt)
        at_work.begin()
        try:
            body, _ = await self.service.run_in_taken_slot(
                caller, self.embeddings.answer, caller, request, f"embed-{key}", background=True
            )
        finally:
            at_work.end()
        return request.model, body

    async def _take_rate(self, recall: Recall, halt: asyncio.Event) -> Caller:
        """Wait until the rate of the caller allows a line, right or wrong. Raises `Interrupted`."""
        limits = self.service.limits
        while True:
            caller = await recall()
            try:
                per_minute = caller.per_minute or limits.per_minute
                self.service.rate_limits.consume(_rate_name(caller), per_minute)
                return caller
            except RateLimitExceeded as error:
                await unless(halt, asyncio.sleep(error.retry_after))

    async def _take_slot(self, recall: Recall, model: str, halt: asyncio.Event) -> Caller:
        """Wait for a slot; returns the caller as it is then.

        Raises:
            Interrupted: it is time to stop, or the caller may do nothing any more.
            APIError: with status 404: it may not use the model any more.
        """
        service, caller = self.service, await recall()
        await unless(halt, service.limiter.acquire_background(caller.name))
        try:
            if service.draining:
                raise Interrupted
            caller = await recall()  # both waits may take hours
            if not caller.may_use(model):
                raise model_not_found(f"unknown model {model!r}")
            return caller
        except BaseException:
            service.limiter.release(caller.name, background=True)
            raise


def _rate_name(caller: Caller) -> str:
    return f"batch {caller.name}"


def line_key(batch: str, line: Line) -> str:
    """What the ids and ledger keys of a line are made of: the same whenever it is asked."""
    return hashlib.sha256(f"{batch} {line.number}".encode()).hexdigest()[:32]


def response_id(api: CompletionAPI, key: str) -> str:
    return f"{api.id_prefix}{key}"


async def _woken(event: asyncio.Event, seconds: float) -> None:
    with suppress(TimeoutError):
        await asyncio.wait_for(event.wait(), seconds)


async def unless(halt: asyncio.Event, awaited: Any) -> None:
    """Wait for something, unless it is time to stop. Raises `Interrupted`."""
    task, stop = asyncio.ensure_future(awaited), asyncio.create_task(halt.wait())
    try:
        await asyncio.wait({task, stop}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Interrupted
        task.result()
    finally:
        task.cancel()
        stop.cancel()
