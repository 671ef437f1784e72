"""Sandboxes for programs written by models: the contract, the back ends, and this process's shared sandbox.

One file per back end: `monty`, an interpreter without access to files, network or processes; `bubblewrap`,
CPython with numpy and sympy, isolated by the kernel; `auto`, the first with the second as fallback; `unsafe`,
a bare subprocess without any sandbox, only on explicit request.
"""

from __future__ import annotations

import atexit
import threading
from collections.abc import Callable

from viaticum.errors import SandboxError, UnknownName
from viaticum.strategies.sandbox.auto import AutoSandbox, open_bwrap, open_monty
from viaticum.strategies.sandbox.base import Limits, ProgramResult, Sandbox, run_self_test

__all__ = ["BACKENDS", "Limits", "ProgramResult", "Sandbox", "default_sandbox", "open_sandbox"]

# Each opens, starts and tests a sandbox.
_OPEN: dict[str, Callable[[int | None], Sandbox]] = {
    "auto": AutoSandbox,
    "monty": open_monty,
    "bwrap": open_bwrap,
}
BACKENDS = (*_OPEN, "subprocess")

_lock = threading.Lock()
_shared: Sandbox | None = None


def open_sandbox(backend: str = "auto", *, workers: int | None = None, unsafe: bool = False) -> Sandbox:
    """Open a sandbox, started and tested. Close it, or use it in a `with` statement.

    Args:
        backend: one of `BACKENDS`.
        workers: number of programs at once; None for one per core.
        unsafe: required for `subprocess`, which is not a sandbox; with `auto`, falls back to it if no sandbox
            works.

    Raises:
        UnknownName: no such back end.
        SandboxError: it does not work on this machine; the message names what to install.
    """
    if backend not in BACKENDS:
        raise UnknownName("sandbox", backend, BACKENDS)
    if backend == "subprocess":
        return _open_unsafe(unsafe)
    try:
        return _OPEN[backend](workers)
    except SandboxError:
        if backend != "auto" or not unsafe:
            raise
        return _open_unsafe(unsafe)


def _open_unsafe(unsafe: bool) -> Sandbox:
    from viaticum.strategies.sandbox.unsafe import UnsafeSubprocess

    return run_self_test(UnsafeSubprocess(unsafe=unsafe))


def default_sandbox() -> Sandbox:
    """Return the shared sandbox of this process: `auto`, started and tested on first use, closed at exit.

    Raises:
        SandboxError: no sandbox works on this machine; the message names what to install.
    """
    global _shared
    with _lock:
        if _shared is None:
            _shared = open_sandbox()
            atexit.register(_shared.close)
        return _shared
