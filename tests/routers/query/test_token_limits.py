"""Predicted output tokens where outputs were cut, and where calls have other limits than the outcomes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from synthetic_outcomes import Words, a_question, outcomes

from viaticum.routers.query import Plan, PlanRow, StaticRouter, Weighted, choose
from viaticum.routers.query.fit import fit
from viaticum.routers.query.limits import by_pair, limit_plans, limit_row, limit_table
from viaticum.routers.query.outcome_matrix import OutcomeMatrix
from viaticum.routers.query.rtr import RTRRouter
from viaticum.types import Outcome, Pair, Query, RoutingTable, Row

pytestmark = pytest.mark.usefixtures("one_thread")
THINK = Pair("m", "think")
PRICE, PROMPT = 1000, 5000  # nano-dollars of an output token and of the prompt


def thoughts(count: int = 900, seed: int = 0, limit: int | None = None) -> tuple[list[Outcome], np.ndarray]:
    """Outcomes of one pair with log-normal lengths (median 1,000, spread 1) cut at `limit`; the lengths."""
    rng = np.random.default_rng(seed)
    lengths = np.exp(np.log(1000) + rng.standard_normal(count)).round()
    rows = []
    for number, length in enumerate(lengths):
        written = int(min(length, limit or length))
        rows.append(
            Outcome(
                "d",
                str(number),
                f"question {number}",
                THINK.model,
                THINK.strategy,
                "1",
                written == length,
                output_tokens=written,
                cost_nanousd=PROMPT + PRICE * written,
                finish_reason="stop" if written == length else "length",
            )
        )
    return rows, lengths


def the_row(rows: list[Outcome]) -> Row:
    return next(iter(StaticRouter.fit(rows).table(Query("q"))))


@pytest.mark.parametrize("seed", range(3))
def test_a_cut_third_does_not_hide_the_quantiles(seed: int) -> None:
    rows, lengths = thoughts(seed=seed, limit=1500)
    row = the_row(rows)
    assert 0.28 < np.mean([each.finish_reason == "length" for each in rows]) < 0.4
    assert np.mean(lengths <= row.tokens_p50) == pytest.approx(0.5, abs=0.01)
    assert np.mean(lengths <= row.tokens_p90) == pytest.approx(0.9, abs=0.04)
    assert row.cut_at == 1500
    assert row.cost_mean == pytest.approx(PROMPT + PRICE * np.minimum(lengths, 1500).mean(), rel=1e-3)


@pytest.mark.parametrize("limit", [400, 1500, 6000])
def test_under_another_limit_what_is_written_is_predicted(limit: int) -> None:
    """Quantiles end at the limit, the mean is that of what is written: lower, equal and higher limits."""
    rows, lengths = thoughts(limit=1500)
    row = limit_row(the_row(rows), limit)
    written = np.minimum(lengths, limit)
    assert row.tokens_p90 <= limit
    assert row.cost_p90 <= PROMPT + PRICE * limit * 1.05
    assert row.tokens_p50 == pytest.approx(np.quantile(written, 0.5), rel=0.05)
    assert row.tokens_p90 == pytest.approx(np.quantile(written, 0.9), rel=0.15)
    assert row.cost_mean == pytest.approx(PROMPT + PRICE * written.mean(), rel=0.1)
    assert row.cost_p50 == pytest.approx(PROMPT + PRICE * row.tokens_p50, rel=0.1)


def test_a_limit_that_nothing_reaches_changes_nothing() -> None:
    table = RoutingTable((Row(THINK, 0.5, 100, 300, 1000, 3000, 1300),))
    assert limit_table(table, lambda pair: 4000) is table
    assert limit_table(table, lambda pair: None) is table
    plan = PlanRow(Plan((THINK,)), 0.5, 1000, 3000, 1300)
    assert limit_plans([plan], by_pair(table), by_pair(table)) == [plan]


def test_plans_follow_their_pairs() -> None:
    other = Pair("m", "direct")
    table = RoutingTable(
        (Row(THINK, 0.5, 1000, 3000, 1000, 3000, 1500), Row(other, 0.3, 10, 20, 100, 200, 120))
    )
    limited = limit_table(table, lambda pair: 1000 if pair == THINK else 400)
    alone, both = limit_plans(
        [
            PlanRow(Plan((THINK,)), 0.5, 1000, 3000, 1500),
            PlanRow(Plan((THINK, other)), 0.6, 1100, 3200, 1620),
        ],
        by_pair(table),
        by_pair(limited),
    )
    assert (alone.cost_p50, alone.cost_p90) == (1000, 1000)
    assert alone.cost_mean is not None
    assert alone.cost_mean < 1000
    assert both.cost_p90 == 1200
    assert both.cost_mean is not None
    assert both.cost_mean < 1620


def test_expected_dollars_are_the_mean_not_the_median() -> None:
    """A tail of long thoughts costs more than its median says."""
    table = RoutingTable(
        (
            Row(THINK, 0.8, 10, 9000, 10_000, 9_000_000, 2_000_000),
            Row(Pair("m", "cot"), 0.7, 300, 500, 300_000, 500_000, 320_000),
        )
    )
    assert choose(table, None, Weighted(100)).pair.strategy == "cot"
    assert choose(table, None, Weighted(1)).pair == THINK


def hard_and_easy(count: int, seed: int, limit: int) -> tuple[OutcomeMatrix, np.ndarray]:
    """Sums are answered at once, kin questions after a thought, games either way; cut at `limit`."""
    rng, rows, lengths = np.random.default_rng(seed), [], []
    for number in range(count):
        kind = ("sums", "kin", "games")[number % 3]
        long = rng.random() < {"sums": 0.02, "kin": 0.98, "games": 0.5}[kind]
        length = round(float(np.exp(np.log(900 if long else 12) + 0.5 * rng.standard_normal())))
        lengths.append(max(1, length))
        written = min(lengths[-1], limit)
        rows.append(
            Outcome(
                kind,
                str(number),
                a_question(kind, rng),
                "m",
                "think",
                "1",
                bool(rng.random() < 0.7),
                output_tokens=written,
                cost_nanousd=written,
                finish_reason="length" if written < lengths[-1] else "stop",
            )
        )
    return OutcomeMatrix.from_outcomes(rows), np.array(lengths)


@pytest.fixture(scope="module")
def bimodal() -> RTRRouter:
    return fit(hard_and_easy(450, 0, 1200)[0], Words())  # type: ignore[arg-type]


def test_quantiles_hold_for_each_kind_of_question_where_answers_are_short_or_thoughts(
    bimodal: RTRRouter,
) -> None:
    matrix, lengths = hard_and_easy(450, 5, 10**9)
    tokens = bimodal.predict_texts(matrix.texts).tokens[:, 0].numpy()
    for kind in ("sums", "kin", "games"):
        rows = matrix.datasets == kind
        within = (lengths[rows, None] <= tokens[rows] + 0.5).mean(0)
        assert within[1] >= 0.82, kind
        if kind != "games":  # half of them are short: any length between the two sides is a median
            assert within[0] == pytest.approx(0.5, abs=0.2), kind
    middle = {kind: float(np.median(tokens[matrix.datasets == kind, 0])) for kind in ("sums", "kin")}
    assert middle["sums"] < 60 < 400 < middle["kin"]
    # The true quantile of the thoughts, 1,700, is hidden by the cut at 1,200.
    assert 1300 < np.median(tokens[matrix.datasets == "kin", 1]) < 5000


def test_a_router_says_where_its_outcomes_were_cut(bimodal: RTRRouter, tmp_path: object) -> None:
    table = bimodal.table(Query(a_question("kin", np.random.default_rng(1))))
    assert [row.cut_at for row in table] == [1200]
    bimodal.save(tmp_path)  # type: ignore[arg-type]
    loaded = RTRRouter.load(tmp_path, Words())  # type: ignore[arg-type]
    assert loaded.table(Query("mother sister uncle")) == bimodal.table(Query("mother sister uncle"))


def filler(words: int, rng: np.random.Generator) -> str:
    return "".join(" " + "".join(map(chr, rng.integers(97, 123, 6))) for _ in range(words))


def test_a_long_prompt_costs_its_tokens_and_lengthens_the_answer() -> None:
    """Costs in the table count the prompt, of 20 to 2,000 words; the answer grows with it."""
    rng, rows = np.random.default_rng(0), []
    for number in range(240):
        words = int(np.exp(rng.uniform(np.log(20), np.log(2000))))
        text = a_question("sums", rng) + filler(words, rng)
        tokens = round(30 * words**0.5 * float(np.exp(0.2 * rng.standard_normal())))
        cost = 1000 * words + 4000 * tokens
        rows.append(
            Outcome("d", str(number), text, "m", "cot", "1", bool(rng.random() < 0.5), words, tokens, cost)
        )
    router = fit(OutcomeMatrix.from_outcomes(rows), Words())  # type: ignore[arg-type]
    short, long = (
        next(iter(router.table(Query(a_question("sums", rng) + filler(words, rng))))) for words in (40, 1600)
    )
    assert long.tokens_p50 > 2.5 * short.tokens_p50
    for row, words in ((short, 40), (long, 1600)):
        expected = 1000 * words + 4000 * 30 * words**0.5
        assert row.cost_p50 == pytest.approx(expected, rel=0.35)
        assert row.cost_mean == pytest.approx(expected, rel=0.5)


def test_outcomes_that_were_cut_do_not_shorten_an_added_pair() -> None:
    from viaticum.routers.query.learn import add

    router = fit(OutcomeMatrix.from_outcomes(outcomes(150)), Words())  # type: ignore[arg-type]
    new = [
        replace(
            row,
            model="new",
            output_tokens=min(row.output_tokens or 0, 90),
            finish_reason="length" if (row.output_tokens or 0) > 90 else "stop",
        )
        for row in outcomes(150, seed=3)
        if row.pair == Pair("big", "cot")
    ]
    added = add(router, Pair("new", "cot"), {}, (1, 40), OutcomeMatrix.from_outcomes(new))
    whole = [replace(row, finish_reason="stop") for row in new]
    naive = add(router, Pair("new", "cot"), {}, (1, 40), OutcomeMatrix.from_outcomes(whole))
    text = [a_question("sums", np.random.default_rng(8))]
    assert float(added.predict_texts(text).tokens[0, -1, 1]) > 1.2 * float(
        naive.predict_texts(text).tokens[0, -1, 1]
    )
    assert torch.isfinite(added.predict_texts(text).cost).all()
