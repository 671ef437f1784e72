"""A real PgBouncer for tests: an installed one, or Debian's package unpacked into the user's cache.

`python tests/support/pgbouncer.py` fetches it where none is found, with apt-get and dpkg; nothing is
installed and no service is started. In CI a missing PgBouncer is an error.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
from patience import patiently
from platformdirs import user_cache_path
from ports import free_port
from psycopg.conninfo import conninfo_to_dict

LIBRARIES = ("libc-ares", "libevent-2")  # those that a small Debian has not
NOBODY = 65534


def folder() -> Path:
    return user_cache_path("viaticum-tests") / "pgbouncer"


def find() -> Path | None:
    """The program: what VIATICUM_PGBOUNCER names, one on the PATH, or the one that was fetched."""
    path = f"{os.environ.get('PATH', '')}{os.pathsep}/usr/sbin"
    named = os.environ.get("VIATICUM_PGBOUNCER") or shutil.which("pgbouncer", path=path)
    if named is not None:
        return Path(named)
    fetched = folder() / "usr" / "sbin" / "pgbouncer"
    return fetched if fetched.is_file() else None


def fetch() -> Path:
    """Raises `RuntimeError` where this is no Debian, or its packages cannot be reached."""
    if shutil.which("apt-get") is None or shutil.which("dpkg") is None:
        raise RuntimeError("needs apt-get and dpkg")
    target = folder()
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(dir=target.parent) as name:
            work = Path(name)
            apt = _private_apt(work)
            _run(["apt-get", *apt, "update"])
            depends = _run(["apt-cache", *apt, "depends", "pgbouncer"]).stdout.decode()
            needed = [word for word in depends.split() if word.startswith(LIBRARIES)]
            _run(["apt-get", *apt, "download", "pgbouncer", *needed], work)
            for package in work.glob("*.deb"):
                _run(["dpkg", "-x", str(package), str(work / "made")])
            shutil.rmtree(target, ignore_errors=True)
            (work / "made").rename(target)
    except subprocess.CalledProcessError as error:
        raise RuntimeError(f"{error}: {error.stderr.decode(errors='replace')[-500:]}") from error
    except OSError as error:
        raise RuntimeError(str(error)) from error
    found = find()
    assert found is not None
    return found


def _private_apt(work: Path) -> list[str]:
    """Options with which apt, run by any user, keeps its lists in this folder and not in the machine's."""
    folders = {"Dir::State": work / "state", "Dir::Cache": work / "cache"}
    for each in (work / "state" / "lists" / "partial", work / "cache" / "archives" / "partial"):
        each.mkdir(parents=True)
    settings = {
        **{name: str(path) for name, path in folders.items()},
        "Dir::State::status": "/var/lib/dpkg/status",
        "APT::Sandbox::User": "root",  # root reads the folder, which is its own
        "Acquire::Retries": "3",
    }
    return ["-qq", *(part for name, value in settings.items() for part in ("-o", f"{name}={value}"))]


def _run(command: list[str], folder: Path | None = None) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(command, cwd=folder, check=True, capture_output=True)


@contextmanager
def running_pool(server: str, *, mode: str = "transaction", **settings: object) -> Iterator[str]:
    """Start a pool in front of a server; yields the address of the same database behind it.

    Args:
        server: address of the database.
        mode: `pool_mode`.
        settings: further ones of pgbouncer.ini.
    """
    program = find()
    assert program is not None, "python tests/support/pgbouncer.py fetches PgBouncer"
    parts = conninfo_to_dict(server)
    work = Path(tempfile.mkdtemp(prefix="viaticum-pgbouncer-"))
    user = NOBODY if os.getuid() == 0 else None  # PgBouncer refuses to run as root
    try:
        if program.is_relative_to(folder()):  # which that user may not read
            shutil.copytree(folder(), work / "program", symlinks=True)
            program = work / "program" / program.relative_to(folder())
        port = _write_settings(work / "pgbouncer.ini", parts, {"pool_mode": mode, **settings})
        if user is not None:
            for path in (work, *work.rglob("*")):
                os.chown(path, user, user, follow_symlinks=False)
        pool = _start(program, work, user)
        try:
            address = f"postgresql://{parts['user']}@127.0.0.1:{port}/{parts['dbname']}"
            _await(pool, address, work / "log")
            yield address
        finally:
            pool.terminate()
            try:
                pool.wait(20)
            except subprocess.TimeoutExpired:
                pool.kill()
                pool.wait()
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _write_settings(file: Path, server: dict[str, Any], settings: dict[str, object]) -> int:
    """Returns the port."""
    port = free_port()
    options = {
        "listen_addr": "127.0.0.1",
        "listen_port": port,
        "unix_socket_dir": "",
        "auth_type": "any",
        "default_pool_size": 4,
        "max_client_conn": 200,
        **settings,
    }
    database = f"* = host={server['host']} port={server['port']} user={server['user']}"
    lines = [
        "[databases]",
        database,
        "[pgbouncer]",
        *(f"{name} = {value}" for name, value in options.items()),
    ]
    file.write_text("\n".join(lines) + "\n")
    return port


def _start(program: Path, work: Path, user: int | None) -> subprocess.Popen[bytes]:
    libraries = {str(path.parent) for path in work.rglob("libcares.so.2")}
    paths = ":".join([*libraries, os.environ.get("LD_LIBRARY_PATH", "")])
    with (work / "log").open("wb") as log:
        return subprocess.Popen(
            [program, work / "pgbouncer.ini"],
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "LD_LIBRARY_PATH": paths},
            user=user,
            group=user,
            cwd=work,
        )


def _await(pool: subprocess.Popen[bytes], address: str, log: Path) -> None:
    deadline = time.monotonic() + 120
    while pool.poll() is None and time.monotonic() < deadline:
        try:
            psycopg.connect(address).close()
            return
        except psycopg.OperationalError:
            time.sleep(0.05)
    raise RuntimeError(f"PgBouncer does not start: {log.read_text()[-2000:]}")


if __name__ == "__main__":
    try:
        print(find() or patiently(fetch))
    except RuntimeError as error:
        sys.stderr.write(f"no PgBouncer for the tests of the ledger ({error}); set VIATICUM_PGBOUNCER\n")
        sys.exit(1 if os.environ.get("CI") else 0)
