"""`fastest:ACCURACY` in questions, sessions and jobs: by the router's seconds, else by earlier calls."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from workflow_client import LARGE, SMALL, ScriptedModel

from viaticum import Allowance, Pair, Viaticum
from viaticum.agents.batch import run_batch
from viaticum.budgets import Ledger
from viaticum.catalogue import Catalogue
from viaticum.errors import InputError
from viaticum.routers.query import Fastest, Plan, PlanRow, StaticRouter
from viaticum.types import Query, RoutingTable, Row

FIVE = "The answer is 5."


def table(small: float | None, large: float | None) -> StaticRouter:
    seconds = ((SMALL, 0.7, small, 10_000), (LARGE, 0.8, large, 20_000))
    return StaticRouter(
        RoutingTable(
            tuple(
                Row(Pair(name, "cot"), accuracy, 20, 30, cost, 2 * cost, seconds=known)
                for name, accuracy, known, cost in seconds
            )
        )
    )


def asking(folder: Path, router: StaticRouter, **settings: Any) -> Viaticum:
    models = {name: ScriptedModel(name, FIVE) for name in (SMALL, LARGE)}
    settings = {"models": models, "policy": "fastest:0.6", **settings}
    return Viaticum("1", folder=folder, router=router, catalogue=Catalogue.load(), **settings)


def test_the_seconds_of_the_router_decide(tmp_path: Path) -> None:
    for small, large, wanted in ((2.0, 1.0, LARGE), (1.0, 2.0, SMALL), (1.0, 1.0, SMALL), (None, 9.0, LARGE)):
        with asking(tmp_path / f"{small}-{large}", table(small, large)) as viaticum:
            answer = viaticum.solve("What is 2 + 3?")
            assert [route.pair.model for route in answer.routes] == [wanted]
            assert answer.routes[0].why.startswith("fastest of ")


def test_without_any_seconds_a_question_is_refused_and_nothing_is_called(tmp_path: Path) -> None:
    with asking(tmp_path, table(None, None)) as viaticum:
        with pytest.raises(InputError, match="known of no way"):
            viaticum.solve("What is 2 + 3?")
        assert viaticum.budget().posted_nanousd == 0
        assert list(viaticum.ledger.holds(viaticum.budget_name)) == []


def test_earlier_calls_tell_what_the_router_does_not(tmp_path: Path) -> None:
    with asking(tmp_path, table(None, None)) as viaticum:
        viaticum.derive(policy="best").solve("What is 2 + 3?")
    with asking(tmp_path, table(None, None)) as viaticum:  # which reads the ledger anew
        answer = viaticum.solve("What is 2 + 4?")
        assert answer.routes[0].pair.model == LARGE, "the other one was never called"
    with asking(tmp_path, table(0.01, None)) as viaticum:
        assert viaticum.solve("What is 2 + 5?").routes[0].pair.model == SMALL


def test_a_way_of_unknown_seconds_is_asked_after_the_known_one_gave_no_answer(tmp_path: Path) -> None:
    models = {SMALL: ScriptedModel(SMALL, "no idea"), LARGE: ScriptedModel(LARGE, FIVE)}
    with asking(tmp_path, table(1.0, None), models=models) as viaticum:
        answer = viaticum.solve("What is 2 + 3?", kind="number")
    assert [route.pair.model for route in answer.routes] == [SMALL, LARGE]
    assert answer.value == "5"


def test_it_is_within_the_budget_as_ever(tmp_path: Path) -> None:
    small, large = table(2.0, 1.0).rows.rows
    costly = StaticRouter(RoutingTable((small, replace(large, cost_p50=900_000, cost_p90=1_000_000))))
    with asking(tmp_path, costly) as viaticum:
        assert viaticum.solve("What is 2 + 3?").routes[0].pair.model == LARGE
        scope = viaticum.ledger.create("tight", limit_nanousd=800_000, parent=viaticum.budget_name)
        answer = viaticum.derive(budget=scope.name).solve("What is 2 + 4?")
        assert [route.pair.model for route in answer.routes] == [SMALL]


def test_a_session_follows_it(tmp_path: Path) -> None:
    with asking(tmp_path, table(2.0, 1.0)) as viaticum:
        allowance = Allowance(session="one")
        assert viaticum.solve("What is 2 + 3?", allowance=allowance).routes[0].pair.model == LARGE


@pytest.mark.parametrize(("small", "large", "wanted"), [(2.0, 1.0, LARGE), (1.0, 2.0, SMALL)])
def test_a_job_follows_it(tmp_path: Path, small: float, large: float, wanted: str) -> None:
    lines = [{"id": str(n), "question": f"What is 2 + {n}?"} for n in range(6)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    models: Any = {name: ScriptedModel(name, FIVE) for name in (SMALL, LARGE)}
    settings: dict[str, Any] = {
        "models": models,
        "router": table(small, large),
        "ledger": tmp_path / "ledger.db",
    }
    run_batch(tmp_path / "in.jsonl", tmp_path / "out.jsonl", budget="1", policy="fastest:0.6", **settings)
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert {row["pair"] for row in rows} == {f"{wanted}+cot"}
    with Ledger(tmp_path / "ledger.db", read_only=True) as ledger:
        assert ledger.check() == []


def test_a_job_without_any_seconds_is_refused_before_its_first_call(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"question": "What is 2 + 3?"}\n')
    models: Any = {name: ScriptedModel(name, FIVE) for name in (SMALL, LARGE)}
    settings: dict[str, Any] = {
        "models": models,
        "router": table(None, None),
        "ledger": tmp_path / "ledger.db",
    }
    with pytest.raises(InputError, match="known of no way"):
        run_batch(tmp_path / "in.jsonl", tmp_path / "out.jsonl", budget="1", policy="fastest:0.6", **settings)
    assert models[SMALL].calls == models[LARGE].calls == 0


def test_a_plan_of_several_pairs_is_timed_by_earlier_calls_of_all(tmp_path: Path) -> None:
    class Both(StaticRouter):
        def plans_for(self, query: Query) -> list[PlanRow]:
            plan = Plan((Pair(SMALL, "cot"), Pair(LARGE, "cot")), 2)
            return [*super().plans_for(query), PlanRow(plan, 0.99, 30_000, 60_000)]

    router = Both(table(None, None).rows)
    with asking(tmp_path, table(None, None)) as viaticum:
        viaticum.derive(policy="best").solve("What is 2 + 3?")
        viaticum.derive(policy="cheapest:0").solve("What is 2 + 3?")
    with asking(tmp_path, router, policy=Fastest(0.9)) as viaticum:
        assert len(viaticum.solve("What is 2 + 3?").routes) == 2


def test_one_question_may_have_it_as_its_policy(tmp_path: Path) -> None:
    with asking(tmp_path, table(2.0, 1.0), policy="cheapest:0") as viaticum:
        assert viaticum.solve("What is 2 + 3?").routes[0].pair.model == SMALL
        allowance = Allowance(policy="fastest:0.6")
        assert viaticum.solve("What is 2 + 3?", allowance=allowance).routes[0].pair.model == LARGE
    with pytest.raises(InputError):
        Allowance(policy="fastest:1.5")
