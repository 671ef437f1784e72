"""Each step of an agent routed: switches cost the cache, tool loops stay, trouble escalates and ends."""

from __future__ import annotations

import random

import pytest

from viaticum.errors import BudgetExceeded
from viaticum.money import Price
from viaticum.routers.query.choose import Best, Within
from viaticum.routers.query.steps import EXPECTED_STEPS, StepState, choose_step, remaining_steps
from viaticum.types import Pair, RoutingTable, Row

SMALL, LARGE = "small", "large"
PRICES = {
    SMALL: Price(1_000_000_000, 2_000_000_000, cached_nanousd_per_million=100_000_000),
    LARGE: Price(3_000_000_000, 15_000_000_000, cached_nanousd_per_million=300_000_000),
}


def table(small: float = 0.80, large: float = 0.81) -> RoutingTable:
    rows = [
        Row(Pair(name, "chat"), right, 100, 300, 1, 1) for name, right in ((SMALL, small), (LARGE, large))
    ]
    return RoutingTable(tuple(rows))


def test_the_first_step_follows_the_policy() -> None:
    first = StepState(prompt_tokens=1_000)
    assert choose_step(table(), first, PRICES, Within(0.02)).model == SMALL
    assert choose_step(table(), first, PRICES, Best()).model == LARGE


@pytest.mark.parametrize(("steps", "stays"), [(1, True), (30, False)])
def test_a_switch_is_priced_by_the_cache_that_it_loses(steps: int, stays: bool) -> None:
    """The dear model has 60,000 tokens in its cache, which the cheap one would read anew."""
    state = StepState(LARGE, 60_000, 59_000)
    choice = choose_step(table(), state, PRICES, Within(0.02), steps=steps)
    assert (choice.model == LARGE) is stays
    assert choice.switched is not stays
    if not stays:
        assert "59000 tokens in its cache" in choice.why


def test_without_a_cache_the_same_step_switches_at_once() -> None:
    assert choose_step(table(), StepState(LARGE, 60_000, 0), PRICES, Within(0.02), steps=1).model == SMALL


def test_a_chain_of_tool_calls_stays_on_its_model() -> None:
    state = StepState(SMALL, 1_000, 900, results=(True,), in_loop=True)
    assert choose_step(table(0.5, 0.9), state, PRICES, Best()).model == SMALL
    ended = StepState(SMALL, 1_000, 900, results=(True,))
    assert choose_step(table(0.5, 0.9), ended, PRICES, Best()).model == LARGE


def test_errors_of_tools_escalate_and_the_choice_is_free_again_after_them() -> None:
    def model(results: tuple[bool, ...], now: str, in_loop: bool = True) -> str:
        state = StepState(now, 1_000, 900, results, in_loop)
        return choose_step(table(), state, PRICES, Within(0.02)).model

    assert model((False,), SMALL) == SMALL
    assert model((False, False), SMALL) == LARGE
    assert model((False, False, True), LARGE) == LARGE  # nothing better, and still in trouble
    assert model((False, False, True, True), LARGE) == LARGE  # in its chain
    assert model((False, False, True, True), LARGE, in_loop=False) == SMALL


def test_money_for_the_rest_of_the_run_decides_then_money_for_the_step() -> None:
    state = StepState(prompt_tokens=1_000)
    rich = choose_step(table(0.5, 0.9), state, PRICES, Best(), left=100_000_000, steps=5)
    assert rich.model == LARGE
    tight = choose_step(table(0.5, 0.9), state, PRICES, Best(), left=12_000_000, steps=5)
    assert tight.model == SMALL
    last = choose_step(table(0.5, 0.9), state, PRICES, Best(), left=2_000_000, steps=5)
    assert last.model == SMALL
    assert "for this step alone" in last.why
    with pytest.raises(BudgetExceeded, match="a step by small may cost"):
        choose_step(table(), state, PRICES, Best(), left=100_000, steps=5)


def test_steps_to_come_are_learned_from_runs_that_were_longer() -> None:
    assert remaining_steps([], 0) == EXPECTED_STEPS
    assert remaining_steps([], 100) == 1
    assert remaining_steps([4, 8, 12], 0) == 8
    assert remaining_steps([4, 8, 12], 5) == 5
    assert remaining_steps([4, 8], 9) == 1


def test_a_choice_is_affordable_and_of_the_table_whatever_the_state() -> None:
    draw = random.Random(5)
    for _ in range(2_000):
        prompt = draw.randrange(0, 100_000)
        state = StepState(
            draw.choice([None, SMALL, LARGE, "gone"]),
            prompt,
            draw.randrange(0, prompt + 1),
            tuple(draw.random() < 0.6 for _ in range(draw.randrange(6))),
            draw.random() < 0.5,
        )
        left, steps = draw.choice([None, draw.randrange(10**9)]), draw.uniform(0.5, 40)
        policy = draw.choice([Best(), Within(draw.random())])
        prices = draw.choice([PRICES, {}, {SMALL: PRICES[SMALL]}])
        try:
            choice = choose_step(
                table(draw.random(), draw.random()), state, prices, policy, left=left, steps=steps
            )
        except BudgetExceeded:
            assert left is not None
            continue
        assert choice.model in (SMALL, LARGE)
        assert choice.switched == (state.model is not None and choice.model != state.model)
        assert choice.cost >= 0
