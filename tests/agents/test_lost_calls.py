"""A process that is killed while a model answers: the call stays charged, the next try is another call."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from batch_jobs import write_questions

from viaticum import Viaticum
from viaticum.agents.batch import run_batch
from viaticum.agents.batch.cache import Cache
from viaticum.budgets import Ledger
from viaticum.models.base import Generation, StreamPiece
from viaticum.models.scripted import ScriptedModel
from viaticum.routers.query.fake import FakeRouter
from viaticum.types import Message

COUNT = 4
KILLED = 9


class Elsewhere(ScriptedModel):
    """Answers as a provider would: what it was asked may be charged for. dies: the process ends meanwhile."""

    runs_here = False

    def __init__(self, *, dies: bool) -> None:
        super().__init__("The answer is 4.", name="far")
        self.dies = dies

    def stream(self, messages: Sequence[Message], generation: Generation) -> Iterator[StreamPiece]:
        for piece in super().stream(messages, generation):
            yield piece
            if self.dies:
                os._exit(KILLED)


def in_a_child(work: Callable[[], Any]) -> int:
    child = os.fork()
    if not child:
        try:
            work()
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def solve(folder: Path, *, dies: bool) -> None:
    with Viaticum(
        "0.01",
        budget_name="b",
        folder=folder,
        models={"far": Elsewhere(dies=dies)},
        router=FakeRouter("far+direct"),
    ) as client:
        assert client.solve("What is 2 + 2?", thread_id="t").value == "4"


def batch(folder: Path, *, dies: bool) -> None:
    run_batch(
        folder / "in.jsonl",
        folder / "out.jsonl",
        budget="0.01",
        resume=True,
        ledger=folder / "ledger.db",
        models={"far": Elsewhere(dies=dies)},
        router=FakeRouter("far+direct"),
        concurrency=1,
    )


@pytest.mark.parametrize("work", [solve, batch])
def test_a_call_that_a_kill_left_unanswered_is_unknown(tmp_path: Path, work: Callable[..., None]) -> None:
    write_questions(tmp_path / "in.jsonl", COUNT)
    assert in_a_child(lambda: work(tmp_path, dies=True)) == KILLED
    work(tmp_path, dies=False)
    work(tmp_path, dies=False)  # nothing is left to do
    with Ledger(tmp_path / "ledger.db") as ledger:
        assert ledger.check() == []
        states = [hold.state for hold in ledger.holds()]
        (lost,) = ledger.holds(state="unknown")
        retried = ledger.hold(f"{lost.key}.2")
        budget = ledger.budget(lost.budget)
    assert states.count("posted") == (1 if work is solve else COUNT), (
        "calls that are sent later were not lost"
    )
    assert len(states) == states.count("posted") + 1
    assert retried is not None
    assert (retried.state, retried.parameters) == ("posted", lost.parameters)
    assert budget.held_nanousd == lost.held_nanousd > 0


def test_a_text_that_was_paid_for_before_a_kill_answers_equal_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"id": name, "question": "What is 2 + 2?", "kind": "number"} for name in ("a", "b")]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.setattr(Cache, "put", lambda *_: os._exit(KILLED))  # paid for, and not in the cache yet
    assert in_a_child(lambda: batch(tmp_path, dies=False)) == KILLED
    monkeypatch.undo()
    assert in_a_child(lambda: batch(tmp_path, dies=True)) != KILLED, "no call was made, where it would die"
    with Ledger(tmp_path / "ledger.db") as ledger:
        assert [hold.state for hold in ledger.holds()] == ["posted"]
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 2
