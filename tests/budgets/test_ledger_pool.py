"""The ledger in Postgres behind PgBouncer in transaction mode, and over connections that are cut."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import suppress

import pgbouncer
import psycopg
import pytest
from cutting_proxy import cutting_proxy
from ledger_calls import CALL, PRICES, USED, Clock
from psycopg.conninfo import conninfo_to_dict

from viaticum.agents.workflow.checkpoints import open_checkpoints
from viaticum.budgets import Claim, Ledger, Settlement, Window
from viaticum.errors import BudgetExceeded, HoldError, InputError, LedgerError

THREADS, CALLS = 4, 6


@pytest.fixture
def pool(postgres: str) -> Iterator[str]:
    """The address of the test's database behind two server connections, which all clients share."""
    assert pgbouncer.find() is not None, "no PgBouncer: python tests/support/pgbouncer.py fetches one"
    with pgbouncer.running_pool(postgres, default_pool_size=2) as address:
        yield address


def in_threads(work: Callable[[int], None]) -> None:
    errors: list[BaseException] = []

    def runs(number: int) -> None:
        try:
            work(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=runs, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


def spend(ledger: Ledger, name: str) -> None:
    """Calls of each kind: 25 nano-dollars for all but one."""
    for number in range(CALLS):
        key = f"{name}/{number}"
        ledger.reserve("run", key, CALL, PRICES, tags={"strategy": "it's 100% ?"}, dispatch=number % 2 == 0)
        if number % 3 == 0:
            ledger.dispatch(key)
        if number == 5:
            ledger.void(key)
        else:
            ledger.settle(key, USED, '"\\u0000 said"' if number % 4 == 0 else None)


def test_every_operation_works_through_a_pool_in_transaction_mode(pool: str, postgres: str) -> None:
    with Ledger(pool) as ledger:
        ledger.create("org", limit_nanousd=10**6, window=Window("day"))
        ledger.create("run", parent="org", limit_tokens=10**6)

    def work(number: int) -> None:
        with Ledger(pool) as ledger:
            spend(ledger, f"thread {number}")
            claims = [Claim(f"{number} many {each}", CALL, PRICES) for each in range(5)]
            ledger.reserve_many("run", claims)
            ledger.settle_many([Settlement(claim.key, USED) for claim in claims])
            assert len(ledger.find([claim.key for claim in claims])) == 5
            assert ledger.entries("run")
            ledger.set_limit("run", limit_tokens=10**6 + number)
            ledger.expire_leases()

    in_threads(work)
    with Ledger(pool) as ledger:
        assert ledger.budget("org").posted_nanousd == THREADS * (CALLS - 1 + 5) * 25
        assert ledger.check() == []
    with psycopg.connect(pool, autocommit=True) as shell:  # nothing stays in the sessions that others get
        assert shell.execute("SHOW search_path").fetchone() == ('"$user", public',)
        assert shell.execute("SHOW synchronous_commit").fetchone() == ("on",)
    with Ledger(postgres) as ledger:
        assert ledger.check() == []


def test_checkpoints_work_through_a_pool(pool: str) -> None:
    checkpoint = {
        "v": 4,
        "id": "1",
        "ts": "",
        "channel_values": {"text": "a\0b"},
        "channel_versions": {"text": 1},
    }

    def work(number: int) -> None:
        with open_checkpoints(pool, 2) as saver:
            for thread in range(3):
                config = {"configurable": {"thread_id": f"{number}/{thread}", "checkpoint_ns": ""}}
                saver.put(config, checkpoint, {}, {"text": 1})  # type: ignore[arg-type]
                found = saver.get_tuple(config)  # type: ignore[arg-type]
                assert found is not None
                assert found.checkpoint["channel_values"] == {"text": "a\ufffdb"}

    in_threads(work)


def test_a_pool_and_a_server_that_drop_connections_lose_nothing(pool: str, postgres: str) -> None:
    stop = threading.Event()

    def drops() -> None:
        """Again and again, each time once an entry was made since: a slow machine has a chance, too."""
        made = -1
        with psycopg.connect(postgres, autocommit=True) as shell:
            while not stop.wait(0.1):
                (found,) = shell.execute("SELECT count(*) FROM viaticum.entries").fetchone()  # type: ignore[misc]
                if found > made:
                    made = found
                    shell.execute(
                        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                        " WHERE pid <> pg_backend_pid() AND datname = current_database()"
                    )

    with Ledger(pool) as ledger:
        ledger.create("run", limit_nanousd=10**6)
    dropping = threading.Thread(target=drops)
    dropping.start()
    try:
        in_threads(lambda number: _spend_through(pool, number))
    finally:
        stop.set()
        dropping.join()
    with Ledger(postgres) as ledger:
        assert ledger.budget("run").posted_nanousd == THREADS * (CALLS - 1) * 25
        assert ledger.check() == []


def _spend_through(address: str, number: int) -> None:
    with _opened(address) as ledger:
        spend(ledger, f"thread {number}")


def _opened(address: str) -> Ledger:
    """Opening tells at once that a server is away; the steps of calls try again."""
    for _ in range(20):
        with suppress(LedgerError):
            return Ledger(address)
    raise AssertionError("it does not open")


def through(address: str, port: int) -> str:
    """The same database at another port."""
    return address.replace(str(conninfo_to_dict(address)["port"]), str(port))


@pytest.mark.parametrize("seed", range(2))
def test_connections_that_are_cut_anywhere_charge_each_call_once(postgres: str, seed: int) -> None:
    """A cut before a statement, or between the commit and its reply: the call is found by its key."""
    with Ledger(postgres) as ledger:
        ledger.create("run", limit_nanousd=10**6)
    port = int(conninfo_to_dict(postgres)["port"])
    with cutting_proxy(port, 0.02, seed) as cut:
        in_threads(lambda number: _spend_through(through(postgres, cut), number))
    with Ledger(postgres) as ledger:
        assert ledger.budget("run").posted_nanousd == THREADS * (CALLS - 1) * 25
        assert ledger.check() == []


def test_a_server_that_stays_away_is_told_in_our_words(postgres: str) -> None:
    with Ledger(postgres) as ledger:
        ledger.create("run", limit_nanousd=10**6)
    port = int(conninfo_to_dict(postgres)["port"])
    with cutting_proxy(port, 0.0) as cut:
        away = Ledger(through(postgres, cut))
        away.reserve("run", "a", CALL, PRICES)
        saver = open_checkpoints(through(postgres, cut), 2)
        saver.__enter__()
    with psycopg.connect(postgres, autocommit=True) as shell:
        shell.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()"
            " AND datname = current_database()"
        )
    with pytest.raises(LedgerError, match="cannot be reached"):
        away.settle("a", USED)
    with pytest.raises(LedgerError, match="cannot be reached"):
        away.budgets()
    away.close()


@pytest.mark.parametrize("bad", ["a\0b", "\ud800", "", "line\nbreak"])
def test_texts_that_a_database_refuses_are_told_in_our_words(ledger: Ledger, bad: str) -> None:
    """NUL and lone surrogates: psycopg raises errors of its own for them, and for a whole batch."""
    ledger.create("run", limit_nanousd=10**6)
    ledger.reserve("run", "good", CALL, PRICES)
    assert ledger.find(["good", bad]).keys() == {"good"}
    refused, held = ledger.reserve_many("run", [Claim(bad, CALL, PRICES), Claim("second", CALL, PRICES)])
    assert isinstance(refused, InputError)
    assert not isinstance(held, Exception)
    wrong, entry = ledger.settle_many([Settlement(bad, USED), Settlement("second", USED)])
    assert isinstance(wrong, (InputError, HoldError))
    assert not isinstance(entry, Exception)
    for call in (
        lambda: ledger.hold(bad),
        lambda: ledger.settle(bad, USED),
        lambda: ledger.dispatch(bad),
        lambda: ledger.void(bad),
        lambda: ledger.attach(bad, "1"),
        lambda: ledger.entries(key=bad),
        lambda: ledger.budget(bad),
        lambda: ledger.entries(bad),
        lambda: ledger.create(bad, limit_tokens=1),
        lambda: ledger.reserve(bad, "key", CALL, PRICES),
        lambda: ledger.reserve("run", "key", CALL, PRICES, tags={"tag": bad}),
    ):
        with pytest.raises((InputError, HoldError)):
            call()
    if bad != "\ud800":
        ledger.pause("run", bad)
        ledger.resume("run")
    ledger.settle("good", USED, '"\\u0000 and \\ud800"')
    found = ledger.hold("good")
    assert found is not None
    assert found.result == '"\\u0000 and \\ud800"'


def test_waiting_threads_go_together_and_each_gets_its_own_answer(postgres: str) -> None:
    with Ledger(postgres) as ledger:
        ledger.create("run", limit_nanousd=70 * 8)
        ledger.reserve("run", "first", CALL, PRICES)
        ledger.void("first")
        held: list[str] = []
        refused: list[BudgetExceeded] = []

        def work(number: int) -> None:
            for each in range(4):
                key = f"{number}/{each}"
                try:
                    held.append(ledger.reserve("run", key, CALL, PRICES).key)
                    assert ledger.reserve("run", key, CALL, PRICES).key == key
                except BudgetExceeded as error:
                    refused.append(error)

        in_threads(work)
        assert (len(held), len(refused)) == (8, THREADS * 4 - 8)
        assert all(error.left < 70 for error in refused)
        in_threads(lambda number: [ledger.settle(key, USED) for key in held[number::THREADS]] and None)
        assert ledger.budget("run").posted_nanousd == 8 * 25
        assert ledger.check() == []


def test_one_round_trip_a_step_leaves_what_the_long_way_leaves(postgres: str) -> None:
    """The same calls on Postgres and in memory: the same budgets, holds, and entries with their hashes."""
    clock = Clock()
    found = []
    for where in (postgres, "memory:"):
        with Ledger(where, clock=clock) as ledger:
            ledger.create("org", limit_nanousd=10**6, window=Window("day", rolling=True))
            ledger.create("run", parent="org")
            spend(ledger, "call")
            assert ledger.check() == []
            entries = [entry.with_id(0) for entry in ledger.entries()]
            found.append((entries, ledger.holds(), ledger.budgets()))
    assert found[0] == found[1]
