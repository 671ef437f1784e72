"""A person's decision about an agent's time or money, carried out by another process than the one that asked.

Each process is a real one; checkpoints and ledger are files.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import asked_agent
import pytest
from fake_chat import fake as fake_chat
from fake_chat import says
from langchain.agents import create_agent
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.types import Command

from viaticum.agents.integrations.call_approval import AskedRuns
from viaticum.agents.integrations.middleware import BudgetMiddleware
from viaticum.budgets import Ledger


@pytest.fixture
def processes(tmp_path: Path) -> Any:
    """Runs one process of the agent; returns what it printed, or its exit code where it printed nothing."""

    def run(do: object, **variables: str) -> Any:
        script = Path(asked_agent.__file__)
        given = do if isinstance(do, str) and do in ("begin", "go on") else json.dumps(do)
        done = subprocess.run(
            [sys.executable, str(script), str(tmp_path), given],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **variables},
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
        assert "Traceback" not in done.stderr, done.stderr
        return json.loads(done.stdout) if done.stdout else done.returncode

    yield run
    with Ledger(tmp_path / "ledger.db", read_only=True) as ledger:
        assert ledger.check() == []


@pytest.mark.parametrize(
    ("decision", "words", "calls"),
    [
        ("stop", "Stopped, the time is over", {"worker": 0, "small": 0}),
        ("finish", "by the small one", {"worker": 0, "small": 1}),
        ("cheaper", "by the small one", {"worker": 0, "small": 1}),
        ("raise", "done", {"worker": 1, "small": 0}),
    ],
)
def test_a_decision_about_time_is_carried_out_by_another_process(
    processes: Any, decision: str, words: str, calls: dict[str, int]
) -> None:
    begun = processes("begin")
    assert begun["asked"][0]["unit"] == "seconds"
    ended = processes(decision)
    assert ended["words"].startswith(words)
    assert (ended["asked"], ended["calls"], ended["held"]) == ([], calls, 0)


def test_the_seconds_that_a_person_gives_are_those_of_the_run_in_another_process(processes: Any) -> None:
    """By its own rule a run that another process goes on with has its time anew, which two naps exceed."""
    processes("begin")
    ended = processes({"do": "raise", "by_seconds": 60}, TWICE="1")
    assert (ended["asked"], ended["words"]) == ([], "done")


def test_a_wrong_decision_is_asked_again_and_a_third_process_hears_the_right_one(processes: Any) -> None:
    processes("begin")
    again = processes({"do": "raise", "by": "0.05"})
    assert "seconds are short" in again["asked"][0]["problem"]
    assert (again["calls"], again["held"]) == ({"worker": 0, "small": 0}, 0)
    ended = processes("stop")
    assert ended["words"].startswith("Stopped, the time is over")
    assert ended["calls"]["worker"] == 0


def test_a_decision_outlives_the_process_that_was_carrying_it_out(processes: Any) -> None:
    processes("begin")
    assert processes("finish", DIE="small") == 9
    ended = processes("go on")
    assert (ended["words"], ended["calls"]) == ("by the small one", {"worker": 0, "small": 1})


def test_a_run_that_was_killed_and_asked_nothing_has_its_time_anew(processes: Any) -> None:
    processes("begin", DIE="worker")
    ended = processes("go on", TWICE="1")
    assert ended["asked"][0]["unit"] == "seconds", "asked after its second nap, not at once"
    assert ended["calls"]["worker"] == 1
    assert processes("stop")["words"].startswith("Stopped")


def test_a_decision_about_money_is_carried_out_though_there_is_more_meanwhile(
    processes: Any, tmp_path: Path
) -> None:
    asked = processes("begin", MONEY="0.000000001")["asked"][0]
    assert asked["unit"] == "nanousd"
    with Ledger(tmp_path / "ledger.db") as ledger:
        ledger.set_limit("agent", limit_nanousd=10**9)
    environment = {"MONEY": "1"}
    ended = processes("stop", **environment)
    assert ended["words"].startswith("Stopped, the budget is used up")
    assert ended["calls"] == {"worker": 0, "small": 0}


def test_a_decision_is_heard_in_the_same_process_too_where_its_reason_is_gone() -> None:
    with Ledger("memory:") as ledger:
        worker = fake_chat(says("done"), model="worker")
        budget = BudgetMiddleware(
            "0.000000001", prices=asked_agent.PRICES, ledger=ledger, budget_name="b", on_cap="ask"
        )
        agent = create_agent(worker, [], middleware=[budget], checkpointer=InMemorySaver())
        config: Any = {"configurable": {"thread_id": "t"}}
        given: Any = {"messages": [("user", "go")]}
        assert "__interrupt__" in agent.invoke(given, config)
        ledger.set_limit("b", limit_nanousd=10**9)
        stop: Any = Command(resume="stop")
        assert "used up" in agent.invoke(stop, config)["messages"][-1].text
        assert worker.settings == []
        assert ledger.budget("b").held_nanousd == 0


def test_other_interrupts_in_the_same_process_keep_their_answers() -> None:
    """The middleware listens only where a person may have been asked by it."""
    from langchain.agents.middleware import wrap_model_call
    from langgraph.types import interrupt

    heard: list[Any] = []

    @wrap_model_call  # type: ignore[arg-type]
    def approve(request: Any, handler: Any) -> Any:
        response = handler(request)
        heard.append(interrupt("is that right?"))
        return response

    with Ledger("memory:") as ledger:
        worker = fake_chat(says("done"), says("done"), model="worker")
        budget = BudgetMiddleware(
            "1", prices=asked_agent.PRICES, ledger=ledger, on_cap="ask", max_seconds=60.0
        )
        agent = create_agent(worker, [], middleware=[approve, budget], checkpointer=InMemorySaver())
        config: Any = {"configurable": {"thread_id": "t"}}
        given: Any = {"messages": [("user", "go")]}
        assert "__interrupt__" in agent.invoke(given, config)
        yes: Any = Command(resume="yes")
        agent.invoke(yes, config)
        assert heard == ["yes"]


def test_runs_that_never_ended_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("viaticum.agents.integrations.call_approval.MOST_RUNS", 2)
    runs = AskedRuns()
    for number in range(4):
        runs.close(f"r{number}")
    assert [runs.is_open(f"r{number}") for number in range(4)] == [True, True, False, False]
    assert not runs.is_open(""), "a run without a name"
    runs.ask("r3")
    assert runs.is_open("r3")
    runs.end("r3")
    assert len(runs._open) == 1
