"""Tries what needs the network again: a registry may be away for a moment."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
WAITS = (5.0, 20.0)  # seconds before further tries


def patiently(work: Callable[[], T]) -> T:
    """The result of some work. Raises the `RuntimeError` of its last try."""
    for wait in WAITS:
        try:
            return work()
        except RuntimeError as error:
            sys.stderr.write(f"{error}; tried again in {wait:g} s\n")
            time.sleep(wait)
    return work()
