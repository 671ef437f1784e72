"""A clock that ran ahead, and the command that lets a tree of budgets go on afterwards; on every store."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from ledger_calls import CALL, PRICES, USED, Clock
from typer.testing import CliRunner

from viaticum.budgets import Ledger, Window
from viaticum.cli import app
from viaticum.errors import BudgetExceeded


def spend(ledger: Ledger, key: str, budget: str = "run") -> None:
    ledger.reserve(budget, key, CALL, PRICES)
    ledger.settle(key, USED)


@pytest.mark.parametrize("window", [Window("day"), Window("day", rolling=True), Window("hour")])
def test_windows_move_again_after_a_clock_that_ran_ahead(
    ledger: Ledger, clock: Clock, window: Window
) -> None:
    ledger.create("org", limit_nanousd=10**6)
    ledger.create("run", parent="org", limit_nanousd=100, window=window)
    spend(ledger, "before")  # 25 of 100
    clock.set("2099-01-01T00:00:00")
    spend(ledger, "ahead")
    clock.set("2026-03-10T12:30:00")
    spend(ledger, "after")  # dated 2099 too: 50 of 100 in the window of then
    with pytest.raises(BudgetExceeded):
        ledger.reserve("run", "full", CALL, PRICES)
    clock.set("2026-03-20T12:00:00")
    with pytest.raises(BudgetExceeded):  # days later: it stands still
        ledger.reserve("run", "frozen", CALL, PRICES)

    entry = ledger.restart_clock("run", "the battery was flat")
    assert entry is not None
    assert (entry.kind, entry.budget, entry.at[:10]) == ("clock", "org", "2026-03-20")
    assert entry.note == {"was": "2099-01-01T00:00:00.000000+00:00", "reason": "the battery was flat"}
    assert ledger.restart_clock("org") is None
    assert ledger.check() == []
    assert ledger.budget("run").posted_nanousd == 50  # what was dated later counts as of now
    with pytest.raises(BudgetExceeded):
        ledger.reserve("run", "still full", CALL, PRICES)
    clock.wait(days=2)
    spend(ledger, "next")
    assert ledger.budget("run").posted_nanousd == 25
    assert ledger.check() == []


def test_leases_of_then_end(ledger: Ledger, clock: Clock) -> None:
    ledger.create("run", limit_nanousd=100)
    clock.set("2099-01-01T00:00:00")
    ledger.reserve("run", "never sent", CALL, PRICES, lease=60)
    clock.set("2026-03-10T12:00:00")
    assert ledger.expire_leases() == []
    ledger.restart_clock("run")
    assert ledger.check() == []
    clock.wait(seconds=61)
    assert [entry.key for entry in ledger.expire_leases()] == ["never sent"]
    assert ledger.check() == []


def test_a_new_window_after_the_repair_counts_what_was_dated_later(ledger: Ledger, clock: Clock) -> None:
    ledger.create("run", limit_nanousd=100)
    clock.set("2099-01-01T00:00:00")
    spend(ledger, "ahead")
    clock.set("2026-03-10T12:00:00")
    ledger.restart_clock("run")
    assert ledger.set_limit("run", window=Window("day")).posted_nanousd == 25
    assert ledger.check() == []
    clock.wait(days=1)
    assert ledger.budget("run").posted_nanousd == 0


def test_a_clock_that_ran_ahead_is_told_once(
    ledger: Ledger, clock: Clock, caplog: pytest.LogCaptureFixture, request: pytest.FixtureRequest
) -> None:
    name = request.node.name  # told once for each budget and process
    ledger.create(name, limit_nanousd=1000)
    clock.set("2026-03-10T12:00:01")
    spend(ledger, "a", name)
    clock.set("2026-03-10T12:00:00")  # as two hosts differ
    with caplog.at_level(logging.WARNING, "viaticum"):
        spend(ledger, "b", name)
        assert caplog.records == []
        clock.set("2099-01-01T00:00:00")
        spend(ledger, "c", name)
        clock.set("2026-03-10T12:00:00")
        spend(ledger, "d", name)
        spend(ledger, "e", name)
    (record,) = caplog.records
    assert f"viaticum budget clock {name}" in record.getMessage()


def test_the_command_repairs_and_verify_agrees(tmp_path: Path) -> None:
    where = ["--ledger", str(tmp_path / "ledger.db")]
    ahead = Clock("2099-01-01T00:00:00")
    with Ledger(where[1], clock=ahead) as ledger:
        ledger.create("run", limit_nanousd=100, window=Window("day"))
        spend(ledger, "ahead")
    run = CliRunner().invoke
    result = run(app, ["budget", "clock", "run", "--reason", "flat battery", *where])
    assert result.exit_code == 0, result.output
    assert "it had reached 2099-01-01" in result.stdout
    assert "nothing to do" in run(app, ["budget", "clock", "run", *where]).stdout
    assert run(app, ["budget", "verify", *where]).exit_code == 0
    assert "flat battery" in run(app, ["budget", "entries", "--kind", "clock", "--json", *where]).stdout
