"""How fast programs run in each sandbox: p50 and p95 of a short one, and programs a second with two workers.

    python benchmarks/sandbox.py --json

A short program is what a model writes for a word problem: a few names, a few lines of arithmetic, one print.
Each time is that of one `run`, from the call to the result, with the worker warm. `programs_per_second` is
what `auto` gives two threads; the back ends are counted alone as well. Leaves out the first program of a
worker, which waits for its start, and the first one that imports numpy: both are under "start".
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from concurrent.futures import ThreadPoolExecutor

from rich.console import Console
from rich.table import Table

from viaticum.strategies.sandbox import Limits, Sandbox, open_sandbox

SHORT = """
litres_at_start = 200
# 30% of the water is used on Monday
used_on_monday = litres_at_start * {number} / 100
left_after_monday = litres_at_start - used_on_monday
# a quarter of what is left is used on Tuesday
answer = left_after_monday - left_after_monday / 4
print(answer)
"""
NUMPY = "import numpy as np\nprint(np.linalg.solve([[2, 1], [1, 3]], [3, {number}]))\n"
SYMPY = "from sympy import symbols, solve\nx = symbols('x')\nprint(solve(x**2 - {number}, x))\n"


def milliseconds(sandbox: Sandbox, program: str, runs: int) -> list[float]:
    """The times of so many runs, in order, one after the other."""
    taken = []
    for number in range(runs):
        result = sandbox.run(program.format(number=number + 2), Limits(seconds=30.0))
        if not result.ok:
            raise SystemExit(f"{result.backend}: {result.error}")
        taken.append(1000 * result.seconds)
    return taken


def programs_per_second(sandbox: Sandbox, runs: int) -> float:
    """With two threads, each with a worker."""
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(lambda _: milliseconds(sandbox, SHORT, 1), range(4)))  # both workers warm
        started = time.perf_counter()
        list(threads.map(lambda _: milliseconds(sandbox, SHORT, 1), range(runs)))
        return runs / (time.perf_counter() - started)


def p95(times: list[float]) -> float:
    return statistics.quantiles(times, n=20, method="inclusive")[-1]


def measure(runs: int) -> dict[str, float | int | str]:
    found: dict[str, float | int | str] = {}
    for backend in ("monty", "bwrap"):
        started = time.perf_counter()
        with open_sandbox(backend, workers=2) as sandbox:
            found[f"{backend}_start_ms"] = 1000 * (time.perf_counter() - started)
            milliseconds(sandbox, SHORT, 3)
            times = milliseconds(sandbox, SHORT, runs)
            found[f"{backend}_p50_ms"], found[f"{backend}_p95_ms"] = statistics.median(times), p95(times)
            found[f"{backend}_programs_per_second"] = programs_per_second(sandbox, runs)
            if backend == "bwrap":
                for name, program in (("numpy", NUMPY), ("sympy", SYMPY)):
                    found[f"bwrap_{name}_start_ms"] = milliseconds(sandbox, program, 1)[0]
                    times = milliseconds(sandbox, program, max(4, runs // 5))
                    found[f"bwrap_{name}_p50_ms"] = statistics.median(times)
    with open_sandbox("auto", workers=2) as sandbox:
        found["programs_per_second"] = programs_per_second(sandbox, runs)
    return {
        **{name: round(float(value), 3) for name, value in found.items()},
        "runs": runs,
        "cores": os.cpu_count() or 0,
        "machine": platform.machine(),
        "python": platform.python_version(),
        "kernel": platform.release(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=200, help="programs a figure (default 200)")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    arguments = parser.parse_args()
    found = measure(max(20, arguments.runs))
    if arguments.json:
        print(json.dumps(found))
        return
    table = Table("back end", "start", "p50", "p95", "programs/s", box=None, pad_edge=False)
    for backend in ("monty", "bwrap"):
        table.add_row(
            backend,
            *(f"{found[f'{backend}_{name}_ms']} ms" for name in ("start", "p50", "p95")),
            f"{found[f'{backend}_programs_per_second']}",
        )
    for name in ("numpy", "sympy"):
        table.add_row(
            f"bwrap, {name}",
            f"{found[f'bwrap_{name}_start_ms']} ms",
            f"{found[f'bwrap_{name}_p50_ms']} ms",
            "",
            "",
        )
    table.add_row("auto", "", "", "", f"{found['programs_per_second']}")
    Console().print(table)
    print(
        f"{found['runs']} programs a figure, two workers, {found['cores']} cores, Python {found['python']},"
        f" Linux {found['kernel']}"
    )


if __name__ == "__main__":
    main()
