"""e-detectors over calls: how rare false alarms are, in any order of calls, and how soon a change is told."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace
from statistics import fmean, median

import pytest

from viaticum.routers.query.change_detection import (
    CALLS_TO_FALSE_ALARM,
    MARGIN,
    MOST_ON_A_SIDE,
    MOST_SHIFT,
    EDetector,
    Expectation,
    ModelChange,
    ModelWatch,
)

SIGMA = 0.5  # of log tokens
HIGH = math.exp(1.2816 * SIGMA)
EXPECTED = Expectation(100, round(100 * HIGH), 1000, round(1000 * HIGH), 1133, "profile")


def add_call(watch: ModelWatch, rng: random.Random, factor: float = 1.0, price: float = 1.0) -> None:
    tokens = 100 * factor * math.exp(SIGMA * rng.gauss(0, 1))
    watch.add_call(EXPECTED, round(tokens), round(10 * price * tokens))


def calls_until(
    step: Callable[[ModelWatch], None], most: int, bound: float = CALLS_TO_FALSE_ALARM, before: int = 0
) -> int:
    """The observations after `before` until a watch has that evidence; `most` where it never has."""
    watch = ModelWatch()
    for number in range(most):
        step(watch)
        if number >= before and watch.evidence >= bound:
            return number + 1 - before
    return most - before


@pytest.mark.parametrize(
    "factor",
    [1.0, math.exp(0.385 * SIGMA), math.exp(-0.385 * SIGMA)],
    ids=["as expected", "65% above the median", "65% below"],
)
def test_false_alarms_are_as_rare_as_is_told(factor: float) -> None:
    """The mean time to one is at least the bound, also at the edge of the expected range."""
    bound, rng = 200, random.Random(3)
    times = [calls_until(lambda watch: add_call(watch, rng, factor), 1_500, bound) for _ in range(40)]
    assert fmean(times) >= bound
    answers = [
        calls_until(lambda watch: watch.add_answer(0.8, rng.random() < 0.8 - MARGIN), 1_500, bound)
        for _ in range(40)
    ]
    assert fmean(answers) >= bound


def test_false_alarms_are_rare_whatever_the_order() -> None:
    """Calls that come in runs, each as likely as may be: no independence is assumed."""
    bound, rng, times = 100, random.Random(5), []
    for _ in range(60):
        detector, total, state = EDetector(), 0, False
        while total < 3_000 and detector.evidence < bound:
            if total % 4 == 0:  # four alike
                state = rng.random() < MOST_ON_A_SIDE
            detector.update(state if total % 4 == 0 else rng.random() < MOST_ON_A_SIDE, MOST_ON_A_SIDE)
            total += 1
        times.append(total)
    assert fmean(times) >= bound


@pytest.mark.parametrize(
    ("factor", "soon"), [(2.0, 90), (3.0, 50), (0.5, 140)], ids=["twice", "three times", "half"]
)
def test_other_lengths_are_told_soon(factor: float, soon: int) -> None:
    rng, delays = random.Random(1), []
    for _ in range(15):
        watch = ModelWatch()
        for _ in range(200):
            add_call(watch, rng)
        assert not watch.changed
        delay = 0
        while not watch.changed and delay < 600:
            add_call(watch, rng, factor)
            delay += 1
        delays.append(delay)
    assert median(delays) <= soon
    change = watch.change("m", "profile", "2026-01-01T00:00:00+00:00")
    assert change.tokens[0] == pytest.approx(factor, rel=0.35)
    assert change.costs[2] == pytest.approx(factor, rel=0.35)
    assert change.kind in (
        {"longer", "much longer", "dearer", "much dearer"} if factor > 1 else {"shorter", "cheaper"}
    )


def test_prices_alone_are_told_as_costs() -> None:
    rng, watch = random.Random(2), ModelWatch()
    while not watch.changed:
        add_call(watch, rng, price=3.0)
    change = watch.change("m", "profile", "2026-01-01T00:00:00+00:00")
    assert watch.count < 100
    assert change.kind in ("dearer", "much dearer")
    assert change.tokens == pytest.approx((1.0, 1.0), abs=0.3)
    assert change.costs[2] == pytest.approx(3.0, rel=0.3)
    assert "times the costs" in change.why


@pytest.mark.parametrize(("before", "after"), [(0.8, 0.5), (0.9, 0.6), (0.5, 0.8)])
def test_answers_that_are_known_are_told(before: float, after: float) -> None:
    rng, delays = random.Random(4), []
    for _ in range(15):
        watch, delay = ModelWatch(), 0
        for _ in range(100):
            watch.add_answer(before, rng.random() < before)
        assert not watch.changed
        while not watch.changed:
            watch.add_answer(before, rng.random() < after)
            delay += 1
        delays.append(delay)
    assert median(delays) <= 140
    change = watch.change("m", "profile", "2026-01-01T00:00:00+00:00")
    assert change.kind == ("better" if after > before else "worse")
    assert change.accuracy * (after - before) > 0
    assert abs(change.accuracy) == pytest.approx(0.25, abs=0.15)


def test_equal_questions_count_once() -> None:
    watch, same = ModelWatch(), replace(EXPECTED, question="same")
    for _ in range(300):
        watch.add_call(same, 900, 9000)
    assert watch.count == 1
    assert watch.evidence < 10
    for number in range(300):
        watch.add_call(replace(EXPECTED, question=str(number)), 900, 9000)
    assert watch.count == 301
    assert watch.changed


def test_an_answer_that_is_judged_again_counts_once() -> None:
    again, corrected, plain = ModelWatch(), ModelWatch(), ModelWatch()
    for number in range(200):
        again.add_answer(0.8, False, "the same")
        corrected.add_answer(0.8, False, f"answer {number}")
    assert again.count == 1
    assert again.evidence < 10
    assert corrected.changed
    for number in range(200):
        corrected.add_answer(0.8, number % 5 > 0, f"answer {number}")
        plain.add_answer(0.8, number % 5 > 0)
    assert not corrected.changed, "the last judgement counts"
    assert corrected.evidence == pytest.approx(plain.evidence)
    assert (corrected.count, corrected.kind) == (200, plain.kind)


def test_feedback_alone_moves_accuracy_within_bounds() -> None:
    watch = ModelWatch()
    for _ in range(300):
        watch.add_answer(0.9, False)
    assert watch.change("m", "p", "2026-01-01").accuracy == -MOST_SHIFT


def test_a_window_has_no_more_evidence_than_all_calls() -> None:
    rng, whole, part = random.Random(6), ModelWatch(), ModelWatch()
    for number in range(400):
        state = rng.getstate()
        add_call(whole, rng, 1.6)
        if number >= 150:
            rng.setstate(state)
            add_call(part, rng, 1.6)
            assert part.evidence <= whole.evidence * (1 + 1e-9)


def test_costs_of_cached_prompts_and_few_calls_say_nothing() -> None:
    watch = ModelWatch()
    for _ in range(9):
        watch.add_call(EXPECTED, 900, None)
    change = watch.change("m", "profile", "2026-01-01T00:00:00+00:00")
    assert (change.tokens, change.costs) == ((1.0, 1.0), (1.0, 1.0, 1.0))
    for _ in range(20):
        watch.add_call(EXPECTED, 900, None)
    change = watch.change("m", "profile", "2026-01-01T00:00:00+00:00")
    assert change.tokens[0] == pytest.approx(9.0)
    assert change.costs == (1.0, 1.0, 1.0)


def test_certain_expectations_are_no_trouble() -> None:
    watch = ModelWatch()
    for accuracy, correct in ((1.0, False), (0.0, True), (1.0, True), (0.0, False)):
        watch.add_answer(accuracy, correct)
    assert math.isfinite(watch.evidence)


def test_texts_come_back() -> None:
    assert Expectation.parse(EXPECTED.text) == EXPECTED
    asked = replace(EXPECTED, question="0123456789abcdef")
    assert Expectation.parse(asked.text) == asked
    for text in ("", "1 2 3", "1 2 3 4 x - profile", "1 2 3 4 -5 - profile", "1 2 3 4 5 profile"):
        assert Expectation.parse(text) is None
    change = ModelChange("m", "p", "2026-01-01", "longer", 40, (2.0, 2.5), (2.0, 2.0, 2.1), -0.2)
    assert ModelChange.from_json(change.to_json()) == change
    assert change.why == (
        "outputs are longer than expected (2 times the output tokens, 2.1 times the costs, -20 points of "
        "accuracy)"
    )
    for broken in ({}, change.to_json() | {"kind": "odd"}, change.to_json() | {"tokens": [1]}):
        with pytest.raises((KeyError, ValueError, TypeError)):
            ModelChange.from_json(broken)
