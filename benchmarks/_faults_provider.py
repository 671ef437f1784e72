"""The part of benchmarks/faults.py with a provider's batches: half of a job's rows wait, the job is killed.

The stub is that of the tests (tests/support/batch_provider.py). Kills are SIGKILLs of the whole process: at
steps of a batch (written down, uploaded, created, collected, settled, each before or after), and at random.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "support"))
from batch_jobs import write_questions
from batch_provider import batch_provider
from provider_batch_jobs import COST, POINTS, compare, job_server

MOST_DIFFERENCE = 0.03  # of the dollars that were planned
# In the order of a job: before and after the batch is written down, uploaded, created, fetched and settled.
STEPS = (3, 5, 8, 9, 12, 15, 18)


def run(rows: int, kills: int, seed: int, form: str = "openai") -> tuple[bool, dict[str, Any]]:
    """Run the campaign; returns whether all is right, and its figures."""
    rng, killed, began = random.Random(seed), 0, time.monotonic()
    points: list[int | None] = [*([None] * max(0, kills - len(STEPS))), *STEPS]
    with tempfile.TemporaryDirectory() as name, batch_provider(pace=0.5) as server, job_server() as jobs:
        folder = Path(name)
        write_questions(folder / "in.jsonl", rows)
        server.pause = 0.02
        for _ in range(10 * kills):
            if killed == kills:
                break
            point = points.pop(0) if points else None
            process = jobs.start(folder, server.url, form, point)
            if point is None:
                time.sleep(0.2 + rng.random() * 2)
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            killed += jobs.ended() == -signal.SIGKILL
        jobs.start(folder, server.url, form)
        if jobs.ended():
            raise SystemExit("the job did not end")
        found = compare(folder, server, rows)
        batches = len(server.batches)
    planned = rows // 2 * COST // 2 + (rows - rows // 2) * COST
    difference = found.posted / planned - 1
    right = not (found.missing or found.free or found.double or found.findings)
    right = right and abs(difference) <= MOST_DIFFERENCE
    steps = ", ".join(f"{'after' if each % 2 else 'before'} {POINTS[each // 2][1]}" for each in STEPS)
    print(
        f"provider's batches ({form}): {rows} rows, {found.late} of them late in {batches} batches, "
        f"{killed} kills (the first at random, then {steps}); double {found.double}, lost {found.missing}, "
        f"free {found.free}, unknown {found.unknown}; ${found.posted / 1e9:.6f} posted, "
        f"${planned / 1e9:.6f} planned ({difference:+.2%}); findings of the ledger {found.findings}; "
        f"{time.monotonic() - began:.0f} s"
    )
    return right, {"kills": killed, "planned_nanousd": planned, **asdict(found)}
