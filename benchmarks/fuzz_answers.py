"""Fuzz the reading and comparing of answers with many examples; print count, speed and the slowest example.

Runs tests/strategies/test_answers_fuzz.py, with the same limits, on more examples than a test can afford:

    python benchmarks/fuzz_answers.py --examples 100000

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
    arguments = argparse.ArgumentParser(description="Fuzz read_answer and equivalent with hypothesis.")
    arguments.add_argument("--examples", type=int, default=5_000)
    examples = arguments.parse_args().examples
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        settings = {"VIATICUM_FUZZ_EXAMPLES": str(examples), "VIATICUM_FUZZ_REPORT": str(report)}
        started = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:randomly", str(TEST)],
            env=os.environ | settings,
            cwd=TEST.parent.parent,
        )
        seconds = time.perf_counter() - started
        if done.returncode == 0:
            print_summary(json.loads(report.read_text(encoding="utf-8")), seconds)
    return done.returncode


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
