"""One batch from its validation to its end.

Each line that was answered is written to the output file or the error file before anything else hears of it;
the two files are the journal from which a batch goes on after a kill, and what its client gets at the end.
Leaves out which batches run (`batch_runner`), and how a line is answered (`batch_lines`).
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, Literal

from viaticum.agents.openai_api.batches import (
    BatchError,
    BatchObject,
    Line,
    Status,
    answered_line,
    batch_usage,
    errors_of,
    id_digest,
    lines_of,
    output_row,
    unanswered_line,
)
from viaticum.agents.openai_api.errors import APIError
from viaticum.agents.server.auth import Caller
from viaticum.agents.server.batch_lines import Interrupted, LineAnswers, line_key, unless
from viaticum.agents.server.batch_store import BatchStore, StoredBatch, output_id, rows_of
from viaticum.agents.server.line_turns import LineTurns
from viaticum.agents.server.service import Service
from viaticum.errors import InputError
from viaticum.files import JournalFile

ENDED: tuple[Status, ...] = ("failed", "completed", "expired", "cancelled")
SYNC_SECONDS = 1.0  # after which answers are on the disk at the latest; a killed process loses none
NO_SPACE = "; make room, and the batch goes on"
Kind = Literal["output", "error"]
_UNANSWERED = {
    "cancelled": ("batch_cancelled", "The batch was cancelled before this request was made."),
    "expired": ("batch_expired", "The completion window ended before this request was made."),
}


class _InputChanged(Exception):
    """The input file is no longer the one that was validated; further runs of the batch would fail too."""


class BatchRun:
    """A batch while this server answers it.

    Args:
        turns: of the lines of all batches.
        stored: the batch as it was found.
    """

    def __init__(
        self,
        service: Service,
        store: BatchStore,
        answers: LineAnswers,
        turns: LineTurns,
        stored: StoredBatch,
    ) -> None:
        self.service, self.store, self.answers, self.stored = service, store, answers, stored
        self.turns = turns
        self.batch: BatchObject = stored.batch
        self.id: str = stored.batch["id"]
        self.halt = asyncio.Event()  # no further line begins
        self.is_interrupted = False  # it goes on later, here or in another server
        self._total = stored.batch["request_counts"]["total"]
        self._finished: set[bytes] = set()  # digests of custom ids
        self._counts = {"output": 0, "error": 0}
        self._usage = batch_usage(())
        self._write_lock = threading.Lock()
        self._change_lock = asyncio.Lock()
        self._failure: BatchError | None = None
        self._journals = {"output": self._journal("output"), "error": self._journal("error")}

    def _journal(self, kind: Kind) -> JournalFile:
        path = self.store.content_path(output_id(self.id, kind))
        return JournalFile(path, sync_seconds=SYNC_SECONDS, advice=NO_SPACE)

    @property
    def is_incomplete(self) -> bool:
        return len(self._finished) < self._total

    # --- from outside -------------------------------------------------------------------------------------

    def interrupt(self) -> None:
        """Begin no further line; those that run may end. The batch goes on later."""
        self.is_interrupted = True
        self.halt.set()

    async def refresh(self) -> None:
        """Store the progress, and heed what has changed: the batch is cancelled, its key is revoked."""
        if self.batch["status"] == "in_progress":
            with suppress(Interrupted):
                await self._current_caller()
        if self.batch["status"] in ("in_progress", "cancelling"):
            await self._change({})
            if self.batch["status"] == "cancelling" or time.time() >= self.batch["expires_at"]:
                self.halt.set()

    # --- the steps ----------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Answer the batch, or go on with it, to its end or until it is interrupted."""
        try:
            if not await self._reload():
                return
            is_counted = self.batch["status"] != "validating" and self._total > 0
            if not is_counted and not await self._validate():
                return
            await self.service.run_with_files(self._recall)
            await self.refresh()
            if self.is_incomplete:
                await self._answer_lines()
            if self._failure is not None and self.is_incomplete:
                await self._fail([self._failure])
            elif not (self.is_interrupted or self.service.draining or self.batch["status"] in ENDED):
                await self._finalize()
        except FileNotFoundError:
            await self._fail([_error("file_not_found", "the input file was deleted")])
        except _InputChanged as error:
            await self._fail([_error("invalid_json_line", str(error))])
        finally:
            for journal in self._journals.values():
                await self.service.run_with_files(journal.close)

    async def _reload(self) -> bool:
        """Read the batch again, which another run may have ended since; returns whether it has not ended."""
        stored = await self.service.run_in_thread(self.store.update, self.id, {})
        self.batch = stored or self.batch
        return stored is not None and stored["status"] not in ENDED

    async def _validate(self) -> bool:
        """Check the input file; returns whether its lines can be answered."""
        path, most = self.store.content_path(self.batch["input_file_id"]), self.service.limits.body_bytes
        endpoint = self.batch["endpoint"]
        self._total, errors = await self.service.run_with_files(
            errors_of, rows_of(path, most), endpoint, most
        )
        if errors:
            await self._fail(errors)
            return False
        await self._change({})
        await self._change(
            {"status": "in_progress", "in_progress_at": int(time.time())}, unless=("cancelling", *ENDED)
        )
        return True

    async def _fail(self, errors: Sequence[BatchError]) -> None:
        files = await self.service.run_with_files(self._show_files)
        found = {"object": "list", "data": errors}
        await self._change({"status": "failed", "failed_at": int(time.time()), "errors": found, **files})

    async def _answer_lines(self) -> None:
        """Answer the lines that are left, as its key has turns, until all are or it is time to stop."""
        lines, running = self._unanswered(), set[asyncio.Task[None]]()
        try:
            while await self._has_turn():
                line = await self._take_line(lines)
                if line is None:
                    break
                running.add(task := asyncio.create_task(self._answer(line)))
                task.add_done_callback(lambda done: None if _has_failed(done) else running.discard(done))
            await asyncio.gather(*running)
        except BaseException:
            self.halt.set()
            await asyncio.gather(*running, return_exceptions=True)
            raise

    async def _has_turn(self) -> bool:
        """Wait for a turn; returns whether there is one, which is not so when it is time to stop."""
        try:
            await unless(self.halt, self.turns.take(self.stored.owner))
        except Interrupted:
            return False
        if self.halt.is_set():
            self.turns.release(self.stored.owner)
        return not self.halt.is_set()

    async def _take_line(self, lines: Iterator[Line]) -> Line | None:
        """The next line, whose turn `_answer` ends; None, without the turn, where there is none."""
        line: Line | None = None
        try:
            line = await self.service.run_with_files(next, lines, None)
        finally:
            if line is None:
                self.turns.release(self.stored.owner)
        return line

    async def _answer(self, line: Line) -> None:
        """Answer a line, and write the answer. Its turn ends, and with an error all of the batch."""
        try:
            answer = await self.answers.answer(
                self._current_caller, self.batch["endpoint"], self.id, line, self.halt
            )
            request = f"batch_req_{line_key(self.id, line)}"
            row = answered_line(request, line.custom_id, answer.status, answer.request_id, answer.body)
            kind: Kind = "output" if answer.status == 200 else "error"
            await self.service.run_with_files(self._write, kind, row)
        except Interrupted:
            if not self.halt.is_set():  # the server ends: the line is asked when the batch goes on
                self.interrupt()
        except BaseException:
            self.halt.set()
            raise
        finally:
            self.turns.release(self.stored.owner)

    async def _current_caller(self) -> Caller:
        """Whose batch it is, with what its key may do now. Raises `Interrupted` where it may do nothing."""
        recall = self.service.authenticator.recall
        try:
            caller = await self.service.run_in_thread(recall, self.stored.caller, self.stored.scope)
        except APIError:
            message = "the key of this batch was revoked, or there are keys now and it had none"
            self._failure = _error("invalid_api_key", message)
            self.halt.set()
            raise Interrupted from None
        if caller is None:  # the batch of another server
            self.interrupt()
            raise Interrupted
        return caller

    def _unanswered(self) -> Iterator[Line]:
        path = self.store.content_path(self.batch["input_file_id"])
        try:
            for line in lines_of(rows_of(path)):
                if id_digest(line.custom_id) not in self._finished:
                    yield line
        except InputError as error:
            raise _InputChanged(str(error)) from None

    # --- the journal, in threads --------------------------------------------------------------------------

    def _recall(self) -> None:
        """Read what was answered before."""
        for kind, journal in self._journals.items():
            for _, row in journal.lines():
                self._note(kind, json.loads(row))

    def _write(self, kind: Kind, row: Mapping[str, Any]) -> None:
        with self._write_lock:
            self._journals[kind].append_line(output_row(row))
            self._note(kind, row)

    def _note(self, kind: str, row: Mapping[str, Any]) -> None:
        """Count a line that is written."""
        self._finished.add(id_digest(row["custom_id"]))
        self._counts[kind] += 1
        if kind == "output":
            self._usage = batch_usage((self._usage, row["response"]["body"].get("usage") or {}))

    # --- the end ------------------------------------------------------------------------------------------

    async def _finalize(self) -> None:
        """Write errors for the lines without an answer, and show the files. Can be repeated after a kill."""
        finalizing = {"finalizing_at": int(time.time())}
        if not self.is_incomplete:
            finalizing["status"] = "finalizing"  # type: ignore[assignment]
        await self._change(finalizing, unless=("cancelling", *ENDED))
        status: Status = "expired" if self.is_incomplete else "completed"
        status = "cancelled" if self.batch["status"] == "cancelling" else status
        if self.is_incomplete:
            await self.service.run_with_files(self._write_unanswered, *_UNANSWERED[status])
        files = await self.service.run_with_files(self._show_files)
        await self._change({**files, "status": status, f"{status}_at": int(time.time())})

    def _write_unanswered(self, code: str, message: str) -> None:
        for line in self._unanswered():
            request = f"batch_req_{line_key(self.id, line)}"
            self._write("error", unanswered_line(request, line.custom_id, code, message))

    def _show_files(self) -> dict[str, str | None]:
        """Put the two files on the disk and give them to the owner; their ids as fields of the batch."""
        shown: dict[str, str | None] = {"output_file_id": None, "error_file_id": None}
        for kind, journal in self._journals.items():
            if journal.path.exists():
                journal.sync()
                name = f"{self.id}_{kind}.jsonl"
                seconds = self.stored.output_seconds
                self.store.register_output(journal.path.name, self.stored.owner, name, seconds)
                shown[f"{kind}_file_id"] = journal.path.name
        return shown

    async def _change(self, changes: Mapping[str, Any], unless: Sequence[Status] = ENDED) -> None:
        """Change the batch as it is stored, its progress included, and take over what others changed."""
        counts = {
            "total": self._total,
            "completed": self._counts["output"],
            "failed": self._counts["error"],
        }
        changed = {"request_counts": counts, "usage": self._usage, **changes}
        async with self._change_lock:
            stored = await self.service.run_in_thread(
                lambda: self.store.update(self.id, changed, unless=unless)
            )
            if stored is None:  # the database was removed
                self.interrupt()
            else:
                self.batch = stored


def _has_failed(task: asyncio.Task[None]) -> bool:
    return not task.cancelled() and task.exception() is not None


def _error(code: str, message: str) -> BatchError:
    return {"code": code, "message": message, "param": None, "line": None}
