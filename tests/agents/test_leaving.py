"""A caller that leaves while a provider is silent, thinks, writes arguments or is waited for.

The connection is closed at once, and what was used is charged.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import litellm
import pytest
from langgraph.checkpoint.memory import InMemorySaver
from openai_server import OpenAIServer, spec_for
from viaticum_server import RunningServer, chat_body, serving, wait_until

from viaticum import Allowance, ChatViaticum, FakeRouter, ScriptedModel, Viaticum
from viaticum.agents.batch.folder import job_folder
from viaticum.agents.batch.run import run_batch
from viaticum.agents.integrations.litellm_provider import register
from viaticum.agents.workflow.calls import Calls
from viaticum.budgets import Ledger
from viaticum.catalogue import Catalogue
from viaticum.errors import BudgetClosed, ProviderTimeout
from viaticum.jobs import Job
from viaticum.models.base import Generation
from viaticum.models.remote.model import RemoteModel
from viaticum.types import Message, ThinkingDelta

CHAT: list[Message] = [{"role": "user", "content": "hello"}]
TOOL = {
    "type": "function",
    "function": {
        "name": "note",
        "parameters": {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]},
    },
}
SOON = 60.0  # seconds, on a machine that does other things too; the server stays silent for longer
NEVER = 200.0
PHASES = ("silent", "mute", "comments", "thinks", "arguments")


def prepare(server: OpenAIServer, phase: str) -> dict[str, Any]:
    """Make the server stay in a phase; what is to be asked for besides."""
    if phase in ("silent", "comments"):  # it sends no header, or nothing that means anything
        server.script = [phase]
    elif phase == "mute":  # it has begun to answer
        server.pause = NEVER
    elif phase == "thinks":
        server.thought, server.thought_pause = "hmm " * 500, 0.1
    else:
        server.pause = 0.1
        return {"tools": [TOOL]}
    return {}


@pytest.fixture
def ledger() -> Iterator[Ledger]:
    with Ledger("memory:") as ledger:
        ledger.create("b", limit_nanousd=10_000_000)
        yield ledger


@pytest.mark.parametrize("phase", PHASES)
def test_a_stream_that_is_closed_closes_the_connection_in_every_phase(
    server: OpenAIServer, ledger: Ledger, phase: str
) -> None:
    extra = prepare(server, phase)
    model, chat = RemoteModel(spec_for(server)), CHAT
    if phase == "arguments":
        chat = [{"role": "user", "content": "hello " * 500}]
    calls = Calls(Catalogue([model.spec]), ledger, lambda _: model)
    events = calls.stream("b", "k", "far", chat, Generation(3_000, extra=extra))
    shown = next(events)
    while not server.requests or (phase == "thinks" and not isinstance(shown, ThinkingDelta)):
        shown = next(events)
    for _ in range(0 if phase == "thinks" else 10):
        time.sleep(0.1)
        assert next(events) == "", "nothing to show, and a chance to leave"
    events.close()  # type: ignore[attr-defined]
    assert server.hung_up.wait(SOON)
    (post,) = [entry for entry in ledger.entries(key="k") if entry.kind == "post"]
    assert post.usage["far"].input_tokens > 0
    assert (post.usage["far"].output_tokens > 0) is (phase in ("thinks", "arguments"))


def test_a_call_that_is_answered_whole_is_closed_too(server: OpenAIServer, ledger: Ledger) -> None:
    server.script = ["silent"]
    model = RemoteModel(spec_for(server, streams=False))
    events = Calls(Catalogue([model.spec]), ledger, lambda _: model).stream(
        "b", "k", "far", CHAT, Generation(9)
    )
    while not server.requests:
        assert next(events) == ""
    events.close()  # type: ignore[attr-defined]
    assert server.hung_up.wait(SOON)
    assert ledger.budget("b").posted_nanousd > 0


def waiting_call(server: OpenAIServer, ledger: Ledger) -> Iterator[Any]:
    """The stream of a call whose first try was refused, and which waits half a minute before the next."""
    server.script = [(503, {"retry-after": "30"}, "later")]
    model = RemoteModel(spec_for(server))
    events = Calls(Catalogue([model.spec]), ledger, lambda _: model).stream(
        "b", "k", "far", CHAT, Generation(9)
    )
    while not server.requests or server.script:
        assert next(events) == ""
    return events


def test_a_wait_before_a_retry_is_left_and_costs_nothing(server: OpenAIServer, ledger: Ledger) -> None:
    events = waiting_call(server, ledger)
    assert [next(events) for _ in range(3)] == [""] * 3
    events.close()  # type: ignore[attr-defined]
    assert len(server.requests) == 1
    assert ledger.budget("b").posted_nanousd == ledger.budget("b").held_nanousd == 0


def test_a_call_that_waits_is_not_sent_once_its_budget_is_paused(
    server: OpenAIServer, ledger: Ledger
) -> None:
    events = waiting_call(server, ledger)
    assert next(events) == ""
    ledger.pause("b")
    with pytest.raises(BudgetClosed, match="paused"):
        list(events)
    assert len(server.requests) == 1
    (hold,) = ledger.holds()
    assert hold.state == "void"


def test_a_question_that_waits_is_not_asked_again_once_its_budget_is_paused(
    server: OpenAIServer, client: Viaticum
) -> None:
    server.script = [(503, {"retry-after": "30"}, "later")]
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(client.solve, "hello")
        wait_until(lambda: bool(server.requests) and not server.script)
        client.ledger.pause(client.budget_name)
        with pytest.raises(BudgetClosed, match="paused"):
            answer.result(SOON)
    assert len(server.requests) == 1
    assert [hold.state for hold in client.ledger.holds()] == ["void"]


def test_a_row_of_a_batch_that_waits_is_not_asked_once_its_budget_is_paused(
    server: OpenAIServer, tmp_path: Path
) -> None:
    server.script = [(503, {"retry-after": "30"}, "later")]
    source, out, address = tmp_path / "in.jsonl", tmp_path / "out.jsonl", tmp_path / "ledger.db"
    source.write_text('{"question": "hello"}\n')
    with Ledger(address) as ledger, ThreadPoolExecutor(1) as pool:
        job = pool.submit(
            run_batch,
            source,
            out,
            budget="1",
            ledger=address,
            catalogue=Catalogue([spec_for(server)]),
            model="far",
            strategy="direct",
        )
        wait_until(lambda: bool(server.requests) and not server.script)
        ledger.pause(Job.load(job_folder(out)).budget)
        with pytest.raises(BudgetClosed, match="paused"):
            job.result(SOON)
        assert [hold.state for hold in ledger.holds()] == ["void"]
    assert len(server.requests) == 1


# Coroutines that are cancelled


@pytest.fixture
def client(server: OpenAIServer, tmp_path: Path) -> Iterator[Viaticum]:
    catalogue = Catalogue([spec_for(server)])
    with Viaticum("1", catalogue=catalogue, router=FakeRouter("far+direct"), folder=tmp_path) as client:
        yield client
        assert client.budget().held_nanousd == 0
        assert client.ledger.check() == []


async def read(items: AsyncIterator[Any]) -> None:
    async for _ in items:
        pass


async def completion(client: Viaticum, name: str, *, stream: bool) -> None:
    register(ChatViaticum(client=client))
    answer = await litellm.acompletion(f"viaticum/{name}", CHAT, stream=stream)
    if stream:
        await read(answer)


WAYS: dict[str, Callable[[Viaticum], Awaitable[Any]]] = {
    "asolve": lambda client: client.asolve("hello"),
    "astream": lambda client: read(client.astream("hello")),
    "the graph": lambda client: client.derive(checkpointer=InMemorySaver()).graph.ainvoke(
        {"question": "hello"}, {"configurable": {"thread_id": "t"}}
    ),
    "ainvoke": lambda client: ChatViaticum(model="far", client=client).ainvoke("hello"),
    "chat astream": lambda client: read(ChatViaticum(model="far", client=client).astream("hello")),
    "routed ainvoke": lambda client: ChatViaticum(client=client).ainvoke("hello"),
    "acompletion": lambda client: completion(client, "far", stream=False),
    "acompletion streams": lambda client: completion(client, "far", stream=True),
    "routed acompletion": lambda client: completion(client, "auto", stream=False),
}


@pytest.mark.parametrize("way", WAYS)
async def test_a_cancelled_coroutine_closes_the_connection_of_a_silent_provider(
    server: OpenAIServer, client: Viaticum, way: str
) -> None:
    server.script = ["silent"]
    task = asyncio.ensure_future(WAYS[way](client))
    while not server.requests:
        await asyncio.sleep(0.02)
        assert not task.done()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, SOON)
    assert await asyncio.get_running_loop().run_in_executor(None, server.hung_up.wait, SOON)
    await asyncio.to_thread(wait_until, lambda: client.budget().held_nanousd == 0)
    assert client.budget().posted_nanousd > 0, "the prompt was read"


class RefusesWork(ThreadPoolExecutor):
    """The default executor of an event loop, which nothing of ours may use."""

    def submit(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("the loop's default executor is for its owner")


@pytest.mark.parametrize("model", ["m", "auto"])
async def test_chats_leave_the_default_executor_of_the_loop_alone(tmp_path: Path, model: str) -> None:
    asyncio.get_running_loop().set_default_executor(RefusesWork(1))
    settings: Any = {"models": {"m": ScriptedModel(name="m")}, "router": FakeRouter("m+direct")}
    with ChatViaticum(model=model, budget="0.01", folder=tmp_path, **settings) as chat:
        assert (await chat.ainvoke("6 times 7?")).text == "The answer is 42."
        assert "".join([chunk.text async for chunk in chat.astream("6 times 7?")]) == "The answer is 42."


@pytest.mark.parametrize("phase", ["comments", "thinks"])
def test_a_timeout_holds_while_the_model_thinks(server: OpenAIServer, tmp_path: Path, phase: str) -> None:
    catalogue, router = Catalogue([spec_for(server)]), FakeRouter("far+direct")
    with Viaticum("1", catalogue=catalogue, router=router, folder=tmp_path) as client:
        client.solve("hello")  # LiteLLM is loaded by now
        before = client.budget().posted_nanousd
        prepare(server, phase)
        with pytest.raises(ProviderTimeout, match="within 3 seconds"):
            client.solve("hello", allowance=Allowance(timeout=3))
        assert server.hung_up.wait(SOON)
        assert len(server.requests) == 2, "each further try would take as long, and be charged"
        assert client.budget().posted_nanousd > before


# Clients of the server


async def vanish_once_asked(ours: RunningServer, server: OpenAIServer, body: dict[str, Any]) -> None:
    async with httpx.AsyncClient(base_url=ours.url, timeout=NEVER) as http:

        async def ask() -> None:
            async with http.stream("POST", "/v1/chat/completions", json=body) as response:
                await read(response.aiter_lines())

        task = asyncio.create_task(ask())
        while not server.requests:
            await asyncio.sleep(0.02)
            assert not task.done()
        await asyncio.sleep(0.5)
        task.cancel()


@pytest.mark.parametrize("phase", [*PHASES, "whole"])
@pytest.mark.parametrize("name", ["far", "far+direct"])
def test_a_client_of_the_server_that_vanishes(
    server: OpenAIServer, tmp_path: Path, phase: str, name: str
) -> None:
    extra = prepare(server, "silent" if phase == "whole" else phase)
    if extra and name != "far":
        pytest.skip("strategies call no tools")
    with serving(tmp_path, catalogue=Catalogue([spec_for(server)])) as ours:
        body = chat_body(name, stream=phase != "whole", max_tokens=3_000, **extra)
        body["messages"] = [{"role": "user", "content": "hello " * 500 if extra else "hello"}]
        asyncio.run(vanish_once_asked(ours, server, body))
        assert server.hung_up.wait(SOON)
        ours.assert_settled()
        assert ours.spent_and_held()[0] > 0
