"""Signal handlers that are put back: what SIGTERM and SIGINT do while something has to end in order.

Python runs a handler in the main thread between two instructions of whatever is there, which may hold a lock
or be a callback of a library that drops every error. So functions are called from a thread of their own, and
a `KeyboardInterrupt` that was dropped is raised again. Leaves out what the functions do: the client, the
server and the commands each pass one.
"""

from __future__ import annotations

import _thread
import asyncio
import importlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from traceback import walk_tb
from types import CodeType, FrameType
from typing import Any, Self, TypeVar

INTERRUPTED = 130  # exit code of a command that Ctrl-C ended
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
JOIN_SECONDS = 1.0  # that a function may still take when its handler is put back
AGAIN_SECONDS = 0.05  # until a dropped interrupt is raised again, elsewhere
T = TypeVar("T")
Line = tuple[CodeType, int | None]  # of a piece of code


class SignalHandler:
    """Calls a function on signals. As a context manager it does nothing outside the main thread.

    Args:
        handle: called with the number of the signal, in a thread of its own, one call after the other.
        signals: the signals whose handlers it replaces.
        once: restore the former handlers before the first call, so that a second signal has its former
            effect.
    """

    def __init__(
        self,
        handle: Callable[[int], object],
        signals: tuple[signal.Signals, ...] = STOP_SIGNALS,
        *,
        once: bool = False,
    ) -> None:
        self._handle, self._signals, self._once = handle, signals, once
        self._former: dict[signal.Signals, Any] = {}
        self._writer = -1

    def install(self) -> None:
        """Replace the handlers. Raises `ValueError` outside the main thread, as `signal.signal` does."""
        if threading.current_thread() is not threading.main_thread():
            raise ValueError("signal handlers are replaced in the main thread alone")
        reader, self._writer = os.pipe()
        self._process = os.getpid()
        self._thread = threading.Thread(
            target=self._watch, args=(reader,), name="viaticum-signals", daemon=True
        )
        self._thread.start()
        for number in self._signals:
            self._former[number] = signal.signal(number, self._on_signal)

    def restore(self) -> None:
        """Put the former handlers back, and wait for a call of the function."""
        self._put_back()
        if self._writer >= 0:
            os.close(self._writer)
            self._writer = -1
            self._thread.join(JOIN_SECONDS)

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            self.install()

    def __exit__(self, *error: object) -> None:
        self.restore()

    def _put_back(self) -> None:
        for number, former in self._former.items():
            signal.signal(number, former)

    def _on_signal(self, number: int, frame: object) -> None:
        if self._once:
            self._put_back()
        if os.getpid() == self._process:
            os.write(self._writer, bytes([number]))
        else:  # a forked child has the pipe of its parent, and none of its threads
            self._handle(number)

    def _watch(self, reader: int) -> None:
        with os.fdopen(reader, "rb", buffering=0) as numbers:
            while number := numbers.read(1):
                try:
                    self._handle(number[0])
                except Exception:  # told as one of a thread is; the next signal is heard all the same
                    threading.excepthook(threading.ExceptHookArgs((*sys.exc_info(), self._thread)))


class CommandInterrupts:
    """Ctrl-C while a command runs: a `KeyboardInterrupt`, and another one where a callback dropped the first.

    Python drops an error of a finalizer, of a weak reference's callback, and of a callback from C. An
    extension module that is being loaded makes an `ImportError` of it, which is known by the import that it
    ends. Where SIGINT is ignored it stays so.

    happened: whether there was one.
    """

    happened = False

    def __init__(self) -> None:
        self._imports: set[Line] = set()  # that interrupts found under way

    def __enter__(self) -> Self:
        is_default = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        self._replaces = is_default and threading.current_thread() is threading.main_thread()
        if self._replaces:
            signal.signal(signal.SIGINT, self._interrupt)
            self._report, sys.unraisablehook = sys.unraisablehook, self._unraisable
        return self

    def __exit__(self, *error: object) -> None:
        if self._replaces:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            sys.unraisablehook = self._report

    def is_cause_of(self, error: BaseException) -> bool:
        """Whether an error is what became of an interrupt, and not of something else after it."""
        each: BaseException | None = error
        while self.happened and each is not None:
            if isinstance(each, KeyboardInterrupt):
                return True
            if isinstance(each, ImportError) and not self._imports.isdisjoint(_lines_of(each)):
                return True
            each = each.__cause__ or each.__context__
        return False

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self.happened = True
        self._imports.update(_imports_under_way(frame))
        raise KeyboardInterrupt

    def _unraisable(self, dropped: Any) -> None:
        if issubclass(dropped.exc_type, KeyboardInterrupt):
            _thread.start_new_thread(_interrupt_again, ())  # which takes no lock, unlike Thread.start
        else:
            self._report(dropped)


def _imports_under_way(frame: FrameType | None) -> Iterator[Line]:
    """The lines that import something, of a frame and those that called it."""
    while frame is not None:
        caller = frame.f_back
        if _is_of_import(frame) and caller is not None and not _is_of_import(caller):
            yield caller.f_code, caller.f_lineno
        frame = caller


def _is_of_import(frame: FrameType) -> bool:
    path = frame.f_code.co_filename
    return path == importlib.__file__ or path.startswith("<frozen importlib")


def _lines_of(error: BaseException) -> Iterator[Line]:
    """The lines that an error came through."""
    return ((frame.f_code, line) for frame, line in walk_tb(error.__traceback__))


def _interrupt_again() -> None:
    time.sleep(AGAIN_SECONDS)
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)  # ends a wait, too
    else:
        _thread.interrupt_main()


@contextmanager
def interrupt_deferred() -> Iterator[None]:
    """Let a Ctrl-C wait until the block has ended: for what must not be left half done, such as a fork."""
    former = signal.getsignal(signal.SIGINT)
    waiting: list[tuple[int, Any]] = []
    if threading.current_thread() is not threading.main_thread() or not callable(former):
        yield
        return
    signal.signal(signal.SIGINT, lambda number, frame: waiting.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, former)
        if waiting:
            former(*waiting[0])


def run_interruptible(coroutine: Coroutine[Any, Any, T]) -> T:
    """As `asyncio.run`. Ctrl-C cancels the coroutine, and is raised once that has ended, in whatever way.

    asyncio itself loses an interrupt after a coroutine's last await, or one that the coroutine survives.

    Raises:
        KeyboardInterrupt: there was one.
    """
    interrupted, running = threading.Event(), list[tuple[asyncio.AbstractEventLoop, asyncio.Task[Any]]]()

    def cancel(number: int) -> None:
        interrupted.set()
        for loop, task in running:
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(task.cancel)

    async def main() -> T:
        task = asyncio.current_task()
        assert task is not None
        running.append((asyncio.get_running_loop(), task))
        if interrupted.is_set():
            coroutine.close()
            raise asyncio.CancelledError
        return await coroutine

    with SignalHandler(cancel, (signal.SIGINT,), once=True):
        try:
            result = asyncio.run(main())
        except BaseException as error:
            if not interrupted.is_set():
                raise
            raise KeyboardInterrupt from error
    if interrupted.is_set():
        raise KeyboardInterrupt
    return result


def drain_on(signals: tuple[signal.Signals, ...], drain: Callable[[], Any]) -> None:
    """On one of these signals drain, on a thread of its own, then do what the signal did before.

    A second signal does at once what it did before.

    Raises:
        ValueError: this is not the main thread.
    """

    def drain_and_raise(number: int) -> None:
        drain()
        os.kill(os.getpid(), number)

    def start(number: int) -> None:
        threading.Thread(target=drain_and_raise, args=(number,), name="viaticum-drain").start()

    SignalHandler(start, signals, once=True).install()
