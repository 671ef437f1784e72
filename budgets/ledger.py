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
    checked_state,
    checked_tags,
    checked_usage,
    checked_window,
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
from viaticum.checks import checked_count, checked_items, checked_text, checked_type
from viaticum.errors import BudgetClosed, BudgetExceeded, HoldError, LedgerError, ViaticumError
from viaticum.money import Price, format_usd
from viaticum.types import TokenCount

LEASE_SECONDS = 3600  # longer than any single call
T = TypeVar("T")
_log = logging.getLogger("viaticum")
_UNCHANGED = Window("hour")  # default of arguments that were not given; compared by identity


def default_path() -> Path:
    """The ledger file of this user: in VIATICUM_HOME, else in the system's folder for application data."""
    home = os.environ.get("VIATICUM_HOME")
    return (Path(home).expanduser() if home else user_data_path("viaticum")) / "ledger.db"


class Ledger:
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
        where = default_path() if where is None else where
        checked_type("where", where, (str, os.PathLike), "a path, or an address")
        self._store = open_store(where, read_only=read_only)
        self._clock = clock
        self.overruns: dict[str, int] = {}  # settled through this object: nano-dollars above the hold, by key

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
        """Create a scope, or return the existing one of that name with the same terms.

        Args:
            name: its name.
            limit_nanousd: most that may be spent and held, in nano-dollars.
            limit_tokens: the same in tokens. A scope without a parent needs at least one limit.
            parent: scope above it, whose limits apply as well.
            window: time window in which the limits hold; None for all time.

        Raises:
            InputError: a limit is missing or not above zero.
            BudgetError: the name exists with other terms.
            BudgetClosed: the parent is closed.
        """
        limits = rules.checked_limits(limit_nanousd, limit_tokens, needed=parent is None)
        checked_window(window)
        wanted = Budget(checked_name("budget name", name), *limits, parent=parent, window=window)

        def action(rows: Rows) -> Budget:
            found = rows.lineage(name)
            if found:
                return rules.require_same_terms(rules.budget_at(rows, found[-1], self._clock()), wanted)
            ancestors = rules.get_lineage(rows, parent) if parent is not None else []
            _refuse_closed_parent(ancestors)
            root = ancestors[0].name if ancestors else name
            scope = Scope(name, parent, root, len(ancestors), *limits, window)
            rows.insert_scope(scope)
            chain = Chain(rows, ancestors[0] if ancestors else scope, self._now())
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
        """Change or add a limit or the window; arguments left out stay as they are.

        A new window is filled from the entries.

        Raises:
            BudgetError: more than the new limit is already spent or held.
        """
        limits = rules.checked_limits(limit_nanousd, limit_tokens, needed=window is _UNCHANGED)
        checked_window(window)

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
        """Refuse new calls here and below until `resume`; existing holds can still be settled."""
        return self._set_state(name, "pause", reason)

    def resume(self, name: str, reason: str = "") -> Budget:
        """Accept calls again. Raises `BudgetClosed` if the scope is closed, which is final."""
        return self._set_state(name, "resume", reason)

    def close_budget(self, name: str, reason: str = "") -> Budget:
        """Refuse new calls here and below for good; existing holds can still be settled."""
        return self._set_state(name, "close", reason)

    def _set_state(self, name: str, kind: EntryKind, reason: str) -> Budget:
        state = _STATE_AFTER[kind]
        checked_text("reason", reason, blank=True)

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
        """Return one budget; raises `UnknownName` with the nearest name."""
        return self._store.read(
            lambda rows: rules.budget_at(rows, rules.get_lineage(rows, name)[-1], self._clock())
        )

    def lineage(self, name: str) -> list[Budget]:
        """The scope and its ancestors, whose limits apply to its calls as well; root first."""
        return self._store.read(
            lambda rows: [
                rules.budget_at(rows, scope, self._clock()) for scope in rules.get_lineage(rows, name)
            ]
        )

    def budgets(self) -> list[Budget]:
        """All budgets, sorted by name."""
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
        hint: str = "",
    ) -> Hold:
        """Reserve the worst case of a call in every scope of its lineage.

        Args:
            budget: scope to charge.
            key: idempotency key: the same key with the same parameters returns the same hold, whatever its
                state.
            usage: upper bound of the tokens that each model reads and generates.
            prices: price per model.
            parameters: JSON values that identify the call; their hash is stored.
            tags: labels stored with the entries, such as `strategy`.
            unpriced: models that may go without a price; their tokens still count.
            lease: seconds after which a hold without news is expired, or unknown if it was dispatched.
            dispatch: dispatch a new hold in the same transaction, for callers that send at once.
            hint: how the tokens were counted; part of the message where the call does not fit.

        Raises:
            BudgetExceeded: a scope has less left; nothing is held.
            BudgetClosed: a scope is paused or closed.
            UnknownName: no such budget.
            UnknownPrice: a model has no price.
            HoldError: the key belongs to another call.
        """
        parameters_hash = "" if parameters is None else digest(parameters)
        claim = Claim(key, usage, prices, parameters_hash, tags or {}, hint)
        free = checked_items("unpriced", unpriced, str, "the name of a model")
        wanted = _hold_from_claim(budget, claim, free, lease)
        outcome = self._store.write(partial(self._reserve, wanted, dispatch))
        if isinstance(outcome, BudgetExceeded):
            raise rules.explained(outcome, wanted, hint)
        return outcome

    def reserve_many(
        self, budget: str, claims: Sequence[Claim], *, lease: int = LEASE_SECONDS, dispatch: bool = False
    ) -> list[Hold | ViaticumError]:
        """Reserve many calls in one transaction, in order: each fits beside those before it or holds nothing.

        Returns, per claim, the hold or the error that `reserve` would raise.

        Raises:
            UnknownName: no such budget; nothing is held.
            LedgerError: the store failed; nothing is held.
        """
        claims = checked_items("claims", claims, Claim, "a Claim")
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

        return self._store.write(action)

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
        entry = self._store.write(partial(self._settle, settlement, seen))
        self._note_overrun(entry)
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
        for entry in entries:
            if isinstance(entry, Entry):
                self._note_overrun(entry)
        return entries

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

    def hold(self, key: str) -> Hold | None:
        return self._store.read(lambda rows: rows.hold(checked_name("hold key", key)))

    def find(self, keys: Sequence[str]) -> dict[str, Hold]:
        """The holds that exist for these keys."""
        wanted = checked_items("keys", keys, str, "the key of a hold")
        return self._store.read(lambda rows: rows.find(wanted)) if wanted else {}

    def holds(self, budget: str | None = None, state: HoldState | None = None) -> list[Hold]:
        """The holds of a budget or of all, oldest first, optionally only those in `state`."""

        checked_state(state)

        def action(rows: Rows) -> list[Hold]:
            if budget is not None:
                rules.get_lineage(rows, budget)
            return list(rows.holds(budget, state))

        return self._store.read(action)

    # Entries

    def entries(self, budget: str | None = None, key: str | None = None) -> list[Entry]:
        """The entries of a budget or of all, oldest first, optionally only those of the hold `key`."""
        found: list[Entry] = []
        self.each_entry(found.append, budget, key)
        return found

    def each_entry(
        self, take: Callable[[Entry], object], budget: str | None = None, key: str | None = None
    ) -> None:
        """Call `take` with each entry, as `entries` returns them, for more than fit in memory.

        `take` must not use this ledger.
        """

        def action(rows: Rows) -> None:
            if budget is not None:
                rules.get_lineage(rows, budget)
            for entry in rows.entries(budget, key):
                take(entry)

        self._store.read(action)

    def posts(
        self, budget: str, *, tags: Mapping[str, str] | None = None, last: int | None = None
    ) -> list[Entry]:
        """Posts of a scope and its descendants with all these tags, oldest first; only the `last` newest."""
        wanted = checked_tags({} if tags is None else tags).items()
        limit = None if last is None else checked_count("last", last, 0)

        def action(rows: Rows) -> list[Entry]:
            rules.get_lineage(rows, budget)
            posts = rows.posts_below(budget, "")
            return list(
                deque((post for post in posts if wanted <= post.note.get("tags", {}).items()), maxlen=limit)
            )

        return self._store.read(action)

    def chain_heads(self) -> dict[str, tuple[int, str]]:
        """The end of each chain: number of entries and hash of the last one, by root."""
        return self._store.read(
            lambda rows: {s.name: (s.entries, s.head) for s in rows.scopes() if s.parent is None}
        )

    def check(self, budget: str | None = None) -> list[str]:
        """Audit the ledger: one line per finding; none if nothing was altered and every limit held.

        With `budget`, only its tree of scopes is checked, and the pages of the file are not.
        """
        return self._store.read(lambda rows: audit(rows, budget))

    def _now(self) -> str:
        return postings.format_time(self._clock())

    def _chain(self, rows: Rows, lineage: list[Scope]) -> Chain:
        if isinstance(rows, WriteBuffer):
            return rows.chain_of(lineage[0], self._now)
        return Chain(rows, lineage[0], self._now())


_STATE_AFTER: dict[str, Any] = {"pause": "paused", "resume": "open", "close": "closed"}


def _hold_from_claim(budget: str, claim: Claim, unpriced: tuple[str, ...], lease: int) -> Hold:
    """Validate a claim and compute its hold."""
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
    """The result of a step, or its error if that concerns this call only; a store failure is raised."""
    try:
        return step()
    except LedgerError:
        raise
    except ViaticumError as error:
        return error


def _refuse_closed_parent(ancestors: list[Scope]) -> None:
    for scope in ancestors:
        if scope.state == "closed":
            raise BudgetClosed(f"budget {scope.name!r} is closed; nothing can be made below it")


def _terms_note(scope: Scope) -> dict[str, str]:
    """The note of an entry of kind `limit`."""
    return {
        **({"parent": scope.parent} if scope.parent is not None else {}),
        **({"window": str(scope.window)} if scope.window is not None else {}),
    }


def _limits_as_amounts(limits: tuple[int | None, int | None]) -> tuple[int, int]:
    return limits[0] or 0, limits[1] or 0
