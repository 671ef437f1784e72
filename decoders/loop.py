"""Detect a sequence that repeats itself: its tail is one short cycle of tokens again and again.

Greedy small models fall into such loops and would fill the rest of their token limit with them. The default
limits are wide on purpose: a hundred zeros, a ruled table or a list of equal rows is text, and cutting it
would cost more than the tokens saved. Looks at token ids only.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from viaticum.errors import InputError

_ROOM = 4096  # tokens written before the window is moved back


@dataclass(frozen=True, slots=True)
class LoopGuard:
    """When a sequence counts as a loop.

    Its tail repeats a cycle of at most `period` tokens exactly, at least `repeats` times and over at least
    `tokens` tokens.

    Raises:
        InputError: a number out of range.
    """

    period: int = 64
    repeats: int = 8
    tokens: int = 256

    def __post_init__(self) -> None:
        if self.period < 1 or self.repeats < 2 or self.tokens < 2:
            raise InputError(f"a loop has a period of 1 or more and repeats at least twice, got {self}")

    def detector(self) -> LoopDetector:
        """A detector for one sequence."""
        return LoopDetector(self)


class LoopDetector:
    """Detects a loop in one sequence: for every period, for how long the tail has had it.

    O(period) a token, vectorised.
    """

    def __init__(self, guard: LoopGuard) -> None:
        periods = np.arange(1, guard.period + 1)
        # A tail of n tokens that equal those `period` before them covers n + period tokens.
        self._needed = np.maximum(guard.tokens, guard.repeats * periods) - periods
        self._runs = np.zeros(guard.period, dtype=np.int64)
        # Filled from its end to its beginning, so that a window begins with the newest token.
        self._tokens = np.full(_ROOM + guard.period, -1, dtype=np.int64)
        self._newest = _ROOM  # index of the newest token

    def push(self, token: int) -> bool:
        """Add a token; True if the sequence has become a loop."""
        window = self._tokens[self._newest : self._newest + len(self._runs)]  # newest first
        self._runs += 1
        self._runs *= window == token
        if self._newest == 0:
            self._tokens[_ROOM:] = window
            self._newest = _ROOM
        self._newest -= 1
        self._tokens[self._newest] = token
        return bool((self._runs >= self._needed).any())
