"""Sentence embeddings of questions and descriptions: a frozen encoder with a cache on disk.

Works with any sentence-transformers model; the default is in the catalogue. Embeddings have length 1; the
cache is an SQLite file with model and text as key. The model is loaded for the first text that is not in the
cache. A text that is longer than what the model reads is cut, or, where asked for, read in windows whose mean
counts.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from viaticum.catalogue import Catalogue
from viaticum.errors import InputError, MissingExtra
from viaticum.files import private_file
from viaticum.heavy import LOADING
from viaticum.weights import cache_dir, locate

DEFAULT_MODEL = "all-minilm-l6-v2"
BATCH = 64
MAX_VARIABLES = 500  # of one SQL statement
WINDOWS = 8  # of one text at most, spread evenly over a longer one
OVERLAP = 32  # tokens that two windows share
SHORT = 100  # characters up to which a text is no longer than what any encoder reads
Progress = Callable[[int, int], None]  # texts done, texts in total
_log = logging.getLogger(__name__)


class Encoder:
    """Texts to embeddings.

    Args:
        model: a name of the catalogue, a folder, or what sentence-transformers finds on this machine.
        cache: the SQLite file; "" is the one in the cache folder, None keeps nothing.
        catalogue: where `model` is looked up; by default the catalogue of the user.
        windows: read long texts in windows, at most `WINDOWS`; else they are cut. Embeddings of the two are
            not to be mixed.

    Raises:
        WeightsError: the weights of a catalogue model were not pulled.
        InputError: the model cannot be loaded.
    """

    def __init__(
        self,
        model: str = DEFAULT_MODEL,
        *,
        cache: str | Path | None = "",
        catalogue: Catalogue | None = None,
        windows: bool = False,
    ) -> None:
        self.name, self.windows = str(model), windows
        models = catalogue or Catalogue.load()
        self._folder = str(locate(models[self.name])) if self.name in models else self.name
        self._identity = self.name if self.name in models else _identity(self.name)
        self._cache = cache_dir() / "embeddings.db" if cache == "" else Path(cache) if cache else None
        self._model: Any = None
        self._lock = threading.Lock()

    def __call__(self, texts: Sequence[str], progress: Progress | None = None) -> Tensor:
        """Return float32 embeddings of length 1 [N, D]."""
        if not texts:
            return self((" ",))[:0]
        keys = [self._key(text) for text in texts]
        with self._lock:
            embeddings = self._read(set(keys))
            missing = {key: text for key, text in zip(keys, texts, strict=True) if key not in embeddings}
            ordered = sorted(missing.items(), key=lambda item: len(item[1]))  # equal lengths need no padding
            for start in range(0, len(ordered), BATCH):
                batch = ordered[start : start + BATCH]
                vectors = self._encode([text for _, text in batch])
                encoded = {key: vector for (key, _), vector in zip(batch, vectors, strict=True)}
                self._write([(key, vector.tobytes()) for key, vector in encoded.items()])
                embeddings |= encoded
                if progress is not None:
                    progress(len(texts) - len(ordered) + start + len(batch), len(texts))
        return torch.from_numpy(np.stack([embeddings[key] for key in keys]))

    def _key(self, text: str) -> bytes:
        how = "windows\0" if self.windows and len(text) > SHORT else ""
        return hashlib.sha256(f"{self._identity}\0{how}{text}".encode()).digest()

    @property
    def max_tokens(self) -> int:
        """Tokens that it reads of a text; the rest is cut."""
        return int(self._loaded().max_seq_length)

    @property
    def vocabulary_size(self) -> int:
        return len(self._tokenizer)

    def count(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text, those around it included."""
        ids = self._tokenizer(list(texts), truncation=False, verbose=False)["input_ids"]
        return [len(each) for each in ids]

    def decode(self, tokens: Sequence[int]) -> str | None:
        """The text of token ids, without those around it; None for ids that it does not have."""
        if not all(0 <= token < self.vocabulary_size for token in tokens):
            return None
        text: str = self._tokenizer.decode(list(tokens), skip_special_tokens=True)
        return text

    @property
    def _tokenizer(self) -> Any:
        """The tokenizer of transformers. Raises `InputError` for a model that has another kind."""
        tokenizer = self._loaded().tokenizer
        if not callable(tokenizer):
            raise InputError(f"the encoder {self.name} has no tokenizer of transformers to count tokens with")
        return tokenizer

    def _loaded(self) -> Any:
        if self._model is None:
            with LOADING:
                self._model = self._model or self._load()
        return self._model

    def _encode(self, texts: list[str]) -> np.ndarray[Any, Any]:
        if not self.windows:
            return self._encode_cut(texts)
        parts = [self._split(text) for text in texts]
        vectors = self._encode_cut([window for windows in parts for window, _ in windows])
        weights = np.array([tokens for windows in parts for _, tokens in windows], dtype=np.float32)
        begins = np.cumsum([0, *(len(windows) for windows in parts[:-1])])
        sums = np.add.reduceat(weights[:, None] * vectors, begins, axis=0)
        lengths = np.linalg.norm(sums, axis=1, keepdims=True)
        return np.asarray(sums / np.maximum(lengths, 1e-12), dtype=np.float32)

    def _split(self, text: str) -> list[tuple[str, int]]:
        """The windows of a text and their tokens; the text alone where it is short enough.

        So it is too where the model has no fast tokenizer of transformers, which knows where tokens lie.
        """
        tokenizer = self._loaded().tokenizer
        if len(text) <= SHORT or not getattr(tokenizer, "is_fast", False):
            return [(text, 1)]
        room = max(2 * OVERLAP, self.max_tokens - tokenizer.num_special_tokens_to_add())
        spans = tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, truncation=False, verbose=False
        )["offset_mapping"]
        if len(spans) <= room:
            return [(text, 1)]
        last = len(spans) - room
        count = min(WINDOWS, -(-last // (room - OVERLAP)) + 1)
        starts = np.linspace(0, last, count).round().astype(int).tolist()
        return [(text[spans[start][0] : spans[start + room - 1][1]], room) for start in starts]

    def _encode_cut(self, texts: list[str]) -> np.ndarray[Any, Any]:
        vectors = self._loaded().encode(
            texts, batch_size=BATCH, normalize_embeddings=True, show_progress_bar=False
        )
        return np.asarray(vectors, dtype=np.float32)

    def _load(self) -> Any:
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError:
            raise MissingExtra("sentence-transformers", "local") from None
        try:
            return SentenceTransformer(self._folder, device="cpu", local_files_only=True)
        except Exception as error:
            raise InputError(f"cannot load the encoder {self.name}: {str(error).splitlines()[0]}") from None

    def _read(self, keys: set[bytes]) -> dict[bytes, np.ndarray[Any, Any]]:
        embeddings: dict[bytes, np.ndarray[Any, Any]] = {}
        wanted = list(keys)
        with self._using_cache() as connection:
            for start in range(0, len(wanted) if connection else 0, MAX_VARIABLES):
                batch = wanted[start : start + MAX_VARIABLES]
                marks = ",".join("?" * len(batch))
                rows = connection.execute(f"select key, vector from embeddings where key in ({marks})", batch)
                embeddings |= {key: np.frombuffer(vector, dtype=np.float32) for key, vector in rows}
        return embeddings

    def _write(self, rows: list[tuple[bytes, bytes]]) -> None:
        with self._using_cache() as connection:
            if connection:
                with connection:
                    connection.executemany("insert or ignore into embeddings values (?, ?)", rows)

    @contextmanager
    def _using_cache(self) -> Iterator[Any]:
        """The open cache, or None. One that cannot be used, as on a disk that is full, is not used again."""
        import sqlite3

        connection = None
        try:
            connection = self._open(self._cache) if self._cache is not None else None
        except (OSError, sqlite3.OperationalError) as error:
            self._give_up_cache(error)
        try:
            yield connection
        except sqlite3.OperationalError as error:
            self._give_up_cache(error)
        finally:
            if connection is not None:
                connection.close()

    def _give_up_cache(self, error: Exception) -> None:
        _log.warning("embeddings are not kept: %s cannot be used (%s)", self._cache, error)
        self._cache = None

    def _open(self, path: Path) -> Any:
        """Open the cache, and make it where it is missing. It can be removed at any time."""
        import sqlite3

        path.parent.mkdir(parents=True, exist_ok=True)
        private_file(path)
        connection = sqlite3.connect(path, timeout=30)
        try:
            connection.execute("pragma journal_mode = wal")
            connection.execute(
                "create table if not exists embeddings (key blob primary key, vector blob) without rowid"
            )
        except sqlite3.OperationalError:
            connection.close()
            raise
        except sqlite3.DatabaseError as error:
            connection.close()
            raise InputError(f"{path} is no cache of embeddings ({error}); remove it") from None
        return connection


def _identity(name: str) -> str:
    """What tells the embeddings of a model apart: of a folder also where it is, and its files as they are."""
    folder = Path(name)
    if not folder.is_dir():
        return name
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    stamps = [(str(path.relative_to(folder)), *_stamp(path)) for path in files]
    return f"{folder.absolute()}\0{stamps}"


def _stamp(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns
