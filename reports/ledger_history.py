"""The ledger's account of a job: spending over time and by model, holds, overruns.

Entries are read once, one at a time, and the curve is thinned as it grows, so that memory does not grow with
the ledger. Reads only; leaves out drawing.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Collection
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from viaticum.budgets import Entry, EntryKind, Ledger
from viaticum.errors import BudgetError, InputError, MissingExtra, reason
from viaticum.jobs import Job

POINTS = 240  # of the curve; past twice as many, every two become one
SHOWN = 5
MARKS = 20
MOST_CHECKED = 100_000  # entries; `viaticum budget verify` plays longer ledgers again
_KINDS: tuple[EntryKind, ...] = ("limit", "reserve", "post", "void", "expire", "unknown")


@dataclass(frozen=True, slots=True)
class Moment:
    """An interval of time that ends `seconds` after the job began.

    Attributes:
        posted: nano-dollars this job's scope has spent by its end.
        committed: most nano-dollars spent and held at once within it.
    """

    seconds: float
    posted: int
    committed: int
    limit: int | None


@dataclass(frozen=True, slots=True)
class Mark:
    """A call to mark on the curve: it cost more than it held, or its outcome is unknown."""

    seconds: float
    key: str
    nanousd: int
    left: int | None


@dataclass(slots=True)
class Spend:
    """What one model cost.

    Attributes:
        output_rate: highest price of its output tokens, in nano-dollars a million.
    """

    nanousd: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    output_rate: int = 0


@dataclass(slots=True)
class LedgerHistory:
    """Nano-dollar sums of the entries of a job's scope and of those below it since its start.

    Attributes:
        before: spent in the scope before the job began.
        named: part of `posted` whose calls the rows of the job name; unnamed and unnamed_calls: the rest.
        missing: calls that rows name and the ledger has no post of.
        held: still held; `unknown` of it is for calls whose outcome is unknown.
        highest: most nano-dollars spent and held at once.
        posted_for: by key, what was posted for calls that rows name.
        checked: the ledger was replayed; wrong says what did not agree.
    """

    where: str
    scope: str
    limit: int | None = None
    window: str = ""
    before: int = 0
    posted: int = 0
    calls: int = 0
    named: int = 0
    unnamed: int = 0
    unnamed_calls: int = 0
    missing: int = 0
    held: int = 0
    held_calls: int = 0
    unknown: int = 0
    unknown_calls: int = 0
    voided: int = 0
    expired: int = 0
    overrun: int = 0
    overrun_calls: int = 0
    highest: int = 0
    moments: list[Moment] = field(default_factory=list)
    overruns: list[Mark] = field(default_factory=list)
    unknowns: list[Mark] = field(default_factory=list)
    models: dict[str, Spend] = field(default_factory=dict)
    posted_for: dict[str, int] = field(default_factory=dict)
    began: str = ""
    checked: bool = False
    wrong: list[str] = field(default_factory=list)


def read_ledger_history(
    job: Job,
    keys: Collection[str],
    folder: str | Path,
    ledger: str | None = None,
    cached: Collection[str] = (),
) -> LedgerHistory:
    """Read the ledger of a job.

    Args:
        keys: keys of the calls that its rows name.
        folder: the job's folder; a ledger that moved with it is found beside it.
        ledger: where the ledger is, in place of what the job says.
        cached: keys of the calls that were answered from an earlier one.

    Raises:
        InputError: the ledger is gone or cannot be read; the message says why.
    """
    where = ledger or found_ledger(job.ledger, Path(folder))
    try:
        with Ledger(where, read_only=True) as opened:
            budgets = opened.budgets()
            if job.budget not in {each.name for each in budgets}:
                raise InputError(
                    f"the ledger at {where} has no budget {job.budget!r}; it is another job's ledger"
                )
            below = {job.budget}
            for _ in budgets:  # a scope may be listed before the one above it
                below |= {each.name for each in budgets if each.parent in below}
            own = next(each for each in budgets if each.name == job.budget)
            history = LedgerHistory(str(where), job.budget, window=str(own.window or ""))
            reader = _Reader(history, job, keys, cached, below)
            opened.each_entry(reader.take, job.budget if len(below) == 1 else None, kinds=_KINDS)
            history = reader.done()
            history.limit = own.limit_nanousd
            if reader.entries <= MOST_CHECKED:
                history.checked, history.wrong = True, opened.check(job.budget)[:SHOWN]
            return history
    except (BudgetError, MissingExtra, OSError, sqlite3.Error) as error:
        raise InputError(f"the ledger at {where} cannot be read: {reason(error)}") from None


def found_ledger(where: str, folder: Path) -> str:
    """The ledger's address or path as given, else a file beside the job, which may have moved.

    Raises:
        InputError: it is gone.
    """
    if "://" in where:
        return where
    if where == "memory:":
        raise InputError("the ledger was kept in memory and is gone with the process that wrote it")
    paths = [Path(where), folder / where, folder.parent / where, folder.parent / Path(where).name]
    for path in paths:
        if path.is_file():
            return str(path)
    raise InputError(f"the ledger at {where} is gone; say where it is with --ledger")


class _Reader:
    def __init__(
        self,
        history: LedgerHistory,
        job: Job,
        keys: Collection[str],
        cached: Collection[str],
        scopes: set[str],
    ) -> None:
        self.history, self.keys, self.cached, self.scopes, self.scope = (
            history,
            keys,
            cached,
            scopes,
            job.budget,
        )
        self.began = _moment(job.began)
        self.holds: dict[str, int] = {}
        self.unknown: dict[str, Mark] = {}
        self.total = 0
        self.held = 0
        self.entries = self.fresh = 0
        self.stride = 1

    def take(self, entry: Entry) -> None:
        if entry.budget not in self.scopes:
            return
        self.entries += 1
        history, at = self.history, _moment(entry.at)
        if self.began is None:
            self.began = at
        seconds = (at - self.began).total_seconds() if at and self.began else 0.0
        if entry.kind == "limit" and entry.budget == self.scope:
            history.limit = entry.nanousd or None
        elif entry.key is not None:
            self._move(entry, seconds)
        if seconds >= 0 and entry.kind in ("reserve", "post", "void", "expire", "limit"):
            self._point(seconds)

    def _move(self, entry: Entry, seconds: float) -> None:
        key, history = entry.key or "", self.history
        if entry.kind == "reserve":
            self.holds[key] = entry.nanousd
            self.held += entry.nanousd
        elif entry.kind in ("post", "void", "expire"):
            self.held -= self.holds.pop(key, 0)
            self.unknown.pop(key, None)
            if entry.kind == "post":
                self._post(entry, seconds)
            elif seconds >= 0:
                history.voided += entry.kind == "void"
                history.expired += entry.kind == "expire"
        elif entry.kind == "unknown":
            self.unknown[key] = Mark(seconds, key, entry.nanousd, self._left())

    def _post(self, entry: Entry, seconds: float) -> None:
        history, key = self.history, entry.key or ""
        self.total += entry.nanousd
        named = key in self.keys or key in self.cached
        if named:
            history.named += entry.nanousd
            history.posted_for[key] = entry.nanousd
        if seconds < 0 and not named:
            history.before += entry.nanousd
            return
        history.posted += entry.nanousd
        history.calls += 1
        if not named:
            history.unnamed += entry.nanousd
            history.unnamed_calls += 1
        if entry.overrun:
            history.overrun += entry.overrun
            history.overrun_calls += 1
            history.overruns.append(Mark(seconds, key, entry.overrun, self._left()))
            history.overruns.sort(key=lambda mark: -mark.nanousd)
            del history.overruns[MARKS:]
        by_model = entry.note.get("costs", {})
        for model, count in entry.usage.items():
            spend = history.models.setdefault(model, Spend())
            spend.nanousd += by_model.get(model, 0)
            spend.input_tokens += count.input_tokens
            spend.output_tokens += count.output_tokens
            price = entry.prices.get(model)
            spend.output_rate = max(spend.output_rate, price.output_nanousd_per_million if price else 0)

    def _left(self) -> int | None:
        return None if self.history.limit is None else self.history.limit - self.total

    def _point(self, seconds: float) -> None:
        """One point for every `stride` entries; the stride doubles when there are too many."""
        history, committed = self.history, self.total + self.held
        history.highest = max(history.highest, committed)
        here = Moment(seconds, self.total, committed, history.limit)
        if self.fresh % self.stride and history.moments:
            history.moments[-1] = _merged(history.moments[-1], here)
        else:
            history.moments.append(here)
        self.fresh += 1
        if len(history.moments) > 2 * POINTS:
            pairs = zip(history.moments[::2], history.moments[1::2], strict=False)
            history.moments[:] = [_merged(*pair) for pair in pairs] + history.moments[2 * POINTS :]
            self.stride, self.fresh = 2 * self.stride, 1

    def done(self) -> LedgerHistory:
        history = self.history
        history.held, history.held_calls = self.held, len(self.holds)
        history.unknowns = list(self.unknown.values())
        history.unknown = sum(mark.nanousd for mark in history.unknowns)
        history.unknown_calls = len(history.unknowns)
        history.missing = sum(key not in history.posted_for for key in self.keys)
        history.began = self.began.isoformat() if self.began else ""
        return history


def _merged(one: Moment, two: Moment) -> Moment:
    return Moment(two.seconds, two.posted, max(one.committed, two.committed), two.limit)


def _moment(text: str) -> datetime | None:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)
