"""Routing tables that cover models without outcomes, and the policy that weighs price."""

from __future__ import annotations

import pytest

from viaticum.commands.generation import POLICY
from viaticum.errors import InputError
from viaticum.money import Price
from viaticum.routers.query import (
    DEFAULT_POLICY,
    Best,
    Plan,
    StaticRouter,
    Within,
    choose,
    choose_plan,
    parse_policy,
)
from viaticum.routers.query.covering import STRATEGIES, CoveringRouter
from viaticum.routers.query.prior import PriorModel, default_prior
from viaticum.types import Pair, Query, RoutingTable, Row

CHEAP = PriorModel("cheap", Price.per_million("0.1", "0.4"))
DEAR = PriorModel("dear", Price.per_million(3, 15))
KNOWN = Row(Pair("known", "cot"), 0.9, 100, 200, 50_000, 90_000)


def covering(*known: Row, models: tuple[PriorModel, ...] = (CHEAP, DEAR)) -> CoveringRouter:
    return CoveringRouter(StaticRouter(RoutingTable(known)), default_prior(), models)


def test_models_without_outcomes_are_candidates_with_their_prices() -> None:
    table = covering(KNOWN).table(Query("2+2?"))
    assert table.rows[0] is KNOWN
    added = table.rows[1:]
    assert {row.pair for row in added} == {Pair(m, s) for m in ("cheap", "dear") for s in STRATEGIES}
    for row in added:
        assert row.origin.startswith("prior only: no outcomes for")
        assert 0 < row.accuracy < 1
        assert 0 < row.cost_p50 < row.cost_p90
    costs = {row.pair: row.cost_p50 for row in added}
    assert all(costs[Pair("cheap", s)] < costs[Pair("dear", s)] for s in STRATEGIES)


def test_a_model_with_any_outcome_is_left_to_the_table() -> None:
    known = PriorModel("known", Price.per_million(1, 1))
    assert covering(KNOWN, models=(known,)).table(Query("2+2?")).rows == (KNOWN,)


def test_where_nothing_is_known_the_cheapest_is_taken_and_the_reason_says_so() -> None:
    route = choose(covering().table(Query("2+2?")), None, parse_policy(DEFAULT_POLICY))
    assert route.pair.model == "cheap"
    assert "prior only: no outcomes for" in route.why


def test_one_table_for_questions_of_about_one_length() -> None:
    """Batches know by the object that estimates are the same."""
    router = covering(KNOWN)
    assert router.table(Query("2+2?")) is router.table(Query("What is seven times eight?"))
    assert not router.has_plans
    longer = router.table(Query("word " * 20_000))
    assert longer.rows[1].cost_p50 > router.table(Query("2+2?")).rows[1].cost_p50


def test_plans_of_the_router_stay_and_added_pairs_stand_alone() -> None:
    router = covering(KNOWN)
    plans = [row.plan for row in router.plans_for(Query("2+2?"))]
    assert plans == [Plan((row.pair,)) for row in router.table(Query("2+2?"))]


def row(name: str, accuracy: float, cost: int) -> Row:
    return Row(Pair(name, "cot"), accuracy, 10, 20, cost, 2 * cost)


@pytest.mark.parametrize(
    ("policy", "chosen"),
    [
        ("within", "near"),
        ("within:0.01", "near"),
        ("within:0.05", "cheap"),
        ("within:0", "best"),
        ("best", "best"),
    ],
)
def test_the_default_takes_the_cheapest_near_the_best(policy: str, chosen: str) -> None:
    rows = (row("best", 0.80, 900), row("near", 0.79, 100), row("cheap", 0.75, 10), row("bad", 0.2, 1))
    assert choose(RoutingTable(rows), None, parse_policy(policy)).pair.model == chosen


def test_the_reason_names_the_distance() -> None:
    rows = (row("best", 0.80, 900), row("near", 0.79, 100))
    why = choose(RoutingTable(rows), None, Within()).why
    assert why == "cheapest of 2 ways within 1 point of the best, 79% expected against 80%"
    assert (
        choose(RoutingTable(rows[:1]), None, Within()).why == choose(RoutingTable(rows[:1]), None, Best()).why
    )


@pytest.mark.parametrize("text", ["within:2", "within:-0.1", "within:nan", "within:near", "within:"])
def test_distances_that_cannot_be(text: str) -> None:
    with pytest.raises(InputError):
        parse_policy(text)


def test_the_command_line_has_the_same_default() -> None:
    assert POLICY == DEFAULT_POLICY
    assert parse_policy(POLICY) == Within()


def test_plans_are_chosen_likewise() -> None:
    plans = covering(KNOWN).plans_for(Query("2+2?"))
    assert choose_plan(plans, None, Within()).plan == Plan((KNOWN.pair,))
