"""Sentence embeddings of questions and descriptions, computed once: a frozen encoder and its cache.

Any sentence-transformers model will do; that of the catalogue is the default. Embeddings have length 1 and are kept in
an SQLite file, found again by model and text. The model is loaded when the first text is met that is not there.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from viaticum.catalogue import Catalogue
from viaticum.errors import InputError, MissingExtra
from viaticum.heavy import LOADING
from viaticum.weights import cache_dir, locate

DEFAULT = "all-minilm-l6-v2"
BATCH = 64
Progress = Callable[[int, int], None]  # texts done, texts in all


class Encoder:
    """model: a name of the catalogue, a folder, or what sentence-transformers finds on this machine.

    cache: the SQLite file; None keeps nothing. Raises `WeightsError` for a model of the catalogue that was not
    pulled, `InputError` for one that cannot be loaded.
    """

    def __init__(
        self,
        model: str = DEFAULT,
        *,
        cache: str | Path | None = "",
        catalogue: Catalogue | None = None,
    ) -> None:
        self.name = str(model)
        known = catalogue or Catalogue.load()
        self._folder = str(locate(known[self.name])) if self.name in known else self.name
        self._cache = cache_dir() / "embeddings.db" if cache == "" else Path(cache) if cache else None
        self._model: Any = None
        self._lock = threading.Lock()

    def __call__(self, texts: Sequence[str], progress: Progress | None = None) -> Tensor:
        """Embeddings float32 [N, D] of length 1."""
        keys = [hashlib.sha256(f"{self.name}\0{text}".encode()).digest() for text in texts]
        with self._lock:
            found = self._read(set(keys))
            missing = {key: text for key, text in zip(keys, texts, strict=True) if key not in found}
            new = sorted(missing.items(), key=lambda item: len(item[1]))  # texts of a length need no padding
            for at in range(0, len(new), BATCH):
                part = new[at : at + BATCH]
                vectors = self._encode([text for _, text in part])
                self._write([(key, vector.tobytes()) for (key, _), vector in zip(part, vectors, strict=True)])
                found |= {key: vector for (key, _), vector in zip(part, vectors, strict=True)}
                if progress is not None:
                    progress(len(texts) - len(new) + at + len(part), len(texts))
        return torch.from_numpy(np.stack([found[key] for key in keys]))

    def _encode(self, texts: list[str]) -> np.ndarray[Any, Any]:
        if self._model is None:
            with LOADING:
                self._model = self._load()
        vectors = self._model.encode(
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
        if self._cache is None or not self._cache.exists():
            return {}
        found: dict[bytes, np.ndarray[Any, Any]] = {}
        wanted = list(keys)
        connection = self._open()
        try:
            for at in range(0, len(wanted), 500):
                part = wanted[at : at + 500]
                marks = ",".join("?" * len(part))
                rows = connection.execute(f"select key, vector from embeddings where key in ({marks})", part)
                found |= {key: np.frombuffer(vector, dtype=np.float32) for key, vector in rows}
        finally:
            connection.close()
        return found

    def _write(self, rows: list[tuple[bytes, bytes]]) -> None:
        if self._cache is None:
            return
        connection = self._open()
        try:
            with connection:
                connection.executemany("insert or ignore into embeddings values (?, ?)", rows)
        finally:
            connection.close()

    def _open(self) -> Any:
        """The cache is no truth of anything: where it cannot be read, remove it."""
        import sqlite3

        assert self._cache is not None
        self._cache.parent.mkdir(parents=True, exist_ok=True)
        try:
            connection = sqlite3.connect(self._cache, timeout=30)
            connection.execute("pragma journal_mode = wal")
            connection.execute(
                "create table if not exists embeddings (key blob primary key, vector blob) without rowid"
            )
        except sqlite3.DatabaseError as error:
            raise InputError(f"{self._cache} is no cache of embeddings ({error}); remove it") from None
        return connection
