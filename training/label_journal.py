"""Append-only journal of a labelling run: responses, continuations and verdicts, one JSON line each.

Every line is on the disk before the next text is written, so a run that was killed resumes from here and
writes only the texts that were in progress again. Leaves out models and verifiers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from viaticum.errors import DataError
from viaticum.files import JournalFile
from viaticum.types import AnswerKind, Query

SENTENCE = "sentence"  # the finish of a continuation that was cut at the end of a sentence
DifferenceKey = tuple[str, int]  # question id, position of the differing token in the response


@dataclass(frozen=True, slots=True)
class Response:
    """The large model's answer to a question.

    Args:
        id: of the question.
        question: its text.
        kind: of its answer.
        tokens: token ids, the stop token included where the text ended with one.
        finish: finish reason.
    """

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
    """The large model's text after a token of the small model took the place of its own.

    Args:
        id: of the question.
        position: index of the replaced token in the response.
        token: the small model's token.
        tokens: token ids after `token`.
        finish: finish reason, or `SENTENCE`.
    """

    id: str
    position: int
    token: int
    tokens: tuple[int, ...]
    finish: str

    @property
    def key(self) -> DifferenceKey:
        return self.id, self.position

    @property
    def complete(self) -> bool:
        """Whether it was written to the end of the text, not only to the end of a sentence."""
        return self.finish != SENTENCE


@dataclass
class Journal:
    """The journal file and its content in memory."""

    path: Path
    responses: dict[str, Response] = field(default_factory=dict)
    continuations: dict[DifferenceKey, Continuation] = field(default_factory=dict)
    verdicts: dict[str, dict[DifferenceKey, bool | None]] = field(default_factory=dict)  # by verifier

    def __post_init__(self) -> None:
        self._file = JournalFile(self.path)
        for number, line in self._file.lines():
            try:
                self._load(json.loads(line))
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(f"{self.path}, line {number}: not a line of a journal ({error})") from None

    def add(self, record: Response | Continuation) -> None:
        self._file.append(_to_json(record))
        self._store(record)

    def add_verdicts(self, verifier: str, verdicts: Mapping[DifferenceKey, bool | None]) -> None:
        rows = [[*key, verdict] for key, verdict in verdicts.items()]
        self._file.append({"verdicts": rows, "by": verifier})
        self.verdicts.setdefault(verifier, {}).update(verdicts)

    def is_continued(self, key: DifferenceKey, *, whole: bool) -> bool:
        """Whether there is a continuation, and a complete one where `whole` texts are needed."""
        found = self.continuations.get(key)
        return found is not None and (found.complete or not whole)

    def is_judged(self, verifier: str, key: DifferenceKey, *, whole: bool) -> bool:
        """Whether there is a verdict.

        whole: the verifier needs whole texts: "unknown" is then none, since it may not have seen the end.
        """
        verdicts = self.verdicts.get(verifier, {})
        return key in verdicts and (verdicts[key] is not None or not whole)

    def close(self) -> None:
        self._file.close()

    def _store(self, record: Response | Continuation) -> None:
        if isinstance(record, Response):
            self.responses[record.id] = record
        else:
            self.continuations[record.key] = record

    def _load(self, line: dict[str, Any]) -> None:
        if "verdicts" in line:
            verdicts = self.verdicts.setdefault(line["by"], {})
            verdicts.update(
                {(question, position): verdict for question, position, verdict in line["verdicts"]}
            )
            return
        ((kind, values),) = line.items()
        self._store(_from_json(kind, values))


# The journal calls a continuation "branch" and its position "place".


def _to_json(record: Response | Continuation) -> dict[str, Any]:
    if isinstance(record, Response):
        return {"response": asdict(record)}
    values = asdict(record)
    return {"branch": {"place" if name == "position" else name: value for name, value in values.items()}}


def _from_json(kind: str, values: dict[str, Any]) -> Response | Continuation:
    values["tokens"] = tuple(values["tokens"])
    if kind == "response":
        return Response(**values)
    if kind != "branch":
        raise KeyError(kind)
    return Continuation(position=values.pop("place"), **values)
