"""Threads and thread pools take over the budget of whoever starts them, as tasks of asyncio do anyway."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from viaticum.agents.instrumentation.context import Inside, Payer, give, own

_lock = threading.Lock()
_installed = False


def install() -> None:
    """Have threads and pools pass the budget on, once in a process."""
    global _installed
    with _lock:
        if _installed:
            return
        _installed = True
    start, submit = threading.Thread.start, ThreadPoolExecutor.submit

    @functools.wraps(start)
    def start_inside(self: threading.Thread) -> None:
        give(self, own())
        start(self)

    @functools.wraps(submit)  # type: ignore[arg-type]
    def submit_inside(
        self: ThreadPoolExecutor, fn: Callable[..., Any], /, *args: Any, **kwargs: Any
    ) -> Future[Any]:
        payer = own()
        return submit(self, fn if payer is None else functools.partial(_run, payer, fn), *args, **kwargs)

    threading.Thread.start = start_inside  # type: ignore[method-assign]
    ThreadPoolExecutor.submit = submit_inside  # type: ignore[method-assign,assignment]


def _run(payer: Payer, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with Inside(payer):
        return fn(*args, **kwargs)
