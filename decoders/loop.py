"""Detect a sequence that repeats itself: its tail is one cycle of tokens again and again.

Greedy small models fall into such loops, and long thoughts of reasoning models do, with cycles of whole
paragraphs; they would fill the rest of their token limit. The default limits are wide on purpose: a hundred
zeros, a ruled table or a list of equal rows is text, and cutting it would cost more than the tokens saved. A
thought is also taken for a loop if it has said nothing new for thousands of tokens, since closing it loses no
text. Looks at token ids only; time a token and memory do not grow with the text.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from viaticum.errors import InputError

_ROOM = 8192  # tokens written before the window is moved back
_CHECK_INTERVAL = 64  # tokens between two searches for a long cycle
_KEY = 32  # newest tokens whose earlier occurrences are candidates for a long cycle
_GRAM = 16  # tokens of the pieces that a thought is compared by


@dataclass(frozen=True, slots=True)
class LoopGuard:
    """When a sequence counts as a loop.

    Its tail repeats a cycle of at most `period` tokens exactly, at least `repeats` times and over at least
    `tokens` tokens; or a longer cycle of at most `long_period` tokens, likewise (seen up to 64 tokens late).
    A thought is also a loop if of its last `stale_tokens` pieces of 16 tokens at most one in `stale_factor`
    differs from the others.

    Raises:
        InputError: a number out of range.
    """

    period: int = 64
    repeats: int = 8
    tokens: int = 256
    long_period: int = 1024
    long_repeats: int = 4
    long_tokens: int = 1024
    stale_tokens: int = 4096
    stale_factor: int = 16

    def __post_init__(self) -> None:
        if min(self.period, self.long_period) < 1 or min(self.repeats, self.long_repeats) < 2:
            raise InputError(f"a loop has a period of 1 or more and repeats at least twice, got {self}")
        if min(self.tokens, self.long_tokens, self.stale_tokens, self.stale_factor) < 2:
            raise InputError(f"a loop has at least two tokens, got {self}")

    def detector(self) -> LoopDetector:
        """A detector for one sequence."""
        return LoopDetector(self)


class LoopDetector:
    """Detects a loop in one sequence: for every short period, for how long the tail has had it.

    O(period) a token, vectorised; long cycles are searched for now and then.
    """

    def __init__(self, guard: LoopGuard) -> None:
        self._guard = guard
        periods = np.arange(1, guard.period + 1)
        # A tail of n tokens that equal those `period` before them covers n + period tokens.
        self._needed = np.maximum(guard.tokens, guard.repeats * periods) - periods
        self._runs = np.zeros(guard.period, dtype=np.int64)
        self._history = max(guard.period, guard.long_tokens, guard.long_repeats * guard.long_period) + _KEY
        # Filled from its end to its beginning, so that a window begins with the newest token.
        self._tokens = np.full(_ROOM + self._history, -1, dtype=np.int64)
        self._newest = _ROOM  # index of the newest token
        self._count = 0
        self._recent: deque[int] = deque(maxlen=_GRAM)
        self._grams: deque[int] = deque()  # hashes of the last pieces of a thought
        self._gram_counts: Counter[int] = Counter()

    def push(self, token: int, *, thought: bool = False) -> bool:
        """Add a token; True if the sequence has become a loop. thought: it belongs to a thought."""
        window = self._tokens[self._newest : self._newest + len(self._runs)]  # newest first
        self._runs += 1
        self._runs *= window == token
        if self._newest == 0:
            self._tokens[_ROOM:] = self._tokens[: self._history].copy()
            self._newest = _ROOM
        self._newest -= 1
        self._tokens[self._newest] = token
        self._count += 1
        stale = thought and self._is_stale(token)
        if bool((self._runs >= self._needed).any()):
            return True
        return stale or (self._count % _CHECK_INTERVAL == 0 and self._has_long_cycle())

    def _has_long_cycle(self) -> bool:
        guard = self._guard
        newest_first = self._tokens[self._newest : self._newest + min(self._count, self._history)]
        if len(newest_first) < guard.long_tokens:
            return False
        begin = guard.period + 1  # shorter cycles are followed token by token
        earlier = newest_first[begin : guard.long_period + _KEY]
        if len(earlier) < _KEY:
            return False
        same = (sliding_window_view(earlier, _KEY) == newest_first[:_KEY]).all(1)
        for period in (np.flatnonzero(same) + begin).tolist():
            needed = max(guard.long_tokens, guard.long_repeats * period)
            tail = newest_first[:needed]
            if len(tail) == needed and bool((tail[period:] == tail[:-period]).all()):
                return True
        return False

    def _is_stale(self, token: int) -> bool:
        """Whether the thought has said nothing new for long."""
        self._recent.append(token)
        gram = hash(tuple(self._recent))
        self._grams.append(gram)
        self._gram_counts[gram] += 1
        if len(self._grams) <= self._guard.stale_tokens:
            return False
        oldest = self._grams.popleft()
        self._gram_counts[oldest] -= 1
        if not self._gram_counts[oldest]:
            del self._gram_counts[oldest]
        return len(self._gram_counts) * self._guard.stale_factor <= self._guard.stale_tokens
