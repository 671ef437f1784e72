"""The rows of a job's input, which has to stay as it was when the job began.

Leaves out reading the file (`agents.batch.input`) and which rows are done (`agents.batch.run`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import takewhile

from viaticum.agents.batch.input import BatchRow, Input, mark_duplicates
from viaticum.errors import InputError


class JobRows:
    """The rows of one job.

    Args:
        file: of the job.
        digest: of the file as the job began.
        duplicates: messages of rows with the id of an earlier row, by number of the row.
    """

    def __init__(self, file: Input, digest: str, duplicates: Mapping[int, str]) -> None:
        self.file, self._digest, self._duplicates = file, digest, dict(duplicates)
        self._compared: tuple[int, ...] | None = None  # the file's state when it was last compared
        self._changed = False  # whether it was another one then

    def __iter__(self) -> Iterator[BatchRow]:
        """All rows in order; those that cannot be used have a problem."""
        return mark_duplicates(self.file.rows(), self._duplicates)

    def numbered(self, numbers: set[int]) -> Iterator[BatchRow]:
        """The rows with these numbers, in order. Raises `InputError` where the file has changed."""
        if numbers:
            self.check()
        last = max(numbers, default=-1)
        return (row for row in takewhile(lambda row: row.number <= last, self) if row.number in numbers)

    def has_changed(self) -> bool:
        """Whether the file is another than the job began with."""
        state = self.file.state()
        if state != self._compared:
            self._changed = self.file.digest() != self._digest
            self._compared = state
        return self._changed

    def check(self) -> None:
        """Raises `InputError` where the file has changed."""
        if self.has_changed():
            raise InputError(
                f"{self.file.path} changed while the job ran; what was answered until then is "
                "kept. Put it back as it was and go on with --resume, or start over with --force"
            )
