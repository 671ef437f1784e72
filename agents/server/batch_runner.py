"""Which batches this server answers: those of its folder that have not ended, each owned by a lease.

Several servers may share a folder and a ledger: the lease of a batch is in the ledger, and is free at once
when a server of the same machine was killed. Leaves out how a batch is answered (`batch_run`).
"""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress

from viaticum.agents.openai_api.errors import APIError
from viaticum.agents.server.batch_lines import LineAnswers
from viaticum.agents.server.batch_run import BatchRun
from viaticum.agents.server.batch_store import BatchStore, StoredBatch
from viaticum.agents.server.line_turns import LineTurns
from viaticum.agents.server.service import Service
from viaticum.agents.workflow.thread_leases import new_owner, take_lease
from viaticum.errors import ViaticumError, one_line

LOOK_SECONDS = 5.0  # between two looks for batches of servers that are gone
REFRESH_SECONDS = 1.0
RENEW_SECONDS = 8.0
CLEAN_SECONDS = 3_600.0
MAX_RUNNING = 4  # batches of a key at once; others wait for one to end
LONGEST_PAUSE = 60.0  # before a batch that failed for a reason of this machine is begun again
_log = logging.getLogger("viaticum.server")


class BatchRunner:
    """Answers batches until it is stopped. All of it belongs to one event loop."""

    def __init__(self, service: Service, store: BatchStore, answers: LineAnswers) -> None:
        self.service, self.store, self.answers = service, store, answers
        self.turns = LineTurns(service.limiter.max_background)
        self._owner = ""
        self._runs: dict[str, BatchRun] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._pauses: dict[str, tuple[float, float]] = {}  # by batch: until when, and how long
        self._wake = asyncio.Event()
        self._main: asyncio.Task[None] | None = None
        self._is_stopping = False

    @property
    def running(self) -> int:
        return len(self._runs)

    def start(self) -> None:
        self._owner = new_owner()
        self._main = asyncio.create_task(self._look())

    def wake(self) -> None:
        """Look at the batches now: one was made or cancelled."""
        self._wake.set()

    def interrupt(self) -> None:
        """Begin no further line; those that run may end."""
        self._is_stopping = True
        for run in self._runs.values():
            run.interrupt()
        self._wake.set()

    async def stop(self) -> None:
        """Wait for the lines that run, whose answers are written; batches go on when a server starts."""
        self.interrupt()
        if self._main is not None:
            await self._main
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    # --- the loop -----------------------------------------------------------------------------------------

    async def _look(self) -> None:
        cleaned = time.monotonic()
        while not self._is_stopping:
            self._wake.clear()
            try:
                for stored in await self.service.run_in_thread(self.store.unfinished):
                    await self._begin(stored)
                if time.monotonic() - cleaned > CLEAN_SECONDS:
                    cleaned = time.monotonic()
                    await self.service.run_in_thread(self.store.delete_expired)
            except ViaticumError as error:
                _log.error("batches cannot be looked at: %s", one_line(error))
            with suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), LOOK_SECONDS)

    async def _begin(self, stored: StoredBatch) -> None:
        """Run a batch that nobody runs, or tell the run of it to look at what has changed."""
        batch = stored.batch["id"]
        if (run := self._runs.get(batch)) is not None:
            await run.refresh()
            return
        if self._is_stopping or self._pauses.get(batch, (0.0, 0.0))[0] > time.monotonic():
            return
        if self._has_to_wait(stored):
            return
        if not await self._is_ours(stored) or not await self._own(batch):
            return
        run = self._runs[batch] = BatchRun(self.service, self.store, self.answers, self.turns, stored)
        task = self._tasks[batch] = asyncio.create_task(self._run(run))
        task.add_done_callback(lambda _: self._tasks.pop(batch, None))

    def _has_to_wait(self, stored: StoredBatch) -> bool:
        """Whether as many batches of its key run as may; one that only has to be ended does not wait."""
        if stored.batch["status"] == "cancelling" or time.time() >= stored.batch["expires_at"]:
            return False
        return sum(run.stored.owner == stored.owner for run in self._runs.values()) >= MAX_RUNNING

    async def _is_ours(self, stored: StoredBatch) -> bool:
        """Whether its key is one of this server, or was one and is revoked."""
        recall = self.service.authenticator.recall
        try:
            return await self.service.run_in_thread(recall, stored.caller, stored.scope) is not None
        except APIError:
            return True

    async def _own(self, batch: str) -> bool:
        ledger = self.service.client.ledger
        return await self.service.run_in_thread(take_lease, ledger, f"batch/{batch}", self._owner)

    async def _run(self, run: BatchRun) -> None:
        keeper = asyncio.create_task(self._keep(run))
        try:
            await run.run()
            self._pauses.pop(run.id, None)
        except Exception as error:
            pause = min(LONGEST_PAUSE, 2 * self._pauses.get(run.id, (0.0, LOOK_SECONDS / 2))[1])
            self._pauses[run.id] = (time.monotonic() + pause, pause)
            is_known = isinstance(error, ViaticumError | APIError)
            message = "the batch %s stopped, and goes on in %g s: %s"
            _log.error(message, run.id, pause, one_line(error), exc_info=None if is_known else error)
        finally:
            keeper.cancel()
            del self._runs[run.id]
            self.wake()  # another may have its turn
            with suppress(ViaticumError):  # it ends by itself
                ledger = self.service.client.ledger
                await self.service.run_in_thread(ledger.end_lease, f"batch/{run.id}", self._owner)

    async def _keep(self, run: BatchRun) -> None:
        """Store the progress of a run and renew its lease; interrupt it where another server has that."""
        renewed = time.monotonic()
        while True:
            await asyncio.sleep(REFRESH_SECONDS)
            try:
                await run.refresh()
                if time.monotonic() - renewed > RENEW_SECONDS:
                    renewed = time.monotonic()
                    if not await self._own(run.id):
                        _log.error("another server took over the batch %s", run.id)
                        run.interrupt()
            except ViaticumError as error:
                _log.error("the progress of the batch %s is not stored: %s", run.id, one_line(error))
