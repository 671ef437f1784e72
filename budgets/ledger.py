"""The ledger: scopes, holds and entries, and the guarantee that limits hold.

At all times and in every scope, posted + held <= limit, in dollars and in tokens. A call is charged to one
scope and counts in all its ancestors, atomically. It reserves its worst case before any token is generated,
is dispatched when it is sent, and settles its real cost; each hold ends once. Only a call that used more than
it held can exceed a limit: the real cost is posted and the overrun recorded. After a crash before dispatch,
the hold is released at the end of its lease; after dispatch it stays charged, as unknown, until someone
reconciles it.

Amounts are integers (nano-dollars and tokens). Each operation is one transaction, durable when it returns; no
transaction is open while a model runs. Threads may share one `Ledger`; each process opens its own.

Leaves out models and prompts (callers pass tokens and prices), storage (`store`), the rules (`rules`), and
what to do when the budget runs short (`planner`).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, TypeVar

from viaticum.budgets import postings, rules
from viaticum.budgets.records import (
    Entry,
    Hold,
    checked_name,
    checked_result,
    checked_usage,
    digest,
    elementwise_max,
)
from viaticum.budgets.request_limits import RequestLimit
from viaticum.budgets.scopes import ScopeLedger
from viaticum.budgets.store import Rows
from viaticum.budgets.write_buffer import Claim, Settlement, WriteBuffer
from viaticum.checks import checked_items, checked_type
from viaticum.errors import BudgetExceeded, HoldError, LedgerError, ViaticumError
from viaticum.money import Price, format_usd
from viaticum.residency import ANY_LABEL
from viaticum.types import TokenCount

LEASE_SECONDS = 3600  # longer than any single call
T = TypeVar("T")
_log = logging.getLogger("viaticum")


class Ledger(ScopeLedger):
    """A ledger in an SQLite file, a Postgres database or memory.

    Every method raises `LedgerError` if the store fails; committed data stays.

    Args:
        where: path of an SQLite file (created with its folders if missing), a `postgresql://` address (extra
            `postgres`), or `memory:`; default `default_path()`.
        read_only: for files that must not be written, or are damaged.
        clock: returns the current time; replaced in tests.
    """

    def __init__(
        self,
        where: str | os.PathLike[str] | None = None,
        *,
        read_only: bool = False,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        super().__init__(where, read_only=read_only, clock=clock)
        # Called with what was posted together, after each settlement through this object.
        self.on_post: list[Callable[[Sequence[Entry]], None]] = []
        self.overruns: dict[str, int] = {}  # settled through this object: nano-dollars above the hold, by key

    def request_limit(
        self, name: str, *, parent: str, limit_nanousd: int, earlier: Mapping[str, int] | None = None
    ) -> AbstractContextManager[RequestLimit]:
        """Limit the calls of one request, in the context, without a scope that lasts.

        In the context `name` stands for a scope below `parent`, in `reserve`, `budget` and `lineage` of this
        object alone. What its calls hold and cost is held and posted in `parent`.

        Args:
            earlier: what calls of an earlier run of the request hold in `parent`, in nano-dollars by key:
                it counts against further calls until they are settled.

        Raises:
            InputError: the name is blank, or the limit is not above zero.
            BudgetError: the name has a limit already.
        """
        return self._requests.open(name, parent, limit_nanousd, earlier)

    def reserve(
        self,
        budget: str,
        key: str,
        usage: Mapping[str, TokenCount],
        prices: Mapping[str, Price],
        *,
        parameters: Any = None,
        tags: Mapping[str, str] | None = None,
        unpriced: Iterable[str] = (),
        lease: int = LEASE_SECONDS,
        dispatch: bool = False,
        hint: str = "",
        labels: Iterable[str] = (),
    ) -> Hold:
        """Reserve the worst case of a call in every scope of its lineage.

        Args:
            budget: scope to charge.
            key: idempotency key: the same key with the same parameters returns the same hold, whatever its
                state.
            usage: upper bound of the tokens that each model reads and generates.
            prices: price per model.
            parameters: JSON values that identify the call; their hash is stored.
            tags: labels stored with the entries, such as `strategy`, beside those of `viaticum.tagged`.
            unpriced: models that may go without a price; their tokens still count.
            lease: seconds after which a hold without news is expired, or unknown if it was dispatched.
            dispatch: dispatch a new hold in the same transaction, for callers that send at once.
            hint: how the tokens were counted; part of the message where the call does not fit.
            labels: where the data of the call goes (`viaticum.residency`); `ANY_LABEL` for one that asks no
                model.

        Raises:
            BudgetExceeded: a scope has less left; nothing is held.
            BudgetClosed: a scope is paused or closed.
            UnknownName: no such budget.
            UnknownPrice: a model has no price.
            ModelNotAllowed: a scope is for models with other labels; nothing is held.
            HoldError: the key belongs to another call.
        """
        parameters_hash = "" if parameters is None else digest(parameters)
        claim = Claim(key, usage, prices, parameters_hash, tags or {}, hint, labels)
        free = checked_items("unpriced", unpriced, str, "the name of a model")
        limit = self._requests.find(budget)
        wanted = self._wanted(budget if limit is None else limit.parent, claim, free, lease)
        hold = partial(self._hold, wanted, dispatch)
        try:
            return hold() if limit is None else limit.reserve(wanted, hold)
        except BudgetExceeded as error:
            raise rules.explained(error, wanted, hint) from None

    def _wanted(self, budget: str, claim: Claim, unpriced: tuple[str, ...], lease: int) -> Hold:
        """The hold of a claim. Raises `ModelNotAllowed` where its data may not go there."""
        wanted, labels = claim.hold(budget, unpriced, lease), frozenset(claim.labels)
        residency = self.residency(budget)
        if labels != ANY_LABEL and not residency.allows(labels):
            raise residency.refusal(dict.fromkeys(wanted.usage, labels))
        return wanted

    def _hold(self, wanted: Hold, dispatch: bool) -> Hold:
        outcome = self._store.write_call(partial(self._reserve, wanted, dispatch), wanted.key, wanted.budget)
        if isinstance(outcome, BudgetExceeded):
            raise outcome
        return outcome

    def reserve_many(
        self, budget: str, claims: Sequence[Claim], *, lease: int = LEASE_SECONDS, dispatch: bool = False
    ) -> list[Hold | ViaticumError]:
        """Reserve many calls in one transaction, in order: each fits beside those before it or holds nothing.

        Returns, per claim, the hold or the error that `reserve` would raise.

        Raises `UnknownName` for the budget and `LedgerError`; nothing is held then.
        """
        claims = checked_items("claims", claims, Claim, "a Claim")
        wanted = [_result_or_error(partial(self._wanted, budget, claim, (), lease)) for claim in claims]

        def action(rows: Rows) -> list[Hold | ViaticumError]:
            buffer = WriteBuffer(rows, [budget], [claim.key for claim in claims])
            rules.get_lineage(buffer, budget)
            found = [
                each
                if isinstance(each, ViaticumError)
                else _result_or_error(partial(self._reserve, each, dispatch, buffer))
                for each in wanted
            ]
            buffer.flush()
            return found

        ended = self._store.write(action) if claims else []
        return [
            rules.explained(each, hold, claim.hint)
            if isinstance(each, BudgetExceeded) and isinstance(hold, Hold)
            else each
            for each, hold, claim in zip(ended, wanted, claims, strict=True)
        ]

    def _reserve(self, wanted: Hold, dispatch: bool, rows: Rows) -> Hold | BudgetExceeded:
        lineage = rules.get_lineage(rows, wanted.budget)
        found = rows.hold(wanted.key)
        if found is not None:
            return rules.require_same_call(found, wanted)
        rules.refuse_closed(lineage)
        chain = self._chain(rows, lineage)
        needed = (wanted.held_nanousd, wanted.held_tokens)
        refusal = rules.shortfall(rows, lineage, chain.moment, needed)
        if refusal is not None and postings.expire_undispatched(rows, chain, lineage[0].name):
            lineage = rows.lineage(wanted.budget)
            refusal = rules.shortfall(rows, lineage, chain.moment, needed)
        # Returned, not raised, so that the expired leases are committed.
        if refusal is not None:
            return refusal
        hold = postings.insert_hold(rows, chain, lineage, wanted)
        return postings.dispatch(rows, chain, hold) if dispatch else hold

    def dispatch(self, key: str) -> Hold:
        """Record that the call is being sent: from here on it may cost money, whatever happens. Idempotent.

        The lease starts again.

        Raises:
            HoldError: the hold has ended or is unknown.
        """

        def action(rows: Rows) -> Hold:
            hold, lineage = postings.lock_hold(rows, key)
            rules.refuse_ended(hold, "dispatched")
            if hold.state in ("posted", "unknown"):
                raise HoldError(f"the hold {key!r} is {hold.state}; a further try reserves under a new key")
            if hold.state == "dispatched":
                return hold
            chain = self._chain(rows, lineage)
            return postings.dispatch(rows, chain, hold)

        return self._store.write_call(action, key)

    def settle(
        self,
        key: str,
        usage: Mapping[str, TokenCount] | None,
        result: str | None = None,
        *,
        counted: Mapping[str, TokenCount] | None = None,
    ) -> Entry:
        """Post what a call used, at the price of its hold, and release the rest of the hold. Idempotent.

        Settling an unknown hold reconciles it. If more was used than held, the real cost is posted and
        `overrun` says by how much.

        Args:
            key: key of the hold.
            usage: tokens per model as the provider reported them; None if the report is missing, which posts
                the whole hold, or `counted` where that is larger.
            result: JSON text to store in the same transaction; a stored result cannot be replaced.
            counted: tokens per model that the caller saw itself, for a stream that ended early; the larger of
                `usage` and `counted` is posted.

        Raises:
            HoldError: the key is unknown, the hold is void or expired, or was settled with other usage or
                result.
            UnknownPrice: the hold does not name a model.
        """
        settlement = _checked_settlement(Settlement(key, usage, result))
        seen = None if counted is None else checked_usage(counted)
        entry = self._store.write_call(partial(self._settle, settlement, seen), key)
        self._note_posts([entry])
        self._requests.end(key, entry.nanousd)
        return entry

    def settle_many(self, settlements: Sequence[Settlement]) -> list[Entry | ViaticumError]:
        """Settle many calls in one transaction.

        Returns, per settlement, the entry or the error that `settle` would raise.

        Raises:
            LedgerError: the store failed; nothing is settled.
        """
        settlements = checked_items("settlements", settlements, Settlement, "a Settlement")
        wanted = [_result_or_error(partial(_checked_settlement, each)) for each in settlements]
        keys = [each.key for each in settlements]

        def action(rows: Rows) -> list[Entry | ViaticumError]:
            holds = rows.find(keys)
            buffer = WriteBuffer(rows, {hold.budget for hold in holds.values()}, keys, holds)
            found = [
                each
                if isinstance(each, ViaticumError)
                else _result_or_error(partial(self._settle, each, None, buffer))
                for each in wanted
            ]
            new = [isinstance(each, Entry) and buffer.is_buffered(each) for each in found]
            ids = buffer.flush()
            return [
                each.with_id(ids[each.id]) if is_new and isinstance(each, Entry) else each
                for each, is_new in zip(found, new, strict=True)
            ]

        entries = self._store.write(action) if settlements else []
        self._note_posts([entry for entry in entries if isinstance(entry, Entry)])
        return entries

    def _note_posts(self, entries: Sequence[Entry]) -> None:
        for entry in entries:
            self._note_overrun(entry)
        for callback in tuple(self.on_post):
            callback(entries)

    def _note_overrun(self, entry: Entry) -> None:
        """Warn of a call that cost more than it held, and count it; once for each key."""
        if entry.overrun and entry.key is not None and entry.key not in self.overruns:
            self.overruns[entry.key] = entry.overrun
            _log.warning(
                "the call %s on budget %s cost %s, %s more than was held for it",
                entry.key,
                entry.budget,
                format_usd(entry.nanousd),
                format_usd(entry.overrun),
            )

    def _settle(self, settlement: Settlement, seen: Mapping[str, TokenCount] | None, rows: Rows) -> Entry:
        key, given, result = settlement.key, settlement.usage, settlement.result
        hold, lineage = postings.lock_hold(rows, key)
        rules.refuse_ended(hold, "settled")
        used = dict(hold.usage) if given is None else given
        used = elementwise_max(used, seen) if seen is not None else used
        chain = self._chain(rows, lineage)
        if hold.state == "posted":
            entry = rules.require_same_usage(rows.ending_entry(key), key, used)
            postings.store_result(rows, chain, hold, result)
            return entry
        source = "missing" if given is None else "larger" if seen is not None else "reported"
        return postings.post(rows, chain, lineage, hold, used, source, result)

    def void(self, key: str) -> Entry:
        """Release the whole hold: the call was never made, or nobody is charged for it. Idempotent.

        Raises:
            HoldError: the key is unknown, or the hold was posted or has expired.
        """

        entry = self._store.write_call(partial(self._void, key), key)
        self._requests.end(key, 0)
        return entry

    def _void(self, key: str, rows: Rows) -> Entry:
        hold, lineage = postings.lock_hold(rows, key)
        if hold.state == "posted":
            raise HoldError(f"the hold {key!r} is posted and cannot be voided; the call was paid for")
        ended = rows.ending_entry(key)
        if hold.state == "void" and ended is not None:
            return ended
        rules.refuse_ended(hold, "voided")
        return postings.release(rows, self._chain(rows, lineage), lineage, hold, "void")

    def attach(self, key: str, result: str) -> Hold:
        """Store the result (JSON text) of a call that is not settled yet. The first result stays.

        Raises:
            HoldError: the key is unknown, the hold is void or expired, or has another result.
        """
        checked = checked_result(result)

        def action(rows: Rows) -> Hold:
            hold, lineage = postings.lock_hold(rows, key)
            rules.refuse_ended(hold, "given a result")
            postings.store_result(rows, self._chain(rows, lineage), hold, checked)
            return hold.with_result(checked)

        return self._store.write(action)

    def expire_leases(self, at: datetime | None = None) -> list[Entry]:
        """End the leases that have run out: undispatched holds expire, dispatched ones become unknown.

        at: treat it as the current time, for example after a crash of every process that uses this ledger.
        """
        at = self._clock() if at is None else checked_type("at", at, datetime, "a time (datetime)")
        moment = postings.format_time(at)
        due = self._store.read(lambda rows: rows.expired_holds(None, moment, ("reserved", "dispatched")))
        ended = [self._store.write(partial(self._expire_lease, hold.key, moment)) for hold in due]
        return [entry for entry in ended if entry is not None]

    def _expire_lease(self, key: str, moment: str, rows: Rows) -> Entry | None:
        hold, lineage = postings.lock_hold(rows, key)
        if hold.state not in ("reserved", "dispatched") or hold.until >= moment:
            return None
        return postings.expire_lease(rows, self._chain(rows, lineage), lineage, hold)

    def abandon(self, key: str) -> Hold:
        """Mark a dispatched call as unknown before its lease ends: whoever made it is gone. Idempotent.

        It stays charged until `settle` or `void` says what became of it. A hold in another state stays as it
        is.

        Raises:
            HoldError: the key is unknown.
        """

        def action(rows: Rows) -> Hold:
            hold, lineage = postings.lock_hold(rows, key)
            if hold.state != "dispatched":
                return hold
            postings.expire_lease(rows, self._chain(rows, lineage), lineage, hold)
            return hold.with_state("unknown", hold.until)

        return self._store.write(action)

    # Leases

    def take_lease(self, name: str, owner: str, seconds: float, *, instead_of: str = "") -> str:
        """Take or renew the lease of a name, where it is free or has ended; returns the owner that has it.

        Leases are of those who work on something together, and hold no money.

        Args:
            instead_of: an owner that is known to be gone.
        """
        checked_name("lease", name)
        moment = self._clock()
        now, until = (postings.format_time(moment + timedelta(seconds=each)) for each in (0, seconds))
        return self._store.write(lambda rows: rows.take_lease(name, owner, until, now, instead_of))

    def end_lease(self, name: str, owner: str) -> None:
        """Free a lease. Without effect where another owner has it."""
        self._store.write(lambda rows: rows.end_lease(name, owner))


def _checked_settlement(settlement: Settlement) -> Settlement:
    usage = None if settlement.usage is None else checked_usage(settlement.usage)
    return Settlement(settlement.key, usage, checked_result(settlement.result))


def _result_or_error(step: Callable[[], T]) -> T | ViaticumError:
    """The result of a step, or its error if that concerns this call only; a store failure is raised."""
    try:
        return step()
    except LedgerError:
        raise
    except ViaticumError as error:
        return error
