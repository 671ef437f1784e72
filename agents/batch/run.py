"""A batch: a file of questions and an amount of money; as many right answers as it buys, never more spent, all of it shown.

    run_batch("questions.jsonl", "answers.jsonl", budget="20")

A job has a folder beside its results (see `viaticum.jobs`) and a budget of its own in the ledger, whose name begins all
its keys. Killed at any moment and run again with `resume=True` it goes on: what was paid for is found by its key, and the
journal says which rows are done. Rows that the plan leaves out are looked at again where money is left at the end.

Leaves out formats (`batch_input`, `batch_output`), planning (`batch_plan`) and asking (`batch_rows`).
"""

from __future__ import annotations

import gc
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from viaticum.agents.batch.cache import Cache
from viaticum.agents.batch.engines import Engine, Process, engine_for
from viaticum.agents.batch.input import BatchRow, Input, Survey, mark_duplicates, survey
from viaticum.agents.batch.job_folder import (
    acquire_job_lock,
    check_fingerprint,
    clear_folder,
    fingerprint,
    job_folder,
    now,
    parse_budget,
    prepare_folder,
    resolve_limit,
    version,
    without_password,
    without_plan,
)
from viaticum.agents.batch.output import RowJournal, format_for, write_results
from viaticum.agents.batch.planning import PACED, PlannedRow, RouteEstimates, RowPlanner
from viaticum.agents.batch.progress import EventSink, Progress
from viaticum.agents.batch.results import build_row
from viaticum.agents.batch.steps import CONCURRENCY, DRAIN_SECONDS, RowTools, worst_of
from viaticum.agents.batch.workers import Cluster, WorkerConfig
from viaticum.agents.build import open_resources
from viaticum.agents.workflow.graph import WorkflowResources
from viaticum.agents.workflow.settings import TRIES, Dollars, WorkflowSettings
from viaticum.budgets import Ledger, default_path
from viaticum.catalogue import Catalogue
from viaticum.errors import BudgetError, DataError, InputError, UnknownName
from viaticum.jobs import JOB, Job, JobEnd, Preview
from viaticum.models.base import Model
from viaticum.money import format_usd
from viaticum.routers.query import Plan, QueryRouter

__all__ = ["BatchEnd", "DryRun", "job_folder", "preview_batch", "run_batch"]

SAMPLE = 2000  # rows that prices are made from
FIRST_ROWS = 16  # of them, for what the cheapest call may cost
BUDGET_SHARES = (0.25, 0.5, 1.0, 2.0, 4.0)  # of the budget, in the preview
PASSES = 3


@dataclass(frozen=True)
class BatchEnd:
    """How a job ended, and its figures (see `Progress.figures`)."""

    job: Job
    folder: Path
    figures: dict[str, Any]


def run_batch(
    source: str | Path,
    out: str | Path,
    *,
    budget: Dollars | None = None,
    policy: str = PACED,
    deadline: float | None = None,
    engine: Engine = "local",
    cluster: Cluster | None = None,
    resume: bool = False,
    force: bool = False,
    skip_bad: bool = False,
    skip: int = 0,
    limit: int | None = None,
    format: str | None = None,
    catalogue: Catalogue | str | Path | None = None,
    router: QueryRouter | str | Path | None = None,
    models: Mapping[str, Model] | None = None,
    ledger: str | Path | None = None,
    cache: str | Path | None = None,
    concurrency: int = CONCURRENCY,
    slots: int | None = None,
    timeout: float | None = None,
    tries: int = TRIES,
    keep_texts: bool = False,
    drain_seconds: float = DRAIN_SECONDS,
    stop: threading.Event | None = None,
    tell: EventSink = lambda event: None,
) -> BatchEnd:
    """Answer the questions of a file within a budget, and write the results.

    source: plain JSONL, OpenAI's batch format, CSV or Parquet; skip, limit: of its rows. budget: dollars for all of it,
    needed but to go on. policy: "paced", or as of `Viaticum`. deadline: seconds, after which no row is begun. resume: go
    on with a job that was interrupted, or that has more money now; force: start over. skip_bad: leave out rows that cannot be used
    instead of refusing the file. ledger: a path or a `postgresql://` address; cache: a file of answers to share between
    jobs. concurrency: calls at once, of each worker with engine="ray"; cluster: of that. slots: texts that a local model
    writes at once, as many by default. stop: set to end in order, within `drain_seconds`. tell: is given an event now and then.

    Raises `InputError` for files, settings and fingerprints that do not fit, `DataError` for rows, `BudgetError` where the
    money or the ledger is not there, and what concerns every row, such as `AuthenticationFailed`; what is done then stays.
    """
    given, out = Input.open(source, format=format, skip=skip, limit=limit), Path(out)
    if concurrency < 1:
        raise InputError(f"concurrency is at least 1, got {concurrency}")
    if deadline is not None and not deadline > 0:
        raise InputError(f"a deadline is above zero seconds, got {deadline}")
    address = default_path() if ledger is None else ledger
    if engine == "ray" and cluster is None:
        cluster = Cluster()
    engine_of = engine_for(engine, cluster, str(address))
    with ExitStack() as stack:
        folder = prepare_folder(out, resume=resume, force=force)  # with all that an older job left there
        stack.enter_context(acquire_job_lock(folder))
        books = stack.enter_context(Ledger(address))
        before = Job.load(folder) if resume and (folder / JOB).exists() else None
        scope = before.budget if before is not None else f"batch-{uuid.uuid4().hex[:12]}"
        settings = WorkflowSettings(
            budget_name=scope,
            catalogue=catalogue,
            router=router,
            models=models,
            timeout=timeout,
            tries=tries,
            concurrency=concurrency,
            slots=slots,
        )
        tools = _tools(budget, before, settings, books)
        stack.callback(tools.threads.close)
        job = Job(
            input=str(given.path),
            results=str(out),
            rows=0,
            budget=scope,
            limit_nanousd=resolve_limit(budget, before),
            ledger=without_password(str(address)),
            policy=policy,
            engine=engine,
            deadline_seconds=deadline,
            began=before.began if before else now(),
            fingerprint=fingerprint(given, tools, router, policy),
            version=version(),
        )
        if before is not None:
            check_fingerprint(before, job, folder)
        rows = RowTools(
            tools,
            scope,
            concurrency=concurrency * (1 if cluster is None else cluster.workers),
            keep_texts=keep_texts,
            drain_seconds=drain_seconds,
            stop=stop or threading.Event(),
        )
        process = engine_of(WorkerConfig(str(address), scope, settings, concurrency, keep_texts))
        run = _Run(given, out, folder, job, rows, process, skip_bad, tell, new=before is None)
        return run.run(stack, budget, cache)


class _Run:
    """One run of a job, from its input to its results."""

    def __init__(
        self,
        given: Input,
        out: Path,
        folder: Path,
        job: Job,
        rows: RowTools,
        process: Process,
        skip_bad: bool,
        tell: EventSink,
        *,
        new: bool,
    ) -> None:
        self.given, self.out, self.folder, self.job, self.rows = given, out, folder, job, rows
        self.process, self.skip_bad, self.tell, self.new = process, skip_bad, tell, new
        self.ledger = rows.tools.ledger
        self._began = time.monotonic()
        self._past_deadline = False
        self._duplicates: dict[int, str] = {}

    def run(self, stack: ExitStack, budget: Dollars | None, cache: str | Path | None) -> BatchEnd:
        self.tell({"event": "reading", "input": self.job.input})
        found = survey(self.given.rows(), lambda number: False, SAMPLE)
        self._check(found)
        self._duplicates = found.again
        self.job = replace(self.job, rows=found.rows)
        planner = self._planner()
        shared = stack.enter_context(Cache(cache, self.rows.tools.catalogue)) if cache is not None else None
        self._open_budget(budget, found, planner)
        previews = planner.previews([*found.sample], found.pending, self._budgets()) if found.pending else []
        self.job = replace(self.job, previews=tuple(previews))
        if self.new:
            clear_folder(self.folder)
        self._save()
        journal = RowJournal(self.folder, found.rows)
        stack.callback(journal.close)
        own = shared or stack.enter_context(Cache(self.folder / "cache.db", self.rows.tools.catalogue))
        self.rows = replace(self.rows, cache=own)
        self.progress = Progress(
            self.tell, self.ledger, self.job.budget, found.rows, journal.counts, planner.forecast
        )
        self.progress.now("started")
        with _without_old_objects():
            ending = self._work(journal, found, planner)
            self._finish(journal, ending)
        figures = self.progress.figures()
        self.tell({"event": "ended", "ending": ending, "results": self.job.results, **figures})
        return BatchEnd(self.job, self.folder, figures)

    # --- before ---------------------------------------------------------------------------------------------

    def _check(self, found: Survey) -> None:
        if not found.rows:
            raise DataError(f"{self.given.path}: no rows; write one object with a question a line")
        if found.bad and not self.skip_bad:
            more = f"; and {found.bad - len(found.problems)} more" if found.bad > len(found.problems) else ""
            raise DataError(
                f"{found.bad} of {found.rows} rows cannot be used: {'; '.join(found.problems)}{more}. Correct them, "
                "or leave them out with --skip-bad"
            )

    def _planner(self) -> RowPlanner:
        tools = self.rows.tools
        return RowPlanner(
            RouteEstimates(tools.router, tools.is_usable),
            self.job.policy,
            left=self._unspent,
            elapsed=self._elapsed,
            worst=partial(worst_of, tools),
            deadline=self.job.deadline_seconds,
            concurrency=self.rows.concurrency,
        )

    def _open_budget(self, budget: Dollars | None, found: Survey, planner: RowPlanner) -> None:
        """Make the budget of a new job, or give one that goes on its new limit."""
        limit = self.job.limit_nanousd
        assert limit is not None
        if budget is None:
            return
        if not self.new:
            self.ledger.set_limit(self.job.budget, limit_nanousd=limit)
            return
        self._check_budget_suffices(limit, found, planner)
        self.ledger.create(self.job.budget, limit_nanousd=limit)

    def _check_budget_suffices(self, limit: int, found: Survey, planner: RowPlanner) -> None:
        """Raises `BudgetError` where not one call of the first rows fits."""

        least: tuple[int, str] | None = None
        for _, row in found.sample[:FIRST_ROWS]:
            assert row.query is not None
            if row.overrides is not None and row.overrides.model != "auto":
                pairs = list(planner.named_plan(row).pairs)
            else:
                pairs = list(
                    {pair for each in planner.estimates.of(row.query)[0] for pair in each.plan.pairs}
                )
            for pair in pairs:
                try:
                    cost = worst_of(self.rows.tools, replace(without_plan(row), plan=Plan((pair,))))
                except InputError:
                    continue
                if least is None or cost < least[0]:
                    least = (cost, str(pair))
                if cost <= limit:
                    return
        if least is not None:
            raise BudgetError(
                f"a budget of {format_usd(limit)} does not pay for one row: the cheapest call ({least[1]}) may cost "
                f"{format_usd(least[0])}; give more"
            )

    def _budgets(self) -> list[int]:
        assert self.job.limit_nanousd is not None
        return [max(1, round(self.job.limit_nanousd * share)) for share in BUDGET_SHARES]

    # --- passes over the input ------------------------------------------------------------------------------

    def _work(self, journal: RowJournal, found: Survey, planner: RowPlanner) -> JobEnd:
        """Pass over the rows that are not done, while it brings any further; then say why the others are left out."""
        self._skip_bad_rows(journal, found)
        why: dict[str, int] = {}
        for number in range(PASSES):
            if journal.counts.done or number:
                found = survey(self._usable_rows(), journal.is_done, SAMPLE, seed=number)
            if not found.pending:
                break
            planner.begin(found.sample, found.pending)
            before, why = journal.counts.done, self._pass(journal, planner)
            if self.rows.stop.is_set():
                return "drained"
            if self._past_deadline or not why or journal.counts.done == before or self._unspent() <= 0:
                break
        return self._skip_remaining(journal, why)

    def _pass(self, journal: RowJournal, planner: RowPlanner) -> dict[str, int]:
        """One pass; returns why rows were left out, with how many."""
        why: dict[str, int] = {}
        planned = planner.plan(self._pending(journal))
        for plan, row in self.process(self._until_deadline(planned), self.rows):
            planner.settled(plan, row)
            if row.state == "skipped":
                why[row.reason] = why.get(row.reason, 0) + 1
            else:
                journal.write(row)
            self.progress.report_if_due()
        return why

    def _usable_rows(self) -> Iterator[BatchRow]:
        return (row for row in mark_duplicates(self.given.rows(), self._duplicates))

    def _pending(self, journal: RowJournal) -> Iterator[BatchRow]:
        for row in self._usable_rows():
            if not row.problem and not journal.is_done(row.number):
                yield row

    def _until_deadline(self, planned: Iterator[PlannedRow | None]) -> Iterator[PlannedRow | None]:
        """Until the deadline: rows are planned in blocks, long before there is room for the last of one."""
        for each in planned:
            if self.job.deadline_seconds is not None and self._elapsed() > self.job.deadline_seconds:
                self._past_deadline = True
                return
            yield each

    def _skip_bad_rows(self, journal: RowJournal, found: Survey) -> None:
        if not found.bad:
            return
        for row in self._usable_rows():
            if row.problem and not journal.is_done(row.number):
                journal.write(build_row(without_plan(row), "skipped", row.problem))

    def _skip_remaining(self, journal: RowJournal, why: Mapping[str, int]) -> JobEnd:
        """Write down the rows that are not done, with the reason of most."""
        if journal.counts.done == self.job.rows:
            return "completed"
        reason = max(why, key=lambda each: why[each]) if why else "nothing was left to pay for it"
        if self._past_deadline:
            reason = f"the deadline of {self.job.deadline_seconds:g} seconds passed"
        for row in self._usable_rows():
            if not journal.is_done(row.number):
                journal.write(build_row(without_plan(row), "skipped", reason))
                self.progress.report_if_due()
        return "deadline" if self._past_deadline else "budget_exhausted"

    # --- the end --------------------------------------------------------------------------------------------

    def _finish(self, journal: RowJournal, ending: JobEnd) -> None:
        journal.sync()
        if ending != "drained":
            kind = format_for(self.out, self.given.format)
            write_results(self.out, kind, journal.in_order(), self.job.budget)
        self.job = replace(self.job, ending=ending, ended=now())
        self._save()

    def _save(self) -> None:
        self.job.save(self.folder)

    def _elapsed(self) -> float:
        return time.monotonic() - self._began

    def _unspent(self) -> int:
        """What of the limit is not posted yet."""
        budget = self.ledger.budget(self.job.budget)
        return max(0, (budget.left_nanousd or 0) + budget.held_nanousd)


@contextmanager
def _without_old_objects() -> Iterator[None]:
    """Python's collector leaves alone what is there by now, which stays: to walk over all modules time and again takes
    an eighth of a quick job's time. Nothing is changed where somebody else has frozen objects, whose end is not ours."""
    if gc.get_freeze_count():
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@dataclass(frozen=True)
class DryRun:
    """What a job would come to. rows, bad: of the input; previews: at several budgets."""

    rows: int
    bad: int
    problems: tuple[str, ...]
    previews: tuple[Preview, ...]


def preview_batch(
    source: str | Path,
    *,
    budget: Dollars,
    policy: str = PACED,
    deadline: float | None = None,
    skip: int = 0,
    limit: int | None = None,
    format: str | None = None,
    catalogue: Catalogue | str | Path | None = None,
    router: QueryRouter | str | Path | None = None,
    models: Mapping[str, Model] | None = None,
    concurrency: int = CONCURRENCY,
) -> DryRun:
    """What the budget, and others around it, would buy. Asks no model and touches no ledger. Raises as `run_batch`."""
    given = Input.open(source, format=format, skip=skip, limit=limit)
    amount = parse_budget(budget)
    with Ledger("memory:") as books:
        settings = WorkflowSettings(catalogue=catalogue, router=router, models=models, concurrency=1)
        tools = open_resources(settings, books)
        planner = RowPlanner(
            RouteEstimates(tools.router, tools.is_usable),
            policy,
            left=lambda: amount,
            elapsed=lambda: 0.0,
            worst=partial(worst_of, tools),
            deadline=deadline,
            concurrency=concurrency,
        )
        found = survey(given.rows(), lambda number: False, SAMPLE)
        budgets = [max(1, round(amount * share)) for share in BUDGET_SHARES]
        previews = planner.previews(found.sample, found.pending, budgets) if found.pending else []
        return DryRun(found.rows, found.bad, tuple(found.problems), tuple(previews))


def _tools(
    budget: Dollars | None, before: Job | None, settings: WorkflowSettings, books: Ledger
) -> WorkflowResources:
    """The workflow's tools, over the job's budget, which is made only once all else is right."""
    resolve_limit(budget, before)
    tools = open_resources(settings, books)
    if before is not None:
        try:
            books.budget(before.budget)
        except UnknownName:
            raise InputError(
                f"this ledger has no budget {before.budget!r}; give the ledger that the job began with ({before.ledger})"
            ) from None
    return tools
