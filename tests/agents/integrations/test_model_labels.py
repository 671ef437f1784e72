"""Agents whose data may go to some models alone: fake models count their calls, the ledger is real."""

from __future__ import annotations

from typing import Any

import pytest
from fake_chat import PRICES, add, both, fake, run, says
from langchain.agents import create_agent
from langchain.agents.middleware import AgentMiddleware

from viaticum import ChatViaticum, FakeRouter, InputError, ScriptedModel, Viaticum
from viaticum.agents.integrations.middleware import BudgetMiddleware
from viaticum.agents.integrations.router_middleware import RouterMiddleware
from viaticum.errors import ModelNotAllowed, RateLimited

LABELS = {"small": ["eu"], "large": ["us"]}
ROUTER = FakeRouter({"small+direct": 0.4, "large+direct": 0.9}, cost=1_000)


@both
@pytest.mark.parametrize("per", ["run", "call", "step"])
async def test_only_allowed_models_are_called(way: str, per: Any) -> None:
    large = fake(says("large"), model="large")
    models: Any = {"small": fake(says("small"), model="small"), "large": large}
    routed = RouterMiddleware(models, ROUTER, per=per, only="EU", labels=LABELS)
    agent = create_agent(fake(says("neither")), [], middleware=[routed])
    assert (await run(agent, way))[-1].content == "small"
    assert large.settings == []


@both
async def test_a_failover_goes_to_no_other_region(way: str) -> None:
    large = fake(says("large"), model="large")
    models: Any = {"small": fake(RateLimited("later"), model="small"), "large": large}
    routed = RouterMiddleware(models, ROUTER, only="eu", labels=LABELS)
    with pytest.raises(RateLimited):
        await run(create_agent(fake(says("neither")), [], middleware=[routed]), way)
    assert large.settings == []


def test_models_that_say_nothing_are_refused_and_named() -> None:
    models: Any = {"small": fake(model="small"), "large": fake(model="large")}
    with pytest.raises(ModelNotAllowed, match=r"refuses small \(no label\), large \(us\)"):
        RouterMiddleware(models, ROUTER, only="local", labels={"large": ["us"]})
    with pytest.raises(InputError, match="labels has labels"):
        RouterMiddleware(models, ROUTER, labels={"large": ["u s"]})
    with pytest.raises(InputError):
        RouterMiddleware(models, ROUTER, labels={"large": "us"})


@both
@pytest.mark.parametrize("on_cap", ["finish", "cheaper"])
async def test_the_budget_calls_no_other_model_at_the_cap(way: str, on_cap: Any) -> None:
    away = fake(says("from away"), model="away")
    prices = {**PRICES, "away": (0, 0)}
    with pytest.raises(ModelNotAllowed, match="away"):
        BudgetMiddleware("0.001", prices=prices, cheaper=[away], only="eu", labels={"fake": ["eu"]})
    budget = BudgetMiddleware("0.001", prices=prices, on_cap=on_cap, only="eu", labels={"fake": ["eu"]})
    agent = create_agent(fake(says("here"), says("here")), [add], middleware=[budget])
    assert (await run(agent, way))[-1].content == "here"
    assert away.settings == []


@both
async def test_a_model_that_another_middleware_puts_in_is_refused_before_it_is_held(way: str) -> None:
    away = fake(says("from away"), model="away")

    class Swap(AgentMiddleware[Any, Any, Any]):
        def wrap_model_call(self, request: Any, handler: Any) -> Any:
            return handler(request.override(model=away))

        async def awrap_model_call(self, request: Any, handler: Any) -> Any:
            return await handler(request.override(model=away))

    prices = {**PRICES, "away": (1, 1)}
    budget = BudgetMiddleware("0.01", prices=prices, only="eu", labels={"fake": ["eu"]})
    agent = create_agent(fake(says("here")), [], middleware=[Swap(), budget])
    with pytest.raises(ModelNotAllowed, match=r"away \(no label\)"):
        await run(agent, way)
    assert away.settings == []
    assert budget.ledger.holds() == []


def test_our_chat_models_say_it_themselves(tmp_path: Any) -> None:
    mine = ScriptedModel("The answer is 5.")
    with Viaticum("1", models={"mine": mine}, router=FakeRouter("mine+direct"), folder=tmp_path) as client:
        models: Any = {
            "named": ChatViaticum(model="mine", client=client),
            "auto": ChatViaticum(client=client),
            "limited": ChatViaticum(client=client, only="local"),
            "foreign": fake(model="foreign"),
        }
        router = FakeRouter(*(f"{name}+direct" for name in models))
        routed = RouterMiddleware(models, router, only="local")
        assert "limited" in routed.models
        assert "named" in routed.models
        assert "foreign" not in routed.models
