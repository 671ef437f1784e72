"""The strategy `think` and its budgets: names, messages, and what is read after a thought."""

from __future__ import annotations

import pytest

from viaticum.errors import InputError, UnknownName
from viaticum.strategies import get, is_known, names
from viaticum.strategies.think import Think, think_within
from viaticum.types import ANSWER_KINDS, AnswerKind, Completion, Pair, Query, Reading, Usage


@pytest.mark.parametrize(
    ("name", "budget", "canonical"),
    [
        ("think", None, "think"),
        ("think:512", 512, "think:512"),
        ("think:2k", 2048, "think:2k"),
        ("think:8k", 8192, "think:8k"),
        ("think:2048", 2048, "think:2k"),
        ("think:0", 0, "think:0"),
        ("think:1500", 1500, "think:1500"),
    ],
)
def test_a_name_says_the_budget(name: str, budget: int | None, canonical: str) -> None:
    strategy = get(name)
    assert isinstance(strategy, Think)
    assert (strategy.thinking_budget, strategy.name) == (budget, canonical)
    assert get(strategy.name) == strategy
    assert 40 < len(strategy.description) < 300
    assert Pair.parse(f"a-model+{name}").strategy == name


def test_budgets_are_told_apart_by_their_descriptions() -> None:
    arms = [get(name).description for name in ("think", "think:0", "think:512", "think:2k", "think:8k")]
    assert len(set(arms)) == len(arms)
    assert "think" in names()
    assert "think:512" not in names()
    assert is_known("think:512")
    assert is_known("self-consistency:think:2k:3")
    assert not is_known("think:9999999")
    assert not is_known("thinks")


@pytest.mark.parametrize(
    "name", ["think:", "think:-1", "think:2m", "think:k", "think:01", "think: 5", "think:2K"]
)
def test_other_names_are_unknown(name: str) -> None:
    with pytest.raises(UnknownName):
        get(name)


def test_a_budget_beyond_reason_is_refused() -> None:
    with pytest.raises(InputError, match="thinking budget of 9999999"):
        get("think:9999999")
    with pytest.raises(InputError, match="-1"):
        think_within(-1)


def test_samples_of_a_budget() -> None:
    voted = get("self-consistency:think:2k:5")
    assert (voted.name, voted.samples, voted.max_new_tokens) == ("self-consistency:think:2k:5", 5, 1024)
    assert get("self-consistency:think:2k").name == "self-consistency:think:2k:5"
    with pytest.raises(InputError, match="512 samples"):
        get("self-consistency:think:512")


@pytest.mark.parametrize("kind", ANSWER_KINDS)
def test_one_user_turn_asks_for_a_box(kind: AnswerKind) -> None:
    (message,) = get("think:512").messages(Query(" Is it 3?\n", kind))
    assert message["role"] == "user"
    assert message["content"].startswith("Is it 3?\n\n")
    assert message["content"].endswith("within \\boxed{}.")


def test_the_answer_alone_is_read() -> None:
    query = Query("How many?", "number")
    done = Completion("So \\boxed{7}.", Usage(), "stop", thinking="Is it \\boxed{9}? No.")
    assert get("think").read(done, query) == Reading("7")
    cut = Completion("", Usage(), "length", thinking="It is \\boxed{9}.")
    assert get("think").read(cut, query).value is None
