"""Reading and writing the ledger's rows: each function is one statement inside the caller's transaction.

Leaves out what may happen to them: see `ledger`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

from sqlite_utils import Database

from viaticum.budgets.records import (
    Budget,
    Entry,
    EntryKind,
    Hold,
    HoldState,
    checked_name,
    prices_from,
    prices_text,
    usage_from,
    usage_text,
)
from viaticum.errors import HoldError, UnknownName
from viaticum.types import TokenCount


def now() -> str:
    """UTC in ISO 8601, always as wide, so that text sorts by time."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


def _one(rows: Iterable[dict[str, Any]]) -> dict[str, Any] | None:
    return next(iter(list(rows)), None)


def find_budget(db: Database, name: str) -> Budget | None:
    row = _one(db.query("SELECT * FROM budgets WHERE name = ?", [name]))
    return None if row is None else Budget(**row)


def known_budget(db: Database, name: str) -> Budget:
    found = find_budget(db, checked_name("budget name", name))
    if found is None:
        names = [row["name"] for row in db.query("SELECT name FROM budgets ORDER BY name")]
        raise UnknownName("budget", name, names)
    return found


def hold_from(row: dict[str, Any]) -> Hold:
    return Hold(**{**row, "usage": usage_from(row["usage"]), "prices": prices_from(row["prices"])})


def find_hold(db: Database, key: str) -> Hold | None:
    row = _one(db.query("SELECT * FROM holds WHERE key = ?", [checked_name("hold key", key)]))
    return None if row is None else hold_from(row)


def known_hold(db: Database, key: str) -> Hold:
    found = find_hold(db, key)
    if found is None:
        raise HoldError(f"no hold with key {key!r}; reserve it first")
    return found


def insert_hold(db: Database, hold: Hold) -> None:
    db.execute(
        "INSERT INTO holds (key, budget, state, held_nanousd, held_tokens, usage, prices, created)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        [
            hold.key,
            hold.budget,
            hold.state,
            hold.held_nanousd,
            hold.held_tokens,
            usage_text(hold.usage),
            prices_text(hold.prices),
            hold.created,
        ],
    )


def keep_result(db: Database, hold: Hold, result: str | None) -> None:
    if result is None or result == hold.result:
        return
    if hold.result is not None:
        raise HoldError(f"the hold {hold.key!r} already keeps another result; read it with hold()")
    db.execute("UPDATE holds SET result = ? WHERE key = ?", [result, hold.key])


def end_hold(db: Database, hold: Hold, state: HoldState) -> None:
    db.execute("UPDATE holds SET state = ? WHERE key = ?", [state, hold.key])


def move(
    db: Database, budget: str, *, held: tuple[int, int] = (0, 0), posted: tuple[int, int] = (0, 0)
) -> None:
    """Add (nano-dollars, tokens) to the totals."""
    db.execute(
        "UPDATE budgets SET held_nanousd = held_nanousd + ?, held_tokens = held_tokens + ?,"
        " posted_nanousd = posted_nanousd + ?, posted_tokens = posted_tokens + ? WHERE name = ?",
        [*held, *posted, budget],
    )


def entry_from(row: dict[str, Any]) -> Entry:
    return Entry(**{**row, "usage": usage_from(row["usage"])})


def ending(db: Database, key: str) -> Entry:
    """The entry that ended a hold, which must have ended."""
    sql = "SELECT * FROM entries WHERE key = ? AND kind IN ('post', 'void')"
    row = _one(db.query(sql, [key]))
    if row is None:
        raise HoldError(f"the hold {key!r} has ended without an entry: the ledger was altered; run check()")
    return entry_from(row)


def append_limit(db: Database, budget: Budget) -> Entry:
    return append(db, budget.name, None, "limit", budget.limit_nanousd or 0, budget.limit_tokens or 0, {})


def append(
    db: Database,
    budget: str,
    key: str | None,
    kind: EntryKind,
    nanousd: int,
    tokens: int,
    usage: Mapping[str, TokenCount],
    overrun: int = 0,
) -> Entry:
    at = now()
    cursor = db.execute(
        "INSERT INTO entries (budget, key, kind, nanousd, tokens, overrun, at, usage)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        [budget, key, kind, nanousd, tokens, overrun, at, usage_text(usage)],
    )
    assert cursor.lastrowid is not None
    return Entry(cursor.lastrowid, budget, key, kind, nanousd, tokens, overrun, at, usage)
