"""Signal handlers are replaced for a while, and put back."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from viaticum.signals import SignalHandler, drain_on


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
    assert received == [signal.SIGTERM, signal.SIGINT, signal.SIGTERM]
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
        assert received == [signal.SIGINT]
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
        deadline = time.monotonic() + 30
        while not again.is_set() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert again.is_set()
        assert drained == ["viaticum-drain"]
    finally:
        signal.signal(signal.SIGTERM, former)
