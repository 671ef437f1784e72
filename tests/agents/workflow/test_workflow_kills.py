"""SIGKILL at every step of the workflow, in every way to run it: one answer, one charge."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from viaticum.budgets import Ledger

DRIVER = Path(__file__).resolve().parents[2] / "support" / "kill_calls.py"
# A node and a write of the ledger have two moments each: start and its route, two times call and parse,
# another route; two calls with two writes each.
STEPS = 2 * (1 + 2 * 3) + 2 * (2 * 2)


def killed_threads(folder: Path, store: str, how: str, what: str) -> set[str]:
    command = [sys.executable, str(DRIVER), str(folder), store, how, what]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def check_once(address: str | Path, killed: set[str], calls: int = 2) -> None:
    """Every thread has paid for its calls, once."""
    with Ledger(address) as ledger:
        assert ledger.check() == []
        posts = [entry for entry in ledger.entries("b") if entry.kind == "post"]
        keys = [entry.key for entry in posts]
        assert len(keys) == len(set(keys)), "charged twice"
        paid = [entry.note["tags"]["thread"] for entry in posts]
        assert set(paid) >= killed, "lost"
        assert {thread: paid.count(thread) for thread in killed} == dict.fromkeys(killed, calls)
        budget = ledger.budget("b")
        assert budget.posted_nanousd == sum(entry.nanousd for entry in posts)
        assert budget.held_nanousd == 0


@pytest.mark.parametrize("how", ["solve", "asolve", "ainvoke"])
def test_killed_at_every_step_on_sqlite(tmp_path: Path, how: str) -> None:
    killed = killed_threads(tmp_path, "-", how, "steps")
    assert len(killed) == STEPS
    check_once(tmp_path / "ledger.db", killed)


@pytest.mark.parametrize("how", ["solve", "ainvoke"])
def test_killed_at_every_step_on_postgres(tmp_path: Path, postgres: str, how: str) -> None:
    killed = killed_threads(tmp_path, postgres, how, "steps")
    assert len(killed) == STEPS
    check_once(postgres, killed)


@pytest.mark.parametrize(("how", "what"), [("solve", "random"), ("solve", "writes"), ("ainvoke", "writes")])
def test_killed_at_random_and_at_every_write(tmp_path: Path, how: str, what: str) -> None:
    killed = killed_threads(tmp_path, "-", how, what)
    assert len(killed) >= 25
    check_once(tmp_path / "ledger.db", killed)


@pytest.mark.parametrize(("what", "least"), [("steps", 2 * (1 + 2 * 3 + 2) + 2 * (3 * 2)), ("writes", 25)])
def test_killed_at_every_step_of_a_plan_with_a_check(tmp_path: Path, what: str, least: int) -> None:
    """The answer, its check and the answer after it are paid for once each. Three calls, two more routes."""
    killed = killed_threads(tmp_path, "-", "check", what)
    assert len(killed) >= least
    check_once(tmp_path / "ledger.db", killed, 3)


def test_killed_at_every_step_inside_another_graph(tmp_path: Path) -> None:
    """One question as a subgraph, two by `Send`: a call each, four nodes (start calls route), two writes."""
    killed = killed_threads(tmp_path, "-", "nested", "steps")
    assert len(killed) == 3 * (2 * 4 + 2 * 2)
    check_once(tmp_path / "ledger.db", killed, 3)
