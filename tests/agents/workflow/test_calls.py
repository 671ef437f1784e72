"""One paid call: held before, posted after, and what an early end costs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from viaticum.agents.workflow.calls import Calls, SettledCall
from viaticum.budgets import Ledger
from viaticum.catalogue import Catalogue
from viaticum.errors import BudgetExceeded, HoldError, ModelError
from viaticum.models.base import Generation, Model
from viaticum.models.scripted import ScriptedModel
from viaticum.types import Completion, Message, Usage

CHAT: list[Message] = [{"role": "user", "content": "one two three"}]
SHORT = Generation(max_new_tokens=10)
WORD = 1_000  # nano-dollars


@pytest.fixture
def ledger() -> Iterator[Ledger]:
    with Ledger("memory:") as ledger:
        ledger.create("b", limit_nanousd=40 * WORD)
        yield ledger


def calls_of(ledger: Ledger, model: Model) -> Calls:
    entry = model.catalogue_entry()
    assert entry is not None
    return Calls(Catalogue([entry]), ledger, {model.name: model}.__getitem__)


def standing(ledger: Ledger) -> tuple[int, int]:
    budget = ledger.budget("b")
    return budget.posted_nanousd, budget.held_nanousd


def test_holds_the_worst_case_then_posts_the_truth(ledger: Ledger) -> None:
    calls = calls_of(ledger, ScriptedModel("four five"))
    events = calls.stream("b", "k", "scripted", CHAT, SHORT, tags={"strategy": "chat"})
    assert next(events) == "four"
    assert standing(ledger) == (0, 13 * WORD)
    *pieces, paid = events
    assert pieces == [" five"]
    assert isinstance(paid, SettledCall)
    assert (paid.completion.text, paid.entry.nanousd) == ("four five", 5 * WORD)
    assert standing(ledger) == (5 * WORD, 0)


def test_usage_and_text_are_posted_in_one_transaction(ledger: Ledger) -> None:
    list(calls_of(ledger, ScriptedModel("four five")).stream("b", "k", "scripted", CHAT, SHORT))
    entries = ledger.entries(key="k")
    assert [entry.kind for entry in entries] == ["reserve", "dispatch", "post"]
    assert "result" in entries[-1].note, "a kill before it charges nothing, one after it loses nothing"


def test_the_same_call_again_is_free_and_another_under_its_key_is_refused(ledger: Ledger) -> None:
    model = ScriptedModel("four five")
    calls = calls_of(ledger, model)
    first, again = (list(calls.stream("b", "k", "scripted", CHAT, SHORT)) for _ in range(2))
    assert isinstance(first[-1], SettledCall)
    assert isinstance(again[-1], SettledCall)
    assert again[:-1] == ["four five"]
    assert again[-1].entry.number == first[-1].entry.number
    assert len(model.calls) == 1
    with pytest.raises(HoldError):
        list(calls.stream("b", "k", "scripted", CHAT, Generation(max_new_tokens=11)))


def test_a_caller_that_goes_away_pays_what_was_read_and_written(ledger: Ledger) -> None:
    events = calls_of(ledger, ScriptedModel("four five six")).stream("b", "k", "scripted", CHAT, SHORT)
    assert [next(events), next(events)] == ["four", " five"]
    events.close()  # type: ignore[attr-defined]
    assert standing(ledger) == (5 * WORD, 0)
    with pytest.raises(HoldError, match="take another key"):
        list(calls_of(ledger, ScriptedModel("x")).stream("b", "k", "scripted", CHAT, SHORT))


class Breaks(ScriptedModel):
    """Fails after so many words."""

    def __init__(self, after: int) -> None:
        super().__init__("a b c")
        self.after = after

    def stream(self, messages, generation):  # type: ignore[no-untyped-def]
        for index, piece in enumerate(super().stream(messages, generation)):
            if index == self.after:
                raise ModelError("it broke")
            yield piece


@pytest.mark.parametrize(("after", "posted"), [(0, 0), (2, 5 * WORD)])
def test_a_model_that_fails(ledger: Ledger, after: int, posted: int) -> None:
    with pytest.raises(ModelError, match="it broke"):
        list(calls_of(ledger, Breaks(after)).stream("b", "k", "scripted", CHAT, SHORT))
    assert standing(ledger) == (posted, 0)
    assert ledger.check() == []


def test_what_does_not_fit_is_never_asked(ledger: Ledger) -> None:
    model = ScriptedModel("a")
    with pytest.raises(BudgetExceeded):
        list(calls_of(ledger, model).stream("b", "k", "scripted", CHAT, Generation(max_new_tokens=38)))
    assert model.calls == []
    assert standing(ledger) == (0, 0)


def test_a_token_has_at_least_a_byte() -> None:
    class Plain(Model):
        name, members = "m", ("m",)

        def worst_case(self, messages, max_new_tokens):  # type: ignore[no-untyped-def]
            raise NotImplementedError

        def stream(self, messages, generation):  # type: ignore[no-untyped-def]
            yield Completion("", Usage(), "stop")

    assert Plain().count("né") == 3
