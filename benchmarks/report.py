"""Time and size of a report on a large job: 100,000 rows, its ledger, and every single pair's outcomes.

    python benchmarks/report.py --rows 100000 --json

The job is made by a seeded script through a real ledger (not timed): four routes, one in eight of two calls,
a failed row in fifty, a text by two models in twenty. Timed are reading with counting, and writing each
format, in one process; `cpu_seconds` is the processor's time of reading and HTML together. `without` is the
same without an outcome table.
A site of that job is made twice: the second time nothing changed.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from viaticum.budgets import Claim, Ledger, Settlement
from viaticum.budgets.tagging import tagged
from viaticum.jobs import ROWS, Call, Job, JobRow, Preview, row_line
from viaticum.money import Price
from viaticum.outcomes import write_outcomes
from viaticum.reports.build import render
from viaticum.reports.numbers import read_numbers
from viaticum.reports.site import build_site
from viaticum.types import Outcome, Pair, TokenCount

PRICES = {
    name: Price.per_million(*each)
    for name, each in {"small": ("0.05", "0.1"), "large": ("0.4", "1.2")}.items()
}
PAIRS = {
    Pair("small", "direct"): (0.25, 12),
    Pair("small", "cot"): (0.45, 110),
    Pair("small", "pot"): (0.5, 90),
    Pair("large", "direct"): (0.5, 12),
    Pair("large", "cot"): (0.7, 120),
    Pair("large", "pot"): (0.75, 85),
}
READ, CHUNK = 70, 2_000


def drawn(count: int, seed: int) -> Iterator[tuple[str, str, dict[Pair, Outcome]]]:
    """Id, text and every pair's outcome of each question."""
    rng = np.random.default_rng(seed)
    for n in range(count):
        hard, name = rng.normal(), f"q{n:06d}"
        text = f"Natalia has {n} clips and buys {int(rng.integers(3, 90))} more a day. How many after a week?"
        found = {}
        for pair, (skill, length) in PAIRS.items():
            right = bool(rng.random() < skill + 0.15 * hard)
            made = max(1, int(length * rng.lognormal(0, 0.4)))
            cost = PRICES[pair.model].cost(READ, made)
            answer = "1" if right else "0"
            found[pair] = Outcome(
                "sums",
                name,
                text,
                pair.model,
                pair.strategy,
                answer,
                right,
                READ,
                made,
                cost,
                made / 50,
                "stop",
            )
        yield name, text, found


def make_job(folder: Path, count: int, seed: int) -> tuple[Path, Path]:
    """Write a job with its ledger, and the outcome table; returns both paths."""
    rng, routes = np.random.default_rng(seed + 1), list(PAIRS)[1:5]
    job, table = folder / "results.jsonl.job", folder / "table.parquet"
    job.mkdir(parents=True)
    outcomes, limit = list[Outcome](), 10**12
    with (
        Ledger(folder / "ledger.db") as ledger,
        (job / ROWS).open("w", encoding="utf-8") as file,
        tagged(team="search"),
    ):
        ledger.create("night", limit_nanousd=limit)
        held: list[tuple[Claim, Settlement]] = []
        for n, (name, text, found) in enumerate(drawn(count, seed)):
            outcomes += found.values()
            row, calls = _row(n, name, text, found, [routes[int(rng.integers(4))], Pair("large", "pot")])
            file.write(row_line(row))
            held += calls
            if len(held) >= CHUNK or n == count - 1:
                ledger.reserve_many("night", [claim for claim, _ in held], dispatch=True)
                ledger.settle_many([settlement for _, settlement in held])
                held.clear()
    write_outcomes(table, outcomes)
    previews = tuple(
        Preview(limit * k // 4, 0.4 + 0.04 * k, limit * k // 5, limit * k // 4) for k in (1, 2, 4, 8)
    )
    Job(
        input="questions.jsonl",
        results=str(folder / "results.jsonl"),
        rows=count,
        budget="night",
        limit_nanousd=limit,
        ledger=str(folder / "ledger.db"),
        policy="paced",
        previews=previews,
        began="2026-11-21T08:00:00+00:00",
        ended="2026-11-21T12:00:00+00:00",
        ending="completed",
    ).save(job)
    return job, table


def _row(
    n: int, name: str, text: str, found: dict[Pair, Outcome], plan: list[Pair]
) -> tuple[JobRow, list[tuple[Claim, Settlement]]]:
    plan = plan if n % 8 == 0 else plan[:1]
    if n % 50 == 7:
        return JobRow(
            name, text, "failed", f"no answer within {n} s", gold="1", correct=False, route=str(plan[0])
        ), []
    calls, held = [], []
    for index, pair in enumerate(plan):
        one, key = found[pair], f"night/{name}/{index}"
        used = TokenCount(one.input_tokens or 0, one.output_tokens or 0)
        worst = {pair.model: TokenCount(used.input_tokens, 2_000)}
        tags = {"model": pair.model, "strategy": pair.strategy}
        held.append((Claim(key, worst, PRICES, tags=tags), Settlement(key, {pair.model: used})))
        usage = {pair.model: [used.input_tokens, used.output_tokens]}
        calls.append(
            Call(str(pair), key, one.cost_nanousd or 0, usage, one.seconds or 0.0, "stop", one.answer)
        )
    last, cost = found[plan[-1]], sum(call.cost_nanousd for call in calls)
    pieces = [["large", f"{text} First"], ["small", " the days are counted, then the sum is made."]]
    row = JobRow(
        name,
        text,
        "answered",
        answer=last.answer,
        gold="1",
        correct=last.correct,
        route=" then ".join(map(str, plan)),
        pair=str(plan[-1]),
        accuracy=PAIRS[plan[0]][0],
        cost_p50=cost,
        cost_p90=2 * cost,
        tokens_p50=last.output_tokens,
        tokens_p90=2 * (last.output_tokens or 0),
        cost_nanousd=cost,
        seconds=sum(call.seconds for call in calls),
        calls=tuple(calls),
        pieces=pieces if n % 20 == 1 else None,
        number=n,
        seen=False,
    )
    return row, held


def measure(job: Path, table: Path | None) -> dict[str, Any]:
    began, cpu = time.perf_counter(), time.process_time()
    numbers = read_numbers([job], outcomes=table)
    read = time.perf_counter() - began
    found: dict[str, Any] = {"read_seconds": round(read, 2)}
    for name in ("html", "md", "json"):
        began = time.perf_counter()
        content = render(numbers, name)  # type: ignore[arg-type]
        found[name] = {"seconds": round(time.perf_counter() - began, 2), "mb": round(len(content) / 1e6, 3)}
        if name == "html":
            found["cpu_seconds"] = round(time.process_time() - cpu, 2)
    found["html"]["with_reading"] = round(read + found["html"]["seconds"], 2)
    return found


def measure_site(job: Path, table: Path, site: Path) -> list[float]:
    times = []
    for _ in range(2):
        began = time.perf_counter()
        build_site([job.parent], site, outcomes=[table])
        times.append(round(time.perf_counter() - began, 2))
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        job, table = make_job(Path(name) / "work", asked.rows, asked.seed)
        result: dict[str, Any] = {
            "rows": asked.rows,
            "rows_mb": round((job / ROWS).stat().st_size / 1e6, 1),
            "with": measure(job, table),
            "without": measure(job, None),
            "site_seconds": measure_site(job, table, Path(name) / "site"),
            "python": platform.python_version(),
        }
    if asked.json:
        print(json.dumps(result))
        return
    for part in ("with", "without"):
        html = result[part]["html"]
        sys.stdout.write(
            f"{part} an outcome table: {html['with_reading']} s, {html['mb']} MB of HTML "
            f"({result[part]['read_seconds']} s of it reading)\n"
        )
    sys.stdout.write(f"site: {result['site_seconds'][0]} s, then {result['site_seconds'][1]} s\n")
    sys.stdout.write(f"{asked.rows:,} rows, {result['rows_mb']} MB\n")


if __name__ == "__main__":
    main()
