"""The agents' example: every task's gold and check, the tools, the protocol in text, and the four ways."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from viaticum.budgets import Ledger
from viaticum.errors import DataError
from viaticum.money import nanousd
from viaticum.strategies.sandbox import open_sandbox

FOLDER = Path(__file__).resolve().parent.parent / "examples" / "agent"
MODULES = ("harbour", "task_set", "agent_tools", "text_tools", "scripted_agents", "neighbours", "compare")


@pytest.fixture(scope="module")
def example() -> Iterator[dict[str, Any]]:
    """The example's modules by name, which are gone afterwards."""
    sys.path.insert(0, str(FOLDER))
    try:
        yield {name: __import__(name) for name in MODULES}
    finally:
        sys.path.remove(str(FOLDER))
        for name in MODULES:
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def tasks(example: dict[str, Any]) -> list[Any]:
    made: list[Any] = example["task_set"].make_tasks(example["harbour"].Harbour.make())
    return made


@pytest.fixture(scope="module")
def tools(example: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("harbour")
    example["harbour"].Harbour.make().write(folder)
    with open_sandbox() as sandbox:
        yield {tool.name: tool for tool in example["agent_tools"].make_tools(folder, sandbox)}


def call(tool: Any, text: str) -> tuple[str, str]:
    """Status and text of a tool's result, as an agent gets it."""
    message = tool.invoke({"name": tool.name, "args": {"text": text}, "id": "c", "type": "tool_call"})
    return message.status, message.text


def test_sixty_tasks_are_the_same_each_time(example: dict[str, Any], tasks: list[Any]) -> None:
    again = example["task_set"].make_tasks(example["harbour"].Harbour.make())
    assert again == tasks
    assert len({task.question for task in tasks}) == len({task.id for task in tasks}) == 60
    families = [task.family for task in tasks]
    assert {families.count(family) for family in families} == {6}
    assert len(set(families[:10])) == 10
    assert (tasks[0].question, tasks[0].gold) == FIRST
    other = example["task_set"].make_tasks(example["harbour"].Harbour.make(8), 8)
    assert not {task.question for task in other} >= {task.question for task in tasks}


def test_the_tools_find_every_gold(example: dict[str, Any], tasks: list[Any], tools: dict[str, Any]) -> None:
    """Golds come from the harbour's objects; the database, the files and programs say the same."""
    take = example["scripted_agents"]._take
    for task in tasks:
        taken: list[str] = []
        for step in task.solution:
            status, result = call(tools[step.tool], step.input.format(*taken))
            assert status == "success", (task, result)
            taken.append(take(step.take, result))
        assert task.is_solved(taken[-1]), (task, taken)


def test_wrong_answers_are_refused(tasks: list[Any]) -> None:
    for task in tasks:
        assert not task.is_solved(None)
        assert not task.is_solved("")
        assert not task.is_solved("I do not know")
        assert task.is_solved(f"It is {task.gold}.")
        if task.names:
            other = next(name for name in task.names if name != task.gold)
            assert not task.is_solved(other)
            assert not task.is_solved(f"{task.gold} or {other}"), "a list of guesses is no answer"
        else:
            assert not task.is_solved(str(float(task.gold) + 1))
            assert not task.is_solved(
                f"-{task.gold}" if float(task.gold) > 0 else task.gold.removeprefix("-")
            )


@pytest.mark.parametrize(
    ("tool", "text", "why"),
    [
        ("sql", "SELECT total FROM nowhere", "no such table"),
        ("sql", "DELETE FROM trips", "not authorized"),
        ("sql", "INSERT INTO boats VALUES ('x', 'tug', 1)", "not authorized"),
        ("sql", "ATTACH DATABASE '/tmp/other.db' AS other", "not authorized"),
        ("sql", "PRAGMA query_only = 0", "not authorized"),
        ("sql", "WITH x AS (SELECT 1) DELETE FROM trips", "not authorized"),
        ("sql", "VACUUM INTO '/tmp/other.db'", "denied"),
        ("sql", "SELECT load_extension('x')", "not authorized"),
        ("sql", "SELECT * FROM pragma_database_list", "not authorized"),
        ("sql", "SELECT zeroblob(1000000000)", "too big"),
        ("sql", "SELECT 1; DROP TABLE trips", "one statement"),
        (
            "sql",
            "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT max(x) FROM n",
            "interr",
        ),
        ("sql", "SELECT SUM(price) FROM trips WHERE boat = 'Nobody'", "no rows"),
        ("search", "xyzzy", "no line"),
        ("search", "", "no line"),
        ("search", "../../etc/passwd", "no line"),
        ("python", "print(1 / 0)", "division"),
        ("python", "open('/etc/passwd').read()", ""),
        ("python", "x = 3", "printed nothing"),
        ("python", "while True: pass", ""),
    ],
)
def test_tools_say_what_is_wrong_and_stay_inside(
    tools: dict[str, Any], tool: str, text: str, why: str
) -> None:
    status, result = call(tools[tool], text)
    assert status == "error"
    assert why in result
    assert len(result) < 700
    assert call(tools["sql"], "SELECT COUNT(*) FROM trips;") == ("success", "120")


def test_long_results_are_cut(tools: dict[str, Any]) -> None:
    for tool, text in (("python", "print('x' * 5000)"), ("sql", "SELECT * FROM trips")):
        status, result = call(tools[tool], text)
        assert status == "success"
        assert len(result) < 700


@pytest.mark.parametrize(
    ("text", "called"),
    [
        ("SQL: SELECT 1", ("sql", "SELECT 1")),
        ("I need a query.\nSQL: SELECT 1\nRESULT: 2\nANSWER: 2", ("sql", "SELECT 1")),
        ("RESULT: 5\nSQL: SELECT 1", ("sql", "SELECT 1")),
        ("**SQL:** SELECT 1", ("sql", "SELECT 1")),
        ("SELECT 1", ("sql", "SELECT 1")),
        ("Answer: 42", (None, "42")),
        ("PYTHON:\n```python\nprint(1)\nprint(2)\n```\nANSWER: 3", ("python", "print(1)\nprint(2)")),
        ("```sql\nSELECT 1\n```", ("sql", "SELECT 1")),
        ("```json\n{}\n```", (None, "```json\n{}\n```")),
        ("SQL: `SELECT 1`", ("sql", "SELECT 1")),
        ("ANSWER: 42", (None, "42")),
        ("ANSWER: 42\nSQL: SELECT 1", (None, "42")),
        ("It is 42.", (None, "It is 42.")),
        ("The SQL: way", (None, "The SQL: way")),
        ("", (None, "")),
    ],
)
def test_calls_are_read_from_text(example: dict[str, Any], text: str, called: tuple[str | None, str]) -> None:
    assert example["text_tools"].parse(text, ["sql", "search", "python"]) == called


def test_a_router_never_reads_the_task_itself(example: dict[str, Any]) -> None:
    outcome = example["neighbours"].Outcome("how many trips", "m", True, 100, 10, 2)
    router = example["neighbours"].NeighbourRouter
    from viaticum import Query

    alone = router([outcome]).table(Query("how many trips")).rows[0]
    assert alone.accuracy == 0.5
    near = replace(outcome, question="how many trips of it", solved=False)
    assert router([outcome, near]).table(Query("how many trips")).rows[0].accuracy == pytest.approx(1 / 3)


def compared(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", str(FOLDER / "compare.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=folder,
        check=False,
        env={**os.environ, "XDG_DATA_HOME": str(folder / "data")},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def runs_of(journal: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in journal.read_text().splitlines()[1:]]


def test_the_four_ways_on_scripted_models(tmp_path: Path) -> None:
    journal = tmp_path / "runs.jsonl"
    shown = compared(tmp_path, "--limit", "30", "--journal", str(journal))
    assert "no result about real models" in shown
    assert "30 tasks; intervals of 95%" in shown
    runs = runs_of(journal)
    by = {way: [run for run in runs if run["way"] == way] for way in WAYS}
    assert {way: len({run["task"] for run in own}) for way, own in by.items()} == dict.fromkeys(WAYS, 30)
    cost = {way: sum(run["cost"] for run in own) for way, own in by.items()}
    solved = {way: sum(run["solved"] for run in own) for way, own in by.items()}
    assert cost["always small"] < cost["per run"] < cost["always large"]
    assert cost["always small"] < cost["per step"] < cost["always large"]
    assert solved["always small"] < solved["always large"]
    assert not any(run["switches"] for way in WAYS[:3] for run in by[way])
    assert any(run["switches"] for run in by["per step"])
    with Ledger(journal.with_suffix(".ledger") / "ledger.db") as ledger:
        assert ledger.check() == []
        for way in WAYS:
            assert ledger.budget(way).posted_nanousd == cost[way] <= nanousd("1")
            assert ledger.budget(way).held_nanousd == 0
        posts = [entry for entry in ledger.entries() if entry.kind == "post"]
        assert len(posts) == sum(run["steps"] for run in runs)
    assert compared(tmp_path, "--limit", "30", "--journal", str(journal)) == shown  # nothing is run again


def test_a_budget_that_runs_out_is_never_exceeded(tmp_path: Path) -> None:
    journal = tmp_path / "runs.jsonl"
    compared(tmp_path, "--limit", "20", "--journal", str(journal), "--budget", "0.004")
    with Ledger(journal.with_suffix(".ledger") / "ledger.db") as ledger:
        assert ledger.check() == []
        for way in WAYS:
            state = ledger.budget(way)
            assert state.posted_nanousd <= nanousd("0.004")
            assert state.held_nanousd == 0
    stopped = [run for run in runs_of(journal) if run["answer"] == "out of money"]
    assert stopped
    assert not any(run["solved"] for run in stopped)


def test_a_killed_comparison_goes_on(tmp_path: Path) -> None:
    journal = tmp_path / "runs.jsonl"
    command = [sys.executable, str(FOLDER / "compare.py"), "--limit", "10", "--journal", str(journal)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and (not journal.exists() or len(runs_of(journal)) < 3):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    before = runs_of(journal)
    with journal.open("a") as file:
        file.write('{"way": "always sm')  # cut off by the kill
    compared(tmp_path, "--limit", "10", "--journal", str(journal))
    runs = runs_of(journal)
    assert runs[: len(before)] == before
    assert len({(run["way"], run["task"]) for run in runs}) == len(runs) == 40
    with Ledger(journal.with_suffix(".ledger") / "ledger.db") as ledger:
        assert ledger.check() == []


def test_a_journal_of_other_settings_is_refused(example: dict[str, Any], tmp_path: Path) -> None:
    journal = example["compare"].Journal
    journal(tmp_path / "runs.jsonl", {"models": "local"})
    with pytest.raises(DataError, match="other settings"):
        journal(tmp_path / "runs.jsonl", {"models": "scripted"})


WAYS = ("always small", "always large", "per run", "per step")
FIRST = ("How many trips did the Fulmar make?", "6")
