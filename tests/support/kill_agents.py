"""Driver of the kill tests of agents: a child for each run, killed at a chosen write of the ledger.

    python kill_agents.py FOLDER ADDRESS HOW

ADDRESS is of a server where the model `away` fails and `small` answers; HOW is `middleware` (an agent with
`RouterMiddleware`, whose first model fails, and `BudgetMiddleware`), `auto` (a `ChatViaticum` with tools) or
`code` (the same calls by OpenAI's SDK under `viaticum.budget`). Run number N pays from the budget wN and says
wN in its question. Each run is taken up again by another child. Prints how many runs were killed.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import openai
from langchain.agents import create_agent
from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI
from langgraph.checkpoint.sqlite import SqliteSaver

import viaticum
from viaticum import ChatViaticum, FakeRouter, Viaticum
from viaticum.agents.integrations.middleware import BudgetMiddleware
from viaticum.agents.integrations.router_middleware import RouterMiddleware
from viaticum.budgets import Ledger
from viaticum.catalogue import Catalogue, ModelSpec
from viaticum.models.remote.request import load_litellm

FOLDER, ADDRESS, HOW = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
PRICES = {"away": ("1", "2"), "small": ("1", "2")}
TOOL = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {}}}
WRITES = ("reserve", "dispatch", "settle", "void")


def by_middleware(name: str) -> None:
    with Ledger(FOLDER / "ledger.db") as ledger, SqliteSaver.from_conn_string(str(FOLDER / "c.db")) as saver:
        budget = BudgetMiddleware("1", budget_name=name, ledger=ledger, prices=PRICES, max_tokens=64)
        models: dict[str, Any] = {
            each: ChatOpenAI(model=each, base_url=f"{ADDRESS}/v1", api_key="k", max_retries=0)  # type: ignore[arg-type]
            for each in ("away", "small")
        }
        routed = RouterMiddleware(
            models, FakeRouter("away+direct", "small+direct"), budget=budget, per="step"
        )
        agent = create_agent(models["away"], [], middleware=[routed, budget], checkpointer=saver)
        config: Any = {"configurable": {"thread_id": name}}
        seen = agent.get_state(config)
        if not seen.values or seen.next:
            agent.invoke(
                None if seen.values else {"messages": [HumanMessage(name)]}, config, durability="sync"
            )
        assert agent.get_state(config).values["messages"][-1].text == "It is four."


def by_auto(name: str) -> None:
    entry = {"description": "Far.", "kind": "remote", "context_length": 8192, "max_retries": 0}
    entry |= {"input_price": "1", "output_price": "2", "api_base": f"{ADDRESS}/v1"}
    specs = [
        ModelSpec.model_validate({**entry, "name": each, "litellm_model": f"openai/{each}"})
        for each in ("away", "small")
    ]
    with Viaticum(
        "1",
        budget_name=name,
        folder=FOLDER,
        catalogue=Catalogue(specs),
        router=FakeRouter("away+direct", "small+direct"),
    ) as client:
        chat = ChatViaticum(model="auto", client=client, max_tokens=64)  # type: ignore[call-arg]
        assert chat.bind_tools([TOOL]).invoke(name).text == "It is four."


def by_code(name: str) -> None:
    with (
        Ledger(FOLDER / "ledger.db") as ledger,
        viaticum.budget("1", name=name, ledger=ledger, prices=PRICES),
    ):
        client = openai.OpenAI(api_key="k", base_url=f"{ADDRESS}/v1", max_retries=0)
        for model in ("away", "small"):
            with suppress(openai.InternalServerError):
                client.chat.completions.create(
                    model=model, messages=[{"role": "user", "content": name}], max_tokens=64
                )


def child(name: str, before: Callable[[], None] = lambda: None) -> int:
    """Run in a fork; returns its exit code, below zero for a signal."""
    pid = os.fork()
    if pid == 0:
        try:
            before()
            {"middleware": by_middleware, "auto": by_auto, "code": by_code}[HOW](name)
            os._exit(0)
        finally:
            import traceback

            traceback.print_exc()
            os._exit(2)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def die_at(moment: int) -> None:
    def pass_by() -> None:
        nonlocal moment
        if moment == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        moment -= 1

    def count(name: str) -> None:
        method = getattr(Ledger, name)

        @functools.wraps(method)
        def counted(*args: Any, **kwargs: Any) -> Any:
            pass_by()
            result = method(*args, **kwargs)
            pass_by()
            return result

        setattr(Ledger, name, counted)

    for name in WRITES:
        count(name)


if __name__ == "__main__":
    load_litellm()  # once, not in each child
    number = 0
    while (code := child(f"w{number}", functools.partial(die_at, number))) != 0:
        assert code == -signal.SIGKILL, code
        assert child(f"w{number}") == 0
        number += 1
    print(number)
