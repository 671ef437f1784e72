"""SIGKILL at random moments of a batch, and again, and again: nothing is paid for twice and no row is lost."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from batch_jobs import check_ledger, read_lines, write_questions

from viaticum.agents.batch.run import job_folder
from viaticum.jobs import Job

DRIVER = Path(__file__).resolve().parents[2] / "support" / "batch_jobs.py"
ROWS, KILLS = 400, 20


def command(folder: Path, ledger: str, pause: float) -> list[str]:
    return [sys.executable, str(DRIVER), str(folder), "0.06", ledger, str(pause)]


def killed(folder: Path, ledger: str, kills: int, pause: float = 0.05) -> int:
    """Run the job and kill it so many times while it works; how many kills came before its end."""
    dice, done = random.Random(3), 0
    for _ in range(kills):
        process = subprocess.Popen(command(folder, ledger, pause), stdout=subprocess.PIPE)
        calls = folder / "calls.txt"
        before = calls.stat().st_size if calls.exists() else 0
        while process.poll() is None and (not calls.exists() or calls.stat().st_size == before):
            time.sleep(0.005)  # until it asks
        time.sleep(dice.random() * 0.4)
        process.send_signal(signal.SIGKILL)
        done += process.wait() == -signal.SIGKILL
        assert process.stdout is not None
        process.stdout.close()
    return done


@pytest.mark.parametrize("where", ["sqlite", "postgres"])
def test_killed_twenty_times(tmp_path: Path, where: str, request: pytest.FixtureRequest) -> None:
    ledger_at = str(tmp_path / "ledger.db") if where == "sqlite" else request.getfixturevalue("postgres")
    kills = KILLS if where == "sqlite" else 5
    write_questions(tmp_path / "in.jsonl", ROWS)
    assert killed(tmp_path, ledger_at, kills) >= kills - 3
    done = subprocess.run(
        command(tmp_path, ledger_at, 0.0), capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    job = Job.load(job_folder(tmp_path / "out.jsonl"))
    assert job.ending == told["ending"] != "drained"

    rows, posts = check_ledger(tmp_path, ledger_at, ROWS)
    assert [each["id"] for each in read_lines(tmp_path / "out.jsonl")] == [f"q{n}" for n in range(ROWS)]
    # A call that was cut before its text was kept is made again, under the same hold: at most those that ran.
    made = Counter((tmp_path / "calls.txt").read_text().splitlines())
    again = sum(made.values()) - len(made)
    assert again <= 8 * kills
    assert any(len(row.calls) > 1 for row in rows), "plans and further pairs were among them"
    os.write(1, f"{kills} kills: {len(posts)} calls paid, {again} cut and made again\n".encode())
