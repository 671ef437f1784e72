"""The planner of a batch heeds how long calls took: for the time of a row, and for the job's deadline."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from batch_jobs import CHEAP, EXPENSIVE, models, two_plans_router, write_questions

from viaticum.agents.batch import job_folder, run_batch
from viaticum.agents.batch.plan_times import TOKENS_A_SECOND, PlanTimes
from viaticum.agents.workflow.latencies import CallLatencies
from viaticum.budgets import Ledger
from viaticum.jobs import read_rows
from viaticum.money import Price
from viaticum.routers.query import Plan, PlanRow
from viaticum.types import Pair, Row, TokenCount

PRICES = {name: Price.per_million(1, 1) for name in ("cheap", "expensive")}
ROWS = {pair: Row(pair, 0.5, 60, 90, 1, 2) for pair in (CHEAP, EXPENSIVE)}
PLANS = [PlanRow(Plan((pair,)), 0.5, 1, 2) for pair in (CHEAP, EXPENSIVE)]
BOTH = PlanRow(Plan((CHEAP, EXPENSIVE), 2), 0.6, 2, 4)


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger(tmp_path / "ledger.db") as ledger:
        ledger.create("before", limit_nanousd=10**12)
        yield ledger


def seen(ledger: Ledger, pair: Pair, seconds: float, calls: int = 6) -> None:
    """Calls that were made before, which took so long."""
    for _ in range(calls):
        key = f"k{len(list(ledger.entries('before')))}"
        usage = {pair.model: TokenCount(100, 60)}
        tags = {"model": pair.model, "strategy": pair.strategy}
        ledger.reserve("before", key, usage, PRICES, tags=tags, dispatch=True)
        result = {"text": "x", "seconds": seconds, "usage": {pair.model: [100, 60, 0, 0, 0]}}
        ledger.settle(key, usage, json.dumps(result))


def test_plans_that_take_longer_than_a_row_may_are_left_out(ledger: Ledger) -> None:
    seen(ledger, CHEAP, 0.5)
    seen(ledger, EXPENSIVE, 20.0)
    times = PlanTimes(CallLatencies(ledger), 10.0)
    assert times.in_time([*PLANS, BOTH], ROWS) == [PLANS[0]]
    assert PlanTimes(CallLatencies(ledger), 100.0).in_time([*PLANS, BOTH], ROWS) == [*PLANS, BOTH]
    assert PlanTimes(CallLatencies(ledger)).in_time(PLANS, ROWS) == PLANS
    assert PlanTimes(CallLatencies(ledger), 0.1).in_time([PLANS[1], PLANS[0]], ROWS) == [PLANS[0]]


def test_plans_of_which_nothing_is_known_stay(ledger: Ledger) -> None:
    seen(ledger, EXPENSIVE, 20.0)
    times = PlanTimes(CallLatencies(ledger), 10.0)
    assert times.in_time([*PLANS, BOTH], ROWS) == [PLANS[0], BOTH]
    assert times.seconds((CHEAP,), ROWS) == 60 / TOKENS_A_SECOND
    assert times.seconds((CHEAP, EXPENSIVE), ROWS) == pytest.approx(22.0, rel=0.01)


def test_times_are_read_again(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("viaticum.agents.workflow.latencies.REFRESH_SECONDS", 0.0)
    monkeypatch.setattr("viaticum.agents.batch.plan_times.REFRESH_SECONDS", 0.0)
    times = PlanTimes(CallLatencies(ledger), 10.0)
    assert times.in_time(PLANS, ROWS) == PLANS
    seen(ledger, CHEAP, 60.0)
    before = times.version
    times.refresh()
    assert times.version > before
    assert times.in_time(PLANS, ROWS) == [PLANS[1]]


def settings(folder: Path) -> dict[str, Any]:
    return {"models": models(), "router": two_plans_router(), "ledger": folder / "ledger.db"}


@pytest.mark.parametrize("policy", ["paced", "best"])
def test_a_job_asks_no_model_that_takes_longer_than_a_row_may(
    ledger: Ledger, tmp_path: Path, policy: str
) -> None:
    seen(ledger, CHEAP, 0.1)
    seen(ledger, EXPENSIVE, 60.0)
    write_questions(tmp_path / "in.jsonl", 8)
    given: dict[str, Any] = {
        "models": models(),
        "router": two_plans_router(),
        "ledger": tmp_path / "ledger.db",
    }
    for name, limit, pair in (("slow", None, EXPENSIVE), ("quick", 5.0, CHEAP)):
        run_batch(
            tmp_path / "in.jsonl",
            tmp_path / f"{name}.jsonl",
            budget="1",
            policy=policy,
            max_seconds=limit,
            **given,
        )
        rows = list(read_rows(job_folder(tmp_path / f"{name}.jsonl")))
        assert {row.route for row in rows} == {str(pair)}


def test_a_job_with_a_deadline_prefers_what_was_quick(ledger: Ledger, tmp_path: Path) -> None:
    """The better model would take hours by what its calls took; by its tokens it would be in time."""
    seen(ledger, CHEAP, 0.01)
    seen(ledger, EXPENSIVE, 600.0)
    write_questions(tmp_path / "in.jsonl", 64)
    given: dict[str, Any] = {
        "models": models(),
        "router": two_plans_router(),
        "ledger": tmp_path / "ledger.db",
    }
    run_batch(
        tmp_path / "in.jsonl", tmp_path / "out.jsonl", budget="10", deadline=60.0, concurrency=1, **given
    )
    routes = [row.route for row in read_rows(job_folder(tmp_path / "out.jsonl"))]
    assert routes.count(str(CHEAP)) >= 60
