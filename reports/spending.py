"""What was spent, by team, key, model, budget, tag or time, for whoever has to charge it on.

Counts what a ledger posted; a call is counted when it ended. Amounts are nano-dollars. Leaves out text and
pages (`spending_page`).
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from functools import lru_cache
from typing import Any
from zoneinfo import ZoneInfo

from viaticum.budgets import Entry, Hold, Ledger
from viaticum.errors import InputError
from viaticum.money import usd_digits
from viaticum.records import field_text

NO_TAG = "(none)"
TAG = "tag:"
TIMES = ("day", "week", "month")
DIMENSIONS = ("team", "key", "model", "budget", "root", *TIMES)


@dataclass(frozen=True, slots=True)
class SpendingLine:
    """What the calls with these labels cost. labels: one for each dimension, in their order."""

    labels: tuple[str, ...]
    calls: int
    input_tokens: int
    output_tokens: int
    nanousd: int


@dataclass(frozen=True, slots=True)
class Spending:
    """What was spent, by dimensions; lines in the order of time, then the largest first.

    Attributes:
        calls, nanousd: of all lines together. A call of two models counts once here, and in each one's line.
        unknown, unknown_nanousd: calls that were sent and never heard of again, and what is held for them;
            in no line until they are reconciled.
        tags: names of the tags that the calls have.
    """

    by: tuple[str, ...]
    lines: tuple[SpendingLine, ...]
    calls: int
    nanousd: int
    unknown: int
    unknown_nanousd: int
    tags: tuple[str, ...]

    def fields(self) -> list[str]:
        """Columns of the CSV."""
        return [*self.by, "calls", "input_tokens", "output_tokens", "nanousd", "usd"]

    def to_csv(self) -> str:
        """The lines as CSV with a header; texts that a spreadsheet would run as formulas are escaped."""
        file = io.StringIO()
        writer = csv.DictWriter(file, self.fields(), lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: field_text(value) for name, value in row.items()} for row in self.rows())
        return file.getvalue()

    def rows(self) -> list[dict[str, Any]]:
        """Lines as records for CSV and JSON; dollars exactly."""
        return [
            dict(zip(self.by, line.labels, strict=True))
            | {
                "calls": line.calls,
                "input_tokens": line.input_tokens,
                "output_tokens": line.output_tokens,
                "nanousd": line.nanousd,
                "usd": usd_digits(line.nanousd),
            }
            for line in self.lines
        ]


class SpendingCounter:
    """Sums posts as they are read.

    Args:
        by: dimensions: of `DIMENSIONS`, or `tag:NAME`.
        until: UTC in ISO 8601; posts from then on are left out.
        zone: of days, weeks and months.
    """

    def __init__(self, by: Sequence[str], until: str = "", zone: str = "UTC") -> None:
        self.by, self._until = tuple(by), until
        self._labels = [self._reader(name, ZoneInfo(zone)) for name in by]
        self._sums: dict[tuple[str, ...], list[int]] = {}
        self.calls = self.nanousd = 0
        self.tags: set[str] = set()

    def take(self, entry: Entry) -> None:
        if self._until and entry.at >= self._until:
            return
        tags = entry.note.get("tags", {})
        self.calls += 1
        self.nanousd += entry.nanousd
        self.tags.update(tags)
        costs, seen = entry.note.get("costs", {}), set[tuple[str, ...]]()
        for model, used in entry.usage.items():
            labels = tuple(read(entry, tags, model) for read in self._labels)
            sums = self._sums.setdefault(labels, [0, 0, 0, 0])
            sums[0] += labels not in seen
            sums[1] += used.input_tokens
            sums[2] += used.output_tokens
            sums[3] += costs.get(model, 0)
            seen.add(labels)

    def add(self, other: SpendingCounter) -> None:
        """Add what was counted of other posts by the same dimensions."""
        self.calls += other.calls
        self.nanousd += other.nanousd
        self.tags |= other.tags
        for labels, amounts in other._sums.items():
            sums = self._sums.setdefault(labels, [0, 0, 0, 0])
            sums[:] = (one + more for one, more in zip(sums, amounts, strict=True))

    def to_json(self) -> dict[str, Any]:
        sums = [[*labels, *amounts] for labels, amounts in self._sums.items()]
        own = {"by": [*self.by], "calls": self.calls, "nanousd": self.nanousd, "tags": sorted(self.tags)}
        return own | {"sums": sums}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> SpendingCounter:
        """What `to_json` returned. Raises `KeyError`, `TypeError` or `ValueError` for anything else."""
        counter = cls(checked_dimensions(data["by"]))
        counter.calls, counter.nanousd = int(data["calls"]), int(data["nanousd"])
        counter.tags = set(map(str, data["tags"]))
        for row in data["sums"]:
            labels, amounts = row[: len(counter.by)], row[len(counter.by) :]
            if len(amounts) != 4:
                raise ValueError(f"four amounts after the labels, got {row}")
            counter._sums[tuple(map(str, labels))] = list(map(int, amounts))
        return counter

    def lines(self) -> tuple[SpendingLine, ...]:
        times = [n for n, name in enumerate(self.by) if name in TIMES]
        lines = [SpendingLine(labels, *sums) for labels, sums in self._sums.items()]
        lines.sort(key=lambda line: ([line.labels[n] for n in times], -line.nanousd, line.labels))
        return tuple(lines)

    def _reader(self, name: str, zone: ZoneInfo) -> Callable[[Entry, Mapping[str, str], str], str]:
        if name == "model":
            return lambda entry, tags, model: model
        if name == "budget":
            return lambda entry, tags, model: entry.budget
        if name == "root":
            return lambda entry, tags, model: entry.root
        if name in TIMES:
            return lambda entry, tags, model: period_of(entry.at[:16], name, zone)
        tag = name.removeprefix(TAG)
        return lambda entry, tags, model: tags.get(tag, NO_TAG)


def checked_dimensions(by: Iterable[str]) -> tuple[str, ...]:
    """Return the dimensions; raises `InputError` for one that is none or stands there twice."""
    names = tuple(by)
    for name in names:
        if name not in DIMENSIONS and not (name.startswith(TAG) and name != TAG):
            raise InputError(f"unknown dimension {name!r}; use {', '.join(DIMENSIONS)} or {TAG}NAME")
    if len(set(names)) < len(names) or not names:
        raise InputError("name each dimension once, at least one")
    return names


def read_spending(
    ledger: Ledger,
    by: Iterable[str] = ("team", "key", "model"),
    *,
    budget: str | None = None,
    since: datetime | None = None,
    until: datetime | None = None,
    zone: str = "UTC",
) -> Spending:
    """What a ledger posted, by dimensions.

    Args:
        by: `team` and `key` (tags that the server sets by the API key of a request, and `viaticum.tagged`
            sets for code), `model`, `budget` (which paid), `root` (the topmost budget above it), `day`,
            `week` (of ISO 8601), `month`, or `tag:NAME`.
        budget: only this scope and its descendants.
        since, until: only calls that ended in this time; `until` is left out.
        zone: name of the time zone of days, weeks and months.

    Raises:
        InputError: a dimension or the zone is none.
        UnknownName: no such budget.
    """
    names = checked_dimensions(by)
    try:
        ZoneInfo(zone)
    except (KeyError, ValueError, OSError):
        raise InputError(f"unknown time zone {zone!r}; use a name such as Europe/Berlin") from None
    return read_tables([ledger], [names], budget=budget, since=since, until=until, zone=zone)[0]


def read_tables(
    ledgers: Sequence[Ledger],
    tables: Sequence[Sequence[str]],
    *,
    budget: str | None = None,
    since: datetime | None = None,
    until: datetime | None = None,
    zone: str = "UTC",
) -> list[Spending]:
    """As `read_spending`, of several ledgers together, for several lists of dimensions in one pass."""
    counters = [SpendingCounter(by, _text(until), zone) for by in tables]

    def take(entry: Entry) -> None:
        for counter in counters:
            counter.take(entry)

    unknown = []
    for ledger in ledgers:
        ledger.each_post(take, budget, _text(since))
        unknown += [hold for scope in _scopes(ledger, budget) for hold in ledger.holds(scope, "unknown")]
    return [spending_of(each, unknown) for each in counters]


def spending_of(counter: SpendingCounter, unknown: Sequence[Hold]) -> Spending:
    """What was counted, beside the calls whose end is not known."""
    held, tags = sum(hold.held_nanousd for hold in unknown), tuple(sorted(counter.tags))
    return Spending(counter.by, counter.lines(), counter.calls, counter.nanousd, len(unknown), held, tags)


@lru_cache(maxsize=4096)
def period_of(minute: str, name: str, zone: ZoneInfo) -> str:
    """The day, week or month of a minute of UTC (`2026-11-21T08:15`): `2026-11-21`, `2026-W47`, `2026-11`."""
    moment = datetime.fromisoformat(f"{minute}:00+00:00").astimezone(zone)
    if name == "month":
        return f"{moment:%Y-%m}"
    return f"{moment:%Y-%m-%d}" if name == "day" else week_name(moment.date())


def week_name(day: date) -> str:
    """The week of ISO 8601 that a day is in, such as `2026-W47`."""
    year, week, _ = day.isocalendar()
    return f"{year}-W{week:02d}"


def weeks_between(first: str, last: str) -> list[str]:
    """Names of all weeks from one to another, both included."""
    begin, end = (date.fromisocalendar(int(each[:4]), int(each[6:]), 1) for each in (first, last))
    return [week_name(begin + timedelta(weeks=n)) for n in range((end - begin).days // 7 + 1)]


def _scopes(ledger: Ledger, budget: str | None) -> list[str | None]:
    if budget is None:
        return [None]
    below = {budget}
    budgets = ledger.budgets()
    for _ in budgets:  # a scope may be listed before the one above it
        below |= {each.name for each in budgets if each.parent in below}
    return [*below]


def _text(moment: datetime | None) -> str:
    """As the ledger writes times."""
    return "" if moment is None else moment.astimezone(UTC).isoformat(timespec="microseconds")
