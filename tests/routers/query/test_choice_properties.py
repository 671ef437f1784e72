"""What holds of every choice, whatever the table: drawn by Hypothesis."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from viaticum.errors import BudgetExceeded
from viaticum.routers.query import Policy, choose, parse_policy
from viaticum.routers.query.limits import limit_row
from viaticum.types import Pair, RoutingTable, Row

counts = st.integers(0, 20_000)
costs = st.one_of(st.just(0), st.integers(0, 10), st.integers(0, 10**10))
shares = st.one_of(st.sampled_from((0.0, 0.5, 1.0)), st.floats(0, 1))
budgets = st.one_of(st.none(), st.just(0), costs)
policies = st.one_of(
    st.sampled_from(("best", "within", "within:0", "within:1", "weighted:0", "cheapest:0", "fastest:1")),
    st.builds("within:{:.3f}".format, st.floats(0, 1)),
    st.builds("cheapest:{:.3f}".format, st.floats(0, 1)),
    st.builds("fastest:{:.3f}".format, st.floats(0, 1)),
    st.builds("weighted:{:.3f}".format, st.floats(0, 1e6)),
).map(parse_policy)


@st.composite
def rows_of_a_table(draw: st.DrawFn) -> list[Row]:
    """One to twelve rows, with seconds all or none."""
    timed, rows = draw(st.booleans()), []
    for number in range(draw(st.integers(1, 12))):
        median, tokens = draw(costs), draw(counts)
        rows.append(
            Row(
                Pair(f"m{number}", "cot"),
                draw(shares),
                tokens,
                tokens + draw(counts),
                median,
                median + draw(costs),
                draw(st.one_of(st.none(), costs)),
                draw(st.one_of(st.none(), counts)),
                seconds=draw(st.floats(0, 1000)) if timed else None,
            )
        )
    return rows


def chosen(rows: list[Row], left: int | None, policy: Policy) -> Row | None:
    try:
        return choose(RoutingTable(tuple(rows)), left, policy).row
    except BudgetExceeded:
        return None


def figures(row: Row | None) -> tuple[object, ...] | None:
    return None if row is None else (row.accuracy, row.expected_cost, row.seconds)


@given(rows=rows_of_a_table(), left=budgets, policy=policies)
def test_what_is_chosen_fits_and_something_is_chosen_where_anything_fits(
    rows: list[Row], left: int | None, policy: Policy
) -> None:
    row = chosen(rows, left, policy)
    fits = [each for each in rows if left is None or each.cost_p90 <= left]
    assert row in fits if fits else row is None


@given(rows=rows_of_a_table(), left=budgets, policy=policies, rng=st.randoms(use_true_random=False))
def test_neither_order_nor_names_change_what_is_chosen(
    rows: list[Row], left: int | None, policy: Policy, rng: object
) -> None:
    others = list(rows)
    rng.shuffle(others)  # type: ignore[attr-defined]
    renamed = [replace(row, pair=Pair(f"z{len(rows) - n}", "x")) for n, row in enumerate(others)]
    assert figures(chosen(rows, left, policy)) == figures(chosen(renamed, left, policy))
    assert chosen(rows, left, policy) == chosen(list(rows), left, policy)


@given(rows=rows_of_a_table(), left=costs, more=costs)
def test_more_money_never_buys_less_accuracy(rows: list[Row], left: int, more: int) -> None:
    for text in ("best", "cheapest:1"):
        less, best = (chosen(rows, each, parse_policy(text)) for each in (left, left + more))
        assert less is None or (best is not None and best.accuracy >= less.accuracy)


@given(rows=rows_of_a_table(), left=budgets, policy=policies, worse=st.tuples(shares, costs, counts))
def test_a_pair_that_another_one_beats_in_everything_changes_no_choice(
    rows: list[Row], left: int | None, policy: Policy, worse: tuple[float, int, int]
) -> None:
    share, cost, seconds = worse
    row = rows[0]
    beaten = replace(
        row,
        pair=Pair("beaten", "cot"),
        accuracy=row.accuracy * share,
        cost_p50=row.cost_p50 + cost,
        cost_p90=row.cost_p90 + cost,
        cost_mean=row.expected_cost + cost,
        seconds=None if row.seconds is None else row.seconds + seconds,
    )
    found, before = (figures(chosen(each, left, policy)) for each in ([*rows, beaten], rows))
    assert found == before


@given(rows=rows_of_a_table(), limit=st.one_of(st.none(), counts))
def test_a_token_limit_never_makes_a_row_longer_dearer_or_no_number(
    rows: list[Row], limit: int | None
) -> None:
    for row in rows:
        found = limit_row(row, limit)
        assert found.tokens_p50 <= found.tokens_p90 <= (row.tokens_p90 if limit is None else math.inf)
        assert 0 <= found.cost_p50 <= row.cost_p50
        assert 0 <= found.cost_p90 <= row.cost_p90
        if limit is not None and found is not row:
            assert found.tokens_p90 <= limit


@pytest.mark.parametrize("policy", ["best", "within", "cheapest:0.9", "weighted:1"])
def test_one_row_is_chosen_by_every_policy(policy: str) -> None:
    row = Row(Pair("m", "cot"), 0.0, 0, 0, 0, 0)
    assert chosen([row], 0, parse_policy(policy)) is row
