"""The ledger under threads, processes, forks and kills. Workers run as `python -c` scripts."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from viaticum.budgets import Ledger

PROVE = bool(os.environ.get("VIATICUM_PROVE"))  # make prove: the full numbers, which take long

HEAD = """
import os, random, sys, threading
from viaticum.budgets import Ledger
from viaticum.errors import BudgetExceeded
from viaticum.money import Price
from viaticum.types import TokenCount

PRICES = {"m": Price(0, 1_000_000)}  # one nano-dollar a token made
path, name = sys.argv[1:3]
"""


def start(code: str, *args: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "error", "-c", HEAD + textwrap.dedent(code), *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


# org > left, right > leaves; each process spends in all leaves. Every level runs short before it is over.
LIMITS = {"org": 4000, "left": 2500, "right": 2500, "l1": 1500, "l2": 1500, "r1": 1500, "r2": 1500}
PARENTS = {"left": "org", "right": "org", "l1": "left", "l2": "left", "r1": "right", "r2": "right"}

RACE = """
import time
errors, posts, attempts, slowest = [], [], [0] * threads, [0.0] * threads

def spend(number):
    rng = random.Random(f"{name} {number}")
    try:
        for attempt in range(each):
            key = f"{name} {number} {attempt}"
            most, leaf = rng.randint(1, 40), rng.choice(["l1", "l2", "r1", "r2"])
            attempts[number] += 1
            began = time.perf_counter()
            try:
                ledger.reserve(leaf, key, {"m": TokenCount(0, most)}, PRICES)
            except BudgetExceeded:
                continue
            finally:
                slowest[number] = max(slowest[number], time.perf_counter() - began)
            if rng.random() < 0.2:
                ledger.void(key)
                continue
            ledger.dispatch(key)
            used = rng.randint(1, most)
            ledger.settle(key, {"m": TokenCount(0, used)})
            posts.append(used)
    except BaseException as error:
        errors.append(repr(error))

with Ledger(path) as ledger:
    workers = [threading.Thread(target=spend, args=(number,)) for number in range(threads)]
    for worker in workers: worker.start()
    for worker in workers: worker.join()
assert not errors, errors
print(sum(attempts), len(posts), sum(posts), f"{max(slowest):.3f}")
"""


@pytest.mark.timeout(3000)
@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
def test_processes_and_threads_racing_for_the_last_cents_never_overspend(
    tmp_path: Path, kind: str, request: pytest.FixtureRequest
) -> None:
    """No overspending at any level at any moment, no posting lost or doubled, no error but a refusal."""
    processes, threads, each = (16, 8, 1563) if PROVE else (4, 4, 60)
    path = str(tmp_path / "ledger.db") if kind == "sqlite" else request.getfixturevalue("postgres")
    limits = {name: limit * (10 if PROVE else 1) for name, limit in LIMITS.items()}
    with Ledger(path) as ledger:
        for name, limit in limits.items():
            ledger.create(name, limit_nanousd=limit, parent=PARENTS.get(name))
        head = f"threads, each = {threads}, {each}\n"
        workers = [start(head + RACE, path, f"process {number}") for number in range(processes)]
        looks = 0
        while any(worker.poll() is None for worker in workers):
            for budget in ledger.budgets():  # one moment of all of them
                assert budget.posted_nanousd + budget.held_nanousd <= limits[budget.name], budget
            looks += 1
            time.sleep(0.002)
        outputs = [worker.communicate(timeout=240) for worker in workers]
        assert [worker.returncode for worker in workers] == [0] * processes, [error for _, error in outputs]
        told = [output.split() for output, _ in outputs]
        attempts, posts, spent = (sum(int(row[column]) for row in told) for column in range(3))
        assert attempts == processes * threads * each
        assert looks > 5
        org = ledger.budget("org")
        assert (org.posted_nanousd, org.held_nanousd) == (spent, 0)
        assert spent > limits["org"] - 40, "the race was not for the last cents"
        entries = [entry for entry in ledger.entries() if entry.kind == "post"]
        assert len(entries) == len({entry.key for entry in entries}) == posts
        assert ledger.check() == []  # every limit held after every entry, too
        slowest = max(float(row[3]) for row in told)
        print(f"{kind}: {attempts} attempts, {posts} posted, {looks} looks, slowest reserve {slowest} s")


SPENDER = """
rng = random.Random(name)
with Ledger(path) as ledger:
    ledger.create("demo", limit_nanousd=10**9)
    print("ready", flush=True)
    for number in range(10**6):
        key, most = f"{name} {number}", rng.randint(1, 40)
        ledger.reserve("demo", key, {"m": TokenCount(0, most)}, PRICES)
        print("reserved", key, most, flush=True)
        if rng.random() < 0.2:
            ledger.void(key)
            print("void", key, 0, flush=True)
        else:
            used = rng.randint(0, most)
            ledger.settle(key, {"m": TokenCount(0, used)}, '"paid"')
            print("posted", key, used, flush=True)
"""


def test_a_killed_process_loses_nothing_it_was_told_and_doubles_nothing(tmp_path: Path) -> None:
    path, rng = tmp_path / "ledger.db", random.Random(7)
    told: dict[str, tuple[str, int]] = {}
    for number in range(8):
        worker = start(SPENDER, path, f"life {number}")
        assert worker.stdout is not None
        assert worker.stdout.readline() == "ready\n"
        heard = "".join(worker.stdout.readline() for _ in range(rng.randint(0, 12)))
        time.sleep(rng.uniform(0, 0.005))
        worker.kill()
        output, _ = worker.communicate(timeout=240)
        for line in (heard + output).splitlines(keepends=True):
            if line.endswith("\n"):
                state, rest = line.split(" ", 1)
                key, amount = rest.rsplit(" ", 1)
                told[key] = (state, int(amount))
        with Ledger(path) as ledger:
            assert ledger.check() == []
            holds = {hold.key: hold for hold in ledger.holds("demo")}
            posted = {entry.key: entry.nanousd for entry in ledger.entries("demo") if entry.kind == "post"}
            assert ledger.budget("demo").posted_nanousd == sum(posted.values())
            for key, (state, amount) in told.items():
                if state == "posted":
                    assert (posted[key], holds[key].result) == (amount, '"paid"')
                elif state == "void":
                    assert holds[key].state == "void"
                else:
                    assert holds[key].held_nanousd == amount
    assert {state for state, _ in told.values()} >= {"posted", "void"}


MAKER = """
print("ready", flush=True)
for number in range(10**6):
    Ledger(f"{path}.{number}").close()
"""


def test_a_process_killed_while_it_makes_a_ledger_leaves_one_that_opens(tmp_path: Path) -> None:
    rng = random.Random(11)
    for number in range(4):
        worker = start(MAKER, tmp_path / f"{number}", "maker")
        assert worker.stdout is not None
        worker.stdout.readline()
        while worker.poll() is None and not list(tmp_path.glob(f"{number}.*")):
            time.sleep(0.001)
        time.sleep(rng.uniform(0.0, 0.1))
        worker.kill()
        worker.communicate(timeout=240)
    made = [file for file in tmp_path.iterdir() if file.suffix[1:].isdigit()]
    assert made
    for file in made:
        with Ledger(file) as ledger:
            ledger.create("demo", limit_tokens=1)
            assert ledger.check() == []


FORKS = """
def spend(who, until):
    number = 0
    while not until() and number < 10_000:
        key = f"{who} {number}"
        ledger.reserve("demo", key, {"m": TokenCount(0, 2)}, PRICES)
        ledger.settle(key, {"m": TokenCount(0, 1)})
        number += 1
    return number

with Ledger(path) as ledger:
    stop = threading.Event()
    counts = []
    threads = [
        threading.Thread(target=lambda n=n: counts.append(spend(f"thread {n}", stop.is_set)))
        for n in range(3)
    ]
    for thread in threads: thread.start()
    for number in range(10):
        child = os.fork()
        if child == 0:
            end = iter([False] * 5)
            os._exit(0 if spend(f"child {number}", lambda: next(end, True)) == 5 else 1)
        assert os.waitpid(child, 0)[1] == 0
    stop.set()
    for thread in threads: thread.join()
    assert ledger.budget("demo").posted_nanousd == sum(counts) + 50, counts
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_ledger_lives_through_forks_with_busy_threads(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    with Ledger(path) as ledger:
        ledger.create("demo", limit_nanousd=10**9)
        # From Python 3.12 on, forking with threads warns; it is the caller's choice, and tested here.
        worker = start(
            "import warnings; warnings.simplefilter('ignore', DeprecationWarning)\n" + FORKS, path, "forks"
        )
        _, error = worker.communicate(timeout=240)
        assert worker.returncode == 0, error
        assert ledger.check() == []
