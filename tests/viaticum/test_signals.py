"""Signal handlers are replaced for a while, and put back; a Ctrl-C is never lost."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from importlib import import_module
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest

from viaticum.errors import MissingExtra
from viaticum.signals import (
    CommandInterrupts,
    SignalHandler,
    drain_on,
    interrupt_deferred,
    run_interruptible,
)


def send(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0.01)  # Python runs handlers between two instructions


def test_the_former_handlers_are_back_after_the_block() -> None:
    former = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    received: list[int] = []
    with SignalHandler(received.append):
        send(signal.SIGTERM)
        send(signal.SIGINT)
        send(signal.SIGTERM)
    assert received == [signal.SIGTERM, signal.SIGINT, signal.SIGTERM], "also those of the last instant"
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == former


@pytest.fixture
def interrupts() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt, also where the tests run in the background and ignore it."""
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, former)


@pytest.mark.usefixtures("interrupts")
def test_a_second_signal_does_what_it_did_before() -> None:
    received: list[int] = []
    with SignalHandler(received.append, (signal.SIGINT,), once=True):
        send(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
    assert received == [signal.SIGINT]


def test_outside_the_main_thread_a_block_replaces_nothing_and_drain_on_is_refused() -> None:
    former = signal.getsignal(signal.SIGTERM)
    errors: list[Exception] = []

    def work() -> None:
        with SignalHandler(print):
            errors.extend([] if signal.getsignal(signal.SIGTERM) == former else [AssertionError()])
        try:
            drain_on((signal.SIGTERM,), print)
        except ValueError as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert [type(error) for error in errors] == [ValueError]
    assert signal.getsignal(signal.SIGTERM) == former


def test_drain_on_drains_in_a_thread_and_then_raises_the_signal_again() -> None:
    drained: list[str] = []
    again = threading.Event()
    former = signal.signal(signal.SIGTERM, lambda number, frame: again.set())
    try:
        drain_on((signal.SIGTERM,), lambda: drained.append(threading.current_thread().name))
        send(signal.SIGTERM)
        deadline = time.monotonic() + 120
        while not again.is_set() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert again.is_set()
        assert drained == ["viaticum-drain"]
    finally:
        signal.signal(signal.SIGTERM, former)


def test_a_function_may_take_the_lock_that_the_main_thread_holds() -> None:
    """A handler that ran in the main thread would wait for it for ever."""
    stop, waits = threading.Event(), threading.Lock()

    def drain(number: int) -> None:
        with waits:
            stop.set()

    with SignalHandler(drain, (signal.SIGTERM,)):
        with waits:
            send(signal.SIGTERM)
            assert not stop.is_set()
        assert stop.wait(30)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_signal_of_a_forked_child_is_not_its_parent_s() -> None:
    received: list[int] = []
    with SignalHandler(received.append, (signal.SIGTERM,)):
        child = os.fork()
        if child == 0:
            try:
                send(signal.SIGTERM)
            finally:
                os._exit(7 if received == [signal.SIGTERM] else 8)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert received == []


def test_a_function_that_fails_is_told_and_hears_the_next_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else that would break a pipe in the main thread, wherever it is."""
    told: list[BaseException | None] = []
    monkeypatch.setattr(threading, "excepthook", lambda failed: told.append(failed.exc_value))
    received: list[int] = []

    def fail(number: int) -> None:
        received.append(number)
        raise ValueError("no such window")

    with SignalHandler(fail, (signal.SIGTERM,)):
        for count in (1, 2):
            send(signal.SIGTERM)
            until = time.monotonic() + 30
            while len(told) < count and time.monotonic() < until:
                time.sleep(0.01)
    assert received == [signal.SIGTERM] * 2
    assert [str(error) for error in told] == ["no such window"] * 2


class Dropping:
    """Sends this process a SIGINT in its finalizer, whose errors Python drops."""

    def __del__(self) -> None:
        send(signal.SIGINT)


def drop_and_wait() -> None:
    Dropping()
    time.sleep(60)


@pytest.mark.usefixtures("interrupts")
def test_an_interrupt_that_a_finalizer_dropped_is_raised_again() -> None:
    reports: list[object] = []
    former, sys.unraisablehook = sys.unraisablehook, reports.append
    try:
        with CommandInterrupts() as found, pytest.raises(KeyboardInterrupt):
            drop_and_wait()
    finally:
        sys.unraisablehook = former
    assert found.happened
    assert reports == [], "other errors are told as before, an interrupt is not"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


class BrokenExtension:
    """Modules that are interrupted while they load, and drop that, one for an error of its own, as C does."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        return ModuleSpec(name, self) if name.startswith("interrupted_") else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        with suppress(KeyboardInterrupt):
            send(signal.SIGINT)
        if module.__name__ == "interrupted_extension":
            raise ImportError("initialization failed")


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A folder of modules, beside which there are those of `BrokenExtension`."""
    monkeypatch.setattr(sys, "meta_path", [BrokenExtension(), *sys.meta_path])
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def import_error_of(name: str) -> ImportError:
    with pytest.raises(ImportError) as found:
        import_module(name)
    return found.value


@pytest.mark.usefixtures("interrupts")
def test_an_error_that_an_interrupt_became_is_known(modules: Path) -> None:
    (modules / "outer_package.py").write_text("import interrupted_extension")
    (modules / "telling_package.py").write_text(
        "try:\n    import outer_package\nexcept ImportError:\n    raise ImportError('broken') from None"
    )
    with CommandInterrupts() as found:
        assert not found.is_cause_of(import_error_of("no_such_module"))
        for name in ("interrupted_extension", "outer_package", "telling_package"):
            assert found.is_cause_of(import_error_of(name))
        other = ValueError("closed twice")
        assert not found.is_cause_of(other)
        other.__context__ = KeyboardInterrupt()
        assert found.is_cause_of(other)


@pytest.mark.usefixtures("interrupts", "modules")
@pytest.mark.parametrize("survived", ["handled", "dropped by an import", "an import that is not needed"])
def test_an_interrupt_that_was_survived_causes_no_later_error(survived: str) -> None:
    with CommandInterrupts() as found:
        if survived == "handled":
            with pytest.raises(KeyboardInterrupt):
                send(signal.SIGINT)
        elif survived == "dropped by an import":
            import_module("interrupted_module")
        else:
            with suppress(ImportError):
                import_module("interrupted_extension")
        assert found.happened
        later = import_error_of("no_such_module")
        assert not found.is_cause_of(later)
        extra = MissingExtra("no_such_module", "local")
        extra.__cause__ = later
        assert not found.is_cause_of(extra)


SURVIVING = """
import signal, sys
from viaticum import cli
signal.signal(signal.SIGINT, signal.default_int_handler)
@cli.app.command()
def survive():
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        pass
    sys.modules["litellm"] = None
    import litellm
sys.argv = ["viaticum", "survive"]
cli.main()
"""


def test_a_command_that_survived_an_interrupt_tells_what_ends_it_later() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SURVIVING], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 1
    assert "error: " in done.stderr
    assert "viaticum[remote]" in done.stderr


def test_where_interrupts_are_ignored_they_stay_so() -> None:
    former = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with CommandInterrupts() as found:
            send(signal.SIGINT)
        assert not found.happened
        with interrupt_deferred():
            send(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, former)


@pytest.mark.usefixtures("interrupts")
@pytest.mark.parametrize("fails", [False, True])
def test_a_deferred_interrupt_comes_when_the_block_has_ended(fails: bool) -> None:
    steps: list[str] = []

    def work() -> None:
        with interrupt_deferred():
            send(signal.SIGINT)
            steps.append("ended")
            if fails:
                raise ValueError

    with pytest.raises(KeyboardInterrupt):
        work()
    assert steps == ["ended"]


@pytest.mark.usefixtures("interrupts")
@pytest.mark.parametrize("where", ["before", "await", "survived", "after"])
def test_a_coroutine_hears_every_interrupt(where: str) -> None:
    steps: list[str] = []

    async def work() -> None:
        if where == "before":
            send(signal.SIGINT)
        try:
            if where in ("await", "survived"):
                asyncio.get_running_loop().call_later(0.05, send, signal.SIGINT)
            await asyncio.sleep(60 if where != "after" else 0)
        except asyncio.CancelledError:
            if where != "survived":
                raise
        finally:
            steps.append("put in order")
        if where == "after":
            send(signal.SIGINT)  # no await follows

    with pytest.raises(KeyboardInterrupt):
        run_interruptible(work())
    assert steps == ["put in order"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_coroutine_without_interrupts_is_run_as_by_asyncio() -> None:
    async def work() -> int:
        await asyncio.sleep(0)
        return 3

    async def fails() -> None:
        raise asyncio.CancelledError

    assert run_interruptible(work()) == 3
    with pytest.raises(asyncio.CancelledError):
        run_interruptible(fails())


LOADING = """
import signal, sys, time
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "viaticum.cli":
            signal.raise_signal(signal.SIGINT)
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.meta_path.insert(0, Finder())
from viaticum.__main__ import main
main()
"""


def test_an_interrupt_while_the_command_line_is_loaded_ends_without_a_traceback() -> None:
    done = subprocess.run(
        [sys.executable, "-c", LOADING], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (130, "")


IGNORING = """
import signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
from viaticum.__main__ import main
sys.argv = ["viaticum", "--help"]
try:
    main()
finally:
    signal.raise_signal(signal.SIGINT)
    print("went on")
"""


def test_a_command_in_the_background_ignores_interrupts_to_its_end() -> None:
    done = subprocess.run(
        [sys.executable, "-c", IGNORING], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("went on\n")
