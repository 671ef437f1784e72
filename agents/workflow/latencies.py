"""How long calls take, from the newest calls in the ledger, whoever made them.

The seconds of a call are kept with its result; one that was cut off counts for twice as long as it was held.
They are taken as linear in its output tokens (the time to the first token, then a time for each), fitted by
least squares to the calls of the pair, or of its model where the pair has few; the quantiles are those of the
ratio of what calls took to the fitted line. Leaves out what follows from it
(`viaticum.agents.workflow.deadlines`).
"""

from __future__ import annotations

import json
import math
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from statistics import fmean

from viaticum.budgets import Entry, Hold, Ledger
from viaticum.types import Row

NEWEST = 300  # calls that are looked at
LEAST = 5  # calls of a pair, below which those of its model count
REFRESH_SECONDS = 5.0
CUT_OFF = 2.0  # times as long as it was held is what a call that was cut off counts for
Points = list[tuple[int, float]]  # output tokens and seconds of calls


@dataclass(frozen=True, slots=True)
class Seconds:
    """What a call takes: in half of the cases at most p50, in nine of ten at most p90."""

    p50: float
    p90: float

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(self.p50 + other.p50, self.p90 + other.p90)

    def times(self, number: int) -> Seconds:
        return Seconds(self.p50 * number, self.p90 * number)


AGENT = "agent"  # calls of `BudgetMiddleware`, which settles them as they end
ELSEWHERE = ("http", "tool")  # calls that others make, of which the ledger has the price alone


class CallLatencies:
    """Reads the ledger when it is asked, at most every five seconds. Threads may share one."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger, self._lock = ledger, threading.Lock()
        self._read_at = float("-inf")
        self._pairs: dict[tuple[str, str], Points] = {}
        self._models: dict[str, Points] = {}

    def of(self, row: Row) -> Seconds | None:
        """What a call of a row's pair takes; None where no call of its model was seen."""
        self._refresh()
        pair, model = row.pair, self._models.get(row.pair.model, [])
        points = self._pairs.get((pair.model, pair.strategy), [])
        points = points if len(points) >= LEAST else model
        return estimate(points, row.tokens_p50, row.tokens_p90) if points else None

    def _refresh(self) -> None:
        with self._lock:
            if time.monotonic() - self._read_at < REFRESH_SECONDS:
                return
            pairs, models = defaultdict[tuple[str, str], Points](list), defaultdict[str, Points](list)
            for hold, post in self._ledger.newest_calls(NEWEST):
                if (point := _point(hold, post)) is not None:
                    model = hold.tags.get("model", "")
                    pairs[model, hold.tags.get("strategy", "")].append(point)
                    models[model].append(point)
            self._pairs, self._models, self._read_at = dict(pairs), dict(models), time.monotonic()


def estimate(points: Sequence[tuple[int, float]], tokens_p50: float, tokens_p90: float) -> Seconds:
    """Seconds of a call from those of others. tokens: expected output; 0 where nothing is known of it."""
    first, each = _line(points)
    fitted = [first + each * tokens for tokens, _ in points]
    ratios = sorted(
        seconds / line if line else 1.0 for (_, seconds), line in zip(points, fitted, strict=True)
    )
    usual = fmean(tokens for tokens, _ in points)
    half, most = (
        (first + each * (tokens or usual)) * _quantile(ratios, share)
        for tokens, share in ((tokens_p50, 0.5), (tokens_p90, 0.9))
    )
    return Seconds(half, max(half, most))


def _line(points: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """Seconds until the first token and a token, neither below zero, by least squares."""
    tokens, seconds = [point[0] for point in points], [point[1] for point in points]
    mean_tokens, mean_seconds = fmean(tokens), fmean(seconds)
    spread = sum((each - mean_tokens) ** 2 for each in tokens)
    slope = sum((t - mean_tokens) * (s - mean_seconds) for t, s in points) / spread if spread else 0.0
    slope = max(0.0, slope)
    first = mean_seconds - slope * mean_tokens
    if first < 0:
        return 0.0, mean_seconds / mean_tokens if mean_tokens else 0.0
    return first, slope


def _quantile(ordered: Sequence[float], share: float) -> float:
    """The smallest value that so many reach."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def _point(hold: Hold, post: Entry) -> tuple[int, float] | None:
    """Output tokens and seconds of a call; None where its result does not say.

    A call that was cut off has no result. How long it would have taken is not known: twice as long as it was
    held counts. Without these calls a model that never ends in time would seem quick.
    """
    if hold.result is None:
        seconds = (datetime.fromisoformat(post.at) - datetime.fromisoformat(hold.created)).total_seconds()
        tokens = sum(count.output_tokens for count in post.usage.values())
        if hold.tags.get("door") == AGENT and post.note.get("usage") == "reported":
            return tokens, max(0.0, seconds)
        if hold.tags.get("door") in ELSEWHERE or post.note.get("was") == "unknown":
            return None  # no result is kept of these, or they were settled long after they ended
        return tokens, max(0.0, CUT_OFF * seconds)
    try:
        result = json.loads(hold.result or "")
        seconds = float(result["seconds"])
        tokens = sum(int(counts[1]) for counts in result["usage"].values())
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
        return None
    return (tokens, seconds) if seconds > 0 else None
