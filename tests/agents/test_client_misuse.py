"""What the SDK says to wrong arguments, after `close`, and in a forked child: always an error of our tree."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from scripted_client import LONG, client, double

from viaticum import Allowance, FakeRouter, InputError, Query, ScriptedModel, Viaticum, build_graph
from viaticum.agents.workflow.events import TextPiece
from viaticum.errors import ClientClosed, ViaticumError
from viaticum.generation import GenerationSettings

WRONG: list[Any] = [None, 5, -1, 0, float("nan"), True, b"text", [], [5], {}, {"a": 1}, object(), 10**400]


def run_async(call: Callable[[], Any]) -> Any:
    async def ran() -> Any:
        return await call()

    return asyncio.run(ran())


@pytest.mark.parametrize("wrong", [*WRONG, "", "  ", "\ud800"], ids=lambda each: ascii(each)[:12])
def test_a_question_that_is_none_is_refused_by_every_method(wrong: Any, tmp_path: Path) -> None:
    with client(tmp_path) as viaticum:
        answer = viaticum.solve("twice 1?")
        for call in (
            lambda: viaticum.solve(wrong),
            lambda: next(iter(viaticum.stream(wrong))),
            lambda: run_async(lambda: viaticum.asolve(wrong)),
            lambda: viaticum.feedback(wrong, answer, True),
            lambda: viaticum.model(wrong),
            lambda: viaticum.is_usable(wrong),
            lambda: viaticum.resume(wrong, "stop"),
            lambda: Query(wrong),
        ):
            with pytest.raises(InputError):
                call()
        [(index, error)] = viaticum.batch([wrong])
        assert index == 0
        assert isinstance(error, InputError)
        assert viaticum.budget().held_nanousd == 0


@pytest.mark.parametrize("wrong", WRONG[1:], ids=lambda each: ascii(each)[:12])
def test_terms_that_are_none_are_refused(wrong: Any, tmp_path: Path) -> None:
    with client(tmp_path) as viaticum:
        answer = viaticum.solve("twice 1?")
        for keyword in ("kind", "thread_id", "allowance", "max_tokens", "temperature"):
            if (keyword, wrong) in (("max_tokens", 5), ("temperature", 0)):
                continue
            with pytest.raises(InputError):
                viaticum.solve("twice 1?", **{keyword: wrong})
        if wrong != []:
            with pytest.raises(InputError):
                viaticum.solve("twice 1?", messages=wrong)
        if wrong is not True:
            with pytest.raises(InputError):
                viaticum.feedback("twice 1?", answer, wrong)
        with pytest.raises(InputError):
            viaticum.feedback("twice 1?", wrong, True)
        if wrong != 5:
            with pytest.raises(InputError):
                viaticum.batch(["twice 1?"], concurrency=wrong)
        for field in ("budget", "policy", "on_short", "timeout", "settings"):
            if field == "timeout" and wrong == 5:
                continue
            with pytest.raises(InputError):
                Allowance(**{field: wrong})


@pytest.mark.parametrize("wrong", [5, -1, float("nan"), True, b"x", [5], {"a": 1}, object(), " ", "\0"])
@pytest.mark.parametrize(
    "setting",
    [
        *("budget_name", "catalogue", "router", "policy", "on_short", "models", "timeout", "tries", "slots"),
        *("concurrency", "local", "generation", "strategies", "model", "strategy", "store"),
    ],
)
def test_a_setting_that_is_none_is_refused(setting: str, wrong: Any, tmp_path: Path) -> None:
    if wrong == 5 and setting in ("timeout", "tries", "concurrency", "slots"):
        pytest.skip("five of them is right")
    settings: dict[str, Any] = {"models": {"scripted": ScriptedModel(double)}, setting: wrong}
    with pytest.raises(ViaticumError):
        Viaticum("0.1", folder=tmp_path, **settings)
    with pytest.raises(ViaticumError):
        build_graph("0.1", folder=tmp_path, **settings)


def test_a_single_text_is_no_batch(tmp_path: Path) -> None:
    with client(tmp_path) as viaticum:
        for wrong in ("abc", b"abc", Query("abc"), {"q": 1}, None, 5):
            with pytest.raises(InputError, match="list"):
                viaticum.batch(wrong)  # type: ignore[arg-type]


def test_a_query_has_terms_of_its_own(tmp_path: Path) -> None:
    with client(tmp_path) as viaticum:
        with pytest.raises(InputError, match="of its own"):
            viaticum.solve(Query("twice 1?"), kind="number")
        answer = viaticum.solve(Query("twice 1?"))
        assert '"question": "twice 1?"' in viaticum.feedback(Query("twice 1?"), answer, True).read_text()


def test_a_context_that_is_no_allowance_is_refused(tmp_path: Path) -> None:
    graph = build_graph(
        "0.1",
        folder=tmp_path,
        models={"scripted": ScriptedModel(double)},
        router=FakeRouter("scripted+direct"),
    )
    for wrong in (5, "team", ["team"]):
        with pytest.raises(ViaticumError):
            graph.invoke({"question": "twice 1?"}, context=wrong)  # type: ignore[arg-type]
    settings = GenerationSettings.of(max_new_tokens=50)
    assert graph.invoke({"question": "twice 1?"}, context=Allowance(settings=settings))["value"] == "2"


# After close


async def collected(events: Any) -> list[Any]:
    return [each async for each in events]


def test_everything_after_close_says_that_it_is_closed(tmp_path: Path) -> None:
    viaticum = client(tmp_path)
    answer = viaticum.solve("twice 1?", thread_id="t")
    viaticum.close()
    viaticum.close()
    for call in (
        lambda: viaticum.solve("twice 1?"),
        lambda: viaticum.solve("twice 1?", thread_id="t"),
        lambda: list(viaticum.stream("twice 1?")),
        lambda: viaticum.batch(["twice 1?"]),
        lambda: viaticum.abatch(["twice 1?"]),
        lambda: run_async(lambda: viaticum.asolve("twice 1?")),
        lambda: run_async(lambda: viaticum.aresume("t", "stop")),
        lambda: run_async(lambda: collected(viaticum.astream("twice 1?"))),
        lambda: viaticum.resume("t", "stop"),
        lambda: viaticum.model("scripted"),
        lambda: viaticum.derive(),
    ):
        with pytest.raises(ClientClosed, match="open another one"):
            call()
    with pytest.raises(ViaticumError, match="closed"):
        viaticum.budget()
    assert viaticum.drain(1)
    assert viaticum.feedback("twice 1?", answer, True).exists()  # it needs no ledger


async def test_a_client_of_a_coroutine_closes_with_it(tmp_path: Path) -> None:
    loop = threading.get_ident()
    async with client(tmp_path) as viaticum:
        assert (await viaticum.asolve("twice 2?")).value == "4"
        closed_in: list[int] = []
        viaticum._opened.callback(lambda: closed_in.append(threading.get_ident()))
    assert closed_in != [loop], "the loop goes on while the client waits for its calls"
    assert len(closed_in) == 1
    with pytest.raises(ClientClosed):
        await viaticum.asolve("twice 2?")
    await viaticum.aclose()


def test_a_derived_client_ends_with_its_first_one(tmp_path: Path) -> None:
    viaticum = client(tmp_path)
    derived = viaticum.derive()
    viaticum.close()
    with pytest.raises(ClientClosed):
        derived.solve("twice 1?")


def test_a_stream_that_is_read_after_close_ends_with_that_error(tmp_path: Path) -> None:
    viaticum = client(tmp_path, LONG)
    events = viaticum.stream("one word?")
    assert any(isinstance(each, TextPiece) for each in events)
    viaticum.close()
    with pytest.raises(ClientClosed):
        list(events)


# After a fork


def in_child(work: Callable[[], None]) -> int:
    """The exit status of a forked child that does the work; it is killed after 20 seconds."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            signal.alarm(20)
            work()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_answers_with_threads_and_connections_of_its_own(tmp_path: Path) -> None:
    """Threads do not survive a fork: work given to the parent's pool was never done in the child."""
    with client(tmp_path) as viaticum:
        assert len(list(viaticum.batch([f"twice {number}?" for number in range(8)]))) == 8

        def work() -> None:
            assert [each.value for _, each in viaticum.batch(["twice 4?"])] == ["8"]  # type: ignore[union-attr]
            assert run_async(lambda: viaticum.asolve("twice 5?", thread_id="child")).value == "10"
            assert viaticum.drain(1)
            viaticum.close()

        assert in_child(work) == 0
        assert viaticum.solve("twice 5?", thread_id="child").value == "10"
        assert len(list(viaticum.batch(["twice 6?"]))) == 1
        assert viaticum.ledger.check() == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_child_of_a_client_with_postgres_opens_its_own(tmp_path: Path, postgres: str) -> None:
    with client(tmp_path, store=postgres) as viaticum:
        viaticum.solve("twice 1?")

        def work() -> None:
            with pytest.raises(ClientClosed, match="each process"):
                viaticum.solve("twice 2?")

        assert in_child(work) == 0
        assert viaticum.solve("twice 3?").value == "6"
