"""Fuzz the reading and comparing of answers with many examples; print count, speed and the slowest example.

Runs tests/strategies/test_answers_fuzz.py, with the same limits, on more examples than a test can afford:

    python benchmarks/fuzz_answers.py --examples 100000 --processes 2

Times include the generation of examples by hypothesis. The exit status is that of the test.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

TEST = Path(__file__).resolve().parent.parent / "tests" / "strategies" / "test_answers_fuzz.py"


def main() -> int:
    parser = argparse.ArgumentParser(description="Fuzz read_answer and equivalent with hypothesis.")
    parser.add_argument("--examples", type=int, default=5_000)
    parser.add_argument("--processes", type=int, default=1, help="each with a seed of its own")
    arguments = parser.parse_args()
    share = -(-arguments.examples // arguments.processes)
    with tempfile.TemporaryDirectory() as folder:
        reports = [Path(folder) / f"{seed}.json" for seed in range(arguments.processes)]
        started = time.perf_counter()
        runs = [run(share, seed, report) for seed, report in enumerate(reports)]
        failed = [code for each in runs if (code := each.wait())]
        seconds = time.perf_counter() - started
        if not failed:
            print_summary(merged([json.loads(report.read_text("utf-8")) for report in reports]), seconds)
    return failed[0] if failed else 0


def run(examples: int, seed: int, report: Path) -> subprocess.Popen[bytes]:
    settings = {
        "VIATICUM_FUZZ_EXAMPLES": str(examples),
        "VIATICUM_FUZZ_SEED": str(seed),
        "VIATICUM_FUZZ_REPORT": str(report),
    }
    return subprocess.Popen(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:randomly", str(TEST)],
        env=os.environ | settings,
        cwd=TEST.parent.parent,
    )


def merged(reports: list[dict[str, Any]]) -> dict[str, Any]:
    """One report of several: sums, and the slowest of all."""
    whole = dict(reports[0])
    for name in ("examples", "comparisons_stopped"):
        whole[name] = sum(report[name] for report in reports)
    for name in ("read", "compare"):
        steps = [report[name] for report in reports]
        slowest = max(steps, key=lambda step: float(step["seconds"]))
        whole[name] = slowest | {key: sum(step[key] for step in steps) for key in ("steps", "total")}
    return whole


def print_summary(report: dict[str, Any], seconds: float) -> None:
    print(f"{report['examples']:,} examples in {seconds:,.0f} s, no exception, each within its time limit")
    for name, what in (("read", "read and compared with itself"), ("compare", "compared")):
        step, limit = report[name], report["limits"][name]
        mean = step["total"] / step["steps"]
        print(
            f"{what}: {step['steps']:,} times, {mean * 1e3:.2f} ms on average, "
            f"{step['seconds']:.3f} s at most (limit {limit:g} s)\n  slowest: {shortened(step['example'])}"
        )
    print(f"symbolic comparisons stopped at their time limit: {report['comparisons_stopped']}")


def shortened(text: str, characters: int = 160) -> str:
    return text if len(text) <= characters else f"{text[:characters]}... ({len(text)} characters)"


if __name__ == "__main__":
    sys.exit(main())
