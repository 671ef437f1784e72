"""Files that survive a killed process: atomic writes, append-only journals, run locks, JSON lines, own files.

Every writer of the package goes through this module, so that a reader of a file sees the old content or the
new one, never half of it, and that a journal loses at most the line at hand. Errors of the system become
`InputError`s that name the file. Standard library alone, except `run_lock`, which needs filelock. Leaves out
what the files mean.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from viaticum.errors import DataError, InputError

SQLITE_FILES = ("-wal", "-shm", "-journal")
_log = logging.getLogger("viaticum")
encode_json = json.JSONEncoder(ensure_ascii=False).encode  # `json.dumps` makes an encoder at every call


# --- atomic writes --------------------------------------------------------------------------------


@contextmanager
def atomic_file(path: str | Path, *, advice: str = "") -> Iterator[Path]:
    """Give a scratch file to write; on success it is synced to the disk and renamed to `path`.

    Args:
        path: the file that is replaced, or made.
        advice: what to do about an error of writing; ends its message.

    A symbolic link stays one: the file that it names is replaced.

    Raises:
        InputError: the system refused to write, or `path` is a device, a pipe or a folder. The scratch file
            is removed, and `path` stays as it was.
    """
    path = Path(path)
    if path.is_symlink():
        path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        raise InputError(f"cannot write {path}: it is no regular file; give another path")
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield scratch
        sync(scratch)
        os.replace(scratch, path)
    except OSError as error:
        raise _cannot("write", path, error, advice) from None
    finally:
        scratch.unlink(missing_ok=True)


def check_is_no_input(out: str | Path, inputs: Iterable[str | Path]) -> None:
    """Raise `InputError` where results would take the place of a file that they are made of."""
    for each in inputs:
        if os.path.exists(out) and os.path.exists(each) and os.path.samefile(out, each):
            raise InputError(f"{out} is the file that is read; name another one for the results")


def atomic_write(path: str | Path, content: str | bytes) -> None:
    """Write a whole file through `atomic_file`; text as UTF-8, its line ends unchanged."""
    with atomic_file(path) as scratch:
        scratch.write_bytes(content.encode() if isinstance(content, str) else content)


def sync(path: Path) -> None:
    """Put the bytes of a file, or the entries of a folder, on the disk (fsync)."""
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open a folder
    handle = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# --- files of their owner alone ---------------------------------------------------------------------


def private_file(path: str | Path) -> Path:
    """Make an empty file that its owner alone can read, or take others' rights to the one that is there.

    For files that hold prompts and answers, whatever the umask: 0600, those of SQLite beside it included. A
    file of another user stays as it is.

    Raises:
        OSError: the file cannot be made, or it is a folder or a device.
    """
    path = Path(path)
    if path.exists() and not path.is_file():  # a device that others use, or their folder
        code = errno.EISDIR if path.is_dir() else errno.EINVAL
        raise OSError(code, os.strerror(code), str(path))
    with suppress(FileExistsError):  # which is not opened: closing it would drop the locks of SQLite (POSIX)
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    for each in (path, *(path.with_name(path.name + end) for end in SQLITE_FILES)):
        _take_rights(each)
    return path


def private_database(path: Path) -> sqlite3.Connection:
    """Open an SQLite file that its owner alone may read, made with its folders if missing; for any thread.

    Statements are their own transactions; another writer is waited for up to a minute.

    Raises:
        OSError, sqlite3.Error: the file cannot be used.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    private_file(path)
    db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
    db.execute("PRAGMA busy_timeout = 60000")
    db.execute("PRAGMA journal_mode = WAL")
    return db


def private_folder(path: str | Path) -> Path:
    """As `private_file`, for a folder: 0700. Its parent must exist.

    Raises:
        OSError: the folder cannot be made.
    """
    path = Path(path)
    path.mkdir(mode=0o700, exist_ok=True)
    _take_rights(path)
    return path


def _take_rights(path: Path) -> None:
    if os.name == "nt":
        return  # the rights of the user's folder hold
    with suppress(OSError):
        found = path.stat()
        if found.st_uid == os.geteuid() and found.st_mode & 0o077:
            path.chmod(found.st_mode & 0o700)
            _log.warning("%s could be read by other users; now it is its owner's alone", path)


# --- JSON lines -----------------------------------------------------------------------------------


def write_jsonl(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object a line, through `atomic_file`."""
    with atomic_file(path) as scratch, scratch.open("w", encoding="utf-8") as file:
        file.writelines(encode_json(row) + "\n" for row in rows)


def read_jsonl(path: str | Path) -> Iterable[tuple[int, dict[str, Any]]]:
    """Read (line number from 1, object) for every line that is not blank. Lines end at newlines alone.

    Raises:
        InputError: the file cannot be read.
        DataError: a line is no JSON object; names the line.
    """
    try:
        with Path(path).open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, _json_object(line, f"{path}, line {number}")
    except OSError as error:
        raise _cannot("read", path, error) from None


def _json_object(line: bytes, location: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{location}: not valid JSON ({error}); correct or remove the line") from None
    if not isinstance(row, dict):
        raise DataError(f"{location}: not a JSON object; write one object a line")
    return row


# --- journals -------------------------------------------------------------------------------------


def whole_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Read (line number from 1, line with its newline) of a file that may be written to; changes nothing.

    Raises:
        InputError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    break
                yield number, line
    except OSError as error:
        raise _cannot("read", path, error) from None


class JournalFile:
    """An append-only file of JSON lines, taken up again after a kill.

    A kill in the middle of a write leaves a line without its newline: `lines` cuts it off. The file is made
    when the first line is written.

    Args:
        path: the file; its folder exists.
        flush_seconds: longest time that a line stays in this process before it is handed to the system; 0 for
            none.
        sync_seconds: longest time before it is on the disk (fsync); 0 syncs every line.
        advice: what to do about an error of writing; ends its message.
    """

    def __init__(
        self, path: Path, *, flush_seconds: float = 0.0, sync_seconds: float = 0.0, advice: str = ""
    ) -> None:
        self.path = path
        self._advice = advice
        self._flush_seconds, self._sync_seconds = flush_seconds, sync_seconds
        self._flushed = self._synced = time.monotonic()
        self._file: IO[bytes] | None = None

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """Read (line number from 1, line with its newline); cuts off an unfinished last line.

        Raises:
            InputError: the file cannot be read.
        """
        try:
            yield from self._lines()
        except OSError as error:
            raise _cannot("read", self.path, error) from None

    def append(self, record: Mapping[str, Any]) -> None:
        """Add one line.

        Raises:
            InputError: the system refused to write, such as for a full disk.
        """
        self.append_line(encode_json(record) + "\n")

    def append_line(self, line: str) -> None:
        """Add a line that is encoded already and ends with its newline. Raises as `append`."""
        try:
            file = self._opened()
            file.write(line.encode())
            now = time.monotonic()
            if now - self._flushed >= self._flush_seconds:
                self._flushed = now
                file.flush()
            if now - self._synced >= self._sync_seconds:
                self._synced = now
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise _cannot("write", self.path, error, self._advice) from None

    def sync(self) -> None:
        """Put all lines on the disk. Raises as `append`."""
        try:
            file = self._opened()
            file.flush()
            os.fsync(file.fileno())
        except OSError as error:
            raise _cannot("write", self.path, error, self._advice) from None

    def close(self) -> None:
        """Close the file; lines that cannot be written any more are lost."""
        try:
            if self._file is not None:
                self._file.close()
        except OSError:
            return

    def _opened(self) -> IO[bytes]:
        if self._file is None:
            self._file = self.path.open("ab")
        return self._file

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        if not self.path.exists():
            return
        whole = 0  # bytes of the lines that end with a newline
        for number, line in whole_lines(self.path):
            whole += len(line)
            yield number, line
        if whole < self.path.stat().st_size:
            os.truncate(self.path, whole)


# --- run locks ------------------------------------------------------------------------------------


@contextmanager
def run_lock(
    path: Path, *, busy: str | None = None, waiting: Callable[[], object] = lambda: None
) -> Iterator[None]:
    """Hold the lock file `path`, for one run at a time. The system frees the lock of a killed process.

    Args:
        path: the lock file; it stays when the lock is released.
        busy: message of the error where another process holds the lock; None waits for it.
        waiting: called once before a wait.

    Raises:
        InputError: another process holds the lock, and `busy` was given; or the file cannot be made.
    """
    from filelock import FileLock, Timeout  # not on a bare CUDA image, where the rest of this module is used

    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if busy is not None:
            raise InputError(busy) from None
        waiting()
        lock.acquire()
    except OSError as error:
        raise _cannot("lock", path, error) from None
    try:
        yield
    finally:
        lock.release()


def _cannot(verb: str, path: str | Path, error: OSError, advice: str = "") -> InputError:
    return InputError(f"cannot {verb} {path}: {error.strerror or error}{advice}")
