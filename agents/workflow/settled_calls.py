"""Settled calls in the order in which they were reserved: the order that a sequential test may rely on.

Calls that run at once are settled in another order, the shortest outputs first: whoever counts them as they
come sees many short ones before the long ones. Leaves out what the calls tell (`watched_router`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime

from viaticum.budgets import Entry, Hold, Ledger
from viaticum.budgets.ledger import LEASE_SECONDS
from viaticum.routers.query.change_detection import Expectation

EXPECTED = "expected"  # the tag
WINDOW = 2_000  # newest posts that are read at once
MOST_WAITING = 10_000  # calls of a model that wait for one that was reserved before


@dataclass(frozen=True, slots=True)
class SettledCall:
    """A call with what was expected of it.

    Attributes:
        reserved_at: UTC in ISO 8601.
        expected: None for a call that did not end by itself.
        tokens: written.
        cost: nano-dollars; None where a part of the prompt was cached, which an expectation knows nothing of.
    """

    reserved_at: str
    key: str
    model: str
    expected: Expectation | None
    tokens: int
    cost: int | None


class SettledCalls:
    """Those of a ledger that were expected to be of some length, each once.

    A call waits until all that were reserved before it, of the same model, have ended. It does not wait for
    one whose lease is over or longer than `LEASE_SECONDS` (in a provider's batch), and not for one of which
    `MOST_WAITING` later ones are waiting.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger, self._last_post = ledger, 0
        self._waiting: dict[str, list[SettledCall]] = {}  # by model

    def read(self) -> Iterator[SettledCall]:
        """Those that are new, of each model in the order of reservation."""
        calls, open_holds = self._ledger.newest_and_open_calls(WINDOW, self._last_post)
        # What ended before a full window is not in it: of calls that ran at once, the shorter ones. It holds
        # all that were reserved since its first post, and only part of those before.
        begin = calls[-1][1].at if len(calls) == WINDOW else ""
        if calls:
            self._last_post = calls[0][1].id
        for hold, post in calls:
            if EXPECTED in hold.tags and hold.created >= begin:
                call = _settled(hold, post)
                self._waiting.setdefault(call.model, []).append(call)
        awaited = _first_open(open_holds)
        for model, waiting in self._waiting.items():
            waiting.sort(key=lambda call: (call.reserved_at, call.key))
            first, surplus = awaited.get(model), len(waiting) - MOST_WAITING
            ready = [
                call
                for number, call in enumerate(waiting)
                if number < surplus or first is None or (call.reserved_at, call.key) < first
            ]
            self._waiting[model] = waiting[len(ready) :]
            yield from ready


def _first_open(holds: Iterable[Hold]) -> dict[str, tuple[str, str]]:
    """By model, time and key of the oldest call that is waited for."""
    now, found = datetime.now(UTC).isoformat(timespec="microseconds"), dict[str, tuple[str, str]]()
    for hold in holds:
        if EXPECTED in hold.tags and hold.until > now and hold.lease <= LEASE_SECONDS:
            model, start = hold.tags.get("model", ""), (hold.created, hold.key)
            found[model] = min(found.get(model, start), start)
    return found


def _settled(hold: Hold, post: Entry) -> SettledCall:
    has_ended = "result" in post.note and post.note.get("was") != "unknown"
    counts = list(post.usage.values())
    is_cached = any(each.cached_input_tokens or each.cache_write_tokens for each in counts)
    return SettledCall(
        hold.created,
        hold.key,
        hold.tags.get("model", ""),
        Expectation.parse(hold.tags[EXPECTED]) if has_ended else None,
        sum(each.output_tokens for each in counts),
        None if is_cached else post.nanousd,
    )
