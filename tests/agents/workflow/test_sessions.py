"""A conversation keeps its model while that is worth it, and what it costs to leave it is told."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai_server import OpenAIServer, running_server, spec_for
from typer.testing import CliRunner
from viaticum_server import serving

from viaticum import Allowance, ChatViaticum, InputError, Viaticum
from viaticum.agents.cancellation import CancellationToken
from viaticum.agents.completions import CompletionFinished, CompletionRequest, complete
from viaticum.agents.workflow.sessions import Sessions, choose_turn, count_tokens
from viaticum.catalogue import Catalogue, ModelSpec
from viaticum.cli import app
from viaticum.routers.query import Best, StaticRouter
from viaticum.types import Message, Pair, RoutingTable, Row

QUESTION = "What is 2 + 3?"
# `short` writes cheaper, `long` reads cheaper: a long prompt that nobody has read is for `long`.
TABLE = RoutingTable(
    (
        Row(Pair("short", "direct"), 0.7, 100, 100, 10_000, 20_000),
        Row(Pair("long", "direct"), 0.7, 100, 100, 11_000, 21_000),
    )
)
HISTORY: list[Message] = [
    {"role": "user", "content": "word " * 4_000},
    {"role": "assistant", "content": "Read."},
]


def entries(short: str = "The answer is 5.", long: str = "The answer is 5.") -> list[ModelSpec]:
    prices = {
        "short": {"input_price": 1, "output_price": 1, "cached_input_price": "0.1"},
        "long": {"input_price": "0.7", "output_price": 2, "cached_input_price": "0.1"},
    }
    common = {"kind": "scripted", "description": "d", "context_length": 100_000}
    texts = {"short": short, "long": long}
    return [
        ModelSpec.model_validate({**common, **prices[name], "name": name, "text": texts[name]})
        for name in prices
    ]


def opened(folder: Path, catalogue: Catalogue | None = None, **settings: Any) -> Viaticum:
    settings = {"router": StaticRouter(TABLE), "tries": 1, **settings}
    return Viaticum("1", catalogue=catalogue or Catalogue(entries()), folder=folder, **settings)


def ask(client: Viaticum, session: str | None, messages: list[Message] | None = None) -> Any:
    return client.solve(
        QUESTION, kind="number", messages=messages or [], allowance=Allowance(session=session)
    ).routes[-1]


def test_a_conversation_stays_with_the_model_that_has_read_it(tmp_path: Path) -> None:
    with opened(tmp_path) as client:
        assert ask(client, "new", HISTORY).pair.model == "long"
        assert ask(client, "mine").pair.model == "short"
        again = ask(client, "mine", [{"role": "user", "content": "hi"}, *HISTORY[1:]])
        assert again.pair.model == "short"
        assert "the session stays with it" in again.why
        tags = [hold.tags for hold in client.ledger.holds(client.budget_name)]
        assert len({each["session"] for each in tags}) == 2
        assert not any("switched_from" in each or "mine" in each.values() for each in tags)


def test_a_cache_that_is_not_there_keeps_nobody(tmp_path: Path) -> None:
    """The conversation is long, and its model has read little of it: the other one reads it for less."""
    with opened(tmp_path) as client:
        assert ask(client, "mine").pair.model == "short"
        moved = ask(client, "mine", HISTORY)
        assert moved.pair.model == "long"
        assert "a switch from short, which has" in moved.why
        assert client.ledger.holds(client.budget_name)[-1].tags["switched_from"] == "short"
        assert ask(client, "mine", HISTORY).pair.model == "long"
        assert "switched_from" not in client.ledger.holds(client.budget_name)[-1].tags
        assert client.sessions.model("mine") == "long"


def test_the_lost_cache_is_what_a_switch_costs() -> None:
    sessions, catalogue = Sessions(), Catalogue(entries())
    rows = {row.pair.model: row for row in TABLE}
    sessions.note("s", "short", count_tokens(HISTORY), answered=True)
    state = sessions.state("s", HISTORY)
    assert state.cached_tokens == state.prompt_tokens > 1_000
    kept = choose_turn(rows, state, catalogue, Best(), None)
    assert (kept.model, kept.switched) == ("short", False)
    assert choose_turn(rows, sessions.state("t", HISTORY), catalogue, Best(), None).model == "long"


def test_trouble_calls_a_more_accurate_model() -> None:
    sessions, catalogue = Sessions(), Catalogue(entries())
    rows = {"short": TABLE.rows[0], "long": Row(Pair("long", "direct"), 0.9, 100, 100, 90_000, 99_000)}
    cheap = {name: row for name, row in rows.items() if name == "short"}
    for _ in range(2):
        sessions.note("s", "short", 10, answered=False)
    choice = choose_turn(rows, sessions.state("s", []), catalogue, Best(), None)
    assert (choice.model, choice.switched) == ("long", True)
    assert "were errors" in choice.why
    assert choose_turn(cheap, sessions.state("s", []), catalogue, Best(), None).model == "short"


def test_the_session_goes_on_with_the_model_that_answered(tmp_path: Path) -> None:
    catalogue = Catalogue(entries(short="I cannot tell"))
    with opened(tmp_path, catalogue) as client:
        assert ask(client, "mine").pair.model == "long"
        assert client.sessions.model("mine") == "long"
        assert client.ledger.check() == []


def test_the_oldest_sessions_are_forgotten() -> None:
    sessions = Sessions(most=2)
    for name in ("a", "b", "a", "c"):
        sessions.note(name, "short", 1, answered=True)
    assert [sessions.model(name) for name in "abc"] == ["short", None, "short"]


@pytest.mark.parametrize("session", ["", " ", "x" * 201, 7, "\ud800"])
def test_a_session_has_a_name(session: Any) -> None:
    with pytest.raises(InputError):
        Allowance(session=session)


# Tools, the chat model, the server, the terminal

TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


@pytest.fixture
def provider() -> Iterator[OpenAIServer]:
    with running_server() as server:
        yield server


@pytest.fixture
def remote(provider: OpenAIServer) -> Catalogue:
    prices = {
        "short": {"input_price": "1", "output_price": "1", "cached_input_price": "0.1"},
        "long": {"input_price": "0.7", "output_price": "2", "cached_input_price": "0.1"},
    }
    common: dict[str, Any] = {"context_length": 100_000, "max_retries": 0}
    return Catalogue(
        [
            spec_for(provider, name=name, litellm_model=f"openai/{name}", **common, **each)
            for name, each in prices.items()
        ]
    )


def test_a_chain_of_tool_calls_stays_on_its_model(
    tmp_path: Path, remote: Catalogue, provider: OpenAIServer
) -> None:
    with opened(tmp_path, remote) as client:

        def turn(key: str, messages: list[Message], session: str | None = "s") -> CompletionFinished:
            extra = {"tools": [TOOL]}
            request = CompletionRequest(
                "auto", messages, client.budget_name, key, extra=extra, session=session
            )
            *_, last = complete(client, request, CancellationToken())
            assert isinstance(last, CompletionFinished)
            return last

        messages: list[Message] = [{"role": "user", "content": "Call f."}]
        first = turn("a", messages)
        assert (first.routes, first.switched_from) == (("short",), "")
        call: Any = first.tool_calls[0]
        result: Any = {"role": "tool", "tool_call_id": call["id"], "content": "word " * 4_000}
        answers: Any = {"role": "assistant", "content": "", "tool_calls": [call]}
        assert turn("b", [*messages, answers, result]).routes == ("short",)
        provider.script = [(429, {}, "slow down")]
        after = turn("c", [*messages, answers, result])
        assert (after.routes, after.switched_from) == (("long",), "short")
        chat = ChatViaticum(client=client, session="t")
        bound = chat.bind_tools([{"title": "f", "description": "d", "type": "object", "properties": {}}])
        assert bound.invoke("Call f.").response_metadata["model_name"] == "short"
        assert client.sessions.model("t") == "short"
        assert "why" in chat.invoke("Hello").response_metadata


def test_the_server_takes_a_header_or_a_field(tmp_path: Path) -> None:
    catalogue = Catalogue(entries())
    with serving(tmp_path, catalogue=catalogue, router=StaticRouter(TABLE)) as server:
        tokens = [server.keys.create(name)[0] for name in ("ann", "bob")]
        ann, bob = ({"authorization": f"Bearer {token}"} for token in tokens)
        long = [*HISTORY, {"role": "user", "content": QUESTION}]
        first = server.ask("auto", headers=ann, session="s").json()["viaticum"]
        assert (first["route"], first["switched_from"]) == ("short+direct", None)
        moved = server.ask("auto", headers=ann | {"x-viaticum-session": "s"}, messages=long)
        told = moved.json()["viaticum"]
        assert (told["route"], told["switched_from"]) == ("long+direct", "short")
        assert "a switch from short" in told["why"]
        other = server.ask("auto", headers=bob, session="s").json()["viaticum"]
        assert (other["route"], other["switched_from"]) == ("short+direct", None)
        assert server.ask("auto", headers=ann, session="").status_code == 400
        server.assert_settled()


def test_a_chat_on_the_terminal_is_a_session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIATICUM_HOME", str(tmp_path))
    common = 'kind = "scripted"\ndescription = "d"\ncontext_length = 8192\ninput_price = 1\n'
    file = tmp_path / "catalogue.toml"
    file.write_text(f'[models.home]\n{common}output_price = 1\ntext = "The answer is 5."\n')
    chat = ["chat", "--model", "home+direct", "--json", "--catalogue", str(file)]
    said = CliRunner().invoke(app, chat, input=f"{QUESTION}\n{QUESTION}\n/route\n")
    assert said.exit_code == 0, said.stderr
    lines = [json.loads(line) for line in said.stdout.splitlines()]
    assert [line["switched_from"] for line in lines] == [None, None]
    assert "the session stays with it" in lines[1]["why"]
    assert "home+direct: " in said.stderr
