"""A batch on a local Ray cluster of two workers, with its ledger in Postgres, while workers are killed."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
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
RAY_ENVIRONMENT = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # nodes on the loopback address, as on Windows and macOS
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_hex(32),  # of the clusters of this module alone
}
pytestmark = pytest.mark.timeout(600)


class Jobs:
    """Runs jobs in forks of a process that has Ray and Viaticum loaded (`ray_jobs.py`)."""

    def __init__(self) -> None:
        path = os.pathsep.join([str(ROOT), str(DRIVER.parent)])
        self._server = subprocess.Popen(
            [sys.executable, str(DRIVER)],
            env=os.environ | RAY_ENVIRONMENT | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.cluster: str = self.ask("cluster")

    def ask(self, *request: Any) -> Any:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())

    def start(
        self, folder: Path, budget: str, ledger: str, pause: float, engine: str, cluster: str | None = None
    ) -> RunningJob:
        """Start a job. cluster: the address of a Ray cluster; None starts one of its own."""
        folder.mkdir(exist_ok=True)
        write_questions(folder / "in.jsonl", ROWS)
        pid = self.ask("run", str(folder), budget, ledger, pause, engine, cluster)
        return RunningJob(self, folder, pid)

    def close(self) -> None:
        self._server.communicate(timeout=120)


class RunningJob:
    def __init__(self, jobs: Jobs, folder: Path, pid: int) -> None:
        self._jobs, self._folder, self._pid = jobs, folder, pid
        self._code: int | None = None

    def poll(self) -> int | None:
        """The exit code, or None while the job runs."""
        if self._code is None:
            self._code = self._jobs.ask("poll", self._pid)
        return self._code

    def errors(self) -> str:
        return (self._folder / "stderr.txt").read_text()

    def kill(self) -> None:
        assert self.poll() is None, self.errors()
        os.kill(self._pid, signal.SIGKILL)
        assert self._wait() == -signal.SIGKILL

    def figures(self) -> dict[str, Any]:
        """How the job ended, once it has."""
        assert self._wait() == 0, self.errors()
        figures: dict[str, Any] = json.loads((self._folder / "stdout.txt").read_text().splitlines()[-1])
        return figures

    def _wait(self) -> int:
        began = time.monotonic()
        while (code := self.poll()) is None:
            assert time.monotonic() - began < SECONDS, self.errors()
            time.sleep(0.02)
        return code


@pytest.fixture(scope="module")
def jobs() -> Iterator[Jobs]:
    """One server of jobs with one Ray cluster for this module: starting either takes longer than a job."""
    jobs = Jobs()
    yield jobs
    jobs.close()


def calls_of(folder: Path) -> list[list[str]]:
    file = folder / "calls.txt"
    return [line.split() for line in file.read_text().splitlines()] if file.exists() else []


def kill_workers(folder: Path, job: RunningJob, after: tuple[int, ...]) -> set[int]:
    """Kill who made the last call, each time that so many calls are made."""
    killed: set[int] = set()
    for count in after:
        while job.poll() is None and len(calls_of(folder)) < count:
            time.sleep(0.01)
        assert job.poll() is None, job.errors()
        alive = [int(each[0]) for each in calls_of(folder) if int(each[0]) not in killed]
        os.kill(alive[-1], signal.SIGKILL)
        killed.add(alive[-1])
    return killed


def test_a_worker_is_killed_in_the_middle(tmp_path: Path, postgres: str, jobs: Jobs) -> None:
    job = jobs.start(tmp_path / "ray", "1", postgres, 0.1, "ray", jobs.cluster)
    here = jobs.start(tmp_path / "here", "1", postgres, 0.0, "local")
    killed = kill_workers(tmp_path / "ray", job, (60, 160))
    assert job.figures()["ending"] == "completed"
    made = calls_of(tmp_path / "ray")
    assert len({each[0] for each in made}) >= 2 + len(killed), "others took their place"
    check_ledger(tmp_path / "ray", postgres, ROWS)
    again = len(made) - len({tuple(each[1:]) for each in made})
    assert again <= 4 * 2 * len(killed), "a call whose text was not kept is made again under its hold"

    here.figures()
    rows = {each["id"]: each["answer"] for each in read_lines(tmp_path / "here" / "out.jsonl")}
    assert {each["id"]: each["answer"] for each in read_lines(tmp_path / "ray" / "out.jsonl")} == rows


def test_the_whole_job_is_killed_and_goes_on_with_less_money_than_it_wants(
    tmp_path: Path, postgres: str, jobs: Jobs
) -> None:
    """The killed job has started its own cluster, which ends with it."""
    job = jobs.start(tmp_path / "job", "0.015", postgres, 0.05, "ray")
    while job.poll() is None and len(calls_of(tmp_path / "job")) < 60:
        time.sleep(0.01)
    job.kill()
    figures = jobs.start(tmp_path / "job", "0.015", postgres, 0.0, "ray", jobs.cluster).figures()
    assert figures["ending"] in ("completed", "budget_exhausted")
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

    def process(self, planned: Plans, tools: RowTools, meanwhile: Callable[[], None]) -> Rows:
        receive = partial(self.done.get, timeout=0.05)
        yield from process_remotely(planned, tools, meanwhile, 4, self._send, receive)

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
    monkeypatch.setattr(Worker, "answer", lambda self, chunk: time.sleep(200))
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
    assert time.monotonic() - began < 150


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
