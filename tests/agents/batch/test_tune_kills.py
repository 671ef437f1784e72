"""A run of `tune` that is killed or told to end goes on, and pays for no call twice."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from openai_server import KEY, running_server
from tune_job import bought, opened, work
from tune_server import KindServer, write_catalogue, write_questions

from viaticum.budgets import Ledger
from viaticum.questions import read_questions

QUESTIONS, AT_ONCE = 48, 4


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[KindServer]:
    monkeypatch.setenv("STUB_KEY", KEY)
    with running_server(KindServer(pause=0.05)) as state:
        assert isinstance(state, KindServer)
        write_catalogue(tmp_path / "catalogue.toml", state, retries=0)
        write_questions(tmp_path / "questions.csv", QUESTIONS)
        yield state


def ended_after(requests: int, number: int, server: KindServer, folder: Path) -> int | None:
    """Run the job in a process, and send it a signal when so many requests came; its exit code."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["tune_job", "litellm"])
    process = processes.Process(target=work, args=(folder,))
    process.start()
    while len(server.requests) < requests and process.is_alive():
        time.sleep(0.02)
    assert process.pid is not None
    os.kill(process.pid, number)
    process.join(120)
    return process.exitcode


def paid(folder: Path) -> list[str]:
    """Keys of the ledger's paid calls; the ledger is whole."""
    with Ledger(folder / "ledger.db") as ledger:
        assert ledger.check() == []
        scope = json.loads((folder / "my-router.job" / "tune.json").read_text())["budget"]
        return [entry.key for entry in ledger.entries(scope) if entry.kind == "post" and entry.nanousd]


def asked(server: KindServer) -> Counter[tuple[str, str]]:
    return Counter((body["model"], body["messages"][-1]["content"]) for body in server.requests)


def test_killed_twice_no_call_is_paid_for_twice(server: KindServer, tmp_path: Path) -> None:
    texts = {each.id: each.query.text for each in read_questions(tmp_path / "questions.csv")}
    for requests in (20, 50):
        assert ended_after(requests, signal.SIGKILL, server, tmp_path) == -signal.SIGKILL
        settled = {texts[key.split("/")[1].split()[0]] + key.split()[1] for key in paid(tmp_path)}
        before = len(server.requests)
    server.pause = 0.0
    whole = bought(opened(tmp_path, concurrency=AT_ONCE))
    assert len(whole.outcomes) == 2 * QUESTIONS
    keys = paid(tmp_path)
    assert len(keys) == len(set(keys)) == len(whole.outcomes)
    later = {
        f"{body['messages'][-1]['content']}{body['model'].removeprefix('stub-')}+direct/0"
        for body in server.requests[before:]
    }
    assert settled
    assert not settled & later  # what was paid for is not asked again; how running calls ended nobody knows


def test_interrupted_it_ends_its_running_calls_and_goes_on(server: KindServer, tmp_path: Path) -> None:
    assert ended_after(20, signal.SIGINT, server, tmp_path) == 3
    known = len(paid(tmp_path))
    assert 20 <= known == len(server.requests) < 2 * QUESTIONS
    server.pause = 0.0
    whole = bought(opened(tmp_path, concurrency=AT_ONCE))
    assert len(whole.outcomes) == len(server.requests) == len(set(paid(tmp_path))) == 2 * QUESTIONS
    assert max(asked(server).values()) == 1
