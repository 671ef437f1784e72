"""A bare subprocess: no sandbox at all. Only with `unsafe=True`, and every result says so.

The program has the rights of the user who started it: it reads and writes their files and uses their network.
It gets an empty environment, a folder of its own to start in, limits on memory, processor time and file size,
and its process group is killed at its time limit; none of that stops a program that tries to escape. For
trusted programs on machines where no sandbox works.

Leaves out any isolation, and systems other than POSIX.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from typing import Any

from viaticum.errors import SandboxError
from viaticum.strategies.sandbox.base import (
    CLOSED,
    LIMITS,
    Limits,
    ProgramResult,
    Sandbox,
    mentioned_packages,
)

_STARTER = """
import json, math, os, resource, sys
module_folder, report = sys.argv[1], int(sys.argv[2])
sys.path.insert(0, module_folder)
import worker_main
sys.path.remove(module_folder)
request = json.loads(sys.stdin.buffer.read())
os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
os.dup2(report, worker_main.REPORT)
import threading
worker_main.load(request["load"])
limits = [(resource.RLIMIT_CORE, 0), (resource.RLIMIT_CPU, math.ceil(request["seconds"]) + 3),
          (resource.RLIMIT_FSIZE, worker_main.SCRATCH_BYTES)]
if sys.platform == "linux":
    limits.append((resource.RLIMIT_AS, worker_main.mapped_bytes() + request["memory_bytes"]))
for limit, value in limits:
    resource.setrlimit(limit, (value, value))
outcome = worker_main.execute(request["program"], request["memory_bytes"], request["output_bytes"])
os.write(worker_main.REPORT, json.dumps(outcome).encode())
os._exit(0)
"""


class UnsafeSubprocess(Sandbox):
    """Programs as plain subprocesses of this Python. Raises `SandboxError` without `unsafe=True`."""

    backend = "subprocess (unsafe)"
    strength = "None: a bare subprocess with the rights of the user who runs this."

    def __init__(self, *, unsafe: bool = False) -> None:
        if not unsafe:
            raise SandboxError(
                "a bare subprocess is no sandbox: its programs can do whatever you can; say unsafe=True to "
                "use it"
            )
        if os.name != "posix":
            raise SandboxError(f"bare subprocesses need a POSIX system, this is {os.name}")
        self._closed = False

    def self_test(self) -> None:
        """Test that programs run and end; there is no isolation to test."""
        works = self.run("print(6 * 7)", Limits(seconds=10.0))
        if works.stdout.strip() != "42":
            raise SandboxError(f"{sys.executable} computes 6 * 7 wrong: {works.error or works.stdout!r}")

    def run(self, program: str, limits: Limits = LIMITS) -> ProgramResult:
        if self._closed:
            raise SandboxError(CLOSED)
        started = time.perf_counter()
        request = {"program": program, "load": mentioned_packages(program), **asdict(limits)}
        with tempfile.TemporaryDirectory(prefix="viaticum-", ignore_cleanup_errors=True) as folder:
            stdout, error = _run(json.dumps(request).encode(), limits, folder)
        return ProgramResult(stdout, error, self.backend, time.perf_counter() - started)

    def close(self) -> None:
        self._closed = True


def _run(request: bytes, limits: Limits, folder: str) -> tuple[str, str]:
    """Run the program; returns its output and the error."""
    seconds, output_bytes = limits.seconds, limits.output_bytes
    report, report_end = os.pipe()
    here = os.path.dirname(os.path.realpath(__file__))
    process = subprocess.Popen(
        [sys.executable, "-I", "-B", "-X", "utf8", "-c", _STARTER, here, str(report_end)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        bufsize=0,
        env={"PATH": os.defpath, "HOME": folder, "TMPDIR": folder, "OPENBLAS_NUM_THREADS": "1"},
        cwd=folder,
        pass_fds=(report_end,),
        start_new_session=True,
    )
    os.close(report_end)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(request)
        process.stdin.close()
        byte_limits = {process.stdout.fileno(): output_bytes, report: 2**16 + 6 * output_bytes}
        deadline = time.monotonic() + seconds + 1.0  # a second for Python to start
        received, timed_out = _read(byte_limits, deadline)
    finally:
        # The group id is that of the leader, which was not waited for yet, so it cannot have been reused.
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
        process.stdout.close()
        process.wait()
        os.close(report)
    output, outcome = received.values()
    stdout = output[:output_bytes].decode("utf-8", "ignore")
    if timed_out:
        return stdout, f"the program was stopped after {seconds:g} s"
    if len(output) > output_bytes:
        return stdout, f"the program printed more than {output_bytes} bytes"
    try:
        end: dict[str, Any] = json.loads(outcome)
        if not stdout.strip() and end.get("value"):
            stdout = f"{end['value']}\n"[:output_bytes]
        return stdout, str(end["error"])
    except (ValueError, KeyError, TypeError, AttributeError):
        return stdout, "the program ended its process before its end"


def _read(limits: dict[int, int], deadline: float) -> tuple[dict[int, bytes], bool]:
    """Read each descriptor to its end or its limit; also returns whether the deadline passed first."""
    read = dict.fromkeys(limits, b"")
    with selectors.DefaultSelector() as selector:
        for fd in limits:
            selector.register(fd, selectors.EVENT_READ)
        while selector.get_map():
            left = deadline - time.monotonic()
            if left <= 0:
                return read, True
            for key, _ in selector.select(left):
                piece = os.read(key.fd, 2**16)
                read[key.fd] += piece
                if len(read[key.fd]) > limits[key.fd]:
                    return read, False
                if not piece:
                    selector.unregister(key.fd)
    return read, False
