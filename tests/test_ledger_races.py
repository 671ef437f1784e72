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


RACE = """
errors, granted = [], [0] * 8

def spend(number):
    rng = random.Random(f"{name} {number}")
    try:
        for attempt in range(10_000):
            key, most = f"{name} {number} {attempt}", rng.randint(1, 40)
            try:
                ledger.reserve("demo", key, {"m": TokenCount(0, most)}, PRICES)
            except BudgetExceeded:
                if most == 1:
                    return
                continue
            if rng.random() < 0.2:
                ledger.void(key)
            else:
                used = rng.randint(1, most)
                ledger.settle(key, {"m": TokenCount(0, used)})
                granted[number] += used
    except BaseException as error:
        errors.append(repr(error))

with Ledger(path) as ledger:
    threads = [threading.Thread(target=spend, args=(number,)) for number in range(8)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
assert not errors, errors
print(sum(granted))
"""


def test_threads_and_processes_racing_for_the_last_cents_never_overspend(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    with Ledger(path) as ledger:
        ledger.create("demo", limit_nanousd=4000)
        workers = [start(RACE, path, f"process {number}") for number in range(4)]
        looks = 0
        while any(worker.poll() is None for worker in workers):
            budget = ledger.budget("demo")
            assert budget.posted_nanousd + budget.held_nanousd <= 4000
            looks += 1
            time.sleep(0.005)
        outputs = [worker.communicate(timeout=60) for worker in workers]
        assert [worker.returncode for worker in workers] == [0] * 4, [error for _, error in outputs]
        spent = sum(int(output.split()[-1]) for output, _ in outputs)
        assert looks > 5
        assert ledger.budget("demo").posted_nanousd == spent == 4000
        assert ledger.budget("demo").held_nanousd == 0
        assert ledger.check() == []


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
        output, _ = worker.communicate(timeout=60)
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
        time.sleep(rng.uniform(0.01, 0.1))
        worker.kill()
        worker.communicate(timeout=60)
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
        threading.Thread(target=lambda n=n: counts.append(spend(f"thread {n}", stop.is_set))) for n in range(3)
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
        _, error = worker.communicate(timeout=60)
        assert worker.returncode == 0, error
        assert ledger.check() == []
