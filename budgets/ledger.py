"""The ledger: budgets, holds and entries in one SQLite file, and the promise that limits hold.

At every moment, for every budget, posted + held <= limit in dollars and in tokens. A call reserves its
worst case before a token is made, settles what it truly cost, or is voided; each hold ends once. The one
way past a limit is a call that used more than it held: the truth is posted and the overrun marked.
Amounts are integers (nano-dollars and tokens). Each operation is one transaction, on disk when it
returns; none is open while a model works. One `Ledger` may be shared by threads; processes each open
their own on the same path.

Leaves out models and prompts (callers bring tokens and prices), windows of time and nested budgets.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from platformdirs import user_data_path

from viaticum.budgets.audit import audit
from viaticum.budgets.records import (
    Budget,
    Entry,
    Hold,
    HoldState,
    amounts,
    checked_limit,
    checked_name,
    checked_result,
    checked_usage,
    prices_text,
    snapshot,
    usage_text,
)
from viaticum.budgets.rows import (
    append,
    append_limit,
    end_hold,
    ending,
    entry_from,
    find_budget,
    find_hold,
    hold_from,
    insert_hold,
    keep_result,
    known_budget,
    known_hold,
    move,
    now,
)
from viaticum.budgets.store import Store
from viaticum.errors import BudgetError, BudgetExceeded, HoldError, InputError
from viaticum.money import MAX_NANOUSD, Price, format_usd
from viaticum.types import TokenCount


def default_path() -> Path:
    """The ledger of this user, where the system keeps application data."""
    return user_data_path("viaticum") / "ledger.db"


class Ledger:
    """Budgets in the SQLite file at `path`, which is created where it is missing, folders too.

    Every method raises `LedgerError` where the file cannot be used; what was committed stays.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        self.path = Path(path if path is not None else default_path()).absolute()
        self._store = Store(self.path)

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
        self, name: str, *, limit_nanousd: int | None = None, limit_tokens: int | None = None
    ) -> Budget:
        """A budget with a limit in dollars, tokens or both; the one that exists where the limits agree.

        Raises `InputError` for a limit that is missing or not above zero, `BudgetError` where the name is
        taken with other limits.
        """
        wanted = Budget(checked_name("budget name", name), *_checked_limits(limit_nanousd, limit_tokens))
        with self._store.transaction() as db:
            found = find_budget(db, name)
            if found is not None:
                return _same_limits(found, wanted)
            db.execute(
                "INSERT INTO budgets (name, limit_nanousd, limit_tokens) VALUES (?, ?, ?)",
                [name, limit_nanousd, limit_tokens],
            )
            append_limit(db, wanted)
            return wanted

    def set_limit(
        self, name: str, *, limit_nanousd: int | None = None, limit_tokens: int | None = None
    ) -> Budget:
        """Change or add a limit; one that is left out stays as it is.

        Raises `BudgetError` where more than the new limit is already spent or held.
        """
        limit_nanousd, limit_tokens = _checked_limits(limit_nanousd, limit_tokens)
        with self._store.transaction() as db:
            old = known_budget(db, name)
            new = Budget(
                name,
                old.limit_nanousd if limit_nanousd is None else limit_nanousd,
                old.limit_tokens if limit_tokens is None else limit_tokens,
                old.posted_nanousd,
                old.held_nanousd,
                old.posted_tokens,
                old.held_tokens,
            )
            if new == old:
                return old
            _refuse_limit_below_use(old, new)
            db.execute(
                "UPDATE budgets SET limit_nanousd = ?, limit_tokens = ? WHERE name = ?",
                [new.limit_nanousd, new.limit_tokens, name],
            )
            append_limit(db, new)
            return new

    def budget(self, name: str) -> Budget:
        """Raises `UnknownName`, which names the nearest budget."""
        with self._store.transaction(write=False) as db:
            return known_budget(db, name)

    def budgets(self) -> list[Budget]:
        """All budgets, by name."""
        with self._store.transaction(write=False) as db:
            return [Budget(**row) for row in db.query("SELECT * FROM budgets ORDER BY name")]

    # Holds

    def reserve(
        self, budget: str, key: str, usage: Mapping[str, TokenCount], prices: Mapping[str, Price]
    ) -> Hold:
        """Hold the worst case of a call: `usage` is the most each model may read and make.

        Idempotent: the same key with the same parameters gives the same hold, whatever its state.
        Raises `BudgetExceeded` (and holds nothing), `UnknownPrice` for a model without one,
        `UnknownName` for the budget, `HoldError` where the key stands for another call.
        """
        checked_name("hold key", key)
        usage = checked_usage(usage)
        prices = snapshot(prices, usage)
        nanousd, tokens = amounts(usage, prices)
        with self._store.transaction() as db:
            found = find_hold(db, key)
            if found is not None:
                return _same_call(found, budget, usage, prices)
            _refuse_what_does_not_fit(known_budget(db, budget), nanousd, tokens)
            hold = Hold(key, budget, "reserved", nanousd, tokens, usage, prices, now())
            insert_hold(db, hold)
            append(db, budget, key, "reserve", nanousd, tokens, usage)
            move(db, budget, held=(nanousd, tokens))
            return hold

    def settle(self, key: str, usage: Mapping[str, TokenCount], result: str | None = None) -> Entry:
        """Post what the call used, at the price it was held at, and free the rest of the hold.

        `result` (JSON text) is kept in the same transaction. Idempotent for the same usage; a result, once
        kept, stays. Raises `HoldError` for other usage, another result, an unknown key or a void hold;
        `UnknownPrice` for a model the hold does not name. More used than held: the truth is posted and
        `overrun` says by how much.
        """
        usage, result = checked_usage(usage), checked_result(result)
        with self._store.transaction() as db:
            hold = known_hold(db, key)
            if hold.state == "void":
                raise HoldError(f"the hold {key!r} is void; reserve under a new key")
            if hold.state == "posted":
                entry = _same_usage(ending(db, key), usage)
                keep_result(db, hold, result)
                return entry
            nanousd, tokens = amounts(usage, hold.prices)
            keep_result(db, hold, result)
            end_hold(db, hold, "posted")
            move(db, hold.budget, held=(-hold.held_nanousd, -hold.held_tokens), posted=(nanousd, tokens))
            overrun = max(0, nanousd - hold.held_nanousd)
            return append(db, hold.budget, key, "post", nanousd, tokens, usage, overrun)

    def void(self, key: str) -> Entry:
        """Free the whole hold: the call was never made. Idempotent.

        Raises `HoldError` for an unknown key or a hold that was posted.
        """
        with self._store.transaction() as db:
            hold = known_hold(db, key)
            if hold.state == "posted":
                raise HoldError(f"the hold {key!r} is posted and cannot be voided; the call was paid for")
            if hold.state == "void":
                return ending(db, key)
            end_hold(db, hold, "void")
            move(db, hold.budget, held=(-hold.held_nanousd, -hold.held_tokens))
            return append(db, hold.budget, key, "void", hold.held_nanousd, hold.held_tokens, hold.usage)

    def attach(self, key: str, result: str) -> Hold:
        """Keep the result (JSON text) of a call that is not settled yet. The first one stays.

        Raises `HoldError` for an unknown key, a void hold or another result.
        """
        result_checked = checked_result(result)
        with self._store.transaction() as db:
            hold = known_hold(db, key)
            if hold.state == "void":
                raise HoldError(f"the hold {key!r} is void; a call that was not made has no result")
            keep_result(db, hold, result_checked)
            return known_hold(db, key)

    def hold(self, key: str) -> Hold | None:
        with self._store.transaction(write=False) as db:
            return find_hold(db, key)

    def holds(self, budget: str, state: HoldState | None = None) -> list[Hold]:
        """The holds of a budget, oldest first; only those in `state` where one is given."""
        sql = (
            "SELECT * FROM holds WHERE budget = :budget AND (:state IS NULL OR state = :state) ORDER BY rowid"
        )
        with self._store.transaction(write=False) as db:
            known_budget(db, budget)
            return [hold_from(row) for row in db.query(sql, {"budget": budget, "state": state})]

    # Entries

    def entries(self, budget: str, key: str | None = None) -> list[Entry]:
        """The entries of a budget, oldest first; only those of one hold where `key` is given."""
        sql = "SELECT * FROM entries WHERE budget = :budget AND (:key IS NULL OR key = :key) ORDER BY id"
        with self._store.transaction(write=False) as db:
            known_budget(db, budget)
            return [entry_from(row) for row in db.query(sql, {"budget": budget, "key": key})]

    def check(self) -> list[str]:
        """What is wrong with the ledger, one line each; empty where every invariant holds."""
        with self._store.transaction(write=False) as db:
            return audit(db)


# What may happen


def _checked_limits(nanousd: int | None, tokens: int | None) -> tuple[int | None, int | None]:
    if nanousd is None and tokens is None:
        raise InputError("no limit given; give limit_nanousd, limit_tokens or both")
    return checked_limit("nanousd", nanousd), checked_limit("tokens", tokens)


def _same_limits(found: Budget, wanted: Budget) -> Budget:
    if (found.limit_nanousd, found.limit_tokens) != (wanted.limit_nanousd, wanted.limit_tokens):
        raise BudgetError(
            f"budget {found.name!r} exists with a limit of {_limits(found)}, not {_limits(wanted)}; "
            "change it with set_limit() or take another name"
        )
    return found


def _refuse_limit_below_use(old: Budget, new: Budget) -> None:
    """Only a limit that changes is looked at: an overrun in dollars must not block a limit in tokens."""
    short_of_dollars = new.limit_nanousd != old.limit_nanousd and (new.left_nanousd or 0) < 0
    short_of_tokens = new.limit_tokens != old.limit_tokens and (new.left_tokens or 0) < 0
    if short_of_dollars or short_of_tokens:
        raise BudgetError(
            f"budget {old.name!r} has {format_usd(old.posted_nanousd + old.held_nanousd)} and "
            f"{old.posted_tokens + old.held_tokens} tokens spent or held, above the new limit of {_limits(new)}; "
            "give a limit at or above that"
        )


def _refuse_what_does_not_fit(budget: Budget, nanousd: int, tokens: int) -> None:
    """Without a limit, 64 bits are the limit."""
    left = MAX_NANOUSD - budget.posted_nanousd - budget.held_nanousd
    left = left if budget.left_nanousd is None else budget.left_nanousd
    if nanousd > left:
        message = (
            f"budget {budget.name!r} has {format_usd(left)} left, the call may cost {format_usd(nanousd)}"
        )
        raise _exceeded(message, budget, nanousd, left, "nanousd")
    left = MAX_NANOUSD - budget.posted_tokens - budget.held_tokens
    left = left if budget.left_tokens is None else budget.left_tokens
    if tokens > left:
        message = f"budget {budget.name!r} has {left} tokens left, the call may use {tokens}"
        raise _exceeded(message, budget, tokens, left, "tokens")


def _exceeded(message: str, budget: Budget, needed: int, left: int, unit: str) -> BudgetExceeded:
    message += "; raise the limit, allow fewer tokens or choose a cheaper model"
    return BudgetExceeded(message, budget=budget.name, needed=needed, left=left, unit=unit)


def _same_call(hold: Hold, budget: str, usage: Mapping[str, TokenCount], prices: Mapping[str, Price]) -> Hold:
    for what, held, asked in (
        ("budget", hold.budget, budget),
        ("usage", usage_text(hold.usage), usage_text(usage)),
        ("prices", prices_text(hold.prices), prices_text(prices)),
    ):
        if held != asked:
            raise HoldError(
                f"the key {hold.key!r} holds {what} {held}, not {asked}; use a new key for a new call"
            )
    return hold


def _same_usage(entry: Entry, usage: Mapping[str, TokenCount]) -> Entry:
    if entry.usage != usage:
        raise HoldError(
            f"the hold {entry.key!r} is posted with usage {usage_text(entry.usage)}, not {usage_text(usage)}; "
            "a call is settled once"
        )
    return entry


def _limits(budget: Budget) -> str:
    dollars = None if budget.limit_nanousd is None else format_usd(budget.limit_nanousd)
    tokens = None if budget.limit_tokens is None else f"{budget.limit_tokens} tokens"
    return " and ".join(limit for limit in (dollars, tokens) if limit)
