"""The ledger under SIGKILL: at random moments, and before and after every statement that it runs.

A child is forked, killed and its ledger opened again: every invariant holds, nothing it was told is lost,
nothing is posted twice, and calls that were dispatched are listed as unknown once their lease is over.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from viaticum.budgets import Ledger

PROVE = bool(os.environ.get("VIATICUM_PROVE"))  # make prove: the full numbers, which take long

# Imports once and forks a child for each life: what is killed is the ledger's work, not the imports.
HEAD = """
import os, random, signal, sys, time, warnings
from datetime import UTC, datetime
from viaticum.budgets import Ledger
from viaticum.errors import HoldError
from viaticum.money import Price
from viaticum.types import TokenCount

PRICES = {"m": Price(0, 1_000_000)}  # one nano-dollar a token made
LATER = datetime(9000, 1, 1, tzinfo=UTC)
path, count = sys.argv[1], int(sys.argv[2])

def code(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def await_server():
    # A server ends the statement whose client was killed, and then its session.
    if path.startswith("postgresql"):
        import psycopg
        with psycopg.connect(path, autocommit=True) as shell:
            others = ("SELECT 1 FROM pg_stat_activity WHERE pid <> pg_backend_pid()"
                      " AND datname = current_database() AND backend_type = 'client backend'")
            while shell.execute(others).fetchone():
                time.sleep(0.01)

def scopes(ledger, root):
    if root not in ledger.chain_heads():  # a second life may find a limit that was changed
        ledger.create(root, limit_nanousd=10**6)
    ledger.create(f"{root} run", parent=root, limit_tokens=10**6)
    return f"{root} run"
"""

RANDOM_MOMENTS = """
def spend(root, tell):
    rng = random.Random(root)
    with Ledger(path) as ledger:
        leaf = scopes(ledger, root)
        os.write(tell, b"ready\\n")
        for number in range(10**6):
            key, most = f"{root} {number}", rng.randint(1, 40)
            def told(what, amount):
                os.write(tell, f"{key},{what},{amount}\\n".encode())
            ledger.reserve(leaf, key, {"m": TokenCount(0, most)}, PRICES)
            told("reserved", most)
            if rng.random() < 0.2:
                ledger.void(key)
                told("void", 0)
                continue
            ledger.dispatch(key)
            told("dispatched", most)
            used = rng.randint(0, most)
            ledger.settle(key, {"m": TokenCount(0, used)}, '"paid"')
            told("posted", used)

dice, seen = random.Random(7), {}
for life in range(count):
    root = f"life {life}"
    hear, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            spend(root, tell)
        finally:
            os._exit(2)
    os.close(tell)
    heard = os.read(hear, 6)  # b"ready\\n"
    time.sleep(dice.uniform(0, 0.03))
    os.kill(pid, signal.SIGKILL)
    while piece := os.read(hear, 1 << 16):
        heard += piece
    os.close(hear)
    assert code(pid) == -signal.SIGKILL
    await_server()
    told = {}
    for line in heard.decode().splitlines()[1:]:
        key, what, amount = line.split(",")
        told[key] = (what, int(amount))
    with Ledger(path) as ledger:
        found = ledger.check(root)
        assert found == [], (root, found)
        holds = {hold.key: hold for hold in ledger.holds(f"{root} run")}
        posts = [entry for entry in ledger.entries(f"{root} run") if entry.kind == "post"]
        posted = {entry.key: entry.nanousd for entry in posts}
        assert len(posts) == len(posted), "posted twice"
        for key, (what, amount) in told.items():
            state = holds[key].state
            after = {"posted": {"posted"}, "void": {"void"}, "dispatched": {"dispatched", "posted"},
                     "reserved": {"reserved", "dispatched", "void"}}[what]
            assert state in after, (key, what, state)
            if what == "posted":
                assert (posted[key], holds[key].result) == (amount, '"paid"')
        for hold in holds.values():
            seen[hold.state] = seen.get(hold.state, 0) + 1
        open_before = {key for key, hold in holds.items() if hold.state == "dispatched"}
        lapsed = {entry.key: entry.kind for entry in ledger.expire_leases(LATER)}
        assert {key for key, kind in lapsed.items() if kind == "unknown"} == open_before
        unknown = ledger.holds(f"{root} run", "unknown")
        assert {hold.key for hold in unknown} == open_before
        assert ledger.budget(root).held_nanousd == sum(hold.held_nanousd for hold in unknown)
print(count, seen)
"""

EVERY_STATEMENT = """
def work(root):
    # Every kind of operation, each safe to repeat: a second life goes on where the first was killed.
    with Ledger(path) as ledger:
        leaf = scopes(ledger, root)
        for name in ("posted", "void", "open", "late"):
            key = f"{root} {name}"
            lease = 1 if name == "late" else 3600
            hold = ledger.reserve(leaf, key, {"m": TokenCount(0, 20)}, PRICES, lease=lease)
            if name == "void":
                ledger.void(key)
            elif name in ("posted", "open"):
                if hold.state == "reserved":
                    ledger.dispatch(key)
                ledger.attach(key, '"paid"')
            if name == "posted":
                ledger.settle(key, {"m": TokenCount(0, 7)}, '"paid"')
        ledger.set_limit(root, limit_nanousd=2 * 10**6)
        ledger.pause(leaf)
        ledger.resume(leaf)

def die_at(moment):
    def pass_by():
        nonlocal moment
        if moment == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        moment -= 1
    def count(kind, name):
        method = getattr(kind, name)
        def counted(*args, **kwargs):
            pass_by()
            result = method(*args, **kwargs)
            pass_by()
            return result
        setattr(kind, name, counted)
    if path.startswith("postgresql"):
        import psycopg
        from viaticum.budgets import postgres_calls
        count(psycopg.Connection, "execute")
        count(postgres_calls, "_exchange")
    else:
        import sqlite_utils
        from viaticum.budgets.sqlite import SqliteRows
        count(sqlite_utils.Database, "execute")  # BEGIN, COMMIT and the migrations
        for name in ("execute", "stream", "append"):
            count(SqliteRows, name)

def child(root, before):
    pid = os.fork()
    if pid == 0:
        try:
            before()
            work(root)
            os._exit(0)
        finally:
            os._exit(2)
    return code(pid)

moment, killed, step = 0, 0, count
while True:
    root = f"moment {moment}"
    ended = child(root, lambda: die_at(moment))
    if ended == 0:
        break  # past the last statement
    assert ended == -signal.SIGKILL, (root, ended)
    with Ledger(path) as ledger:
        if any(budget.name == root for budget in ledger.budgets()):
            found = ledger.check(root)
            assert found == [], (root, found)
    assert child(root, lambda: None) == 0, root
    with Ledger(path) as ledger:
        assert ledger.check(root) == []
        holds = {hold.key.removeprefix(root + " "): hold.state for hold in ledger.holds(f"{root} run")}
        assert holds == {"posted": "posted", "void": "void", "open": "dispatched", "late": "reserved"}, holds
        posts = [entry.nanousd for entry in ledger.entries(f"{root} run") if entry.kind == "post"]
        assert posts == [7], posts
        assert ledger.budget(root).held_nanousd == 40
    killed += 1
    moment += step
print(killed, "moments")
"""


@pytest.mark.timeout(3000)
@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
@pytest.mark.parametrize("moments", [RANDOM_MOMENTS, EVERY_STATEMENT], ids=["random", "every statement"])
def test_what_was_killed_is_whole_when_it_is_opened_again(
    tmp_path: Path, kind: str, moments: str, request: pytest.FixtureRequest
) -> None:
    path = str(tmp_path / "ledger.db") if kind == "sqlite" else request.getfixturevalue("postgres")
    if moments is RANDOM_MOMENTS:
        count, least = (1000, 1000) if PROVE else (40, 40)
    else:
        count, least = (1, 150) if PROVE else (5, 30)  # every one, or every fifth
    command = [sys.executable, "-c", HEAD + moments, path, str(count)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=2900, check=False)
    assert done.returncode == 0, done.stderr
    print(kind, done.stdout.strip())
    assert int(done.stdout.split()[0]) >= least
    if moments is RANDOM_MOMENTS:
        assert "dispatched" in done.stdout, "no call was killed while it was dispatched"
    with Ledger(path) as ledger:
        assert ledger.check() == []
