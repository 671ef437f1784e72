"""Streams that are left by an error, without closing them, and calls in progress, when the client is closed.

The call ends while the ledger is open: what was used is charged, and nothing stays held.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import litellm
import pytest
from openai_server import OpenAIServer, spec_for
from viaticum_server import wait_until

from viaticum import ChatViaticum, FakeRouter, ScriptedModel, Viaticum
from viaticum.agents.integrations.litellm_provider import register
from viaticum.budgets import Ledger
from viaticum.catalogue import Catalogue
from viaticum.errors import ClientClosed, ViaticumError
from viaticum.types import Message

CHAT: list[Message] = [{"role": "user", "content": "hello"}]
TOOL = {"type": "function", "function": {"name": "note", "parameters": {"type": "object", "properties": {}}}}
SOON = 60.0  # seconds


class ReaderError(Exception):
    """What goes wrong in the loop of a reader. It keeps the loop's frame, and with it the stream."""


def opened(server: OpenAIServer, folder: Path) -> Viaticum:
    return Viaticum(
        "1",
        catalogue=Catalogue([spec_for(server)]),
        router=FakeRouter("far+direct"),
        folder=folder,
    )


def is_text(item: Any) -> bool:
    """Whether an item of any kind of stream shows a word of the answer."""
    text = getattr(item, "text", None) or getattr(item, "content", None)
    if choices := getattr(item, "choices", None):
        text = choices[0].delta.content
    return bool(str(text or "").strip()) and "you" in str(text)


def leave(items: Iterator[Any], left: list[Iterator[Any]]) -> None:
    left.append(items)
    for item in items:
        if is_text(item):
            raise ReaderError


async def leave_async(items: AsyncIterator[Any]) -> None:
    async for item in items:
        if is_text(item):
            raise ReaderError


def chat(client: Viaticum, model: str) -> ChatViaticum:
    return ChatViaticum(model=model, client=client)


def through_litellm(client: Viaticum, model: str) -> Any:
    register(chat(client, model))
    return litellm.completion(f"viaticum/{model}", CHAT, stream=True)


def assert_settled(folder: Path) -> None:
    """One call was made; it is settled at less than what was held."""
    with Ledger(folder / "ledger.db") as ledger:
        (hold,) = ledger.holds()
        (post,) = [entry for entry in ledger.entries(key=hold.key) if entry.kind == "post"]
        assert 0 < post.nanousd < hold.held_nanousd
        assert post.usage["far"].output_tokens > 0
        assert sum(each.held_nanousd for each in ledger.budgets()) == 0
        assert ledger.check() == []


READERS: dict[str, Callable[[Viaticum], Iterator[Any]]] = {
    "stream": lambda client: client.stream("hello"),
    "stream of a thread": lambda client: client.stream("hello", thread_id="t"),
    "stream of a derived client": lambda client: client.derive().stream("hello"),
    "a named model": lambda client: chat(client, "far").stream("hello"),
    "routed": lambda client: chat(client, "auto").stream("hello", tools=[TOOL], tool_choice="none"),
    "litellm": lambda client: through_litellm(client, "far"),
}


@pytest.mark.parametrize("elsewhere", [False, True], ids=["here", "another thread"])
@pytest.mark.parametrize("reader", READERS)
def test_a_stream_that_an_error_left_is_settled_by_closing(
    server: OpenAIServer, tmp_path: Path, reader: str, elsewhere: bool
) -> None:
    client, left = opened(server, tmp_path), list[Iterator[Any]]()
    server.text, server.pause = "you " * 500, 0.02
    with pytest.raises(ReaderError) as error:
        leave(READERS[reader](client), left)
    if elsewhere:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(client.close).result(SOON)
    else:
        client.close()
    assert server.hung_up.wait(SOON), "the provider need not write the rest"
    assert_settled(tmp_path)
    if reader.startswith("stream"):
        with pytest.raises(ClientClosed):
            next(left[0])
    del error


ASYNC_READERS: dict[str, Callable[[Viaticum], AsyncIterator[Any]]] = {
    "astream": lambda client: client.astream("hello"),
    "a named model": lambda client: chat(client, "far").astream("hello"),
    "auto": lambda client: chat(client, "auto").astream("hello"),
}


@pytest.mark.parametrize("reader", ASYNC_READERS)
def test_an_async_stream_that_an_error_left_is_settled_by_closing(
    server: OpenAIServer, tmp_path: Path, reader: str
) -> None:
    server.text = "you " * 20

    async def work() -> None:
        client = opened(server, tmp_path)
        with pytest.raises(ReaderError) as error:
            await leave_async(ASYNC_READERS[reader](client))
        client.close()
        with Ledger(tmp_path / "ledger.db") as ledger:
            assert [hold.state for hold in ledger.holds()] == ["posted"]
        del error

    asyncio.run(work())
    assert_settled(tmp_path)


def test_a_question_of_another_thread_settles_its_call_before_the_ledger_closes(
    server: OpenAIServer, tmp_path: Path
) -> None:
    client = opened(server, tmp_path)
    server.text, server.pause = "you " * 20, 0.02
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(client.solve, "hello")
        wait_until(lambda: bool(server.requests))
        client.close()
        error = answer.exception(SOON)
    assert error is None or isinstance(error, ViaticumError)
    assert_settled(tmp_path)


def test_a_call_that_goes_on_too_long_is_ended(
    server: OpenAIServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("viaticum.agents.draining.CLOSING_SECONDS", 0.5)
    client = opened(server, tmp_path)
    server.text, server.pause = "you " * 500, 0.5
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(client.solve, "hello")
        wait_until(lambda: bool(server.requests))
        client.close()
        assert isinstance(answer.exception(SOON), ViaticumError)
    assert server.hung_up.wait(SOON)
    with Ledger(tmp_path / "ledger.db") as ledger:
        assert [hold.state for hold in ledger.holds()] == ["posted"]


def test_a_stream_that_is_silent_for_long_is_ended_before_the_ledger_closes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its first piece comes after the time that calls have to end by themselves."""
    monkeypatch.setattr("viaticum.agents.draining.CLOSING_SECONDS", 0.2)
    began, goes_on = Event(), Event()

    def answer(messages: Any, generation: Any) -> str:
        began.set()
        goes_on.wait(SOON)
        return "The answer is 4."

    client = Viaticum(
        "1", models={"m": ScriptedModel(answer)}, router=FakeRouter("m+direct"), folder=tmp_path
    )
    with ThreadPoolExecutor(2) as pool:
        read = pool.submit(lambda: list(chat(client, "m").stream("hello")))
        assert began.wait(SOON)
        closing = pool.submit(client.close)
        wait_until(lambda: client._gate.closed)
        time.sleep(0.5)  # past the time; a slower machine makes the test weaker, and never fails it
        goes_on.set()
        closing.result(SOON)
        assert isinstance(read.exception(SOON), ViaticumError | None)
    with Ledger(tmp_path / "ledger.db") as ledger:
        assert [hold.state for hold in ledger.holds()] == ["posted"]


def test_a_stream_that_is_closed_in_the_thread_of_its_reader_waits_for_nothing(tmp_path: Path) -> None:
    """As a signal handler does, or the model itself."""
    clients, seconds = list[Viaticum](), list[float]()

    def close(messages: Any, generation: Any) -> str:
        before = time.monotonic()
        clients[0].close()
        seconds.append(time.monotonic() - before)
        return "The answer is 4."

    model = ScriptedModel(close)
    clients.append(Viaticum("1", models={"m": model}, router=FakeRouter("m+direct"), folder=tmp_path))
    with pytest.raises(ViaticumError):
        list(chat(clients[0], "m").stream("hello"))
    assert seconds[0] < 20


def test_a_client_that_its_own_call_closes_does_not_wait_for_it(tmp_path: Path) -> None:
    clients, closed = list[Viaticum](), Event()

    def close(messages: Any, generation: Any) -> str:
        clients[0].close()
        closed.set()
        return "The answer is 4."

    clients.append(
        Viaticum("1", models={"m": ScriptedModel(close)}, router=FakeRouter("m+direct"), folder=tmp_path)
    )
    with pytest.raises(ViaticumError):
        clients[0].solve("twice 2?")
    assert closed.is_set()


def test_a_stream_that_nobody_has_any_more_keeps_no_one_waiting(server: OpenAIServer, tmp_path: Path) -> None:
    with opened(server, tmp_path) as client:
        server.text, server.pause = "you " * 500, 0.02
        for name in ("far", "auto"):
            with pytest.raises(ReaderError):
                leave(chat(client, name).stream("hello"), [])
        assert client._gate.is_idle
        assert client.budget().held_nanousd == 0
