"""A ledger file that an earlier commit wrote opens, adds up, and goes on.

`tests/data/ledger_v2.sql` is the dump of a file that commit 0ee2f32 wrote, with a clock of its own: scopes
below scopes, calendar and rolling windows, and a hold in every state, one of them dispatched and still open.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import pytest

from viaticum.budgets import Ledger, Window, schema
from viaticum.errors import HoldError
from viaticum.types import TokenCount

DUMP = Path(__file__).parents[1] / "data" / "ledger_v2.sql"
LAST_WRITE = datetime(2026, 11, 29, 8, 2, 27, tzinfo=UTC)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "ledger.db"
    with closing(sqlite3.connect(file)) as old:
        old.executescript(DUMP.read_text())
    return file


@pytest.fixture
def ledger(path: Path) -> Iterator[Ledger]:
    with Ledger(path, clock=lambda: LAST_WRITE) as opened:
        yield opened


def test_its_tables_are_those_of_a_new_file(path: Path, tmp_path: Path) -> None:
    for each in (path, tmp_path / "new.db"):
        Ledger(each).close()
    with closing(sqlite3.connect(path)) as old, closing(sqlite3.connect(tmp_path / "new.db")) as new:
        tables = "SELECT type, name, tbl_name, trim(sql, char(10)) FROM sqlite_schema ORDER BY type, name"
        assert old.execute(tables).fetchall() == new.execute(tables).fetchall()
        assert old.execute("PRAGMA user_version").fetchone() == (schema.VERSION,)


def test_it_checks_clean_and_keeps_every_figure(ledger: Ledger) -> None:
    assert ledger.check() == []
    figures = {
        budget.name: (budget.posted_nanousd, budget.posted_tokens, budget.held_nanousd, budget.held_tokens)
        for budget in ledger.budgets()
    }
    assert figures == {
        "closed": (0, 0, 0, 0),
        "other": (2, 390, 0, 0),
        "team": (738, 155, 2941, 380),
        "team/day": (0, 0, 2941, 380),
        "team/day/job": (0, 0, 2941, 380),
    }
    job = ledger.budget("team/day/job")
    assert (job.parent, job.window, job.state) == ("team/day", Window("hour", rolling=True), "open")
    assert (job.earlier_nanousd, job.earlier_tokens) == (737, 120)
    day = ledger.budget("team/day")
    assert (day.limit_nanousd, day.window) == (4_000_000, Window("day", zone="Europe/Berlin"))
    assert (day.earlier_nanousd, day.earlier_tokens) == (738, 155)
    assert ledger.budget("closed").state == "closed"
    assert {hold.key: (hold.state, hold.held_nanousd, hold.held_tokens) for hold in ledger.holds()} == {
        "posted": ("posted", 1300, 150),
        "overrun": ("posted", 1, 20),
        "void": ("void", 131, 35),
        "expired": ("expired", 1, 20),
        "unknown": ("unknown", 260, 30),
        "one": ("posted", 1, 150),
        "two": ("posted", 1, 250),
        "reserved": ("reserved", 1, 10),
        "open": ("dispatched", 2680, 340),
    }
    assert ledger.find(["posted", "reserved"])["posted"].result == '{"text": "72"}'
    assert ledger.find(["posted", "reserved"])["reserved"].result == '"early"'
    assert len(ledger.entries()) == 32


def test_the_chain_ends_where_it_ended(ledger: Ledger) -> None:
    assert ledger.chain_heads() == {
        "closed": (2, "f59535c16103514ec08cb1e1eefbeac054c01779df8501448678f708c76dd730"),
        "other": (10, "bc63ea00cc96e3a1ed0bb823150d8e287657ad3b96811c9efe98227b78d9d1fa"),
        "team": (20, "bc1e5de3e38aef92d25f5ea3ba3d14f330d0c90b1a3b3c5988deec15f8bcdb5e"),
    }


def test_its_open_holds_are_settled_and_voided(ledger: Ledger) -> None:
    entry = ledger.settle("open", {"large": TokenCount(250, 30)})
    assert (entry.nanousd, entry.tokens, entry.overrun) == (250 * 6 + 30 * 22, 280, 0)  # its second tier
    assert ledger.settle("unknown", None).nanousd == 20 * 3 + 10 * 15  # nothing is known to be thought
    assert ledger.void("reserved").nanousd == 1
    with pytest.raises(HoldError, match="expired"):
        ledger.settle("expired", {"small": TokenCount(1, 1)})
    team, job = ledger.budget("team"), ledger.budget("team/day/job")
    assert (team.posted_nanousd, team.held_nanousd, team.held_tokens) == (738 + 2160 + 210, 0, 0)
    assert (job.posted_nanousd, job.posted_tokens) == (2160 + 210, 280 + 30)
    assert ledger.check() == []
