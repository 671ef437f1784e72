"""API keys of the server, in `keys.db` beside the ledger. Each belongs to one budget scope.

Only a key's SHA-256 is stored. A key is 256 random bits, too many to try, so a slow hash and a salt, which
protect passwords that people choose, would only slow down each request. Nobody who reads the file learns a
key. Leaves out HTTP, and the ledger but for the names of scopes.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
import sqlite3
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from viaticum.errors import InputError, LedgerError, UnknownName
from viaticum.private_store import PrivateStore
from viaticum.residency import Only, checked_only

APPLICATION_ID = 0x5649414B  # "VIAK"
PREFIX = "vk-"  # recognised by people and by scanners for leaked secrets
SHOWN = 4  # characters of a key's random part that lists show


@dataclass(frozen=True, slots=True)
class ApiKey:
    """What is stored of a key, besides its hash.

    Args:
        shown: the start of the key, for lists.
        created: time in UTC, ISO 8601.
        scope: the budget that pays; None for the server's own.
        models: names that may be requested; all where empty.
        per_minute: requests; None for the server's rate.
        revoked: time in UTC, ISO 8601; None while it is valid.
        metrics: it may read the metrics of the whole server; others those of their own budget.
        only: labels of models, one of which a model has to have to be used; all models where empty.
        team: to whom its spending is charged on; a tag of its calls, as its name is.
    """

    name: str
    shown: str
    created: str
    scope: str | None = None
    models: tuple[str, ...] = ()
    per_minute: int | None = None
    revoked: str | None = None
    metrics: bool = False
    only: tuple[str, ...] = ()
    team: str | None = None


def create_keys_table(db: sqlite3.Connection) -> None:
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


def add_metrics(db: sqlite3.Connection) -> None:
    """Version 2. metrics: 1 for a key that reads the metrics of the whole server."""
    db.execute("ALTER TABLE keys ADD COLUMN metrics INTEGER NOT NULL DEFAULT 0 CHECK (metrics IN (0, 1))")


def add_only(db: sqlite3.Connection) -> None:
    """Version 3. only_labels: a JSON list of labels; empty for no restriction."""
    db.execute("ALTER TABLE keys ADD COLUMN only_labels TEXT NOT NULL DEFAULT '[]'")


def add_team(db: sqlite3.Connection) -> None:
    """Version 4. team: a tag of the key's calls."""
    db.execute("ALTER TABLE keys ADD COLUMN team TEXT")


MIGRATIONS: tuple[Callable[[sqlite3.Connection], None], ...] = (
    create_keys_table,
    add_metrics,
    add_only,
    add_team,
)
VERSION = len(MIGRATIONS)


class ApiKeyStore(PrivateStore):
    """The keys in one SQLite file, created if missing. Thread-safe.

    Raises:
        LedgerError: the file cannot be used.
    """

    def __init__(self, path: str | Path) -> None:
        self._data_version = -1
        self._cached_rows: list[tuple[str, ApiKey]] = []
        super().__init__(Path(path), f"{path} for keys")

    def _prepare(self) -> None:
        self._db.row_factory = sqlite3.Row
        with self._transaction():
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

    def create(
        self,
        name: str,
        *,
        scope: str | None = None,
        models: Iterable[str] = (),
        per_minute: int | None = None,
        metrics: bool = False,
        only: Only | None = None,
        team: str | None = None,
    ) -> tuple[str, ApiKey]:
        """Create a key.

        Returns:
            The key itself, which is not stored, and what is.

        Raises:
            InputError: the name is taken or not printable, as is the team, the rate is below 1, or a label is
                none.
        """
        if not name.strip() or not name.isprintable():
            raise InputError(f"not a name of a key: {name!r}; use printable characters, at least one")
        if team is not None and not (team.strip() and team.isprintable()):
            raise InputError(f"not a name of a team: {team!r}; use printable characters, at least one")
        if per_minute is not None and per_minute < 1:
            raise InputError(f"a key's rate is 1 request a minute or more, got {per_minute}")
        random = secrets.token_urlsafe(32)
        token = PREFIX + random
        now = datetime.now(UTC).isoformat(timespec="seconds")
        key = ApiKey(
            name,
            f"{PREFIX}{random[:SHOWN]}...",
            now,
            scope,
            tuple(models),
            per_minute,
            metrics=metrics,
            only=checked_only(only),
            team=team,
        )
        with self._in_use() as db:
            try:
                db.execute(
                    "INSERT INTO keys"
                    " (name, hash, shown, scope, models, per_minute, created, metrics, only_labels, team)"
                    " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    [
                        name,
                        _hash(token),
                        key.shown,
                        scope,
                        json.dumps(key.models),
                        per_minute,
                        now,
                        metrics,
                        json.dumps(key.only),
                        team,
                    ],
                )
            except sqlite3.IntegrityError:
                raise InputError(f"there is a key {name!r} already; take another name") from None
            self._data_version = -1
        return token, key

    def revoke(self, name: str) -> ApiKey:
        """Revoke a key, at once and for good. Raises `UnknownName`."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        with self._in_use() as db:
            db.execute("UPDATE keys SET revoked = coalesce(revoked, ?) WHERE name = ?", [now, name])
            self._data_version = -1
        keys = {key.name: key for key in self.all()}
        if name not in keys:
            raise UnknownName("key", name, keys)
        return keys[name]

    def all(self) -> list[ApiKey]:
        """All keys, revoked ones too, oldest first."""
        with self._in_use():
            return [key for _, key in self._rows()]

    def find(self, token: str, *, scopes: Collection[str] | None = None) -> ApiKey | None:
        """The key with this token; None where it was revoked or belongs to a scope that is not in `scopes`.

        The work is the same whatever the token is: it is hashed and compared with every key, each time to the
        end.
        """
        digest = _hash(token)
        found = None
        with self._in_use():
            rows = self._rows()
        for stored, key in rows:
            same = hmac.compare_digest(stored, digest)
            usable = key.revoked is None and (scopes is None or key.scope is None or key.scope in scopes)
            if same & usable:
                found = key
        return found

    def _rows(self) -> list[tuple[str, ApiKey]]:
        """Hash and key of every row; read again only after another connection has written."""
        version = self._db.execute("PRAGMA data_version").fetchone()[0]
        if version != self._data_version:
            self._cached_rows = [
                (
                    row["hash"],
                    ApiKey(
                        row["name"],
                        row["shown"],
                        row["created"],
                        row["scope"],
                        tuple(json.loads(row["models"])),
                        row["per_minute"],
                        row["revoked"],
                        bool(row["metrics"]),
                        tuple(json.loads(row["only_labels"])),
                        row["team"],
                    ),
                )
                for row in self._db.execute("SELECT * FROM keys ORDER BY created, rowid")
            ]
            self._data_version = version
        return self._cached_rows


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode(errors="surrogateescape")).hexdigest()
