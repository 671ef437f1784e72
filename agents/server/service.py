"""The state that the requests of a server share, and the threads that run them.

Ledger and models are used in a thread pool of the service; the event loop only forwards what the threads
send. A client that disconnects closes its channel: the call ends at the next piece of text, is charged for
what was read and written, and only then frees its slot. Leaves out HTTP (`app`, `completion_route`), and how
the process listens and stops (`process`). Needs the `server` extra.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, nullcontext, suppress
from contextvars import copy_context
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from viaticum.agents.cancellation import CallerGone
from viaticum.agents.client import Viaticum
from viaticum.agents.completions import (
    CompletionEvent,
    CompletionFinished,
    CompletionRequest,
    check_name,
    complete,
)
from viaticum.agents.openai_api.errors import (
    model_not_found,
    overloaded,
    request_timeout,
    shutting_down,
)
from viaticum.agents.responses_api.store import ResponseStore
from viaticum.agents.server.admission import ConcurrencyLimiter, QueueFull, TokenBuckets, fair_share
from viaticum.agents.server.api_keys import ApiKeyStore
from viaticum.agents.server.auth import Authenticator, Caller
from viaticum.agents.server.batch_store import BatchStore
from viaticum.agents.server.metrics import Metrics
from viaticum.agents.server.run import CostSummary, Limits, Run, RunItem
from viaticum.agents.workflow.calls import holds_of, posted_nanousd
from viaticum.agents.workflow.settings import AUTO
from viaticum.budgets.records import HELD_STATES, digest
from viaticum.budgets.tagging import tagged
from viaticum.errors import ProviderWait, UnknownName, ViaticumError
from viaticum.models.remote.rate_limits import waiting_at_most
from viaticum.residency import Residency
from viaticum.routers.query import parse_policy
from viaticum.types import ThinkingDelta, Usage, split_model

LINE_WAIT = 1.0  # seconds that a line of a batch waits for its provider with its slot and its hold
Result = TypeVar("Result")


class Service:
    """The shared state of a server, and the runs in progress.

    Args:
        client: answers the requests; its budget pays for callers without one of their own.
        keys: the key store; None serves without keys.
        public: other machines can reach the server (see `Authenticator`).
        root_scope: accept only keys of this budget and those below it; None accepts all.
        responses: where responses are kept, for conversations that go on by an id; None keeps none.
        files: where files and batches are kept; None keeps none.
    """

    def __init__(
        self,
        client: Viaticum,
        *,
        keys: ApiKeyStore | None = None,
        limits: Limits | None = None,
        public: bool = False,
        root_scope: str | None = None,
        responses: ResponseStore | None = None,
        files: BatchStore | None = None,
    ) -> None:
        self.responses, self.files = responses, files
        self.client, self.limits = client, limits or Limits()
        self.authenticator = Authenticator(
            client.ledger, client.budget_name, keys, public=public, root_scope=root_scope
        )
        self.limiter = ConcurrencyLimiter(self.limits.concurrency, self.limits.queue)
        self.rate_limits = TokenBuckets()
        self.metrics = Metrics(self.limiter)
        self._call_threads = ThreadPoolExecutor(self.limits.concurrency, "viaticum-call")
        # Short work, such as reads of the ledger, that must not wait for a call.
        self._short_threads = ThreadPoolExecutor(2, "viaticum-short")
        self._line_threads = ThreadPoolExecutor(1, "viaticum-line")
        self._file_threads = ThreadPoolExecutor(4, "viaticum-file")
        self.runs: set[Run] = set()
        self.draining = False
        self._idle = asyncio.Event()
        self._idle.set()
        self._models = {spec.name for spec in client.catalogue.models()}

    async def run_in_thread(self, function: Callable[..., Result], *args: Any) -> Result:
        """Run a short function, such as one that reads the ledger, outside the event loop's thread."""
        return await asyncio.get_running_loop().run_in_executor(self._short_threads, function, *args)

    async def run_for_lines(self, function: Callable[..., Result], *args: Any) -> Result:
        """As `run_in_thread`, for lines of batches, which live requests do not wait for."""
        return await asyncio.get_running_loop().run_in_executor(self._line_threads, function, *args)

    async def run_with_files(self, function: Callable[..., Result], *args: Any) -> Result:
        """Run a function that reads or writes a large file, which short ones do not wait for."""
        return await asyncio.get_running_loop().run_in_executor(self._file_threads, function, *args)

    async def run_in_slot(self, caller: Caller, function: Callable[..., Result], *args: Any) -> Result:
        """Run a function that makes a call, in a slot and a thread of its own.

        Raises:
            APIError: all slots and the queue are in use, or none is free in time.
        """
        share = None if caller.is_alone else fair_share(self.limiter.max_running)
        try:
            async with asyncio.timeout(self.limits.timeout):
                await self.limiter.acquire(caller.name, share)
        except QueueFull as error:
            raise overloaded(error.retry_after) from None
        except TimeoutError:
            raise request_timeout(self.limits.timeout) from None
        return await self.run_in_taken_slot(caller, function, *args)

    async def run_in_taken_slot(
        self, caller: Caller, function: Callable[..., Result], *args: Any, background: bool = False
    ) -> Result:
        """As `run_in_slot`, in a slot that the caller has; it is free once the function has ended."""
        loop = asyncio.get_running_loop()
        future = self._call_threads.submit(copy_context().run, function, *args)
        release = partial(self.limiter.release, caller.name, background=background)
        future.add_done_callback(lambda _: loop.call_soon_threadsafe(release))
        return await asyncio.wrap_future(future)

    def check_model(self, caller: Caller, name: str) -> None:
        """Raise `APIError` with status 404 for a model that does not exist or that the caller may not use.

        Both have the same message, so that a key restricted to some models does not reveal the others.
        """
        try:
            check_name(self.client, name)
        except UnknownName as error:
            if not caller.models:
                raise model_not_found(str(error)) from None
            raise model_not_found(f"unknown model {name!r}") from None
        if not caller.may_use(name):
            raise model_not_found(f"unknown model {name!r}")

    def render_metrics(self, caller: Caller) -> bytes:
        """The metrics that a caller may see: all, or the dollars of its budget.

        Reads the ledger: not for the event loop's thread.
        """
        ledger = self.client.ledger
        if not caller.all_metrics:
            return self.metrics.render_budgets(ledger, [caller.scope])
        budgets = self.authenticator.budget_names()
        return self.metrics.render(ledger) + self.metrics.render_budgets(ledger, budgets)

    def model_label(self, name: str) -> str:
        """The model's name in metrics; names that do not exist share one, to bound the label's values."""
        model, _ = split_model(name)
        return name if name == AUTO or name in self._models or model in self._models else "unknown"

    # --- draining -----------------------------------------------------------------------------------------

    async def drain(self, grace: float) -> int:
        """Reject new requests, wait until the running ones end, and cancel them after `grace` seconds.

        Returns when all are settled, with the number of cancelled ones.
        """
        self.draining = True
        self.limiter.max_queued = 0
        with suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), grace)
        return await self.cancel_runs()

    async def cancel_runs(self) -> int:
        """Cancel the running requests, and wait until they are settled. Returns how many they were."""
        self.draining = True
        runs = list(self.runs)
        for run in runs:
            run.channel.close(shutting_down())
        await self._idle.wait()
        return len(runs)

    def close(self) -> None:
        self._call_threads.shutdown()
        self._short_threads.shutdown()
        self._line_threads.shutdown()
        self._file_threads.shutdown()

    # --- one request in a thread --------------------------------------------------------------------------

    def start(self, run: Run) -> None:
        """Execute a run in a thread. Its slot is released once that thread has settled its calls."""
        self.runs.add(run)
        self._idle.clear()
        loop = asyncio.get_running_loop()
        # In the context of the request, so that spans of its calls are below the request's.
        future = self._call_threads.submit(copy_context().run, self._execute, run)
        future.add_done_callback(lambda _: loop.call_soon_threadsafe(self._release, run))

    def _release(self, run: Run) -> None:
        self.runs.discard(run)
        self.limiter.release(run.caller.name, background=run.is_batch_line)
        if not self.runs:
            self._idle.set()

    def _execute(self, run: Run) -> None:
        try:
            with self._request_limit(run), tagged(**run.caller.tags), _waits(run):
                for item in self._items(run):
                    run.channel.put(item)
            run.channel.end()
        except CallerGone:
            run.channel.end()
        except BaseException as error:
            run.channel.end(error)

    def _items(self, run: Run) -> Iterator[RunItem]:
        request = self._completion_request(run)
        cost = 0
        for index in range(run.request.n or 1):
            settings = request.settings
            if index:
                settings = settings.model_copy(update={"seed": (settings.seed or 0) + index})
            choice = replace(request, key=f"{run.id}-{index}", settings=settings)
            for event in self._choice(run, choice, index):
                if isinstance(event, CompletionFinished):
                    cost += event.cost
                    self.metrics.count_tokens(event.usage)
                if event == "":
                    run.channel.wait()  # no text to send, but the client may have disconnected
                else:
                    yield index, event
        if run.is_batch_line:  # what was paid before a kill, too
            cost = sum(posted_nanousd(self.client.ledger, f"{run.id}-{index}") for index in range(index + 1))
        yield CostSummary(cost, self._left(request.scope))

    def _choice(self, run: Run, choice: CompletionRequest, index: int) -> Iterator[CompletionEvent]:
        """The events of one choice. One after the first that fails ends there; those before it are paid."""
        text, thinking = "", ""
        try:
            with closing(complete(self.client, choice, run.channel)) as events:  # type: ignore[type-var]
                for event in events:
                    text += event if isinstance(event, str) else ""
                    thinking += event.text if isinstance(event, ThinkingDelta) else ""
                    yield event
        except ViaticumError as error:
            if not index or isinstance(error, ProviderWait):
                raise
            posts = [each for each in self.client.ledger.entries(key=choice.key) if each.kind == "post"]
            used = sum((Usage(each.usage) for each in posts), Usage())
            cost = sum(each.nanousd for each in posts)
            yield CompletionFinished(text, "length", used, cost, (), reason=str(error), thinking=thinking)

    def _request_limit(self, run: Run) -> AbstractContextManager[object]:
        """A budget of the request's own, below the caller's, until it ends."""
        limit = run.request.limit_nanousd
        if limit is None:
            return nullcontext()
        ledger, earlier = self.client.ledger, dict[str, int]()
        if run.is_batch_line:  # what was paid before a kill, too, and what calls that it cut still hold
            for key in (f"{run.id}-{number}" for number in range(run.request.n or 1)):
                limit -= posted_nanousd(ledger, key)
                for hold in holds_of(ledger, key):
                    if hold.state == "unknown":
                        limit -= hold.held_nanousd
                    elif hold.state in HELD_STATES:
                        earlier[hold.key] = hold.held_nanousd
        scope, limit = run.caller.scope, max(1, limit)
        return ledger.request_limit(_scope_of(run), parent=scope, limit_nanousd=limit, earlier=earlier)

    def _completion_request(self, run: Run) -> CompletionRequest:
        """The request for the first choice."""
        request = run.request
        return CompletionRequest(
            request.model,
            request.to_messages(),
            _scope_of(run),
            run.id,
            request.to_settings(),
            request.to_extra(),
            parse_policy(request.policy) if request.policy else None,
            is_streamed=bool(request.stream),
            deadline=run.limit,
            session=_session_of(run),
            residency=run.caller.residency & Residency.of(request.only),
            is_lenient=request.is_lenient,
            resumes=run.is_batch_line,
        )

    def _left(self, scope: str) -> int | None:
        """Nano-dollars left in the scope and all budgets above it; None where none of them limits dollars."""
        left = [budget.left_nanousd for budget in self.client.ledger.lineage(scope)]
        return min((each for each in left if each is not None), default=None)


def _waits(run: Run) -> AbstractContextManager[None]:
    """A line of a batch waits for its provider without its slot and its hold, but for moments; one that any
    model may answer, and whose model goes on refusing, fails here so that another one is asked.
    """
    return waiting_at_most(LINE_WAIT) if run.waits_aside else nullcontext()


def _session_of(run: Run) -> str | None:
    """The session of a request: callers have names of their own."""
    name = run.session
    return None if name is None else digest([run.caller.name, run.caller.scope, name])


def _scope_of(run: Run) -> str:
    """The budget that a request pays from: the caller's, or its own below that."""
    return run.caller.scope if run.request.limit_nanousd is None else f"{run.caller.scope}/{run.id}"
