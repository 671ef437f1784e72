"""SIGKILL at random moments of a batch, again and again: nothing is paid for twice and no row is lost."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pytest
from batch_jobs import CHEAP, CHECKED, EXPENSIVE, JUDGE, check_ledger, read_lines, write_questions

from viaticum.agents.batch import job_folder
from viaticum.jobs import Job

SERVER = Path(__file__).resolve().parents[2] / "support" / "batch_jobs.py"
ROWS, KILLS = 400, 20


class JobServer:
    """Runs the job of a folder in processes that can be killed."""

    def __init__(self, stdin: IO[str], stdout: IO[str], folder: Path, ledger: str, plan: str) -> None:
        self._stdin, self._stdout = stdin, stdout
        self._folder, self._ledger, self._plan = folder, ledger, plan

    def start(self, pause: float) -> int:
        """Begin, or go on with, the job; the process that runs it."""
        arguments = [str(self._folder), "0.06", self._ledger, pause, self._plan]
        self._stdin.write(json.dumps(arguments) + "\n")
        self._stdin.flush()
        return int(self._stdout.readline())

    def ended(self) -> tuple[int, str]:
        """The exit code of the process, and what it printed. Its code is the last line."""
        printed = ""
        while line := self._stdout.readline():
            if line.lstrip("-").strip().isdigit():
                return int(line), printed
            printed += line
        raise AssertionError("the server of jobs ended")


@contextmanager
def job_server(folder: Path, ledger: str, plan: str = "votes") -> Iterator[JobServer]:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, str(SERVER)], text=True, **pipes) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        yield JobServer(process.stdin, process.stdout, folder, ledger, plan)
        process.stdin.close()
        assert process.wait(120) == 0


def is_running(pid: int) -> bool:
    """Whether a process has not ended yet, a zombie being one that has."""
    try:
        return ") Z" not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


def killed(jobs: JobServer, folder: Path, kills: int, pause: float = 0.1) -> int:
    """Run the job and kill it so many times while it works; how many kills came before its end."""
    rng, done = random.Random(3), 0
    calls = folder / "calls.txt"
    for _ in range(kills):
        before = calls.stat().st_size if calls.exists() else 0
        process = jobs.start(pause)
        while is_running(process) and (not calls.exists() or calls.stat().st_size == before):
            time.sleep(0.005)  # until it asks
        time.sleep(rng.random() * 0.4)
        if is_running(process):
            os.kill(process, signal.SIGKILL)
        code, _ = jobs.ended()
        done += code == -signal.SIGKILL
    return done


@pytest.mark.parametrize("where", ["sqlite", "postgres"])
def test_killed_twenty_times(tmp_path: Path, where: str, request: pytest.FixtureRequest) -> None:
    ledger_at = str(tmp_path / "ledger.db") if where == "sqlite" else request.getfixturevalue("postgres")
    kills = KILLS if where == "sqlite" else 5
    write_questions(tmp_path / "in.jsonl", ROWS)
    with job_server(tmp_path, ledger_at) as jobs:
        assert killed(jobs, tmp_path, kills) >= kills - 3
        jobs.start(0.0)
        code, printed = jobs.ended()
    assert code == 0
    figures = json.loads(printed)
    job = Job.load(job_folder(tmp_path / "out.jsonl"))
    assert job.ending == figures["ending"] != "drained"

    rows, posts = check_ledger(tmp_path, ledger_at, ROWS)
    assert [each["id"] for each in read_lines(tmp_path / "out.jsonl")] == [f"q{n}" for n in range(ROWS)]
    # A call that was cut before its text was kept is made again, under the same hold: at most those that ran.
    made = Counter((tmp_path / "calls.txt").read_text().splitlines())
    again = sum(made.values()) - len(made)
    assert again <= 8 * kills
    assert any(len(row.calls) > 1 for row in rows), "plans and further pairs were among them"
    os.write(1, f"{kills} kills: {len(posts)} calls paid, {again} cut and made again\n".encode())


def test_rows_of_a_plan_with_a_check_killed_eight_times(tmp_path: Path) -> None:
    """Every answer, verdict and answer after a no is paid for once, and each row is right."""
    ledger_at, rows = str(tmp_path / "ledger.db"), 120
    write_questions(tmp_path / "in.jsonl", rows)
    with job_server(tmp_path, ledger_at, "check") as jobs:
        assert killed(jobs, tmp_path, 8) >= 5
        jobs.start(0.0)
        code, _ = jobs.ended()
    assert code == 0
    found, posts = check_ledger(tmp_path, ledger_at, rows)
    checked = [row for row in found if row.route == str(CHECKED) and row.state == "answered"]
    assert len(checked) > rows / 2
    for row in checked:
        odd = row.number % 2
        paid = [call.pair for call in row.calls if call.answer is not None or call.pair == str(JUDGE)]
        assert row.correct
        assert row.pair == str(CHEAP if odd else EXPENSIVE)
        assert paid == list(map(str, CHECKED.pairs[: 2 if odd else 3]))
    os.write(1, f"{len(checked)} rows by the check, {len(posts)} calls paid\n".encode())
