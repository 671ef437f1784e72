"""Completions by name, without HTTP: their events, and what a caller that disconnects is charged."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from viaticum import FakeRouter, InputError, ScriptedModel, Viaticum
from viaticum.agents.cancellation import CallerGone, CancellationToken
from viaticum.agents.completions import (
    CompletionFinished,
    CompletionRequest,
    CompletionStarted,
    available_names,
    check_name,
    complete,
)
from viaticum.agents.workflow.settings import AUTO
from viaticum.errors import UnknownName
from viaticum.messages import query_from_messages
from viaticum.types import Message, Query

CHAT: list[Message] = [{"role": "user", "content": "What is 6 times 7?"}]
TEXT = "Six times seven. The answer is 42."


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Viaticum]:
    model = ScriptedModel(TEXT)
    with Viaticum(
        "1", budget_name="b", folder=tmp_path, models={"scripted": model}, router=FakeRouter("scripted+cot")
    ) as client:
        yield client


def request(name: str) -> CompletionRequest:
    return CompletionRequest(name, CHAT, "b", "key")


@pytest.mark.parametrize("name", [AUTO, "scripted", "scripted+cot"])
def test_every_name_yields_the_same_events(client: Viaticum, name: str) -> None:
    first, *pieces, done = complete(client, request(name), CancellationToken())
    assert isinstance(first, CompletionStarted)
    assert first.route == ("scripted" if name == "scripted" else "scripted+cot")
    assert isinstance(done, CompletionFinished)
    assert "".join(map(str, pieces)) == done.text == TEXT
    assert done.cost == client.budget().posted_nanousd > 0
    assert done.answer == (None if name == "scripted" else "42")


@pytest.mark.parametrize("name", ["scripted", "scripted+cot"])
@pytest.mark.parametrize("words", [1, 3, len(TEXT.split())])
def test_closing_at_any_word_leaves_no_hold(client: Viaticum, name: str, words: int) -> None:
    """Also after the last one, when the text is there and not yet settled."""
    events = complete(client, request(name), CancellationToken())
    seen = 0
    for event in events:
        seen += isinstance(event, str)
        if seen == words:
            break
    time.sleep(0.1)  # the workflow's own thread goes on
    events.close()  # type: ignore[attr-defined]
    (hold,) = client.ledger.holds()
    assert hold.state == "posted"
    assert client.budget().held_nanousd == 0
    assert client.budget().posted_nanousd > 0


def test_a_closed_guard_stops_the_workflow_before_it_asks_and_nothing_is_paid(client: Viaticum) -> None:
    token = CancellationToken()
    token.close()
    with pytest.raises(Exception, match="went away"):
        list(complete(client, request("scripted+cot"), token))
    assert (client.budget().posted_nanousd, client.budget().held_nanousd) == (0, 0)
    with pytest.raises(CallerGone):
        token.wait()


def test_names(client: Viaticum) -> None:
    names = available_names(client)
    assert names[0] == AUTO
    assert {"scripted", "scripted+pot"} <= set(names)
    for name in ("nobody", "nobody+cot", "scripted+magic", "", "+", "scripted+"):
        with pytest.raises(UnknownName):
            check_name(client, name)


def test_a_conversation_as_a_question() -> None:
    system: Message = {"role": "system", "content": "Be brief."}
    reply: Message = {"role": "assistant", "content": "42"}
    last: Message = {"role": "user", "content": "And 8?"}
    assert query_from_messages(CHAT) == Query("What is 6 times 7?")
    assert query_from_messages([system, *CHAT, reply, last]) == Query(
        "And 8?", messages=(system, *CHAT, reply)
    )
    with pytest.raises(InputError, match="assistant's"):
        query_from_messages([reply])
