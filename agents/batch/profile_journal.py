"""What a run of `profile` keeps while it goes on: its journal of finished rows, one line each, and its lock.

An answer belongs to the run that the first line names. A verdict belongs to what was asked: its verifier,
question and answer, whatever run that was in, so that verifiers can be added to a run that was killed. Leaves
out what is asked (`agents.batch.profile`, `agents.batch.profile_verdicts`).
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from viaticum.errors import InputError
from viaticum.files import JournalFile, run_lock
from viaticum.outcomes import checked_pair, parse_outcome
from viaticum.types import Completion, FinishReason, Outcome, Pair

# Pair, rows of it that are done, rows in all done, rows in all, accuracy of the pair so far.
Progress = Callable[[Pair, int, int, int, float], None]


@dataclass(frozen=True, slots=True)
class Samples:
    """What a model wrote for one row, one entry a sample: texts, thoughts, and how each ended."""

    texts: tuple[str, ...]
    thinking: tuple[str, ...]
    finish_reasons: tuple[FinishReason, ...]

    @classmethod
    def of(cls, completions: Sequence[Completion]) -> Samples:
        return cls(
            tuple(each.text for each in completions),
            tuple(each.thinking for each in completions),
            tuple(each.finish_reason for each in completions),
        )

    @classmethod
    def parse(cls, record: Mapping[str, Any]) -> Samples:
        """Read a line of a journal or texts file; older ones have the end of the last sample alone."""
        texts = tuple(record["texts"])
        thinking = tuple(record.get("thinking") or ("",) * len(texts))
        last: FinishReason = record.get("finish_reason") or "stop"
        ends = record.get("finish_reasons") or (*("stop",) * (len(texts) - 1), last)
        return cls(texts, thinking, tuple(ends))


def kept_line(row: Outcome, samples: Samples) -> dict[str, Any]:
    """A line of the texts file: what the models wrote for a row, with the answer that was read from it."""
    kept = ("question_id", "model", "strategy", "answer", "correct", "finish_reason")
    return {name: getattr(row, name) for name in kept} | asdict(samples)


class ProfileJournal:
    """Journal of finished rows, one JSON line each; the first line holds the fingerprint of the run.

    Args:
        path: the file.
        fingerprint: of what the answers depend on.

    Raises:
        InputError: the file has answers of another run.
    """

    def __init__(self, path: Path, fingerprint: str) -> None:
        self.path = path
        self.rows: dict[Pair, dict[str, Outcome]] = {}
        self.verdicts: dict[str, Outcome] = {}  # by what was asked
        self._samples: dict[tuple[Pair, str], Samples] = {}
        self._file = JournalFile(path)
        self._read(fingerprint)

    def add(self, row: Outcome, samples: Samples) -> None:
        self._file.append(asdict(row) | asdict(samples))
        self._remember(row, samples)

    def add_verdict(self, asked: str, row: Outcome, samples: Samples) -> None:
        """Add a verdict. asked: digest of the verifier, how it is asked, the question and the answer."""
        self._file.append(asdict(row) | asdict(samples) | {"asked": asked})
        self.verdicts[asked] = row

    def completion(self, row: Outcome) -> dict[str, Any]:
        """What the models wrote for a row, with the answer that was parsed from it."""
        return kept_line(row, self._samples[row.pair, row.question_id])

    def close(self) -> None:
        """Close the file; one without a row is removed, so that a run that was refused leaves nothing."""
        self._file.close()
        if not any(self.rows.values()) and not self.verdicts:
            self.path.unlink(missing_ok=True)

    def _read(self, fingerprint: str) -> None:
        lines = [(number, json.loads(line)) for number, line in self._file.lines()]
        if lines and lines[0][1].get("fingerprint") != fingerprint:
            if len(lines) > 1:
                raise InputError(
                    f"{self.path} belongs to other questions, models, prompts or pairs; "
                    f"remove it to start anew"
                )
            lines = []
            self.path.unlink()  # an earlier run was killed before its first row: nothing is lost
        for number, record in lines[1:]:
            row = parse_outcome(record, f"{self.path}, line {number}")
            if checked_pair(row) is None:
                self._remember(row, Samples.parse(record))
            elif "asked" in record:
                self.verdicts[record["asked"]] = row
        if not lines:
            self._file.append({"fingerprint": fingerprint})

    def _remember(self, row: Outcome, samples: Samples) -> None:
        self.rows.setdefault(row.pair, {})[row.question_id] = row
        self._samples[row.pair, row.question_id] = samples


class RowProgress:
    """Counts rows for whoever watches.

    Args:
        report: called for every further row.
        total: rows in all.
        done: the rows that are there.
    """

    def __init__(self, report: Progress | None, total: int, done: Iterable[Outcome] = ()) -> None:
        self._report, self._total = report, total
        self._right: dict[Pair, list[bool]] = defaultdict(list)
        for row in done:
            self._right[row.pair].append(row.correct)

    def add(self, row: Outcome) -> None:
        right = self._right[row.pair]
        right.append(row.correct)
        if self._report is not None:
            done = sum(map(len, self._right.values()))
            self._report(row.pair, len(right), done, self._total, sum(right) / len(right))


@contextmanager
def profile_lock(out: Path) -> Iterator[None]:
    """Keeps other runs away from a table and its journal. Raises `InputError` where one is at it."""
    lock = out.with_name(f".{out.name}.lock")
    with run_lock(lock, busy=f"another run of profile writes {out}; wait for it, or name another --out"):
        try:
            yield
        finally:
            with suppress(OSError):  # Windows removes no open file
                lock.unlink()
