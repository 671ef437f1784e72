"""What a run of labelling has written so far: texts, continuations and verdicts, a line each, on the disk before the next.

A run that was killed goes on from here; only the texts at hand are written again. Knows no model.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from viaticum.errors import DataError, InputError
from viaticum.types import AnswerKind, Query

SENTENCE = "sentence"  # the finish of a continuation that was ended at a sentence's end
Place = tuple[str, int]  # question id, token of the response


@dataclass(frozen=True, slots=True)
class Response:
    """What the large model wrote to a question. tokens: with the stop token where it ended by one."""

    id: str
    question: str
    kind: AnswerKind
    tokens: tuple[int, ...]
    finish: str

    @property
    def query(self) -> Query:
        return Query(self.question, self.kind)


@dataclass(frozen=True, slots=True)
class Continuation:
    """The large model's text from the small model's `token` at a place on, that token left out."""

    id: str
    place: int
    token: int
    tokens: tuple[int, ...]
    finish: str

    @property
    def at(self) -> Place:
        return self.id, self.place

    @property
    def ended(self) -> bool:
        """Whether it was written as far as a text is, and not to a sentence's end alone."""
        return self.finish != SENTENCE


@dataclass
class Journal:
    """The file and what it holds."""

    path: Path
    responses: dict[str, Response] = field(default_factory=dict)
    branches: dict[Place, Continuation] = field(default_factory=dict)
    verdicts: dict[str, dict[Place, bool | None]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._file: IO[str] | None = None  # opened when the first line is written
        try:
            self._read()
        except OSError as error:
            raise InputError(f"cannot read {self.path}: {error.strerror or error}") from None

    def add(self, record: Response | Continuation) -> None:
        self._write({type(record).__name__.lower(): asdict(record)})
        self._hold(record)

    def judge(self, verifier: str, verdicts: Mapping[Place, bool | None]) -> None:
        rows = [[*place, verdict] for place, verdict in verdicts.items()]
        self._write({"verdicts": rows, "by": verifier})
        self.verdicts.setdefault(verifier, {}).update(verdicts)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _hold(self, record: Response | Continuation) -> None:
        if isinstance(record, Response):
            self.responses[record.id] = record
        else:
            self.branches[record.at] = record

    def _write(self, record: Mapping[str, Any]) -> None:
        try:
            self._file = self._file or self.path.open("a", encoding="utf-8")
            self._file.write(json.dumps(record, ensure_ascii=False) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise InputError(f"cannot write {self.path}: {error.strerror or error}") from None

    def _read(self) -> None:
        if not self.path.exists():
            return
        whole = self.path.read_bytes()
        end = whole.rfind(b"\n") + 1  # a kill in the middle of a write leaves half a line
        if end < len(whole):
            os.truncate(self.path, end)
        for number, line in enumerate(whole[:end].splitlines(), 1):
            try:
                self._take(json.loads(line))
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(f"{self.path}, line {number}: not a line of a journal ({error})") from None

    def _take(self, line: dict[str, Any]) -> None:
        if "verdicts" in line:
            known = self.verdicts.setdefault(line["by"], {})
            known.update({(question, place): verdict for question, place, verdict in line["verdicts"]})
            return
        ((kind, values),) = line.items()
        values["tokens"] = tuple(values["tokens"])
        self._hold({"response": Response, "branch": Continuation}[kind](**values))
