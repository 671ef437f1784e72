"""Sends prepared batches to their providers, looks after them, and posts what they answered.

A step that fails is taken again later, with longer and longer waits. A batch whose id is not known, because a
process died or a connection broke at the wrong moment, is looked for at the provider before it is sent again.
Every answer is settled once, under the hold of its row; requests that were not answered free theirs. Leaves
out which rows are sent (`agents.batch.deferred`) and the providers themselves (`models.remote`).
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TypeVar

from viaticum.agents.batch.batch_records import BatchJournal, ProviderBatch
from viaticum.agents.batch.input import BatchRow
from viaticum.agents.batch.planned_rows import NO_FALLBACK, PlannedRow
from viaticum.agents.batch.steps import RowTools, call_for
from viaticum.agents.workflow.serialization import completion_to_json, plan_from_hold
from viaticum.budgets import Entry, Hold, Settlement
from viaticum.errors import (
    AuthenticationFailed,
    InputError,
    MissingExtra,
    ModelError,
    QuotaExhausted,
    ViaticumError,
)
from viaticum.models.remote.batch_api import (
    BatchAPI,
    BatchLine,
    BatchName,
    BatchState,
    MaybeSent,
)
from viaticum.models.remote.batch_endpoints import open_batch_api
from viaticum.models.remote.batch_lines import completion_of
from viaticum.models.remote.errors import error_kind, retry_after, translate_error
from viaticum.models.remote.model import RemoteModel

FIRST_LOOK, LONGEST_LOOK, SLOWER = 1.0, 60.0, 1.3  # seconds between looks, and the factor of each to the last
LISTING_SECONDS = 20.0  # in which a batch that was created appears in the provider's list
MISSING_LOOKS = 12  # at which the provider does not know a batch, before it is lost
INCOMPLETE_LOOKS = 4  # at which results that are billed are not there, before they are lost
BLOCK = 256  # rows that are settled in one transaction
FATAL = (AuthenticationFailed, QuotaExhausted, MissingExtra)
T = TypeVar("T")
_log = logging.getLogger("viaticum")


@dataclass
class ProviderBatches:
    """The batches of one job.

    Args:
        tools: of the job.
        journal: of its batches.
        rows: reads rows of the input by their numbers, in the order of the input.
        settled: called with the numbers of rows whose answer is in the ledger now.
        refused: called with a model whose batches the provider does not take.
        full: called with a model of which too much waits at the provider, and the size of the batch.
        cancelled: whether all batches are given up.
    """

    tools: RowTools
    journal: BatchJournal
    rows: Callable[[set[int]], Iterable[BatchRow]]
    settled: Callable[[Iterable[int]], None]
    refused: Callable[[str], None]
    full: Callable[[str, int], None]
    cancelled: bool = False
    _apis: dict[str, BatchAPI] = field(default_factory=dict)

    def close(self) -> None:
        for api in self._apis.values():
            api.close()

    def api(self, model: str) -> BatchAPI:
        if model not in self._apis:
            self._apis[model] = open_batch_api(self.tools.resources.catalogue[model])
        return self._apis[model]

    def advance(self, batch: ProviderBatch) -> None:
        """Take the next step of a batch. Its next look is set; or it is collected.

        Raises:
            AuthenticationFailed, QuotaExhausted, MissingExtra: they concern all rows of the model.
            LedgerError: the ledger failed.
        """
        before = batch.state.status if batch.state is not None else ""
        wait: float | None = None
        try:
            self._send(batch) if not batch.id else self._look(batch)
        except MaybeSent:
            wait = FIRST_LOOK
        except Exception as error:
            wait = self._failed(batch, error)
        changed = batch.state is not None and batch.state.status != before
        batch.wait = FIRST_LOOK if changed or not batch.wait else min(LONGEST_LOOK, batch.wait * SLOWER)
        batch.next_look = time.time() + (batch.wait if wait is None else max(wait, batch.wait))
        if batch.until is not None and not batch.cancelling:
            batch.next_look = min(batch.next_look, max(batch.until, time.time() + FIRST_LOOK))

    def _is_given_up(self, batch: ProviderBatch) -> bool:
        return self.cancelled or (batch.until is not None and time.time() >= batch.until)

    # --- to the provider --------------------------------------------------------------------------

    def _send(self, batch: ProviderBatch) -> None:
        api, journal = self.api(batch.model), self.journal
        others = frozenset(each.id for each in journal.batches if each.id)
        name = BatchName(batch.name, len(batch.keys), batch.prepared, others)
        if batch.maybe_sent:
            asked = time.time()
            found = api.find(name)
            if found is not None:
                journal.created(batch, found)
                batch.maybe_sent = False
                return
            if asked - batch.unknown_since < LISTING_SECONDS:
                raise MaybeSent("it may not be listed yet")
            batch.maybe_sent = False
        if self._is_given_up(batch):
            self._give_back(batch)
            return
        file = journal.requests_file(batch)
        if not batch.file_id and (file_id := api.upload(file)):
            journal.uploaded(batch, file_id)
        batch.maybe_sent = True
        spec = self.tools.resources.catalogue[batch.model]
        try:
            state = api.create(file, batch.file_id, name, spec.batch_seconds / 3600)
        except Exception as error:
            batch.maybe_sent = not issubclass(error_kind(error), InputError)
            raise
        journal.created(batch, state)
        batch.maybe_sent = False

    def _look(self, batch: ProviderBatch) -> None:
        api = self.api(batch.model)
        batch.state = api.state(batch.id)
        if batch.state.ended:
            self._collect(batch, api, batch.state)
            return
        batch.missing = 0
        if not batch.cancelling and self._is_given_up(batch):
            batch.state = api.cancel(batch.id)
            self.journal.cancelling(batch)

    def _failed(self, batch: ProviderBatch, error: Exception) -> float | None:
        """Decide what an error means; returns the seconds to wait that it asks for."""
        if isinstance(error, ViaticumError):
            raise error
        kind, spec = error_kind(error), self.tools.resources.catalogue[batch.model]
        translated = translate_error(error, spec)
        if issubclass(kind, FATAL):
            raise translated from error
        if kind is ModelError and not _is_of_connection(error):
            raise error
        if issubclass(kind, InputError):
            self._rejected(batch, translated, getattr(error, "status_code", None))
            return None
        if batch.maybe_sent:
            batch.unknown_since = time.time()
        _log.warning("%s: %s; tried again later", batch.name, translated)
        return retry_after(error)

    def _rejected(self, batch: ProviderBatch, error: ViaticumError, status: int | None) -> None:
        """The provider takes no such request: it has not created the batch, or has lost it or its results."""
        ended = batch.state is not None and batch.state.ended
        if not batch.id and not batch.maybe_sent:
            _log.warning("%s: %s; its %d rows are asked directly", batch.name, error, len(batch.keys))
            self.refused(batch.model)
            self._give_back(batch)
        elif status == 404 or not batch.id or ended:
            batch.missing += 1
            if batch.missing >= MISSING_LOOKS:
                _log.warning("%s: the provider has lost it (%s); its cost is unknown", batch.name, error)
                self._end(batch, {}, {}, lost=set(batch.keys))
        else:  # such as a cancellation that came too late
            _log.info("%s: %s", batch.name, error)

    def _give_back(self, batch: ProviderBatch, *, again: bool = False) -> None:
        """Free the holds of a batch that is not billed. again: a further batch may take its rows."""
        self._end(batch, {}, dict.fromkeys(batch.keys, "not sent"), again=again)

    # --- from the provider ------------------------------------------------------------------------

    def _collect(self, batch: ProviderBatch, api: BatchAPI, state: BatchState) -> None:
        if state.failure:
            _log.warning("%s has failed: %s", batch.name, state.failure)
            if state.is_full:
                self.full(batch.model, len(batch.keys))
            else:
                self.refused(batch.model)
            self._give_back(batch, again=state.is_full and len(batch.keys) > 1)
            api.clean_up(state)
            return
        answers, refusals = _by_row(batch, api.results(state))
        absent = set(batch.keys) - set(answers) - set(refusals)
        lost = (state.succeeded or 0) - len(answers) if absent else 0
        if lost > 0:
            batch.incomplete += 1
            if batch.incomplete < INCOMPLETE_LOOKS:
                _log.warning("%s: %d results are missing; looked for again", batch.name, lost)
                return
        self._end(batch, answers, refusals, lost=absent if lost > 0 else set())
        api.clean_up(state)

    def _end(
        self,
        batch: ProviderBatch,
        answers: dict[int, BatchLine],
        refusals: dict[int, str],
        *,
        lost: set[int] | None = None,
        again: bool = False,
    ) -> None:
        """Settle the answers, free the holds of the others, and close the batch.

        Args:
            answers: by row.
            refusals: why there is no answer, by row.
            lost: rows of which it is unknown whether they were answered; their holds stay.
            again: a further batch may take the rows without an answer.
        """
        lost = lost or set()
        holds = self._holds(batch)
        settled = {number for number, hold in holds.items() if hold.state == "posted"}
        for rows in blocks(self.rows(set(answers) - settled)):
            done, unreadable = self._settle(batch, answers, holds, rows)
            settled |= done
            lost |= unreadable
        for number, hold in holds.items():
            if number in settled or hold.state not in ("dispatched", "unknown"):
                continue
            if number in lost:
                self.tools.resources.ledger.abandon(hold.key)
            else:
                self.tools.resources.ledger.void(hold.key)
        self.settled(settled)
        self.journal.collected(batch, () if again else set(batch.keys) - settled)

    def _holds(self, batch: ProviderBatch) -> dict[int, Hold]:
        ledger, found = self.tools.resources.ledger, dict[int, Hold]()
        for part in blocks(batch.keys.items()):
            holds = ledger.find([key for _, key in part])
            found |= {number: holds[key] for number, key in part if key in holds}
        return found

    def _settle(
        self,
        batch: ProviderBatch,
        answers: dict[int, BatchLine],
        holds: dict[int, Hold],
        rows: Sequence[BatchRow],
    ) -> tuple[set[int], set[int]]:
        """Post the answers of some rows with their texts; returns those posted, and those unreadable."""
        ready: list[tuple[int, Settlement]] = []
        cached: list[tuple[str | None, str, str]] = []
        unreadable = set[int]()
        for row in rows:
            hold = holds[row.number]
            plan = plan_from_hold(hold)
            assert plan is not None
            call = call_for(self.tools.resources, PlannedRow(row, plan, NO_FALLBACK))
            assert isinstance(call.model, RemoteModel)
            try:
                completion = completion_of(
                    call.model, call.messages, call.generation, answers[row.number].body
                )
            except ViaticumError as error:
                _log.warning("%s: an answer cannot be read (%s); its cost is unknown", hold.key, error)
                unreadable.add(row.number)
                continue
            text = json.dumps(completion_to_json(completion))
            ready.append((row.number, Settlement(hold.key, completion.usage.models, text)))
            if self.tools.cache is not None:
                cached.append((self.tools.cache.key(call, hold.parameters), text, hold.key))
        entries = self.tools.resources.ledger.settle_many([each for _, each in ready])
        batch.posted += sum(entry.nanousd for entry in entries if isinstance(entry, Entry))
        posted = {
            number for (number, _), entry in zip(ready, entries, strict=True) if isinstance(entry, Entry)
        }
        for (_, each), entry in zip(ready, entries, strict=True):
            if not isinstance(entry, Entry):
                _log.warning("%s cannot be settled: %s", each.key, entry)
        if self.tools.cache is not None:
            self.tools.cache.put([(key, text, paid) for key, text, paid in cached if key is not None])
        return posted, unreadable | ({number for number, _ in ready} - posted)


def _by_row(batch: ProviderBatch, lines: Iterator[BatchLine]) -> tuple[dict[int, BatchLine], dict[int, str]]:
    """The answers and the reasons of the others, by row; of lines that are there twice the first answer."""
    answers: dict[int, BatchLine] = {}
    refusals: dict[int, str] = {}
    for line in _readable(batch, lines):
        number = batch.number_of(line.custom_id)
        if number is None:
            _log.warning("%s: a result of another request, %r, is left out", batch.name, line.custom_id[:80])
        elif line.outcome == "succeeded":
            answers.setdefault(number, line)
        else:
            refusals.setdefault(number, line.message or line.outcome)
    return answers, {number: why for number, why in refusals.items() if number not in answers}


def _readable(batch: ProviderBatch, lines: Iterator[BatchLine]) -> Iterator[BatchLine]:
    """The lines up to one that was cut off: those behind it are missing."""
    try:
        yield from lines
    except ValueError as error:
        _log.warning("%s: the results break off: %s", batch.name, error)


def _is_of_connection(error: Exception) -> bool:
    """Whether an error comes from the library below a provider's client, such as of a broken download."""
    return type(error).__module__.partition(".")[0].startswith("http")


def blocks(items: Iterable[T]) -> Iterator[list[T]]:
    """The items in lists of `BLOCK`."""
    source = iter(items)
    while block := list(islice(source, BLOCK)):
        yield block
