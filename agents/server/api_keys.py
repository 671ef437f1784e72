"""The keys that open the server's door, in `keys.db` beside the ledger. Each belongs to one budget scope.

Only a key's SHA-256 is kept. A key is 256 random bits: nobody can try them all, so a slow hash and a salt, which protect
what people think up themselves, would only slow down each request. Whoever reads the file gets no key out of it.
Knows nothing of HTTP, and of the ledger only the names of scopes.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
import sqlite3
import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self

from sqlite_utils import Database

from viaticum.errors import InputError, LedgerError, UnknownName

APPLICATION_ID = 0x5649414B  # "VIAK"
PREFIX = "vk-"  # so that scanners for leaked secrets, and people, know one when they see it
SHOWN = 4  # characters of a key's random part that stay readable in lists


@dataclass(frozen=True, slots=True)
class Key:
    """A key as it is kept: never the key itself.

    scope: the budget that pays, None for the server's own. models: the names that may be asked for, all where empty.
    per_minute: requests, None for the server's rate.
    """

    name: str
    shown: str
    created: str
    scope: str | None = None
    models: tuple[str, ...] = ()
    per_minute: int | None = None
    revoked: str | None = None

    def allows(self, model: str) -> bool:
        return not self.models or model in self.models


def keys_by_name(db: Database) -> None:
    """Version 1. hash: hex SHA-256 of the key; models: a JSON list."""
    db.execute(
        """
        CREATE TABLE keys (
          name TEXT PRIMARY KEY,
          hash TEXT NOT NULL UNIQUE CHECK (length(hash) = 64),
          shown TEXT NOT NULL,
          scope TEXT,
          models TEXT NOT NULL,
          per_minute INTEGER CHECK (per_minute > 0),
          created TEXT NOT NULL,
          revoked TEXT
        ) STRICT
        """
    )


MIGRATIONS: tuple[Callable[[Database], None], ...] = (keys_by_name,)
VERSION = len(MIGRATIONS)


class Keys:
    """The keys in one SQLite file, made where it is missing. May be shared by threads.

    Raises `LedgerError` where the file cannot be used.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lock = threading.Lock()
        self._seen = -1
        self._known: list[tuple[str, Key]] = []
        with self._in_plain_words():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._db = Database(sqlite3.connect(self.path, check_same_thread=False, isolation_level=None))
            self._db.execute("PRAGMA busy_timeout = 60000")
            self._db.execute("PRAGMA journal_mode = WAL")
            self._migrate()
            self.path.chmod(0o600)

    def close(self) -> None:
        self._db.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def create(
        self,
        name: str,
        *,
        scope: str | None = None,
        models: Iterable[str] = (),
        per_minute: int | None = None,
    ) -> tuple[str, Key]:
        """A new key: what its holder is given, once, and what is kept. Raises `InputError` for a name that is taken."""
        if not name.strip() or not name.isprintable():
            raise InputError(f"not a name of a key: {name!r}; use printable characters, at least one")
        if per_minute is not None and per_minute < 1:
            raise InputError(f"a key's rate is 1 request a minute or more, got {per_minute}")
        random = secrets.token_urlsafe(32)
        token = PREFIX + random
        now = datetime.now(UTC).isoformat(timespec="seconds")
        key = Key(name, f"{PREFIX}{random[:SHOWN]}...", now, scope, tuple(models), per_minute)
        with self._lock, self._in_plain_words():
            try:
                self._db.execute(
                    "INSERT INTO keys (name, hash, shown, scope, models, per_minute, created)"
                    " VALUES (?, ?, ?, ?, ?, ?, ?)",
                    [name, _hash(token), key.shown, scope, json.dumps(key.models), per_minute, now],
                )
            except sqlite3.IntegrityError:
                raise InputError(f"there is a key {name!r} already; take another name") from None
            self._seen = -1
        return token, key

    def revoke(self, name: str) -> Key:
        """End a key, at once and for good. Raises `UnknownName`."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        with self._lock, self._in_plain_words():
            self._db.execute("UPDATE keys SET revoked = coalesce(revoked, ?) WHERE name = ?", [now, name])
            self._seen = -1
        keys = {key.name: key for key in self.all()}
        if name not in keys:
            raise UnknownName("key", name, keys)
        return keys[name]

    def all(self) -> list[Key]:
        """Every key, revoked ones too, oldest first."""
        with self._lock:
            return [key for _, key in self._rows()]

    def find(self, token: str, *, scopes: Collection[str] | None = None) -> Key | None:
        """The key that this is, unless it was revoked, or belongs to none of these scopes.

        The same work whatever the token is: it is hashed, and compared with every key, each time to the end.
        """
        wanted = _hash(token)
        found = None
        with self._lock:
            rows = self._rows()
        for digest, key in rows:
            same = hmac.compare_digest(digest, wanted)
            usable = key.revoked is None and (scopes is None or key.scope is None or key.scope in scopes)
            if same & usable:
                found = key
        return found

    def _rows(self) -> list[tuple[str, Key]]:
        """Hash and key of every row; read again only where another connection has written."""
        with self._in_plain_words():
            version = self._db.execute("PRAGMA data_version").fetchone()[0]
            if version != self._seen:
                self._known = [
                    (
                        row["hash"],
                        Key(
                            row["name"],
                            row["shown"],
                            row["created"],
                            row["scope"],
                            tuple(json.loads(row["models"])),
                            row["per_minute"],
                            row["revoked"],
                        ),
                    )
                    for row in self._db.query("SELECT * FROM keys ORDER BY created, rowid")
                ]
                self._seen = version
        return self._known

    def _migrate(self) -> None:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            version = self._db.execute("PRAGMA user_version").fetchone()[0]
            mark = self._db.execute("PRAGMA application_id").fetchone()[0]
            tables = self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
            if tables and mark != APPLICATION_ID:
                raise LedgerError(f"{self.path} holds no keys of viaticum; give another folder")
            if version > VERSION:
                raise LedgerError(f"{self.path} is newer than this version of viaticum; upgrade viaticum")
            self._db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            for step in MIGRATIONS[version:]:
                step(self._db)
            self._db.execute(f"PRAGMA user_version = {VERSION}")
            self._db.execute("COMMIT")
        except BaseException:
            self._db.execute("ROLLBACK")
            raise

    @contextmanager
    def _in_plain_words(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise LedgerError(f"cannot use {self.path} for keys: {error}") from error


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode(errors="surrogateescape")).hexdigest()
