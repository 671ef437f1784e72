"""Speed of the ledger: reserve + settle pairs per second, and the spend query over 10 million entries.

    python benchmarks/ledger.py --json

Pairs are measured with 1 and with 16 processes. A pair is two durable transactions. The baseline is the bare
database: two transactions of one insert each, on the same file system, with the same synchronous setting and
number of processes; `ratio_to_sqlite` is the ledger's pairs per second over the baseline's, for one process.
The calls are two scopes deep, one leaf per process. Times in ms are medians, with p99 beside them. The
database itself generates the 10 million entries, for speed and without hashes; the spend of a scope is summed
in the transaction that posts, so reading it does not touch the entries. Top-level keys are those of SQLite;
"postgres" has the same for a server from the wheel (fsync on).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import sqlite3
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from viaticum.budgets import Ledger, Window
from viaticum.money import Price
from viaticum.types import TokenCount

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "support"))
from postgres_server import new_database, running_server

PRICES = {"model": Price.per_million("0.03", "0.17")}
WORST, USED = {"model": TokenCount(700, 400)}, {"model": TokenCount(700, 95)}
TEXT = "x" * 300  # about what an entry weighs


def ledger_pairs(where: str, name: str) -> Iterator[None]:
    with Ledger(where) as ledger:
        ledger.create("org", limit_nanousd=10**15)
        ledger.create(name, parent="org")
        number = 0
        while True:
            key = f"{name}/{number}"
            ledger.reserve(name, key, WORST, PRICES, tags={"strategy": "cot"})
            ledger.settle(key, USED)
            number += 1
            yield


def bare_sqlite_pairs(where: str, name: str) -> Iterator[None]:
    with closing(sqlite3.connect(where, isolation_level=None, timeout=60)) as shell:
        shell.execute("PRAGMA journal_mode = WAL")
        shell.execute("PRAGMA synchronous = FULL")
        shell.execute("CREATE TABLE IF NOT EXISTS bare (id INTEGER PRIMARY KEY, text TEXT)")
        while True:
            for _ in range(2):
                shell.execute("BEGIN IMMEDIATE")
                shell.execute("INSERT INTO bare (text) VALUES (?)", [TEXT])
                shell.execute("COMMIT")
            yield


def bare_postgres_pairs(where: str, name: str) -> Iterator[None]:
    import psycopg

    with psycopg.connect(where, autocommit=True) as shell:
        shell.execute("SELECT pg_advisory_lock(1)")
        shell.execute("CREATE TABLE IF NOT EXISTS bare (id BIGSERIAL PRIMARY KEY, text TEXT)")
        shell.execute("SELECT pg_advisory_unlock(1)")
        while True:
            for _ in range(2):
                shell.execute("INSERT INTO bare (text) VALUES (%s)", [TEXT])
            yield


KINDS: dict[str, Callable[[str, str], Iterator[None]]] = {
    "ledger": ledger_pairs,
    "bare sqlite": bare_sqlite_pairs,
    "bare postgres": bare_postgres_pairs,
}


def work(kind: str, where: str, name: str, seconds: float, start: Any, out: Any) -> None:
    """One process: wait for the others, then count pairs, with the seconds each took."""
    pairs = KINDS[kind](where, name)
    next(pairs)
    start.wait()
    taken = []
    end = time.perf_counter() + seconds
    while (began := time.perf_counter()) < end:
        next(pairs)
        taken.append(time.perf_counter() - began)
    pairs.close()  # type: ignore[attr-defined]
    out.put(taken)


def measure(kind: str, where: str, processes: int, seconds: float, turn: int) -> dict[str, float]:
    """turn: makes the keys new ones; a key that was used before would only be looked up."""
    context = multiprocessing.get_context("spawn")
    start, out = context.Barrier(processes), context.Queue()
    workers = [
        context.Process(
            target=work, args=(kind, where, f"{kind} {processes} {turn} {number}", seconds, start, out)
        )
        for number in range(processes)
    ]
    for worker in workers:
        worker.start()
    taken = sorted(each for _ in workers for each in out.get())
    for worker in workers:
        worker.join()
    return {
        "pairs_per_second": round(len(taken) / seconds, 1),
        "p50_ms": round(1000 * statistics.median(taken), 2),
        "p99_ms": round(1000 * taken[int(0.99 * (len(taken) - 1))], 2),
    }


def compare(bare: str, where: str, bare_where: str, seconds: float) -> dict[str, Any]:
    """Alternate ledger and bare database, so that other load affects both; medians of three rounds."""
    result: dict[str, Any] = {}
    for processes in (1, 16):
        rounds = [
            tuple(
                measure(kind, place, processes, seconds, turn)
                for kind, place in (("ledger", where), (bare, bare_where))
            )
            for turn in range(3)
        ]
        ours, theirs = (
            {key: statistics.median(each[side][key] for each in rounds) for key in rounds[0][0]}
            for side in (0, 1)
        )
        ratio = statistics.median(one["pairs_per_second"] / two["pairs_per_second"] for one, two in rounds)
        result |= {
            f"pairs_per_second_{processes}": ours["pairs_per_second"],
            f"pair_p50_ms_{processes}": ours["p50_ms"],
            f"pair_p99_ms_{processes}": ours["p99_ms"],
            f"bare_pairs_per_second_{processes}": theirs["pairs_per_second"],
            f"bare_pair_p99_ms_{processes}": theirs["p99_ms"],
            f"ratio_{processes}": round(ratio, 3),
        }
        tell(f"{bare}, {processes}: {result}")
    return result


POSTED = (
    "'post', 85150, 795, 0, '2026-01-01T00:00:00.000000+00:00',"
    " '{\"model\": {\"input_tokens\": 700, \"output_tokens\": 95}}', '{}', '{}', 'big',"
)


def fill_sqlite(path: Path, entries: int) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as shell:
        for (trigger,) in shell.execute("SELECT name FROM sqlite_schema WHERE type = 'trigger'").fetchall():
            shell.execute(f"DROP TRIGGER {trigger}")
        shell.execute("PRAGMA cache_size = -200000")
        shell.execute("BEGIN")
        for first in range(0, entries, 100_000):
            shell.execute(
                "WITH RECURSIVE n (i) AS (SELECT ? UNION ALL SELECT i + 1 FROM n WHERE i < ?)"
                " INSERT INTO entries (budget, key, kind, nanousd, tokens, overrun, at, usage, prices, note, "
                "root,"
                f" number, hash) SELECT 'leaf', 'big/' || i, {POSTED} 100 + i, '' FROM n",
                [first, min(first + 100_000, entries) - 1],
            )
        shell.execute("COMMIT")


def fill_postgres(address: str, entries: int) -> None:
    import psycopg

    with psycopg.connect(address, autocommit=True) as shell:
        shell.execute("SET search_path TO viaticum")
        shell.execute("SET session_replication_role TO replica")
        shell.execute(
            "INSERT INTO entries (budget, key, kind, nanousd, tokens, overrun, at, usage, prices, note, "
            "root, number,"
            f" hash) SELECT 'leaf', 'big/' || i, {POSTED} 100 + i, '' FROM generate_series(1, {entries}) i"  # type: ignore[call-overload]
        )


def spend_query(where: str, fill: Callable[[], None]) -> dict[str, Any]:
    """What a scope spent, in its window too, over all entries; the first read after opening by itself."""
    with Ledger(where) as ledger:
        ledger.create("big", limit_nanousd=10**18, window=Window("month", rolling=True))
        ledger.create("leaf", parent="big")
        fill()
        ledger.reserve("leaf", "one", WORST, PRICES)
        ledger.settle("one", USED)
    with Ledger(where) as ledger:
        taken = []
        for _ in range(300):
            began = time.perf_counter()
            budget = ledger.budget("big")
            taken.append(1000 * (time.perf_counter() - began))
            assert budget.posted_nanousd > 0
    return {
        "spend_query_ms": round(statistics.median(taken), 3),
        "spend_query_p99_ms": round(sorted(taken)[-4], 3),
        "spend_query_first_ms": round(taken[0], 3),
    }


@contextmanager
def folder_in(parent: str | None) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=parent) as folder:
        yield Path(folder)


def sqlite_numbers(parent: str | None, seconds: float, entries: int) -> dict[str, Any]:
    with folder_in(parent) as folder:
        result = compare("bare sqlite", str(folder / "ledger.db"), str(folder / "bare.db"), seconds)
        path = folder / "big.db"
        result |= spend_query(str(path), lambda: fill_sqlite(path, entries))
        result["spend_file_bytes"] = path.stat().st_size
    result["ratio_to_sqlite"] = result.pop("ratio_1")
    result["ratio_to_sqlite_16"] = result.pop("ratio_16")
    return result


def postgres_numbers(seconds: float, entries: int) -> dict[str, Any]:
    with running_server(fsync=True) as server:
        where, bare, big = (new_database(server, name) for name in ("ledger", "bare", "big"))
        result = compare("bare postgres", where, bare, seconds)
        result |= spend_query(big, lambda: fill_postgres(big, entries))
    result["ratio_to_postgres"] = result.pop("ratio_1")
    result["ratio_to_postgres_16"] = result.pop("ratio_16")
    return result


def tell(text: str) -> None:
    sys.stderr.write(text + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each of three rounds")
    parser.add_argument("--entries", type=int, default=10_000_000, help="for the spend query")
    parser.add_argument("--folder", help="where the SQLite files lie (the system's temporary folder)")
    parser.add_argument("--store", choices=["sqlite", "postgres", "both"], default="both")
    arguments = parser.parse_args()
    result: dict[str, Any] = {}
    if arguments.store != "postgres":
        result |= sqlite_numbers(arguments.folder, arguments.seconds, arguments.entries)
    if arguments.store != "sqlite":
        result["postgres"] = postgres_numbers(arguments.seconds, arguments.entries)
    result["conditions"] = {
        "entries": arguments.entries,
        "seconds": arguments.seconds,
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "sqlite": sqlite3.sqlite_version,
    }
    if arguments.json:
        print(json.dumps(result))
        return
    for name, value in result.items():
        for key, number in value.items() if isinstance(value, dict) else [("", value)]:
            print(f"{name} {key}".strip(), number, sep=": ")


if __name__ == "__main__":
    main()
