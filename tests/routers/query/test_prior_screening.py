"""What the prior does before outcomes are bought: it orders pairs, and leaves out what no outcome saves."""

from __future__ import annotations

import pytest

from viaticum.money import Price
from viaticum.routers.query.prior import AbilityPrior, PriorModel
from viaticum.routers.query.prior_screening import PriorScreen
from viaticum.types import Outcome, Pair

PAIRS = tuple(Pair(name, strategy) for name in ("weak", "strong") for strategy in ("direct", "cot"))


def screen(
    weak: float | None, strong: float | None, costs: tuple[int, ...] = (100, 300, 10, 30)
) -> PriorScreen:
    price = Price.per_million(1, 1)
    models = tuple(
        PriorModel(name, price, "", {} if figure is None else {"mmlu-pro": figure})
        for name, figure in (("weak", weak), ("strong", strong))
    )
    return PriorScreen(AbilityPrior(), models, PAIRS, costs, tuple(2 * each for each in costs))


def outcomes(pair: Pair, right: int, wrong: int) -> list[Outcome]:
    verdicts = [True] * right + [False] * wrong
    model, strategy = pair.model, pair.strategy
    return [Outcome("d", f"q{n}", "?", model, strategy, None, each) for n, each in enumerate(verdicts)]


def test_pairs_are_ordered_by_public_figures() -> None:
    assert [str(PAIRS[each]) for each in screen(0.4, 0.7).order()] == [
        "strong+cot",
        "strong+direct",
        "weak+cot",
        "weak+direct",
    ]
    assert PAIRS[screen(0.8, 0.3).order()[0]] == Pair("weak", "cot")


def test_of_models_without_figures_the_cheapest_is_first_and_none_is_left_out() -> None:
    alike = screen(None, None)
    assert [str(PAIRS[each]) for each in alike.order()][:2] == ["strong+cot", "weak+cot"]
    assert alike.hopeless() == {}


def test_what_is_far_worse_and_no_cheaper_is_left_out() -> None:
    assert screen(0.25, 0.85).hopeless() == {1: 3}
    assert screen(0.25, 0.85, (100, 300, 100, 300)).hopeless() == {}, "as dear: lengths are guessed"
    assert screen(0.25, 0.85, (1, 3, 10, 30)).hopeless() == {}, "cheaper"


@pytest.mark.parametrize(("weak", "strong"), [(0.45, 0.75), (0.5, 0.85), (0.3, 0.6)])
def test_what_a_first_outcome_could_contradict_stays(weak: float, strong: float) -> None:
    assert screen(weak, strong).hopeless() == {}


def test_the_prior_yields_to_outcomes() -> None:
    assert screen(0.25, 0.85).hopeless(outcomes(Pair("strong", "cot"), 8, 2)) == {1: 3}
    assert screen(0.25, 0.85).hopeless(outcomes(Pair("strong", "cot"), 0, 10)) == {}
