"""Client-side rate limiting by a provider's own limits, shared by all threads that call a model.

Reads the headers of responses (x-ratelimit-remaining-*, x-ratelimit-reset-*) and of rejections (Retry-After).
Where no request is left, or one was rejected, all threads wait until the named time, instead of each being
rejected once. Leaves out retries (`models.remote.model`) and the number of concurrent calls, which the caller
sets.
"""

from __future__ import annotations

import math
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from viaticum.errors import ProviderWait
from viaticum.models.remote.errors import MAX_WAIT

PREFIX = "llm_provider-"  # LiteLLM puts it before the names of a provider's headers
_DURATION = re.compile(r"(?:(\d+)h)?(?:(\d+)m(?!s))?(?:(\d+(?:\.\d+)?)s)?(?:(\d+(?:\.\d+)?)ms)?")

_longest: ContextVar[float] = ContextVar("viaticum_longest_wait", default=math.inf)


@contextmanager
def waiting_at_most(seconds: float) -> Iterator[None]:
    """Let calls of this context wait so long for a provider, each time; a longer wait is `ProviderWait`."""
    token = _longest.set(seconds)
    try:
        yield
    finally:
        _longest.reset(token)


def check_wait(model: str, seconds: float, refusal: Exception | None = None) -> None:
    """Raise `ProviderWait` where a call may not wait so long.

    refusal: of the provider; None where it was not asked yet.
    """
    if seconds > _longest.get():
        message = f"the provider of {model} takes no more calls for {seconds:.0f} seconds"
        raise ProviderWait(message, seconds, is_refusal=refusal is not None) from refusal


class ProviderRateLimiter:
    """Delays requests that the provider would reject.

    clock: monotonic time in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._lock = clock, threading.Lock()
        self._blocked_until = self._reset_at = 0.0
        self._remaining: int | None = None  # requests left before `_reset_at`; None: unknown
        self._in_flight = 0

    @contextmanager
    def acquire(self, sleep: Callable[[float], None]) -> Iterator[None]:
        """Hold one request open, after waiting for the provider's limit with `sleep` (takes seconds)."""
        with self._lock:
            self._in_flight += 1
            pause = self._pause()
        try:
            if pause > 0:
                sleep(pause)
            yield
        finally:
            with self._lock:
                self._in_flight -= 1

    def block(self, seconds: float) -> None:
        """Delay all requests of the next `seconds`, at most `MAX_WAIT`."""
        with self._lock:
            self._blocked_until = max(self._blocked_until, self._clock() + min(seconds, MAX_WAIT))

    def update(self, headers: Mapping[str, Any]) -> None:
        """Take over the limits in a response's headers."""
        limits = {name.lower().removeprefix(PREFIX): str(value) for name, value in headers.items()}
        with self._lock:
            now = self._clock()
            for unit in ("requests", "tokens"):
                remaining = limits.get(f"x-ratelimit-remaining-{unit}", "")
                reset = parse_duration(limits.get(f"x-ratelimit-reset-{unit}", ""))
                if not remaining.isdecimal() or reset is None:
                    continue
                if unit == "tokens":
                    if int(remaining) == 0:
                        self._blocked_until = max(self._blocked_until, now + min(reset, MAX_WAIT))
                    continue
                # The count may not include the requests that are still in flight.
                self._remaining = max(0, int(remaining) - (self._in_flight - 1))
                self._reset_at = now + min(reset, MAX_WAIT)

    def _pause(self) -> float:
        """Count the next request and return the seconds to wait before it."""
        now = self._clock()
        if self._remaining is not None and now >= self._reset_at:
            self._remaining = None
        pause = max(0.0, self._blocked_until - now)
        if self._remaining is not None:
            if self._remaining <= 0:
                return max(pause, self._reset_at - now)
            if pause <= _longest.get():  # else it is not sent
                self._remaining -= 1
        return pause


def parse_duration(text: str) -> float | None:
    """Return the seconds of a provider's duration (1s, 6m0s, 20ms, 1.5); None for anything else."""
    try:
        return max(0.0, float(text))
    except ValueError:
        found = _DURATION.fullmatch(text.strip()) if text.strip() else None
    if found is None:
        return None
    return sum(
        float(part or 0) * unit for part, unit in zip(found.groups(), (3600, 60, 1, 0.001), strict=True)
    )


def headers_of(response: Any) -> Mapping[str, Any]:
    """Return the provider's headers of one of LiteLLM's responses."""
    hidden = getattr(response, "_hidden_params", None)
    headers = hidden.get("additional_headers") if isinstance(hidden, Mapping) else None
    return headers if isinstance(headers, Mapping) else {}
