"""Where programs written by models run: the contract, and the sandbox that this process shares.

Each back end is one file. pydantic-monty, an interpreter that has no files, network or processes to give, comes
with the package.
"""

from __future__ import annotations

import atexit
import os
import threading

from viaticum.errors import SandboxError
from viaticum.strategies.sandbox.base import ProgramResult, Sandbox

__all__ = ["ProgramResult", "Sandbox", "default_sandbox"]

_lock = threading.Lock()
_shared: Sandbox | None = None
_owner = 0  # the process that started it: a forked child must not talk to its parent's workers
_inherited: list[
    Sandbox | None
] = []  # kept, because dropping one would end workers that the parent still uses


def default_sandbox() -> Sandbox:
    """The sandbox that this process shares: started and tested on first use, closed at exit.

    Raises `SandboxError`, naming what to install, where none works on this machine.
    """
    global _shared, _owner
    with _lock:
        if _shared is None or _owner != os.getpid():
            _inherited.append(_shared)
            _shared, _owner = _start(), os.getpid()
            atexit.register(_close, _shared, _owner)
        return _shared


def _start() -> Sandbox:
    try:
        from viaticum.strategies.sandbox.monty import MontySandbox
    except ImportError as error:
        raise SandboxError(
            f"no sandbox for programs: {error}; run: pip install 'pydantic-monty>=1.4,<2'"
        ) from error
    sandbox = MontySandbox()
    try:
        sandbox.self_test()
    except SandboxError as error:
        sandbox.close()
        raise SandboxError(f"{error}; reinstall it: pip install --force-reinstall pydantic-monty") from error
    return sandbox


def _close(sandbox: Sandbox, owner: int) -> None:
    if owner == os.getpid():
        sandbox.close()


def _renew_lock() -> None:
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_renew_lock)
