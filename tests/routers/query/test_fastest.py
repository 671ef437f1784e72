"""The policy `fastest:ACCURACY`, and the seconds of outcomes in the tables and plans that it chooses from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from synthetic_outcomes import PAIRS, Words, a_question, outcomes

from viaticum.errors import BudgetExceeded, InputError
from viaticum.routers.query import Fastest, Plan, PlanRow, StaticRouter, choose, choose_plan, parse_policy
from viaticum.routers.query.fit import fit
from viaticum.routers.query.learn import add
from viaticum.routers.query.limits import by_pair, limit_plans, limit_table
from viaticum.routers.query.outcome_matrix import OutcomeMatrix
from viaticum.routers.query.parameters import RTRSettings
from viaticum.routers.query.rtr import RTRRouter
from viaticum.types import Outcome, Pair, Query, RoutingTable, Row

pytestmark = pytest.mark.usefixtures("one_thread")


def row(name: str, accuracy: float, seconds: float | None, cost: int = 100) -> Row:
    return Row(Pair(name, "cot"), accuracy, 20, 30, cost, 2 * cost, seconds=seconds)


def chosen(policy: str, *rows: Row, left: int | None = None) -> str:
    return choose(RoutingTable(rows), left, parse_policy(policy)).pair.model


SLOW, QUICK, WEAK = row("slow", 0.9, 8.0, 10), row("quick", 0.7, 2.0, 500), row("weak", 0.3, 0.5, 1)
UNKNOWN = row("unknown", 0.95, None, 1)


def test_the_fastest_that_is_expected_to_reach_it_whatever_it_costs() -> None:
    assert chosen("fastest:0.6", SLOW, QUICK, WEAK) == "quick"
    assert chosen("fastest:0.8", SLOW, QUICK, WEAK) == "slow"
    assert chosen("fastest:0", SLOW, QUICK, WEAK) == "weak"
    assert chosen("fastest:0.99", SLOW, QUICK, WEAK) == "slow"
    why = choose(RoutingTable((SLOW, QUICK, WEAK)), None, Fastest(0.6)).why
    assert why == "fastest of 2 ways expected to reach 60%, 2.0 s"
    assert "no pair that fits reaches 99%" in choose(RoutingTable((SLOW, WEAK)), None, Fastest(0.99)).why


def test_ties_go_to_the_cheapest_then_to_the_most_accurate() -> None:
    cheap, better = replace(QUICK, cost_p50=20), replace(QUICK, cost_p50=20, accuracy=0.8)
    cheap, better = replace(cheap, pair=Pair("cheap", "cot")), replace(better, pair=Pair("better", "cot"))
    assert chosen("fastest:0.6", QUICK, cheap) == chosen("fastest:0.6", cheap, QUICK) == "cheap"
    assert chosen("fastest:0.6", QUICK, cheap, better) == "better"


def test_unknown_seconds_are_never_chosen_before_known_ones() -> None:
    for policy in ("fastest:0.6", "fastest:0.92", "fastest:0"):
        assert chosen(policy, UNKNOWN, SLOW, QUICK) != "unknown"
    assert (
        "of 1 more the seconds are not known" in choose(RoutingTable((UNKNOWN, SLOW)), None, Fastest(0.5)).why
    )
    other = replace(UNKNOWN, pair=Pair("other", "cot"), cost_p50=500)
    left = choose(RoutingTable((other, UNKNOWN)), None, Fastest(0.5))  # once the known ones were tried
    assert left.pair.model == "unknown"
    assert "seconds are not known" in left.why


def test_without_any_seconds_it_says_what_to_do() -> None:
    with pytest.raises(InputError, match=r"known of no way.*viaticum profile"):
        parse_policy("fastest:0.5").check([UNKNOWN, replace(SLOW, seconds=None)])
    parse_policy("fastest:0.5").check([UNKNOWN, SLOW])
    parse_policy("fastest:0.5").check([])
    parse_policy("cheapest:0.5").check([UNKNOWN])


def test_it_stays_within_the_budget() -> None:
    assert chosen("fastest:0.6", SLOW, QUICK, WEAK, left=100) == "slow"
    assert chosen("fastest:0.6", SLOW, QUICK, WEAK, left=2) == "weak"
    with pytest.raises(BudgetExceeded):
        choose(RoutingTable((SLOW, QUICK)), 5, Fastest(0.6))


@pytest.mark.parametrize(
    "text", ["fastest", "fastest:", "fastest:2", "fastest:-0.1", "fastest:nan", "fastest:x"]
)
def test_it_wants_an_accuracy(text: str) -> None:
    with pytest.raises(InputError):
        parse_policy(text)


def test_plans_are_chosen_by_their_seconds_too() -> None:
    alone = PlanRow(Plan((SLOW.pair,)), 0.9, 10, 20, seconds=8.0)
    both = PlanRow(Plan((QUICK.pair, WEAK.pair)), 0.9, 10, 20, seconds=2.5)
    assert choose_plan([alone, both], None, Fastest(0.8)).plan == both.plan
    assert choose_plan([alone, replace(both, seconds=None)], None, Fastest(0.8)).plan == alone.plan


def test_a_static_router_counts_mean_seconds_where_there_are_some(tmp_path: Path) -> None:
    def outcome(number: int, model: str, seconds: float | None) -> Outcome:
        return Outcome("d", str(number), "q", model, "cot", "1", True, 5, 10, 100, seconds)

    rows = [
        outcome(1, "timed", 1.0),
        outcome(2, "timed", 4.0),
        outcome(3, "timed", None),
        outcome(1, "un", None),
    ]
    router = StaticRouter.fit(rows)
    assert [each.seconds for each in router.rows] == [2.5, None]
    router.save(tmp_path / "router.json")
    assert StaticRouter.load(tmp_path / "router.json").rows == router.rows
    (plan, _) = router.plans_for(Query("q"))
    assert plan.seconds == 2.5


def test_shorter_texts_take_less_time() -> None:
    long = Row(Pair("long", "cot"), 0.5, 1_000, 3_000, 1_000, 3_000, 1_500, seconds=15.0)
    other = replace(long, pair=Pair("other", "cot"), seconds=None)
    table = RoutingTable((long, other))
    limited = limit_table(table, lambda pair: 100)
    before, after = by_pair(table), by_pair(limited)
    assert 0.5 < (after[long.pair].seconds or 0) < 3
    assert after[other.pair].seconds is None
    plans = [PlanRow(Plan((long.pair,)), 0.5, 1_000, 3_000, 1_500, seconds=15.0)]
    plans.append(PlanRow(Plan((long.pair, other.pair)), 0.5, 2_000, 6_000, 3_000, seconds=20.0))
    one, two = limit_plans(plans, before, after)
    assert one.seconds == after[long.pair].seconds
    assert 0 < (two.seconds or 0) < 5


# The learned router

SECONDS = {"tiny": 0.02, "mid": 0.01, "big": 0.1}  # a token


def timed_outcomes(*untimed: str) -> list[Outcome]:
    return [
        each
        if each.model in untimed
        else replace(each, seconds=(each.output_tokens or 0) * SECONDS[each.model] + (each.dataset == "kin"))
        for each in outcomes(300)
    ]


@pytest.fixture(scope="module")
def router() -> RTRRouter:
    return fit(OutcomeMatrix.from_outcomes(timed_outcomes("tiny")), Words())  # type: ignore[arg-type]


def query(kind: str) -> Query:
    return Query(a_question(kind, np.random.default_rng(77)))


def test_seconds_are_predicted_for_each_question_and_pair(router: RTRRouter) -> None:
    for kind, more in (("sums", 0.0), ("kin", 1.0)):
        rows = {each.pair: each for each in router.table(query(kind))}
        assert set(rows) == set(PAIRS)
        assert rows[Pair("big", "cot")].seconds == pytest.approx(90 * 1.08 * 0.1 + more, rel=0.2)
        assert rows[Pair("mid", "cot")].seconds == pytest.approx(60 * 1.08 * 0.01 + more, rel=0.4)
        assert rows[Pair("tiny", "cot")].seconds is None, "none are known, which is not the others' mean"


def test_a_plan_takes_the_time_of_the_pairs_that_it_calls(router: RTRRouter) -> None:
    both = Plan((Pair("mid", "cot"), Pair("big", "cot")))
    plans = {each.plan: each.seconds for each in router.plans_for(query("sums"))}
    for plan, seconds in plans.items():
        assert (seconds is None) == any(pair.model == "tiny" for pair in plan.pairs), plan
    alone = [plans[Plan((pair,))] for pair in both.pairs]
    for plan, seconds in plans.items():
        if len(plan.pairs) > 1 and seconds is not None:
            assert seconds >= max(filter(None, alone)) * 0.9


def test_a_router_keeps_its_seconds_and_one_without_has_none(router: RTRRouter, tmp_path: Path) -> None:
    router.save(tmp_path / "new")
    same = RTRRouter.load(tmp_path / "new", Words())  # type: ignore[arg-type]
    assert same.table(query("games")) == router.table(query("games"))
    assert same.plans_for(query("games")) == router.plans_for(query("games"))
    settings = RTRSettings(plans=False, trust=False)
    without = fit(OutcomeMatrix.from_outcomes(outcomes(90)), Words(), settings=settings)  # type: ignore[arg-type]
    without.save(tmp_path / "old")
    old = RTRRouter.load(tmp_path / "old", Words())  # type: ignore[arg-type]
    assert all(each.seconds is None for each in old.table(query("sums")))
    with pytest.raises(InputError, match="known of no way"):
        Fastest(0.5).check(old.plans_for(query("sums")))


def test_an_added_pair_has_the_seconds_of_its_outcomes(router: RTRRouter, tmp_path: Path) -> None:
    pair = Pair("new", "cot")
    known = [
        replace(each, model="new", seconds=3.0)
        for each in outcomes(40, seed=3)
        if each.pair == Pair("mid", "cot")
    ]
    for given, wanted in ((OutcomeMatrix.from_outcomes(known), 3.0), (None, None)):
        larger = add(router, pair, {}, (1.0, 2.0), given)
        larger.save(tmp_path / str(wanted))
        for each in (larger, RTRRouter.load(tmp_path / str(wanted), Words())):  # type: ignore[arg-type]
            assert by_pair(each.table(query("sums")))[pair].seconds == wanted


def test_by_its_predictions_the_fastest_way_is_chosen(router: RTRRouter) -> None:
    asked = {kind: choose(router.table(query(kind)), None, Fastest(0.5)).pair for kind in ("sums", "games")}
    assert asked == {"sums": Pair("mid", "cot"), "games": Pair("mid", "cot")}
    assert choose(router.table(query("kin")), None, Fastest(0.75)).pair == Pair("big", "cot")
