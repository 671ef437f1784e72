"""Cache of completions: a call that was made before costs nothing, if the model would return the same text.

The key of a call is a digest of the model's catalogue entry, the messages and the sampling parameters, with
the number of the sample. The cache is an SQLite file. It is filled from calls that the ledger has posted:
kept any earlier, a text would be free after a kill. Losing it does no harm: calls that were paid for are in
the ledger. Leaves out when it is read (`agents.batch.executor`).
"""

from __future__ import annotations

import logging
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Self

from viaticum.agents.workflow.call_streams import WatchedStream
from viaticum.agents.workflow.calls import ModelCall
from viaticum.agents.workflow.serialization import parse_completion
from viaticum.budgets.records import Hold, digest
from viaticum.catalogue import Catalogue, ModelSpec
from viaticum.errors import DataError, InputError, reason
from viaticum.files import private_file
from viaticum.models.base import Generation, Model, StreamPiece
from viaticum.types import Completion, Message, ThinkingDelta, TokenCount, Usage

CACHED = "answered from the cache"  # warning of a completion from the cache
REPRODUCIBLE_KINDS = ("local", "pair", "scripted")  # of models whose samples depend on the seed alone
BUSY_SECONDS = 30.0
_log = logging.getLogger("viaticum")


@dataclass(frozen=True, slots=True)
class CachedAnswer:
    """A completion, and the ledger key of the call that paid for it."""

    completion: Completion
    key: str


class Cache:
    """One file, shared by threads and processes. After an error of the file it is no longer used.

    Args:
        path: the SQLite file, or ":memory:".
        catalogue: of the models whose calls it holds.

    Raises:
        InputError: the file cannot be opened, or is no cache.
    """

    def __init__(self, path: str | Path, catalogue: Catalogue) -> None:
        self.path, self._catalogue = Path(path), catalogue
        self._lock, self._disabled = threading.Lock(), False
        self._specs: dict[str, str | None] = {}
        self._written: dict[str, str] = {}
        try:
            if str(path) != ":memory:":
                private_file(path)
            self._db = sqlite3.connect(
                self.path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
            )
        except (sqlite3.Error, OSError) as error:
            raise InputError(
                f"cannot open the cache {self.path} ({reason(error)}); give another path"
            ) from None
        try:
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = OFF")
            self._db.execute(
                "CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, completion TEXT NOT NULL, "
                "paid TEXT NOT NULL)"
                " WITHOUT ROWID"
            )
        except sqlite3.Error as error:
            self._db.close()
            raise InputError(f"{self.path} is no cache of answers ({error}); give another path") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        with self._lock:
            self._disabled = True
            self._db.close()

    def key(self, call: ModelCall, parameters: str) -> str | None:
        """Key of a call; None if the same call may return another text.

        Args:
            parameters: digest of the call's parameters.
        """
        name = call.model.name
        if name not in self._specs:
            spec = self._catalogue.get(name)
            self._specs[name] = None if spec is None else _model_key(spec)
        model_key = self._specs[name]
        if model_key is None or (
            call.generation.temperature > 0 and not model_key.startswith(REPRODUCIBLE_KINDS)
        ):
            return None
        return f"{model_key}/{parameters}"

    def find(self, keys: Sequence[str]) -> dict[str, CachedAnswer]:
        """The answers that are there, by key."""
        found: dict[str, CachedAnswer] = {}
        with self._lock:
            if self._disabled:
                return found
            try:
                for start in range(0, len(keys), 500):
                    part = keys[start : start + 500]
                    marks = ", ".join("?" * len(part))
                    query = f"SELECT key, completion, paid FROM answers WHERE key IN ({marks})"
                    for key, text, paid in self._db.execute(query, part):
                        with suppress(DataError):  # damaged: the call is made again
                            found[key] = CachedAnswer(parse_completion(text, key), paid)
            except sqlite3.Error as error:
                self._disable(error)
        return found

    def put(self, answers: Sequence[tuple[str, str, str]]) -> None:
        """Insert rows of (key, completion as JSON, ledger key of its call); the first row of a key stays."""
        with self._lock:
            if self._disabled or not answers:
                return
            try:
                self._db.execute("BEGIN")
                self._db.executemany("INSERT OR IGNORE INTO answers VALUES (?, ?, ?)", answers)
                self._db.execute("COMMIT")
            except sqlite3.Error as error:
                self._disable(error)

    def note_written(self, parameters: str, key: str) -> None:
        """Remember the key of a call that was made and is not posted yet. parameters: digest of its own."""
        self._written[parameters] = key

    def put_posted(self, holds: Iterable[Hold]) -> None:
        """Insert the texts of those of the holds, all of them posted, that `note_written` has heard of."""
        self.put(
            [
                (key, hold.result, hold.key)
                for hold in holds
                if hold.result is not None and (key := self._written.pop(hold.parameters, None)) is not None
            ]
        )

    def _disable(self, error: sqlite3.Error) -> None:
        _log.warning("the cache %s is not used any more: %s", self.path, error)
        self._disabled = True


class CachedModel(Model):
    """A model that answers from a cache where it can; then nothing is reserved and nothing charged.

    What it writes itself is kept by `Cache.put_posted`, once it is paid for.
    """

    def __init__(self, model: Model, cache: Cache) -> None:
        self.model, self.cache = model, cache
        self.name, self.members, self.runs_here = model.name, model.members, model.runs_here

    def worst_case(self, messages: Sequence[Message], max_new_tokens: int) -> dict[str, TokenCount]:
        return self.model.worst_case(messages, max_new_tokens)

    def worst_case_of(self, messages: Sequence[Message], generation: Generation) -> dict[str, TokenCount]:
        *_, known = self._find(messages, generation)
        return zero_usage(self.model) if known else self.model.worst_case_of(messages, generation)

    def count(self, text: str) -> int:
        return self.model.count(text)

    @property
    def counting_hint(self) -> str:
        return self.model.counting_hint

    def stream(self, messages: Sequence[Message], generation: Generation) -> Iterator[StreamPiece]:
        parameters, key, known = self._find(messages, generation)
        if known is not None:
            thinking, text = known.completion.thinking, known.completion.text
            pieces: list[StreamPiece] = [ThinkingDelta(thinking)] if thinking else []
            return iter([*pieces, text, as_cached(known.completion, self.model)])

        def note(piece: StreamPiece) -> None:
            if isinstance(piece, Completion) and key is not None:
                self.cache.note_written(parameters, key)

        return WatchedStream(self.model.stream(messages, generation), seen=note)

    def _find(
        self, messages: Sequence[Message], generation: Generation
    ) -> tuple[str, str | None, CachedAnswer | None]:
        """The digest of a call's parameters, its key in the cache, and its answer there."""
        call = ModelCall(self.model, list(messages), generation)
        parameters = digest(call.parameters)
        key = self.cache.key(call, parameters)
        return parameters, key, self.cache.find([key]).get(key) if key is not None else None


def as_cached(completion: Completion, model: Model) -> Completion:
    """A cached completion as the answer of a call that costs nothing."""
    return replace(
        completion, usage=Usage(zero_usage(model), 0.0), reported_nanousd=None, warnings=(CACHED,), trace=None
    )


def zero_usage(model: Model) -> dict[str, TokenCount]:
    return dict.fromkeys(model.members, TokenCount())


def is_cached(payload: Mapping[str, object]) -> bool:
    """Whether a completion, decoded from JSON, came from the cache."""
    warnings = payload.get("warnings")
    return isinstance(warnings, list) and CACHED in warnings


def _model_key(spec: ModelSpec) -> str:
    return f"{spec.kind}-{digest(spec.identity)[:32]}"
