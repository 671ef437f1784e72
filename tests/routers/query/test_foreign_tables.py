"""Tables that users have: free models, no tokens, costs that are unknown, budgets that are none, no texts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from synthetic_outcomes import Words, outcomes

from viaticum.budgets.paced_run import paced_choices
from viaticum.errors import DataError, InputError
from viaticum.routers.query.calibration import cost_ratios
from viaticum.routers.query.evaluate import evaluate
from viaticum.routers.query.fit import fit
from viaticum.routers.query.heads import NeighboursHead
from viaticum.routers.query.learn import add
from viaticum.routers.query.leave_out import evaluate_leaving_out
from viaticum.routers.query.outcome_matrix import OutcomeMatrix
from viaticum.routers.query.plans import COST_WEIGHTS
from viaticum.routers.query.prediction import Prediction
from viaticum.routers.query.rtr import RTRRouter
from viaticum.types import Outcome, Pair, Query

pytestmark = pytest.mark.usefixtures("one_thread")
KNOWN = outcomes(90)


def fitted(change: Callable[[Outcome], Outcome]) -> tuple[RTRRouter, OutcomeMatrix]:
    matrix = OutcomeMatrix.from_outcomes(map(change, KNOWN))
    return fit(matrix, Words()), matrix  # type: ignore[arg-type]


def test_beside_a_free_model_the_budget_is_spent() -> None:
    router, matrix = fitted(lambda row: replace(row, cost_nanousd=0) if row.model == "tiny" else row)
    prediction, rows = router.predict_texts(matrix.texts), torch.arange(len(matrix))
    assert not router.parameters.cost_ratios.isnan().any()
    accuracy = []
    for budget in (1e-4, 3e-4, 1e-3):
        chosen = router.choose_within(prediction, budget)
        ratio = 2  # between expected and planned costs
        assert budget / ratio < float(prediction.cost[rows, chosen].mean()) < budget * ratio
        accuracy.append(float(prediction.accuracy[rows, chosen].mean()))
    assert accuracy == sorted(set(accuracy))


@pytest.mark.parametrize("free", [("big",), ("tiny", "mid", "big")])
def test_a_router_is_evaluated_where_the_best_pair_is_free(free: tuple[str, ...]) -> None:
    router, matrix = fitted(lambda row: replace(row, cost_nanousd=0) if row.model in free else row)
    found = evaluate(router, matrix, paced=paced_choices)
    assert found["best_single"]["pair"] == "big+cot"
    assert found["best_single"]["cost"] == 0
    assert found["cost_at_best_single_accuracy"] in (None, 1.0)
    assert all(point["accuracy"] > 0.8 for point in found["curve"])


def test_costs_that_are_unknown_say_nothing_of_their_ratio() -> None:
    rng = np.random.default_rng(0)
    accuracy, expected = torch.from_numpy(rng.random((80, 3))), torch.from_numpy(rng.random((80, 3)))
    cost = expected * 1.5
    known = cost_ratios(accuracy, expected, cost)
    unknown = torch.full_like(cost, float("nan"))
    doubled = [torch.cat((each, each)) for each in (accuracy, expected)]
    assert torch.equal(cost_ratios(*doubled, torch.cat((cost, unknown))), known)
    assert cost_ratios(accuracy, expected, unknown).tolist() == [1.0] * len(COST_WEIGHTS)


@pytest.mark.parametrize("without", [("mid",), ("tiny", "mid", "big")])
def test_pairs_without_tokens_have_their_costs_and_no_tokens(without: tuple[str, ...]) -> None:
    router, matrix = fitted(lambda row: replace(row, output_tokens=None) if row.model in without else row)
    query = Query("mother sister uncle nephew daughter name3 name8")
    more = router
    if "tiny" in without:
        with pytest.raises(DataError, match="without output_tokens"):
            add(router, Pair("new", "cot"), {}, (1.0, 2.0))
    else:
        more = add(router, Pair("new", "cot"), {}, (1.0, 2.0))
        row = list(more.table(query))[-1]
        assert 10 < row.tokens_p50 < 100
        assert 1_000 * row.tokens_p50 < row.cost_p50 < 10_000 * row.tokens_p50
    for row in (*router.table(query), *more.table(query)):
        if row.pair.model in without:
            assert (row.tokens_p50, row.tokens_p90) == (0, 0)
            costs = 1e9 * matrix.cost[:, matrix.pairs.index(row.pair)]
            assert np.quantile(costs, 0.3) < row.cost_p50 < np.quantile(costs, 0.7) < row.cost_p90
        elif row.pair.model != "new":
            assert 0 < row.tokens_p50 <= row.tokens_p90
        assert 0 < row.cost_p50 <= row.cost_p90
    assert len(router.plans_for(query)) == len(router.plans)
    assert not router.predict_texts([query.text]).tokens.isnan().any()


@pytest.mark.parametrize("budget", [0.0, -1.0, float("inf"), float("nan")])
def test_a_budget_that_is_none_is_refused(budget: float) -> None:
    router, matrix = fitted(lambda row: row)
    with pytest.raises(InputError, match="a budget is above zero"):
        evaluate(router, matrix, budgets=[0.001, budget])
    with pytest.raises(InputError, match="a budget is above zero"):
        evaluate_leaving_out(matrix, Words(), budgets=[budget])  # type: ignore[arg-type]


def test_questions_without_texts_are_refused() -> None:
    router, _ = fitted(lambda row: row)
    blank = [replace(row, question="") for row in KNOWN]
    with pytest.raises(DataError, match="leaves out the questions' texts"):
        evaluate(router, OutcomeMatrix.from_outcomes(blank))
    new = OutcomeMatrix.from_outcomes(replace(row, model="new") for row in blank if row.model == "mid")
    with pytest.raises(DataError, match="leaves out the questions' texts"):
        add(router, Pair("new", "cot"), {}, (1.0, 2.0), new)


def test_a_paid_model_beside_free_ones_pays_for_its_prompt() -> None:
    router, matrix = fitted(lambda row: replace(row, cost_nanousd=0))
    more = add(router, Pair("paid", "direct"), {}, (1.0, 0.0))
    row = list(more.table(Query(matrix.texts[0])))[-1]
    tokens = np.mean([len(text) for text in matrix.texts]) / 4
    assert row.cost_p50 == pytest.approx(1e3 * tokens, rel=0.05)


def test_an_arm_beyond_the_known_ones_costs_nothing_less_than_nothing() -> None:
    """Prompts of the known arms cost more with each: along that line this one's would be negative."""
    rows = []
    for number, level in enumerate(("think:1k", "think:4k", "think:16k")):
        for row in KNOWN:
            if row.model == "mid":
                cost = 10_000 * 10**number + 2_000 * (row.output_tokens or 0)
                rows.append(replace(row, strategy=level, cost_nanousd=cost))
    router = fit(OutcomeMatrix.from_outcomes(rows), Words())  # type: ignore[arg-type]
    more = add(router, Pair("mid", "think:64"), {}, (1.0, 2.0))
    assert more.parameters.added is not None
    assert float(more.parameters.added.prices.min()) >= 0
    assert float(more.predict_texts([rows[0].question]).cost.min()) >= 0


def test_a_question_is_predicted_the_same_alone_and_among_others() -> None:
    """Also where very many known questions are equally near."""
    router, _ = fitted(lambda row: row)
    texts = [row.question for row in outcomes(60, seed=3)[::4]]
    together = router.predict_texts(texts)
    alone = torch.cat([router.predict_texts([text]).accuracy for text in texts])
    # Rounding of another processor may still part two that are equally near, in a question or two.
    assert int(((alone - together.accuracy).abs() > 1e-5).any(1).sum()) <= 3


def test_of_many_questions_with_one_text_the_first_are_the_nearest() -> None:
    rng = np.random.default_rng(0)
    known = torch.nn.functional.normalize(torch.from_numpy(rng.standard_normal((4, 384))).float(), dim=1)
    head = NeighboursHead(known.repeat_interleave(50, 0), torch.zeros(200, 1))
    for asked in (known, known[:1], known[[2, 0, 1]]):
        cosines, indices = head.nearest(asked, 20)
        begins = (indices[:, :1] // 50) * 50
        assert torch.equal(indices, begins + torch.arange(20))
        assert torch.allclose(cosines, torch.ones_like(cosines))


def test_nearest_of_one_question_are_looked_for_among_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless more of them are about equally near than are looked at: then among all, in double precision."""
    rng = np.random.default_rng(0)
    known = torch.nn.functional.normalize(torch.from_numpy(rng.standard_normal((3_000, 32))).float(), dim=1)
    head = NeighboursHead(known, torch.zeros(3_000, 1))
    wanted = head.nearest(known[:20], 40)
    alike = NeighboursHead(torch.cat((known[:1].expand(200, -1), known)), torch.zeros(3_200, 1))
    assert torch.equal(alike.nearest(known[:1], 40)[1][0], torch.arange(40))
    # What is near but for rounding in single precision is in its order.
    shifted = known[:1] + 1e-7 * torch.from_numpy(rng.standard_normal((3_000, 32))).float()
    close = NeighboursHead(shifted, torch.zeros(3_000, 1))
    assert torch.equal(close.nearest(known[:1], 40)[1][0], close.nearest(known[:20], 40)[1][0])

    def fail(_: NeighboursHead) -> torch.Tensor:
        raise AssertionError("all known questions were looked at in double precision")

    monkeypatch.setattr(NeighboursHead, "_exact", property(fail))
    fresh = NeighboursHead(known, torch.zeros(3_000, 1))
    for number in range(20):
        cosines, indices = fresh.nearest(known[number : number + 1], 40)
        assert torch.equal(indices[0], wanted[1][number])
        assert torch.allclose(cosines[0], wanted[0][number], atol=1e-6)


def test_what_is_known_of_all_questions_is_found_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which pairs have tokens follows from every known outcome, and is not read again for each question."""
    router, _ = fitted(lambda row: replace(row, output_tokens=None) if row.model == "mid" else row)
    counts = {"known": 0, "all": 0}
    known_costs, isnan = RTRRouter._known_costs, torch.Tensor.isnan
    stored = router.parameters.tokens
    assert stored is not None

    def of_question(self: RTRRouter, prediction: Prediction) -> torch.Tensor:
        counts["known"] += 1
        return known_costs(self, prediction)

    def of_all(values: torch.Tensor) -> torch.Tensor:
        counts["all"] += values is stored.log_tokens
        return isnan(values)

    monkeypatch.setattr(RTRRouter, "_known_costs", of_question)
    monkeypatch.setattr(torch.Tensor, "isnan", of_all)
    for text in ("mother sister uncle", "nephew daughter", "name3 name8"):
        router.plans_for(Query(text))
        router.plans_for(Query(text))
    assert counts == {"known": 6, "all": 1}
