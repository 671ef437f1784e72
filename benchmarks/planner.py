"""How good and how fast the planning of a batch job is (`viaticum.budgets.allocate` and
`viaticum.budgets.pacing`).

optimum: plans of all questions of an outcome table beside the optimum of the linear programme (HiGHS, through
scipy), at ten budgets: all at once, and a block at a time with a sample of 1,000. Twice: worth and cost are
what the outcomes say, and what a router expects of questions that it has not seen.

speed: synthetic questions and pairs, each in a process of its own, with its largest resident memory.

jobs: simulated jobs. Rows are drawn from the held-out questions of the table; what is expected of them comes
from a router fitted on the others (or is the mean of each pair on the others, the same for all rows), and
what they cost and whether they are right are the row's own outcomes. Rows are in flight side by side under a
hard cap: a row whose worst case (1,024 tokens) does not fit beside those in flight waits for them, and where
it does not fit then takes the best cheaper way that does, or is refused. A job has --rows rows, and more
where its dearest call could cost more than a twentieth of its budget (--small: it has not). bias: what is
expected is so many times too low.

    python benchmarks/planner.py OUTCOMES --prices PRICES.json --router FOLDER [--jobs 200] [--json]

--router holds a router fitted on the questions that `held_out(near_duplicates(texts), 0.3, 0)` leaves;
without a folder there, it is fitted first (minutes) and kept.
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
from _planner_jobs import Told, optimum_of, simulate, summary
from rich.console import Console
from rich.table import Table

from viaticum.budgets.allocate import SKIPPED, allocate
from viaticum.budgets.pacing import Pacer
from viaticum.budgets.quantiles import moments
from viaticum.outcomes import read_outcomes
from viaticum.routers.query.encoder import Encoder
from viaticum.routers.query.fit import fit
from viaticum.routers.query.outcome_matrix import Array, OutcomeMatrix, held_out, near_duplicates, read_prices
from viaticum.routers.query.parameters import RTRSettings
from viaticum.routers.query.rtr import RTRRouter

SHARE = 0.3  # of the questions is held out
LONGEST = 1024.0  # tokens of an answer, where it is cut
BUDGETS = tuple(float(each) for each in np.geomspace(0.0001, 0.01, 10).round(6))  # mean dollars a question
JOB_BUDGETS = tuple(float(each) for each in np.geomspace(0.0003, 0.01, 10).round(6))
NANO = 1e9
SAMPLE = 1000
LARGEST_PART = 20  # of a budget, that the dearest call may cost


def say(text: str) -> None:
    sys.stderr.write(f"\r{text:<78}")
    sys.stderr.flush()


# --- what is expected, and what is
# ------------------------------------------------------------------------------------


def told_by_router(grid: OutcomeMatrix, router: RTRRouter, worst: Array, real: Array) -> Told:
    """The table of every held-out question, as the router tells it."""
    predicted = router.predict_texts(grid.texts)
    pairs = len(grid.pairs)
    tokens, rate = predicted.tokens.numpy()[:, :pairs], router.parameters.prices.numpy()[:pairs] * NANO
    mean, spread = moments(tokens[..., 0], tokens[..., 1], LONGEST)
    return Told(
        predicted.accuracy.numpy()[:, router.pair_columns].astype(np.float64),
        rate[:, 0] + rate[:, 1] * mean,
        rate[:, 1] * spread,
        worst,
        grid.correct,
        real,
    )


def told_by_means(grid: OutcomeMatrix, train: OutcomeMatrix, rate: Array, worst: Array, real: Array) -> Told:
    """Each pair's mean over the training questions, the same for every row."""
    tokens = np.minimum(train.tokens, LONGEST)
    lines = train.correct.mean(0), tokens.mean(0) * rate, tokens.std(0) * rate
    worth, cost, spread = (np.tile(line, (len(grid), 1)) for line in lines)
    return Told(worth, cost, spread, worst, grid.correct, real)


def read(arguments: argparse.Namespace) -> tuple[OutcomeMatrix, dict[str, Told]]:
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
            report=lambda stage, done, of: say(f"router: {stage} {done}/{of}"),
        ).save(folder)
    asked = grid.select(test)
    rate = np.array([prices[pair.model][1] for pair in grid.pairs]) * 1e3  # nano-dollars a token
    worst, real = rate * LONGEST, np.minimum(asked.tokens, LONGEST) * rate
    router = RTRRouter.load(folder, encoder)
    return grid, {
        "router": told_by_router(asked, router, worst, real),
        "means": told_by_means(asked, grid.select(~test), rate, worst, real),
    }


# --- the parts
# --------------------------------------------------------------------------------------------------------


def optimum(name: str, worth: Array, cost: Array) -> list[dict[str, Any]]:
    """Worth of plans, and what they fall short of the best, in percent, at each budget."""
    order = np.random.default_rng(0).permutation(len(worth))
    worth, cost = worth[order], cost[order]
    lines = []
    for budget in BUDGETS:
        say(f"optimum, {name}: ${budget:g}")
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
    """What a plan made as rows come is worth and costs, where every row costs what is expected."""
    at = np.sort(np.random.default_rng(1).choice(len(worth), min(SAMPLE, len(worth)), replace=False))
    pacer = Pacer(worth[at], cost[at], rows=len(worth), budget=money, at=at)
    value = spent = 0.0
    while pacer.rows_left:
        first = len(worth) - pacer.rows_left
        rows = np.arange(first, first + pacer.stride())
        ways = pacer.choose(worth[rows], cost[rows])
        took = ways != SKIPPED
        costs = np.where(took, cost[rows, ways], 0.0)
        pacer.settle(ways, costs, costs)
        value += float(worth[rows, ways][took].sum())
        spent += float(costs.sum())
    return value, spent


def speed_of(how: str, rows: int, pairs: int) -> dict[str, float]:
    """In this process: seconds of planning alone, and the most memory that the process ever had."""
    import resource

    cost_of = np.geomspace(1e5, 1e7, pairs, dtype=np.float32)

    def block(seed: int, count: int) -> tuple[Array, Array]:
        dice = np.random.default_rng(seed)
        cost = np.exp(dice.standard_normal((count, pairs), dtype=np.float32) * np.float32(0.7)) * cost_of
        return dice.random((count, pairs), dtype=np.float32) * np.float32(0.5) + np.float32(0.1) * np.log10(
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
            ways = pacer.choose(worth, cost)
            took = ways != SKIPPED
            costs = np.where(took, cost[np.arange(len(ways)), ways], 0.0).astype(np.float64)
            pacer.settle(ways, costs, costs)
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
        say(f"speed, {how}")
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
    told: Told, name: str, count: int, least: int, small: bool, bias: float, in_flight: int
) -> dict[str, Any]:
    done = []
    for number in range(count):
        say(f"jobs by {name}, bias {bias:g}: {number}/{count}")
        dollars = JOB_BUDGETS[number % len(JOB_BUDGETS)]
        rows = least if small else max(least, math.ceil(LARGEST_PART * told.worst.max() / NANO / dollars))
        done.append(
            simulate(
                told,
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


def main() -> None:
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
        grid, told = read(arguments)
        results["conditions"] |= {
            "questions": len(grid),
            "held_out": len(told["router"]),
            "pairs": len(grid.pairs),
        }
    if "optimum" in parts:
        results["optimum"] = {
            "outcomes": optimum("outcomes", grid.correct, grid.cost * NANO),
            "router": optimum("router", told["router"].worth, told["router"].cost),
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
            jobs(told[name], name, count, arguments.rows, arguments.small, bias, arguments.in_flight)
            for name, count, bias in runs
        ]
    say("")
    sys.stderr.write("\r")
    if arguments.json:
        print(json.dumps(results))
    else:
        show(results)


if __name__ == "__main__":
    main()
