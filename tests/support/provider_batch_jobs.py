"""A job of which half the rows wait for a provider's batches: its settings, and a server of killed runs.

    python provider_batch_jobs.py

reads one run a line from stdin, as JSON (see `serve`), and does each in a fork of its own, which starts at
once because everything is imported already. It prints the fork's pid and then its exit code.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batch_provider import INPUT_TOKENS, OUTPUT_TOKENS, BatchProvider, spec_for

import viaticum.agents.batch.provider_batches as provider_batches
from viaticum.agents.batch import job_folder, run_batch
from viaticum.agents.batch.batch_records import BatchJournal
from viaticum.agents.batch.output import RowJournal
from viaticum.agents.batch.run import BatchEnd
from viaticum.budgets import Ledger
from viaticum.catalogue import Catalogue, ModelSpec
from viaticum.jobs import Job, JobRow, read_rows
from viaticum.models.base import Generation
from viaticum.models.remote.batch_anthropic import AnthropicBatches
from viaticum.models.remote.batch_api import BatchAPI
from viaticum.models.remote.batch_endpoints import open_batch_api
from viaticum.models.remote.batch_lines import request_body
from viaticum.models.remote.batch_openai import OpenAIBatches
from viaticum.models.remote.model import RemoteModel
from viaticum.routers.query import QueryRouter
from viaticum.types import Pair, Query, RoutingTable, Row

LATE, NOW = Pair("late", "direct"), Pair("now", "direct")
COST = INPUT_TOKENS * 1_000 + OUTPUT_TOKENS * 4_000  # nano-dollars of a call at the full price
# Moments of a run that a kill may come before or after.
POINTS: tuple[tuple[type, str], ...] = (
    (Ledger, "reserve_many"),
    (BatchJournal, "prepare"),
    (BatchAPI, "upload"),
    (BatchJournal, "uploaded"),
    (BatchAPI, "create"),
    (BatchJournal, "created"),
    (BatchAPI, "results"),
    (Ledger, "settle_many"),
    (Ledger, "void"),
    (BatchJournal, "collected"),
    (RowJournal, "write"),
)


def hurry() -> None:
    """Let the job look after its batches as fast as the stub is."""
    provider_batches.FIRST_LOOK, provider_batches.LONGEST_LOOK = 0.02, 0.1
    provider_batches.LISTING_SECONDS = 0.3


class HalfRouter(QueryRouter):
    """Sends even numbers to the model that has batches, odd ones to the other."""

    def __init__(self, *, every: bool = False) -> None:
        self.every = every
        self._tables = [
            RoutingTable(
                (
                    Row(LATE, 0.9 if late else 0.1, OUTPUT_TOKENS, OUTPUT_TOKENS, COST, COST),
                    Row(NOW, 0.1 if late else 0.9, OUTPUT_TOKENS, OUTPUT_TOKENS, COST, COST),
                )
            )
            for late in (False, True)
        ]

    def table(self, query: Query) -> RoutingTable:
        number = int(query.text.partition("What is ")[2].split()[0])
        return self._tables[self.every or number % 2 == 0]


def specs(url: str, form: str, **changed: Any) -> list[ModelSpec]:
    server: Any = type("At", (), {"url": url})
    return [spec_for(server, "late", form, **changed), spec_for(server, "now", "none")]


def run_job(folder: Path, url: str, form: str = "openai", **settings: Any) -> BatchEnd:
    """Begin the job of FOLDER/in.jsonl, or go on with it."""
    wanted: dict[str, Any] = {
        "budget": "5",
        "resume": True,
        "ledger": folder / "ledger.db",
        "catalogue": Catalogue(specs(url, form)),
        "router": HalfRouter(),
        "policy": "best",
        "deadline": 60.0,
        "concurrency": 8,
    }
    return run_batch(folder / "in.jsonl", folder / "out.jsonl", **{**wanted, **settings})


@dataclass(frozen=True)
class Found:
    """What a job left, beside what its provider bills.

    Args:
        rows, missing: rows that are done; rows that are not.
        late: rows that a batch has answered.
        free: billed and not in the ledger. double: in the ledger and not billed, or billed twice in batches.
        unknown: holds of which it is not known whether they are billed.
        posted, billed: nano-dollars, by the ledger and by the provider.
        planned: nano-dollars that the plan expected of the rows.
    """

    rows: int
    missing: int
    late: int
    free: int
    double: int
    unknown: int
    posted: int
    billed: int
    planned: int
    findings: int


def compare(folder: Path, server: BatchProvider, rows: int) -> Found:
    """Compare the ledger with the provider's own count, call by call."""
    job = job_folder(folder / "out.jsonl")
    scope = Job.load(job).budget
    with Ledger(folder / "ledger.db") as ledger:
        findings = len(ledger.check())
        holds = ledger.holds(scope)
        posts = [entry for entry in ledger.entries(scope) if entry.kind == "post"]
    numbers = {f"q{number}": number for number in range(rows)}

    def call_of(hold: Any) -> tuple[str, str, int]:
        way = "batch" if "provider_batch" in hold.tags else "direct"
        return way, hold.tags["model"], numbers[hold.key.split("/")[1]]

    paid = {entry.key for entry in posts if entry.nanousd}
    posted = Counter(call_of(each) for each in holds if each.key in paid)
    unknown = Counter(call_of(each) for each in holds if each.state in ("unknown", "dispatched"))
    made = server.paid
    done = list(read_rows(job))
    twice = sum(count - 1 for (way, _, _), count in made.items() if way == "batch" and count > 1)
    billed = sum(count * (COST // 2 if way == "batch" else COST) for (way, _, _), count in made.items())
    return Found(
        len(done),
        len(set(range(rows)) - {row.number for row in done}),
        sum(way == "batch" for way, _, _ in posted),
        (made - posted - unknown).total(),
        (posted - made).total() + twice + len(done) - len({row.number for row in done}),
        unknown.total(),
        sum(entry.nanousd for entry in posts),
        billed,
        sum(row.cost_p50 or 0 for row in done),
        findings,
    )


def rows_in(folder: Path) -> list[JobRow]:
    return sorted(read_rows(job_folder(folder / "out.jsonl")), key=lambda row: row.number)


# --- runs that are killed -------------------------------------------------------------------------


def die_at(point: int, form: str, occurrence: int = 0) -> None:
    """Kill this process before (even) or after (odd) an occurrence of a step, counted from 0."""
    kind, name = POINTS[point // 2]
    if kind is BatchAPI:
        kind = AnthropicBatches if form == "anthropic" else OpenAIBatches
    method: Callable[..., Any] = getattr(kind, name)
    passed = [0]

    @functools.wraps(method)
    def counted(*args: Any, **kwargs: Any) -> Any:
        passed[0] += 1
        dies = passed[0] > occurrence
        if dies and point % 2 == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        result = method(*args, **kwargs)
        if dies:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(kind, name, counted)


class JobServer:
    """Runs the job in processes that can be killed."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._stdin, self._stdout = process.stdin, process.stdout

    def start(self, folder: Path, url: str, form: str, point: int | None = None, occurrence: int = 0) -> int:
        """Begin a run, which dies at a point; returns its process."""
        self._stdin.write(json.dumps([str(folder), url, form, point, occurrence]) + "\n")
        self._stdin.flush()
        return int(self._stdout.readline())

    def ended(self) -> int:
        """The exit code of the run."""
        return int(self._stdout.readline())


@contextmanager
def job_server() -> Iterator[JobServer]:
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, __file__], text=True, **pipes) as process:
        yield JobServer(process)
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(120) == 0


def serve() -> None:
    """Do one run a line of stdin, [folder, address, form, point or None, occurrence], each in a fork."""
    for form in ("openai", "anthropic"):  # loads what LiteLLM loads at a first call: the forks have it
        model = RemoteModel(specs("http://127.0.0.1:9", form)[0])
        request_body(model, [{"role": "user", "content": "What is 1 + 2?"}], Generation(1))
        open_batch_api(model.spec).close()
    hurry()
    for line in sys.stdin:
        folder, url, form, point, occurrence = json.loads(line)
        child = os.fork()
        if not child:
            code = 1
            try:
                sys.stdout.write(f"{os.getpid()}\n")
                sys.stdout.flush()
                if point is not None:
                    die_at(point, form, occurrence)
                run_job(Path(folder), url, form)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(code)
        _, status = os.waitpid(child, 0)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(status)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    serve()
