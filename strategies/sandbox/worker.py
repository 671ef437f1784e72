"""One bubblewrap worker: a bwrap process, the pipes to the script inside it, and a handle to kill all of it.

Leaves out the number of workers and the choice between them (`bubblewrap`), and the script (`worker_main`).
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from viaticum.errors import SandboxError
from viaticum.strategies.sandbox import worker_main
from viaticum.strategies.sandbox.base import Limits, mentioned_packages
from viaticum.strategies.sandbox.bwrap_command import INSTALL

START_SECONDS = 30.0
LOAD_SECONDS = 60.0  # for numpy and sympy, once per worker, on a slow disk
GRACE_SECONDS = 2.0  # from a program's time limit until its worker is killed
NOBODY = 65534  # the user that programs run as on this machine if root starts them


class WorkerLost(Exception):
    """A worker died or did not answer; the message says what that means for its program."""


class Worker:
    """One bwrap process and the pipes to the worker inside. Not thread-safe."""

    def __init__(self, command: list[str], handshake: dict[str, Any]) -> None:
        self._stderr_file = tempfile.TemporaryFile()  # noqa: SIM115  (bwrap's error messages)
        try:
            self._process, self._inner = _spawn(command, self._stderr_file.fileno())
        except OSError as error:
            self._stderr_file.close()
            raise SandboxError(f"bwrap does not start: {error}; {INSTALL}") from error
        try:
            self._send(handshake)
            self._receive(START_SECONDS, 2**16)
        except WorkerLost as error:
            self._stderr_file.seek(0)
            outcome = self._stderr_file.read(2000).decode("utf-8", "replace").strip().replace("\n", "; ")
            self.kill()
            raise SandboxError(
                f"bubblewrap does not work on this machine: {outcome or error}; {INSTALL}"
            ) from error

    def prepare(self, program: str) -> None:
        """Load the packages that the program mentions, outside its time limit. Raises `WorkerLost`."""
        self._send({"load": mentioned_packages(program)})
        self._receive(LOAD_SECONDS, 2**16)

    def run(self, program: str, limits: Limits) -> dict[str, Any]:
        """Run one program. Raises `WorkerLost`, after which the worker cannot be used any more."""
        self._send({"program": program, **asdict(limits)})
        late = f"the program was stopped after {limits.seconds:g} s"
        return self._receive(limits.seconds + GRACE_SECONDS, 2**16 + 12 * limits.output_bytes, late)

    def is_ready(self) -> bool:
        """Whether it is alive and owes no reply."""
        assert self._process.stdout is not None
        return self._process.poll() is None and not _readable(self._process.stdout.fileno(), 0.0)

    def signal(self) -> None:
        """Kill every process inside: killing the first process of the pid namespace ends all others."""
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
        self._stderr_file.close()

    def _send(self, message: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            worker_main.write_message(self._process.stdin.fileno(), message)
        except OSError as error:
            raise WorkerLost(f"the worker ended: {error}") from error

    def _receive(self, seconds: float, limit: int, late: str = "") -> dict[str, Any]:
        """The next message. Raises `WorkerLost` after `seconds`, past `limit` bytes, and at the end."""
        assert self._process.stdout is not None
        fd, deadline = self._process.stdout.fileno(), time.monotonic() + seconds
        data, size = b"", 4
        while len(data) < size:
            if not _readable(fd, deadline - time.monotonic()):
                raise WorkerLost(late or f"no answer within {seconds:g} s")
            piece = os.read(fd, min(2**16, size - len(data)))
            if not piece:
                raise WorkerLost("the program crashed its worker")
            data += piece
            if size == 4 and len(data) == 4:
                size += int.from_bytes(data, "big")
                if size > limit:
                    raise WorkerLost(f"the worker sent {size} bytes, more than {limit}")
        return cast("dict[str, Any]", json.loads(data[4:]))


def _spawn(command: list[str], outcome: int) -> tuple[subprocess.Popen[bytes], int | None]:
    """Start bwrap; also returns a pidfd of the first process inside, by which all of it can be killed."""
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
            stderr=outcome,
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
    """The process id that bwrap reports, or None if it ends without a report."""
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
    """Map root inside to root here, for the worker to set up the isolation, and `USER` to nobody."""
    for name in ("uid_map", "gid_map"):
        Path(f"/proc/{pid}/{name}").write_text(f"0 0 1\n{worker_main.USER} {NOBODY} 1\n")


def _readable(fd: int, seconds: float) -> bool:
    """Whether data or the end of the stream can be read within that time."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(max(0.0, seconds) * 1000))
