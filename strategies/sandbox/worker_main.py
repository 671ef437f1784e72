"""The script inside the bubblewrap sandbox: a worker that forks two processes for each program.

Started by `bubblewrap`, not imported there: a plain script of the standard library, run as `python -I -S`.
The worker has the privileges to confine a child and never sees a program, so that its memory, which every
child copies, holds nothing of earlier programs. For each request it forks a supervisor, which reads the
program, forks the program's own process, stops that at its limits, replies and exits. Nothing outlives the
program: process, mounts, files, memory.

The process of a program has its own pid and mount namespaces, an empty tmpfs in /tmp, kernel limits
(setrlimit(2)), no capabilities, an unprivileged user id, and a system call filter. It answers over two pipes:
its output, and how it ended, as JSON.

Messages on the worker's stdin and stdout: four bytes of length, big endian, then JSON in UTF-8.

Leaves out the namespaces of the worker itself and the list of calls (`bubblewrap`, `seccomp`).
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import ctypes
import gc
import importlib
import json
import math
import os
import resource
import select
import signal
import sys
import time
import types
from typing import Any, NoReturn, cast

SCRATCH_BYTES = 16 * 2**20
SCRATCH_FILES = 1024
OPEN_FILES = 64
PROCESSES = 32  # threads count as processes; the filter refuses new processes
STACK_BYTES = 8 * 2**20
ERROR_CHARACTERS = 300
REPORT_BYTES = 64 * 2**10  # without the value of the last expression
USER = 1000

# Imported once per worker, so that no program waits for them.
PRELOADED_MODULES = (
    *("collections", "datetime", "decimal", "fractions", "functools", "heapq", "itertools", "operator"),
    *("random", "re", "statistics", "string", "typing", "dataclasses", "enum", "threading", "traceback"),
    "encodings.idna",
)
# Triggers the lazy initialisation of a package once per worker.
WARM_UP_CODE = {"sympy": "x = package.Symbol('x'); package.solve(x**2 - 2, x); package.integrate(x, x)"}

CLONE_NEWNS, CLONE_NEWPID = 0x00020000, 0x20000000
MS_NOSUID, MS_NODEV, MS_NOEXEC = 2, 4, 8
PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT = 4, 22, 24, 38, 47
PR_CAP_AMBIENT_CLEAR_ALL = 4
SECCOMP_MODE_FILTER = 2
CAPABILITY_VERSION_3 = 0x20080522
OUTPUT, REPORT = 1, 3  # descriptors of a program
CONFINED = b"+"  # first byte of a report, written before the program runs

libc = ctypes.CDLL(None, use_errno=True)


def call(name: str, *arguments: Any) -> int:
    """Call a function of the C library. Raises `OSError` if it returns -1."""
    value = int(getattr(libc, name)(*arguments))
    if value == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return value


def read_message(fd: int) -> dict[str, Any] | None:
    """The next message, or None at the end of the stream."""
    head = _read_exactly(fd, 4)
    body = _read_exactly(fd, int.from_bytes(head, "big")) if head else None
    return cast("dict[str, Any]", json.loads(body)) if body else None


def write_message(fd: int, message: dict[str, Any]) -> None:
    body = json.dumps(message).encode()
    _write_all(fd, len(body).to_bytes(4, "big") + body)


def _write_all(fd: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest) :]


def _read_exactly(fd: int, size: int) -> bytes | None:
    data = bytearray()
    while len(data) < size:
        piece = os.read(fd, size - len(data))
        if not piece:
            return None
        data += piece
    return bytes(data)


def serve() -> None:
    """Answer requests until stdin closes. Each reply is written before the next request is read."""
    requests, replies = os.dup(0), os.dup(1)
    null = os.open("/dev/null", os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(2, 1)
    os.close(null)
    handshake = read_message(requests)
    if handshake is None:
        return
    system_calls = bytes.fromhex(handshake["seccomp"])
    sys.path.extend(handshake["path"])
    for name in PRELOADED_MODULES:
        importlib.import_module(name)
    write_message(replies, {"ready": True})
    while (request := read_message(requests)) is not None:
        if request["load"]:
            load(request["load"])
        supervisor = os.fork()
        if supervisor == 0:
            _supervise_one_program(requests, replies, system_calls)
        if os.waitpid(supervisor, 0)[1] != 0:
            return


def _supervise_one_program(requests: int, replies: int, system_calls: bytes) -> NoReturn:
    """In a child of the worker: run the next program and reply. Never returns."""
    status = 70
    try:
        write_message(replies, {"loaded": True})
        request = read_message(requests)
        if request is not None:
            write_message(replies, run_program(request, system_calls, requests))
            status = 0
    finally:
        os._exit(status)


def load(names: list[str]) -> None:
    """Import packages once, so that all later programs have them."""
    for name in names:
        if name not in sys.modules:
            # A program that imports a missing or broken package gets the error itself.
            with contextlib.suppress(Exception):
                exec(WARM_UP_CODE.get(name, ""), {"package": importlib.import_module(name)})
    gc.collect()
    gc.freeze()


def run_program(request: dict[str, Any], system_calls: bytes, requests: int) -> dict[str, Any]:
    """Run one program in a process of its own and wait for its end: {stdout, error} or {broken}."""
    output, output_end = os.pipe()
    report, report_end = os.pipe()
    address_space = mapped_bytes() + request["memory_bytes"]
    call("unshare", CLONE_NEWPID)  # makes the child the first process of a namespace
    pid = os.fork()
    if pid == 0:
        _run_confined(request, system_calls, address_space, output_end, report_end)
    os.close(output_end)
    os.close(report_end)
    return supervise(pid, output, report, request, requests)


def mapped_bytes() -> int:
    """The address space of this process, found by bisecting its limit, which needs no /proc."""
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    page = os.sysconf("SC_PAGE_SIZE")
    low, high = 0, 2**42
    libc.mmap.restype = ctypes.c_void_p
    failed = ctypes.c_void_p(-1).value
    while high - low > 2**16:
        middle = (low + high) // 2
        resource.setrlimit(resource.RLIMIT_AS, (middle, hard))
        try:
            # PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS
            where = libc.mmap(None, ctypes.c_size_t(page), 0, 0x22, -1, ctypes.c_long(0))
        except MemoryError:
            where = failed
        if where == failed:
            low = middle
        else:
            libc.munmap(ctypes.c_void_p(where), ctypes.c_size_t(page))
            high = middle
    resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
    return high


def supervise(pid: int, output: int, report: int, request: dict[str, Any], requests: int) -> dict[str, Any]:
    """Read the program's output and report until it ends; kill it at its limits."""
    seconds, output_bytes = request["seconds"], request["output_bytes"]
    limits = {output: output_bytes, report: REPORT_BYTES + 6 * output_bytes}
    deadline = time.monotonic() + seconds
    read: dict[int, bytearray] = {output: bytearray(), report: bytearray()}
    pidfd = call("syscall", 434, pid, 0)  # pidfd_open
    stopped = ""
    poll = select.poll()
    for fd in (output, report, pidfd):
        os.set_blocking(fd, False)
        poll.register(fd, select.POLLIN)
    poll.register(requests, 0)  # reports only the end of the stream: the caller is gone
    try:
        while True:
            left = deadline - time.monotonic()
            ready = dict(poll.poll(max(0.0, left) * 1000)) if left > 0 else {}
            if not ready or requests in ready:
                stopped = stopped or f"the program was stopped after {seconds:g} s"
                break
            for fd in read.keys() & ready.keys():
                if not _read_some(fd, read[fd], limits[fd]):
                    poll.unregister(fd)
            if len(read[output]) > output_bytes:
                break
            if len(read[report]) > limits[report]:
                stopped = "the program wrote where it must not"
                break
            if pidfd in ready:
                break
    finally:
        os.close(pidfd)
        # It is process 1 of its namespace, so the kernel kills everything in it. It is a child that was not
        # waited for, so its pid cannot have been reused.
        os.kill(pid, signal.SIGKILL)
        _, status, used = os.wait4(pid, 0)
    for fd in read:
        while len(read[fd]) <= limits[fd] and _read_some(fd, read[fd], limits[fd]):
            pass
    return _reply(read[output], bytes(read[report]), stopped, status, used.ru_utime + used.ru_stime, request)


def _read_some(fd: int, into: bytearray, limit: int) -> bool:
    """Read what is available, at most `limit` + 1 bytes in all. False at the end, and if there is nothing."""
    try:
        piece = os.read(fd, min(2**16, limit + 1 - len(into)))
    except BlockingIOError:
        return False
    into += piece
    return bool(piece)


def _reply(
    output: bytearray, report: bytes, stopped: str, status: int, cpu_seconds: float, request: dict[str, Any]
) -> dict[str, Any]:
    if not report.startswith(CONFINED):
        if stopped:
            return {"stdout": "", "error": stopped}
        return {"broken": report.decode("utf-8", "replace")[:ERROR_CHARACTERS] or f"status {status}"}
    limit = request["output_bytes"]
    end = _read_report(report[len(CONFINED) :])
    value = end.get("value", "")
    if not output.strip() and value:
        output = bytearray(value.encode("utf-8", "backslashreplace") + b"\n")
    error = stopped
    if not error and len(output) > limit:
        error = f"the program printed more than {limit} bytes"
    if not error and os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if cpu_seconds >= request["seconds"]:
            error = f"the program used more than {request['seconds']:g} s of processor time"
        else:
            error = f"the program was killed by signal {number} ({signal.strsignal(number)})"
    if not error:
        error = end.get("error", "the program ended its process before its end")
    return {"stdout": output[:limit].decode("utf-8", "ignore"), "error": error}


def _read_report(text: bytes) -> dict[str, str]:
    """How a program reports its end. It may write anything, or nothing."""
    try:
        outcome = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    if not isinstance(outcome, dict):
        return {}
    found = {name: outcome[name] for name in ("error", "value") if isinstance(outcome.get(name), str)}
    if "error" in found:
        found["error"] = found["error"][: 2 * ERROR_CHARACTERS]
    return found


def _run_confined(
    request: dict[str, Any], system_calls: bytes, address_space: int, output_end: int, report_end: int
) -> NoReturn:
    """In the child: drop all privileges, then run the program. Never returns."""
    status = 70
    try:
        try:
            _redirect_descriptors(output_end, report_end)
            confine(request, system_calls, address_space)
        except BaseException as error:
            os.write(REPORT, f"{type(error).__name__}: {error}".encode()[:ERROR_CHARACTERS])
            raise
        os.write(REPORT, CONFINED)
        outcome = execute(request["program"], request["memory_bytes"], request["output_bytes"])
        _write_all(REPORT, json.dumps(outcome).encode())
        status = 0
    finally:
        os._exit(status)


def _redirect_descriptors(output_end: int, report_end: int) -> None:
    """Close everything of the worker; what is left: null, the output, null, the report."""
    null = os.open("/dev/null", os.O_RDWR)
    # Duplicates get numbers above REPORT, because the lower ones are in use.
    for number, fd in enumerate([os.dup(fd) for fd in (null, output_end, null, report_end)]):
        os.dup2(fd, number)
    os.closerange(REPORT + 1, resource.getrlimit(resource.RLIMIT_NOFILE)[1])


def confine(request: dict[str, Any], system_calls: bytes, address_space: int) -> None:
    """Remove all privileges of this process. Raises `OSError` if any step fails."""
    call("unshare", CLONE_NEWNS)
    options = f"size={SCRATCH_BYTES},nr_inodes={SCRATCH_FILES},mode=0700,uid={USER},gid={USER}".encode()
    call("mount", b"tmpfs", b"/tmp", b"tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, options)
    os.umask(0o077)
    for number in range(1, signal.NSIG):
        if number not in (signal.SIGKILL, signal.SIGSTOP, signal.SIGPIPE, signal.SIGXFSZ):
            with contextlib.suppress(OSError, ValueError):
                signal.signal(number, signal.SIG_DFL)
    _drop_privileges()
    os.chdir("/tmp")
    cpu_seconds = math.ceil(request["seconds"]) + 1
    for limit, value in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_CPU, cpu_seconds),
        (resource.RLIMIT_FSIZE, SCRATCH_BYTES),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
        (resource.RLIMIT_NOFILE, OPEN_FILES),
        (resource.RLIMIT_NPROC, PROCESSES),
        (resource.RLIMIT_SIGPENDING, PROCESSES),
        (resource.RLIMIT_STACK, STACK_BYTES),
        (resource.RLIMIT_AS, address_space),
    ):
        resource.setrlimit(limit, (value, value))
    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    _filter_system_calls(system_calls)


def _drop_privileges() -> None:
    """Drop all capabilities for good, and take an unprivileged user id."""
    call("prctl", PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    for capability in range(64):
        # EINVAL past the last capability that this kernel knows.
        if libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) == -1:
            break
    if os.getuid() == 0:
        os.setgroups([])
        os.setresgid(USER, USER, USER)
        os.setresuid(USER, USER, USER)
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0)
    call("capset", header, (ctypes.c_uint32 * 6)())
    call("prctl", PR_SET_DUMPABLE, 0, 0, 0, 0)
    if os.getresuid() != (USER, USER, USER) or os.getresgid() != (USER, USER, USER):
        raise OSError(f"still user {os.getresuid()}, group {os.getresgid()}")


class _Filter(ctypes.Structure):
    """struct sock_fprog"""

    _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_char_p)]


def _filter_system_calls(code: bytes) -> None:
    program = _Filter(len(code) // 8, code)
    call("prctl", PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0)


def execute(program: str, memory_bytes: int, output_bytes: int) -> dict[str, str]:
    """Run the program as `__main__`: {value} of its last expression, or {error} in words."""
    main = types.ModuleType("__main__")
    names = main.__dict__
    names["__builtins__"] = builtins
    for name in ("exit", "quit"):  # not defined by Python with -S
        setattr(builtins, name, sys.exit)
    sys.modules["__main__"] = main
    sys.argv = [""]
    stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    stdout = open(OUTPUT, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
    stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
    for name, stream in (("stdin", stdin), ("stdout", stdout), ("stderr", stderr)):
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    if "numpy.random" in sys.modules:
        sys.modules["numpy.random"].seed()  # the forked state would be the same in every program
    outcome: dict[str, str] = {"error": ""}
    try:
        value = _evaluate(program, names)
        if value is not None:
            outcome["value"] = str(value)[: output_bytes + 1]
        _wait_for_threads()
    except SystemExit as end:
        if end.code not in (None, 0):
            outcome["error"] = _error_text(end, memory_bytes)
    except BaseException as error:
        outcome["error"] = _error_text(error, memory_bytes)
    with contextlib.suppress(BaseException):
        stdout.flush()
    return outcome


def _evaluate(program: str, names: dict[str, Any]) -> object:
    """Run the statements; returns the value of the last one if it is an expression."""
    tree = ast.parse(program, "<program>")
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    body = compile(tree, "<program>", "exec")
    tail = compile(ast.Expression(last.value), "<program>", "eval") if isinstance(last, ast.Expr) else None
    exec(body, names)
    return eval(tail, names) if tail is not None else None


def _wait_for_threads() -> None:
    """Join threads as at the end of a Python process; the time limit applies here too."""
    threading = sys.modules["threading"]
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()


def _error_text(error: BaseException, memory_bytes: int) -> str:
    if isinstance(error, MemoryError):
        return f"the program needed more than {memory_bytes / 2**20:g} MiB of memory"
    try:
        text = str(error)
    except BaseException:
        text = "an error that cannot be shown"
    if isinstance(error, SyntaxError) and error.filename in ("<program>", None):
        return f"the program is not valid Python: {text[:200]}"
    text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return f"the program raised {text[:ERROR_CHARACTERS]}"


if __name__ == "__main__":
    serve()
