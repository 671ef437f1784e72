"""One thread id, asked by several processes or threads at once: one call is made, and all get its answer."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from viaticum import FakeRouter, Viaticum
from viaticum.agents.workflow import thread_leases
from viaticum.agents.workflow.thread_leases import is_gone, this_process
from viaticum.budgets import Ledger
from viaticum.errors import Draining
from viaticum.models.base import Generation, StreamPiece
from viaticum.models.scripted import ScriptedModel
from viaticum.types import Message

QUESTION, THREAD = "What is 2 + 2?", "t"


class CountedModel(ScriptedModel):
    """Takes a while, and notes each call in a file, as a provider elsewhere would."""

    runs_here = False

    def __init__(self, file: Path, seconds: float) -> None:
        super().__init__("The answer is 4.", name="far", pause=seconds / 4)
        self.file = file

    def stream(self, messages: Sequence[Message], generation: Generation) -> Iterator[StreamPiece]:
        with self.file.open("a") as file:
            file.write(f"{os.getpid()}\n")
        yield from super().stream(messages, generation)


def opened(folder: Path, seconds: float = 1.0) -> Viaticum:
    model = CountedModel(folder / "calls", seconds)
    return Viaticum(
        "0.01", budget_name="b", folder=folder, models={"far": model}, router=FakeRouter("far+direct")
    )


def in_a_child(folder: Path, seconds: float) -> int:
    child = os.fork()
    if not child:
        code = 1
        try:
            with opened(folder, seconds) as client:
                code = 0 if client.solve(QUESTION, thread_id=THREAD).value == "4" else 2
        finally:
            os._exit(code)
    return child


def ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def calls(folder: Path) -> list[int]:
    file = folder / "calls"
    return [int(line) for line in file.read_text().splitlines()] if file.exists() else []


def states(folder: Path) -> list[str]:
    with Ledger(folder / "ledger.db") as ledger:
        assert ledger.check() == []
        return sorted(hold.state for hold in ledger.holds())


def wait_for_a_call(folder: Path) -> None:
    end = time.monotonic() + 120
    while not calls(folder):
        assert time.monotonic() < end
        time.sleep(0.01)


def test_processes_that_ask_at_once_make_one_call(tmp_path: Path) -> None:
    children = [in_a_child(tmp_path, 1.0) for _ in range(3)]
    assert [ended(child) for child in children] == [0, 0, 0]
    assert len(calls(tmp_path)) == 1
    assert states(tmp_path) == ["posted"]


def test_threads_of_one_process_make_one_call(tmp_path: Path) -> None:
    with opened(tmp_path, 0.4) as client, ThreadPoolExecutor(4) as threads:
        answers = list(threads.map(lambda _: client.solve(QUESTION, thread_id=THREAD), range(4)))
    assert {answer.value for answer in answers} == {"4"}
    assert len(calls(tmp_path)) == 1
    assert states(tmp_path) == ["posted"]


def test_a_process_that_waits_goes_on_when_the_owner_is_killed(tmp_path: Path) -> None:
    owner = in_a_child(tmp_path, 60.0)
    wait_for_a_call(tmp_path)
    waits = in_a_child(tmp_path, 0.1)
    time.sleep(0.3)
    os.kill(owner, signal.SIGKILL)
    assert ended(owner) == -signal.SIGKILL
    assert ended(waits) == 0
    assert calls(tmp_path) == [owner, waits]
    assert states(tmp_path) == ["posted", "unknown"], "nobody knows what the first call cost"


def test_an_owner_elsewhere_is_waited_for_until_its_lease_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(thread_leases, "LEASE_SECONDS", 1.0)
    monkeypatch.setattr(thread_leases, "_machine", lambda: "elsewhere")
    began = time.time()
    with opened(tmp_path, 0.1) as there, thread_leases.owned_thread(there.ledger, THREAD, lambda: None):
        monkeypatch.undo()
        with opened(tmp_path, 0.1) as here, ThreadPoolExecutor(1) as threads:
            asked = threads.submit(here.solve, QUESTION, thread_id=THREAD)
            assert asked.result(120).value == "4", "an owner that renews no lease has none"
            assert time.time() - began >= 1.0


def test_who_waits_is_told_that_the_process_ends(tmp_path: Path) -> None:
    with opened(tmp_path) as client, thread_leases.owned_thread(client.ledger, THREAD, lambda: None):
        told: list[Draining] = []

        def ask() -> None:
            with pytest.raises(Draining) as caught:
                client.solve(QUESTION, thread_id=THREAD)
            told.append(caught.value)

        asks = threading.Thread(target=ask)
        asks.start()
        while client._gate.is_idle:
            time.sleep(0.01)
        assert client.drain(timeout=4)
        asks.join(60)
        assert [error.thread_id for error in told] == [THREAD]
    assert calls(tmp_path) == []


def test_who_is_gone() -> None:
    me = this_process()
    assert not is_gone(me)
    assert not is_gone(f"elsewhere {os.getpid()} 1"), "nobody here can know"
    machine, pid, began = me.split(" ")
    child = os.fork()
    if not child:
        os._exit(0)
    while not is_gone(f"{machine} {child} {began}"):  # a zombie is gone too
        time.sleep(0.01)
    os.waitpid(child, 0)
    assert is_gone(f"{machine} {child} {began}")
    assert is_gone(f"{machine} {pid} 1"), "its id belongs to another process by now"
