"""Files and batches of the server: `batches.db` and the folder `files` beside the ledger.

The database has what files and batches are, the folder has their contents, one file each, named by its id.
Both belong to a key (`Caller.owner`); others do not find them. What is too old is deleted, and a key keeps so
many bytes at most. Leaves out HTTP, and how a batch is answered (`batch_run`).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sqlite3
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, cast

from viaticum.agents.openai_api.batches import UNFINISHED, BatchObject
from viaticum.agents.openai_api.errors import APIError
from viaticum.agents.openai_api.files import FileObject, Order, Purpose
from viaticum.files import private_folder, sync
from viaticum.private_store import BYTES_A_KEY, DAYS, SECONDS_A_DAY, PrivateStore, checked_limits

MAX_OPEN = 100  # unfinished batches of a key
_UPLOADING = ".upload-"
_TABLES = """
CREATE TABLE IF NOT EXISTS files (
  number INTEGER PRIMARY KEY AUTOINCREMENT,
  id TEXT NOT NULL UNIQUE,
  owner TEXT NOT NULL,
  created INTEGER NOT NULL,
  expires INTEGER NOT NULL,
  bytes INTEGER NOT NULL,
  filename TEXT NOT NULL,
  purpose TEXT NOT NULL
) STRICT;
CREATE INDEX IF NOT EXISTS files_by_owner ON files (owner, number);
CREATE TABLE IF NOT EXISTS batches (
  number INTEGER PRIMARY KEY AUTOINCREMENT,
  id TEXT NOT NULL UNIQUE,
  owner TEXT NOT NULL,
  caller TEXT NOT NULL,
  scope TEXT NOT NULL,
  created INTEGER NOT NULL,
  status TEXT NOT NULL,
  output_seconds INTEGER,
  body TEXT NOT NULL
) STRICT;
CREATE INDEX IF NOT EXISTS batches_by_owner ON batches (owner, number);
CREATE INDEX IF NOT EXISTS batches_by_status ON batches (status);
"""
_UNFINISHED = f"({', '.join(repr(each) for each in UNFINISHED)})"


@dataclass(frozen=True, slots=True)
class StoredBatch:
    """A batch and whose it is.

    Args:
        caller: the name of the caller that made it.
        scope: the budget that pays.
        output_seconds: for which its output is kept; None for as long as other files.
    """

    batch: BatchObject
    owner: str
    caller: str
    scope: str
    output_seconds: int | None


class BatchStore(PrivateStore):
    """Files and batches. Thread-safe; several servers of one folder may use it at once.

    Args:
        folder: of the server.
        days: for which files and batches are kept.
        bytes_a_key: of files that one key keeps at most. Output is written beyond it, as it is paid for; no
            file is taken until there is room again.

    Raises:
        InputError: a limit is out of range.
        LedgerError: the files cannot be used.
    """

    def __init__(self, folder: str | Path, *, days: float = DAYS, bytes_a_key: int = BYTES_A_KEY) -> None:
        checked_limits("files", days, bytes_a_key)
        self.folder, self._room_lock = Path(folder) / "files", threading.Lock()
        self.bytes_a_key, self._seconds = bytes_a_key, int(days * SECONDS_A_DAY)
        super().__init__(Path(folder) / "batches.db", f"{folder} for files and batches")
        self.delete_expired()

    def _prepare(self) -> None:
        self._db.row_factory = sqlite3.Row
        self._db.executescript(_TABLES)
        private_folder(self.folder)

    # --- files --------------------------------------------------------------------------------------------

    def content_path(self, id: str) -> Path:
        """Where the content of a file is."""
        return self.folder / id

    def check_room(self, owner: str, size: int) -> None:
        """Raise `APIError` with status 413 where a key keeps too much to keep so many bytes more.

        A batch that has not ended counts as the size of its input, for the output to come.
        """
        used = self._row("SELECT coalesce(sum(bytes), 0) AS bytes FROM files WHERE owner = ?", owner)
        coming = self._row(
            "SELECT coalesce(sum(files.bytes), 0) AS bytes FROM batches JOIN files"
            " ON files.id = json_extract(batches.body, '$.input_file_id')"
            f" WHERE batches.owner = ? AND batches.status IN {_UNFINISHED}",
            owner,
        )
        left = self.bytes_a_key - sum(each["bytes"] for each in (used, coming) if each)
        if size > left:
            message = f"the files of this key may have {self.bytes_a_key} bytes, {max(0, left)} are left"
            raise APIError(413, f"{message}; delete some", code="storage_full")

    def add_file(
        self, owner: str, filename: str, purpose: Purpose, content: IO[bytes], seconds: int | None = None
    ) -> FileObject:
        """Keep a file.

        Args:
            content: open at its beginning.
            seconds: for which it is kept; None for as long as others.

        Raises:
            APIError: with status 413: the key keeps too much.
        """
        new_id = f"file-{uuid.uuid4().hex}"
        scratch = self.folder / f"{_UPLOADING}{new_id}"
        with self._as_ledger_error():
            try:
                descriptor = os.open(scratch, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
                with os.fdopen(descriptor, "wb") as file:
                    shutil.copyfileobj(content, file, 1 << 20)
                    size = file.tell()
                sync(scratch)
                with self._room_lock:
                    self.check_room(owner, size)
                    os.replace(scratch, self.content_path(new_id))
                    return self._register(new_id, owner, filename, purpose, size, seconds)
            finally:
                scratch.unlink(missing_ok=True)

    def register_output(self, id: str, owner: str, filename: str, seconds: int | None) -> FileObject:
        """Keep a file whose content has been written under its id; without effect the second time."""
        return self._register(
            id, owner, filename, "batch_output", self.content_path(id).stat().st_size, seconds
        )

    def _register(
        self, id: str, owner: str, filename: str, purpose: Purpose, size: int, seconds: int | None
    ) -> FileObject:
        now = int(time.time())
        row = (id, owner, now, now + min(seconds or self._seconds, self._seconds), size, filename, purpose)
        self._write(
            "INSERT OR IGNORE INTO files (id, owner, created, expires, bytes, filename, purpose)"
            " VALUES (?, ?, ?, ?, ?, ?, ?)",
            *row,
        )
        found = self.file(id, owner)
        assert found is not None
        return found

    def file(self, id: str, owner: str) -> FileObject | None:
        """A file; None for one that is not kept, or belongs to another key."""
        row = self._row("SELECT * FROM files WHERE id = ? AND owner = ?", id, owner)
        return None if row is None or row["expires"] <= time.time() else _file_object(row)

    def files(
        self, owner: str, *, purpose: str | None, after: str | None, limit: int, order: Order
    ) -> tuple[list[FileObject], bool]:
        """A page of files, and whether there are more. Raises `APIError` with status 400 for `after`."""
        rows, more = self._page(
            "files", owner, after, limit, order, "AND expires > ? AND (? IS NULL OR purpose = ?)",
            (int(time.time()), purpose, purpose),
        )  # fmt: skip
        return [_file_object(row) for row in rows], more

    def delete_file(self, id: str, owner: str) -> bool:
        """Delete a file; returns whether there was one.

        Raises:
            APIError: with status 400: a batch is being made from it.
        """
        row = self._row(
            f"SELECT id FROM batches WHERE status IN {_UNFINISHED} AND owner = ?"
            " AND json_extract(body, '$.input_file_id') = ?",
            owner,
            id,
        )
        if row is not None:
            raise APIError(400, f"the batch {row['id']} needs this file; cancel it first", code="file_in_use")
        if not self._write("DELETE FROM files WHERE id = ? AND owner = ?", id, owner):
            return False
        self.content_path(id).unlink(missing_ok=True)
        return True

    def delete_expired(self) -> None:
        """Delete files and batches that are too old, and what a kill left of uploads."""
        now = int(time.time())
        with self._in_use():
            old = self._db.execute(
                "SELECT id FROM files WHERE expires <= ? AND id NOT IN (SELECT"
                f" json_extract(body, '$.input_file_id') FROM batches WHERE status IN {_UNFINISHED})",
                [now],
            ).fetchall()
            self._db.executemany("DELETE FROM files WHERE id = ?", [[row["id"]] for row in old])
            self._db.execute(
                f"DELETE FROM batches WHERE created < ? AND status NOT IN {_UNFINISHED}",
                [now - self._seconds],
            )
            for row in old:
                self.content_path(row["id"]).unlink(missing_ok=True)
            for left in self.folder.glob(f"{_UPLOADING}*"):
                with suppress(FileNotFoundError):
                    if left.stat().st_mtime < now - SECONDS_A_DAY:
                        left.unlink()

    # --- batches ------------------------------------------------------------------------------------------

    def add_batch(self, stored: StoredBatch, size: int = 0) -> None:
        """Keep a new batch.

        Args:
            size: of its input, in bytes, for which there has to be room once more.

        Raises:
            APIError: with status 400: its key has too many open ones; with 413: it keeps too much.
        """
        with self._room_lock:
            self.check_room(stored.owner, size)
            self._add_batch(stored)

    def _add_batch(self, stored: StoredBatch) -> None:
        batch = stored.batch
        row = self._row(
            f"SELECT count(*) AS open FROM batches WHERE owner = ? AND status IN {_UNFINISHED}", stored.owner
        )
        if row is not None and row["open"] >= MAX_OPEN:
            message = f"{MAX_OPEN} batches of this key have not ended; wait for one, or cancel it"
            raise APIError(400, message, code="too_many_batches")
        self._write(
            "INSERT INTO batches (id, owner, caller, scope, created, status, output_seconds, body)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            batch["id"],
            stored.owner,
            stored.caller,
            stored.scope,
            batch["created_at"],
            batch["status"],
            stored.output_seconds,
            json.dumps(batch),
        )

    def batch(self, id: str, owner: str) -> BatchObject | None:
        """A batch; None for one that is not kept, or belongs to another key."""
        row = self._row("SELECT body FROM batches WHERE id = ? AND owner = ?", id, owner)
        return None if row is None else _batch_object(row)

    def batches(self, owner: str, *, after: str | None, limit: int) -> tuple[list[BatchObject], bool]:
        """A page of batches, the newest first, and whether there are more. Raises as `files`."""
        rows, more = self._page("batches", owner, after, limit, "desc", "", ())
        return [_batch_object(row) for row in rows], more

    def unfinished(self) -> list[StoredBatch]:
        """The batches of all keys that have not ended, the oldest first."""
        with self._in_use() as db:
            rows = db.execute(
                f"SELECT * FROM batches WHERE status IN {_UNFINISHED} ORDER BY number"
            ).fetchall()
        return [
            StoredBatch(_batch_object(row), row["owner"], row["caller"], row["scope"], row["output_seconds"])
            for row in rows
        ]

    def update(
        self, id: str, changes: Mapping[str, Any], *, unless: Sequence[str] = ()
    ) -> BatchObject | None:
        """Change fields of a batch, unless its status is one of those; returns it as it is then."""
        with self._in_use() as db, self._transaction():
            row = db.execute("SELECT body FROM batches WHERE id = ?", [id]).fetchone()
            if row is None:
                return None
            batch = _batch_object(row)
            changed = cast(BatchObject, {**batch, **changes})
            if batch["status"] not in unless and changed != batch:
                batch = changed
                db.execute(
                    "UPDATE batches SET status = ?, body = ? WHERE id = ?",
                    [batch["status"], json.dumps(batch), id],
                )
            return batch

    # --- both ---------------------------------------------------------------------------------------------

    def _page(
        self,
        table: Literal["files", "batches"],
        owner: str,
        after: str | None,
        limit: int,
        order: Order,
        condition: str,
        values: tuple[Any, ...],
    ) -> tuple[list[sqlite3.Row], bool]:
        number = None
        if after is not None:
            found = self._row(f"SELECT number FROM {table} WHERE id = ? AND owner = ?", after, owner)
            if found is None:
                raise APIError(400, f"after: nothing has the id {after!r}", param="after")
            number = found["number"]
        sign, direction = ("<", "DESC") if order == "desc" else (">", "ASC")
        with self._in_use() as db:
            rows = db.execute(
                f"SELECT * FROM {table} WHERE owner = ? AND (? IS NULL OR number {sign} ?) {condition}"
                f" ORDER BY number {direction} LIMIT ?",
                [owner, number, number, *values, limit + 1],
            ).fetchall()
        return rows[:limit], len(rows) > limit


def output_id(batch: str, what: Literal["output", "error"]) -> str:
    """The id of the output or the error file of a batch: the same whenever it is asked for."""
    return f"file-{hashlib.sha256(f'{batch} {what}'.encode()).hexdigest()[:32]}"


def rows_of(path: Path, most: int = sys.maxsize - 1) -> Iterator[bytes]:
    """The lines of a file. One that is longer than `most` bytes is cut after one byte more.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        while row := file.readline(most + 1):
            yield row
            while not row.endswith(b"\n") and len(row) > most:
                if not (rest := file.readline(1 << 16)) or rest.endswith(b"\n"):
                    break


def _batch_object(row: sqlite3.Row) -> BatchObject:
    return cast(BatchObject, json.loads(row["body"]))


def _file_object(row: sqlite3.Row) -> FileObject:
    return {
        "id": row["id"],
        "object": "file",
        "bytes": row["bytes"],
        "created_at": row["created"],
        "expires_at": row["expires"],
        "filename": row["filename"],
        "purpose": row["purpose"],
        "status": "processed",
        "status_details": None,
    }
