"""Where programs written by models run: the contract, and the sandbox that this process shares.

Each back end is one file: `monty`, an interpreter that has no files, network or processes to give; `bubblewrap`,
CPython with numpy and sympy behind the kernel's own walls; `auto`, the first and behind it the second; `unsafe`,
no sandbox, for who asks for it by that name.
"""

from __future__ import annotations

import atexit
import threading
from collections.abc import Callable

from viaticum.errors import SandboxError, UnknownName
from viaticum.strategies.sandbox.auto import AutoSandbox, open_bwrap, open_monty
from viaticum.strategies.sandbox.base import Limits, ProgramResult, Sandbox, run_self_test

__all__ = ["BACKENDS", "Limits", "ProgramResult", "Sandbox", "default_sandbox", "open_sandbox"]

# Each starts and tests what it opens.
_OPEN: dict[str, Callable[[int | None], Sandbox]] = {
    "auto": AutoSandbox,
    "monty": open_monty,
    "bwrap": open_bwrap,
}
BACKENDS = (*_OPEN, "subprocess")

_lock = threading.Lock()
_shared: Sandbox | None = None


def open_sandbox(backend: str = "auto", *, workers: int | None = None, unsafe: bool = False) -> Sandbox:
    """A sandbox of this kind, started and tested. Close it, or use it in a `with`.

    backend: one of `BACKENDS`. workers: how many programs at once; None means one a core. unsafe: has to be said
    for `subprocess`, which is no sandbox, and lets `auto` fall back to it where no sandbox works.
    Raises `UnknownName`, and `SandboxError`, naming what to install, where it does not work on this machine.
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
    """The sandbox that this process shares: `auto`, started and tested on first use, closed at exit.

    Raises `SandboxError`, naming what to install, where none works on this machine.
    """
    global _shared
    with _lock:
        if _shared is None:
            _shared = open_sandbox()
            atexit.register(_shared.close)
        return _shared
