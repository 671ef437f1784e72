"""One owner of a thread at a time: whoever else asks under its id waits for it, and finds the answer.

The lease is in the ledger, which all processes share. Its owner renews it while it works; after a kill it is
free at once for processes of the same machine, and for others when it ends. Leaves out what a thread is
(`agents.client`), and graphs that are called without it.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from viaticum.budgets import Ledger
from viaticum.errors import ViaticumError

LEASE_SECONDS, RENEW_SECONDS = 30.0, 8.0
FIRST_WAIT, LONGEST_WAIT = 0.02, 0.5  # seconds between two looks
_PROC = Path("/proc")
_log = logging.getLogger("viaticum")


@contextmanager
def owned_thread(ledger: Ledger, thread_id: str, check: Callable[[], None]) -> Iterator[None]:
    """Own a thread, after those who have it now.

    Args:
        check: called between two looks; raises where it is no longer worth waiting.
    """
    name = f"thread/{hashlib.sha256(thread_id.encode('utf-8', 'surrogatepass')).hexdigest()[:40]}"
    owner, wait = new_owner(), FIRST_WAIT
    while not take_lease(ledger, name, owner):
        check()
        time.sleep(wait)
        wait = min(LONGEST_WAIT, 2 * wait)
    ended = threading.Event()
    threading.Thread(target=_renew, args=(ledger, name, owner, ended), daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        with suppress(ViaticumError):  # it ends by itself
            ledger.end_lease(name, owner)


def new_owner() -> str:
    """A name of an owner in this process."""
    return f"{this_process()} {uuid.uuid4().hex}"


def take_lease(ledger: Ledger, name: str, owner: str) -> bool:
    """Take or renew a lease for `LEASE_SECONDS`, also from a process of this machine that has ended.

    Returns False where another owner has it.
    """
    gone = ""
    while (has := ledger.take_lease(name, owner, LEASE_SECONDS, instead_of=gone)) != owner:
        if not is_gone(has):
            return False
        gone = has
    return True


def _renew(ledger: Ledger, name: str, owner: str, ended: threading.Event) -> None:
    while not ended.wait(RENEW_SECONDS):
        try:
            if ledger.take_lease(name, owner, LEASE_SECONDS) != owner:
                return
        except ViaticumError as error:
            _log.warning("the lease of a thread could not be renewed: %s", error)


def this_process() -> str:
    """A name of this process: its machine, its id, and when it began, since ids are used again."""
    return f"{_machine()} {os.getpid()} {_began(os.getpid()) or '-'}"


def is_gone(owner: str) -> bool:
    """Whether the process of an owner was on this machine and has ended. False where nobody can know."""
    machine, _, rest = owner.partition(" ")
    pid, _, rest = rest.partition(" ")
    if machine != _machine() or not pid.isdecimal() or os.name != "posix":
        return False
    if _PROC.is_dir():
        return _began(int(pid)) != rest.partition(" ")[0]
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


@cache
def _machine() -> str:
    """This machine since it was started, and the space of its process ids."""
    try:
        boot = (_PROC / "sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink(_PROC / 'self/ns/pid')}"
    except OSError:
        return platform.node().replace(" ", "-") or "unknown"


def _began(pid: int) -> str | None:
    """When a process began, in ticks since the machine was started; None for one that has ended."""
    try:
        state, *fields = (_PROC / str(pid) / "stat").read_text().rpartition(") ")[2].split()
    except (OSError, ValueError):
        return None
    return None if state in ("Z", "X") else fields[18]
