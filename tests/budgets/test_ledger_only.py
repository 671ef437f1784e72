"""Scopes that pay for models with some labels alone: in every store, for one call and for many."""

from __future__ import annotations

from pathlib import Path

import pytest
from altered_ledgers import alter
from ledger_calls import CALL, PRICES, USED

from viaticum.budgets import Claim, Hold, Ledger
from viaticum.errors import BudgetError, InputError, ModelNotAllowed
from viaticum.residency import ANY_LABEL, Residency


@pytest.fixture(params=["sqlite", "postgres"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "ledger.db") if request.param == "sqlite" else request.getfixturevalue("postgres")


def opened(ledger: Ledger) -> Ledger:
    """org (local or eu) > run (eu or us), and a scope of another tree without a restriction."""
    ledger.create("org", limit_nanousd=1000, only=["local", "EU"])
    ledger.create("run", parent="org", only="eu,us")
    ledger.create("free", limit_nanousd=1000)
    return ledger


@pytest.mark.parametrize(
    ("scope", "labels", "fits"),
    [
        ("org", {"local"}, True),
        ("org", {"us"}, False),
        ("org", (), False),
        ("run", {"local"}, False),
        ("run", {"us"}, False),
        ("run", {"eu", "x"}, True),
        ("run", ANY_LABEL, True),
        ("free", (), True),
    ],
)
def test_a_call_has_to_be_allowed_by_all_scopes_above(
    ledger: Ledger, scope: str, labels: frozenset[str], fits: bool
) -> None:
    opened(ledger)
    if fits:
        ledger.reserve(scope, "a", CALL, PRICES, labels=labels)
        ledger.settle("a", USED)
        assert ledger.budget(scope).posted_nanousd == 25
    else:
        with pytest.raises(ModelNotAllowed, match="eu"):
            ledger.reserve(scope, "a", CALL, PRICES, labels=labels)
        assert ledger.hold("a") is None
    assert ledger.check() == []


def test_of_many_calls_those_that_are_not_allowed_hold_nothing(ledger: Ledger) -> None:
    opened(ledger)
    claims = [
        Claim(f"k{n}", CALL, PRICES, labels=labels) for n, labels in enumerate((["eu"], ["us"], ["eu"]))
    ]
    first, second, third = ledger.reserve_many("run", claims, dispatch=True)
    assert isinstance(first, Hold)
    assert isinstance(second, ModelNotAllowed)
    assert isinstance(third, Hold)
    assert ledger.budget("org").held_nanousd == 140


def test_the_calls_of_a_request_are_those_of_its_scope(ledger: Ledger) -> None:
    opened(ledger)
    with ledger.request_limit("request", parent="run", limit_nanousd=500):
        assert ledger.residency("request") == Residency.of(["local", "eu"], ["eu", "us"])
        with pytest.raises(ModelNotAllowed):
            ledger.reserve("request", "a", CALL, PRICES, labels=["us"])
        ledger.reserve("request", "b", CALL, PRICES, labels=["eu"])
    ledger.void("b")


def test_a_restriction_stays_as_it_was_made(ledger: Ledger) -> None:
    opened(ledger)
    assert ledger.create("org", limit_nanousd=1000, only=["eu", "local"]).only == ("eu", "local")
    for only in (None, "eu", ["eu", "local", "us"]):
        with pytest.raises(BudgetError, match="exists for models labelled eu or local"):
            ledger.create("org", limit_nanousd=1000, only=only)
    with pytest.raises(BudgetError, match="labelled anyhow"):
        ledger.create("free", limit_nanousd=1000, only="eu")
    with pytest.raises(InputError, match="only has labels"):
        ledger.create("bad", limit_nanousd=1000, only="e u")
    ledger.set_limit("org", limit_nanousd=2000)
    ledger.pause("org")
    ledger.resume("org")
    assert ledger.budget("org").only == ("eu", "local")
    assert ledger.check() == []


def test_another_process_finds_it(address: str) -> None:
    with Ledger(address) as ledger:
        opened(ledger)
    with Ledger(address) as ledger:
        assert ledger.residency("run") == Residency.of(["local", "eu"], ["eu", "us"])
        for _ in range(2):  # the second call of a process takes the short way in Postgres
            with pytest.raises(ModelNotAllowed):
                ledger.reserve("run", "a", CALL, PRICES, labels=["local"])
        ledger.reserve("run", "b", CALL, PRICES, labels=["eu"])
        ledger.settle("b", USED)
        assert ledger.check() == []


def test_one_that_was_altered_in_the_file_is_found(address: str, tmp_path: Path) -> None:
    with Ledger(address) as ledger:
        opened(ledger)
    alter(address, "UPDATE budgets SET only_labels = 'us' WHERE name = 'run'")
    with Ledger(address) as ledger:
        found = ledger.check()
    assert len(found) == 1
    assert "where its data may go differs from its first entry: budget 'run'" in found[0]
