"""Run a batch job: answer a file of questions within a budget.

    run_batch("questions.jsonl", "answers.jsonl", budget="20")

A job has a folder beside its results (see `viaticum.jobs`) and a budget of its own in the ledger, whose name
is the prefix of all its keys. A job that was killed goes on with `resume=True`: calls that were paid for are
found by their keys, and the journal says which rows are done. Rows that the plan left out are planned again
where money is left.

Leaves out formats (`agents.batch.input`, `agents.batch.output`), planning (`agents.batch.planning`),
forecasts (`agents.batch.preview`), calls (`agents.batch.executor`) and batches (`agents.batch.deferred`).
"""

from __future__ import annotations

import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Unpack

from viaticum.agents.batch.cache import Cache
from viaticum.agents.batch.deferral import Deferral
from viaticum.agents.batch.deferred import DeferredRows
from viaticum.agents.batch.engines import Process, engine_for
from viaticum.agents.batch.entries import without_later_entries
from viaticum.agents.batch.folder import (
    acquire_job_lock,
    check_fingerprint,
    clear_folder,
    no_job,
    now,
    prepare_folder,
    without_plan,
)
from viaticum.agents.batch.input import BatchRow, Input, Survey, survey
from viaticum.agents.batch.job_rows import JobRows
from viaticum.agents.batch.output import RowJournal, format_for, write_results
from viaticum.agents.batch.plan_times import PlanTimes
from viaticum.agents.batch.planned_rows import PlannedRow
from viaticum.agents.batch.planning import NO_TIME, RowPlanner
from viaticum.agents.batch.preview import SAMPLE, planner_for, previews_around
from viaticum.agents.batch.progress import Progress
from viaticum.agents.batch.results import build_row
from viaticum.agents.batch.resume import recall
from viaticum.agents.batch.settings import BatchKeywords, BatchSettings
from viaticum.agents.batch.shadow import ask_again, open_sampler, sampled_rows
from viaticum.agents.batch.soft_limits import watch_soft_limits
from viaticum.agents.batch.start import (
    check_nothing_waits,
    check_rows,
    describe,
    earlier_job,
    open_budget,
    open_job_resources,
    without_old_objects,
)
from viaticum.agents.batch.steps import RowTools
from viaticum.agents.batch.workers import WorkerConfig
from viaticum.agents.workflow.shadow import ShadowSampler, check_sampling
from viaticum.budgets import Ledger
from viaticum.jobs import CACHE, Job, JobEnd, JobRow

__all__ = ["BatchEnd", "run_batch"]

PASSES = 3  # over the input at most, between two batches of a provider
GOES_ON: tuple[JobEnd, ...] = ("drained", "waiting")  # ends of a run that is not the last


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
    before = earlier_job(Path(out), keywords)
    if before is not None:
        keywords = recall(keywords, before)  # type: ignore[assignment]
    settings = BatchSettings(**keywords)
    if source is None:
        if before is None:
            raise no_job(out)
        source = before.input
    input_file = Input.open(source, format=settings.format, skip=settings.skip, limit=settings.limit)
    configure = engine_for(settings.engine, settings.cluster, settings.ledger_address)
    with ExitStack() as stack:
        folder = prepare_folder(Path(out), input_file.path, resume=settings.resume, force=settings.force)
        stack.enter_context(acquire_job_lock(folder))
        if settings.force:
            check_nothing_waits(folder)
        ledger = stack.enter_context(Ledger(settings.ledger_address))
        if before is not None:
            before = Job.load(folder)  # which another process may have changed until the lock
        scope = before.budget if before is not None else f"batch-{uuid.uuid4().hex[:12]}"
        workflow = settings.workflow(scope)
        if before is not None:
            workflow = without_later_entries(workflow, before)
        resources = open_job_resources(settings.budget, before, workflow, ledger)
        stack.callback(resources.threads.close)
        settings.tell({"event": "reading", "input": str(input_file.path)})
        found = survey(input_file.rows(), lambda number: False, SAMPLE)
        job = describe(input_file, found, Path(out), settings, scope, before, resources)
        if before is not None:
            check_fingerprint(before, job, folder)
        check_rows(found, input_file, skip_bad=settings.skip_bad)
        if settings.shadow is not None:  # before anything of an earlier job is cleared
            check_sampling(settings.shadow, resources.catalogue)
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
        input_rows = JobRows(input_file, job.fingerprint["input"], found.duplicates)
        run = _Run(input_rows, folder, job, rows, configure(config), settings, new=before is None)
        return run.run(stack, found)


class _Run:
    """One run of a job, from its input to its results."""

    def __init__(
        self,
        input_rows: JobRows,
        folder: Path,
        job: Job,
        rows: RowTools,
        process: Process,
        settings: BatchSettings,
        *,
        new: bool,
    ) -> None:
        self.input, self.folder, self.job, self.rows = input_rows, folder, job, rows
        self.process, self.settings, self.new = process, settings, new
        self.out = Path(job.results)
        self.ledger = rows.resources.ledger
        self._began = time.monotonic()
        tools = rows.resources
        self.deferral = Deferral(tools.catalogue, tools.model, settings.deadline, self._elapsed)
        self._past_deadline = False
        self._why: dict[str, int] = {}  # reasons of skipped rows, with how many rows each has
        self._failure: Exception | None = None  # of planning, or of a provider's batch
        self._direct: deque[PlannedRow] = deque()  # were left to a batch, and are asked now instead
        self._committed = 0  # nano-dollars held for rows that wait, and are not of this pass

    def run(self, stack: ExitStack, found: Survey) -> BatchEnd:
        """Run the job to its end. stack: closes what is opened here; found: of the input."""
        tell = self.settings.tell
        planner = self._planner()
        own, given, catalogue = self.folder / CACHE, self.settings.cache, self.rows.resources.catalogue
        shared = stack.enter_context(Cache(given, catalogue)) if given is not None else None
        if self.settings.budget is not None:
            open_budget(self.job, found, planner, self.rows.resources, new=self.new)
        assert self.job.limit_nanousd is not None
        self.job = replace(self.job, previews=previews_around(self.job.limit_nanousd, found, planner))
        if self.new:
            clear_folder(self.folder)
        self.job.save(self.folder)
        journal = RowJournal(self.folder, found.rows)
        stack.callback(journal.close)
        sampler = open_sampler(self.settings, self.rows.resources, self.folder, stack)
        self.rows = replace(self.rows, cache=shared or stack.enter_context(Cache(own, catalogue)))
        self.deferred = DeferredRows(self.rows, self.folder, self.deferral, self.input.numbered)
        stack.callback(self.deferred.close)
        self.progress = Progress(
            tell, self.ledger, self.job.budget, found.rows, journal.counts, planner.forecast
        )
        watch = watch_soft_limits(self.settings, self.ledger, self.progress, stack)
        self.progress.now("started")
        with without_old_objects():
            ending = self._work(journal, found, planner)
            self._finish(journal, ending)
        if sampler is not None and ending not in (*GOES_ON, "cancelled"):
            self._ask_again(journal, sampler)
        if watch is not None:
            watch.look(self.job.budget)
        figures = self.progress.figures()
        batches = {"batches": self.deferred.states()} if self.deferred.open else {}
        tell({"event": "ended", "ending": ending, "results": self.job.results, **figures, **batches})
        return BatchEnd(self.job, self.folder, figures)

    # --- before -----------------------------------------------------------------------------------

    def _planner(self) -> RowPlanner:
        tools, policy, concurrency = self.rows.resources, self.job.policy, self.rows.concurrency
        times = PlanTimes(tools.latencies, tools.max_seconds)
        return planner_for(tools, policy, self.deferral, self._unspent, concurrency, times)

    # --- passes over the input --------------------------------------------------------------------

    def _work(self, journal: RowJournal, found: Survey, planner: RowPlanner) -> JobEnd:
        """Pass over the rows that are not done until a pass finishes none; skip the rest, with a reason.

        In between, wait for the providers' batches: what they have answered is finished, what they have not
        is planned again.
        """
        self._skip_bad_rows(journal, found)
        if not self.new:
            self.deferred.restore(journal.is_done)
        if self.settings.cancel:
            self.deferred.give_up()
        passes = 0
        while True:
            collected = self.deferred.collected  # a batch may end while rows of another one are finished
            self._finish_settled(journal, planner)
            goes_on = passes < PASSES and not self.settings.cancel and not self.rows.stop.is_set()
            goes_on = goes_on and self._pass_again(journal, found, planner, passes)
            passes += 1
            if self.deferred.collected > collected:  # some were refused at once, or answered meanwhile
                goes_on, passes = True, 1
            if self.rows.stop.is_set():
                return "drained"
            if goes_on:
                continue
            if not self.deferred.open:
                return self._skip_remaining(journal)
            if not self._wait():
                return "drained" if self.rows.stop.is_set() else "waiting"
            passes = 0

    def _pass_again(self, journal: RowJournal, found: Survey, planner: RowPlanner, number: int) -> bool:
        """One pass over the rows that are not done and do not wait; returns whether another may help.

        Args:
            found: what is known of the input where nothing is done yet.
            number: of the pass, from 0.
        """
        if number or journal.counts.done or self.deferred.count:
            found = survey(iter(self.input), self._is_in_work(journal), SAMPLE, seed=number)
        if not found.pending:
            return False
        self.deferred.begin_pass()
        self._committed = self.deferred.committed_nanousd()
        planner.begin(found.sample, found.pending)
        before, self._why = journal.counts.done, self._pass(journal, planner)
        self.input.check()
        left = bool(self._why) or self.deferred.left_over > 0
        return left and journal.counts.done > before and not self._past_deadline and self._unspent() > 0

    def _is_in_work(self, journal: RowJournal) -> Callable[[int], bool]:
        return lambda number: journal.is_done(number) or self.deferred.has(number)

    def _pass(self, journal: RowJournal, planner: RowPlanner) -> dict[str, int]:
        """One pass over the input; returns the reasons of skipped rows, with how many rows each has."""
        why: dict[str, int] = {}
        self._direct.clear()
        planned = self._without_deferred(planner.plan(self._pending(journal)), planner)
        for part in (planned, self._asked_now()):
            for plan, row in self._process(self._until_deadline(part), planner):
                planner.settled(plan, row)
                if row.state == "skipped":
                    why[row.reason] = why.get(row.reason, 0) + 1
                else:
                    journal.write(row)
                self.progress.report_if_due()
            if part is planned:
                self._send(planner, all_money=True)
        return why

    def _process(
        self, planned: Iterable[PlannedRow | None], planner: RowPlanner
    ) -> Iterator[tuple[PlannedRow, JobRow]]:
        """Answer rows, and look after the batches meanwhile, however long a row takes."""
        yield from self.process(planned, self.rows, lambda: self._look_after(planner))
        if self._failure is not None:
            raise self._failure

    def _without_deferred(
        self, planned: Iterator[PlannedRow | None], planner: RowPlanner
    ) -> Iterator[PlannedRow | None]:
        """Planned rows that are asked now; the others are left to the providers' batches."""
        for each in planned:
            if each is None or not each.deferred:
                yield each
            else:
                self.deferred.add(each)
                planner.left_to_batch(1)
            self._look_after(planner)
            yield from self._asked_now()
        self._send(planner, all_money=False)
        yield from self._asked_now()

    def _asked_now(self) -> Iterator[PlannedRow]:
        while self._direct:
            yield self._direct.popleft()

    def _send(self, planner: RowPlanner, *, all_money: bool) -> None:
        """Send rows that wait in batches."""
        direct = self.deferred.send(all_money=all_money)
        planner.left_to_batch(-len(direct))
        self._direct += direct

    def _look_after(self, planner: RowPlanner) -> None:
        """Send rows that have waited long enough, and take the next step of batches that are due.

        An error ends the pass when the rows that run have ended.
        """
        if self._failure is not None or self.rows.stop.is_set():
            return
        try:
            if self.deferred.is_due:
                self._send(planner, all_money=False)
            if self.deferred.is_look_due and not self.input.has_changed() and self.deferred.look():
                self._committed = self.deferred.committed_nanousd()
        except Exception as error:  # of whatever kind: calls that run are not to be lost
            self._failure = error

    # --- what providers' batches have answered ----------------------------------------------------

    def _finish_settled(self, journal: RowJournal, planner: RowPlanner) -> None:
        """Finish the rows whose answers came in batches, and are paid for."""
        if not (settled := set(self.deferred.settled)):
            return
        planned = (self._settled_row(row, planner) for row in self.input.numbered(settled))
        for _, row in self._process(planned, planner):
            if row.state != "skipped":
                journal.write(row)
            self.deferred.finished(row.number)
            self.progress.report_if_due()

    def _settled_row(self, row: BatchRow, planner: RowPlanner) -> PlannedRow:
        plan, policy = self.deferred.plan_of(row)
        factor = self.deferral.price_share(plan.pairs[0].model)
        return planner.answered_in_batch(row, plan, policy, factor)

    def _wait(self) -> bool:
        """Wait until a batch is collected; False where the job is told to end, or not to wait."""
        while self.deferred.open:
            if self.deferred.look():
                return True
            self.progress.now("waiting", batches=self.deferred.states())
            stays = self.settings.wait or self.settings.cancel or not self.deferred.all_sent
            if not stays or self.rows.stop.wait(self.deferred.next_look()):
                return False
        return True

    # --- rows -------------------------------------------------------------------------------------

    def _pending(self, journal: RowJournal) -> Iterator[BatchRow]:
        is_in_work, waiting = self._is_in_work(journal), self.deferred.waiting
        for row in self.input:
            if self.input.has_changed():
                return  # rows that run end; `_work` then raises the error
            if not row.problem and row.number not in waiting and not is_in_work(row.number):
                yield row

    def _until_deadline(self, planned: Iterator[PlannedRow | None]) -> Iterator[PlannedRow | None]:
        """Planned rows until the deadline: a block is planned long before its last row is started.

        Also until an error, which is raised when the rows that run have ended.
        """
        try:
            for each in planned:
                if self._failure is not None:
                    return
                if self._is_late():
                    self._past_deadline = True
                    return
                yield each
        except Exception as error:
            self._failure = error

    def _skip_bad_rows(self, journal: RowJournal, found: Survey) -> None:
        if not found.bad:
            return
        for row in self.input:
            if row.problem and not journal.is_done(row.number):
                journal.write(build_row(without_plan(row), "skipped", row.problem))

    def _skip_remaining(self, journal: RowJournal) -> JobEnd:
        """Write the rows that are not done as skipped, with the most frequent reason."""
        if journal.counts.done == self.job.rows:
            return "completed"
        why = self._why
        reason = max(why, key=lambda each: why[each]) if why else "nothing was left to pay for it"
        if self.settings.cancel:
            reason = "the job was cancelled"
        elif self._past_deadline:
            reason = f"the deadline of {self.job.deadline_seconds:g} seconds passed"
        for row in self.input:
            if not journal.is_done(row.number):
                journal.write(build_row(without_plan(row), "skipped", reason))
                self.progress.report_if_due()
        if self.settings.cancel:
            return "cancelled"
        return "deadline" if self._past_deadline or reason == NO_TIME else "budget_exhausted"

    # --- the end ----------------------------------------------------------------------------------

    def _finish(self, journal: RowJournal, ending: JobEnd) -> None:
        journal.sync()
        if ending not in GOES_ON:
            kind = format_for(self.out, self.input.file.format)
            write_results(self.out, kind, journal.in_order(), self.job.budget, self.input.file)
        self.job = replace(self.job, ending=ending, ended=now())
        self.job.save(self.folder)

    def _ask_again(self, journal: RowJournal, sampler: ShadowSampler) -> None:
        """Ask a share of the rows again of one model. The results are written by now."""
        self.settings.tell({"event": "shadow", "model": sampler.sampling.model})
        sampled = sampled_rows(self.job, iter(self.input), journal.in_order(), sampler)
        ask_again(sampled, sampler, lambda: self.rows.stop.is_set() or self._is_late())

    def _is_late(self) -> bool:
        return self.job.deadline_seconds is not None and self._elapsed() > self.job.deadline_seconds

    def _elapsed(self) -> float:
        return time.monotonic() - self._began

    def _unspent(self) -> int:
        """Nano-dollars of the limit that are neither posted nor held for other passes.

        These are held for rows that wait for a batch, and for calls that a kill left unknown.
        """
        budget = self.ledger.budget(self.job.budget)
        lost = sum(hold.held_nanousd for hold in self.ledger.holds(self.job.budget, "unknown"))
        return max(0, (budget.left_nanousd or 0) + budget.held_nanousd - lost - self._committed)
