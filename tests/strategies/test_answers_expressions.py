"""The worker that compares expressions: time limit, crashes, threads, forks, and without math-verify."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from viaticum.errors import MissingExtra
from viaticum.strategies import answers
from viaticum.strategies.answers import expressions
from viaticum.strategies.answers.expressions import is_symbolic, require, same_expression

SQUARE = ("(x+1)^2", "x^2+2x+1")
# A factorial of a factorial: years of work in C, where no exception is raised.
ENDLESS = ("25!!", "25! + 1")
LIMIT = expressions.SECONDS
SLACK = 60.0  # for a new worker on a busy machine


@pytest.fixture
def comparer(monkeypatch: pytest.MonkeyPatch) -> Iterator[expressions._WorkerClient]:
    """A worker of the test's own, and none of the verdicts that others asked for."""
    own = expressions._WorkerClient()
    monkeypatch.setattr(expressions, "_shared", own)
    yield own
    own.close()


def worker_pid(comparer: expressions._WorkerClient) -> int:
    assert comparer._process is not None
    return comparer._process.pid


def use_worker(monkeypatch: pytest.MonkeyPatch, folder: Path, source: str) -> None:
    """Another program in the worker's place."""
    path = folder / "worker.py"
    path.write_text(source, encoding="utf-8")
    monkeypatch.setattr(expressions, "_WORKER", path)


def test_math_verify_is_there() -> None:
    require()


def test_what_takes_too_long_is_stopped_and_the_next_comparison_works(
    comparer: expressions._WorkerClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert same_expression(*SQUARE)
    monkeypatch.setattr(expressions, "SECONDS", LIMIT)
    first = worker_pid(comparer)
    started = time.monotonic()
    assert not same_expression(*ENDLESS)
    assert time.monotonic() - started < expressions.SECONDS + SLACK
    assert not same_expression(*reversed(ENDLESS))
    assert comparer._process is None, "a verdict is remembered, for both orders: no worker was started for it"
    monkeypatch.setattr(expressions, "SECONDS", 60.0)
    assert same_expression("(x+2)^2", "x^2+4x+4")
    assert worker_pid(comparer) != first


def test_a_number_too_large_to_write_down_is_different(
    comparer: expressions._WorkerClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as hurried:
        hurried.setattr(expressions, "SECONDS", LIMIT)
        assert not same_expression("2^{10^{10}}", "2")
    assert same_expression(*SQUARE)


def test_a_worker_that_died_while_idle_costs_nothing(comparer: expressions._WorkerClient) -> None:
    assert same_expression(*SQUARE)
    process = comparer._process
    assert process is not None
    process.kill()
    assert same_expression("2x+x", "3x")


def test_threads_take_turns(comparer: expressions._WorkerClient) -> None:
    pairs = [(f"(x+{n})^2", f"x^2+{2 * n}x+{n * n + wrong}") for n in range(1, 7) for wrong in (0, 1)]
    with ThreadPoolExecutor(6) as threads:
        verdicts = list(threads.map(lambda pair: same_expression(*pair), pairs))
    assert verdicts == [True, False] * 6


def test_a_worker_ends_with_the_process_that_started_it() -> None:
    program = (
        "from viaticum.strategies.answers import expressions as e\n"
        "assert e.same_expression('2x+x', '3x')\n"
        "print(e._shared._process.pid)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, "")
    deadline = time.monotonic() + 120
    while Path(f"/proc/{done.stdout.strip()}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{done.stdout.strip()}").exists()


def test_a_forked_child_asks_a_worker_of_its_own() -> None:
    program = (
        "import os\n"
        "from viaticum.strategies.answers import expressions as e\n"
        "assert e.same_expression('2x+x', '3x')\n"
        "pid = e._shared._process.pid\n"
        "child = os.fork() if hasattr(os, 'fork') else 0\n"
        "assert e.same_expression('3x+x', '4x')\n"
        "if not child:\n"
        "    assert e._shared._process.pid != pid or not hasattr(os, 'fork')\n"
        "    e._shared.close()\n"
        "    os._exit(0)\n"
        "assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0\n"
        "assert e.same_expression('4x+x', '5x') and e._shared._process.pid == pid\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_without_math_verify_texts_decide(
    comparer: expressions._WorkerClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expressions, "_installed", lambda: False)
    assert answers.equivalent(r"$\dfrac{\sqrt{3}}{2}$", r"\frac{\sqrt{3}}{2}", "expression")
    assert not answers.equivalent(*SQUARE, "expression")
    assert comparer._process is None
    with pytest.raises(MissingExtra, match=r"pip install 'viaticum\[math\]'"):
        require()


def test_a_worker_that_cannot_start_is_given_up(
    comparer: expressions._WorkerClient, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    use_worker(monkeypatch, tmp_path, "raise SystemExit(3)")
    for _ in range(expressions.MAX_FAILED_STARTS + 2):
        assert not same_expression(*SQUARE)
    assert comparer._failed_starts == expressions.MAX_FAILED_STARTS


def test_a_worker_that_retires_is_replaced(
    comparer: expressions._WorkerClient, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source = expressions._WORKER.read_text(encoding="utf-8")
    use_worker(monkeypatch, tmp_path, source.replace("MAX_COMPARISONS = 5_000", "MAX_COMPARISONS = 2"))
    pids = set()
    for n in range(5):
        assert same_expression(f"(x+{n})x", f"x^2 + x*{n}")
        pids.add(worker_pid(comparer))
    assert len(pids) == 3


def test_a_worker_that_answers_nonsense_or_dies_of_a_question_says_no(
    comparer: expressions._WorkerClient, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for answer in ("print('maybe', flush=True)", "raise SystemExit"):
        use_worker(monkeypatch, tmp_path, f"print('ready', flush=True)\ninput()\n{answer}")
        comparer.close()
        assert not same_expression(f"(x+{len(answer)})^2", "x^2")
    assert comparer._failed_starts == 0


@pytest.mark.parametrize(
    ("text", "formula"),
    [
        ("2x + 1", True),
        (r"\frac{1}{2}", True),
        ("x^2", True),
        ("2 sin(x)", True),
        ("√2", True),
        ("12", False),
        ("1-2", False),
        ("Paris", False),
        ("cost = 5", False),
        ("July 4, 1999", False),
        (r"\text{Paris}", False),
        ("", False),
        ("x" * 301, False),
    ],
)
def test_formulas_are_told_from_words(text: str, formula: bool) -> None:
    assert is_symbolic(text) is formula
