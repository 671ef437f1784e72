"""A plan with a check: ask, let another model say whether the answer is right, escalate where it is not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from synthetic_outcomes import Words, a_question, outcomes
from workflow_client import ScriptedModel, row, scripted_catalogue

from viaticum import Viaticum
from viaticum.agents.batch.planned_rows import RouteEstimates
from viaticum.agents.workflow.events import CallSettled, RouteChosen, TextPiece
from viaticum.agents.workflow.graph import Workflow
from viaticum.agents.workflow.serialization import plan_from_hold, plan_to_tags
from viaticum.agents.workflow.state import RowAllowance
from viaticum.budgets.records import Hold
from viaticum.catalogue import Catalogue
from viaticum.commands.router_inputs import read_matrix
from viaticum.errors import InputError, ProviderUnavailable, RateLimited
from viaticum.models.base import Generation
from viaticum.outcomes import read_outcomes, write_outcomes
from viaticum.routers.query import Plan, PlanRow, QueryRouter
from viaticum.routers.query.fit import fit
from viaticum.routers.query.rtr import RTRRouter
from viaticum.strategies import get as get_strategy
from viaticum.strategies.verify import AnsweredQuery
from viaticum.types import Completion, Message, Pair, Query, RoutingTable, TokenCount, Usage

NAMES = ("small", "judge", "big")
SMALL, CHECK, BIG = Pair("small", "cot"), Pair("judge", "verify"), Pair("big", "cot")
RIGHT, WRONG = "2 + 3 is 5.\nRIGHT", "2 + 3 is not 4.\nWRONG"
COST = 12_000  # of each call: 120 tokens at 0.1 dollars a million


class Checking(QueryRouter):
    """One plan with a check for every question, and its pairs alone as worse ways."""

    def table(self, query: Query) -> RoutingTable:
        return RoutingTable((row("small", 0.4, 10_000), row("big", 0.5, 10_000)))

    def plans_for(self, query: Query) -> list[PlanRow]:
        plan = PlanRow(Plan((SMALL, CHECK, BIG), 1), 0.9, 3 * COST, 3 * COST)
        return [plan, *super().plans_for(query)]


class KeepingModel(ScriptedModel):
    """Keeps what it is asked, and how."""

    def __init__(self, name: str, text: str) -> None:
        super().__init__(name, text)
        self.asked: list[tuple[list[Message], Generation]] = []

    def stream(self, messages: Sequence[Message], generation: Generation) -> Iterator[str | Completion]:
        self.asked.append((list(messages), generation))
        yield from super().stream(messages, generation)


class LimitedModel(ScriptedModel):
    """Is over its provider's limit."""

    def stream(self, messages: Sequence[Message], generation: Generation) -> Iterator[str | Completion]:
        self.calls += 1
        raise RateLimited("too many requests")
        yield ""


class BreakingModel(ScriptedModel):
    """Its connection breaks after some text."""

    def stream(self, messages: Sequence[Message], generation: Generation) -> Iterator[str | Completion]:
        self.calls += 1
        yield "Let me see: "
        raise ProviderUnavailable("the connection broke")


def ask(
    folder: Path, texts: Sequence[str | ScriptedModel], budget: str = "0.01", **settings: Any
) -> tuple[Viaticum, dict[str, ScriptedModel]]:
    models = {
        name: each if isinstance(each, ScriptedModel) else KeepingModel(name, each)
        for name, each in zip(NAMES, texts, strict=True)
    }
    client = Viaticum(
        budget,
        folder=folder,
        router=Checking(),
        models=dict(models),
        catalogue=scripted_catalogue(NAMES),
        **settings,
    )
    return client, models


@pytest.mark.parametrize(
    ("small", "judge", "big", "value", "calls"),
    [
        ("The answer is 5.", RIGHT, "The answer is 7.", 5, (1, 1, 0)),
        ("The answer is 4.", WRONG, "The answer is 5.", 5, (1, 1, 1)),
        ("The answer is 4.", "hard to say", "The answer is 5.", 5, (1, 1, 1)),  # no verdict is no yes
        ("who knows", RIGHT, "The answer is 5.", 5, (1, 0, 1)),  # there is nothing to check
        ("The answer is 4.", WRONG, "who knows", 4, (1, 1, 1)),  # the only answer there is
        ("who knows", RIGHT, "who knows", None, (1, 0, 1)),
    ],
)
def test_only_a_yes_ends_the_plan(
    tmp_path: Path, small: str, judge: str, big: str, value: int | None, calls: tuple[int, ...]
) -> None:
    client, models = ask(tmp_path, (small, judge, big))
    with client:
        answer = client.solve("What is 2 + 3?", kind="number")
        budget = client.budget()
    assert (None if answer.value is None else float(answer.value)) == value
    assert tuple(model.calls for model in models.values()) == calls
    assert [route.pair for route in answer.routes] == [SMALL, BIG][: 2 if calls[2] else 1]
    assert answer.cost == budget.posted_nanousd == sum(calls) * COST
    assert budget.held_nanousd == 0
    assert set(answer.usage.models) == {name for name, count in zip(NAMES, calls, strict=True) if count}
    assert answer.usage.seconds == pytest.approx(0.1 * sum(calls))
    assert answer.text == (big if calls[2] else small)


def test_the_reasons_tell_the_check(tmp_path: Path) -> None:
    client, _ = ask(tmp_path, ("The answer is 4.", WRONG, "The answer is 5."))
    with client:
        why = [route.why for route in client.solve("What is 2 + 3?", kind="number").routes]
    assert why[0].endswith("small+cot if judge+verify says yes, else big+cot")
    assert why[1] == "judge+verify does not say that the answer is right"


def test_the_verifier_sees_question_and_answer_and_not_the_settings_of_the_question(tmp_path: Path) -> None:
    client, models = ask(tmp_path, ("I think 2 + 3 makes 5. The answer is 5.", RIGHT, "The answer is 7."))
    history: list[Message] = [
        {"role": "user", "content": "Let us count."},
        {"role": "assistant", "content": "Yes."},
    ]
    with client:
        settings: Any = {"max_tokens": 17, "temperature": 0.9, "system": "Be brief."}
        client.solve("What is 2 + 3?", kind="number", messages=history, **settings)
    judge = models["judge"]
    assert isinstance(judge, KeepingModel)
    ((messages, generation),) = judge.asked
    assert messages[:-1] == history
    assert '"What is 2 + 3?"' in messages[-1]["content"]
    assert 'Answer: "5"' in messages[-1]["content"]
    assert "I think" not in messages[-1]["content"]
    assert (generation.max_new_tokens, generation.temperature) == (512, 0.0)


def test_a_stream_shows_the_answer_and_not_the_verdict(tmp_path: Path) -> None:
    client, _ = ask(tmp_path, ("The answer is 5.", RIGHT, "The answer is 7."))
    with client:
        events = list(client.stream("What is 2 + 3?", kind="number"))
        graph_text = [
            message.content
            for message, _ in client.graph.stream(
                {"question": "What is 2 + 3?", "kind": "number"},
                {"configurable": {"thread_id": "t"}},
                stream_mode="messages",
            )
        ]
    assert "".join(each.text for each in events if isinstance(each, TextPiece)).strip() == "The answer is 5."
    assert [each.route.pair for each in events if isinstance(each, RouteChosen)] == [SMALL]
    assert [each.cost for each in events if isinstance(each, CallSettled)] == [COST, COST]
    assert "RIGHT" not in "".join(map(str, graph_text))
    assert "The answer is 5." in "".join(map(str, graph_text))


@pytest.mark.parametrize("big", ["The answer is 5.", "who knows"])
def test_a_verifier_that_fails_says_no(tmp_path: Path, big: str) -> None:
    client, models = ask(tmp_path, ("The answer is 4.", LimitedModel("judge", ""), big))
    with client:
        answer = client.solve("What is 2 + 3?", kind="number")
        assert client.budget().held_nanousd == 0
    assert answer.value is not None
    assert float(answer.value) == (5 if big != "who knows" else 4)
    assert models["big"].calls == 1
    assert answer.cost == 2 * COST


def test_what_was_answered_stands_where_the_last_model_fails(tmp_path: Path) -> None:
    client, models = ask(tmp_path, ("The answer is 4.", WRONG, LimitedModel("big", "")))
    with client:
        answer = client.solve("What is 2 + 3?", kind="number")
        assert client.budget().held_nanousd == 0
    assert answer.value is not None
    assert float(answer.value) == 4
    assert models["big"].calls == 1
    assert (answer.cost, answer.text) == (2 * COST, "The answer is 4.")


class AbroadModel(ScriptedModel):
    """Runs elsewhere."""

    runs_here = False


def test_a_verifier_that_may_not_have_the_question_is_not_asked(tmp_path: Path) -> None:
    """A plan with a verifier that runs elsewhere is none where data has to stay."""
    for only, calls in ((None, 1), ("local", 0)):
        judge = AbroadModel("judge", RIGHT)
        client, _ = ask(tmp_path / str(only), ("The answer is 4.", judge, "The answer is 5."), only=only)
        with client:
            assert len(client.solve("What is 2 + 3?", kind="number").routes) == 1
        assert judge.calls == calls


def test_what_was_answered_stands_where_the_check_cannot_be_paid_for(tmp_path: Path) -> None:
    """One call fits at a time, and after the first one no other."""
    client, models = ask(tmp_path, ("The answer is 4.", WRONG, "The answer is 5."), "0.00005")
    with client:
        answer = client.solve("What is 2 + 3?", kind="number")
        budget = client.budget()
    assert models["small"].calls == 1
    assert budget.limit_nanousd is not None
    assert answer.cost == budget.posted_nanousd <= budget.limit_nanousd
    assert answer.value is not None
    assert budget.held_nanousd == 0


def test_feedback_is_about_the_pair_that_answered(tmp_path: Path) -> None:
    client, _ = ask(tmp_path, ("The answer is 5.", RIGHT, "The answer is 7."))
    with client:
        answer = client.solve("What is 2 + 3?", kind="number")
        path = client.feedback("What is 2 + 3?", answer, True)
    assert [row.pair for row in read_outcomes(path)] == [SMALL]


def test_a_plan_whose_verifier_is_not_here_is_left_out(tmp_path: Path) -> None:
    models: Any = {name: ScriptedModel(name, "The answer is 5.") for name in ("small", "big")}
    listed = Catalogue(spec for spec in scripted_catalogue(NAMES).values() if spec.name != "judge")
    with Viaticum("0.01", folder=tmp_path, router=Checking(), models=models, catalogue=listed) as client:
        assert len(client.solve("What is 2 + 3?", kind="number").routes) == 1


@pytest.mark.parametrize("alias", ["another name", "a member of a pair"])
def test_a_model_does_not_check_its_own_answer_under_another_name(tmp_path: Path, alias: str) -> None:
    """Two entries of one provider's model, or the verifier decodes with another one the answers it checks."""
    specs = {spec.name: spec for spec in scripted_catalogue(NAMES).values()}
    remote = {"kind": "remote", "text": None, "litellm_model": "openai/gpt-4o"}
    if alias == "another name":
        specs |= {name: specs[name].model_copy(update=remote) for name in ("small", "judge")}
    else:
        changed = {"kind": "pair", "text": None, "small": "judge", "large": "big"}
        specs["small"] = specs["small"].model_copy(update=changed)
        specs |= {
            name: specs[name].model_copy(update={"kind": "local", "text": None}) for name in ("judge", "big")
        }
    listed = Catalogue(specs.values())
    assert listed.is_same_model("small", "judge")
    assert not listed.is_same_model("judge", "big")
    models: Any = {name: ScriptedModel(name, "The answer is 5.") for name in NAMES}
    settings: dict[str, Any] = {"router": Checking(), "models": models, "catalogue": listed}
    with Viaticum("0.01", folder=tmp_path, **settings) as client:
        assert len(client.solve("What is 2 + 3?", kind="number").routes) == 1
        resources = client._resources
        plan = Plan((SMALL, CHECK, BIG), 1)
        assert resources.is_self_check(plan)
        assert plan not in [
            row.plan for row in RouteEstimates(Checking(), resources.can_follow).of(Query("2?"))[0]
        ]
        decided = RowAllowance(budget=resources.budget, on_short="cheaper", run="job/q1", plan=plan)
        question: Any = {"question": "What is 2 + 3?", "kind": "number"}
        Workflow(resources).build().invoke(question, context=decided)
    assert models["judge"].calls == 0


def test_a_stored_plan_whose_model_checks_its_own_answer_is_read_and_not_followed(tmp_path: Path) -> None:
    """The call of an earlier version is continued without the check."""
    client, models = ask(tmp_path, ("The answer is 5.",) * 3)
    with client:
        resources, tags = client._resources, plan_to_tags(["small+cot", "small+verify", "big+cot"], 1)
        plan = plan_from_hold(Hold("old", "main", "posted", 0, 0, {}, {}, "", tags=tags))
        assert plan is not None
        assert plan.pairs == (SMALL, Pair("small", "verify"), BIG)
        assert not resources.can_follow(plan)
        decided = RowAllowance(budget=resources.budget, on_short="cheaper", run="job/q1", plan=plan)
        question: Any = {"question": "What is 2 + 3?", "kind": "number"}
        Workflow(resources).build().invoke(question, context=decided)
    assert (models["small"].calls, models["judge"].calls) == (1, 0)


def test_verify_answers_no_question(tmp_path: Path) -> None:
    client, models = ask(tmp_path, ("", RIGHT, ""), model="judge", strategy="verify")
    with client, pytest.raises(InputError, match="answers no question"):
        client.solve("What is 2 + 3?")
    assert models["judge"].calls == 0
    strategy = get_strategy("verify")
    assert not strategy.graded
    with pytest.raises(InputError, match="answers no question"):
        strategy.messages(Query("What is 2 + 3?"))


def test_a_verdict_that_did_not_come_to_its_end_is_none() -> None:
    """Cut at the token limit, a text can end in the word by chance."""
    query, strategy = AnsweredQuery.of(Query("What is 2 + 3?"), "5"), get_strategy("verify")
    ended = {
        end: strategy.read(Completion(RIGHT, Usage(), end), query) for end in ("stop", "length", "refused")
    }
    assert ended["stop"].value == "yes"
    assert ended["length"].value is None
    assert ended["length"].reason == "no verdict in the text (finish reason length)"
    assert ended["refused"].value is None


@pytest.mark.usefixtures("one_thread")
def test_a_router_that_learned_from_verdicts_asks_the_verifier(tmp_path: Path) -> None:
    """From the table to the answer: kin is what mid often gets wrong, and judge tells."""
    rows = outcomes(300)
    rng, said = np.random.default_rng(5), []
    for each in rows:
        yes = bool(rng.random() < (0.95 if each.correct else 0.05))
        said.append(
            replace(
                each,
                model="judge",
                strategy=f"verify:{each.pair}",
                answer="yes" if yes else "no",
                correct=yes == each.correct,
                cost_nanousd=100_000,
            )
        )
    write_outcomes(tmp_path / "known.jsonl", [*rows, *said])
    matrix = read_matrix([tmp_path / "known.jsonl"], None)
    fit(matrix, Words()).save(tmp_path / "router")  # type: ignore[arg-type]
    router = RTRRouter.load(tmp_path / "router", Words())  # type: ignore[arg-type]
    texts = {"tiny": "The answer is 3.", "mid": "The answer is 4.", "judge": WRONG, "big": "The answer is 5."}
    models: Any = {name: ScriptedModel(name, text) for name, text in texts.items()}
    settings: dict[str, Any] = {"router": router, "models": models, "catalogue": scripted_catalogue(texts)}
    with Viaticum("1", folder=tmp_path, policy="weighted:100", **settings) as client:
        answer = client.solve(a_question("kin", np.random.default_rng(1)), kind="number")
    assert answer.value is not None
    assert float(answer.value) == 5
    assert [route.pair for route in answer.routes] == [Pair("mid", "cot"), Pair("big", "cot")]
    assert {name: model.calls for name, model in models.items()} == {
        "tiny": 0,
        "mid": 1,
        "judge": 1,
        "big": 1,
    }
    assert answer.cost == 3 * COST


class ExpensiveModel(ScriptedModel):
    """May read a million tokens."""

    def worst_case(self, messages: Sequence[Message], max_new_tokens: int) -> dict[str, TokenCount]:
        return {self.name: TokenCount(1_000_000, max_new_tokens)}


def test_a_row_that_goes_on_pays_nothing_twice_where_its_check_could_not_be_paid_for(tmp_path: Path) -> None:
    """The call after the check has its number; who goes on skips the check again, whatever fits by then."""
    texts = ("The answer is 4.", ExpensiveModel("judge", WRONG), "The answer is 5.")
    client, models = ask(tmp_path, texts, "0.01")
    with client:
        resources = client._resources
        graph = Workflow(resources).build()
        plan = Plan((SMALL, CHECK, BIG), 1)
        allowance = RowAllowance(budget=resources.budget, on_short="cheaper", run="job/q1", plan=plan)
        question: Any = {"question": "What is 2 + 3?", "kind": "number"}
        first = graph.invoke(question, context=allowance)
        paid = client.budget().posted_nanousd
        again = graph.invoke(question, context=allowance)
        resources.ledger.set_limit(resources.budget, limit_nanousd=10**12)
        richer = graph.invoke(question, context=allowance)
        assert client.budget().posted_nanousd == paid == 2 * COST
    assert [each.calls for each in models.values()] == [1, 0, 1]
    for values in (first, again, richer):
        assert float(values["value"]) == 5
        assert values["cost"] == paid
        assert [route["pair"] for route in values["routes"]] == [str(SMALL), str(BIG)]


def test_a_verdict_that_breaks_off_is_no_yes_where_shown_text_cannot_be_taken_back(tmp_path: Path) -> None:
    """None of the verdict's text was shown."""
    texts = ("The answer is 4.", BreakingModel("judge", ""), "The answer is 5.")
    client, models = ask(tmp_path, texts, tries=1)
    with client:
        answer = client.derive(can_restart=False).solve("What is 2 + 3?", kind="number")
    assert float(answer.value or 0) == 5
    assert [models[name].calls for name in NAMES] == [1, 1, 1]
