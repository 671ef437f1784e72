"""The rows of a job that wait for a provider's batch, from the plan to the answer in the ledger.

A row that waits has a hold in the ledger, at the price of a batch and under the key of its call, from before
its batch is written down until what became of it is known: through the wait, and through the death of this
process. An answer is settled under that hold with its text, so that the row is then finished as one whose
call an earlier run has paid for. What was not answered frees its hold, and the row is planned again. Leaves
out the choice of rows (`agents.batch.deferral`), providers (`agents.batch.provider_batches`) and passes over
the input (`agents.batch.run`).
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from viaticum.agents.batch.batch_records import BatchJournal, ProviderBatch
from viaticum.agents.batch.deferral import Deferral, deferred_prices
from viaticum.agents.batch.input import BatchRow
from viaticum.agents.batch.planned_rows import NO_FALLBACK, PlannedRow
from viaticum.agents.batch.provider_batches import ProviderBatches, blocks
from viaticum.agents.batch.results import BATCH_TAG
from viaticum.agents.batch.steps import RowTools, call_for
from viaticum.agents.workflow.calls import ModelCall, next_try
from viaticum.agents.workflow.failover import next_call_is_known
from viaticum.agents.workflow.serialization import plan_from_hold
from viaticum.budgets import Claim, Hold
from viaticum.budgets.records import digest, worst_costs
from viaticum.errors import BudgetExceeded, ViaticumError
from viaticum.models.remote.batch_lines import request_body
from viaticum.models.remote.model import RemoteModel
from viaticum.routers.query import AtPrice, Plan, Policy

CHUNK_ROWS = 5_000  # of one batch
SEND_SECONDS = 60.0  # that a row waits for others to be sent with
MOST_WAITING = 50_000  # rows that wait to be sent; further ones are planned again in a later pass
LEASE = 40 * 86_400  # seconds of a hold: longer than any provider keeps results
SETTLED_SHARE = 2  # while rows are asked, batches take at most half of the money that is free


@dataclass(frozen=True, slots=True)
class _Prepared:
    """A row that can be sent. worst: nano-dollars of its hold; size: bytes of its line."""

    planned: PlannedRow
    call: ModelCall
    claim: Claim
    worst: int
    body: dict[str, Any]
    size: int


class DeferredRows:
    """The rows of one job that wait.

    Args:
        tools: of the job.
        folder: of the job.
        deferral: which rows and models may wait.
        rows: reads rows of the input by their numbers.
    """

    def __init__(
        self,
        tools: RowTools,
        folder: Path,
        deferral: Deferral,
        rows: Callable[[set[int]], Iterable[BatchRow]],
    ) -> None:
        self.tools, self.ledger, self.deferral = tools, tools.resources.ledger, deferral
        self._journal = BatchJournal(folder)
        self._batches = ProviderBatches(
            tools, self._journal, rows, self._add_settled, deferral.refused.add, self._shrink
        )
        deferral.is_direct = lambda row: row.number in self._journal.direct
        self._unsent: list[PlannedRow] = []
        self._look_at = 0.0 if self._journal.open else math.inf  # Unix time at which the next batch is due
        self._oldest = 0.0  # time at which the first of them came; -inf where they are enough for a batch
        self._earlier: set[str] = set()  # batches that were there before this pass over the input
        self._numbers: set[int] = set()  # of rows that wait, sent or not
        self._settled: set[int] = set()  # of rows whose answer is in the ledger
        self._calls: dict[str, set[str]] = {}  # parameters of the calls of a batch, by its name
        self._most: dict[str, int] = {}  # rows of a batch, by model
        self.left_over = 0  # rows that were neither sent nor given back, for a later pass

    def close(self) -> None:
        self._batches.close()
        self._journal.close()

    # --- what an earlier run has left -------------------------------------------------------------

    def restore(self, is_done: Callable[[int], bool]) -> None:
        """Take up the batches of an earlier run. is_done: whether a row is finished."""
        self._free_unsent()
        for batch in self._journal.batches:
            if not batch.collected:
                self._numbers.update(batch.keys)
                holds = self._holds(batch.keys.values())
                self._calls[batch.name] = {hold.parameters for hold in holds}
                continue
            left = {key: number for number, key in batch.keys.items() if not is_done(number)}
            posted = (hold for hold in self._holds(left) if hold.state == "posted")
            self._settled.update(left[hold.key] for hold in posted)

    def _free_unsent(self) -> None:
        """Free the holds of a batch that was not even written down: it cannot have been sent."""
        known = {batch.name for batch in self._journal.batches}
        for hold in self.ledger.holds(self.tools.job, "dispatched"):
            if hold.tags.get(BATCH_TAG, "") not in {"", *known}:
                self.ledger.void(hold.key)

    def _holds(self, keys: Iterable[str]) -> Iterator[Hold]:
        for part in blocks(keys):
            yield from self.ledger.find(part).values()

    # --- rows -------------------------------------------------------------------------------------

    def has(self, number: int) -> bool:
        """Whether a row waits, or has its answer in the ledger."""
        return number in self._numbers or number in self._settled

    @property
    def waiting(self) -> frozenset[int]:
        """Rows that wait now, sent or not."""
        return frozenset(self._numbers)

    @property
    def count(self) -> int:
        """Rows that wait, or have their answer in the ledger."""
        return len(self._numbers) + len(self._settled)

    @property
    def settled(self) -> frozenset[int]:
        """Rows whose answer is in the ledger, and which are to be finished."""
        return frozenset(self._settled)

    def finished(self, number: int) -> None:
        self._settled.discard(number)

    def plan_of(self, row: BatchRow) -> tuple[Plan, Policy | None]:
        """The plan of a row whose answer is in the ledger, and the policy of further pairs, where known."""
        for batch in reversed(self._journal.batches):
            if row.number in batch.keys:
                hold = self.ledger.hold(batch.keys[row.number])
                plan = plan_from_hold(hold) if hold is not None else None
                assert plan is not None
                if row.names_model:
                    return plan, NO_FALLBACK
                return plan, None if batch.price is None else AtPrice(batch.price)
        raise AssertionError(f"row {row.number} was in no batch")

    def _add_settled(self, numbers: Iterable[int]) -> None:
        self._settled.update(numbers)

    def _shrink(self, model: str, rows: int) -> None:
        """Too much of a model waits at the provider: its batches become smaller, and go one by one."""
        self._most[model] = max(1, rows // 2)

    # --- sending ----------------------------------------------------------------------------------

    def committed_nanousd(self) -> int:
        """Nano-dollars that are held for rows which wait, and are not of this pass.

        What a batch of this pass has cost by now is taken off: the plan counts it as not spent yet.
        """
        before = [batch for batch in self._journal.open if batch.name in self._earlier]
        held = (hold for batch in before for hold in self._holds(batch.keys.values()))
        spent = sum(batch.posted for batch in self._journal.batches if batch.name not in self._earlier)
        return sum(hold.held_nanousd for hold in held if hold.state == "dispatched") - spent

    def begin_pass(self) -> None:
        self.left_over = 0
        self._earlier = {batch.name for batch in self._journal.batches}

    def add(self, planned: PlannedRow) -> None:
        """Let a row wait."""
        if len(self._unsent) >= MOST_WAITING:
            self.left_over += 1
            return
        self._oldest = self._oldest if self._unsent else time.monotonic()
        self._unsent.append(planned)
        if len(self._unsent) == CHUNK_ROWS:
            self._oldest = -math.inf
        self._numbers.add(planned.row.number)

    @property
    def is_due(self) -> bool:
        """Whether rows are to be sent while others are still planned."""
        return bool(self._unsent) and time.monotonic() - self._oldest > SEND_SECONDS

    def send(self, *, all_money: bool) -> list[PlannedRow]:
        """Send the rows that wait in batches, as far as the money for their holds is there.

        Those for which no money is free while other batches hold it, and those of which the same call is on
        its way, are planned again in a later pass.

        Args:
            all_money: no other rows are asked; else half of what is free stays for them, and rows that find
                no money go on waiting.

        Returns:
            rows that cannot wait: there is no time left for a batch, or their call is in the ledger or the
            cache already, or cannot be made.
        """
        most = len(self._unsent) if all_money else CHUNK_ROWS
        rows, self._unsent = self._unsent[:most], self._unsent[most:]
        self._oldest = time.monotonic()
        by_model: dict[str, list[PlannedRow]] = {}
        for planned in rows:
            assert planned.plan is not None
            by_model.setdefault(planned.plan.pairs[0].model, []).append(planned)
        direct: list[PlannedRow] = []
        for model, of_model in by_model.items():
            if not self.deferral.has_time(model):
                direct += of_model
                continue
            ready, refused = self._prepare(of_model)
            direct += refused
            while ready and not self._is_stopped(model):
                left, refused = self._send_some(model, ready, all_money=all_money)
                direct += refused
                if len(left) == len(ready):
                    break
                ready = left
            unsent = [each.planned for each in ready]
            if model in self.deferral.refused:
                direct += unsent
            elif not all_money:
                self._unsent += unsent
        waiting = {number for batch in self._journal.open for number in batch.keys}
        waiting.update(planned.row.number for planned in self._unsent)
        known = {planned.row.number for planned in direct} | self._journal.direct | waiting
        others = [planned for planned in rows if planned.row.number not in known]
        if all_money and not self._journal.open:  # there is nothing to wait for
            direct += others
        else:
            self.left_over += len(others)
        self._numbers &= waiting
        self._schedule()
        return [] if self.tools.stop.is_set() else direct

    @property
    def collected(self) -> int:
        """Batches of which all is in the ledger that will be."""
        return sum(batch.collected for batch in self._journal.batches)

    def _is_stopped(self, model: str) -> bool:
        """Whether no further batch of a model is sent now."""
        if self.tools.stop.is_set() or model in self.deferral.refused:
            return True
        return model in self._most and any(batch.model == model for batch in self._journal.open)

    def _prepare(self, rows: Sequence[PlannedRow]) -> tuple[list[_Prepared], list[PlannedRow]]:
        """What is needed to send rows, and the rows that cannot be sent."""
        ready: list[_Prepared] = []
        direct: list[PlannedRow] = []
        calls = {call for batch in self._journal.open for call in self._calls[batch.name]}
        for block in blocks(rows):
            firsts = {self._first_key(planned): planned for planned in block}
            known = self.ledger.find([*firsts])
            found = [
                (planned, self._prepare_row(planned, first, known.get(first)))
                for first, planned in firsts.items()
            ]
            cached = self._in_cache([each for _, each in found if each is not None])
            for planned, each in found:
                if each is None or each.claim.key in cached:
                    direct.append(planned)
                elif self._cache_key(each) is None:
                    ready.append(each)
                elif each.claim.parameters not in calls:
                    calls.add(each.claim.parameters)
                    ready.append(each)
        # One beside the other, rows of one prefix find it in the provider's cache.
        ready.sort(key=lambda each: json.dumps(each.call.messages))
        return ready, direct

    def _in_cache(self, rows: Sequence[_Prepared]) -> set[str]:
        """The ledger keys of rows whose answer is in the cache."""
        keys = {each.claim.key: key for each in rows if (key := self._cache_key(each)) is not None}
        found = self.tools.cache.find([*keys.values()]) if self.tools.cache is not None and keys else {}
        return {key for key, cached in keys.items() if cached in found}

    def _first_key(self, planned: PlannedRow) -> str:
        return f"{self.tools.job}/{planned.row.id}/0"

    def _prepare_row(self, planned: PlannedRow, key: str, hold: Hold | None) -> _Prepared | None:
        """What is needed to send a row; None where its call was made already, or cannot be made.

        Asked directly, the row says why.
        """
        with suppress(ViaticumError):
            return self._prepared(planned, key, hold)
        return None

    def _prepared(self, planned: PlannedRow, key: str, hold: Hold | None) -> _Prepared | None:
        assert planned.plan is not None
        pair, resources = planned.plan.pairs[0], self.tools.resources
        call = call_for(resources, planned)
        parameters = digest(call.parameters)
        if not isinstance(call.model, RemoteModel):
            return None
        if hold is not None:
            if next_call_is_known(self.ledger, key):
                return None
            key, hold, _ = next_try(self.ledger, key, parameters, runs_here=False)
            if hold is not None:
                return None
        body = request_body(call.model, call.messages, call.generation)
        usage = call.model.worst_case_of(call.messages, call.generation)
        prices = deferred_prices(resources.catalogue, pair.model)
        tags = {"model": pair.model, "strategy": pair.strategy}
        labels = resources.labels(pair.model)
        claim = Claim(key, usage, prices, parameters, tags, call.model.counting_hint, labels)
        worst = sum(worst_costs(usage, prices).values())
        size = len(json.dumps(body)) + 300  # what stands around it in its line
        return _Prepared(planned, call, claim, worst, body, size)

    def _cache_key(self, each: _Prepared) -> str | None:
        cache = self.tools.cache
        return None if cache is None else cache.key(each.call, each.claim.parameters)

    def _send_some(
        self, model: str, ready: list[_Prepared], *, all_money: bool
    ) -> tuple[list[_Prepared], list[PlannedRow]]:
        """Send one batch of the first rows.

        Returns:
            rows that are left, all of them where no money is; rows that the ledger holds nothing for.
        """
        api = self._batches.api(model)
        left = self.ledger.budget(self.tools.job).left_nanousd
        money = None if left is None else (left if all_money else left // SETTLED_SHARE)
        most = min(CHUNK_ROWS, api.max_requests, self._most.get(model, CHUNK_ROWS))
        chunk, size = list[_Prepared](), 0
        for each in ready[:most]:
            size += each.size
            money = None if money is None else money - each.worst
            if size > api.max_bytes or (money is not None and money < 0):
                break
            chunk.append(each)
        if not chunk:
            return ready, []
        name = f"{self.tools.job}_{self._journal.next_number}"
        held, refused = self._reserve(chunk, name)
        if held:
            batch = self._new_batch(name, model, held)
            requests = (api.line(batch.custom_id(each.planned.row.number), each.body) for each in held)
            self._journal.prepare(batch, requests)
            self._calls[name] = {each.claim.parameters for each in held}
            self._batches.advance(batch)
        through = {each.claim.key for each in (*held, *refused)}
        others = [each for each in ready if each.claim.key not in through]
        return others, [each.planned for each in refused]

    def _reserve(self, chunk: Sequence[_Prepared], name: str) -> tuple[list[_Prepared], list[_Prepared]]:
        """Hold the rows of a batch; returns those that fit, which count as sent from here on.

        Then those that cannot be held for another reason than money, such as a model that is not allowed:
        asked directly, the row says which.
        """
        claims = [replace(each.claim, tags={**each.claim.tags, BATCH_TAG: name}) for each in chunk]
        held, refused = list[_Prepared](), list[_Prepared]()
        holds = self.ledger.reserve_many(self.tools.resources.budget, claims, lease=LEASE, dispatch=True)
        for each, hold in zip(chunk, holds, strict=True):
            if isinstance(hold, Hold):
                held.append(each)
            elif not isinstance(hold, BudgetExceeded):
                refused.append(each)
        return held, refused

    def _new_batch(self, name: str, model: str, rows: Sequence[_Prepared]) -> ProviderBatch:
        policies = (each.planned.policy for each in rows if not each.planned.row.names_model)
        prices = (each.per_dollar for each in policies if isinstance(each, AtPrice))
        keys = {each.planned.row.number: each.claim.key for each in rows}
        until = self.deferral.until()
        return ProviderBatch(name, model, keys, until, time.time(), next(prices, None))

    # --- waiting ----------------------------------------------------------------------------------

    @property
    def open(self) -> list[ProviderBatch]:
        return self._journal.open

    @property
    def all_sent(self) -> bool:
        """Whether every open batch is known to be at its provider."""
        return all(batch.id for batch in self._journal.open)

    def give_up(self) -> None:
        """Cancel every batch at its provider, when it is looked after next."""
        self._batches.cancelled = True
        for batch in self._journal.open:
            batch.next_look = 0.0
        self._schedule()

    def look(self) -> bool:
        """Take the next step of each batch that is due; returns whether one was collected."""
        before = {batch.name for batch in self._journal.open}
        for batch in self._journal.open:
            if batch.next_look <= time.time():
                self._batches.advance(batch)
        left = {batch.name for batch in self._journal.open}
        for batch in self._journal.batches:
            if batch.name in before - left:
                self._numbers -= set(batch.keys)
        self._schedule()
        return left != before

    @property
    def is_look_due(self) -> bool:
        """Whether a batch is due to be looked after."""
        return time.time() >= self._look_at

    def next_look(self) -> float:
        """Seconds until the next batch is due."""
        return max(0.0, self._look_at - time.time())

    def _schedule(self) -> None:
        self._look_at = min((batch.next_look for batch in self._journal.open), default=math.inf)

    def states(self) -> list[dict[str, Any]]:
        """The open batches, for an event."""
        return [
            {
                "id": batch.id,
                "model": batch.model,
                "status": "preparing" if batch.state is None else batch.state.status,
                "rows": len(batch.keys),
                "done": 0 if batch.state is None else batch.state.done,
            }
            for batch in self._journal.open
        ]
