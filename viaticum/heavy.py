"""Importing and loading what is heavy, one thread at a time.

Libraries that import their parts when they are first used (transformers) can be met half imported by a
second thread, which then sees an ImportError though everything is installed.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import TypeVar

from viaticum.errors import MissingExtra

LOADING = threading.RLock()
PATIENCE = 30.0  # seconds to wait for a thread of somebody else's that is importing a package
Found = TypeVar("Found")


def check_installed(package: str, extra: str) -> None:
    """Raise `MissingExtra` where a package is not installed; imports nothing."""
    if find_spec(package) is None:
        raise MissingExtra(package, extra)


def imported(package: str, extra: str, load: Callable[[], Found]) -> Found:
    """Return what `load` imports from a package, also while a thread that knows no lock is importing it.

    Raises:
        MissingExtra: the package is not installed.
    """
    end = time.monotonic() + PATIENCE
    while True:
        try:
            with LOADING:
                return load()
        except ImportError:
            if find_spec(package) is None:
                raise MissingExtra(package, extra) from None
            if time.monotonic() > end:
                raise
        time.sleep(0.05)
