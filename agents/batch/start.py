"""What has to be right before a job starts: rows, budget, models, and what an earlier run has left.

Leaves out its folder (`agents.batch.folder`) and the run itself (`agents.batch.run`).
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from viaticum.agents.batch.batch_records import batches_left
from viaticum.agents.batch.entries import catalogue_digest, used_entries
from viaticum.agents.batch.folder import (
    fingerprint,
    job_folder,
    now,
    resolve_limit,
    version,
    without_password,
    without_plan,
)
from viaticum.agents.batch.input import Input, Survey
from viaticum.agents.batch.planning import RowPlanner
from viaticum.agents.batch.resume import remember
from viaticum.agents.batch.settings import BatchKeywords, BatchSettings
from viaticum.agents.batch.steps import worst_of
from viaticum.agents.build import open_resources
from viaticum.agents.workflow.resources import WorkflowResources
from viaticum.agents.workflow.settings import Dollars, WorkflowSettings
from viaticum.budgets import Ledger
from viaticum.errors import BudgetError, DataError, InputError, ModelNotAllowed, UnknownName
from viaticum.jobs import JOB, Job
from viaticum.money import format_usd
from viaticum.routers.query import Plan

FIRST_ROWS = 16  # of the sample, from which the cheapest call is found


def describe(
    input_file: Input,
    found: Survey,
    out: Path,
    settings: BatchSettings,
    scope: str,
    before: Job | None,
    resources: WorkflowResources,
) -> Job:
    """What `job.json` says of the job when it starts.

    found: of the input. before: what an earlier run of it wrote there.
    """
    entries = used_entries(resources, found.named, settings.shadow, before)
    catalogue = catalogue_digest(resources, entries, before)
    return Job(
        input=str(input_file.path),
        results=str(out),
        rows=found.rows,
        budget=scope,
        limit_nanousd=resolve_limit(settings.budget, before),
        ledger=without_password(settings.ledger_address),
        policy=settings.policy,
        engine=settings.engine,
        deadline_seconds=settings.deadline,
        began=before.began if before else now(),
        fingerprint=fingerprint(input_file, resources, settings.router, settings.policy, catalogue),
        version=version(),
        memory=remember(settings, resources.router, entries),
    )


def earlier_job(out: Path, keywords: BatchKeywords) -> Job | None:
    """What `job.json` says of the job that goes on; None where there is none."""
    folder = job_folder(out)
    return Job.load(folder) if keywords.get("resume") and (folder / JOB).exists() else None


def check_rows(found: Survey, input_file: Input, *, skip_bad: bool) -> None:
    """Raises `DataError` where there are no rows, or some that cannot be used and are not skipped."""
    if not found.rows:
        raise DataError(f"{input_file.path}: no rows; write a question a row")
    if found.bad and not skip_bad:
        more = f"; and {found.bad - len(found.problems)} more" if found.bad > len(found.problems) else ""
        raise DataError(
            f"{found.bad} of {found.rows} rows cannot be used: {'; '.join(found.problems)}{more}. "
            "Correct them, or leave them out with --skip-bad"
        )


def open_budget(
    job: Job, found: Survey, planner: RowPlanner, resources: WorkflowResources, *, new: bool
) -> None:
    """Make the budget of a new job, or give one that goes on its new limit.

    Raises:
        BudgetError: the budget of a new job pays for no row.
    """
    assert job.limit_nanousd is not None
    if not new:
        resources.ledger.set_limit(job.budget, limit_nanousd=job.limit_nanousd)
        return
    _check_suffices(job.limit_nanousd, found, planner, resources)
    resources.ledger.create(job.budget, limit_nanousd=job.limit_nanousd)


def _check_suffices(limit: int, found: Survey, planner: RowPlanner, resources: WorkflowResources) -> None:
    """Raises `BudgetError` where not one call of the first rows fits."""
    least: tuple[int, str] | None = None
    for _, row in found.sample[:FIRST_ROWS]:
        assert row.query is not None
        if row.overrides is not None and row.overrides.model != "auto":
            pairs = list(planner.named_plan(row).pairs)
        else:
            plans = planner.estimates.of(row.query)[0]
            pairs = list({pair for each in plans for pair in each.plan.pairs if not pair.is_check})
        for pair in pairs:
            try:
                cost = worst_of(resources, replace(without_plan(row), plan=Plan((pair,))))
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


def check_nothing_waits(folder: Path) -> None:
    """Raises `InputError` where a job that would be removed has batches at a provider."""
    if left := [batch.id or batch.name for batch in batches_left(folder)]:
        raise InputError(
            f"the job in {folder} has batches at a provider that are charged for ({', '.join(left[:3])}); "
            "cancel them first: viaticum batch --resume --cancel RESULTS"
        )


def open_job_resources(
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
    return replace(resources, router=resources.router.frozen())  # a job corrects its costs by itself


@contextmanager
def without_old_objects() -> Iterator[None]:
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
