"""SIGKILL at every write of a failover of agents: whatever reached the provider is charged once."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from forms_server import FormsServer, running_forms

from viaticum.budgets import Ledger

DRIVER = Path(__file__).resolve().parents[2] / "support" / "kill_agents.py"
CHARGED = ("posted", "dispatched", "unknown")
COST = 22_000  # 12 tokens read and 5 written
# Before and after each write of a call that fails and of one that answers.
MOMENTS = {"middleware": 2 * (3 + 3), "auto": 2 * (3 + 3), "code": 2 * (2 + 2)}


@pytest.fixture
def server() -> Iterator[FormsServer]:
    with running_forms() as server:
        server.away = frozenset({"away"})
        yield server


@pytest.mark.parametrize("how", list(MOMENTS))
def test_killed_at_every_write_of_a_failover(server: FormsServer, tmp_path: Path, how: str) -> None:
    command = [sys.executable, str(DRIVER), str(tmp_path), server.url, how]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    killed = int(done.stdout)
    assert killed >= MOMENTS[how]
    with Ledger(tmp_path / "ledger.db") as ledger:
        assert ledger.check() == []
        for number in range(killed + 1):
            name = f"w{number}"
            answered = sum(
                body["model"] == "small" and body["messages"][-1]["content"] == name
                for _, body in server.calls
            )
            holds = [hold for hold in ledger.holds(name) if hold.state in CHARGED]
            small = [hold for hold in holds if "small" in hold.usage]
            entries = ledger.entries(name)
            posts = Counter(entry.key for entry in entries if entry.kind == "post")
            assert set(posts.values()) <= {1}, "charged twice"
            assert answered <= len(small), "a call that was answered is not charged"
            assert len(holds) <= answered + 1, "the kill interrupts one call at most"
            assert ledger.budget(name).posted_nanousd == len(posts) * COST
            assert number < killed or (answered, len(holds)) == (1, 1)
        later = datetime.now(UTC) + timedelta(days=400)
        ledger.expire_leases(later)
        assert ledger.check() == []
        for number in range(killed + 1):
            assert all(hold.state != "dispatched" for hold in ledger.holds(f"w{number}"))
