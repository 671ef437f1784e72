"""Simulate a job with real outcomes under a hard cap, and summarise many jobs. Used by planner.py."""

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
SAMPLE = 400  # rows of a job that are known in advance


@dataclass(frozen=True)
class JobData:
    """Q questions and K options: expectations [Q, K], worst cost of a call [K], real outcomes [Q, K].

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

    def part(self, rows: Array, bias: float) -> JobData:
        """Some questions, with expected costs too low by the factor `bias`."""
        return JobData(
            self.worth[rows],
            self.cost[rows] / bias,
            self.spread[rows] / bias,
            self.worst,
            self.right[rows],
            self.real[rows],
        )


def optimum_of(worth: Array, cost: Array, budget: float) -> float:
    """The optimum of the linear programme: shares of options, at most one option per question in all."""
    questions, options = worth.shape
    one_each = coo_array(
        (
            np.ones(questions * options),
            (np.repeat(np.arange(questions), options), np.arange(questions * options)),
        )
    )
    above = vstack([csr_array(one_each), csr_array(cost.ravel()[None] / budget)])
    limits = np.append(np.ones(questions), 1.0)
    found = linprog(-worth.ravel(), A_ub=above, b_ub=limits, bounds=(0, 1), method="highs")
    if found.status != 0:
        raise RuntimeError(f"the linear programme was not solved: {found.message}")
    return float(-found.fun)


class Cap:
    """A budget with holds: posted + held never exceeds it."""

    def __init__(self, data: JobData, budget: float) -> None:
        self.data, self.budget, self.spent, self.held = data, budget, 0.0, 0.0

    def fits(self, option: int) -> bool:
        return option == SKIPPED or self.spent + self.held + self.data.worst[option] <= self.budget

    def best_that_fits(self, row: int, than: int) -> int:
        """The best of the cheaper options whose worst case fits, or none."""
        options = np.flatnonzero(self.data.cost[row] < self.data.cost[row, than])
        options = options[[self.fits(int(option)) for option in options]] if len(options) else options
        return int(options[self.data.worth[row, options].argmax()]) if len(options) else SKIPPED

    def hold(self, option: int) -> None:
        self.held += 0.0 if option == SKIPPED else float(self.data.worst[option])

    def post(self, row: int, option: int) -> float:
        if option == SKIPPED:
            return 0.0
        self.held -= float(self.data.worst[option])
        self.spent += float(self.data.real[row, option])
        return float(self.data.real[row, option])


def simulate(
    data: JobData, *, rows: int, dollars: float, bias: float, in_flight: int, seed: int
) -> dict[str, Any]:
    """Run one job with a mean budget in dollars per question; results are parts of the rows or budget."""
    rng = np.random.default_rng(seed)
    data = data.part(rng.choice(len(data), rows, replace=rows > len(data)), bias)
    budget = dollars * rows * NANO
    at = np.sort(rng.choice(rows, min(SAMPLE, rows), replace=False))
    pacer = Pacer(
        data.worth[at],
        data.cost[at],
        rows=rows,
        budget=budget,
        spread=data.spread[at],
        at=at,
        worst=data.worst,
    )
    forecast = pacer.forecast()
    cap = Cap(data, budget)
    options: list[int] = []
    flight: list[tuple[int, int, int]] = []  # row, way planned, way taken
    cheaper: list[int] = []
    refused: list[int] = []

    def settle_first() -> None:
        row, planned, took = flight.pop(0)
        expected, spread = (
            0.0 if planned == SKIPPED else values[row, planned] for values in (data.cost, data.spread)
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
            pacer.choose(data.worth[block], data.cost[block], data.spread[block]).tolist(), first
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
            options.append(took)
    while flight:
        settle_first()
    return _job_summary(
        data, np.array(options), budget, cap.spent, refused, cheaper, forecast, bias, dollars, pacer
    )


def _job_summary(
    data: JobData,
    options: Array,
    budget: float,
    spent: float,
    refused: list[int],
    cheaper: list[int],
    forecast: Any,
    bias: float,
    dollars: float,
    pacer: Pacer,
) -> dict[str, Any]:
    rows = np.arange(len(options))

    def of(values: Array, chosen: Array) -> float:
        return float(np.where(chosen == SKIPPED, 0.0, values[rows, chosen]).sum())

    best_plan = allocate(data.worth, data.cost * bias, budget)  # without bias or variance
    unconstrained = of(data.real, data.worth.argmax(1))
    short = np.array([*refused, *cheaper])
    return {
        "budget": dollars,
        "spent": spent / budget,
        "over": spent > budget,
        "binds": unconstrained > budget,
        "accuracy": of(data.right, options) / len(options),
        "expected": of(data.worth, options) / len(options),
        "plan_expected": best_plan.bound / len(options),
        "plan_accuracy": of(data.right, best_plan.chosen) / len(options),
        "plan_spent": of(data.real, best_plan.chosen) / budget,
        "clairvoyant": allocate(data.right, data.real, budget).bound / len(options),
        "forecast_accuracy": forecast.accuracy,
        "forecast_p50": forecast.cost_p50 / budget,
        "forecast_p90": forecast.cost_p90 / budget,
        "refused": len(refused),
        "cheaper": len(cheaper),
        "dearest": float(data.worst.max() / budget),
        "dry_at": float(short.min() / len(options)) if len(short) else None,
        "skipped": int((options == SKIPPED).sum()) - len(refused),
        "ratio": float(np.average(pacer.ratios)),
    }


def summary(done: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Aggregate all jobs, and by budget.

    dry: a planned row was refused, or took a cheaper option, before the last 2% of rows.
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
