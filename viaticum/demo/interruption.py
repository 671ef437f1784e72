"""A batch with too little money for all its rows, killed while it runs, and resumed: what the ledger says.

The batch is `viaticum batch` in a process of its own, so that the kill is a real one (SIGKILL). Leaves out
how a batch plans and resumes (`viaticum.agents.batch`).
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from viaticum.budgets import Ledger
from viaticum.errors import ModelError
from viaticum.jobs import Job
from viaticum.money import usd_digits
from viaticum.signals import interrupt_deferred

AT_ONCE = 4  # calls, some of which the kill finds under way
KILL_SHARE = 0.125  # of the rows, after which the process is killed
Report = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True)
class LedgerState:
    """What a ledger says of a job.

    Args:
        posted: nano-dollars by call.
        posts: entries that posted them.
        under_way: calls that are not settled.
        held: nano-dollars held for those.
    """

    posted: Mapping[str, int]
    posts: int
    under_way: int
    held: int

    @property
    def spent(self) -> int:
        return sum(self.posted.values())


@dataclass(frozen=True)
class Interruption:
    """A job that was killed and resumed.

    Args:
        rows_at_kill: rows that were done then; None where the job ended before it could be killed.
        before, after: the ledger at the kill and at the end.
        figures: the job's last event.
        seconds: from the start of the process that resumed to its end.
        findings: what an audit of the ledger found; nothing where every limit held.
    """

    rows_at_kill: int | None
    before: LedgerState
    after: LedgerState
    figures: Mapping[str, Any]
    seconds: float
    findings: Sequence[str]

    @property
    def paid_twice(self) -> int:
        """Calls that were charged more than once, or whose charge of before the kill changed."""
        changed = sum(self.after.posted.get(key) != amount for key, amount in self.before.posted.items())
        return changed + self.after.posts - len(self.after.posted)


@dataclass
class InterruptedBatch:
    """The job. Every process that it starts ends with `close`.

    Args:
        questions: a file of questions with answers.
        folder: where results and log go.
        ledger: the file of the ledger.
        limit: nano-dollars for all rows.
        options: further ones of `viaticum batch`.
    """

    questions: Path
    folder: Path
    ledger: Path
    limit: int
    options: Sequence[str] = ()
    _process: subprocess.Popen[str] | None = field(default=None, repr=False)

    @property
    def results(self) -> Path:
        return self.folder / "answers.jsonl"

    @property
    def command(self) -> list[str]:
        """The command line of the job, without --resume."""
        return [
            *("viaticum", "batch", str(self.questions), "--out", str(self.results)),
            *("--budget", usd_digits(self.limit), "--ledger", str(self.ledger)),
            *("--concurrency", str(AT_ONCE), *self.options),
        ]

    def run(self, report: Report) -> Interruption:
        """Start the job, kill it, resume it.

        report: called with the job's events, and with "killed" in between.

        Raises:
            ModelError: a process ended with an error.
        """
        at_kill, figures = self._run_until_kill(report)
        before, began = self._state(), time.perf_counter()
        if at_kill is not None:
            report({"event": "killed", "under_way": before.under_way, "spent_nanousd": before.spent})
            figures = self._run_to_end("--resume", report=report)
        seconds = time.perf_counter() - began
        with Ledger(self.ledger, read_only=True) as ledger:
            findings = ledger.check()
        return Interruption(at_kill, before, self._state(), figures, seconds, findings)

    def close(self) -> None:
        """End the process that runs, if any."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            if self._process.stdout is not None:
                self._process.stdout.close()
            self._process = None

    def _run_until_kill(self, report: Report) -> tuple[int | None, Mapping[str, Any]]:
        """The rows that were done when it was killed, None where it ended before; and its last event."""
        event: Mapping[str, Any] = {}
        for event in self._events():
            report(event)
            if event["event"] == "progress" and KILL_SHARE * event["rows"] <= event["done"] < event["rows"]:
                self.close()
                return int(event["done"]), event
        self._end()
        return None, event

    def _run_to_end(self, *more: str, report: Report) -> Mapping[str, Any]:
        last: Mapping[str, Any] = {}
        for last in self._events(*more):
            report(last)
        self._end()
        return last

    def _events(self, *more: str) -> Iterator[Mapping[str, Any]]:
        """Start a process of the job and yield what it tells."""
        program, *arguments = self.command
        with self._log.open("a", encoding="utf-8") as log, interrupt_deferred():
            self._process = subprocess.Popen(
                [sys.executable, "-m", program, *arguments, "--json", *more],
                stdout=subprocess.PIPE,
                stderr=log,
                stdin=subprocess.DEVNULL,
                text=True,
                start_new_session=True,  # Ctrl-C reaches this process alone, which then ends that one
            )
        assert self._process.stdout is not None
        for line in self._process.stdout:
            yield json.loads(line)

    @property
    def _log(self) -> Path:
        return self.folder / "batch.log"

    def _end(self) -> None:
        """Wait for the process, whose output has ended. Raises `ModelError` where it failed."""
        assert self._process is not None
        code = self._process.wait()
        self.close()
        if code:
            written = self._log.read_text(encoding="utf-8").strip().splitlines()
            raise ModelError(
                f"the batch ended with exit code {code}: {written[-1] if written else 'no output'}"
            )

    def _state(self) -> LedgerState:
        scope = Job.load(f"{self.results}.job").budget
        with Ledger(self.ledger, read_only=True) as ledger:
            posts = Counter[str]()
            posted: dict[str, int] = {}
            for entry in ledger.entries(scope):
                if entry.kind == "post" and entry.key is not None:
                    posts[entry.key] += 1
                    posted[entry.key] = posted.get(entry.key, 0) + entry.nanousd
            under_way = ledger.holds(scope, "dispatched")
            return LedgerState(posted, posts.total(), len(under_way), ledger.budget(scope).held_nanousd)
