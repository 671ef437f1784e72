"""How fast a batch is, and how much memory it takes, through scripted models that answer at once.

    python benchmarks/batch.py --rows 100000 --json

One file of ROWS questions, two models, a budget between them, the durable SQLite ledger (synchronous=FULL) on
the file system of --folder. `rows_a_second` is over the whole command: reading the input twice, planning,
reserving, calling, settling, reading and grading answers, the journal, and the results. `peak_mb` is the
largest resident size of the process, `mb_at` its size at a tenth, a half and the whole of the rows: flat,
where memory does not grow with the input. `cpu_seconds` counts all threads; on a machine with other work rows
a second say more about that work.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from viaticum.agents.batch import run_batch
from viaticum.budgets import Ledger
from viaticum.catalogue import ModelSpec
from viaticum.models.scripted import ScriptedModel
from viaticum.routers.query import StaticRouter
from viaticum.types import Pair, RoutingTable, Row

WAYS = (
    Row(Pair("cheap", "cot"), 0.5, 4, 5, 38_500, 39_000),
    Row(Pair("expensive", "cot"), 0.8, 4, 5, 385_000, 390_000),
)
MEAN_NANOUSD = 200_000  # of a row: between the two ways


def model(name: str, price: float, text: str) -> ScriptedModel:
    spec = ModelSpec(
        name=name,
        description=name,
        kind="scripted",
        context_length=8192,
        input_price=price,
        output_price=price,
    )  # type: ignore[arg-type]
    return Forgetful(lambda messages, generation: text, spec=spec)


class Forgetful(ScriptedModel):
    """Does not keep what it was asked: a million chats are gigabytes."""

    def _text(self, messages: Any, generation: Any) -> str:
        self.calls.clear()
        return super()._text(messages, generation)


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def write_questions(path: Path, rows: int) -> None:
    with path.open("w") as file:
        for number in range(rows):
            row = {
                "id": f"q{number}",
                "question": f"What is {number} + 2?",
                "answer": str(5 + 2 * (number % 2)),
                "kind": "number",
            }
            file.write(json.dumps(row) + "\n")


def measure(rows: int, folder: Path, check: bool) -> dict[str, Any]:
    write_questions(folder / "in.jsonl", rows)
    sizes: dict[str, float] = {}
    marks = {0.1: "tenth", 0.5: "half"}

    def tell(event: dict[str, Any]) -> None:
        if event["event"] == "progress":
            for share in [share for share in marks if event["done"] >= share * rows]:
                sizes[marks.pop(share)] = round(resident_mb(), 1)
            sys.stderr.write(f"\r{event['done']}/{rows} {event['rate']:.0f} rows/s {resident_mb():.0f} MB  ")

    began, cpu = time.perf_counter(), time.process_time()
    ended = run_batch(
        folder / "in.jsonl",
        folder / "out.jsonl",
        budget=f"{rows * MEAN_NANOUSD / 1e9:.9f}",
        models={
            "cheap": model("cheap", 0.1, "The answer is 5."),
            "expensive": model("expensive", 1.0, "The answer is 7."),
        },
        router=StaticRouter(RoutingTable(WAYS)),
        ledger=folder / "ledger.db",
        tell=tell,
    )
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    sys.stderr.write("\n")
    sizes["whole"] = round(resident_mb(), 1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    told = {
        "rows": rows,
        "ending": ended.job.ending,
        "answered": ended.figures["answered"],
        "skipped": ended.figures["skipped"],
        "spent_of_limit": ended.figures["spent_nanousd"] / (ended.job.limit_nanousd or 1),
        "seconds": round(seconds, 1),
        "rows_a_second": round(rows / seconds, 1),
        "cpu_seconds": round(cpu, 1),
        "cpu_microseconds_a_row": round(1e6 * cpu / rows, 1),
        "peak_mb": round(peak, 1),
        "mb_at": sizes,
        "ledger_mb": round((folder / "ledger.db").stat().st_size / 2**20, 1),
        "load": [round(each, 2) for each in os.getloadavg()],
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    }
    if check:
        with Ledger(folder / "ledger.db") as ledger:
            told["ledger_check"] = ledger.check()
            budget = ledger.budget(ended.job.budget)
            told["held_nanousd"] = budget.held_nanousd
    return told


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument(
        "--folder", type=Path, help="where input, ledger and results lie; a temporary one by default"
    )
    parser.add_argument("--check", action="store_true", help="play the ledger's entries again at the end")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        told = measure(given.rows, Path(folder), given.check)
    sys.stdout.write(json.dumps(told, indent=None if given.json else 1) + "\n")


if __name__ == "__main__":
    main()
