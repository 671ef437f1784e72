"""Tools with prices in a budget, and the trace of a run."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import pytest
from forms_server import FormsServer
from langchain_core.tools import tool

import viaticum
from viaticum.budgets import Ledger
from viaticum.errors import BudgetExceeded, InputError
from viaticum.reports.trace import read_trace

PRICES = {"small": ("1", "2")}


@viaticum.priced("0.01")
def search(text: str) -> str:
    """Search."""
    if text == "fails":
        raise RuntimeError("away")
    return f"found {text}"


@viaticum.priced(lambda result: result["dollars"], most="0.05", name="lookup")
async def look_up(dollars: str) -> dict[str, str]:
    return {"dollars": dollars}


def test_calls_of_tools_are_charged_by_call_or_by_result() -> None:
    with viaticum.budget("1") as budget:
        assert search("x") == "found x"
        asyncio.run(look_up("0.003"))
        assert tool(search).invoke({"text": "y"}) == "found y"
    assert budget.left().posted_usd == Decimal("0.023")
    assert budget.left().posted_tokens == 0
    assert budget.calls == {"tool:search": 2, "tool:lookup": 1}
    assert budget.ledger.check() == []


def test_a_tool_that_does_not_fit_is_not_called() -> None:
    with viaticum.budget("0.015") as budget:
        search("x")
        with pytest.raises(BudgetExceeded):
            search("y")
        with pytest.raises(BudgetExceeded):
            asyncio.run(look_up("0.001"))  # five cents may be wanted
    assert budget.left().posted_usd == Decimal("0.01")
    assert budget.refused.total() == 2


def test_a_tool_that_raises_is_not_charged() -> None:
    with viaticum.budget("1") as budget, pytest.raises(RuntimeError, match="away"):
        search("fails")
    assert (budget.left().posted_nanousd, budget.left().held_nanousd) == (0, 0)


def test_a_result_dearer_than_held_is_posted_and_told(caplog: pytest.LogCaptureFixture) -> None:
    with viaticum.budget("1") as budget:
        asyncio.run(look_up("0.08"))
    assert budget.left().posted_usd == Decimal("0.08")
    assert "more than was held" in caplog.text


@pytest.mark.parametrize("result", [{}, {"dollars": "-1"}, {"dollars": "much"}])
def test_a_price_that_cannot_be_told_costs_what_was_held(result: dict[str, str]) -> None:
    @viaticum.priced(lambda found: found["dollars"], most="0.05")
    def find() -> dict[str, str]:
        return result

    @viaticum.priced(lambda found: found["dollars"], most="0.05")
    async def find_async() -> dict[str, str]:
        return result

    with viaticum.budget("1") as budget:
        with pytest.raises((KeyError, InputError)):
            find()
        with pytest.raises((KeyError, InputError)):
            asyncio.run(find_async())
    assert budget.left().posted_usd == Decimal("0.1")
    assert budget.left().held_nanousd == 0
    assert budget.ledger.check() == []


def test_outside_a_budget_a_tool_is_as_it_was() -> None:
    assert search("x") == "found x"


def test_wrong_prices_say_so() -> None:
    with pytest.raises(InputError, match="most"):
        viaticum.priced(lambda result: 1)
    with pytest.raises(InputError, match="below zero"):
        viaticum.priced("-1")
    with pytest.raises(InputError, match="below the price"):
        viaticum.priced("1", most="0.5")


def test_a_trace_shows_a_run_with_its_inner_budgets(server: FormsServer, tmp_path: Path) -> None:
    def ask(**more: int) -> None:
        server.openai(max_retries=0).chat.completions.create(
            model="small",
            messages=[{"role": "user", "content": "2+2?"}],
            max_tokens=100,
            **more,  # type: ignore[call-overload]
        )

    file = tmp_path / "ledger.db"
    with Ledger(file) as ledger, viaticum.budget("1", name="run", ledger=ledger, prices=PRICES):
        ask()
        search("x")
        server.script = [500]
        with viaticum.budget("0.5", name="step", prices=PRICES):
            with pytest.raises(Exception, match="not now"):
                ask()
            ask()
        trace = read_trace(ledger, "run")
    assert [(call.budget, call.models, call.state) for call in trace.calls] == [
        ("run", ("small",), "done"),
        ("run", ("tool:search",), "done"),
        ("step", ("small",), "void"),
        ("step", ("small",), "done"),
    ]
    assert [call.cost for call in trace.calls] == [22_000, 10_000_000, 0, 22_000]
    assert [call.left for call in trace.calls] == [999_978_000, 989_978_000, 989_978_000, 989_956_000]
    assert trace.by_model() == {"tool:search": (1, 10_000_000), "small": (3, 44_000)}
    command = [sys.executable, "-m", "viaticum", "trace", "run", "--ledger", str(file)]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "http, void" in shown
    assert "run: $0.010044 of $1 in 4 calls" in shown
    printed = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True).stdout
    assert [call["cost"] for call in json.loads(printed)["calls"]] == [22_000, 10_000_000, 0, 22_000]
