"""A simulated job with real outcomes under a hard cap, and what many of them came to. Used by planner.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import coo_array, csr_array, vstack

from viaticum.budgets.allocate import SKIPPED, Array, allocate
from viaticum.budgets.pacing import Pacer

NANO = 1e9
SAMPLE = 400  # rows of a job that are known beforehand


@dataclass(frozen=True)
class Told:
    """Of Q questions by W ways: what is expected [Q, W], what a call costs at worst [W], and what was [Q, W].

    Amounts are nano-dollars; right is 0 or 1.
    """

    worth: Array
    cost: Array
    spread: Array
    worst: Array
    right: Array
    real: Array

    def __len__(self) -> int:
        return len(self.worth)

    def part(self, rows: Array, bias: float) -> Told:
        """Some questions, of which so many times too little cost is expected."""
        return Told(
            self.worth[rows],
            self.cost[rows] / bias,
            self.spread[rows] / bias,
            self.worst,
            self.right[rows],
            self.real[rows],
        )


def optimum_of(worth: Array, cost: Array, budget: float) -> float:
    """The optimum of the linear programme: shares of ways, at most one way a question in all."""
    questions, ways = worth.shape
    one_each = coo_array(
        (np.ones(questions * ways), (np.repeat(np.arange(questions), ways), np.arange(questions * ways)))
    )
    above = vstack([csr_array(one_each), csr_array(cost.ravel()[None] / budget)])
    limits = np.append(np.ones(questions), 1.0)
    found = linprog(-worth.ravel(), A_ub=above, b_ub=limits, bounds=(0, 1), method="highs")
    if found.status != 0:
        raise RuntimeError(f"the linear programme was not solved: {found.message}")
    return float(-found.fun)


class Cap:
    """A budget with holds: what is posted and held is never more than it."""

    def __init__(self, told: Told, budget: float) -> None:
        self.told, self.budget, self.spent, self.held = told, budget, 0.0, 0.0

    def fits(self, way: int) -> bool:
        return way == SKIPPED or self.spent + self.held + self.told.worst[way] <= self.budget

    def best_that_fits(self, row: int, than: int) -> int:
        """The best of the cheaper ways whose worst case fits, or none."""
        ways = np.flatnonzero(self.told.cost[row] < self.told.cost[row, than])
        ways = ways[[self.fits(int(way)) for way in ways]] if len(ways) else ways
        return int(ways[self.told.worth[row, ways].argmax()]) if len(ways) else SKIPPED

    def hold(self, way: int) -> None:
        self.held += 0.0 if way == SKIPPED else float(self.told.worst[way])

    def post(self, row: int, way: int) -> float:
        if way == SKIPPED:
            return 0.0
        self.held -= float(self.told.worst[way])
        self.spent += float(self.told.real[row, way])
        return float(self.told.real[row, way])


def simulate(
    told: Told, *, rows: int, dollars: float, bias: float, in_flight: int, seed: int
) -> dict[str, Any]:
    """One job with a mean budget in dollars a question. Where it has a share, it is of the rows or of the
    budget.
    """
    dice = np.random.default_rng(seed)
    told = told.part(dice.choice(len(told), rows, replace=rows > len(told)), bias)
    budget = dollars * rows * NANO
    at = np.sort(dice.choice(rows, min(SAMPLE, rows), replace=False))
    pacer = Pacer(
        told.worth[at],
        told.cost[at],
        rows=rows,
        budget=budget,
        spread=told.spread[at],
        at=at,
        worst=told.worst,
    )
    forecast = pacer.forecast()
    cap = Cap(told, budget)
    ways: list[int] = []
    flight: list[tuple[int, int, int]] = []  # row, way planned, way taken
    cheaper: list[int] = []
    refused: list[int] = []

    def settle_first() -> None:
        row, planned, took = flight.pop(0)
        expected, spread = (
            0.0 if planned == SKIPPED else values[row, planned] for values in (told.cost, told.spread)
        )
        actual = cap.post(row, took)
        pacer.settle(
            np.array([planned]),
            np.array([expected]),
            np.array([actual]),
            spread=np.array([spread]),
            learn=np.array([planned == took]),
        )

    while pacer.rows_left:
        first = rows - pacer.rows_left
        block = slice(first, first + pacer.stride(64))
        for row, planned in enumerate(
            pacer.choose(told.worth[block], told.cost[block], told.spread[block]).tolist(), first
        ):
            while flight and (len(flight) >= in_flight or not cap.fits(planned)):
                settle_first()
            took = planned
            if not cap.fits(planned):
                took = cap.best_that_fits(row, planned)
                (refused if took == SKIPPED else cheaper).append(row)
            cap.hold(took)
            if cap.spent + cap.held > budget:
                raise AssertionError("the cap did not hold")
            flight.append((row, planned, took))
            ways.append(took)
    while flight:
        settle_first()
    return _told_of_job(
        told, np.array(ways), budget, cap.spent, refused, cheaper, forecast, bias, dollars, pacer
    )


def _told_of_job(
    told: Told,
    ways: Array,
    budget: float,
    spent: float,
    refused: list[int],
    cheaper: list[int],
    forecast: Any,
    bias: float,
    dollars: float,
    pacer: Pacer,
) -> dict[str, Any]:
    rows = np.arange(len(ways))

    def of(values: Array, chosen: Array) -> float:
        return float(np.where(chosen == SKIPPED, 0.0, values[rows, chosen]).sum())

    best_plan = allocate(told.worth, told.cost * bias, budget)  # nothing to correct and no chance to mind
    lavish = of(told.real, told.worth.argmax(1))
    short = np.array([*refused, *cheaper])
    return {
        "budget": dollars,
        "spent": spent / budget,
        "over": spent > budget,
        "binds": lavish > budget,
        "accuracy": of(told.right, ways) / len(ways),
        "expected": of(told.worth, ways) / len(ways),
        "plan_expected": best_plan.bound / len(ways),
        "plan_accuracy": of(told.right, best_plan.chosen) / len(ways),
        "plan_spent": of(told.real, best_plan.chosen) / budget,
        "clairvoyant": allocate(told.right, told.real, budget).bound / len(ways),
        "forecast_accuracy": forecast.accuracy,
        "forecast_p50": forecast.cost_p50 / budget,
        "forecast_p90": forecast.cost_p90 / budget,
        "refused": len(refused),
        "cheaper": len(cheaper),
        "dearest": float(told.worst.max() / budget),
        "dry_at": float(short.min() / len(ways)) if len(short) else None,
        "skipped": int((ways == SKIPPED).sum()) - len(refused),
        "ratio": float(np.average(pacer.ratios)),
    }


def summary(done: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Over all jobs, and by budget. dry: a planned row was refused, or took a cheaper way, before the last 2%
    of rows.
    """

    def line(jobs: Sequence[dict[str, Any]]) -> dict[str, float]:
        spent = np.array([job["spent"] for job in jobs])
        bound = np.array([job["binds"] for job in jobs])
        return {
            "jobs": len(jobs),
            "over": sum(job["over"] for job in jobs),
            "binding": int(bound.sum()),
            "least_spent_where_binding": float(spent[bound].min()) if bound.any() else float("nan"),
            "mean_spent": float(spent.mean()),
            "within_3_percent_where_binding": float((spent[bound] >= 0.97).mean())
            if bound.any()
            else float("nan"),
            "dry": sum(job["dry_at"] is not None and job["dry_at"] < 0.98 for job in jobs),
            "refused_jobs": sum(job["refused"] > 0 for job in jobs),
            "refused_rows": sum(job["refused"] for job in jobs),
            "cheaper_rows": sum(job["cheaper"] for job in jobs),
            **{
                name: float(np.mean([job[name] for job in jobs]))
                for name in (
                    "accuracy",
                    "expected",
                    "plan_expected",
                    "plan_accuracy",
                    "plan_spent",
                    "clairvoyant",
                    "forecast_accuracy",
                    "forecast_p50",
                    "forecast_p90",
                )
            },
        }

    budgets = sorted({job["budget"] for job in done})
    return {
        **line(done),
        "by_budget": [
            {"budget": budget, **line([job for job in done if job["budget"] == budget])} for budget in budgets
        ],
    }
