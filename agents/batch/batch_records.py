"""The journal of a job's provider batches: what was sent, written down before it is sent.

`provider_batches.jsonl` in the job's folder has a line for every step of a batch: prepared, uploaded,
created, cancelling, collected. The requests of a batch are in a file beside it. A line is on the disk
before the next step is taken, so that a process that dies knows afterwards which batches may be at a
provider. Leaves out the steps (`agents.batch.provider_batches`).
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from viaticum.errors import DataError
from viaticum.files import JournalFile, atomic_file
from viaticum.jobs import PROVIDER_BATCHES
from viaticum.models.remote.batch_api import BatchState

ADVICE = "; make room and go on with --resume"


@dataclass
class ProviderBatch:
    """A batch of one model's requests.

    Args:
        name: of this batch alone; also of its file.
        model: in the catalogue.
        keys: ledger key of each row, by the row's number.
        until: Unix time at which it is given up; None for never.
        price: worth of a dollar when it was sent, for the pairs that are asked where there is no answer.
        prepared: Unix time before which it cannot have been sent.
        file_id, id: the provider's, once it has given them.
        cancelling: whether the provider was asked to stop.
        maybe_sent: it may be at the provider, though its id is not known.
        state: as the provider told last.
        next_look, wait: Unix time of the next look, and seconds from the last look to it.
        missing: looks in a row at which the provider did not know it, or gave no results of it.
        incomplete: looks at which results were missing.
        posted: nano-dollars that this process has settled for its answers.
        unknown_since: Unix time from which on it may be at the provider without our knowledge.
    """

    name: str
    model: str
    keys: dict[int, str]
    until: float | None
    prepared: float
    price: float | None = None
    file_id: str = ""
    id: str = ""
    cancelling: bool = False
    collected: bool = False
    maybe_sent: bool = False
    state: BatchState | None = None
    next_look: float = 0.0
    wait: float = 0.0
    missing: int = 0
    incomplete: int = 0
    posted: int = 0
    unknown_since: float = field(default_factory=time.time)

    def custom_id(self, number: int) -> str:
        return f"{self.name}_{number}"

    def number_of(self, custom_id: str) -> int | None:
        """The row of a request; None for a request of another batch."""
        name, _, number = custom_id.rpartition("_")
        found = int(number) if name == self.name and number.isdigit() else None
        return found if found in self.keys else None


class BatchJournal:
    """The batches of a job. Opening it reads what an earlier run has left.

    Args:
        folder: of the job.

    Raises:
        DataError: a line is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.batches: list[ProviderBatch] = []
        self.direct: set[int] = set()  # rows that no further batch takes
        self._file = JournalFile(folder / PROVIDER_BATCHES, advice=ADVICE)
        if self._file.path.exists():
            for number, line in self._file.lines():
                self._take(line, f"{self._file.path}, line {number}")

    @property
    def open(self) -> list[ProviderBatch]:
        """The batches that are not collected."""
        return [batch for batch in self.batches if not batch.collected]

    @property
    def next_number(self) -> int:
        return len(self.batches) + 1

    def requests_file(self, batch: ProviderBatch) -> Path:
        return self.folder / f"{PROVIDER_BATCHES}.{batch.name}.jsonl"

    def prepare(self, batch: ProviderBatch, requests: Iterable[dict[str, Any]]) -> None:
        """Write the requests of a batch, then the line that it is about to be sent."""
        with atomic_file(self.requests_file(batch), advice=ADVICE) as scratch, scratch.open("wb") as file:
            file.writelines(json.dumps(each, ensure_ascii=False).encode() + b"\n" for each in requests)
        keys = [[number, key] for number, key in batch.keys.items()]
        values = {"until": batch.until, "at": batch.prepared, "price": batch.price}
        self._write(batch, "prepared", model=batch.model, rows=keys, **values)
        self.batches.append(batch)

    def uploaded(self, batch: ProviderBatch, file_id: str) -> None:
        batch.file_id = file_id
        self._write(batch, "uploaded", file_id=file_id)

    def created(self, batch: ProviderBatch, state: BatchState) -> None:
        batch.id, batch.state = state.id, state
        batch.file_id = batch.file_id or state.input_file
        self._write(batch, "created", id=state.id)

    def cancelling(self, batch: ProviderBatch) -> None:
        batch.cancelling = True
        self._write(batch, "cancelling")

    def collected(self, batch: ProviderBatch, direct: Iterable[int]) -> None:
        """All that came of a batch is in the ledger. direct: rows that are asked directly now."""
        rows = sorted(direct)
        batch.collected = True
        self.direct.update(rows)
        self._write(batch, "collected", direct=rows)
        self.requests_file(batch).unlink(missing_ok=True)

    def close(self) -> None:
        self._file.close()

    def _write(self, batch: ProviderBatch, step: str, **values: Any) -> None:
        self._file.append({"batch": batch.name, "step": step, **values})

    def _take(self, line: bytes, location: str) -> None:
        try:
            values = json.loads(line)
            name, step = values["batch"], values["step"]
            if step == "prepared":
                keys = {int(number): str(key) for number, key in values["rows"]}
                at, until = values["at"], values["until"]
                batch = ProviderBatch(name, values["model"], keys, until, at, values["price"])
                batch.maybe_sent = True
                self.batches.append(batch)
                return
            batch = next(each for each in self.batches if each.name == name)
            if step == "uploaded":
                batch.file_id = values["file_id"]
            elif step == "created":
                batch.id, batch.maybe_sent = values["id"], False
            elif step == "cancelling":
                batch.cancelling = True
            elif step == "collected":
                batch.collected = True
                self.direct.update(values["direct"])
        except (ValueError, KeyError, TypeError, AttributeError, StopIteration):
            raise DataError(f"{location}: not a step of a provider's batch; the file is damaged") from None


def batches_left(folder: Path) -> Iterator[ProviderBatch]:
    """The batches of a job's folder that are not collected."""
    if (folder / PROVIDER_BATCHES).exists():
        journal = BatchJournal(folder)
        yield from journal.open
        journal.close()
