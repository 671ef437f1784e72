"""How fast a provider lets itself be asked: one `ProviderRateLimiter` for all threads that ask one model.

Read from what it says with its answers (x-ratelimit-remaining-*, x-ratelimit-reset-*) and with its refusals (Retry-After):
where no request is left, or one was refused, all wait until the moment it named, instead of each finding out alone.
Leaves out trying again (`models.remote.model`) and how many ask at once, which is their caller's.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from viaticum.models.remote.errors import LONGEST_WAIT

PREFIX = "llm_provider-"  # which LiteLLM puts before the names of a provider's headers
_SPAN = re.compile(r"(?:(\d+)h)?(?:(\d+)m(?!s))?(?:(\d+(?:\.\d+)?)s)?(?:(\d+(?:\.\d+)?)ms)?")


class ProviderRateLimiter:
    """left: requests that may still be sent before `reset`, None where the provider does not say."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._lock = clock, threading.Lock()
        self._until = self._reset = 0.0
        self._left: int | None = None
        self._inside = 0

    @contextmanager
    def take(self, sleep: Callable[[float], None]) -> Iterator[None]:
        """One request, after the wait that the provider wants."""
        with self._lock:
            self._inside += 1
            pause = self._pause()
        try:
            if pause > 0:
                sleep(pause)
            yield
        finally:
            with self._lock:
                self._inside -= 1

    def refused(self, seconds: float) -> None:
        """Nobody asks for so long."""
        with self._lock:
            self._until = max(self._until, self._clock() + min(seconds, LONGEST_WAIT))

    def heard(self, headers: Mapping[str, Any]) -> None:
        """What came with an answer."""
        told = {name.lower().removeprefix(PREFIX): str(value) for name, value in headers.items()}
        with self._lock:
            now = self._clock()
            for what in ("requests", "tokens"):
                left = told.get(f"x-ratelimit-remaining-{what}", "")
                reset = seconds_of(told.get(f"x-ratelimit-reset-{what}", ""))
                if not left.isdecimal() or reset is None:
                    continue
                if what == "tokens":
                    if int(left) == 0:
                        self._until = max(self._until, now + min(reset, LONGEST_WAIT))
                    continue
                # Those that were sent since, or wait for their answer, may not be counted in it.
                self._left = max(0, int(left) - (self._inside - 1))
                self._reset = now + min(reset, LONGEST_WAIT)

    def _pause(self) -> float:
        """Seconds to wait before the next request, which is counted."""
        now = self._clock()
        if self._left is not None and now >= self._reset:
            self._left = None
        pause = max(0.0, self._until - now)
        if self._left is not None:
            if self._left <= 0:
                return max(pause, self._reset - now)
            self._left -= 1
        return pause


def seconds_of(text: str) -> float | None:
    """1s, 6m0s, 20ms or 1.5, as providers write spans of time; None for anything else."""
    try:
        return max(0.0, float(text))
    except ValueError:
        found = _SPAN.fullmatch(text.strip()) if text.strip() else None
    if found is None:
        return None
    return sum(
        float(part or 0) * unit for part, unit in zip(found.groups(), (3600, 60, 1, 0.001), strict=True)
    )


def headers_of(response: Any) -> Mapping[str, Any]:
    """The provider's headers of one of LiteLLM's responses."""
    hidden = getattr(response, "_hidden_params", None)
    headers = hidden.get("additional_headers") if isinstance(hidden, Mapping) else None
    return headers if isinstance(headers, Mapping) else {}
