"""The workflow in other graphs: nested, fanned out, as a node, as a tool, over many questions."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, TypedDict

import pytest
from langchain_core.messages import AIMessage, HumanMessage
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import END, START, MessagesState, StateGraph
from langgraph.types import Command, Send

from viaticum import Allowance, FakeRouter, ScriptedModel, as_tool, build_graph
from viaticum.agents.workflow.graph import Graph
from viaticum.budgets import Ledger
from viaticum.errors import (
    BudgetExceeded,
    DecisionNeeded,
    InputError,
    ModelError,
    ModelUnavailable,
    ProviderTimeout,
)
from viaticum.models.base import Generation
from viaticum.money import as_usd
from viaticum.types import Message, TokenCount


@pytest.fixture
def ledger() -> Iterator[Ledger]:
    with Ledger("memory:") as ledger:
        yield ledger


def double(messages: Any, generation: Generation) -> str:
    """Doubles the last number of the question."""
    number = int(messages[-1]["content"].rstrip("?").split()[-1])
    return f"The answer is {2 * number}."


def doubling(ledger: Ledger, budget: str = "0.1", **settings: Any) -> tuple[Graph, ScriptedModel]:
    model = ScriptedModel(double)
    settings = {"router": FakeRouter("scripted+direct"), "budget_name": "b", **settings}
    return build_graph(budget, models={"scripted": model}, ledger=ledger, **settings), model


def config(thread: str = "t") -> Any:
    return {"configurable": {"thread_id": thread}}


def posts(ledger: Ledger) -> list[str | None]:
    assert ledger.check() == []
    return [entry.key for entry in ledger.entries() if entry.kind == "post"]


def test_question_in_answer_out(ledger: Ledger) -> None:
    graph, model = doubling(ledger)
    answer = graph.invoke({"question": "twice 21?", "kind": "number"})
    assert (answer["value"], answer["text"]) == ("42", "The answer is 42.")
    assert answer["pair"] == answer["routes"][0]["pair"] == "scripted+direct"
    assert answer["cost"] == ledger.budget("b").posted_nanousd > 0
    assert Decimal(answer["cost_usd"]) == as_usd(answer["cost"])
    assert set(answer) == {
        "value",
        "text",
        "thinking",
        "reason",
        "pair",
        "routes",
        "cost",
        "cost_usd",
        "held",
        "usage",
        "seconds",
        "finish_reason",
        "messages",
    }
    assert answer["usage"] == {"scripted": [len(model.calls[0][0][0]["content"].split()) + 2, 4, 0, 0, 0]}
    assert "question" in graph.get_input_jsonschema()["properties"]
    assert "call" not in graph.get_input_jsonschema()["properties"]


def test_a_thread_takes_question_after_question(ledger: Ledger) -> None:
    graph, model = doubling(ledger, checkpointer=InMemorySaver())
    first = graph.invoke({"question": "twice 1?", "kind": "number"}, config(), durability="sync")
    second = graph.invoke({"question": "twice 2?"}, config(), durability="sync")
    again = graph.invoke({"question": "twice 2?"}, config(), durability="sync")
    assert [each["value"] for each in (first, second, again)] == ["2", "4", "4"]
    assert first["cost"] == second["cost"] == again["cost"], "each question has accounts of its own"
    assert len(second["routes"]) == 1
    assert len(set(posts(ledger))) == len(model.calls) == 3, "the same question again is another question"
    assert graph.get_state(config()).values["asked"]["kind"] == "auto", "not the first question's kind"


def test_a_replay_from_any_checkpoint_of_a_run_charges_nothing(ledger: Ledger) -> None:
    graph, model = doubling(ledger, checkpointer=InMemorySaver())
    graph.invoke({"question": "twice 4?"}, config(), durability="sync")
    history = list(graph.get_state_history(config()))
    assert [each.next for each in history] == [(), ("parse",), ("call",), ("start",), ("__start__",)]
    for snapshot in history:
        if snapshot.next in (("parse",), ("call",)):
            graph.invoke(None, snapshot.config, durability="sync")
            assert graph.get_state(config()).values["value"] == "8"
    assert (len(posts(ledger)), len(model.calls)) == (1, 1)
    graph.invoke(None, history[-2].config, durability="sync")
    assert len(set(posts(ledger))) == 2, "from before its beginning it is another run"


class Sums(TypedDict, total=False):
    question: str
    value: str
    total: Annotated[int, operator.add]


def test_a_subgraph_called_several_times_in_one_run(ledger: Ledger) -> None:
    """As a node of its own in a loop: the state's `question` and `value` are those of the graph inside."""
    graph, model = doubling(ledger)

    def add(state: Sums) -> Sums:
        return {"total": int(state["value"]), "question": f"twice {state['value']}?"}

    parent = StateGraph(Sums)
    parent.add_node("solve", graph)
    parent.add_node("add", add)
    parent.add_edge(START, "solve")
    parent.add_edge("solve", "add")
    parent.add_conditional_edges("add", lambda state: "solve" if state["total"] < 50 else END)
    app = parent.compile(checkpointer=InMemorySaver())
    answer = app.invoke({"question": "twice 1?"}, config(), durability="sync")
    assert answer["total"] == 2 + 4 + 8 + 16 + 32
    assert len(posts(ledger)) == len(set(posts(ledger))) == len(model.calls) == 5


class Fan(TypedDict, total=False):
    questions: list[str]
    question: str
    found: Annotated[list[tuple[str, str]], operator.add]


def fan_out(graph: Graph, checkpointer: Any) -> Any:
    def solve(state: Fan) -> Fan:
        answer = graph.invoke({"question": state["question"], "kind": "number"})
        return {"found": [(state["question"], answer["value"])]}

    async def asolve(state: Fan) -> Fan:
        answer = await graph.ainvoke({"question": state["question"], "kind": "number"})
        return {"found": [(state["question"], answer["value"])]}

    from langchain_core.runnables import RunnableLambda

    parent = StateGraph(Fan)
    parent.add_node("solve", RunnableLambda(solve, asolve))
    parent.add_conditional_edges(
        START, lambda state: [Send("solve", {"question": each}) for each in state["questions"]], ["solve"]
    )
    return parent.compile(checkpointer=checkpointer)


QUESTIONS = [f"twice {number}?" for number in range(40)]
DOUBLED = [(question, str(2 * number)) for number, question in enumerate(QUESTIONS)]


def test_fan_out_in_one_thread_under_one_budget(ledger: Ledger) -> None:
    graph, model = doubling(ledger)
    found = fan_out(graph, InMemorySaver()).invoke({"questions": QUESTIONS}, config(), durability="sync")[
        "found"
    ]
    assert found == DOUBLED
    assert len(set(posts(ledger))) == len(model.calls) == 40


async def test_fan_out_from_an_event_loop(ledger: Ledger) -> None:
    graph, model = doubling(ledger, concurrency=4)
    app = fan_out(graph, InMemorySaver())
    answer = await app.ainvoke({"questions": QUESTIONS}, config(), durability="sync")
    assert answer["found"] == DOUBLED
    assert len(set(posts(ledger))) == len(model.calls) == 40


def test_inside_a_graph_whose_state_is_a_conversation(ledger: Ledger) -> None:
    graph, model = doubling(ledger, router=FakeRouter("scripted+chat"))
    parent = StateGraph(MessagesState)
    parent.add_node("answer", graph)
    parent.add_edge(START, "answer")
    parent.add_edge("answer", END)
    app = parent.compile(checkpointer=InMemorySaver())
    app.invoke({"messages": [("system", "Be brief."), ("user", "twice 3?")]}, config())  # type: ignore[arg-type]
    messages = app.invoke({"messages": [HumanMessage("twice 6?")]}, config())["messages"]
    assert [(each.type, each.content) for each in messages] == [
        ("system", "Be brief."),
        ("human", "twice 3?"),
        ("ai", "The answer is 6."),
        ("human", "twice 6?"),
        ("ai", "The answer is 12."),
    ]
    assert model.calls[1][0] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "twice 3?"},
        {"role": "assistant", "content": "The answer is 6."},
        {"role": "user", "content": "twice 6?"},
    ]


def test_a_conversation_before_the_examples_of_a_strategy(ledger: Ledger) -> None:
    graph, model = doubling(ledger, router=FakeRouter("scripted+cot"))
    before: list[Message] = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello."}]
    assert graph.invoke({"question": "twice 3?", "messages": before})["value"] == "6"
    asked = model.calls[0][0]
    assert [message["role"] for message in asked[:3]] == ["system", "user", "assistant"]
    assert asked[0]["content"].endswith("\n\nBe kind.")
    assert asked[1]["content"].startswith("Hello.\n\nA library shelf")


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"question": " "},
        {"question": 3},
        {"question": "x", "kind": "poem"},
        {"messages": [{"role": "assistant", "content": "x"}]},
        {"question": "x", "messages": ["no message", {"role": "wizard", "content": "x"}]},
    ],
)
def test_bad_input_is_named(ledger: Ledger, given: Any) -> None:
    graph, model = doubling(ledger)
    with pytest.raises(InputError):
        graph.invoke(given)
    assert not model.calls


@pytest.mark.parametrize(
    "settings", [{"on_short": "beg"}, {"timeout": 0}, {"tries": 0}, {"concurrency": 0}, {"policy": "bset"}]
)
def test_bad_settings_are_named(ledger: Ledger, settings: Any) -> None:
    with pytest.raises(InputError):
        doubling(ledger, **settings)


# What holds for one run


def test_a_run_pays_from_the_scope_it_is_given(ledger: Ledger) -> None:
    graph, _ = doubling(ledger)
    ledger.create("other", limit_nanousd=10**9)
    graph.invoke({"question": "twice 1?"}, context=Allowance(budget="other"))
    assert ledger.budget("b").posted_nanousd == 0 < ledger.budget("other").posted_nanousd


def test_a_run_has_a_policy_of_its_own(ledger: Ledger) -> None:
    models = {name: ScriptedModel("The answer is 1.", name=name) for name in ("good", "bad")}
    router = FakeRouter({"good+direct": 0.9, "bad+direct": 0.2})
    graph = build_graph(models=models, router=router, ledger=ledger)
    assert graph.invoke({"question": "x?"})["pair"] == "good+direct"
    assert graph.invoke({"question": "x?"}, context=Allowance(policy="cheapest:0.1"))["pair"] == "good+direct"
    with pytest.raises(InputError):
        graph.invoke({"question": "x?"}, context=Allowance(policy="nonsense"))


@dataclass
class Mine:
    """The context of someone else's graph."""

    user: str
    allowance: Allowance | None = None


def test_a_nested_graph_finds_its_allowance_in_the_context_of_the_outer_one(ledger: Ledger) -> None:
    graph, _ = doubling(ledger)
    ledger.create("other", limit_nanousd=10**9)
    parent = StateGraph(Sums, context_schema=Mine)
    parent.add_node("solve", graph)
    parent.add_edge(START, "solve")
    app = parent.compile()
    app.invoke({"question": "twice 1?"}, context=Mine("me"))
    assert ledger.budget("other").posted_nanousd == 0
    app.invoke({"question": "twice 1?"}, context=Mine("me", Allowance(budget="other")))
    assert ledger.budget("other").posted_nanousd > 0


# A tool


def test_as_a_tool(ledger: Ledger) -> None:
    graph, _ = doubling(ledger)
    tool = as_tool(graph, name="double")
    assert (tool.name, list(tool.args)) == ("double", ["question"])
    assert tool.invoke({"question": "twice 8?"}) == "16"


async def test_as_a_tool_called_from_an_event_loop_and_without_an_answer(ledger: Ledger) -> None:
    models = {"scripted": ScriptedModel(" ")}
    graph = build_graph(models=models, router=FakeRouter("scripted+chat"), ledger=ledger)
    assert await as_tool(graph).ainvoke({"question": "x?"}) == "no answer: the model wrote nothing"


# Streams


def test_custom_stream(ledger: Ledger) -> None:
    graph, _ = doubling(ledger)
    chunks = list(graph.stream({"question": "twice 2?"}, stream_mode="custom"))
    assert [next(iter(chunk)) for chunk in chunks] == ["table", "route", *["text"] * 4, "cost"]
    assert "".join(chunk["text"] for chunk in chunks[2:-1]) == "The answer is 4."
    budget = ledger.budget("b")
    assert chunks[-1]["cost"] == budget.posted_nanousd
    assert chunks[-1]["left"] == budget.left_nanousd


def test_messages_stream_shows_the_text_as_a_chat_model_would(ledger: Ledger) -> None:
    graph, _ = doubling(ledger)
    parts = list(graph.stream({"question": "twice 2?"}, stream_mode="messages"))
    assert "".join(message.content for message, _ in parts) == "The answer is 4."
    assert len({message.id for message, _ in parts}) == 1
    assert {metadata["langgraph_node"] for _, metadata in parts} == {"call"}


async def test_messages_stream_of_a_nested_graph_from_an_event_loop(ledger: Ledger) -> None:
    graph, _ = doubling(ledger)
    parent = StateGraph(Sums)
    parent.add_node("solve", graph)
    parent.add_edge(START, "solve")
    stream = parent.compile().astream({"question": "twice 2?"}, stream_mode="messages", subgraphs=True)
    assert "".join([message.content async for _, (message, _) in stream]) == "The answer is 4."


def test_callbacks_are_told_of_the_model_and_its_usage(ledger: Ledger) -> None:
    from langchain_core.callbacks import UsageMetadataCallbackHandler

    class UsageRecorder(UsageMetadataCallbackHandler):
        usage: Any = None

        def on_llm_end(self, response: Any, **kwargs: Any) -> None:
            message = response.generations[0][0].message
            assert isinstance(message, AIMessage)
            self.usage = message.usage_metadata

    recorder, (graph, _) = UsageRecorder(), doubling(ledger)
    answer = graph.invoke({"question": "twice 2?"}, {"callbacks": [recorder]})
    assert recorder.usage["output_tokens"] == TokenCount(*answer["usage"]["scripted"]).output_tokens == 4


# A model that is unavailable


def flaky(ledger: Ledger, *script: str | BaseException, **settings: Any) -> tuple[Graph, ScriptedModel]:
    from dataclasses import replace

    from viaticum.agents.build import open_workflow
    from viaticum.agents.workflow.graph import Workflow
    from viaticum.agents.workflow.settings import WorkflowSettings

    model = ScriptedModel(list(script))
    checked = WorkflowSettings(
        budget="0.1",
        budget_name="b",
        router=FakeRouter("scripted+direct"),
        models={"scripted": model},
        concurrency=2,
        **settings,
    )
    resources = open_workflow(checked, ledger)
    return Workflow(replace(resources, backoff=0.001)).build(InMemorySaver()), model


def test_an_unavailable_model_is_tried_again_under_keys_of_their_own(ledger: Ledger) -> None:
    busy = ModelUnavailable("busy")
    graph, model = flaky(ledger, busy, busy, "The answer is 5.")
    modes: Any = ["custom", "values"]
    chunks = list(graph.stream({"question": "x?"}, config(), stream_mode=modes, durability="sync"))
    assert [chunk["again"] for mode, chunk in chunks if mode == "custom" and "again" in chunk] == [2, 3]
    answer = chunks[-1][1]
    assert (answer["value"], len(model.calls)) == ("5", 3)
    states = {hold.key.partition("/")[2]: hold.state for hold in ledger.holds()}
    assert states == {"0": "void", "0.2": "void", "0.3": "posted"}
    assert answer["held"] == ledger.holds(state="posted")[0].held_nanousd


def test_tries_end_and_the_thread_goes_on_later(ledger: Ledger) -> None:
    graph, model = flaky(ledger, *[ModelUnavailable("busy")] * 3, "The answer is 5.")
    with pytest.raises(ModelUnavailable):
        graph.invoke({"question": "x?"}, config(), durability="sync")
    assert len(model.calls) == 3
    assert graph.invoke(None, config(), durability="sync")["value"] == "5"
    assert posts(ledger) == [ledger.holds(state="posted")[0].key]


def test_other_failures_are_not_tried_again(ledger: Ledger) -> None:
    graph, model = flaky(ledger, ModelError("logits are not finite"), "The answer is 5.")
    with pytest.raises(ModelError):
        graph.invoke({"question": "x?"}, config(), durability="sync")
    assert len(model.calls) == 1


def test_a_call_that_takes_too_long_is_charged_and_not_tried_again(ledger: Ledger) -> None:
    graph, model = flaky(ledger, "one two three four", timeout=0.05, tries=2)
    model.pause = 0.03
    with pytest.raises(ProviderTimeout, match=r"within 0\.05 seconds"):
        graph.invoke({"question": "x?"}, config(), durability="sync")
    assert len(model.calls) == len(posts(ledger)) == 1
    answer = graph.invoke(None, config(), durability="sync", context=Allowance(timeout=60))
    assert answer["cost"] == ledger.budget("b").posted_nanousd, "what was wasted is counted"
    assert len(posts(ledger)) == 2


# Money runs short


PAIRS = {"expensive+direct": 0.9, "cheap+direct": 0.4}


class TwoPrices(FakeRouter):
    """The good pair may cost more than the budget; the other one less."""

    def __init__(self) -> None:
        super().__init__(PAIRS)
        from dataclasses import replace

        from viaticum.types import RoutingTable

        rows = {str(row.pair): row for row in self._table}
        short = {"tokens_p50": 16, "tokens_p90": 32}  # what `direct` lets a model write
        expensive = replace(rows["expensive+direct"], cost_p50=200_000, cost_p90=400_000, **short)
        self._table = RoutingTable((expensive, replace(rows["cheap+direct"], **short)))


def short(ledger: Ledger, on_short: Any, checkpointer: Any = None, budget: str = "0.0003") -> Graph:
    models = {name: ScriptedModel(f"The answer is {name}.", name=name) for name in ("expensive", "cheap")}
    return build_graph(
        budget,
        budget_name="b",
        models=models,
        router=TwoPrices(),
        ledger=ledger,
        on_short=on_short,
        checkpointer=checkpointer,
    )


def test_short_cheaper_takes_what_fits(ledger: Ledger) -> None:
    assert short(ledger, "cheaper").invoke({"question": "x?", "kind": "text"})["pair"] == "cheap+direct"


def test_short_stop_raises(ledger: Ledger) -> None:
    with pytest.raises(BudgetExceeded) as caught:
        short(ledger, "stop").invoke({"question": "x?", "kind": "text"})
    assert not isinstance(caught.value, DecisionNeeded)
    assert posts(ledger) == []


def test_short_ask_without_a_checkpointer_raises(ledger: Ledger) -> None:
    with pytest.raises(DecisionNeeded) as caught:
        short(ledger, "ask").invoke({"question": "x?", "kind": "text"})
    assert caught.value.options == ("raise", "cheaper", "stop")


def asked(graph: Graph) -> dict[str, Any]:
    (interrupt,) = graph.invoke({"question": "x?", "kind": "text"}, config(), durability="sync")[
        "__interrupt__"
    ]
    value: dict[str, Any] = interrupt.value
    return value


def test_short_ask_tells_the_forecast_and_the_options(ledger: Ledger) -> None:
    request = asked(short(ledger, "ask", InMemorySaver()))
    assert request["wanted"] == {
        "way": "expensive+direct",
        "accuracy": 0.9,
        "cost_p50": 200_000,
        "cost_p90": 400_000,
    }
    assert (request["needed"], request["left"], request["limit"], request["unit"]) == (
        400_000,
        300_000,
        300_000,
        "nanousd",
    )
    cost = {"accuracy": 0.4, "cost_p50": 120_000, "cost_p90": 240_000}
    assert request["options"] == [
        {"do": "raise", "by_nanousd": 100_000},
        {"do": "cheaper", "way": "cheap+direct", **cost},
        {"do": "stop"},
    ]
    assert posts(ledger) == []


@pytest.mark.parametrize(
    ("decision", "pair", "limit"),
    [
        ("raise", "expensive+direct", 400_000),
        ({"do": "raise", "by": "0.001"}, "expensive+direct", 1_300_000),
        ({"do": "raise", "by_nanousd": 500_000}, "expensive+direct", 800_000),
        ("cheaper", "cheap+direct", 300_000),
    ],
)
def test_short_ask_goes_on_as_decided(ledger: Ledger, decision: Any, pair: str, limit: int) -> None:
    graph = short(ledger, "ask", InMemorySaver())
    asked(graph)
    answer = graph.invoke(Command(resume=decision), config(), durability="sync")
    assert (answer["pair"], answer["value"]) == (pair, pair.partition("+")[0])
    assert ledger.budget("b").limit_nanousd == limit
    assert len(posts(ledger)) == 1


def test_short_ask_stopped_is_an_answer_with_a_reason(ledger: Ledger) -> None:
    graph = short(ledger, "ask", InMemorySaver())
    asked(graph)
    answer = graph.invoke(Command(resume="stop"), config(), durability="sync")
    assert answer["value"] is None
    assert answer["reason"].startswith("stopped: expensive+direct may cost $0.0004")
    assert not graph.get_state(config()).tasks


def test_short_ask_asks_again_where_a_decision_makes_no_sense(ledger: Ledger) -> None:
    graph = short(ledger, "ask", InMemorySaver())
    asked(graph)
    for nonsense in ("perhaps", {"do": "raise", "by": "-1"}, {"do": "raise", "by_tokens": 5}, 7):
        (again,) = graph.invoke(Command(resume=nonsense), config(), durability="sync")["__interrupt__"]
        assert again.value["problem"]
    assert graph.invoke(Command(resume="cheaper"), config(), durability="sync")["pair"] == "cheap+direct"


def test_short_ask_where_only_the_worst_case_does_not_fit(ledger: Ledger) -> None:
    """The forecast fits, the worst case does not: the limit rises by what the hold needs, the pair stays."""
    model = ScriptedModel("The answer is 5.")
    router = FakeRouter("scripted+cot", cost=10)
    graph = build_graph(
        "0.0001",
        budget_name="b",
        models={"scripted": model},
        router=router,
        ledger=ledger,
        on_short="ask",
        checkpointer=InMemorySaver(),
    )
    request = asked(graph)
    assert request["needed"] > request["left"] == 100_000
    assert [option["do"] for option in request["options"]] == ["raise", "stop"]
    (again,) = graph.invoke(Command(resume="cheaper"), config(), durability="sync")["__interrupt__"]
    assert again.value["problem"].startswith("nothing cheaper fits")
    answer = graph.invoke(Command(resume="raise"), config(), durability="sync")
    assert (answer["value"], len(model.calls), len(posts(ledger))) == ("5", 1, 1)
    assert ledger.budget("b").limit_nanousd == request["needed"]


def test_a_limit_of_tokens_that_is_short_is_asked_for_in_tokens(ledger: Ledger) -> None:
    graph, _ = doubling(ledger, on_short="ask", checkpointer=InMemorySaver())
    ledger.create("few", limit_tokens=10)
    context = Allowance(budget="few")
    start = {"question": "twice 5?", "kind": "number"}
    (interrupt,) = graph.invoke(start, config(), context=context, durability="sync")["__interrupt__"]
    assert interrupt.value["unit"] == "tokens"
    answer = graph.invoke(Command(resume="raise"), config(), context=context, durability="sync")
    assert answer["value"] == "10"
    assert ledger.budget("few").limit_tokens == interrupt.value["needed"]


def test_a_raise_that_is_carried_out_twice_raises_once(ledger: Ledger) -> None:
    """As after a kill between the ledger's write and the checkpoint: the node runs a second time."""
    graph = short(ledger, "ask", InMemorySaver())
    asked(graph)
    graph.invoke(Command(resume="raise"), config(), durability="sync")
    before = next(each for each in graph.get_state_history(config()) if each.next == ("approval",))
    graph.invoke(Command(resume="raise"), before.config, durability="sync")
    assert ledger.budget("b").limit_nanousd == 400_000


def test_the_ledger_that_the_graph_opened_ends_with_the_graph(tmp_path: Path) -> None:
    import gc

    graph = build_graph(
        folder=tmp_path, models={"scripted": ScriptedModel()}, router=FakeRouter("scripted+direct")
    )
    copy = graph.with_config({"tags": ["mine"]})
    del graph
    gc.collect()
    assert copy.invoke({"question": "x?"})["value"] == "42"
