"""What every back end does alike, what bubblewrap adds, and when `auto` goes from one to the other."""

from __future__ import annotations

import asyncio
import json
import os
import platform
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from typer.testing import CliRunner

from viaticum.cli import app
from viaticum.errors import InputError, SandboxError, UnknownName
from viaticum.strategies.programs.output import read_output
from viaticum.strategies.sandbox import (
    BACKENDS,
    Limits,
    Sandbox,
    auto,
    bubblewrap,
    open_sandbox,
    seccomp,
    worker,
)
from viaticum.strategies.sandbox.auto import AutoSandbox, lacks_feature
from viaticum.strategies.sandbox.bubblewrap import BubblewrapSandbox

OPEN: dict[str, Callable[[], Sandbox]] = {
    "monty": lambda: open_sandbox("monty", workers=2),
    "bwrap": lambda: open_sandbox("bwrap", workers=2),
    "auto": lambda: open_sandbox("auto", workers=2),
    "subprocess": lambda: open_sandbox("subprocess", unsafe=True),
}


@pytest.fixture(scope="module")
def opened() -> Iterator[dict[str, Sandbox]]:
    sandboxes = {name: start() for name, start in OPEN.items()}
    yield sandboxes
    for sandbox in sandboxes.values():
        sandbox.close()


@pytest.fixture(params=OPEN)
def sandbox(request: pytest.FixtureRequest, opened: dict[str, Sandbox]) -> Sandbox:
    return opened[request.param]


@pytest.fixture
def bwrap(opened: dict[str, Sandbox]) -> BubblewrapSandbox:
    found = opened["bwrap"]
    assert isinstance(found, BubblewrapSandbox)
    return found


@pytest.mark.parametrize(
    ("program", "stdout"),
    [
        ("print(1)\nprint(2)", "1\n2\n"),
        ("total = 5\ntotal * 2", "10\n"),
        ("x = 1; [x,\n 2]", "[1, 2]\n"),
        ("'é'; 'ü' + 'x'", "üx\n"),
        ("def solution():\n    return 7\nsolution()", "7\n"),
        ("print('shown')\n5", "shown\n"),
        ("if True:\r\n    print(3)\r\n", "3\n"),
        ("import math, datetime\nmath.ceil(2.1) + datetime.date(2024, 3, 1).day", "4\n"),
        ("None", ""),
        ("x = 5", ""),
        ("", ""),
        ("print(__name__)", "__main__\n"),
    ],
)
def test_runs(sandbox: Sandbox, program: str, stdout: str) -> None:
    result = sandbox.run(program, Limits(seconds=20.0))
    assert (result.ok, result.stdout, result.error) == (True, stdout, "")
    assert result.backend == ("monty" if sandbox.backend == "auto" else sandbox.backend)
    assert result.seconds > 0


@pytest.mark.parametrize(
    "program", ["print('\\ud83d')", "'\\ud83d'", "print(repr('\\ud83d'))", "raise ValueError('\\ud83d')"]
)
def test_half_a_character_of_a_program_is_no_text(sandbox: Sandbox, program: str) -> None:
    result = sandbox.run(program, Limits(seconds=20.0))
    f"{result.stdout}{result.error}".encode()
    answer = read_output(result.stdout, program, "text")
    assert answer is None or answer.encode()


@pytest.mark.parametrize(
    ("program", "error"),
    [
        ("1 / 0", "the program raised ZeroDivisionError: division by zero"),
        ("print(apples)", "the program raised NameError: name 'apples' is not defined"),
        ("raise NotImplementedError('mine')", "the program raised NotImplementedError: mine"),
        ("import nothing_of_this_name", "No module named 'nothing_of_this_name'"),
        ("x = (", "the program is not valid Python: "),
        ("a = 'x' * 10**10", "the program needed more than 64 MiB of memory"),
        ("print('z' * 10**6)", "the program printed more than 16384 bytes"),
        ("def f(n):\n    return f(n + 1)\nf(0)", "RecursionError: maximum recursion depth exceeded"),
    ],
)
def test_says_what_went_wrong(sandbox: Sandbox, program: str, error: str) -> None:
    result = sandbox.run(program, Limits(seconds=20.0))
    assert not result.ok
    assert error in result.error


def test_stops_at_the_time_limit(sandbox: Sandbox) -> None:
    started = time.monotonic()
    result = sandbox.run("print('begun')\nwhile True:\n    pass", Limits(seconds=0.3))
    assert result.error == "the program was stopped after 0.3 s"
    assert 0.25 < time.monotonic() - started < 120.0
    assert sandbox.run("6 * 7", Limits(seconds=20.0)).stdout == "42\n"


@pytest.mark.parametrize(
    "program",
    ["-" * 15_000 + "1", "(" * 300 + ")" * 300, "1" + "+1" * 9_000, "'\ud800'", "x = 1\0", "x" * 10**6],
)
def test_odd_programs_do_not_raise(sandbox: Sandbox, program: str) -> None:
    result = sandbox.run(program, Limits(seconds=5.0))
    assert result.backend in (("monty", "bwrap") if sandbox.backend == "auto" else (sandbox.backend,))


def test_many_threads_at_once(sandbox: Sandbox) -> None:
    def square(number: int) -> str:
        if number % 8 == 7:
            return sandbox.run("while True:\n    pass", Limits(seconds=0.05)).error
        return sandbox.run(f"print({number} ** 2)", Limits(seconds=30.0)).stdout

    with ThreadPoolExecutor(8) as threads:
        results = list(threads.map(square, range(80)))
    for number, result in enumerate(results):
        assert result == ("the program was stopped after 0.05 s" if number % 8 == 7 else f"{number**2}\n")


async def test_async_leaves_the_loop_free(sandbox: Sandbox) -> None:
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0.01)
            ticks += 1

    ticker = asyncio.create_task(tick())
    results = await asyncio.gather(
        *(sandbox.arun(f"{number} + 1", Limits(seconds=30.0)) for number in range(6)),
        sandbox.arun("while True: pass", Limits(seconds=1.0)),
    )
    ticker.cancel()
    assert [result.stdout for result in results[:6]] == [f"{number + 1}\n" for number in range(6)]
    assert not results[6].ok
    assert ticks > 3


@pytest.mark.parametrize("name", BACKENDS)
def test_a_closed_sandbox_says_so(name: str) -> None:
    sandbox = OPEN[name]()
    sandbox.close()
    sandbox.close()
    with pytest.raises(SandboxError, match="closed"):
        sandbox.run("1")


@pytest.mark.parametrize("name", ["seconds", "memory_bytes", "output_bytes"])
@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf")])
def test_limits_out_of_range_are_refused(name: str, value: float) -> None:
    with pytest.raises(InputError, match=f"above zero and finite, not .*{name}={value}"):
        Limits(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", BACKENDS)
def test_each_states_its_strength(name: str, opened: dict[str, Sandbox]) -> None:
    strength = opened[name].strength
    assert len(strength) > 40
    assert strength.startswith("None: ") == (name == "subprocess")


@pytest.mark.parametrize("name", ["monty", "bwrap", "auto"])
def test_a_forked_child_is_told_to_spawn(name: str) -> None:
    program = (
        "import os\n"
        "from viaticum.strategies.sandbox import Limits, open_sandbox\n"
        f"sandbox = open_sandbox({name!r}, workers=1)\n"
        "if os.fork() == 0:\n"
        "    try:\n        sandbox.run('1')\n"
        "    except Exception as error:\n        print(error, flush=True)\n"
        "    sandbox.close()\n"
        "    os._exit(0)\n"
        "os.wait()\n"
        "print(sandbox.run('6 * 7', Limits(seconds=20.0)).stdout)\n"
        "sandbox.close()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=240, check=True
    )
    assert "'spawn'" in done.stdout
    assert done.stdout.split()[-1] == "42"


# bubblewrap


@pytest.mark.parametrize(
    ("program", "stdout"),
    [
        ("import numpy as np\nprint(np.arange(10).reshape(2, 5).sum(axis=0))", "[ 5  7  9 11 13]\n"),
        ("import numpy as np\nnp.linalg.solve([[2, 0], [0, 4]], [2, 8]).tolist()", "[1.0, 2.0]\n"),
        ("from sympy import *\nx = symbols('x')\nprint(solve(x**2 - 2, x))", "[-sqrt(2), sqrt(2)]\n"),
        ("from sympy import *\nx = symbols('x')\nintegrate(x**2)", "x**3/3\n"),
        ("import mpmath\nprint(mpmath.mpf(2))", "2.0\n"),
        ("from fractions import Fraction\nsum(Fraction(1, n) for n in range(1, 4))", "11/6\n"),
        ("def f():\n    yield 1\n    yield 2\nprint(*f())", "1 2\n"),
        ("open('/tmp/x', 'w').write('kept')\nopen('/tmp/x').read()", "kept\n"),
        ("import tempfile\nwith tempfile.TemporaryFile() as f: print(f.write(b'abc'))", "3\n"),
        ("import threading\nt = threading.Thread(target=print, args=(5,)); t.start()", "5\n"),
        (
            "import asyncio\nasync def f():\n    await asyncio.sleep(0.01)\n    print('slept')\n"
            "asyncio.run(f())",
            "slept\n",
        ),
        (
            "from concurrent.futures import ThreadPoolExecutor\n"
            "with ThreadPoolExecutor(2) as p: print(list(p.map(abs, [-1])))",
            "[1]\n",
        ),
        ("import sys\nsys.exit(0)", ""),
        ("exit()", ""),
        ("import os\nos.getuid() == 1000, os.getcwd()", "(True, '/tmp')\n"),
        ("import sys\nprint('aside', file=sys.stderr)\nprint('out')", "out\n"),
        ("from dataclasses import dataclass\n@dataclass\nclass A:\n    x: int = 1\nA()", "A(x=1)\n"),
        ("import warnings\nwarnings.warn('x')\n1", "1\n"),
    ],
)
def test_cpython_runs_under_bubblewrap(bwrap: BubblewrapSandbox, program: str, stdout: str) -> None:
    result = bwrap.run(program, Limits(seconds=60.0))
    assert (result.ok, result.stdout, result.error, result.backend) == (True, stdout, "", "bwrap")


def test_programs_that_draw_at_random_differ(bwrap: BubblewrapSandbox) -> None:
    for program in ("import random\nrandom.random()", "import numpy\nnumpy.random.rand()"):
        drawn = {bwrap.run(program, Limits(seconds=30.0)).stdout for _ in range(6)}
        assert len(drawn) == 6


def test_nothing_of_a_program_stays_in_memory() -> None:
    """A program's process is a copy of the worker, which must not have seen an earlier program."""
    search = """
import ctypes, os
libc = ctypes.CDLL(None)
libc.sbrk.restype = ctypes.c_void_p
shifted = bytes((n + 1) % 256 for n in range(256))  # so that what is looked for is not found in this program
read, write = os.pipe()
pages = 0
for middle in (id(object()), libc.sbrk(0)):
    start = middle // 4096 * 4096
    for page in range(start - 2**25, start + 2**25, 4096):
        size = libc.write(write, ctypes.c_void_p(page), 4096)
        if size > 0:
            pages += 1
            if b"xpncbu.jt.ifsf" in os.read(read, size).translate(shifted):
                print("REACHED", hex(page))
print(pages)
"""
    with BubblewrapSandbox(workers=1) as sandbox:
        for _ in range(3):
            assert sandbox.run("print('wombat-is-here' * 20)", Limits(seconds=20.0)).ok
        result = sandbox.run(search, Limits(seconds=60.0))
    assert "REACHED" not in result.stdout
    assert int(result.stdout) > 500


def test_workers_stay_warm_and_dead_ones_are_replaced(bwrap: BubblewrapSandbox) -> None:
    with BubblewrapSandbox(workers=1) as sandbox:
        assert sandbox.run("1").ok
        first = _bwraps()
        assert sandbox.run("2").ok
        assert _bwraps() == first
        for pid in first - _bwraps_of(bwrap):
            os.kill(pid, signal.SIGKILL)
        assert sandbox.run("6 * 7", Limits(seconds=20.0)).stdout == "42\n"
    assert not sandbox._all


def test_a_worker_killed_in_the_middle_is_told_of() -> None:
    with BubblewrapSandbox(workers=1) as sandbox:
        killer = threading.Thread(
            target=lambda: _program_of(sandbox) and [each.signal() for each in sandbox._all]
        )
        killer.start()
        result = sandbox.run("while True: pass", Limits(seconds=60.0))
        killer.join()
        assert result.error == "the program crashed its worker"
        assert sandbox.run("6 * 7", Limits(seconds=20.0)).stdout == "42\n"


def test_a_worker_that_does_not_answer_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "GRACE_SECONDS", 0.3)
    with BubblewrapSandbox(workers=1) as sandbox:

        def freeze() -> None:
            if _program_of(sandbox):
                for each in sandbox._all:
                    for pid in _below(each._process.pid):
                        os.kill(pid, signal.SIGSTOP)

        freezer = threading.Thread(target=freeze)
        freezer.start()
        result = sandbox.run("while True: pass", Limits(seconds=5.0))
        freezer.join()
        assert result.error == "the program was stopped after 5 s"
        assert sandbox.run("6 * 7", Limits(seconds=20.0)).stdout == "42\n"


def test_closing_ends_running_programs() -> None:
    sandbox = BubblewrapSandbox(workers=1)
    closer = threading.Timer(0.2, sandbox.close)
    closer.start()
    with pytest.raises(SandboxError, match="closed"):
        sandbox.run("while True: pass", Limits(seconds=30.0))
    closer.join()


def test_no_process_outlives_its_owner() -> None:
    """Killed without a chance to clean up, the owner takes its workers and their programs with it."""
    program = (
        "import sys, threading\n"
        "from viaticum.strategies.sandbox import Limits\n"
        "from viaticum.strategies.sandbox.bubblewrap import BubblewrapSandbox\n"
        "sandbox = BubblewrapSandbox(workers=1)\n"
        "threading.Thread(target=sandbox.run, args=('while True: pass', Limits(seconds=600.0))).start()\n"
        "print('ready', flush=True)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "ready\n"
        assert _program_below(owner.pid)
        below = _below(owner.pid)
        assert len(below) >= 5  # bwrap, process 1, the worker, the supervisor, the program
        owner.kill()
    deadline = time.monotonic() + 120.0
    while any(_runs(pid) for pid in below) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not [pid for pid in below if _runs(pid)]


def test_programs_are_nobody_here() -> None:
    """Seen from outside: where root starts the sandbox, a program has not even root's files."""
    with BubblewrapSandbox(workers=1) as sandbox, ThreadPoolExecutor(1) as thread:
        running = thread.submit(sandbox.run, "while True: pass", Limits(seconds=60.0))
        program = _program_of(sandbox)
        user = _user(program)
        for each in sandbox._all:
            each.signal()
        assert not running.result().ok
    assert user == (worker.NOBODY if os.geteuid() == 0 else os.geteuid())


def test_what_bwrap_says_is_told(tmp_path: Path) -> None:
    broken = tmp_path / "bwrap"
    broken.write_text("#!/bin/sh\necho 'no namespaces for you' >&2\nexit 1\n")
    broken.chmod(0o755)
    with pytest.raises(SandboxError, match=r"no namespaces for you.*pip install 'viaticum\[sandbox\]'"):
        BubblewrapSandbox(workers=1, executable=str(broken))
    with pytest.raises(SandboxError, match=r"bwrap does not start.*pip install"):
        BubblewrapSandbox(workers=1, executable=str(tmp_path / "nothing"))


def test_a_hole_is_found_by_the_self_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bubblewrap, "_PROBE", "\nprint(True)\nprint(False)")
    with (
        BubblewrapSandbox(workers=1) as sandbox,
        pytest.raises(SandboxError, match="has a hole: 'True False'"),
    ):
        sandbox.self_test()


def test_a_child_that_cannot_be_confined_runs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        bubblewrap, "assemble", lambda machine: b"\xff" * 16
    )  # no filter the kernel would take
    with (
        BubblewrapSandbox(workers=1) as sandbox,
        pytest.raises(SandboxError, match=r"cannot confine a program: OSError.*prctl"),
    ):
        sandbox.run("print('ran')")


@pytest.mark.parametrize("machine", seccomp.MACHINES)
def test_the_filter_allows_what_is_listed_and_nothing_else(machine: str) -> None:
    """The assembled filter, run here for every call number, as the kernel would."""
    column, arch = seccomp.MACHINES[machine]
    code = seccomp.assemble(machine)
    allowed = {numbers[column] for numbers in seccomp.CALLS.values()} - {None}
    for number in range(600):
        verdict = _filter(code, number, arch)
        assert (verdict == seccomp.ALLOW) == (number in allowed | {seccomp.FCNTL[column]}), number
    assert _filter(code, 0, arch ^ 1) == seccomp.KILL_PROCESS
    thread, process = seccomp.CLONE_THREAD | 0x3D0F00, 17
    assert _filter(code, seccomp.CLONE[column], arch, thread) == seccomp.ALLOW
    for flags in (process, thread | 0x10000000, thread | 0x20000, 0x10000000):
        assert _filter(code, seccomp.CLONE[column], arch, flags) != seccomp.ALLOW
    assert _filter(code, seccomp.IOCTL[column], arch, 1, seccomp.FIONBIO) == seccomp.ALLOW
    assert _filter(code, seccomp.IOCTL[column], arch, 1, 0x5412) != seccomp.ALLOW  # TIOCSTI
    for command in (seccomp.F_SETLEASE, seccomp.F_NOTIFY):
        assert _filter(code, seccomp.FCNTL[column], arch, 1, command) != seccomp.ALLOW
    if machine == "x86_64":
        assert _filter(code, seccomp.X32_BIT | 39, arch) == seccomp.KILL_PROCESS


def test_a_machine_without_a_list_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "vax")
    with pytest.raises(SandboxError, match="no list of system calls for 'vax'"):
        BubblewrapSandbox(workers=1)


# auto


@pytest.mark.parametrize(
    "program",
    [
        "import numpy as np\nprint(np.arange(3).sum())",
        "from sympy import symbols\nprint(3)",
        "from fractions import Fraction\nprint(Fraction(3))",
        "import heapq, statistics, string, enum\nprint(3)",
        "import collections.abc\nprint(3)",
        "from math import *\nprint(floor(3.5))",
        "def f():\n    yield 3\nprint(*f())",
        "class A(Exception):\n    pass\ntry:\n    raise A()\nexcept A:\n    print(3)",
        "class A:\n    @property\n    def x(self):\n        return 3\nprint(A().x)",
        "class A:\n    def __init__(self, x):\n        self.x = x\n    def __lt__(self, other):\n"
        "        return self.x < other.x\nprint(min(A(5), A(3)).x)",
        "class A:\n    def __getattr__(self, name):\n        return 3\nprint(A().x)",
        "x = [1, 2]\ndel x[0]\nx.append(3)\nprint(x[1])",
        "print(next(n for n in range(9) if n > 2))",
        "print(next(map(int, ['3'])))",
        "import sys\nsys.setrecursionlimit(2000)\nprint(3)",
        "import functools\nfunctools.cmp_to_key\nprint(3)",
        "print('3'.translate({}))",
        "print((3).__class__(3))",
        "print(callable(print) and 3)",
        "print(3 + len(bytearray(0)))",
        "o = object()\nprint(3)",
        "print(3) if (3.0).is_integer() else None",
        "def f():\n    'three'\nprint(len(f.__doc__) - 2)",
        "x = 3\nexit(print(x))",
        "def f(n):\n    return n and 1 + f(n - 1)\nprint(f(900) - 897)",
        "with open('x', 'w') as file:\n    file.write('3')\nwith open('x') as file:\n    print(file.read())",
        "import os\nprint(3 if os.environ.get('PATH_OF_NO_ONE') is None else 4)",
        "print(pow(5, -1, 7))",
        "import itertools\nprint(next(n for n in itertools.count(1) if n * n > 8))",
    ],
)
def test_what_monty_lacks_runs_under_bubblewrap(opened: dict[str, Sandbox], program: str) -> None:
    assert not opened["monty"].run(program).ok  # or this test has nothing to show any more
    result = opened["auto"].run(program, Limits(seconds=60.0))
    assert (result.stdout, result.error, result.backend) == ("3\n", "", "bwrap")


@pytest.mark.parametrize(
    "program",
    [
        "print(3)",
        "import math\nmath.pi",
        "1 / 0",
        "print(apples)",
        "x = (",
        "raise NotImplementedError('The monty syntax parser does not yet support this')",
        "def f():\n    raise NotImplementedError\nf()",
        "raise ModuleNotFoundError(\"No module named 'numpy'\")",
        "import nothing_of_this_name",
        "import requests",
        "import math\nmath.no_such_function(1)",
        "from math import no_such_function",
        "'a'.no_such_method()",
        "class A:\n    pass\nA().x",
        "class A:\n    def __repr__(self):\n        return 'A'\n1 + 'a'",
        "next([1])",
        "{}['x']",
        "assert 1 == 2",
        "a = 'x' * 10**10",
        "print('z' * 10**6)",
        "while True:\n    pass",
        "import time\ntime.sleep(100)",
        "raise ImportError(\"cannot import name 'fly' from 'antigravity'\")",
    ],
)
def test_a_programs_own_error_and_its_limits_are_the_result(opened: dict[str, Sandbox], program: str) -> None:
    assert opened["auto"].run(program, Limits(seconds=0.2)).backend == "monty"


def test_asking_what_is_lacking_imports_nothing_named_by_a_program() -> None:
    before = set(sys.modules)
    program = "import antigravity"
    for error in (
        "the program raised ImportError: cannot import name 'x' from 'antigravity'",
        "the program raised AttributeError: module 'antigravity' has no attribute 'x'",
        "the program raised AttributeError: 'antigravity.x' object has no attribute 'x'",
    ):
        lacks_feature(program, error)
    assert "antigravity" not in set(sys.modules) - before


def _refuse(workers: int | None = None) -> Sandbox:
    raise SandboxError("not here; install it")


def test_without_bubblewrap_the_lack_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "open_bwrap", _refuse)
    with AutoSandbox(workers=1) as sandbox:
        assert sandbox.run("6 * 7").stdout == "42\n"
        for _ in range(2):
            result = sandbox.run("import numpy")
            assert not result.ok
            assert result.backend == "monty"
            assert result.error.endswith(
                "No module named 'numpy'; monty lacks this, and not here; install it"
            )


def test_without_monty_all_goes_to_bubblewrap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "open_monty", _refuse)
    with AutoSandbox(workers=1) as sandbox:
        assert sandbox.run("6 * 7", Limits(seconds=20.0)).backend == "bwrap"
        assert sandbox.strength.startswith("A process of its own")


def test_with_neither_it_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "open_monty", _refuse)
    monkeypatch.setattr(auto, "open_bwrap", _refuse)
    with pytest.raises(SandboxError, match="no sandbox for programs: not here; install it; not here"):
        open_sandbox("auto")
    with open_sandbox("auto", unsafe=True) as unsafe:
        assert unsafe.run("6 * 7", Limits(seconds=20.0)).backend == "subprocess (unsafe)"


# unsafe


def test_a_bare_subprocess_has_to_be_asked_for(opened: dict[str, Sandbox]) -> None:
    with pytest.raises(SandboxError, match="say unsafe=True"):
        open_sandbox("subprocess")
    with pytest.raises(UnknownName, match="did you mean 'bwrap'"):
        open_sandbox("bwarp")
    for program in ("1", "1 / 0", "while True: pass"):
        assert opened["subprocess"].run(program, Limits(seconds=0.3)).backend == "subprocess (unsafe)"


def test_the_attacks_work_where_there_is_no_sandbox(
    opened: dict[str, Sandbox], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some harmless attacks of the suite succeed without a sandbox: what stops them is the sandbox."""
    (tmp_path / "secret").write_text("the secret")
    for number, program in enumerate(
        (
            "import os\nos.system('touch {}')",
            "import subprocess\nsubprocess.run(['touch', '{}'])",
            "import pickle\npickle.loads(b\"cos\\nsystem\\n(S'touch {}'\\ntR.\")",
            "import ctypes\nctypes.CDLL(None).system(b'touch {}')",
            "[c for c in ().__class__.__base__.__subclasses__() if c.__name__ == "
            "'_wrap_close'][0].__init__.__globals__['system']('touch {}')",
        )
    ):
        target = tmp_path / str(number)
        opened["subprocess"].run(program.replace("{}", str(target)), Limits(seconds=20.0))
        assert target.exists(), program
    read = opened["subprocess"].run(f"print(open({str(tmp_path / 'secret')!r}).read())", Limits(seconds=20.0))
    assert read.stdout == "the secret\n"
    monkeypatch.setenv("API_KEY_OF_THE_TEST", "sk-12345")
    assert (
        "sk-12345"
        not in opened["subprocess"].run("import os\nprint(os.environ)", Limits(seconds=20.0)).stdout
    )


# the command line


@pytest.mark.parametrize(
    ("arguments", "backend"),
    [
        ([], "monty"),
        (["--backend", "monty"], "monty"),
        (["--backend", "bwrap"], "bwrap"),
        (["--backend", "subprocess", "--unsafe"], "subprocess (unsafe)"),
    ],
)
def test_the_command_runs_a_program(tmp_path: Path, arguments: list[str], backend: str) -> None:
    file = tmp_path / "program.py"
    file.write_text("print(6 * 7)")
    done = CliRunner().invoke(app, ["sandbox", "run", str(file), *arguments, "--seconds", "20", "--json"])
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert said.pop("seconds") > 0
    assert said == {"ok": True, "stdout": "42\n", "error": "", "backend": backend}


def test_the_command_tells_errors(tmp_path: Path) -> None:
    file = tmp_path / "program.py"
    file.write_text("print('so far')\n1 / 0")
    said = json.loads(CliRunner().invoke(app, ["sandbox", "run", str(file), "--json"]).stdout)
    assert said["error"] == "the program raised ZeroDivisionError: division by zero"
    done = CliRunner().invoke(app, ["sandbox", "run", str(file)])
    assert (done.exit_code, done.stdout) == (1, "so far\n")
    assert done.stderr == "the program raised ZeroDivisionError: division by zero (monty)\n"
    assert isinstance(
        CliRunner().invoke(app, ["sandbox", "run", str(tmp_path / "none")]).exception, InputError
    )
    piped = CliRunner().invoke(app, ["sandbox", "run", "-"], input="print(5)")
    assert piped.stdout == "5\n"


def test_the_command_checks_each_sandbox() -> None:
    said = json.loads(CliRunner().invoke(app, ["sandbox", "check", "--json"]).stdout)
    assert [(each["backend"], each["works"]) for each in said] == [("monty", True), ("bwrap", True)]


def _filter(code: bytes, number: int, arch: int, first: int = 0, second: int = 0) -> int:
    """What a seccomp filter answers: classic BPF as far as ours goes, over struct seccomp_data."""
    data = struct.pack("=IIQQQQQQQ", number, arch, 0, first, second, 0, 0, 0, 0)
    lines = list(struct.iter_unpack("=HBBI", code))
    at = value = 0
    while True:
        operation, if_true, if_false, k = lines[at]
        at += 1
        if operation == seccomp.LOAD:
            (value,) = struct.unpack_from("=I", data, k)
        elif operation == seccomp.AND:
            value &= k
        elif operation == seccomp.JUMP_EQUAL:
            at += if_true if value == k else if_false
        elif operation == seccomp.JUMP_AT_LEAST:
            at += if_true if value >= k else if_false
        else:
            assert operation == seccomp.RETURN
            return int(k)


def _parents() -> dict[int, int]:
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
    return parents


def _below(pid: int) -> list[int]:
    parents, found, last = _parents(), [pid], 0
    while last < len(found):
        found += [child for child, parent in parents.items() if parent == found[last]]
        last += 1
    return found[1:]


def _program_below(pid: int) -> int:
    """Wait for the first confined program below a process; returns its pid, 0 after two minutes."""
    deadline = time.monotonic() + 120.0
    while time.monotonic() < deadline:
        for each in _below(pid):
            if _looks_confined(each):
                return each
        time.sleep(0.02)
    return 0


def _program_of(sandbox: BubblewrapSandbox) -> int:
    (each,) = sandbox._all
    return _program_below(each._process.pid)


def _bwraps() -> set[int]:
    """The bwraps that this process started."""
    return {pid for pid, parent in _parents().items() if parent == os.getpid() and "bwrap" in _name(pid)}


def _bwraps_of(sandbox: BubblewrapSandbox) -> set[int]:
    return {each._process.pid for each in sandbox._all}


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().partition("(")[2].rpartition(")")[0]
    except OSError:
        return ""


def _status(pid: int, field: str) -> str:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(f"{field}:")), "")


def _runs(pid: int) -> bool:
    return _status(pid, "State")[:1] not in ("", "Z", "X")


def _user(pid: int) -> int:
    return int(_status(pid, "Uid").split()[0])


def _looks_confined(pid: int) -> bool:
    """A program: no capabilities, none to come, a filter, and no way to new privileges."""
    fields = {"CapPrm": "0" * 16, "CapEff": "0" * 16, "CapBnd": "0" * 16, "CapAmb": "0" * 16, "Seccomp": "2"}
    return (
        all(_status(pid, name) == value for name, value in fields.items())
        and _status(pid, "NoNewPrivs") == "1"
    )
