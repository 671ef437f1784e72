"""The ledger: scopes, holds and entries, and the promise that limits hold.

At every moment, for every scope, posted + held <= limit in dollars and in tokens. A call is charged to one
scope and counts in all above it, all or nothing. It reserves its worst case before a token is made, is
dispatched when it is sent, and settles what it truly cost; each hold ends once. The one way past a limit is
a call that used more than it held: the truth is posted and the overrun marked. A crash before dispatch
frees the hold when its lease runs out; after dispatch it stays charged, as unknown, until someone finds out.

Amounts are integers (nano-dollars and tokens). Each operation is one transaction, on disk when it returns;
none is open while a model works. One `Ledger` may be shared by threads; processes each open their own.

Leaves out models and prompts (callers bring tokens and prices), where rows are kept (`store`), what may
happen to them (`rules`), and what to do when money runs short (`planner`).
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from platformdirs import user_data_path

from viaticum.budgets import postings, rules
from viaticum.budgets.chain import Chain
from viaticum.budgets.records import (
    Budget,
    Entry,
    EntryKind,
    Hold,
    HoldState,
    amounts,
    checked_lease,
    checked_name,
    checked_result,
    checked_tags,
    checked_usage,
    digest,
    elementwise_max,
    snapshot,
    worst_costs,
)
from viaticum.budgets.replay import audit
from viaticum.budgets.store import Rows, Scope
from viaticum.budgets.stores import open_store
from viaticum.budgets.windows import Window
from viaticum.budgets.write_buffer import Claim, Settlement, WriteBuffer
from viaticum.errors import BudgetClosed, BudgetExceeded, HoldError, LedgerError, ViaticumError
from viaticum.money import Price
from viaticum.types import TokenCount

LEASE_SECONDS = 3600  # longer than any one call
T = TypeVar("T")
_UNCHANGED = Window("hour")  # stands for "not given"; compared by identity


def default_path() -> Path:
    """The ledger of this user, where the system keeps application data."""
    return user_data_path("viaticum") / "ledger.db"


class Ledger:
    """Scopes in the SQLite file at `where`, which is created where it is missing, folders too.

    `where` may also be a `postgresql://` address (extra `postgres`) or `memory:`. read_only: for files that
    may not be written, or are damaged. clock: for tests. Every method raises `LedgerError` where the store
    cannot be used; what was committed stays.
    """

    def __init__(
        self,
        where: str | os.PathLike[str] | None = None,
        *,
        read_only: bool = False,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._store = open_store(where if where is not None else default_path(), read_only=read_only)
        self._clock = clock

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._store.close()

    # Budgets

    def create(
        self,
        name: str,
        *,
        limit_nanousd: int | None = None,
        limit_tokens: int | None = None,
        parent: str | None = None,
        window: Window | None = None,
    ) -> Budget:
        """A scope with a limit in dollars, tokens or both, for each `window` where one is given.

        With a parent it lies below that scope, and may do without a limit of its own. The one that exists is
        returned where its terms agree. Raises `InputError` for a limit that is missing or not above zero,
        `BudgetError` where the name is taken with other terms, `BudgetClosed` below a closed parent.
        """
        limits = rules.checked_limits(limit_nanousd, limit_tokens, needed=parent is None)
        wanted = Budget(checked_name("budget name", name), *limits, parent=parent, window=window)

        def action(rows: Rows) -> Budget:
            found = rows.lineage(name)
            if found:
                return rules.require_same_terms(rules.budget_at(rows, found[-1], self._clock()), wanted)
            above = rules.get_lineage(rows, parent) if parent is not None else []
            _refuse_closed_parent(above)
            root = above[0].name if above else name
            scope = Scope(name, parent, root, len(above), *limits, window)
            rows.insert_scope(scope)
            chain = Chain(rows, above[0] if above else scope, self._now())
            chain.append(name, "limit", None, _limits_as_amounts(limits), note=_terms_note(scope))
            return wanted

        return self._store.write(action)

    def set_limit(
        self,
        name: str,
        *,
        limit_nanousd: int | None = None,
        limit_tokens: int | None = None,
        window: Window | None = _UNCHANGED,
    ) -> Budget:
        """Change or add a limit, or the window; what is left out stays as it is.

        A new window is filled from the entries. Raises `BudgetError` where more than the new limit is
        already spent or held.
        """
        limits = rules.checked_limits(limit_nanousd, limit_tokens, needed=window is _UNCHANGED)

        def action(rows: Rows) -> Budget:
            lineage = rules.get_lineage(rows, name)
            chain = self._chain(rows, lineage)
            old = lineage[-1]
            new = replace(
                old,
                limit_nanousd=old.limit_nanousd if limits[0] is None else limits[0],
                limit_tokens=old.limit_tokens if limits[1] is None else limits[1],
                window=old.window if window is _UNCHANGED else window,
            )
            moment = chain.moment
            before = rules.budget_at(rows, old, moment)
            if new == old:
                return before
            if new.window != old.window:
                postings.rebuild_buckets(rows, new, moment)
            after = rules.budget_at(rows, new, moment)
            rules.refuse_limit_below_use(before, after)
            rows.update_scope(new)
            new_limits = _limits_as_amounts((new.limit_nanousd, new.limit_tokens))
            chain.append(name, "limit", None, new_limits, note=_terms_note(new))
            return after

        return self._store.write(action)

    def pause(self, name: str, reason: str = "") -> Budget:
        """Take no new calls here and below until `resume`; those that hold may be settled."""
        return self._set_state(name, "pause", reason)

    def resume(self, name: str, reason: str = "") -> Budget:
        """Raises `BudgetClosed` where the scope is closed: that is for good."""
        return self._set_state(name, "resume", reason)

    def close_budget(self, name: str, reason: str = "") -> Budget:
        """Take no new calls here and below, for good; those that hold may be settled."""
        return self._set_state(name, "close", reason)

    def _set_state(self, name: str, kind: EntryKind, reason: str) -> Budget:
        state = _STATE_AFTER[kind]

        def action(rows: Rows) -> Budget:
            lineage = rules.get_lineage(rows, name)
            chain = self._chain(rows, lineage)
            scope = lineage[-1]
            if scope.state != state:
                if scope.state == "closed":
                    raise BudgetClosed(f"budget {name!r} is closed for good; take another budget")
                scope = replace(scope, state=state)
                rows.update_scope(scope)
                chain.append(name, kind, note={"reason": reason} if reason else {})
            return rules.budget_at(rows, scope, chain.moment)

        return self._store.write(action)

    def budget(self, name: str) -> Budget:
        """Raises `UnknownName`, which names the nearest budget."""
        return self._store.read(
            lambda rows: rules.budget_at(rows, rules.get_lineage(rows, name)[-1], self._clock())
        )

    def lineage(self, name: str) -> list[Budget]:
        """The scope and all above it, whose limits hold for its calls as well: the root first."""
        return self._store.read(
            lambda rows: [
                rules.budget_at(rows, scope, self._clock()) for scope in rules.get_lineage(rows, name)
            ]
        )

    def budgets(self) -> list[Budget]:
        """All budgets, by name."""
        return self._store.read(
            lambda rows: [rules.budget_at(rows, scope, self._clock()) for scope in rows.scopes()]
        )

    # Holds

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
    ) -> Hold:
        """Hold the worst case of a call: `usage` is the most each model may read and make.

        Idempotent: the same key with the same parameters (JSON values; their hash is kept) gives the same
        hold, whatever its state. tags are kept with the entries, `strategy` among them. unpriced names models
        that may go without a price; their tokens still count. lease: seconds until a hold whose caller is
        never heard of again is expired, or unknown once it was dispatched. dispatch: a new hold is dispatched
        in the same transaction, for callers that send at once. Raises `BudgetExceeded` (and holds nothing),
        `UnknownPrice`, `UnknownName` for the budget, `BudgetClosed`, `HoldError` where the key stands for
        another call.
        """
        asked = "" if parameters is None else digest(parameters)
        claim = Claim(key, usage, prices, asked, tags or {})
        wanted = _hold_from_claim(budget, claim, tuple(unpriced), lease)
        outcome = self._store.write(partial(self._reserve, wanted, dispatch))
        if isinstance(outcome, BudgetExceeded):
            raise outcome
        return outcome

    def reserve_many(
        self, budget: str, claims: Sequence[Claim], *, lease: int = LEASE_SECONDS, dispatch: bool = False
    ) -> list[Hold | ViaticumError]:
        """As `reserve` for each, in one transaction: what each would have returned or raised, in the same order.

        Each fits beside those before it or holds nothing. Raises for what concerns them all: `UnknownName`
        for the budget and `LedgerError`; then none holds.
        """
        wanted = [_result_or_error(partial(_hold_from_claim, budget, claim, (), lease)) for claim in claims]

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

        return self._store.write(action) if claims else []

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
        # Returned, not raised: what has expired stays expired.
        if refusal is not None:
            return refusal
        hold = postings.insert_hold(rows, chain, lineage, wanted)
        return postings.dispatch(rows, chain, hold) if dispatch else hold

    def dispatch(self, key: str) -> Hold:
        """Note that the call is being sent: from here on it may have to be paid for, whatever happens.

        Idempotent; the lease begins anew. Raises `HoldError` for a hold that has ended or is unknown.
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

        return self._store.write(action)

    def settle(
        self,
        key: str,
        usage: Mapping[str, TokenCount] | None,
        result: str | None = None,
        *,
        counted: Mapping[str, TokenCount] | None = None,
    ) -> Entry:
        """Post what the call used, at the price it was held at, and free the rest of the hold.

        usage is what the provider reported. counted is what the caller saw itself, for a stream that ended
        early: the larger of the two is posted. A usage of None is one that is missing: the whole hold is
        posted, or what was counted where that is more. `result` (JSON text) is kept in the same transaction.
        Idempotent for the same usage; a result, once kept, stays. An unknown hold is reconciled by this.
        Raises `HoldError` for other usage, another result, an unknown key or a hold that is void or expired;
        `UnknownPrice` for a model the hold does not name. More used than held: the truth is posted and
        `overrun` says by how much.
        """
        settlement = _checked_settlement(Settlement(key, usage, result))
        seen = None if counted is None else checked_usage(counted)
        return self._store.write(partial(self._settle, settlement, seen))

    def settle_many(self, settlements: Sequence[Settlement]) -> list[Entry | ViaticumError]:
        """As `settle` for each, in one transaction: what each would have returned or raised, in the same order.

        Raises `LedgerError` for what concerns them all; then none is settled.
        """
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
            new = [isinstance(each, Entry) and buffer.buffer(each) for each in found]
            ids = buffer.flush()
            return [
                each.with_id(ids[each.id]) if is_new and isinstance(each, Entry) else each
                for each, is_new in zip(found, new, strict=True)
            ]

        return self._store.write(action) if settlements else []

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
        """Free the whole hold: the call was never made, or nobody is charged for it. Idempotent.

        Raises `HoldError` for an unknown key or a hold that was posted or has expired.
        """

        def action(rows: Rows) -> Entry:
            hold, lineage = postings.lock_hold(rows, key)
            if hold.state == "posted":
                raise HoldError(f"the hold {key!r} is posted and cannot be voided; the call was paid for")
            ended = rows.ending_entry(key)
            if hold.state == "void" and ended is not None:
                return ended
            rules.refuse_ended(hold, "voided")
            return postings.release(rows, self._chain(rows, lineage), lineage, hold, "void")

        return self._store.write(action)

    def attach(self, key: str, result: str) -> Hold:
        """Keep the result (JSON text) of a call that is not settled yet. The first one stays.

        Raises `HoldError` for an unknown key, a hold that is void or expired, or another result.
        """
        checked = checked_result(result)

        def action(rows: Rows) -> Hold:
            hold, lineage = postings.lock_hold(rows, key)
            rules.refuse_ended(hold, "given a result")
            postings.store_result(rows, self._chain(rows, lineage), hold, checked)
            return hold.with_result(checked)

        return self._store.write(action)

    def expire_leases(self, at: datetime | None = None) -> list[Entry]:
        """End the leases that have run out: what was not dispatched has expired, what was is unknown.

        at: as if it were then, such as after a crash of everyone who uses this ledger.
        """
        moment = postings.format_time(at or self._clock())
        due = self._store.read(lambda rows: rows.expired_holds(None, moment, ("reserved", "dispatched")))
        ended = [self._store.write(partial(self._expire_lease, hold.key, moment)) for hold in due]
        return [entry for entry in ended if entry is not None]

    def _expire_lease(self, key: str, moment: str, rows: Rows) -> Entry | None:
        hold, lineage = postings.lock_hold(rows, key)
        if hold.state not in ("reserved", "dispatched") or hold.until >= moment:
            return None
        return postings.expire_lease(rows, self._chain(rows, lineage), lineage, hold)

    def hold(self, key: str) -> Hold | None:
        return self._store.read(lambda rows: rows.hold(checked_name("hold key", key)))

    def find(self, keys: Sequence[str]) -> dict[str, Hold]:
        """The holds of those keys that have one."""
        return self._store.read(lambda rows: rows.find(keys)) if keys else {}

    def holds(self, budget: str | None = None, state: HoldState | None = None) -> list[Hold]:
        """The holds of a budget, or of all, oldest first; only those in `state` where one is given."""

        def action(rows: Rows) -> list[Hold]:
            if budget is not None:
                rules.get_lineage(rows, budget)
            return list(rows.holds(budget, state))

        return self._store.read(action)

    # Entries

    def entries(self, budget: str | None = None, key: str | None = None) -> list[Entry]:
        """The entries of a budget, or of all, oldest first; only those of one hold where `key` is given."""
        found: list[Entry] = []
        self.each_entry(found.append, budget, key)
        return found

    def each_entry(
        self, take: Callable[[Entry], object], budget: str | None = None, key: str | None = None
    ) -> None:
        """As `entries`, one at a time: for more than fit into memory. `take` must not use this ledger."""

        def action(rows: Rows) -> None:
            if budget is not None:
                rules.get_lineage(rows, budget)
            for entry in rows.entries(budget, key):
                take(entry)

        self._store.read(action)

    def posts(
        self, budget: str, *, tags: Mapping[str, str] | None = None, last: int | None = None
    ) -> list[Entry]:
        """What was posted to a scope and to all below it, oldest first: with all these tags, the `last` so many."""
        wanted = dict(tags or {}).items()

        def action(rows: Rows) -> list[Entry]:
            rules.get_lineage(rows, budget)
            posts = rows.posts_below(budget, "")
            return list(
                deque((post for post in posts if wanted <= post.note.get("tags", {}).items()), maxlen=last)
            )

        return self._store.read(action)

    def chain_heads(self) -> dict[str, tuple[int, str]]:
        """The end of each chain: how many entries a root has and the hash of its last one."""
        return self._store.read(
            lambda rows: {s.name: (s.entries, s.head) for s in rows.scopes() if s.parent is None}
        )

    def check(self, budget: str | None = None) -> list[str]:
        """What is wrong with the ledger, one line each; empty where nothing was altered and every limit held.

        Only the tree of scopes that `budget` belongs to, where one is given; the pages of the file as such
        are then not looked at.
        """
        return self._store.read(lambda rows: audit(rows, budget))

    # Inside

    def _now(self) -> str:
        return postings.format_time(self._clock())

    def _chain(self, rows: Rows, lineage: list[Scope]) -> Chain:
        if isinstance(rows, WriteBuffer):
            return rows.chain_of(lineage[0], self._now)
        return Chain(rows, lineage[0], self._now())


_STATE_AFTER: dict[str, Any] = {"pause": "paused", "resume": "open", "close": "closed"}


def _hold_from_claim(budget: str, claim: Claim, unpriced: tuple[str, ...], lease: int) -> Hold:
    """The hold that a claim asks for, checked."""
    usage = checked_usage(claim.usage)
    prices = snapshot(claim.prices, usage, unpriced)
    needed = amounts(usage, worst_costs(usage, prices))
    return Hold(
        checked_name("hold key", claim.key),
        budget,
        "reserved",
        *needed,
        usage,
        prices,
        "",
        parameters=claim.parameters,
        tags=checked_tags(claim.tags),
        lease=checked_lease(lease),
    )


def _checked_settlement(settlement: Settlement) -> Settlement:
    usage = None if settlement.usage is None else checked_usage(settlement.usage)
    return Settlement(settlement.key, usage, checked_result(settlement.result))


def _result_or_error(step: Callable[[], T]) -> T | ViaticumError:
    """What the step returns, or the error that concerns this one call; a broken store concerns all."""
    try:
        return step()
    except LedgerError:
        raise
    except ViaticumError as error:
        return error


def _refuse_closed_parent(above: list[Scope]) -> None:
    for scope in above:
        if scope.state == "closed":
            raise BudgetClosed(f"budget {scope.name!r} is closed; nothing can be made below it")


def _terms_note(scope: Scope) -> dict[str, str]:
    """What an entry of kind `limit` notes beside the limits."""
    return {
        **({"parent": scope.parent} if scope.parent is not None else {}),
        **({"window": str(scope.window)} if scope.window is not None else {}),
    }


def _limits_as_amounts(limits: tuple[int | None, int | None]) -> tuple[int, int]:
    return limits[0] or 0, limits[1] or 0
