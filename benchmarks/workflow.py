"""Overhead of the workflow per call: routing, ledger and checkpoints around a scripted model without delay.

    python benchmarks/workflow.py [--questions 300] [--postgres ADDRESS] [--json]

Ledger and checkpoints are durable: SQLite files with every write synced, or Postgres at the given address.
Prints p50 and p95 of one `solve`, how often each of its parts runs and how long it takes, and the time of one
sync of this disk.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from viaticum import FakeRouter, ScriptedModel, Viaticum
from viaticum.agents.workflow.checkpoints import is_postgres
from viaticum.agents.workflow.graph import Workflow
from viaticum.budgets import Ledger

WARM = 10
LEDGER = ("reserve", "dispatch", "settle", "hold", "lineage")
NODES = ("start", "route", "call", "parse")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--questions", type=int, default=300)
    parser.add_argument("--postgres", metavar="ADDRESS")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    results = measure(options.questions, options.postgres)
    if options.json:
        print(json.dumps(results))
        return
    print(
        f"one solve: p50 {results['p50_ms']} ms, p95 {results['p95_ms']} ms, "
        f"of which {results['cpu_ms']} ms processor time"
    )
    print(f"a sync of the disk: p50 {results['sync_ms']} ms; load {results['load']}")
    for name, part in results["parts"].items():
        print(f"  {name:24} {part['times']:5.1f} times, {part['ms']:7.3f} ms in all")


def measure(questions: int, postgres: str | None) -> dict[str, Any]:
    """Time the questions, and their parts in a second round, so that the first one has no timing overhead."""
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        seconds, cpu = _solve(questions, folder, postgres)
        parts = _Parts()
        parts.watch(Ledger, LEDGER, "ledger")
        parts.watch(Workflow, NODES, "node")
        _solve(questions, folder, postgres, parts)
        syncs = _syncs(folder)
    return {
        "questions": questions,
        "store": "postgres" if postgres else "sqlite",
        "p50_ms": round(1e3 * statistics.median(seconds), 2),
        "p95_ms": round(1e3 * statistics.quantiles(seconds, n=20)[18], 2),
        "min_ms": round(1e3 * min(seconds), 2),
        "cpu_ms": round(1e3 * cpu, 2),
        "sync_ms": round(1e3 * statistics.median(syncs), 3),
        "load": round(os.getloadavg()[0], 1),
        "parts": parts.per_question(questions + WARM),
    }


def _solve(
    questions: int, folder: str, postgres: str | None, parts: _Parts | None = None
) -> tuple[list[float], float]:
    """Seconds of each question, and seconds of processor time per question."""
    assert postgres is None or is_postgres(postgres)
    models = {"scripted": ScriptedModel("The answer is 5.")}
    router = FakeRouter("scripted+direct", "scripted+cot")
    seconds, cpu = [], 0.0
    with Viaticum(100, folder=folder, store=postgres, models=models, router=router) as client:
        if parts is not None:
            parts.watch(type(client.graph.checkpointer), ("put", "put_writes", "sync"), "checkpoint")
        for number in range(questions + WARM):
            if number == WARM:
                seconds, cpu = [], time.process_time()
            began = time.perf_counter()
            client.solve(f"What is 2 + {number}?")
            seconds.append(time.perf_counter() - began)
        return seconds, (time.process_time() - cpu) / questions


class _Parts:
    """Counts calls of methods and their durations; a node's includes the methods that it calls."""

    def __init__(self) -> None:
        self._seconds: dict[str, list[float]] = defaultdict(list)

    def watch(self, kind: type, names: tuple[str, ...], label: str) -> None:
        for name in filter(partial(hasattr, kind), names):
            setattr(kind, name, self._timed(getattr(kind, name), f"{label} {name}"))

    def _timed(self, method: Callable[..., Any], label: str) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                self._seconds[label].append(time.perf_counter() - began)

        timed.__name__ = method.__name__
        return timed

    def per_question(self, questions: int) -> dict[str, dict[str, float]]:
        return {
            name: {"times": len(took) / questions, "ms": round(1e3 * sum(took) / questions, 3)}
            for name, took in sorted(self._seconds.items())
        }


def _syncs(folder: str) -> list[float]:
    """Seconds of writing one page (4096 bytes) with its sync."""
    seconds = []
    with Path(folder, "sync").open("wb", buffering=0) as file:
        for _ in range(100):
            began = time.perf_counter()
            file.write(bytes(4096))
            os.fdatasync(file.fileno())
            seconds.append(time.perf_counter() - began)
    return seconds


if __name__ == "__main__":
    main()
