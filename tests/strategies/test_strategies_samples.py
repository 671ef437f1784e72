"""Self-consistency: votes against brute force, early stopping, names, and the default of other strategies."""

from __future__ import annotations

from itertools import product

import pytest

from viaticum.errors import InputError, UnknownName
from viaticum.strategies import get, names
from viaticum.strategies.cot import Cot
from viaticum.strategies.self_consistency import SAMPLES, SelfConsistency
from viaticum.types import AnswerKind, Completion, Query, Reading, Usage

QUESTION = Query("Tom has 3 bags of 4 apples. How many apples does he have?")


def vote(strategy: SelfConsistency, answers: list[str | None], kind: AnswerKind = "auto") -> Reading | None:
    readings = [Reading(answer, "" if answer else "silence") for answer in answers]
    return strategy.vote(readings, Query("How many?", kind))


def winner(answers: tuple[str | None, ...]) -> str | None:
    """The most frequent answer, at a tie the one that came first."""
    given = [answer for answer in answers if answer is not None]
    return max(given, key=given.count, default=None)


def test_a_vote_is_settled_exactly_when_no_sample_can_change_it() -> None:
    samples, choices = 5, ("a", "b", "c", "d", "e", None)
    strategy = SelfConsistency(Cot(), samples)
    for asked in range(1, samples + 1):
        for answers in product(("a", "b", "c", None), repeat=asked):
            ends = {winner(answers + rest) for rest in product(choices, repeat=samples - asked)}
            voted = vote(strategy, list(answers))
            if asked == samples:
                assert voted is not None
                assert voted.value == winner(answers)
            elif None in answers and len(set(answers)) == 1:
                assert voted is None  # nobody said anything yet
            else:
                assert (voted is not None) == (len(ends) == 1), answers
                assert voted is None or voted.value in ends


@pytest.mark.parametrize(
    ("answers", "kind", "value"),
    [
        (["12", "$12.00", "12 apples"], "number", "12"),
        (["13", "12.0", "12", "12"], "number", "12.0"),
        (["yes", "True", "no", "yes"], "boolean", "yes"),
        (["July 4, 1999", "1999-07-04", "7/4/1999"], "date", "July 4, 1999"),
        (["(x+1)^2", "x^2+2x+1", "x^2+1", None, r"(1+x)^{2}"], "expression", "(x+1)^2"),
        (["1", "2", None, None, None], "number", "1"),
    ],
)
def test_equivalent_answers_are_one(answers: list[str | None], kind: AnswerKind, value: str) -> None:
    assert vote(SelfConsistency(Cot(), 5), answers, kind) == Reading(value)


def test_samples_without_an_answer_say_why() -> None:
    nothing = vote(SelfConsistency(Cot(), 3), [None, None, None])
    assert nothing == Reading(None, "none of 3 samples gave an answer; the last: silence")


def test_nothing_is_settled_before_a_majority() -> None:
    strategy = SelfConsistency(Cot(), 5)
    assert vote(strategy, []) is None
    assert vote(strategy, ["1"]) is None
    assert vote(strategy, ["1", "1"]) is None
    assert vote(strategy, ["1", "1", "1"]) == Reading("1")


@pytest.mark.parametrize("of", [name for name in names() if get(name).graded])
def test_any_strategy_can_be_sampled(of: str) -> None:
    strategy, sampled = get(f"self-consistency:{of}:7"), get(of)
    assert strategy.name == f"self-consistency:{of}:7"
    assert strategy.name not in names()
    assert strategy.samples == 7
    assert strategy.temperature > 0
    assert (strategy.needs, strategy.max_new_tokens, strategy.stop) == (
        sampled.needs,
        sampled.max_new_tokens,
        sampled.stop,
    )
    assert strategy.messages(QUESTION) == sampled.messages(QUESTION)
    assert 40 < len(strategy.description) < 400
    completion = Completion("The answer is 12.\n```python\nprint(12)\n```", Usage(), "stop")
    assert strategy.read(completion, QUESTION) == Reading("12")


def test_the_number_of_samples_may_be_left_out() -> None:
    assert get("self-consistency:cot").name == f"self-consistency:cot:{SAMPLES}"


@pytest.mark.parametrize(
    "name", ["self-consistency", "self-consistency:", "self-consistency:cott:5", "self-consistency:cot:five"]
)
def test_what_is_not_there_cannot_be_sampled(name: str) -> None:
    with pytest.raises(UnknownName):
        get(name)


@pytest.mark.parametrize(
    "name",
    ["self-consistency:cot:1", "self-consistency:cot:101", "self-consistency:self-consistency:cot:5:5"],
)
def test_samples_of_one_or_of_samples_make_no_sense(name: str) -> None:
    with pytest.raises(InputError, match=r"samples|sampled"):
        get(name)


@pytest.mark.parametrize("temperature", [0.0, -1.0, 2.5, float("nan")])
def test_equal_samples_make_no_majority(temperature: float) -> None:
    with pytest.raises(InputError, match="temperature"):
        SelfConsistency(Cot(), 5, temperature=temperature)


def test_a_strategy_that_asks_once_is_settled_by_its_reading() -> None:
    strategy = get("cot")
    assert (strategy.samples, strategy.temperature) == (1, None)
    assert strategy.vote([], QUESTION) is None
    assert strategy.vote([Reading("12")], QUESTION) == Reading("12")
    assert strategy.vote([Reading(None, "silence")], QUESTION) == Reading(None, "silence")
