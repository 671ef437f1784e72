"""A run as the ledger saw it: its calls in order, what each held and cost, and how the money went.

Reads the entries of a budget and of those below it. Leaves out texts, which the ledger does not show, and
drawing (`viaticum.commands.trace`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime

from viaticum.budgets import Budget, Ledger
from viaticum.budgets.records import Entry
from viaticum.types import TokenCount

_ENDS = {"post": "done", "void": "void", "expire": "expired", "unknown": "unknown"}


@dataclass(frozen=True)
class TracedCall:
    """One call of a run.

    Attributes:
        key: of its hold.
        budget: scope that was charged.
        models: that worked on it.
        tags: of the call, such as `strategy`, `tool` and `door`.
        started: seconds since the run's first call.
        seconds: from its hold to its end; None while it runs.
        state: `done`, `void` (not charged), `expired`, `unknown` (charged, end not known) or `open`.
        held, cost: nano-dollars; an unknown call costs what it holds, an open one nothing yet.
        used: tokens of all models together, of a call that was charged.
        left: nano-dollars of the run's budget after its end; None without a limit, or while it is open.
    """

    key: str
    budget: str
    models: tuple[str, ...]
    tags: Mapping[str, str]
    started: float
    seconds: float | None
    state: str
    held: int
    cost: int
    used: TokenCount
    left: int | None


@dataclass(frozen=True)
class Trace:
    """A run: its budget, and its calls in the order in which they began."""

    budget: Budget
    calls: tuple[TracedCall, ...]

    @property
    def seconds(self) -> float:
        """From the first hold to the last end."""
        return max((call.started + (call.seconds or 0.0) for call in self.calls), default=0.0)

    def by_model(self) -> dict[str, tuple[int, int]]:
        """Calls and nano-dollars by model, the dearest first; a pair's models stand together."""
        sums: dict[str, tuple[int, int]] = {}
        for call in self.calls:
            name = "+".join(call.models)
            number, cost = sums.get(name, (0, 0))
            sums[name] = number + 1, cost + call.cost
        return dict(sorted(sums.items(), key=lambda each: -each[1][1]))


@dataclass
class _Story:
    """The entries of one call, in order."""

    reserved: Entry
    ended: Entry | None = field(default=None)


def read_trace(ledger: Ledger, name: str) -> Trace:
    """Read the run of a budget, with the scopes below it.

    Raises:
        UnknownName: no such budget.
    """
    budget = ledger.budget(name)
    stories: dict[str, _Story] = {}

    def take(entry: Entry) -> None:
        if entry.key is None:
            return
        if entry.kind == "reserve":
            stories[entry.key] = _Story(entry)
        elif entry.kind in _ENDS and entry.key in stories:
            stories[entry.key].ended = entry

    for scope in (name, *_below(ledger.budgets(), name)):
        ledger.each_entry(take, scope)
    return Trace(budget, tuple(_calls(stories, budget.limit_nanousd)))


def _below(budgets: Iterable[Budget], name: str) -> list[str]:
    """Names of the scopes below one, at any depth."""
    found, known = [], list(budgets)
    front = [name]
    while front:
        front = [each.name for each in known if each.parent in front]
        found += front
    return found


def _calls(stories: Mapping[str, _Story], limit: int | None) -> Iterable[TracedCall]:
    left: dict[str, int] = {}
    spent = 0
    ended = [story for story in stories.values() if story.ended is not None]
    for story in sorted(ended, key=lambda each: (each.ended.at, each.ended.id)):  # type: ignore[union-attr]
        spent += _cost(story)
        if limit is not None:
            left[story.reserved.key or ""] = limit - spent
    first = min((story.reserved.at for story in stories.values()), default="")
    for key, story in sorted(stories.items(), key=lambda each: (each[1].reserved.at, each[1].reserved.id)):
        entry, end = story.reserved, story.ended
        used = end.usage if end is not None and end.kind in ("post", "unknown") else {}
        yield TracedCall(
            key,
            entry.budget,
            tuple(entry.usage),
            entry.note.get("tags", {}),
            _seconds(first, entry.at),
            None if end is None else _seconds(entry.at, end.at),
            "open" if end is None else _ENDS[end.kind],
            entry.nanousd,
            _cost(story),
            sum(used.values(), TokenCount()),
            left.get(key),
        )


def _cost(story: _Story) -> int:
    end = story.ended
    return end.nanousd if end is not None and end.kind in ("post", "unknown") else 0


def _seconds(start: str, end: str) -> float:
    return (datetime.fromisoformat(end) - datetime.fromisoformat(start)).total_seconds()
