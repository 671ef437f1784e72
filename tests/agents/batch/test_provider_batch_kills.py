"""SIGKILL at every step of a provider's batch: nothing is paid for twice, nothing is free, no row is lost."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import pytest
from batch_jobs import write_questions
from batch_provider import batch_provider
from provider_batch_jobs import COST, POINTS, compare, job_server, rows_in

from viaticum.agents.batch import job_folder
from viaticum.budgets import Ledger
from viaticum.jobs import Job

ROWS, KILLS = 60, 10


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("form", "points"),
    [
        ("openai", range(2 * len(POINTS))),
        (
            "anthropic",
            [2 * number for number, (kind, _) in enumerate(POINTS) if kind is not Ledger] + [9, 13],
        ),
    ],
    ids=["openai", "anthropic"],
)
def test_killed_at_every_step(tmp_path: Path, form: str, points: Sequence[int]) -> None:
    """Before and after each step, each time in a job of its own, which the next run goes on with."""
    passed = 0
    provider = batch_provider(pace=0.03, fate=lambda number: "error" if number == 4 else "ok")
    with provider as server, job_server() as jobs:
        for point in points:
            folder = tmp_path / str(point)
            folder.mkdir()
            write_questions(folder / "in.jsonl", 8)
            server.batches.clear()
            server.direct.clear()
            jobs.start(folder, server.url, form, point)
            killed = jobs.ended() == -signal.SIGKILL
            passed += killed
            jobs.start(folder, server.url, form)
            assert jobs.ended() == 0
            found = compare(folder, server, 8)
            where = f"{'after' if point % 2 else 'before'} {POINTS[point // 2][1]}"
            assert (found.rows, found.missing, found.free, found.double) == (8, 0, 0, 0), where
            assert len(server.batches) == 1, where
            assert found.late == 3, where
    assert passed >= len(points) - (form == "anthropic")  # it uploads nothing to note


def test_killed_ten_times(tmp_path: Path) -> None:
    rng, kills = random.Random(7), 0
    write_questions(tmp_path / "in.jsonl", ROWS)
    with batch_provider(pace=0.3) as server, job_server() as jobs:
        server.pause = 0.02
        for _ in range(4 * KILLS):
            if kills == KILLS:
                break
            process = jobs.start(tmp_path, server.url, "openai")
            time.sleep(rng.random() * 0.35)
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
            kills += jobs.ended() == -signal.SIGKILL
        jobs.start(tmp_path, server.url, "openai")
        assert jobs.ended() == 0
        found = compare(tmp_path, server, ROWS)
    assert Job.load(job_folder(tmp_path / "out.jsonl")).ending == "completed"
    assert kills >= 3
    assert (found.rows, found.missing, found.late) == (ROWS, 0, ROWS // 2)
    assert (found.free, found.double, found.findings) == (0, 0, 0)
    assert all(row.correct for row in rows_in(tmp_path))
    planned = ROWS // 2 * COST // 2 + ROWS // 2 * COST
    assert abs(found.posted - planned) <= 0.03 * planned
