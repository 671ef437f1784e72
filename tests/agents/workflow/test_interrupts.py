"""An interrupt at any step of a call leaves no hold: free where nothing was sent, else charged, once."""

from __future__ import annotations

import asyncio
import itertools
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from interrupts import interrupted
from langgraph.checkpoint.memory import InMemorySaver
from pydantic_core import PydanticSerializationError
from scripted_client import LONG, client

from viaticum import Query, ScriptedModel, Viaticum
from viaticum.agents.cancellation import CancellationToken
from viaticum.agents.completions import CompletionRequest, complete
from viaticum.agents.workflow.calls import Calls
from viaticum.budgets import Hold, Ledger
from viaticum.catalogue import Catalogue
from viaticum.models.base import Generation, StreamPiece
from viaticum.types import Message

SUPPORT = Path(__file__).resolve().parents[2] / "support"
CHAT: list[Message] = [{"role": "user", "content": "one two three"}]
LIMIT = 10**9


class CountingModel(ScriptedModel):
    """A scripted model that says whether a piece of it was requested, and how many came."""

    def __init__(self, script: str) -> None:
        super().__init__(script)
        self.asked = self.written = 0

    def stream(self, messages: Sequence[Message], generation: Generation) -> Iterator[StreamPiece]:
        def pieces() -> Iterator[StreamPiece]:
            self.asked += 1
            for piece in super(CountingModel, self).stream(messages, generation):
                self.written += 1
                yield piece

        return pieces()


def check_ended(ledger: Ledger, holds: Sequence[Hold], model: CountingModel, where: str) -> None:
    """All holds have ended; what is charged lies between what was written and the whole answer."""
    assert [hold.state for hold in holds if hold.state not in ("posted", "void")] == [], where
    entries = [entry for hold in holds for entry in ledger.entries(key=hold.key)]
    posted = sum(entry.nanousd for entry in entries if entry.kind == "post")
    read = max((1_000 * hold.usage[model.name].input_tokens for hold in holds), default=0)
    least = read + 1_000 * min(2, max(0, model.written - 1)) if model.asked else 0  # the last may be lost
    assert posted <= read + 2_000, where
    assert posted >= least, where
    if posted and not model.asked:
        assert "__next__" in where, "it was about to ask"


def stream_once(ledger: Ledger, model: ScriptedModel, key: str) -> None:
    entry = model.catalogue_entry()
    calls = Calls(Catalogue([entry]), ledger, {model.name: model}.__getitem__)
    for _ in calls.stream("b", key, "scripted", CHAT, Generation(10)):
        pass


def each_step(
    prepare: Callable[[], object], act: Callable[[], object], first: int, stride: int
) -> Iterator[str]:
    """Run something again and again, interrupted a little later each time; where, each time."""
    for at in itertools.count(first, stride):
        prepare()
        # pydantic puts an error of its own in the place of an interrupt
        with interrupted(at) as interrupt, suppress(KeyboardInterrupt, PydanticSerializationError):
            act()
        if not interrupt.where:
            return
        yield interrupt.where


def test_a_call_ends_its_hold_at_whatever_step_it_is_interrupted() -> None:
    ledger, model, steps = Ledger("memory:"), CountingModel("four five"), 0

    def prepare() -> None:
        nonlocal ledger, model
        ledger, model = Ledger("memory:"), CountingModel("four five")
        ledger.create("b", limit_nanousd=LIMIT)

    for where in each_step(prepare, lambda: stream_once(ledger, model, "k"), 1, 3):
        check_ended(ledger, ledger.holds(), model, where)
        assert ledger.check() == [], where
        ledger.close()
        steps += 1
    assert steps > 200


@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
def test_a_stored_ledger_is_whole_after_each_interrupt(
    request: pytest.FixtureRequest, tmp_path: Path, kind: str
) -> None:
    address = str(tmp_path / "ledger.db") if kind == "sqlite" else request.getfixturevalue("postgres")
    model, numbers = CountingModel("four five"), itertools.count()
    with Ledger(address) as ledger, Ledger(address) as other:
        ledger.create("b", limit_nanousd=LIMIT)
        key = ""

        def prepare() -> None:
            nonlocal key, model
            key, model = f"k{next(numbers)}", CountingModel("four five")

        for where in each_step(prepare, lambda: stream_once(ledger, model, key), 1, 17):
            hold = other.hold(key)  # on another connection, as another process sees it
            check_ended(ledger, [] if hold is None else [hold], model, where)
        assert next(numbers) > 30
        assert ledger.check() == []
        assert ledger.budget("b").held_nanousd == 0


def in_memory(opened: Viaticum, model: ScriptedModel) -> tuple[Viaticum, Ledger]:
    ledger = Ledger("memory:")
    ledger.create(opened.budget_name, limit_nanousd=LIMIT)
    derived = opened.derive(ledger=ledger, checkpointer=InMemorySaver(), model=lambda name: model)
    derived.ledger = ledger
    return derived, ledger


@pytest.mark.parametrize("way", ["solve", "auto", "chat"])
def test_a_question_ends_its_hold_at_whatever_step_it_is_interrupted(tmp_path: Path, way: str) -> None:
    steps = 0
    with client(tmp_path) as opened:
        model = CountingModel("four five")
        derived, ledger = in_memory(opened, model)

        def prepare() -> None:
            nonlocal model, derived, ledger
            model = CountingModel("four five")
            derived, ledger = in_memory(opened, model)

        def act() -> None:
            if way == "solve":
                derived.solve(Query("one two three"), thread_id="t")
                return
            name = "auto" if way == "auto" else "scripted"
            request = CompletionRequest(name, CHAT, derived.budget_name, "k")
            for _ in complete(derived, request, CancellationToken()):
                pass

        for where in each_step(prepare, act, 2, 31):
            check_ended(ledger, ledger.holds(), model, where)
            assert ledger.check() == [], where
            if way == "solve" and ledger.holds():
                asked = model.asked
                cost = derived.solve(Query("one two three"), thread_id="t").cost
                paid = [entry for entry in ledger.entries() if entry.kind == "post"]
                assert cost == sum(entry.nanousd for entry in paid), where
                if "result" in paid[0].note:
                    assert model.asked == max(1, asked), f"the answer was there and paid for: {where}"
            steps += 1
    assert steps > 10


# Event loops


@pytest.mark.parametrize("step", ["reserve", "stream", "settle"])
def test_a_cancelled_question_ends_its_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """Cancelled just after the step. reserve: nothing is sent then."""
    model = CountingModel("four five" if step != "stream" else LONG)
    reached, go_on = threading.Event(), threading.Event()

    def paused(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            result = method(*args, **options)
            reached.set()
            assert go_on.wait(60)
            return result

        return call

    with client(tmp_path) as opened:
        derived, ledger = in_memory(opened, model)
        target: Any = model if step == "stream" else ledger
        monkeypatch.setattr(target, step, paused(getattr(target, step)))

        async def cancel() -> None:
            task = asyncio.create_task(derived.asolve(Query("one two three")))
            while not reached.is_set():
                await asyncio.sleep(0.01)
            task.cancel()
            await asyncio.sleep(0)  # the task hears of it
            go_on.set()
            with pytest.raises(asyncio.CancelledError):
                await task

        asyncio.run(cancel())
        (hold,) = ledger.holds()
        assert hold.state == ("void" if step == "reserve" else "posted")
        assert bool(model.asked) == (step != "reserve")
        assert ledger.check() == []


# Signals

_PROGRAM = """
import signal, sys, time
# A shell's background jobs, and all they start, ignore SIGINT unless they ask for it.
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.path.insert(0, sys.argv[3])
from pathlib import Path
from scripted_client import client
from viaticum.budgets import Ledger

told = []

def say():
    if not told:
        told.append(True)
        print("READY", flush=True)
        time.sleep(300)

def pausing(step, before):
    def call(self, *args, **options):
        if before:
            say()
        result = step(self, *args, **options)
        if not before:
            say()
        return result
    return call

def script(messages, generation):
    if sys.argv[2] == "model":
        say()
    return "four five"

step, _, when = sys.argv[2].partition("-")
if when:
    setattr(Ledger, step, pausing(getattr(Ledger, step), when == "before"))
with client(Path(sys.argv[1]), script) as opened:
    print(opened.budget_name, flush=True)
    opened.solve("one two three")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT")
@pytest.mark.parametrize(
    ("step", "states", "words"),
    [
        ("reserve-before", [], 0),
        ("reserve-after", ["void"], 0),
        ("model", ["posted"], 0),
        ("settle-before", ["posted"], 2),
        ("settle-after", ["posted"], 2),
    ],
)
def test_a_signal_ends_the_hold(tmp_path: Path, step: str, states: list[str], words: int) -> None:
    command = [sys.executable, "-c", _PROGRAM, str(tmp_path), step, str(SUPPORT)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            budget, ready = process.stdout.readline().strip(), process.stdout.readline()
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=120)
        finally:
            process.kill()
    assert ready == "READY\n"
    assert "KeyboardInterrupt" in errors
    with Ledger(tmp_path / "ledger.db") as ledger:
        assert [hold.state for hold in ledger.holds()] == states
        posts = [entry for entry in ledger.entries(budget) if entry.kind == "post"]
        assert [post.usage["scripted"].output_tokens for post in posts] == [words] * states.count("posted")
        assert ledger.check() == []
