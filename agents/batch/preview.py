"""A forecast of a job: what several budgets would buy. Calls no model, touches no ledger."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Unpack

from viaticum.agents.batch.deferral import Deferral
from viaticum.agents.batch.input import Input, Survey, survey
from viaticum.agents.batch.plan_times import PlanTimes
from viaticum.agents.batch.planned_rows import RouteEstimates
from viaticum.agents.batch.planning import PACED, RowPlanner
from viaticum.agents.batch.steps import CONCURRENCY, worst_of
from viaticum.agents.build import open_resources
from viaticum.agents.workflow.estimates import output_limit
from viaticum.agents.workflow.resources import WorkflowResources
from viaticum.agents.workflow.settings import Dollars, ModelKeywords, WorkflowSettings
from viaticum.budgets import Ledger
from viaticum.jobs import Preview
from viaticum.money import budget_nanousd

SAMPLE = 2000  # rows from which the price of accuracy is computed
BUDGET_SHARES = (0.25, 0.5, 1.0, 2.0, 4.0)  # of the budget, in the preview


def planner_for(
    tools: WorkflowResources,
    policy: str,
    deferral: Deferral,
    left: Callable[[], int],
    concurrency: int,
    times: PlanTimes | None = None,
) -> RowPlanner:
    """The planner of a job. left: as of `RowPlanner`; times: as of `RouteEstimates`."""
    return RowPlanner(
        RouteEstimates(
            tools.router,
            tools.can_follow,
            output_limit(tools.catalogue, tools.settings),
            tools.none_usable,
            times,
        ),
        policy,
        left=left,
        elapsed=deferral.elapsed,
        worst=partial(worst_of, tools),
        deadline=deferral.deadline,
        concurrency=concurrency,
        batch_factor=deferral.factor,
    )


def previews_around(budget: int, found: Survey, planner: RowPlanner) -> tuple[Preview, ...]:
    """What the budget, and others around it, would buy; empty where no row is pending.

    budget: nano-dollars. found: of the input.
    """
    budgets = [max(1, round(budget * share)) for share in BUDGET_SHARES]
    return tuple(planner.previews(found.sample, found.pending, budgets)) if found.pending else ()


@dataclass(frozen=True)
class DryRun:
    """Forecast of a job.

    Attributes:
        rows, bad: of the input; how many of them cannot be used.
        previews: at several budgets.
        routes: rows of a sample by the plan, such as model+strategy, that they would get at the budget.
        origins: where the estimates come from, in words.
    """

    rows: int
    bad: int
    problems: tuple[str, ...]
    previews: tuple[Preview, ...]
    routes: Mapping[str, int] = field(default_factory=dict)
    origins: tuple[str, ...] = ()


def preview_batch(
    source: str | Path,
    *,
    budget: Dollars,
    policy: str = PACED,
    deadline: float | None = None,
    skip: int = 0,
    limit: int | None = None,
    format: str | None = None,
    **settings: Unpack[ModelKeywords],
) -> DryRun:
    """Forecast what the budget, and others around it, would buy. Calls no model, touches no ledger.

    Parameters and errors are those of `run_batch`.
    """
    input_file = Input.open(source, format=format, skip=skip, limit=limit)
    amount = budget_nanousd(budget)
    with Ledger("memory:") as ledger:
        tools = open_resources(WorkflowSettings.from_keywords(None, {**settings, "concurrency": 1}), ledger)
        deferral = Deferral(tools.catalogue, tools.model, deadline, lambda: 0.0)
        concurrency = settings.get("concurrency", CONCURRENCY)
        planner = planner_for(tools, policy, deferral, lambda: amount, concurrency)
        found = survey(input_file.rows(), lambda number: False, SAMPLE)
        previews = previews_around(amount, found, planner)
        routes, origins = planner.choices(found.sample, found.pending) if found.pending else ({}, [])
        return DryRun(found.rows, found.bad, tuple(found.problems), previews, routes, tuple(origins))
