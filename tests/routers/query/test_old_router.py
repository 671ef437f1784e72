"""A router folder that was written by the code of commit 0ee2f32 (format 1, with one added pair) still loads.

`tests/data/router_v1` holds the folder and, in `tables.json`, what that code predicted for three questions.
It was fitted on `synthetic_outcomes.outcomes(60)` with the encoder `Words`; the pair fresh+cot was added from
40 outcomes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from synthetic_outcomes import Words

from viaticum.routers.query.rtr import RTRRouter
from viaticum.types import Query

FOLDER = Path(__file__).resolve().parents[2] / "data" / "router_v1"
TABLES: list[dict[str, Any]] = json.loads((FOLDER / "tables.json").read_text(encoding="utf-8"))

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("expected", TABLES, ids=["sums", "kin", "games"])
def test_an_old_router_predicts_the_same_tables(expected: dict[str, Any]) -> None:
    router = RTRRouter.load(FOLDER, Words())  # type: ignore[arg-type]
    query = Query(expected["question"])
    table, plans = router.table(query), router.plans_for(query)
    assert [str(row.pair) for row in table] == [row["pair"] for row in expected["table"]]
    assert [str(row.plan) for row in plans] == [row["plan"] for row in expected["plans"]]
    for names, rows, wanted in (
        (("accuracy", "tokens_p50", "tokens_p90", "cost_p50", "cost_p90"), table, expected["table"]),
        (("accuracy", "expected_cost", "cost_p90"), plans, expected["plans"]),
    ):
        for row, old in zip(rows, wanted, strict=True):
            # What that code called the median of a plan's cost was its mean.
            old |= {} if rows is table else {"expected_cost": old["cost_p50"]}
            assert [getattr(row, name) for name in names] == pytest.approx(
                [old[name] for name in names], rel=1e-5
            )


def test_an_old_router_keeps_its_facts() -> None:
    parameters = RTRRouter.load(FOLDER, Words()).parameters  # type: ignore[arg-type]
    assert parameters.facts["questions"] == 60
    assert parameters.added is not None
    assert [str(pair) for pair in parameters.added.pairs] == ["fresh+cot"]
