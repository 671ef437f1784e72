"""Quality and speed of planning a batch job (`viaticum.budgets.allocate` and `viaticum.budgets.pacing`).

optimum: plans for all questions of an outcome table against the optimum of the linear programme (HiGHS,
through scipy), at ten budgets, all at once and block by block with a sample of 1,000. Twice: with the worth
and cost of the outcomes, and with those that a router expects for unseen questions.

speed: synthetic questions and pairs, each case in its own process, with its peak resident memory.

jobs: simulated jobs. Rows are drawn from the held-out questions of the table; their expectations come from a
router fitted on the other questions (or are the mean of each pair over these, the same for all rows), and
their costs and right answers are the row's own outcomes. Rows run concurrently under a hard cap: a row whose
worst case (1,024 tokens) does not fit beside those in flight waits for them, and if it does not fit then
either, takes the best cheaper option that does, or is refused. A job has --rows rows, or more if its most
expensive call could cost more than a twentieth of its budget (not with --small). bias: expected costs are too
low by this factor.

    python benchmarks/planner.py OUTCOMES --prices PRICES.json --router FOLDER [--jobs 200] [--json]

--router is a router fitted on the questions that `held_out(near_duplicates(texts), 0.3, 0)` leaves; if the
folder does not exist, the router is fitted first (minutes) and saved there.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import scipy
from _planner_jobs import JobData, optimum_of, simulate, summary
from rich.console import Console
from rich.table import Table

from viaticum.budgets.allocate import SKIPPED, allocate
from viaticum.budgets.pacing import Pacer
from viaticum.outcomes import read_outcomes
from viaticum.quantiles import moments
from viaticum.routers.query.encoder import Encoder
from viaticum.routers.query.fit import fit
from viaticum.routers.query.outcome_matrix import Array, OutcomeMatrix, held_out, near_duplicates, read_prices
from viaticum.routers.query.parameters import RTRSettings
from viaticum.routers.query.rtr import RTRRouter

SHARE = 0.3  # of the questions that is held out
LONGEST = 1024.0  # token limit of an answer
BUDGETS = tuple(float(each) for each in np.geomspace(0.0001, 0.01, 10).round(6))  # mean dollars a question
JOB_BUDGETS = tuple(float(each) for each in np.geomspace(0.0003, 0.01, 10).round(6))
NANO = 1e9
SAMPLE = 1000
LARGEST_PART = 20  # the most expensive call costs at most 1/20 of a budget


def show_progress(text: str) -> None:
    sys.stderr.write(f"\r{text:<78}")
    sys.stderr.flush()


# --- what is expected, and what is
# ------------------------------------------------------------------------------------


def estimates_by_router(grid: OutcomeMatrix, router: RTRRouter, worst: Array, real: Array) -> JobData:
    """Expectations of the router for every held-out question."""
    predicted = router.predict_texts(grid.texts)
    pairs = len(grid.pairs)
    tokens, rate = predicted.tokens.numpy()[:, :pairs], router.parameters.prices.numpy()[:pairs] * NANO
    mean, spread = moments(tokens[..., 0], tokens[..., 1], LONGEST)
    return JobData(
        predicted.accuracy.numpy()[:, router.pair_columns].astype(np.float64),
        rate[:, 0] + rate[:, 1] * mean,
        rate[:, 1] * spread,
        worst,
        grid.correct,
        real,
    )


def estimates_by_means(
    grid: OutcomeMatrix, train: OutcomeMatrix, rate: Array, worst: Array, real: Array
) -> JobData:
    """The mean of each pair over the training questions, the same for every row."""
    tokens = np.minimum(train.tokens, LONGEST)
    lines = train.correct.mean(0), tokens.mean(0) * rate, tokens.std(0) * rate
    worth, cost, spread = (np.tile(line, (len(grid), 1)) for line in lines)
    return JobData(worth, cost, spread, worst, grid.correct, real)


def read(arguments: argparse.Namespace) -> tuple[OutcomeMatrix, dict[str, JobData]]:
    prices = read_prices(arguments.prices)
    grid = OutcomeMatrix.from_outcomes(read_outcomes(arguments.outcomes), prices)
    grid = grid.select(grid.complete)
    test = held_out(near_duplicates(grid.texts), SHARE, 0)
    folder, encoder = Path(arguments.router), Encoder(cache=arguments.embeddings or "")
    if not (folder / "router.json").exists():
        fit(
            grid.select(~test),
            encoder,
            settings=RTRSettings(seed=0),
            report=lambda stage, done, of: show_progress(f"router: {stage} {done}/{of}"),
        ).save(folder)
    held_out_grid = grid.select(test)
    rate = np.array([prices[pair.model][1] for pair in grid.pairs]) * 1e3  # nano-dollars a token
    worst, real = rate * LONGEST, np.minimum(held_out_grid.tokens, LONGEST) * rate
    router = RTRRouter.load(folder, encoder)
    return grid, {
        "router": estimates_by_router(held_out_grid, router, worst, real),
        "means": estimates_by_means(held_out_grid, grid.select(~test), rate, worst, real),
    }


# --- the parts
# --------------------------------------------------------------------------------------------------------


def optimum(name: str, worth: Array, cost: Array) -> list[dict[str, Any]]:
    """Worth of plans, and their shortfall against the optimum in percent, at each budget."""
    order = np.random.default_rng(0).permutation(len(worth))
    worth, cost = worth[order], cost[order]
    lines = []
    for budget in BUDGETS:
        show_progress(f"optimum, {name}: ${budget:g}")
        money = budget * len(worth) * NANO
        began = time.perf_counter()
        best = optimum_of(worth, cost, money)
        took = time.perf_counter() - began
        began = time.perf_counter()
        found = allocate(worth, cost, money)
        ours = time.perf_counter() - began
        paced, spent = _paced(worth, cost, money)
        lines.append(
            {
                "budget": budget,
                "optimum": best / len(worth),
                "at_once_short_percent": 100 * (1 - found.worth / best),
                "paced_short_percent": 100 * (1 - paced / best),
                "paced_spent": spent / money,
                "bound_over_optimum": found.bound / best - 1,
                "linear_programme_seconds": took,
                "at_once_seconds": ours,
            }
        )
    return lines


def _paced(worth: Array, cost: Array, money: float) -> tuple[float, float]:
    """Worth and cost of a plan made block by block, if every row costs what is expected."""
    at = np.sort(np.random.default_rng(1).choice(len(worth), min(SAMPLE, len(worth)), replace=False))
    pacer = Pacer(worth[at], cost[at], rows=len(worth), budget=money, at=at)
    value = spent = 0.0
    while pacer.rows_left:
        first = len(worth) - pacer.rows_left
        rows = np.arange(first, first + pacer.stride())
        options = pacer.choose(worth[rows], cost[rows])
        took = options != SKIPPED
        costs = np.where(took, cost[rows, options], 0.0)
        pacer.settle(options, costs, costs)
        value += float(worth[rows, options][took].sum())
        spent += float(costs.sum())
    return value, spent


def speed_of(how: str, rows: int, pairs: int) -> dict[str, float]:
    """In this process: seconds of planning alone, and peak memory."""
    import resource

    cost_of = np.geomspace(1e5, 1e7, pairs, dtype=np.float32)

    def block(seed: int, count: int) -> tuple[Array, Array]:
        rng = np.random.default_rng(seed)
        cost = np.exp(rng.standard_normal((count, pairs), dtype=np.float32) * np.float32(0.7)) * cost_of
        return rng.random((count, pairs), dtype=np.float32) * np.float32(0.5) + np.float32(0.1) * np.log10(
            cost
        ), cost

    sample = block(0, 4096)
    budget = 0.1 * float(sample[1].max(1).mean()) * rows
    value = 0.0
    if how == "at once":
        worth, cost = np.empty((rows, pairs), np.float32), np.empty((rows, pairs), np.float32)
        for number, first in enumerate(range(0, rows, 100_000), 1):
            some = slice(first, first + 100_000)
            worth[some], cost[some] = block(number, len(worth[some]))
        began = time.perf_counter()
        found = allocate(worth, cost, budget)
        seconds, short = time.perf_counter() - began, 1 - found.worth / found.bound
    else:
        pacer, seconds, spent = Pacer(*sample, rows=rows, budget=budget), 0.0, 0.0
        while pacer.rows_left:
            worth, cost = block(pacer.rows_left, pacer.stride())
            began = time.perf_counter()
            options = pacer.choose(worth, cost)
            took = options != SKIPPED
            costs = np.where(took, cost[np.arange(len(options)), options], 0.0).astype(np.float64)
            pacer.settle(options, costs, costs)
            seconds += time.perf_counter() - began
            value += float(took.sum())
            spent += float(costs.sum())
        short = 1 - spent / budget
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "rows": rows,
        "pairs": pairs,
        "seconds": seconds,
        "peak_bytes": peak,
        "short_percent": 100 * short,
    }


def speed(rows: int, pairs: int) -> dict[str, Any]:
    found = {}
    for how in ("at once", "paced"):
        show_progress(f"speed, {how}")
        command = [
            sys.executable,
            __file__,
            "-",
            "--speed-only",
            how,
            "--speed-rows",
            str(rows),
            "--speed-pairs",
            str(pairs),
        ]
        found[how] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


def jobs(
    data: JobData, name: str, count: int, least: int, small: bool, bias: float, in_flight: int
) -> dict[str, Any]:
    done = []
    for number in range(count):
        show_progress(f"jobs by {name}, bias {bias:g}: {number}/{count}")
        dollars = JOB_BUDGETS[number % len(JOB_BUDGETS)]
        rows = least if small else max(least, math.ceil(LARGEST_PART * data.worst.max() / NANO / dollars))
        done.append(
            simulate(
                data,
                rows=rows,
                dollars=dollars,
                bias=bias,
                in_flight=in_flight,
                seed=number,
            )
        )
    return {"expected_by": name, "bias": bias, **summary(done), "by_job": done}


# --- the command
# ------------------------------------------------------------------------------------------------------


def show(results: dict[str, Any]) -> None:
    console = Console(width=170, highlight=False)
    print(", ".join(f"{name} {value}" for name, value in results["conditions"].items()))
    for name, lines in results.get("optimum", {}).items():
        table = Table(
            "budget",
            "optimum",
            "at once short, %",
            "paced short, %",
            "paced spent",
            "LP s",
            "ours s",
            title=f"Optimum, {name}",
        )
        for line in lines:
            table.add_row(
                f"{line['budget']:g}",
                f"{line['optimum']:.4f}",
                f"{line['at_once_short_percent']:.4f}",
                f"{line['paced_short_percent']:.4f}",
                f"{line['paced_spent']:.4f}",
                f"{line['linear_programme_seconds']:.2f}",
                f"{line['at_once_seconds']:.2f}",
            )
        console.print(table, "")
    for how, line in results.get("speed", {}).items():
        print(f"speed, {how}: " + ", ".join(f"{name} {value:,.6g}" for name, value in line.items()))
    for each in results.get("jobs", ()):
        print({name: value for name, value in each.items() if name not in ("by_job", "by_budget")})
        table = Table(*each["by_budget"][0])
        for line in each["by_budget"]:
            table.add_row(*(f"{value:.4g}" for value in line.values()))
        console.print(table, "")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("outcomes", help="an outcome table: JSONL or Parquet")
    parser.add_argument("--prices", type=Path, help="dollars a million tokens of each model")
    parser.add_argument("--router", help="folder of a router fitted on the questions not held out")
    parser.add_argument("--embeddings", type=Path, help="the cache of embeddings")
    parser.add_argument("--jobs", type=int, default=200, help="simulated jobs (default 200)")
    parser.add_argument("--rows", type=int, default=1000, help="rows of a job (default 1000)")
    parser.add_argument("--small", action="store_true", help="no more rows, however small the budget")
    parser.add_argument("--in-flight", type=int, default=16, help="rows that run at once (default 16)")
    parser.add_argument("--part", action="append", choices=("optimum", "speed", "jobs"), help="default: all")
    parser.add_argument("--speed-rows", type=int, default=1_000_000)
    parser.add_argument("--speed-pairs", type=int, default=30)
    parser.add_argument("--speed-only", choices=("at once", "paced"), help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    return parser


def main() -> None:
    parser = _parser()
    arguments = parser.parse_args()
    if arguments.speed_only:
        print(json.dumps(speed_of(arguments.speed_only, arguments.speed_rows, arguments.speed_pairs)))
        return
    parts = arguments.part or ["optimum", "speed", "jobs"]
    results: dict[str, Any] = {
        "conditions": {
            "numpy": np.__version__,
            "scipy": scipy.__version__,
            "cores": os.cpu_count(),
            "load": round(os.getloadavg()[0], 1),
        }
    }
    if "speed" in parts:
        results["speed"] = speed(arguments.speed_rows, arguments.speed_pairs)
    if {"optimum", "jobs"} & set(parts):
        if not arguments.prices or not arguments.router:
            parser.error("--prices and --router are needed for optimum and jobs")
        grid, data = read(arguments)
        results["conditions"] |= {
            "questions": len(grid),
            "held_out": len(data["router"]),
            "pairs": len(grid.pairs),
        }
    if "optimum" in parts:
        results["optimum"] = {
            "outcomes": optimum("outcomes", grid.correct, grid.cost * NANO),
            "router": optimum("router", data["router"].worth, data["router"].cost),
        }
    if "jobs" in parts:
        few = max(1, arguments.jobs // 5)
        runs = (
            ("router", arguments.jobs, 1.0),
            ("means", few, 1.0),
            ("router", few, 1.5),
            ("router", few, 0.67),
        )
        results["jobs"] = [
            jobs(data[name], name, count, arguments.rows, arguments.small, bias, arguments.in_flight)
            for name, count, bias in runs
        ]
    show_progress("")
    sys.stderr.write("\r")
    if arguments.json:
        print(json.dumps(results))
    else:
        show(results)


if __name__ == "__main__":
    main()
