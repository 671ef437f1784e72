"""Deadlines: ways that are too slow are not chosen, and what is in flight at the end is ended and settled."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from openai_server import OpenAIServer, running_server, spec_for
from viaticum_server import LONG_TEXT, serving
from workflow_client import LARGE, SMALL, TABLE, ScriptedModel, client

from viaticum import Allowance, ChatViaticum, InputError, Pair, Viaticum, build_graph
from viaticum.agents.batch import run_batch
from viaticum.agents.workflow.deadlines import Deadline
from viaticum.agents.workflow.latencies import CallLatencies, Seconds, estimate
from viaticum.budgets import Ledger
from viaticum.catalogue import Catalogue
from viaticum.errors import DeadlineExceeded, ModelUnavailable, ProviderUnavailable
from viaticum.jobs import read_rows
from viaticum.models.base import Generation
from viaticum.models.remote.request import load_litellm
from viaticum.routers.query import Plan, PlanRow, StaticRouter
from viaticum.types import Completion, Message, Query, RoutingTable, Row, TokenCount, Usage

QUESTION = "What is 2 + 3?"


class Timed(ScriptedModel):
    """Says that its calls took so long, without taking it."""

    def __init__(self, name: str, text: str, seconds: float) -> None:
        super().__init__(name, text)
        self.seconds = seconds

    def stream(self, messages: Sequence[Message], generation: Generation) -> Iterator[str | Completion]:
        self.calls += 1
        yield self.text
        yield Completion(self.text, Usage({self.name: TokenCount(100, 20)}, self.seconds), "stop")


def timed(folder: Path, small: float = 0.1, large: float = 9.0, **settings: Any) -> Viaticum:
    """Two models whose calls seem to take so many seconds; each has made six."""
    models = {
        SMALL: Timed(SMALL, "The answer is 5.", small),
        LARGE: Timed(LARGE, "The answer is 6.", large),
    }
    settings = {"policy": "best", "router": StaticRouter(TABLE), "tries": 1, **settings}
    viaticum = Viaticum("1", folder=folder, models=models, catalogue=Catalogue.load(), **settings)
    with Viaticum("1", folder=folder, models=models, catalogue=Catalogue.load(), policy="best") as before:
        for name in models:
            for _ in range(6):
                router = StaticRouter(RoutingTable(tuple(row for row in TABLE if row.pair.model == name)))
                before.derive(router=router).solve(QUESTION)
    return viaticum


# What calls took


def test_seconds_are_a_line_over_tokens() -> None:
    """Half a second until the first token, 10 ms a token; one of ten calls takes three times as long."""
    points = [(n, (0.5 + 0.01 * n) * (3 if n % 10 == 9 else 1)) for n in range(200)]
    found = estimate(points, 100, 400)
    assert found.p50 == pytest.approx(1.5, rel=0.25)
    assert 4.5 < found.p90 < 15
    assert estimate([(20, 2.0)] * 5, 20, 40) == Seconds(pytest.approx(2.0), pytest.approx(2.0))  # type: ignore[arg-type]
    assert estimate([(0, 1.0)] * 5, 0, 0).p90 == pytest.approx(1.0)
    assert estimate([(5, 0.1), (10, 5.0)], 10, 10).p90 >= estimate([(5, 0.1), (10, 5.0)], 10, 10).p50 > 0


def test_what_calls_took_is_read_from_the_ledger_whoever_made_them(tmp_path: Path) -> None:
    with timed(tmp_path) as viaticum:
        small, large = TABLE
        assert viaticum.seconds_of(small).p90 == pytest.approx(0.1, rel=0.1)  # type: ignore[union-attr]
        assert viaticum.seconds_of(large).p50 == pytest.approx(9.0, rel=0.1)  # type: ignore[union-attr]
        other = Row(Pair(LARGE, "direct"), 0.5, 20, 20, 1, 1)  # never called: by the calls of its model
        assert viaticum.seconds_of(other).p50 == pytest.approx(9.0, rel=0.1)  # type: ignore[union-attr]
        assert viaticum.seconds_of(Row(Pair("nobody", "cot"), 0.5, 20, 20, 1, 1)) is None


@pytest.mark.parametrize("where", ["memory:", "ledger.db"])
def test_the_newest_calls_come_first(tmp_path: Path, where: str) -> None:
    with Ledger(where if where == "memory:" else tmp_path / where) as ledger:
        for name in "ab":
            ledger.create(name, limit_nanousd=10**9)
            for n in range(3):
                ledger.reserve(name, f"{name}{n}", {"m": TokenCount(1, 1)}, {}, unpriced=("m",))
                ledger.settle(f"{name}{n}", {"m": TokenCount(1, 1)}, json.dumps("no completion"))
        ledger.reserve("a", "open", {"m": TokenCount(1, 1)}, {}, unpriced=("m",))
        assert [hold.key for hold, _ in ledger.newest_calls(4)] == ["b2", "b1", "b0", "a2"]
        calls, open_holds = ledger.newest_and_open_calls(4)
        assert calls == ledger.newest_calls(4)
        assert [hold.key for hold in open_holds] == ["open"]
        posts = [post for _, post in calls]
        assert [hold.key for hold, _ in ledger.newest_and_open_calls(9, posts[2].id)[0]] == ["b2", "b1"]
        assert ledger.newest_and_open_calls(1, posts[1].id)[0] == calls[:1]
        assert ledger.newest_and_open_calls(9, posts[0].id)[0] == []
        assert CallLatencies(ledger).of(Row(Pair("m", "cot"), 0.5, 1, 1, 1, 1)) is None
        ledger.void("open")


def test_calls_that_were_cut_off_count_as_slow(tmp_path: Path) -> None:
    """A model that never ends in time would else be chosen again and again."""
    models: Any = {SMALL: ScriptedModel(SMALL, "The answer is 5."), LARGE: ScriptedModel(LARGE, SLOW, 0.02)}
    settings: dict[str, Any] = {"router": StaticRouter(TABLE), "policy": "best"}
    with Viaticum("1", folder=tmp_path, models=models, catalogue=Catalogue.load(), **settings) as viaticum:
        with pytest.raises(DeadlineExceeded):
            viaticum.solve(QUESTION, allowance=Allowance(max_seconds=2))
        again = viaticum.derive(latencies=CallLatencies(viaticum.ledger))
        answer = again.solve(QUESTION, kind="number", allowance=Allowance(max_seconds=2))
        assert (answer.value, answer.routes[0].pair.model) == ("5", SMALL)


# Choice


def test_a_way_that_takes_too_long_is_not_chosen(tmp_path: Path) -> None:
    with timed(tmp_path) as viaticum:
        answer = viaticum.solve(QUESTION, kind="number", allowance=Allowance(max_seconds=5))
        assert (answer.value, answer.routes[0].pair.model) == ("5", SMALL)
        assert "without 1 that would take too long" in answer.routes[0].why
        assert viaticum.solve(QUESTION, kind="number").value == "6"
        assert viaticum.solve(QUESTION, kind="number", allowance=Allowance(max_seconds=60)).value == "6"


def test_nothing_is_begun_that_cannot_end_in_time(tmp_path: Path) -> None:
    with timed(tmp_path, small=40.0, large=90.0, max_seconds=20.0) as viaticum:
        with pytest.raises(DeadlineExceeded, match=r"the quickest of 2 ways took 40\.0 seconds"):
            viaticum.solve(QUESTION)
        assert viaticum.budget().posted_nanousd == 0
        assert viaticum.ledger.holds(viaticum.budget_name) == []


def test_a_failover_and_a_plan_heed_it(tmp_path: Path) -> None:
    class Votes(StaticRouter):
        def plans_for(self, query: Query) -> list[PlanRow]:
            plan = Plan((Pair(SMALL, "cot"), Pair(LARGE, "cot")), 2)
            return [PlanRow(plan, 0.99, 10, 20), *super().plans_for(query)]

    with timed(tmp_path, router=Votes(TABLE)) as viaticum:
        answer = viaticum.solve(QUESTION, kind="number", allowance=Allowance(max_seconds=5))
        assert [str(route.pair) for route in answer.routes] == [f"{SMALL}+cot"]

    class Away(Timed):
        def stream(self, messages: Any, generation: Any) -> Any:
            raise ModelUnavailable("busy just now")

    with timed(tmp_path) as viaticum:
        viaticum._resources.model(SMALL).__class__ = Away
        with pytest.raises(ModelUnavailable):  # not the other one, which would take nine seconds
            viaticum.solve(QUESTION, allowance=Allowance(max_seconds=5))
        assert viaticum.budget().held_nanousd == 0


def test_no_second_try_is_waited_for_beyond_it(tmp_path: Path) -> None:
    class Away(ScriptedModel):
        def stream(self, messages: Any, generation: Any) -> Any:
            self.calls += 1
            raise ModelUnavailable("busy just now")

    away = Away(LARGE, "")
    models = {SMALL: ScriptedModel(SMALL, "The answer is 5."), LARGE: away}
    settings: dict[str, Any] = {
        "router": StaticRouter(TABLE),
        "policy": "best",
        "catalogue": Catalogue.load(),
    }
    with Viaticum("1", folder=tmp_path, models=models, tries=9, **settings) as viaticum:
        answer = viaticum.solve(QUESTION, kind="number", allowance=Allowance(max_seconds=10))
        assert answer.value == "5"
        assert away.calls < 6


# In flight

SLOW = " ".join(["word"] * 400)


@pytest.mark.parametrize("live", [False, True])
def test_what_is_in_flight_is_ended_and_settled(tmp_path: Path, live: bool) -> None:
    with client(tmp_path, SLOW, SLOW, pause=0.02, budget="1", policy="best") as viaticum:
        allowance = Allowance(max_seconds=2)
        ask = viaticum.stream if live else lambda *given, **terms: [viaticum.solve(*given, **terms)]
        with pytest.raises(DeadlineExceeded, match=r"2 seconds \(max_seconds\) are over"):
            list(ask(QUESTION, allowance=allowance))
        budget = viaticum.budget()
        assert budget.held_nanousd == 0
        (post,) = [each for each in viaticum.ledger.entries(viaticum.budget_name) if each.kind == "post"]
        assert 0 < post.usage[LARGE].output_tokens < 400 * 5
        assert viaticum.ledger.check() == []


def test_an_answer_that_is_there_is_given_at_the_deadline(tmp_path: Path) -> None:
    """The first pair gave no answer, the second one does not end in time."""
    models = {
        SMALL: ScriptedModel(SMALL, SLOW, 0.02),
        LARGE: ScriptedModel(LARGE, "I cannot tell"),
    }
    settings: dict[str, Any] = {
        "router": StaticRouter(TABLE),
        "policy": "best",
        "catalogue": Catalogue.load(),
    }
    with Viaticum("1", folder=tmp_path, models=models, **settings) as viaticum:
        answer = viaticum.solve(QUESTION, kind="number", allowance=Allowance(max_seconds=2))
        assert (answer.value, answer.text) == (None, "I cannot tell")
        assert "2 seconds (max_seconds) are over" in answer.reason
        assert answer.cost == viaticum.budget().posted_nanousd > 0
        assert viaticum.budget().held_nanousd == 0


async def test_asynchronous_runs_end_too(tmp_path: Path) -> None:
    with client(tmp_path, SLOW, SLOW, pause=0.02, budget="1", max_seconds=0.3) as viaticum:
        with pytest.raises(DeadlineExceeded):
            await viaticum.asolve(QUESTION)
        assert viaticum.budget().held_nanousd == 0


def test_a_graph_of_its_own_ends_in_time(tmp_path: Path) -> None:
    models: Any = {SMALL: ScriptedModel(SMALL, SLOW, 0.02), LARGE: ScriptedModel(LARGE, SLOW, 0.02)}
    with Ledger(tmp_path / "ledger.db") as ledger:
        graph = build_graph("1", ledger=ledger, models=models, router=StaticRouter(TABLE), max_seconds=0.3)
        with pytest.raises(DeadlineExceeded):
            graph.invoke({"question": QUESTION})
        with pytest.raises(DeadlineExceeded):
            graph.invoke({"question": QUESTION}, context=Allowance(max_seconds=0.1))
        assert all(budget.held_nanousd == 0 for budget in ledger.budgets())


@pytest.mark.parametrize("seconds", [0, -1, "5", True, float("nan")])
def test_a_deadline_is_above_zero(seconds: Any) -> None:
    with pytest.raises(InputError):
        Allowance(max_seconds=seconds)
    with pytest.raises(InputError):
        Viaticum("1", max_seconds=seconds)


# Providers, the server, the chat model, batch


@pytest.fixture
def provider() -> Iterator[OpenAIServer]:
    load_litellm()  # takes longer than a deadline of these tests
    with running_server() as server:
        yield server


@pytest.mark.parametrize("name", ["far", "auto"])
def test_a_silent_provider_is_hung_up_on(tmp_path: Path, provider: OpenAIServer, name: str) -> None:
    provider.script = ["silent"] * 3
    far = Row(Pair("far", "direct"), 0.9, 20, 30, 10_000, 20_000)
    settings: dict[str, Any] = {"catalogue": Catalogue([spec_for(provider)]), "tries": 1}
    with Viaticum("1", folder=tmp_path, router=StaticRouter(RoutingTable((far,))), **settings) as viaticum:
        chat = ChatViaticum(model=name, client=viaticum, max_seconds=2)
        with pytest.raises(DeadlineExceeded):
            chat.invoke(QUESTION)
        assert provider.hung_up.wait(60)
        assert len(provider.requests) == 1
        assert viaticum.budget().held_nanousd == 0
        assert viaticum.budget().posted_nanousd > 0, "the prompt was read"


def test_a_request_ends_in_time(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        for stream in (False, True):
            answer = server.ask("slow", max_seconds=1, stream=stream)
            error = answer.text if stream else answer.json()["error"]["message"]
            assert "1 seconds (max_seconds) are over" in error
            if not stream:
                assert answer.status_code == 504
                assert answer.headers["x-should-retry"] == "false"
        assert server.ask("fast", max_seconds=60).status_code == 200
        assert server.ask("fast", max_seconds=0.5).status_code == 400
        server.assert_settled()
    assert LONG_TEXT


def test_a_row_of_a_batch_fails_at_its_deadline_and_the_others_go_on(tmp_path: Path) -> None:
    class Some(ScriptedModel):
        def stream(self, messages: Any, generation: Any) -> Any:
            self.text, self.pause = "The answer is 5.", 0.0
            if "slow" in messages[-1]["content"]:
                self.text, self.pause = SLOW, 0.02
            return super().stream(messages, generation)

    lines = [{"id": name, "question": f"{name}: what is 2 + 3?"} for name in ("quick", "slow")]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    models: Any = {SMALL: Some(SMALL, ""), LARGE: Some(LARGE, "")}
    ended = run_batch(
        tmp_path / "in.jsonl",
        tmp_path / "out.jsonl",
        budget="1",
        ledger=tmp_path / "ledger.db",
        models=models,
        router=StaticRouter(TABLE),
        policy="best",
        concurrency=1,
        max_seconds=2,
    )
    rows = {row.id: row for row in read_rows(ended.folder)}
    assert rows["quick"].state == "answered"
    assert rows["slow"].state == "failed"
    assert "max_seconds" in rows["slow"].reason
    assert rows["slow"].cost_nanousd > 0


def test_tries_of_a_row_and_other_pairs_have_what_is_left_of_its_deadline(tmp_path: Path) -> None:
    calls = []

    class Away(ScriptedModel):
        def stream(self, messages: Any, generation: Any) -> Any:
            calls.append(self.name)
            time.sleep(1.2)
            raise ProviderUnavailable("away")
            yield

    (tmp_path / "in.jsonl").write_text(json.dumps({"id": "a", "question": QUESTION}) + "\n")
    ended = run_batch(
        tmp_path / "in.jsonl",
        tmp_path / "out.jsonl",
        budget="1",
        ledger=tmp_path / "ledger.db",
        models={SMALL: Away(SMALL, ""), LARGE: Away(LARGE, "")},
        router=StaticRouter(TABLE),
        policy="best",
        tries=5,
        max_seconds=2,
    )
    (row,) = read_rows(ended.folder)
    assert row.state == "failed"
    assert 1 <= len(calls) <= 2, "five tries of two models would take twelve seconds"
    with Ledger(tmp_path / "ledger.db") as ledger:
        assert all(budget.held_nanousd == 0 for budget in ledger.budgets())


def test_questions_of_one_run_share_its_deadline(tmp_path: Path) -> None:
    """Of the run around them, and of each question, the one that passes first holds."""
    over, later = Deadline(5.0, time.time() - 1.0), Deadline.after(60.0)
    with client(tmp_path, "The answer is 5.", "The answer is 5.") as viaticum:
        for allowance in (Allowance(deadline=over), Allowance(deadline=over, max_seconds=60.0)):
            with pytest.raises(DeadlineExceeded, match="5 seconds"):
                viaticum.solve(QUESTION, allowance=allowance)
            with pytest.raises(DeadlineExceeded, match="5 seconds"):
                viaticum.graph.invoke(
                    {"question": QUESTION}, {"configurable": {"thread_id": "t"}}, context=allowance
                )
        assert viaticum.solve(QUESTION, allowance=Allowance(deadline=later)).value == "5"
        with pytest.raises(DeadlineExceeded, match="1e-06 seconds"):
            viaticum.solve(QUESTION, allowance=Allowance(deadline=later, max_seconds=1e-6))
    with pytest.raises(InputError, match="deadline"):
        Allowance(deadline=60.0)  # type: ignore[arg-type]
