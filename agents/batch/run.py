"""Run a batch job: answer a file of questions within a budget.

    run_batch("questions.jsonl", "answers.jsonl", budget="20")

A job has a folder beside its results (see `viaticum.jobs`) and a budget of its own in the ledger, whose name
is the prefix of all its keys. A job that was killed goes on with `resume=True`: calls that were paid for are
found by their keys, and the journal says which rows are done. Rows that the plan left out are planned again
where money is left.

Leaves out formats (`agents.batch.input`, `agents.batch.output`), planning (`agents.batch.planning`),
forecasts (`agents.batch.preview`) and calls (`agents.batch.executor`).
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
from typing import Any, Unpack

from viaticum.agents.batch.cache import Cache
from viaticum.agents.batch.engines import Process, engine_for
from viaticum.agents.batch.folder import (
    acquire_job_lock,
    check_fingerprint,
    clear_folder,
    fingerprint,
    job_folder,
    now,
    prepare_folder,
    resolve_limit,
    version,
    without_password,
    without_plan,
)
from viaticum.agents.batch.input import BatchRow, Input, Survey, mark_duplicates, survey
from viaticum.agents.batch.output import RowJournal, format_for, write_results
from viaticum.agents.batch.plan_times import PlanTimes
from viaticum.agents.batch.planning import PlannedRow, RouteEstimates, RowPlanner
from viaticum.agents.batch.preview import BUDGET_SHARES, SAMPLE
from viaticum.agents.batch.progress import Progress
from viaticum.agents.batch.results import build_row
from viaticum.agents.batch.resume import recall, remember
from viaticum.agents.batch.settings import BatchKeywords, BatchSettings
from viaticum.agents.batch.shadow import ask_again, open_sampler, sampled_rows
from viaticum.agents.batch.soft_limits import watch_soft_limits
from viaticum.agents.batch.steps import RowTools, worst_of
from viaticum.agents.batch.workers import WorkerConfig
from viaticum.agents.build import open_resources
from viaticum.agents.workflow.estimates import output_limit
from viaticum.agents.workflow.resources import WorkflowResources
from viaticum.agents.workflow.settings import Dollars, WorkflowSettings
from viaticum.agents.workflow.shadow import ShadowSampler
from viaticum.budgets import Ledger
from viaticum.errors import BudgetError, DataError, InputError, ModelNotAllowed, UnknownName
from viaticum.jobs import CACHE, JOB, Job, JobEnd
from viaticum.money import format_usd
from viaticum.routers.query import Plan

__all__ = ["BatchEnd", "run_batch"]

FIRST_ROWS = 16  # of the sample, from which the cheapest call is found
PASSES = 3  # over the input at most


@dataclass(frozen=True)
class BatchEnd:
    """How a job ended, and its figures (see `Progress.figures`)."""

    job: Job
    folder: Path
    figures: dict[str, Any]


def run_batch(source: str | Path | None, out: str | Path, **keywords: Unpack[BatchKeywords]) -> BatchEnd:
    """Answer the questions of a file within a budget, and write the results.

    Args:
        source: plain JSONL, OpenAI's batch format, CSV or Parquet; None for that of a job that goes on.
        out: the results, in the format of its suffix; the job's folder is `out` + ".job".
        keywords: fields of `BatchSettings`. A job that goes on remembers those that are not given, but for
            objects such as models and routers.

    Raises:
        InputError: files, settings or the fingerprint of an earlier run do not fit.
        DataError: rows cannot be used.
        BudgetError: the money or the ledger is not there.
        ViaticumError: what concerns every row, such as `AuthenticationFailed`. What is done by then stays.
    """
    before = _earlier(Path(out), keywords)
    if before is not None:
        keywords = recall(keywords, before)  # type: ignore[assignment]
    settings = BatchSettings(**keywords)
    if source is None:
        if before is None:
            raise InputError("no input; give the questions of a new job: viaticum batch QUESTIONS.jsonl")
        source = before.input
    input_file = Input.open(source, format=settings.format, skip=settings.skip, limit=settings.limit)
    configure = engine_for(settings.engine, settings.cluster, settings.ledger_address)
    with ExitStack() as stack:
        folder = prepare_folder(Path(out), resume=settings.resume, force=settings.force)
        stack.enter_context(acquire_job_lock(folder))
        ledger = stack.enter_context(Ledger(settings.ledger_address))
        if before is not None:
            before = Job.load(folder)  # which another process may have changed until the lock
        scope = before.budget if before is not None else f"batch-{uuid.uuid4().hex[:12]}"
        workflow = settings.workflow(scope)
        resources = _open_resources(settings.budget, before, workflow, ledger)
        stack.callback(resources.threads.close)
        job = _describe(input_file, Path(out), settings, scope, before, resources)
        if before is not None:
            check_fingerprint(before, job, folder)
        rows = RowTools(
            resources,
            scope,
            concurrency=settings.concurrency * settings.workers,
            keep_texts=settings.keep_texts,
            drain_seconds=settings.drain_seconds,
            stop=settings.stop or threading.Event(),
        )
        config = WorkerConfig(
            settings.ledger_address, scope, workflow, settings.concurrency, settings.keep_texts
        )
        run = _Run(input_file, folder, job, rows, configure(config), settings, new=before is None)
        return run.run(stack)


def _describe(
    input_file: Input,
    out: Path,
    settings: BatchSettings,
    scope: str,
    before: Job | None,
    resources: WorkflowResources,
) -> Job:
    """What `job.json` says of the job when it starts. before: what an earlier run of it wrote there."""
    return Job(
        input=str(input_file.path),
        results=str(out),
        rows=0,
        budget=scope,
        limit_nanousd=resolve_limit(settings.budget, before),
        ledger=without_password(settings.ledger_address),
        policy=settings.policy,
        engine=settings.engine,
        deadline_seconds=settings.deadline,
        began=before.began if before else now(),
        fingerprint=fingerprint(input_file, resources, settings.router, settings.policy),
        version=version(),
        memory=remember(settings, resources),
    )


def _earlier(out: Path, keywords: BatchKeywords) -> Job | None:
    """What `job.json` says of the job that goes on; None where there is none."""
    folder = job_folder(out)
    return Job.load(folder) if keywords.get("resume") and (folder / JOB).exists() else None


class _Run:
    """One run of a job, from its input to its results."""

    def __init__(
        self,
        input_file: Input,
        folder: Path,
        job: Job,
        rows: RowTools,
        process: Process,
        settings: BatchSettings,
        *,
        new: bool,
    ) -> None:
        self.input_file, self.folder, self.job, self.rows = input_file, folder, job, rows
        self.process, self.settings, self.new = process, settings, new
        self.out = Path(job.results)
        self.ledger = rows.resources.ledger
        self._began = time.monotonic()
        self._past_deadline = False
        self._seen: tuple[int, ...] | None = None  # the input's state when it was last known to be the job's
        self._duplicates: dict[int, str] = {}

    def run(self, stack: ExitStack) -> BatchEnd:
        """Run the job to its end. stack: closes what is opened here."""
        tell = self.settings.tell
        tell({"event": "reading", "input": self.job.input})
        found = survey(self.input_file.rows(), lambda number: False, SAMPLE)
        self._check(found)
        self._duplicates = found.duplicates
        self.job = replace(self.job, rows=found.rows)
        planner = self._planner()
        shared = self._open_cache(stack, self.settings.cache) if self.settings.cache is not None else None
        self._open_budget(found, planner)
        previews = planner.previews([*found.sample], found.pending, self._budgets()) if found.pending else []
        self.job = replace(self.job, previews=tuple(previews))
        if self.new:
            clear_folder(self.folder)
        self._save()
        journal = RowJournal(self.folder, found.rows)
        stack.callback(journal.close)
        sampler = open_sampler(self.settings, self.rows.resources, self.folder, stack)
        self.rows = replace(self.rows, cache=shared or self._open_cache(stack, self.folder / CACHE))
        self.progress = Progress(
            tell, self.ledger, self.job.budget, found.rows, journal.counts, planner.forecast
        )
        watch = watch_soft_limits(self.settings, self.ledger, self.progress, stack)
        self.progress.now("started")
        with _without_old_objects():
            ending = self._work(journal, found, planner)
            self._finish(journal, ending)
        if sampler is not None and ending != "drained":
            self._ask_again(journal, sampler)
        if watch is not None:
            watch.look(self.job.budget)
        figures = self.progress.figures()
        tell({"event": "ended", "ending": ending, "results": self.job.results, **figures})
        return BatchEnd(self.job, self.folder, figures)

    def _open_cache(self, stack: ExitStack, path: str | Path) -> Cache:
        return stack.enter_context(Cache(path, self.rows.resources.catalogue))

    # --- before -----------------------------------------------------------------------------------

    def _check(self, found: Survey) -> None:
        if not found.rows:
            raise DataError(f"{self.input_file.path}: no rows; write one object with a question a line")
        if found.bad and not self.settings.skip_bad:
            more = f"; and {found.bad - len(found.problems)} more" if found.bad > len(found.problems) else ""
            raise DataError(
                f"{found.bad} of {found.rows} rows cannot be used: {'; '.join(found.problems)}{more}. "
                "Correct them, or leave them out with --skip-bad"
            )

    def _planner(self) -> RowPlanner:
        tools = self.rows.resources
        return RowPlanner(
            RouteEstimates(
                tools.router,
                tools.is_usable,
                output_limit(tools.catalogue, tools.settings),
                tools.none_usable,
                PlanTimes(tools.latencies, tools.max_seconds),
            ),
            self.job.policy,
            left=self._unspent,
            elapsed=self._elapsed,
            worst=partial(worst_of, tools),
            deadline=self.job.deadline_seconds,
            concurrency=self.rows.concurrency,
        )

    def _open_budget(self, found: Survey, planner: RowPlanner) -> None:
        """Make the budget of a new job, or give one that goes on its new limit."""
        limit = self.job.limit_nanousd
        assert limit is not None
        if self.settings.budget is None:
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
                    cost = worst_of(self.rows.resources, replace(without_plan(row), plan=Plan((pair,))))
                except (InputError, ModelNotAllowed):
                    continue
                if least is None or cost < least[0]:
                    least = (cost, str(pair))
                if cost <= limit:
                    return
        if least is not None:
            raise BudgetError(
                f"a budget of {format_usd(limit)} does not pay for one row: the cheapest call ({least[1]}) "
                f"may cost {format_usd(least[0])}; give more"
            )

    def _budgets(self) -> list[int]:
        assert self.job.limit_nanousd is not None
        return [max(1, round(self.job.limit_nanousd * share)) for share in BUDGET_SHARES]

    # --- passes over the input --------------------------------------------------------------------

    def _work(self, journal: RowJournal, found: Survey, planner: RowPlanner) -> JobEnd:
        """Pass over the rows that are not done until a pass finishes none; skip the rest, with a reason."""
        self._skip_bad_rows(journal, found)
        why: dict[str, int] = {}
        for number in range(PASSES):
            if journal.counts.done or number:
                found = survey(self._usable_rows(), journal.is_done, SAMPLE, seed=number)
            if not found.pending:
                break
            planner.begin(found.sample, found.pending)
            before, why = journal.counts.done, self._pass(journal, planner)
            if self._has_changed():
                raise InputError(
                    f"{self.input_file.path} changed while the job ran; what was answered until then is "
                    "kept. Put it back as it was and go on with --resume, or start over with --force"
                )
            if self.rows.stop.is_set():
                return "drained"
            if self._past_deadline or not why or journal.counts.done == before or self._unspent() <= 0:
                break
        return self._skip_remaining(journal, why)

    def _pass(self, journal: RowJournal, planner: RowPlanner) -> dict[str, int]:
        """One pass over the input; returns the reasons of skipped rows, with how many rows each has."""
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
        return (row for row in mark_duplicates(self.input_file.rows(), self._duplicates))

    def _pending(self, journal: RowJournal) -> Iterator[BatchRow]:
        for row in self._usable_rows():
            if self._has_changed():
                return  # rows that run end; `_work` then raises the error
            if not row.problem and not journal.is_done(row.number):
                yield row

    def _has_changed(self) -> bool:
        """Whether the input is another than the job began with."""
        state = self.input_file.state()
        if state == self._seen:
            return False
        if self.input_file.digest() != self.job.fingerprint["input"]:
            return True
        self._seen = state
        return False

    def _until_deadline(self, planned: Iterator[PlannedRow | None]) -> Iterator[PlannedRow | None]:
        """Planned rows until the deadline: a block is planned long before its last row is started."""
        for each in planned:
            if self._is_late():
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
        """Write the rows that are not done as skipped, with the most frequent reason."""
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

    # --- the end ----------------------------------------------------------------------------------

    def _finish(self, journal: RowJournal, ending: JobEnd) -> None:
        journal.sync()
        if ending != "drained":
            kind = format_for(self.out, self.input_file.format)
            write_results(self.out, kind, journal.in_order(), self.job.budget, self.input_file)
        self.job = replace(self.job, ending=ending, ended=now())
        self._save()

    def _ask_again(self, journal: RowJournal, sampler: ShadowSampler) -> None:
        """Ask a share of the rows again of one model. The results are written by now."""
        self.settings.tell({"event": "shadow", "model": sampler.sampling.model})
        rows = self._usable_rows()
        sampled = sampled_rows(self.job.budget, self.job.policy, rows, journal.in_order(), sampler)
        ask_again(sampled, sampler, lambda: self.rows.stop.is_set() or self._is_late())

    def _is_late(self) -> bool:
        return self.job.deadline_seconds is not None and self._elapsed() > self.job.deadline_seconds

    def _save(self) -> None:
        self.job.save(self.folder)

    def _elapsed(self) -> float:
        return time.monotonic() - self._began

    def _unspent(self) -> int:
        """Nano-dollars of the limit that are neither posted nor held for calls that a kill left unknown."""
        budget = self.ledger.budget(self.job.budget)
        lost = sum(hold.held_nanousd for hold in self.ledger.holds(self.job.budget, "unknown"))
        return max(0, (budget.left_nanousd or 0) + budget.held_nanousd - lost)


@contextmanager
def _without_old_objects() -> Iterator[None]:
    """Exempt existing objects from garbage collection, which takes an eighth of a quick job.

    Does nothing where the caller has frozen objects already, because unfreezing would release those too.
    """
    if gc.get_freeze_count():
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _open_resources(
    budget: Dollars | None, before: Job | None, settings: WorkflowSettings, ledger: Ledger
) -> WorkflowResources:
    """Open the workflow over the job's budget, which is created only once all else is right."""
    resolve_limit(budget, before)
    resources = open_resources(settings, ledger)
    if before is not None:
        try:
            ledger.budget(before.budget)
        except UnknownName:
            raise InputError(
                f"this ledger has no budget {before.budget!r}; give the ledger that "
                f"the job began with ({before.ledger})"
            ) from None
    return resources
