"""The static router: counting from outcomes, its file, and the table in the package."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from viaticum.catalogue import Catalogue
from viaticum.errors import DataError, InputError
from viaticum.outcomes import read_outcomes
from viaticum.routers.query import StaticRouter, choose, parse_policy
from viaticum.types import Outcome, Pair, Query, RoutingTable, Row

SHIPPED = resources.files("viaticum.routers.query") / "outcomes.parquet"


def outcome(number: int, correct: bool, tokens: int | None = 10, cost: int | None = 100) -> Outcome:
    return Outcome("d", str(number), "q", "m", "cot", "1", correct, 5, tokens, cost)


def test_counts_accuracy_and_quantiles() -> None:
    rows = [outcome(n, n % 4 == 0, tokens=n, cost=n * 10) for n in range(1, 11)]
    (row,) = StaticRouter.fit(rows).table(Query("anything"))
    assert row == Row(
        Pair("m", "cot"), 0.2, tokens_p50=5, tokens_p90=9, cost_p50=50, cost_p90=90, cost_mean=55
    )


def test_rows_without_tokens_count_for_the_accuracy_only() -> None:
    rows = [outcome(1, True), outcome(2, True, None, None), outcome(3, False, None, None)]
    (row,) = StaticRouter.fit(rows).rows
    assert (row.accuracy, row.tokens_p50) == (2 / 3, 10)
    with pytest.raises(DataError, match="profile it again"):
        StaticRouter.fit(rows[1:])
    with pytest.raises(DataError, match="empty"):
        StaticRouter.fit([])


def test_saved_and_loaded_it_is_the_same(tmp_path: Path) -> None:
    router = StaticRouter.fit([outcome(n, n < 3) for n in range(5)])
    router.save(tmp_path / "router.json")
    assert StaticRouter.load(tmp_path / "router.json").rows == router.rows
    with pytest.raises(InputError, match="cannot read"):
        StaticRouter.load(tmp_path / "missing.json")
    for text in ("", "[]", '{"rows": [{"pair": "a+b"}]}', json.dumps({"rows": [{"pair": "no plus"}]})):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(DataError, match=r"bad\.json is not a static router"):
            StaticRouter.load(tmp_path / "bad.json")


def test_the_packaged_router_is_counted_from_the_packaged_table() -> None:
    """But for its seconds: pairs were profiled with other numbers of texts at once, beside other work."""
    rows = StaticRouter.fit(read_outcomes(str(SHIPPED))).rows
    assert all(row.seconds is not None for row in rows)
    assert StaticRouter.default().rows == RoutingTable(tuple(replace(row, seconds=None) for row in rows))


def test_the_packaged_table_is_complete() -> None:
    outcomes = read_outcomes(str(SHIPPED))
    catalogue = Catalogue.load()
    asked: dict[Pair, set[str]] = {}
    for row in outcomes:
        asked.setdefault(row.pair, set()).add(row.question_id)
        assert row.model in catalogue
        assert row.cost_nanousd
        assert row.output_tokens
        assert row.input_tokens
        assert row.question == "", "the questions' texts are not ours to ship"
    models = ("qwen2.5-coder-0.5b", "qwen2.5-coder-1.5b")
    assert set(asked) >= {
        Pair(model, strategy) for model in models for strategy in ("direct", "cot", "cod", "pot")
    }
    assert all(len(ids) == 200 for ids in asked.values())
    assert len(outcomes) == 200 * len(asked)


def test_the_router_in_the_docs_works() -> None:
    """The example of docs/explanation/routing.md."""
    text = (Path(__file__).resolve().parents[3] / "docs" / "explanation" / "routing.md").read_text(
        encoding="utf-8"
    )
    example = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[-1]
    names: dict[str, Any] = {}
    exec(example, names)
    router = names["ShortQuestions"]()
    short, long = (router.table(Query("How many? " * count)) for count in (1, 20))
    assert 0 < len(short) < len(long)
    assert {row.plan.pairs[0] for row in router.plans_for(Query("How many?"))} == {row.pair for row in short}


def test_a_pair_of_unknown_accuracy_is_left_out_wherever_it_stands() -> None:
    rows = [Row(Pair(name, "cot"), accuracy, 1, 1, 5, 5) for name, accuracy in (("a", 0.9), ("b", 0.4))]
    unknown = Row(Pair("c", "cot"), float("nan"), 1, 1, 1, 1)
    for policy in ("within", "best", "cheapest:0.5", "weighted:1"):
        for table in ([unknown, *rows], [*rows, unknown]):
            assert choose(RoutingTable(tuple(table)), None, parse_policy(policy)).pair.model == "a"
    with pytest.raises(InputError, match="knows no accuracy"):
        choose(RoutingTable((unknown,)), None, parse_policy("best"))
