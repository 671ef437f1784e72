"""One database that is opened as several objects is one ledger: nothing is charged twice in it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import viaticum
from viaticum.agents.instrumentation.scope import paying_from
from viaticum.budgets import Ledger
from viaticum.errors import InputError

CENT = 10_000_000


@viaticum.priced("0.01")
def search() -> str:
    return "found"


@pytest.fixture(params=["sqlite", "postgres"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "ledger.db") if request.param == "sqlite" else request.getfixturevalue("postgres")


@pytest.mark.parametrize("around", ["root", "agent", "below"])
def test_a_tool_of_an_agent_is_charged_once(address: str, around: str) -> None:
    """Whether the budget around the agent is above the agent's own, is that one, or is below it."""
    with Ledger(address) as code, Ledger(address) as own:
        code.create("root", limit_nanousd=100 * CENT)
        code.create("agent", parent="root")
        code.create("below", parent="agent")
        inside = paying_from(own, "agent", {})
        with viaticum.budget(ledger=code, name=around), inside(), inside():
            search()
        assert [own.budget(name).posted_nanousd for name in ("root", "agent")] == [CENT, CENT]
        assert own.check() == []


def test_two_budgets_beside_each_other_are_charged_both(address: str) -> None:
    with Ledger(address) as code, Ledger(address) as own:
        code.create("root", limit_nanousd=100 * CENT)
        for name in ("one", "two"):
            code.create(name, parent="root")
        with viaticum.budget(ledger=code, name="one"), paying_from(own, "two", {})():
            search()
        assert [own.budget(name).posted_nanousd for name in ("one", "two")] == [CENT, CENT]


def test_a_third_budget_takes_the_part_of_the_one_above_it(address: str) -> None:
    """Of two that both pay one is above the third: that one is charged through it."""
    with Ledger(address) as code, Ledger(address) as own, viaticum.budget("1") as other:
        code.create("root", limit_nanousd=100 * CENT)
        code.create("agent", parent="root")
        outer, inner = paying_from(code, "root", {}), paying_from(own, "agent", {})
        with outer(), inner(), outer():
            search()
        assert [own.budget(name).posted_nanousd for name in ("root", "agent")] == [CENT, CENT]
        assert other.left().posted_nanousd == CENT


@pytest.mark.parametrize("given", [lambda path: path, lambda path: os.path.relpath(path)])
def test_a_budget_inside_another_may_name_the_same_ledger(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: Callable[[Path], str | Path]
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "ledger.db"
    with viaticum.budget("1", ledger=path) as outer, viaticum.budget("0.5", ledger=given(path)) as inner:
        search()
    assert inner.ledger is outer.ledger
    assert outer.left().posted_nanousd == CENT
    shutil.copy(path, tmp_path / "other.db")
    for other in (tmp_path / "other.db", tmp_path / "none.db", "memory:"):
        with viaticum.budget("1", ledger=path), pytest.raises(InputError, match="same ledger"):
            viaticum.budget("0.5", ledger=other)
    assert not (tmp_path / "none.db").exists()


def test_objects_over_one_database_know_each_other(address: str, tmp_path: Path) -> None:
    with Ledger(address) as one, Ledger(address) as two, Ledger(tmp_path / "other.db") as other:
        assert one.is_same(two)
        assert two.is_same(one)
        assert not one.is_same(other)
    with Ledger("memory:") as memory, Ledger("memory:") as another:
        assert memory.is_same(memory)
        assert not memory.is_same(another)
