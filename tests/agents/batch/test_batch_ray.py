"""A batch on a local Ray cluster of two workers, with its ledger in Postgres, while workers are killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from importlib.util import find_spec
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
from batch_jobs import all_plans_router, check_ledger, models, read_lines, two_plans_router, write_questions

from viaticum.agents.batch import run as batch
from viaticum.agents.batch import run_batch
from viaticum.agents.batch.engines import Process
from viaticum.agents.batch.steps import RowTools
from viaticum.agents.batch.workers import (
    Cluster,
    Plans,
    Rows,
    Worker,
    WorkerConfig,
    process_remotely,
)
from viaticum.errors import AuthenticationFailed, InputError, ProviderUnavailable

ROOT = Path(__file__).resolve().parents[3]
DRIVER = ROOT / "tests" / "support" / "ray_jobs.py"
ROWS = 100
SECONDS = 280
pytestmark = pytest.mark.timeout(600)
needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="pip install 'viaticum[ray]'")


def started(folder: Path, budget: str, ledger: str, pause: float, engine: str) -> subprocess.Popen[str]:
    folder.mkdir(exist_ok=True)
    write_questions(folder / "in.jsonl", ROWS)
    path = os.pathsep.join([str(ROOT), str(DRIVER.parent)])
    command = [sys.executable, str(DRIVER), str(folder), budget, ledger, str(pause), engine]
    return subprocess.Popen(
        command,
        env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process: subprocess.Popen[str]) -> dict[str, Any]:
    out, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, errors
    told: dict[str, Any] = json.loads(out.splitlines()[-1])
    return told


def calls_of(folder: Path) -> list[list[str]]:
    file = folder / "calls.txt"
    return [line.split() for line in file.read_text().splitlines()] if file.exists() else []


def kill_workers(folder: Path, process: subprocess.Popen[str], after: tuple[int, ...]) -> set[int]:
    """Kill who made the last call, each time that so many calls are made."""
    killed: set[int] = set()
    for count in after:
        while process.poll() is None and len(calls_of(folder)) < count:
            time.sleep(0.01)
        assert process.poll() is None, process.communicate()[1]
        alive = [int(each[0]) for each in calls_of(folder) if int(each[0]) not in killed]
        os.kill(alive[-1], signal.SIGKILL)
        killed.add(alive[-1])
    return killed


@needs_ray
def test_a_worker_is_killed_in_the_middle(tmp_path: Path, postgres: str) -> None:
    process = started(tmp_path / "ray", "1", postgres, 0.05, "ray")
    killed = kill_workers(tmp_path / "ray", process, (60, 160))
    told = ended(process)
    assert told["ending"] == "completed"
    made = calls_of(tmp_path / "ray")
    assert len({each[0] for each in made}) >= 2 + len(killed), "others took their place"
    check_ledger(tmp_path / "ray", postgres, ROWS)
    again = len(made) - len({tuple(each[1:]) for each in made})
    assert again <= 4 * 2 * len(killed), "a call whose text was not kept is made again under its hold"

    ended(started(tmp_path / "here", "1", postgres, 0.0, "local"))
    rows = {each["id"]: each["answer"] for each in read_lines(tmp_path / "here" / "out.jsonl")}
    assert {each["id"]: each["answer"] for each in read_lines(tmp_path / "ray" / "out.jsonl")} == rows


@needs_ray
def test_the_whole_job_is_killed_and_goes_on_with_less_money_than_it_wants(
    tmp_path: Path, postgres: str
) -> None:
    process = started(tmp_path / "job", "0.015", postgres, 0.05, "ray")
    while process.poll() is None and len(calls_of(tmp_path / "job")) < 60:
        time.sleep(0.01)
    process.kill()
    process.communicate(timeout=SECONDS)
    told = ended(started(tmp_path / "job", "0.015", postgres, 0.0, "ray"))
    assert told["ending"] in ("completed", "budget_exhausted")
    check_ledger(tmp_path / "job", postgres, ROWS)


class Away:
    """Workers that are threads of this process: what they are sent and give back are bytes all the same."""

    def __init__(self, config: WorkerConfig, workers: int = 2) -> None:
        self.given: SimpleQueue[bytes] = SimpleQueue()
        self.done: SimpleQueue[bytes | Exception] = SimpleQueue()
        self.sent = 0
        for _ in range(workers):
            threading.Thread(target=self._work, args=(Worker(config),), daemon=True).start()

    def _work(self, worker: Worker) -> None:
        while chunk := self.given.get():
            self.done.put(worker.answer(chunk))

    def process(self, planned: Plans, tools: RowTools) -> Rows:
        yield from process_remotely(planned, tools, 4, self._send, lambda: self.done.get(timeout=0.05))

    def _send(self, chunk: bytes) -> None:
        self.sent += 1
        self.given.put(chunk)


def away(monkeypatch: pytest.MonkeyPatch) -> list[Away]:
    """Jobs of this test are done by such workers; those that were made."""
    made: list[Away] = []

    def by(engine: str, cluster: Cluster | None, ledger: str) -> Any:
        def process(config: WorkerConfig) -> Process:
            made.append(Away(config))
            return made[-1].process

        return process

    monkeypatch.setattr(batch, "engine_for", by)
    return made


def test_chunks_that_are_answered_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = away(monkeypatch)
    write_questions(tmp_path / "in.jsonl", ROWS)
    ledger = str(tmp_path / "ledger.db")
    done = run_batch(
        tmp_path / "in.jsonl",
        tmp_path / "out.jsonl",
        budget=1,
        ledger=ledger,
        models=models(),
        router=all_plans_router(),
        cluster=Cluster(),
        concurrency=4,
    )
    assert done.job.ending == "completed"
    assert made[0].sent >= ROWS / 4
    check_ledger(tmp_path, ledger, ROWS)


def test_a_chunk_that_two_workers_answer_is_paid_for_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a worker dies after its last call and before what it gives back is known."""
    away(monkeypatch)
    answer, configs = Worker.answer, list[WorkerConfig]()
    made = Worker.__init__

    def begin(self: Worker, config: WorkerConfig) -> None:
        configs.append(config)
        made(self, config)

    def twice(self: Worker, chunk: bytes) -> bytes:
        answer(self, chunk)
        other = Worker.__new__(Worker)
        made(other, configs[0])
        return answer(other, chunk)

    monkeypatch.setattr(Worker, "__init__", begin)
    monkeypatch.setattr(Worker, "answer", twice)
    write_questions(tmp_path / "in.jsonl", ROWS)
    ledger = str(tmp_path / "ledger.db")
    done = run_batch(
        tmp_path / "in.jsonl",
        tmp_path / "out.jsonl",
        budget=1,
        ledger=ledger,
        models=models(),
        router=all_plans_router(),
        concurrency=20,
    )
    assert done.job.ending == "completed"
    assert done.figures["right"] == ROWS
    check_ledger(tmp_path, ledger, ROWS)


def test_what_concerns_all_rows_ends_the_job_with_the_error_that_a_worker_met(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    away(monkeypatch)
    write_questions(tmp_path / "in.jsonl", ROWS)
    refused = models(cheap=AuthenticationFailed("the key is not known"))
    with pytest.raises(AuthenticationFailed, match="the key is not known"):
        run_batch(
            tmp_path / "in.jsonl",
            tmp_path / "out.jsonl",
            budget=1,
            ledger=tmp_path / "ledger.db",
            models=refused,
            router=two_plans_router(),
            policy="cheapest:0.1",
            concurrency=4,
        )


def test_workers_that_cannot_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = away(monkeypatch)
    monkeypatch.setattr(
        Worker, "answer", lambda self, chunk: made[0].done.put(OSError("no node is left")) or b""
    )
    write_questions(tmp_path / "in.jsonl", ROWS)
    with pytest.raises(ProviderUnavailable, match="no node is left"):
        run_batch(
            tmp_path / "in.jsonl",
            tmp_path / "out.jsonl",
            budget=1,
            ledger=tmp_path / "ledger.db",
            models=models(),
            router=two_plans_router(),
            concurrency=4,
        )


def test_a_job_that_is_to_end_does_not_wait_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    away(monkeypatch)
    monkeypatch.setattr(Worker, "answer", lambda self, chunk: time.sleep(60))
    write_questions(tmp_path / "in.jsonl", ROWS)
    stop, began = threading.Event(), time.monotonic()
    threading.Timer(0.5, stop.set).start()
    done = run_batch(
        tmp_path / "in.jsonl",
        tmp_path / "out.jsonl",
        budget=1,
        ledger=tmp_path / "ledger.db",
        models=models(),
        router=two_plans_router(),
        concurrency=4,
        stop=stop,
        drain_seconds=0.5,
    )
    assert done.job.ending == "drained"
    assert time.monotonic() - began < 30


def test_what_does_not_go_together(tmp_path: Path) -> None:
    write_questions(tmp_path / "in.jsonl", 3)
    with pytest.raises(InputError, match="give one in Postgres"):
        run_batch(
            tmp_path / "in.jsonl",
            tmp_path / "out.jsonl",
            budget=1,
            engine="ray",
            ledger=tmp_path / "ledger.db",
        )
    with pytest.raises(InputError, match="for the engine ray"):
        run_batch(tmp_path / "in.jsonl", tmp_path / "out.jsonl", budget=1, cluster=Cluster())
    with pytest.raises(InputError, match="1 worker or more"):
        Cluster(workers=0)
    assert not (tmp_path / "out.jsonl.job").exists()
