"""The pydantic-monty back end: a Python interpreter written in Rust, in worker processes of its own.

The interpreter has no access to files, network, environment or processes: nothing of the host is mounted and
no host function is offered. Time, memory, recursion, sleep and output are limited inside the worker; a worker
that hangs or crashes nevertheless is killed from outside and replaced. Programs may use Monty's subset of
Python (no numpy, no generators); a missing feature shows as an error of the program.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time

import pydantic_monty

from viaticum.errors import InputError, SandboxError
from viaticum.strategies.sandbox.base import (
    CLOSED,
    FORKED,
    LIMITS,
    Limits,
    ProgramResult,
    Sandbox,
    name_last_value,
)

RECURSION = 500
GRACE_SECONDS = 0.5  # from a worker's own time limit until it is killed
WAIT_SECONDS = 60.0  # for a free worker
LONGEST_SECONDS = 60.0  # upper bound of a program's time limit
REPLY_SECONDS = 75.0  # until a silent worker is killed, also one that was stopped while idle
INTERPRETER_BYTES = 512 * 2**20  # address space of a worker beside the program's memory
_VALUE = "value_of_the_last_expression_"

# The process that started workers. pydantic-monty serves them from threads, which a forked child does not
# have: every call would wait forever there.
_process = 0


# After a crash this early without output, the worker is assumed to have been dead before the program began,
# and the program is repeated on another worker, at most this often. Programs have no effects, so repeating
# them is safe.
DEAD_SECONDS = 0.02
DEAD_WORKERS = 4


class MontySandbox(Sandbox):
    """Programs in pydantic-monty workers, at most `workers` at once (default: one per core)."""

    backend = "monty"
    strength = (
        "A Python interpreter without access to files, network, environment or processes, in a worker "
        "process "
        "with an empty environment; limits inside it, and a watchdog that kills it from outside."
    )

    def __init__(self, workers: int | None = None) -> None:
        global _process
        self._lock = threading.Lock()
        _refuse_after_fork()
        _process = os.getpid()
        try:
            self._pool: pydantic_monty.Monty | None = pydantic_monty.Monty(
                max_processes=workers or os.cpu_count() or 1,
                checkout_timeout=WAIT_SECONDS,
                feed_duration_limit_grace=GRACE_SECONDS,
                request_timeout=REPLY_SECONDS,
            ).__enter__()
        except (RuntimeError, OSError, ValueError) as error:
            raise SandboxError(
                f"pydantic-monty cannot start a worker: {error}; run: pip install --force-reinstall "
                f"pydantic-monty"
            ) from error

    def run(self, program: str, limits: Limits = LIMITS) -> ProgramResult:
        if limits.seconds > LONGEST_SECONDS:
            raise InputError(f"a program gets up to {LONGEST_SECONDS:.0f} seconds, not {limits.seconds:g}")
        pool = self._pool
        if pool is None:
            raise SandboxError(CLOSED)
        _refuse_after_fork()
        started = time.perf_counter()
        resources = pydantic_monty.ResourceLimits(
            max_feed_duration_secs=limits.seconds,
            max_memory=limits.memory_bytes,
            max_recursion_depth=RECURSION,
            max_suspensions=100,
            max_total_sleep_secs=limits.seconds,
        )
        for attempt in range(DEAD_WORKERS + 1):  # a worker may have died while idle
            began, error, fed = time.perf_counter(), "", False
            output = pydantic_monty.CollectString(max_bytes=limits.output_bytes)
            try:
                with pool.checkout(limits=resources) as session:
                    _limit_address_space(session.worker_pid, limits.memory_bytes + INTERPRETER_BYTES)
                    fed = True
                    _feed(session, program, output)
            except TimeoutError as busy:
                raise SandboxError(f"all workers were busy for {WAIT_SECONDS:.0f} s: {busy}") from busy
            except pydantic_monty.MontyCrashedError as crash:
                soon = time.perf_counter() - began < DEAD_SECONDS and not crash.timed_out
                was_dead = not fed or (soon and not output.output)
                if was_dead and attempt < DEAD_WORKERS:
                    continue
                error = (
                    _timeout_message(limits)
                    if crash.timed_out
                    else f"the program crashed its worker: {crash}"
                )
            except pydantic_monty.MontyError as raised:
                error = _error_text(raised, limits)
            except RuntimeError as broken:
                raise SandboxError(f"the monty sandbox failed: {broken}") from broken
            break
        return ProgramResult(output.output, error, self.backend, time.perf_counter() - started)

    def close(self) -> None:
        if _process != os.getpid():
            return  # the workers belong to the parent process, which may be using them
        with self._lock:
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.__exit__(None, None, None)


def _refuse_after_fork() -> None:
    if _process not in (0, os.getpid()):
        raise SandboxError(FORKED)


def _feed(session: pydantic_monty.MontySession, program: str, output: pydantic_monty.CollectString) -> None:
    """Run the program, then print its last value if it printed nothing.

    Only text comes back: a value would be rebuilt in this process, outside the program's limits, so each
    snippet ends in None.
    """
    named = name_last_value(program, _VALUE)
    session.feed_run(f"{named or program}\nNone", print_callback=output)
    if named and not output.output.strip():
        session.feed_run(f"if {_VALUE} is not None:\n    print({_VALUE})\nNone", print_callback=output)


def _limit_address_space(pid: int | None, size: int) -> None:
    """A second memory limit, enforced by the kernel, for what the interpreter does not count itself."""
    if sys.platform == "linux" and pid is not None:
        import resource

        with contextlib.suppress(OSError, ValueError):
            hard = resource.prlimit(pid, resource.RLIMIT_AS)[1]
            resource.prlimit(pid, resource.RLIMIT_AS, (size, hard))


def _timeout_message(limits: Limits) -> str:
    return f"the program was stopped after {limits.seconds:g} s"


def _error_text(error: pydantic_monty.MontyError, limits: Limits) -> str:
    """The error in words, as shown in results."""
    if isinstance(error, pydantic_monty.MontySyntaxError):
        return f"the program is not valid Python: {str(error)[:200]}"
    text = str(error)
    if text.startswith("TimeoutError: feed time limit exceeded"):
        return _timeout_message(limits)
    if text.startswith("MemoryError: "):
        if text.endswith(f"> {limits.output_bytes} bytes") and limits.output_bytes != limits.memory_bytes:
            return f"the program printed more than {limits.output_bytes} bytes"
        return f"the program needed more than {limits.memory_bytes / 2**20:g} MiB of memory"
    return f"the program raised {text[:300]}"
