"""Where data may go: a model that is not allowed receives no request, whatever would have asked it.

Two real servers on loopback stand for providers, `abroad` (region us) and `nearby` (region eu); what they
receive is counted.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai_server import KEY, OpenAIServer, running_server, spec_for
from typer.testing import CliRunner
from viaticum_server import chat_body, serving

import viaticum
from viaticum import Allowance, ChatViaticum, InputError, Viaticum
from viaticum.agents.batch import run_batch
from viaticum.agents.batch.tune import Tuning
from viaticum.agents.cancellation import CancellationToken
from viaticum.agents.completions import CompletionFinished, CompletionRequest, available_names, complete
from viaticum.agents.server.api_keys import MIGRATIONS, ApiKeyStore, add_only
from viaticum.agents.workflow.calls import Calls
from viaticum.budgets import Ledger
from viaticum.catalogue import Catalogue, ModelSpec
from viaticum.cli import app
from viaticum.errors import ModelNotAllowed, RateLimited, ViaticumError
from viaticum.jobs import read_rows
from viaticum.models.base import Generation
from viaticum.models.remote.model import RemoteModel
from viaticum.models.scripted import ScriptedModel
from viaticum.questions import Question
from viaticum.residency import Residency
from viaticum.routers.query import Plan, PlanRow, StaticRouter
from viaticum.types import Pair, Query, RoutingTable, Row

ABROAD, NEARBY, HOME = Pair("abroad", "direct"), Pair("nearby", "direct"), Pair("home", "direct")
TABLE = RoutingTable(
    (
        Row(ABROAD, 0.9, 20, 30, 10_000, 20_000),
        Row(NEARBY, 0.7, 20, 30, 10_000, 20_000),
        Row(HOME, 0.5, 20, 30, 10_000, 20_000),
    )
)
QUESTION = "What is 2 + 3?"


@pytest.fixture(scope="module")
def servers() -> Iterator[tuple[OpenAIServer, OpenAIServer]]:
    with running_server() as abroad, running_server(OpenAIServer()) as nearby:
        yield abroad, nearby


@pytest.fixture
def abroad(servers: tuple[OpenAIServer, OpenAIServer]) -> OpenAIServer:
    servers[0].reset()
    servers[0].text = "The answer is 5, from abroad."
    return servers[0]


@pytest.fixture
def nearby(servers: tuple[OpenAIServer, OpenAIServer]) -> OpenAIServer:
    servers[1].reset()
    servers[1].text = "The answer is 5, from nearby."
    return servers[1]


@pytest.fixture
def catalogue(abroad: OpenAIServer, nearby: OpenAIServer) -> Catalogue:
    fields: dict[str, Any] = {"max_retries": 0, "timeout_seconds": 60}
    home = spec("home", "scripted", text="The answer is 5, from home.")
    return Catalogue(
        [
            spec_for(abroad, name="abroad", region="us", **fields),
            spec_for(nearby, name="nearby", region="EU", tags=["zero-retention"], **fields),
            home,
        ]
    )


def spec(name: str, kind: str, **fields: Any) -> ModelSpec:
    prices = {"input_price": 1, "output_price": 1}
    return ModelSpec.model_validate(
        {"name": name, "kind": kind, "description": "d", "context_length": 8192, **prices, **fields}
    )


@pytest.fixture
def client(catalogue: Catalogue, tmp_path: Path) -> Iterator[Viaticum]:
    with opened(catalogue, tmp_path) as client:
        yield client


def opened(catalogue: Catalogue, folder: Path, **settings: Any) -> Viaticum:
    settings = {"router": StaticRouter(TABLE), "policy": "best", "tries": 1, **settings}
    return Viaticum("1", catalogue=catalogue, folder=folder, **settings)


def ask(client: Viaticum, name: str, **fields: Any) -> CompletionFinished:
    messages: Any = [{"role": "user", "content": QUESTION}]
    request = CompletionRequest(name, messages, client.budget_name, f"k{name}", **fields)
    *_, last = complete(client, request, CancellationToken())
    assert isinstance(last, CompletionFinished)
    return last


# Labels


def test_labels_are_those_of_the_entry_and_local_where_nothing_leaves_the_machine(
    abroad: OpenAIServer,
) -> None:
    served = {"engine": "served", "served_model": "m", "sources": [{"type": "path", "path": "/w"}]}
    entries = [
        spec("here", "local", sources=[{"type": "path", "path": "/w"}], tags=["Lab"]),
        spec("same", "local", **served, api_base="http://127.0.0.1:1/v1"),
        spec("rack", "local", **served, api_base="http://10.0.0.7:8000/v1", tags=["lab"]),
        spec_for(abroad, name="proxy"),  # on a loopback address, which may pass it on anywhere
    ]
    pair = {"small": "here", "large": "rack", "router": "r-stitch", "tau": 0.3, "context_length": 8192}
    both = ModelSpec.model_validate({"name": "both", "kind": "pair", "description": "d", **pair})
    catalogue = Catalogue([*entries, both])
    assert {name: set(catalogue.labels(name)) for name in catalogue} == {
        "here": {"local", "lab"},
        "same": {"local"},
        "rack": {"lab"},
        "proxy": set(),
        "both": {"lab"},
    }
    with pytest.raises(ValueError, match="its data goes where its models are"):
        ModelSpec.model_validate({**both.model_dump(), "region": "eu"})
    with pytest.raises(ValueError, match="region has labels"):
        spec("bad", "scripted", region="e u")


def test_labels_change_no_key_of_an_answer() -> None:
    plain, labelled = spec("home", "scripted"), spec("home", "scripted", region="eu", tags=["x"])
    assert labelled.identity == plain.identity


@pytest.mark.parametrize("only", ["", ",", "a b", [], ["local", ""], [1], 7])
def test_a_restriction_that_is_none_is_refused(only: Any) -> None:
    for make in (Allowance, Viaticum):
        with pytest.raises(InputError):
            make(only=only)


def test_restrictions_hold_together() -> None:
    residency = Residency.of("eu, US", None, ["local", "EU"])
    assert str(residency) == "eu or us and eu or local"
    assert residency.allows({"eu"})
    assert residency.allows({"us", "local"})
    assert not residency.allows({"us"})
    assert not residency.allows(())
    assert Residency.of(None).allows(())


# Routes


@pytest.mark.parametrize(
    ("only", "pair"),
    [(None, ABROAD), ("eu", NEARBY), ("zero-retention", NEARBY), ("local", HOME), (["local", "eu"], NEARBY)],
)
def test_a_route_is_chosen_among_allowed_models(
    client: Viaticum, abroad: OpenAIServer, only: Any, pair: Pair
) -> None:
    answer = client.solve(QUESTION, kind="number", allowance=Allowance(only=only))
    assert (answer.value, answer.routes[0].pair) == ("5", pair)
    assert len(abroad.requests) == (pair == ABROAD)


def test_the_error_names_what_was_refused_and_why(client: Viaticum) -> None:
    with pytest.raises(ModelNotAllowed) as caught:
        client.solve(QUESTION, allowance=Allowance(only="moon"))
    assert "labelled moon alone" in str(caught.value)
    assert "abroad (us), nearby (eu, zero-retention), home (local)" in str(caught.value)
    assert caught.value.models["nearby"] == ("eu", "zero-retention")
    assert client.ledger.holds() == []


@pytest.mark.parametrize("streamed", [False, True])
def test_a_failover_stays_where_data_may_go(
    client: Viaticum, abroad: OpenAIServer, nearby: OpenAIServer, streamed: bool
) -> None:
    nearby.script = [(429, {}, "slow down")]
    answer = client.solve(QUESTION, kind="number", allowance=Allowance(only=["eu", "local"]))
    assert answer.routes[0].pair == HOME
    nearby.script = [(429, {}, "slow down")]
    events = client.stream if streamed else lambda *given, **terms: [client.solve(*given, **terms)]
    with pytest.raises(RateLimited):
        list(events(QUESTION, allowance=Allowance(only="eu")))
    assert abroad.requests == []
    assert client.budget().held_nanousd == 0


def test_no_answer_leads_to_no_other_region(client: Viaticum, abroad: OpenAIServer, nearby: Any) -> None:
    nearby.text = "I cannot tell"
    answer = client.solve(QUESTION, kind="number", allowance=Allowance(only="eu"))
    assert answer.value is None
    assert abroad.requests == []


def test_a_step_of_a_plan_is_refused(catalogue: Catalogue, tmp_path: Path, abroad: OpenAIServer) -> None:
    """A cascade of three votes: one that would go abroad is no candidate at all."""

    class Votes(StaticRouter):
        def plans_for(self, query: Query) -> list[PlanRow]:
            whole = PlanRow(Plan((NEARBY, HOME, ABROAD), 3), 0.99, 10, 20)
            return [whole, *super().plans_for(query)]

    with opened(catalogue, tmp_path, router=Votes(TABLE)) as client:
        answer = client.solve(QUESTION, kind="number", allowance=Allowance(only=["eu", "local"]))
        assert [route.pair for route in answer.routes] == [NEARBY]
        assert abroad.requests == []
        assert client.solve(QUESTION, kind="number").routes[-1].pair == ABROAD


def test_a_router_that_knows_one_pair_asks_no_other(
    catalogue: Catalogue, tmp_path: Path, abroad: OpenAIServer
) -> None:
    refused = pytest.raises(ModelNotAllowed, match=r"refuses abroad \(us\)")
    with opened(catalogue, tmp_path, model="abroad", only="eu") as client, refused:
        client.solve(QUESTION)
    assert abroad.requests == []


def test_a_question_keeps_its_restriction_when_it_is_continued(
    catalogue: Catalogue, tmp_path: Path, abroad: OpenAIServer, nearby: OpenAIServer
) -> None:
    """The first process dies in its call; the second one asks without the allowance."""
    nearby.script = ["drop"]
    with opened(catalogue, tmp_path, budget_name="b") as client, pytest.raises(ViaticumError, match="nearby"):
        client.solve(QUESTION, thread_id="t", allowance=Allowance(only="eu"))
    with opened(catalogue, tmp_path, budget_name="b") as client:
        nearby.script = [(429, {}, "slow down")]
        with pytest.raises(RateLimited):
            client.solve(QUESTION, thread_id="t")
    assert abroad.requests == []


# Calls


def test_an_allowance_does_not_lift_what_the_client_refuses(
    catalogue: Catalogue, tmp_path: Path, abroad: OpenAIServer, nearby: OpenAIServer
) -> None:
    with opened(catalogue, tmp_path, only="local") as client:
        answer = client.solve(QUESTION, kind="number", allowance=Allowance(only=["us", "local"]))
        assert answer.routes[0].pair == HOME
        with pytest.raises(ModelNotAllowed):
            client.solve(QUESTION, allowance=Allowance(only="us"))
        with pytest.raises(ModelNotAllowed, match="labelled local alone"):
            client.model("abroad")
        derived = client.derive(budget=client.budget_name)
        with pytest.raises(ModelNotAllowed):
            derived.model("nearby")
    assert abroad.requests == nearby.requests == []


def test_a_model_given_under_the_name_of_a_local_one_is_not_local(
    abroad: OpenAIServer, tmp_path: Path
) -> None:
    """The entry of that name is local, the model is not."""
    name = "qwen2.5-coder-0.5b"
    remote = RemoteModel(spec_for(abroad, name=name))
    table = RoutingTable((Row(Pair(name, "direct"), 0.9, 20, 30, 10_000, 20_000),))
    settings: dict[str, Any] = {"router": StaticRouter(table), "models": {name: remote}, "folder": tmp_path}
    refused = pytest.raises(ModelNotAllowed, match=r"qwen2.5-coder-0.5b \(no label\)")
    with Viaticum("1", only="local", **settings) as client, refused:
        client.solve(QUESTION)
    assert abroad.requests == []


@pytest.mark.parametrize("name", ["abroad", "abroad+direct"])
def test_a_named_model_is_refused_before_anything_is_sent(
    client: Viaticum, abroad: OpenAIServer, name: str
) -> None:
    with pytest.raises(ModelNotAllowed, match="abroad"):
        ask(client, name, residency=Residency.of("eu"))
    assert ask(client, "nearby", residency=Residency.of("eu")).routes == ("nearby",)
    assert abroad.requests == []
    assert "abroad" not in available_names(client.derive(residency=Residency.of("eu")))


def test_tools_through_auto_go_to_allowed_models(
    client: Viaticum, abroad: OpenAIServer, nearby: OpenAIServer
) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    extra = {"tools": [tool]}
    assert ask(client, "auto", extra=extra, residency=Residency.of("eu")).routes == ("nearby",)
    nearby.script = [(429, {}, "slow down")]
    request = {"extra": extra, "residency": Residency.of("eu")}
    messages: Any = [{"role": "user", "content": QUESTION}]
    with pytest.raises(RateLimited):
        list(
            complete(
                client,
                CompletionRequest("auto", messages, client.budget_name, "again", **request),
                CancellationToken(),
            )
        )
    with pytest.raises(ModelNotAllowed, match=r"abroad \(us\), nearby \(eu, zero-retention\)"):
        ask(client, "auto", extra=extra, residency=Residency.of("local"))
    assert abroad.requests == []


# The chat model


def test_a_chat_model_has_a_restriction_of_its_own(
    client: Viaticum, abroad: OpenAIServer, nearby: OpenAIServer
) -> None:
    chat = ChatViaticum(client=client, only="eu")
    assert "nearby" in chat.invoke(QUESTION).content
    assert chat.labels() == {"eu", "zero-retention"}
    for name in ("abroad", "abroad+direct"):
        with pytest.raises(ModelNotAllowed):
            ChatViaticum(model=name, client=client, only="eu").invoke(QUESTION)
        with pytest.raises(ModelNotAllowed):
            chat.invoke(QUESTION, model=name)
    other = chat.model_copy(update={"only": "local"})
    assert "home" in other.invoke(QUESTION).content
    chat.only = "local"
    assert "home" in chat.invoke(QUESTION).content
    with pytest.raises(ModelNotAllowed):
        ChatViaticum(client=client, only="local").bind_tools([]).invoke(QUESTION, tools=[{"x": 1}])
    assert abroad.requests == []


# Batch


def write_rows(folder: Path, **body: Any) -> Path:
    path = folder / "in.jsonl"
    if body:
        line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": chat_body(**body)}
        path.write_text(json.dumps(line) + "\n")
    else:
        lines = [{"id": str(n), "question": f"What is {n} + 3?", "kind": "number"} for n in range(3)]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_a_batch_keeps_its_restriction_when_it_goes_on(
    catalogue: Catalogue, tmp_path: Path, abroad: OpenAIServer, nearby: OpenAIServer
) -> None:
    settings: dict[str, Any] = {
        "catalogue": catalogue,
        "router": StaticRouter(TABLE),
        "ledger": tmp_path / "ledger.db",
        "tries": 1,
    }
    nearby.script = [(429, {"retry-after": "0.01"}, "slow down")] * 3
    source, out = write_rows(tmp_path), tmp_path / "out.jsonl"
    ended = run_batch(source, out, budget="1", only=["eu"], policy="best", **settings)
    assert {row.state for row in read_rows(ended.folder)} == {"failed"}
    assert ended.job.memory["settings"]["only"] == ["eu"]
    again = run_batch(None, out, resume=True, budget="2", **settings)
    assert again.job.memory["settings"]["only"] == ["eu"]
    assert abroad.requests == []


def test_a_row_that_names_a_refused_model_fails_and_says_why(
    catalogue: Catalogue, tmp_path: Path, abroad: OpenAIServer
) -> None:
    settings: dict[str, Any] = {"catalogue": catalogue, "router": StaticRouter(TABLE)}
    settings |= {"ledger": tmp_path / "ledger.db", "budget": "1", "only": "local"}
    ended = run_batch(write_rows(tmp_path, model="abroad"), tmp_path / "out.jsonl", **settings)
    (row,) = read_rows(ended.folder)
    assert row.state == "failed"
    assert "refuses abroad (us)" in row.reason
    assert abroad.requests == []


def test_a_judge_is_restricted_too(catalogue: Catalogue, tmp_path: Path) -> None:
    questions = [Question(str(n), Query(f"What is {n} + 3 of {n}?"), None) for n in range(60)]
    settings: dict[str, Any] = {"catalogue": catalogue, "budget": "1", "only": "local"}
    with pytest.raises(ModelNotAllowed, match="abroad"):
        Tuning.open(questions, tmp_path / "r", judge="abroad", **settings)
    with pytest.raises(ModelNotAllowed, match="nearby"):
        Tuning.open(questions, tmp_path / "r", models=["nearby"], judge="home", **settings)
    tuning = Tuning.open(questions, tmp_path / "r", judge="home", **settings)
    assert {pair.model for pair in tuning.pairs} == {"home"}
    assert tuning.workflow.only == ("local",)


# The server


def test_a_key_and_a_request_restrict_the_server(
    catalogue: Catalogue, tmp_path: Path, abroad: OpenAIServer, nearby: OpenAIServer
) -> None:
    with serving(tmp_path, catalogue=catalogue, router=StaticRouter(TABLE)) as server:
        token, key = server.keys.create("eu", only="EU,local")
        plain, _ = server.keys.create("plain")
        assert key.only == ("eu", "local")
        assert [each.only for each in server.keys.all()] == [("eu", "local"), ()]
        limited, free = ({"authorization": f"Bearer {each}"} for each in (token, plain))
        for stream in (False, True):
            refused = server.ask("abroad", headers=limited, stream=stream)
            assert refused.status_code == 403
            error = refused.json()["error"]
            assert (error["type"], error["code"]) == ("permission_error", "model_not_allowed")
            assert "refuses abroad (us)" in error["message"]
        assert (
            server.ask("auto", headers=limited, policy="best").json()["viaticum"]["route"] == "nearby+direct"
        )
        body = {"only": ["local"], "policy": "best"}
        assert server.ask("auto", headers=limited, **body).json()["viaticum"]["route"] == "home+direct"
        assert server.ask("auto", headers=limited, only="us").status_code == 403
        assert server.ask("auto", headers=limited, only="e u").status_code == 400
        assert server.ask("auto", headers=limited, only=[]).status_code == 400
        names = server.http.get("/v1/models", headers=limited).json()["data"]
        assert "abroad" not in {each["id"] for each in names}
        assert abroad.requests == []
        assert server.ask("abroad", headers=free).status_code == 200
        server.assert_settled()


def test_keys_of_earlier_versions_are_not_restricted(tmp_path: Path) -> None:
    with ApiKeyStore(tmp_path / "keys.db") as keys:
        keys.create("old")
    with closing(sqlite3.connect(tmp_path / "keys.db")) as db:
        for column in ("only_labels", "team"):  # which came later
            db.execute(f"ALTER TABLE keys DROP COLUMN {column}")
        db.execute(f"PRAGMA user_version = {MIGRATIONS.index(add_only)}")
    with ApiKeyStore(tmp_path / "keys.db") as keys:
        assert keys.all()[0].only == ()


# The command line

CATALOGUE = """
[models.home]
kind = "scripted"
description = "d"
context_length = 8192
input_price = 1
output_price = 1
text = "The answer is 5, from home."
[models.abroad]
kind = "remote"
description = "d"
context_length = 8192
input_price = 1
output_price = 1
litellm_model = "openai/fake"
api_base = "{url}"
region = "us"
"""


def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, abroad: OpenAIServer) -> None:
    monkeypatch.setenv("VIATICUM_HOME", str(tmp_path))
    file = tmp_path / "catalogue.toml"
    file.write_text(CATALOGUE.format(url=abroad.url))
    run = CliRunner().invoke
    common = ["--catalogue", str(file)]
    solved = run(app, ["solve", QUESTION, "--only", "local", "--model", "home", *common])
    assert (solved.exit_code, solved.stdout) == (0, "5\n")
    refused = run(app, ["solve", QUESTION, "--only", "local", "--model", "abroad", *common])
    assert isinstance(refused.exception, ModelNotAllowed)
    chat = ["chat", "--model", "abroad", "--only", "local", *common]
    said = run(app, chat, input="hello\n")
    assert said.exit_code == 1
    assert "refuses abroad (us)" in said.stderr
    made = run(app, ["keys", "create", "k", "--only", "eu", "--json"])
    assert json.loads(made.stdout)["only"] == ["eu"]
    assert "eu" in run(app, ["keys", "list"]).stdout
    shown = run(app, ["models", "show", "abroad", "--json", *common])
    assert json.loads(shown.stdout)["labels"] == ["us"]
    assert abroad.requests == []


def test_a_model_without_an_entry_is_local_where_it_runs_here(tmp_path: Path) -> None:
    given = {"mine": ScriptedModel("The answer is 5.")}
    table = RoutingTable((Row(Pair("mine", "direct"), 0.9, 20, 30, 10_000, 20_000),))
    with Viaticum("1", models=given, router=StaticRouter(table), folder=tmp_path, only="local") as client:
        assert client.solve(QUESTION, kind="number").value == "5"


# Budgets


@pytest.fixture
def european(catalogue: Catalogue, tmp_path: Path) -> Iterator[Viaticum]:
    """A client whose budget is below one for models of the EU and of this machine."""
    with Ledger(tmp_path / "ledger.db") as ledger:
        ledger.create("org", limit_nanousd=10**9, only=["eu", "local"])
        ledger.create("team", parent="org")
    with Viaticum(
        catalogue=catalogue,
        folder=tmp_path,
        budget_name="team",
        router=StaticRouter(TABLE),
        policy="best",
        tries=1,
    ) as client:
        yield client


def test_a_budget_pays_for_its_models_alone_whoever_asks(
    european: Viaticum, abroad: OpenAIServer, nearby: OpenAIServer
) -> None:
    assert european.solve(QUESTION, kind="number").routes[0].pair == NEARBY
    nearby.script = [(429, {}, "slow down")]
    assert european.solve(QUESTION, kind="number").routes[-1].pair == HOME  # the failover too
    with pytest.raises(ModelNotAllowed):
        european.solve(QUESTION, allowance=Allowance(only="us"))
    for name in ("abroad", "abroad+direct"):
        with pytest.raises(ModelNotAllowed):
            ask(european, name)
        with pytest.raises(ModelNotAllowed):
            ChatViaticum(model=name, client=european).invoke(QUESTION)
    assert ask(european, "auto").routes == ("nearby+direct",)
    assert "nearby" in ChatViaticum(client=european).invoke(QUESTION).content
    assert abroad.requests == []
    assert european.ledger.check() == []


def test_a_budget_of_a_run_restricts_that_run(client: Viaticum, abroad: OpenAIServer) -> None:
    client.ledger.create("eu", limit_nanousd=10**9, only="eu")
    assert client.solve(QUESTION, allowance=Allowance(budget="eu")).routes[0].pair == NEARBY
    assert abroad.requests == []
    assert client.solve(QUESTION).routes[0].pair == ABROAD


def test_a_call_that_nobody_restricted_is_refused_by_the_ledger(client: Viaticum) -> None:
    """Where no route was chosen under the restriction, the hold is what refuses."""
    client.ledger.create("eu", limit_nanousd=10**9, only="eu")
    messages: Any = [{"role": "user", "content": QUESTION}]
    for labels in (client.labels, lambda model: ()):
        calls = Calls(client.catalogue, client.ledger, client.model, labels=labels)
        with pytest.raises(ModelNotAllowed):
            list(calls.stream("eu", "k", "abroad", messages, Generation()))
    assert client.ledger.hold("k") is None


def test_keys_of_a_restricted_budget_reach_its_models_alone(
    catalogue: Catalogue, tmp_path: Path, abroad: OpenAIServer
) -> None:
    with serving(tmp_path, catalogue=catalogue, router=StaticRouter(TABLE)) as server:
        server.client.ledger.create("eu", limit_nanousd=10**9, only="eu")
        token, _ = server.keys.create("anna", scope="eu")
        headers = {"authorization": f"Bearer {token}"}
        assert server.ask("auto", headers=headers).headers["x-viaticum-route"] == "nearby+direct"
        refused = server.ask("abroad", headers=headers)
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "model_not_allowed")
        listed = server.http.get("/v1/models", headers=headers).json()["data"]
        assert not any(each["id"].startswith("abroad") for each in listed)
    assert abroad.requests == []


def test_code_in_a_restricted_budget_reaches_its_models_alone(
    catalogue: Catalogue, abroad: OpenAIServer, nearby: OpenAIServer
) -> None:
    """By the entries of the catalogue; a model without one goes nowhere, and what cannot be held neither."""
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 5, "model": "fake"}
    headers = {"authorization": f"Bearer {KEY}"}
    with viaticum.budget("1", only="eu", catalogue=catalogue, unheld="allow") as budget:
        sent = httpx.post(f"{nearby.url}/chat/completions", json=body, headers=headers)
        refused = httpx.post(f"{abroad.url}/chat/completions", json=body)
        unknown = httpx.post(f"{nearby.url}/chat/completions", json={**body, "model": "another"})
        odd = httpx.post("https://api.openai.com/v1/images/generations", json={"prompt": "x"})
    assert [each.status_code for each in (sent, refused, unknown, odd)] == [200, 403, 400, 400]
    assert abroad.requests == []
    assert len(nearby.requests) == 1
    assert budget.calls.total() == 1
