"""The SDK on scripted models: async, batches, many threads, decisions, draining, and the stores."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from scripted_client import LONG, client, double, watch
from viaticum_server import hold_back

from viaticum import (
    Allowance,
    Answer,
    BudgetExceeded,
    DecisionNeeded,
    Draining,
    FakeRouter,
    InputError,
    Query,
    ScriptedModel,
    Viaticum,
)
from viaticum.agents.workflow.checkpoints import FileSaver
from viaticum.agents.workflow.events import TextPiece
from viaticum.budgets import Ledger
from viaticum.errors import DeadlineExceeded, LedgerError, ModelError, ViaticumError

SUPPORT = Path(__file__).resolve().parents[1] / "support"


def check(viaticum: Viaticum) -> None:
    assert viaticum.ledger.check() == []
    assert viaticum.budget().held_nanousd == 0


# Threads, loops and batches


def test_many_threads_call_one_client(tmp_path: Path) -> None:
    with client(tmp_path) as viaticum, ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda number: viaticum.solve(f"twice {number}?", kind="number"), range(40)))
        assert [answer.value for answer in answers] == [str(2 * number) for number in range(40)]
        assert viaticum.budget().posted_nanousd == sum(answer.cost for answer in answers)
        check(viaticum)


def test_batch_gives_each_place_its_answer_or_error(tmp_path: Path) -> None:
    with client(tmp_path) as viaticum:
        questions: list[str | Query] = [f"twice {number}?" for number in range(20)]
        questions[7] = " "
        questions[9] = Query("twice 9?", "number", messages=({"role": "system", "content": "Be brief."},))
        got = dict(viaticum.batch(questions, concurrency=3))
        assert sorted(got) == list(range(20))
        assert isinstance(got.pop(7), InputError)
        assert all(isinstance(each, Answer) and each.value == str(2 * n) for n, each in got.items())
        check(viaticum)


def test_batch_takes_questions_only_when_there_is_room(tmp_path: Path) -> None:
    taken: list[int] = []

    def questions() -> Iterator[str]:
        for number in range(1000):
            taken.append(number)
            yield f"twice {number}?"

    with client(tmp_path, concurrency=2) as viaticum:
        batch = viaticum.batch(questions())
        for _ in range(3):
            next(batch)
        assert len(taken) <= 3 + 2
        batch.close()  # type: ignore[attr-defined]
        check(viaticum)
        with pytest.raises(InputError):
            next(viaticum.batch(["x"], concurrency=0))


DEADLINE = 2.0  # seconds of a batch whose later questions come after it


def slow_questions() -> Iterator[str]:
    for number in range(12):
        if number == 4:
            time.sleep(DEADLINE)
        yield f"twice {number}?"


async def test_after_its_deadline_a_batch_begins_no_further_question(tmp_path: Path) -> None:
    async def asynchronous() -> AsyncIterator[str]:
        for number in range(12):
            if number == 4:
                await asyncio.sleep(DEADLINE)
            yield f"twice {number}?"

    with client(tmp_path) as viaticum:
        for got in (
            dict(viaticum.batch(slow_questions(), concurrency=1, deadline=DEADLINE)),
            {
                index: each
                async for index, each in viaticum.abatch(asynchronous(), concurrency=1, deadline=DEADLINE)
            },
        ):
            begun = [index for index, each in got.items() if isinstance(each, Answer)]
            late = [index for index, each in got.items() if isinstance(each, DeadlineExceeded)]
            assert sorted(begun + late) == list(range(12))
            assert begun
            assert late
            assert max(begun) < min(late)
            assert "2 seconds (deadline) are over" in str(got[11])
        answered = list(viaticum.batch(["twice 1?", "twice 2?"], deadline=60))
        assert all(isinstance(each, Answer) for _, each in answered)
        check(viaticum)
        for wrong in (0, -1, "1"):
            with pytest.raises(InputError):
                viaticum.batch(["twice 1?"], deadline=wrong)  # type: ignore[arg-type]
            with pytest.raises(InputError):
                viaticum.abatch(["twice 1?"], deadline=wrong)  # type: ignore[arg-type]


async def test_abatch(tmp_path: Path) -> None:
    async def questions() -> AsyncIterator[str]:
        for number in range(10):
            await asyncio.sleep(0)
            yield f"twice {number}?"

    with client(tmp_path) as viaticum:
        listed: list[str | Query] = ["twice 1?", "", "twice 3?"]
        from_list = {index: got async for index, got in viaticum.abatch(listed)}
        assert [type(from_list[index]) for index in range(3)] == [Answer, InputError, Answer]
        streamed = {index: got async for index, got in viaticum.abatch(questions(), concurrency=3)}
        assert {index: got.value for index, got in streamed.items() if isinstance(got, Answer)} == {
            number: str(2 * number) for number in range(10)
        }


async def test_async_forms_need_no_thread_of_the_default_executor(tmp_path: Path) -> None:
    """All of them are taken by others, for good."""
    loop, release = asyncio.get_running_loop(), threading.Event()
    loop.set_default_executor(ThreadPoolExecutor(1))
    others = [loop.run_in_executor(None, release.wait) for _ in range(3)]
    try:
        with client(tmp_path) as viaticum:
            assert (await asyncio.wait_for(viaticum.asolve("twice 4?"), 120)).value == "8"
            graph = await asyncio.wait_for(in_memory(viaticum).ainvoke({"question": "twice 5?"}), 120)
            assert graph["value"] == "10"
    finally:
        release.set()
        await asyncio.gather(*others)


def in_memory(viaticum: Viaticum) -> Any:
    from viaticum import build_graph

    return build_graph(
        models={"scripted": ScriptedModel(double)},
        router=FakeRouter("scripted+direct"),
        ledger=viaticum.ledger,
    )


async def test_the_loop_goes_on_while_a_model_writes(tmp_path: Path) -> None:
    with client(tmp_path, LONG, pause=0.02) as viaticum:
        ticks, task = 0, asyncio.create_task(viaticum.asolve("x?", kind="text"))
        while not task.done():
            await asyncio.sleep(0.005)
            ticks += 1
        assert ticks > 10


async def test_a_cancelled_question_ends_its_call_which_is_charged(tmp_path: Path) -> None:
    with client(tmp_path, LONG, pause=0.02, router=FakeRouter("scripted+chat")) as viaticum:
        written = watch(viaticum)
        task = asyncio.create_task(viaticum.asolve("x?"))
        while len(written) < 3:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await settled(viaticum)


async def settled(viaticum: Viaticum) -> None:
    """What was begun is charged for less than its whole text, and nothing is held."""
    (hold,) = viaticum.ledger.holds()
    entry = next(entry for entry in viaticum.ledger.entries(key=hold.key) if entry.kind == "post")
    assert 0 < entry.usage["scripted"].output_tokens < 100
    check(viaticum)


def test_a_stream_that_is_closed_ends_its_call_which_is_charged(tmp_path: Path) -> None:
    with client(tmp_path, LONG, pause=0.02, router=FakeRouter("scripted+chat")) as viaticum:
        events = viaticum.stream("x?", thread_id="t")
        assert any(isinstance(event, TextPiece) for event in events)
        events.close()  # type: ignore[attr-defined]
        asyncio.run(settled(viaticum))
        answer = viaticum.solve("x?", thread_id="t")
        assert answer.value == LONG
        assert answer.cost == viaticum.budget().posted_nanousd, "what was wasted is counted"


async def test_astream_gives_events_and_errors(tmp_path: Path) -> None:
    with client(tmp_path, "The answer is 5.") as viaticum:
        events = [event async for event in viaticum.astream("x?")]
        assert events == [*list(viaticum.stream("x?"))[:-2], *events[-2:]]
        assert isinstance(events[-1], Answer)
    with client(tmp_path, ModelError("broken")) as viaticum:
        with pytest.raises(ModelError, match="broken"):
            await viaticum.asolve("x?")
        check(viaticum)


# What a question may bring


def test_a_question_with_its_conversation(tmp_path: Path) -> None:
    with client(tmp_path, "Well.", router=FakeRouter("scripted+chat")) as viaticum:
        history: Any = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hello!"}]
        assert viaticum.solve("How are you?", messages=history, thread_id="t").value == "Well."
        assert viaticum.solve("How are you?", messages=history, thread_id="t").value == "Well."
        with pytest.raises(InputError, match="another question"):
            viaticum.solve("How are you?", thread_id="t")
        for wrong in ("Hello.", {"role": "tool", "content": "x"}, {"role": "user", "content": None}):
            with pytest.raises(InputError, match="message"):
                viaticum.solve("How are you?", messages=[wrong])  # type: ignore[list-item]


def test_a_question_pays_from_the_scope_it_is_given(tmp_path: Path) -> None:
    with client(tmp_path) as viaticum:
        viaticum.ledger.create("team", limit_nanousd=10**6)
        answer = viaticum.solve("twice 2?", allowance=Allowance(budget="team"))
        assert viaticum.ledger.budget("team").posted_nanousd == answer.cost
        assert viaticum.budget().posted_nanousd == 0


def test_a_budget_that_exists_keeps_its_limit(tmp_path: Path) -> None:
    with client(tmp_path, budget="0.5", budget_name="b"):
        pass
    with client(tmp_path, budget=None, budget_name="b") as viaticum:
        assert viaticum.budget().limit_nanousd == 500_000_000


# Decisions


def poor(folder: Path, **settings: Any) -> Viaticum:
    return client(folder, budget="0.0001", on_short="ask", router=FakeRouter("scripted+cot"), **settings)


def test_ask_raises_and_resume_goes_on(tmp_path: Path) -> None:
    with poor(tmp_path, budget_name="b") as viaticum:
        with pytest.raises(DecisionNeeded) as caught:
            viaticum.solve("twice 3?")
        thread = caught.value.thread_id
        assert caught.value.options == ("raise", "stop")
        assert caught.value.needed > caught.value.left
        assert set(caught.value.question) >= {"wanted", "options", "limit"}
        with pytest.raises(DecisionNeeded):
            viaticum.solve("twice 3?", thread_id=thread)
        with pytest.raises(InputError, match="nothing cheaper fits"):
            viaticum.resume(thread, "cheaper")
    with poor(tmp_path, budget_name="b") as viaticum:  # another process, later
        assert viaticum.resume(thread, {"do": "raise", "by": "0.01"}).value == "6"
        assert viaticum.solve("twice 3?", thread_id=thread).value == "6"
        assert viaticum.budget().limit_nanousd == 10_100_000
        with pytest.raises(InputError, match="waits for no decision"):
            viaticum.resume(thread, "raise")
        check(viaticum)


async def test_aresume_and_stop(tmp_path: Path) -> None:
    with poor(tmp_path) as viaticum:
        with pytest.raises(DecisionNeeded) as caught:
            await viaticum.asolve("twice 3?")
        answer = await viaticum.aresume(caught.value.thread_id, "stop")
        assert answer.value is None
        assert answer.reason.startswith("stopped")
        stop = Allowance(on_short="stop")
        with pytest.raises(BudgetExceeded) as stopped:
            await viaticum.asolve("twice 3?", allowance=stop)
        assert not isinstance(stopped.value, DecisionNeeded)


# The end


def test_drain_lets_what_runs_end_and_nothing_begin(tmp_path: Path) -> None:
    with client(tmp_path, LONG, pause=0.002) as viaticum, ThreadPoolExecutor(1) as pool:
        running = pool.submit(lambda: viaticum.solve("x?", kind="text", thread_id="t"))
        while not viaticum.ledger.holds():
            time.sleep(0.005)
        assert viaticum.drain(timeout=120)
        assert running.done() or running.result(60)
        for attempt in (viaticum.solve, viaticum.stream, lambda question: viaticum.resume("t", "stop")):
            with pytest.raises(Draining, match="about to end"):
                list(attempt("x?"))  # type: ignore[operator, arg-type]
        with pytest.raises(Draining):
            asyncio.run(viaticum.asolve("x?"))
        assert [type(each) for _, each in viaticum.batch(["x?"])] == [Draining]
        check(viaticum)


def test_drain_stops_after_the_call_at_hand_and_the_thread_goes_on_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = FakeRouter("scripted+direct", "scripted+cot")
    with client(tmp_path, "who knows", budget_name="b", router=pairs) as viaticum:
        go_on = hold_back(viaticum.model("scripted"), monkeypatch)
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(lambda: viaticum.solve("x?", kind="number", thread_id="t"))
            while not viaticum.ledger.holds():
                time.sleep(0.005)
            assert not viaticum.drain(timeout=0.2)
            go_on.set()
            with pytest.raises(Draining) as caught:
                running.result(60)
        assert caught.value.thread_id == "t"
        assert viaticum.drain(timeout=60)
        assert [hold.state for hold in viaticum.ledger.holds()] == ["posted"]
    with client(tmp_path, "The answer is 5.", budget_name="b", router=pairs) as viaticum:
        answer = viaticum.solve("x?", kind="number", thread_id="t")
        assert (answer.value, len(answer.routes)) == ("5", 2)
        assert answer.cost == viaticum.budget().posted_nanousd


SERVING = """
import signal, sys, threading
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from scripted_client import LONG, client
from viaticum import Answer, Draining, FakeRouter
router = FakeRouter("scripted+chat")
with client(Path(sys.argv[1]), LONG, pause=0.01, budget_name="b", router=router) as viaticum:
    viaticum.drain_on(signal.SIGTERM, timeout=100)
    print("ready", flush=True)
    for event in viaticum.stream("x?", kind="text", thread_id="t"):
        if isinstance(event, Answer):
            print(event.value, flush=True)  # before the loop asks for more, which ends the question
    try:
        while True:
            viaticum.solve("y?", kind="text")
    except Draining:
        print("draining", flush=True)
    signal.pause()
"""


def test_drain_on_sigterm(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SERVING, str(tmp_path), str(SUPPORT)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    with Ledger(tmp_path / "ledger.db") as ledger:
        while not ledger.holds():
            time.sleep(0.01)
    process.terminate()
    lines = process.communicate(timeout=150)[0].splitlines()
    assert process.returncode == -signal.SIGTERM, "what the signal did before"
    assert lines[0].startswith("word"), "the question that ran was answered"
    with client(tmp_path, LONG, budget_name="b", router=FakeRouter("scripted+chat")) as viaticum:
        spent = viaticum.budget().posted_nanousd
        assert viaticum.solve("x?", kind="text", thread_id="t").value == lines[0], (
            "and its thread has it still"
        )
        assert viaticum.budget().posted_nanousd == spent
        assert viaticum.ledger.check() == []
        assert {hold.state for hold in viaticum.ledger.holds()} == {"posted"}


# Stores


def test_everything_in_postgres(tmp_path: Path, postgres: str) -> None:
    settings: dict[str, Any] = {"store": postgres, "budget": "0.0001", "budget_name": "b", "on_short": "ask"}
    settings["router"] = FakeRouter("scripted+cot")
    with client(tmp_path, **settings) as viaticum, pytest.raises(DecisionNeeded):
        viaticum.solve("twice 3?", thread_id="t")
    assert os.listdir(tmp_path) == []
    with client(tmp_path, **settings) as viaticum:
        assert viaticum.resume("t", {"do": "raise", "by": "0.01"}).value == "6"
        answers = dict(viaticum.batch([f"twice {number}?" for number in range(12)]))
        assert all(isinstance(each, Answer) for each in answers.values()), answers
        check(viaticum)


def test_processes_may_open_a_new_postgres_at_once(tmp_path: Path, postgres: str) -> None:
    def opened(number: int) -> str | None:
        with client(tmp_path, store=postgres, budget_name=f"b{number}") as viaticum:
            return viaticum.solve("twice 3?").value

    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(opened, range(6))) == ["6"] * 6


def test_a_postgres_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(LedgerError):
        client(tmp_path, store="postgresql://nobody@127.0.0.1:1/nothing")


def test_checkpoints_wait_for_the_disk_before_money_is_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is on the disk when a hold is made is the checkpoint that says what it is for."""
    order: list[str] = []

    def noted(kind: type, name: str) -> None:
        method = getattr(kind, name)

        def note(*args: Any, **kwargs: Any) -> Any:
            result = method(*args, **kwargs)
            order.append(name)
            return result

        monkeypatch.setattr(kind, name, note)

    for kind, name in ((FileSaver, "put"), (FileSaver, "sync"), (Ledger, "reserve")):
        noted(kind, name)
    with client(tmp_path) as viaticum:
        viaticum.solve("twice 3?")
        level = viaticum.graph.checkpointer.conn.execute("PRAGMA synchronous").fetchone()  # type: ignore[union-attr]
    assert order == ["put", "put", "put", "sync", "reserve", "put", "put"]
    assert level == (1,)


def test_an_error_while_opening_closes_what_was_opened(tmp_path: Path) -> None:
    with pytest.raises(ViaticumError):
        client(tmp_path, policy="bset")
    with client(tmp_path) as viaticum:
        assert viaticum.solve("twice 1?").value == "2"
