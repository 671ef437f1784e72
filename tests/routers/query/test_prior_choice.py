"""Choosing from rows of a prior: never dearer than by its averages, and marked as a prior in `why`."""

from __future__ import annotations

import pytest

from viaticum.agents.workflow.serialization import row_from_json, row_to_json
from viaticum.routers.query import (
    AtPrice,
    Best,
    Cheapest,
    Plan,
    PlanRow,
    Policy,
    Weighted,
    choose,
    choose_plan,
)
from viaticum.types import Pair, RoutingTable, Row

CHEAP, DEAR = Pair("cheap", "cot"), Pair("dear", "cot")


def row(pair: Pair, accuracy: float, cost: int, average: float | None, origin: str = "") -> Row:
    return Row(pair, accuracy, 10, 20, cost, 2 * cost, average=average, origin=origin)


def table(cheap: tuple[float, float | None], dear: tuple[float, float | None]) -> RoutingTable:
    return RoutingTable((row(CHEAP, cheap[0], 1_000, cheap[1]), row(DEAR, dear[0], 1_000_000, dear[1])))


@pytest.mark.parametrize(
    ("policy", "cheap", "dear"),
    [
        (Best(), (0.5, 0.7), (0.6, 0.7)),
        (Cheapest(0.6), (0.4, 0.65), (0.55, 0.8)),
        (Weighted(200.0), (0.3, 0.6), (0.7, 0.7)),
        (AtPrice(200.0), (0.3, 0.6), (0.7, 0.7)),
    ],
)
def test_a_view_of_one_question_never_buys_a_dearer_pair_than_the_averages(
    policy: Policy, cheap: tuple[float, float], dear: tuple[float, float]
) -> None:
    """A hard question takes every pair below the wanted accuracy; the best of them would be the dearest."""
    rows = table(cheap, dear)
    assert choose(table((cheap[0], None), (dear[0], None)), None, policy).pair == DEAR
    route = choose(rows, None, policy)
    assert (route.pair, route.row.accuracy) == (CHEAP, cheap[0])
    assert "by averages" in route.why
    plans = [PlanRow(Plan((r.pair,)), r.accuracy, r.cost_p50, r.cost_p90, average=r.average) for r in rows]
    assert choose_plan(plans, None, policy).plan == Plan((CHEAP,))


def test_it_may_choose_a_cheaper_pair_than_the_averages() -> None:
    rows = table((0.9, 0.5), (0.95, 0.95))
    route = choose(rows, None, Cheapest(0.8))
    assert route.pair == CHEAP
    assert "by averages" not in route.why


def test_why_tells_where_the_chosen_row_is_from() -> None:
    rows = RoutingTable((row(CHEAP, 0.5, 10, None), row(DEAR, 0.9, 20, None, "prior only: no outcomes")))
    assert choose(rows, None, Best()).why.endswith("; prior only: no outcomes")
    assert "prior" not in choose(rows, None, Cheapest(0.4)).why


def test_rows_survive_json_with_and_without_the_fields_of_a_prior() -> None:
    full = Row(CHEAP, 0.5, 1, 2, 3, 4, 5, 6, 0.2, 0.8, 0.55, "prior only")
    for each in (full, Row(DEAR, 0.5, 1, 2, 3, 4)):
        assert row_from_json(row_to_json(each)) == each
    assert "average" not in row_to_json(Row(DEAR, 0.5, 1, 2, 3, 4))
