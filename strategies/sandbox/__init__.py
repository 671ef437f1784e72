"""Where programs written by models run: the contract, and the sandbox that this process shares.

Each back end is one file. pydantic-monty, an interpreter that has no files, network or processes to give, comes
with the package.
"""

from __future__ import annotations

import atexit
import threading

from viaticum.errors import SandboxError
from viaticum.strategies.sandbox.base import ProgramResult, Sandbox

__all__ = ["ProgramResult", "Sandbox", "default_sandbox"]

_lock = threading.Lock()
_shared: Sandbox | None = None


def default_sandbox() -> Sandbox:
    """The sandbox that this process shares: started and tested on first use, closed at exit.

    Raises `SandboxError`, naming what to install, where none works on this machine.
    """
    global _shared
    with _lock:
        if _shared is None:
            _shared = _start()
            atexit.register(_shared.close)
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
