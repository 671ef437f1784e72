"""A model that cannot answer is followed by the next pair: a hold and a charge for each call."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from openai_server import OpenAIServer, running_server
from viaticum_server import serving
from workflow_client import LARGE, SMALL, TABLE, ScriptedModel, row

from viaticum import Pair, Viaticum
from viaticum.agents.cancellation import CancellationToken
from viaticum.agents.completions import CompletionFinished, CompletionRequest, complete
from viaticum.agents.integrations.chat_model import ChatViaticum
from viaticum.agents.workflow.events import RouteChosen, TextPiece
from viaticum.budgets import Ledger
from viaticum.catalogue import Catalogue, ModelSpec
from viaticum.errors import (
    BudgetExceeded,
    ContentRefused,
    ModelError,
    ModelUnavailable,
    PromptTooLong,
    ProviderTimeout,
    ProviderUnavailable,
    RateLimited,
)
from viaticum.models.base import Generation
from viaticum.routers.query import Plan, PlanRow, StaticRouter
from viaticum.types import Completion, Message, Query, RoutingTable, TokenCount

ERRORS = [
    RateLimited("the provider takes no more calls for now", 60.0),
    ProviderUnavailable("the provider cannot be reached"),
    ContentRefused("the provider refuses to answer this"),
    PromptTooLong("the provider finds the prompt too long"),
    ModelUnavailable("busy just now"),
]


class Failing(ScriptedModel):
    """Raises an error after some words of its text."""

    def __init__(self, name: str, error: Exception, after: int = 0, text: str = "The answer is 6.") -> None:
        super().__init__(name, text)
        self.error, self.after = error, after

    def stream(self, messages: Sequence[Message], generation: Generation) -> Iterator[str | Completion]:
        for number, piece in enumerate(super().stream(messages, generation)):
            if number == self.after:
                raise self.error
            yield piece


def client(folder: Path, large: Any, small: Any = None, table: Any = TABLE, **settings: Any) -> Viaticum:
    models = {SMALL: small or ScriptedModel(SMALL, "The answer is 5."), LARGE: large}
    settings = {"policy": "best", "router": StaticRouter(table), **settings}
    return Viaticum(folder=folder, models=models, catalogue=Catalogue.load(), **settings)


def posts(viaticum: Viaticum) -> dict[str, int]:
    entries = viaticum.ledger.entries(viaticum.budget_name)
    assert viaticum.ledger.check() == []
    assert viaticum.budget().held_nanousd == 0
    return {entry.key: entry.nanousd for entry in entries if entry.kind == "post"}


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_the_next_pair_answers_where_a_model_cannot(tmp_path: Path, error: Exception) -> None:
    with client(tmp_path, Failing(LARGE, error), tries=1) as viaticum:
        answer = viaticum.solve("What is 2 + 3?", kind="number")
        assert (answer.value, str(answer.routes[0].pair)) == ("5", f"{SMALL}+cot")
        assert f"{LARGE}+cot failed: {error}" in answer.routes[0].why
        charged = posts(viaticum)
        assert list(charged.values()) == [answer.cost]
        assert next(iter(charged)).endswith("/1"), "a hold of its own"


def test_a_model_that_is_busy_is_tried_again_first(tmp_path: Path) -> None:
    large = Failing(LARGE, ModelUnavailable("busy"))
    with client(tmp_path, large, tries=2) as viaticum:
        assert viaticum.solve("What is 2 + 3?", kind="number").value == "5"
        assert large.calls == 2


def test_a_prompt_too_long_to_hold_goes_to_a_pair_that_takes_it(tmp_path: Path) -> None:
    class Short(ScriptedModel):
        def worst_case(self, messages: Sequence[Message], max_new_tokens: int) -> dict[str, TokenCount]:
            raise PromptTooLong("a prompt of 9000 tokens does not fit")

    with client(tmp_path, Short(LARGE, "never")) as viaticum:
        assert viaticum.solve("What is 2 + 3?", kind="number").value == "5"
        assert len(posts(viaticum)) == 1


def test_with_nobody_else_the_error_is_the_caller_s(tmp_path: Path) -> None:
    for error in ERRORS:
        models: dict[str, Any] = {"large": Failing(LARGE, error), "small": Failing(SMALL, error)}
        with client(tmp_path, **models, tries=1) as viaticum, pytest.raises(type(error)):
            viaticum.solve("What is 2 + 3?", kind="number")
        with client(tmp_path, models["large"], tries=1, model=LARGE) as viaticum:
            with pytest.raises(type(error)):
                viaticum.solve("What is 2 + 3?", kind="number")
            assert posts(viaticum) == {}


def test_a_failure_that_concerns_the_caller_is_not_passed_on(tmp_path: Path) -> None:
    large = Failing(LARGE, ModelError("logits are not finite"))
    with client(tmp_path, large) as viaticum, pytest.raises(ModelError, match="finite"):
        viaticum.solve("What is 2 + 3?", kind="number")


def test_another_strategy_of_a_model_that_is_away_is_not_asked(tmp_path: Path) -> None:
    direct = row(LARGE, 0.6, 15_000)
    table = RoutingTable((*TABLE, type(direct)(Pair(LARGE, "direct"), 0.6, 20, 30, 15_000, 30_000)))
    for error, calls in (RateLimited("later"), 1), (PromptTooLong("too long"), 2):
        large = Failing(LARGE, error)
        with client(tmp_path, large, table=table) as viaticum:
            assert viaticum.solve("What is 2 + 3?", kind="number").value == "5"
            assert large.calls == calls, error


def test_what_a_failed_call_wrote_is_charged_beside_the_answer(tmp_path: Path) -> None:
    for error in (ProviderTimeout("silent"), ProviderUnavailable("cut")):
        with client(tmp_path, Failing(LARGE, error, after=2)) as viaticum:
            events = list(viaticum.stream("What is 2 + 3?", kind="number"))
            answer: Any = events[-1]
            charged = posts(viaticum)
            assert (answer.value, len(charged), answer.cost) == ("5", 2, sum(charged.values()))
            assert all(charged.values())
            kinds = [type(each) for each in events if isinstance(each, RouteChosen | TextPiece)]
            assert kinds[:4] == [RouteChosen, TextPiece, TextPiece, RouteChosen]


def test_a_pair_that_does_not_fit_the_budget_is_no_way_out(tmp_path: Path) -> None:
    large = Failing(LARGE, RateLimited("later"), after=3)
    with client(tmp_path, large, budget="0.00003", on_short="stop", policy="best") as viaticum:
        with pytest.raises((BudgetExceeded, RateLimited)):
            viaticum.solve("What is 2 + 3?", kind="number")
        assert viaticum.budget().posted_nanousd <= 30_000


def test_a_plan_goes_on_without_the_pair_that_failed(tmp_path: Path) -> None:
    class Both(StaticRouter):
        def plans_for(self, query: Query) -> list[PlanRow]:
            return [PlanRow(Plan((Pair(LARGE, "cot"), Pair(SMALL, "cot")), 2), 0.9, 30_000, 60_000)]

    with client(tmp_path, Failing(LARGE, RateLimited("later")), router=Both(TABLE)) as viaticum:
        answer = viaticum.solve("What is 2 + 3?", kind="number")
        assert (answer.value, len(posts(viaticum))) == ("5", 1)


def test_samples_that_were_made_decide(tmp_path: Path) -> None:
    class Sampled(ScriptedModel):
        def stream(self, messages: Sequence[Message], generation: Generation) -> Iterator[str | Completion]:
            if self.calls == 2:
                raise RateLimited("later")
            yield from super().stream(messages, generation)

    pair = Pair(LARGE, "self-consistency:cot:5")
    cot = row(LARGE, 0.7, 20_000)
    table = RoutingTable((type(cot)(pair, 0.7, 20, 30, 20_000, 40_000),))
    with client(tmp_path, Sampled(LARGE, "The answer is 8."), table=table) as viaticum:
        answer = viaticum.solve("What is 2 + 3?", kind="number")
        assert (answer.value, len(posts(viaticum))) == ("8", 2)


# The interfaces


def test_a_stream_changes_the_pair_before_its_first_piece_alone(tmp_path: Path) -> None:
    """A text that was sent cannot be taken back; of one that was not, nobody knows."""
    question: list[Message] = [{"role": "user", "content": "What is 2 + 3?"}]
    for after, streamed, works in (0, True, True), (2, False, True), (2, True, False):
        with client(tmp_path, Failing(LARGE, ProviderUnavailable("cut"), after)) as viaticum:
            asked = CompletionRequest(
                "auto", question, viaticum.budget_name, f"k{after}{streamed}", is_streamed=streamed
            )
            token = CancellationToken()
            if works:
                end: Any = list(complete(viaticum, asked, token))[-1]
                assert isinstance(end, CompletionFinished)
                assert (end.answer, end.text) == ("5", "The answer is 5.")
            else:
                with pytest.raises(ProviderUnavailable):
                    list(complete(viaticum, asked, token))
            assert len(posts(viaticum)) == (1 if after == 0 or not works else 2)


def test_a_chat_model_answers_by_the_next_pair(tmp_path: Path) -> None:
    with client(tmp_path, Failing(LARGE, RateLimited("later"), after=1)) as viaticum:
        message = ChatViaticum(client=viaticum).invoke("What is 2 + 3?")
        assert "5" in str(message.content)
        assert message.response_metadata["route"] == f"{SMALL}+cot"


@pytest.fixture(scope="module")
def provider() -> Iterator[OpenAIServer]:
    with running_server() as server:
        yield server


def spec(name: str, url: str) -> ModelSpec:
    return ModelSpec.model_validate(
        {
            "name": name,
            "description": "Lives elsewhere.",
            "kind": "remote",
            "litellm_model": f"openai/{name}",
            "api_base": url,
            "context_length": 8192,
            "input_price": 1,
            "output_price": 1,
            "max_retries": 0,
        }
    )


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (429, "rate limit reached for requests"),
        (503, "overloaded"),
        (400, "Your request was rejected as a result of our safety system (content_policy)"),
        (400, "This model's maximum context length is 10 tokens"),
        (400, "The input (9 tokens) is longer than the model's context length (8 tokens)."),
        (529, "Overloaded"),
    ],
)
def test_a_real_provider_s_refusal_goes_to_the_next_pair(
    tmp_path: Path, provider: OpenAIServer, status: int, message: str
) -> None:
    provider.reset()
    provider.script, provider.text = [(status, {}, message)], "The answer is 5."
    table = RoutingTable((row("far", 0.9, 100_000), row("near", 0.4, 100_000)))
    catalogue = Catalogue([spec("far", provider.url), spec("near", provider.url)])
    with Viaticum(
        "0.1", folder=tmp_path, catalogue=catalogue, router=StaticRouter(table), policy="best"
    ) as viaticum:
        answer = viaticum.solve("What is 2 + 3?", kind="number")
        assert (answer.value, str(answer.routes[0].pair)) == ("5", "near+cot")
        assert [body["model"] for body in provider.requests] == ["far", "near"]
        assert len(posts(viaticum)) == 1


THREE = ("far", "near", "here")
LIMITED, SHORT = (429, {}, "slow down"), (400, {}, "maximum context length is 5")


@pytest.mark.parametrize(
    ("streamed", "script"),
    [
        (True, [LIMITED, SHORT]),
        (False, [LIMITED, SHORT]),
        (True, ["break at once", "drop"]),
        (False, ["break", "end early"]),
    ],
)
def test_a_server_asks_the_next_model(
    tmp_path: Path, provider: OpenAIServer, streamed: bool, script: list[Any]
) -> None:
    """The first two are limited, too small, cut off at once, or in the middle of a text nobody has seen."""
    provider.reset()
    provider.script, provider.text = list(script), "I think that it is 5."
    table = RoutingTable(tuple(row(name, 0.9 - 0.1 * at, 100_000) for at, name in enumerate(THREE)))
    catalogue = Catalogue([spec(name, provider.url) for name in THREE])
    with serving(tmp_path, catalogue=catalogue, router=StaticRouter(table)) as server:
        response = server.ask("auto", stream=streamed)
        assert response.status_code == 200
        if streamed:
            chunks = [json.loads(each[6:]) for each in response.text.splitlines() if each[6:7] == "{"]
            text = "".join(
                choice["delta"].get("content") or "" for each in chunks for choice in each["choices"]
            )
        else:
            text = response.json()["choices"][0]["message"]["content"]
        assert text == "I think that it is 5."
        assert response.headers["x-viaticum-route"] == "here+cot"
        assert [body["model"] for body in provider.requests] == list(THREE)
        server.assert_settled()


def test_a_stream_that_breaks_after_its_first_piece_ends_with_an_error(
    tmp_path: Path, provider: OpenAIServer
) -> None:
    provider.reset()
    provider.script, provider.text = ["break"], "I think that it is 5."
    catalogue = Catalogue([spec(name, provider.url) for name in THREE])
    table = RoutingTable(tuple(row(name, 0.9, 100_000) for name in THREE))
    with serving(tmp_path, catalogue=catalogue, router=StaticRouter(table)) as server:
        response = server.ask("auto", stream=True)
        assert '"error"' in response.text
        assert len(provider.requests) == 1
        server.assert_settled()
        assert server.client.budget().posted_nanousd > 0


# Kills


def test_killed_at_every_write_of_a_failover(tmp_path: Path) -> None:
    """In a child of its own for each moment; then one process takes all threads up again."""

    def opened() -> Viaticum:
        return client(tmp_path, Failing(LARGE, RateLimited("later"), after=1), budget="1", budget_name="b")

    killed = []
    for moment in range(40):
        pid = os.fork()
        if pid == 0:
            left = moment

            def fuse(name: str) -> None:
                method = getattr(Ledger, name)

                def counted(*args: Any, **kwargs: Any) -> Any:
                    nonlocal left
                    for before in (True, False):
                        if left == 0:
                            os.kill(os.getpid(), signal.SIGKILL)
                        left -= 1
                        if before:
                            result = method(*args, **kwargs)
                    return result

                setattr(Ledger, name, counted)

            for name in ("reserve", "settle", "void", "entries"):
                fuse(name)
            with opened() as viaticum:
                found = viaticum.solve("What is 2 + 3?", kind="number", thread_id=f"t{moment}").value
            os._exit(0 if found == "5" else 1)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if code == 0:
            break
        assert code == -signal.SIGKILL
        killed.append(f"t{moment}")
    assert len(killed) > 8
    with opened() as viaticum:
        for thread in killed:
            assert viaticum.solve("What is 2 + 3?", kind="number", thread_id=thread).value == "5"
        ledger = viaticum.ledger
        assert ledger.check() == []
        charged = [entry for entry in ledger.entries("b") if entry.kind == "post"]
        assert len({entry.key for entry in charged}) == len(charged)
        for thread in killed:
            models = [
                json.loads(json.dumps(entry.note))["tags"]["model"]
                for entry in charged
                if entry.note["tags"]["thread"] == thread
            ]
            assert models.count(SMALL) == 1, "the call that answered is charged once"
        assert viaticum.budget().held_nanousd == 0
