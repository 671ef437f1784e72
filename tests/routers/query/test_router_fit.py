"""The learned router on synthetic questions with known rules."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from synthetic_outcomes import PAIRS, Words, a_question, outcomes

from viaticum.errors import BudgetExceeded, DataError, InputError
from viaticum.routers.query import Best, Cheapest, Weighted, choose_plan
from viaticum.routers.query.calibration import calibration_error
from viaticum.routers.query.evaluate import BUDGETS, best_mixture, evaluate
from viaticum.routers.query.fit import fit
from viaticum.routers.query.heads import CalibratedMixture, NeighboursHead, pinball
from viaticum.routers.query.learn import add, refit
from viaticum.routers.query.outcome_matrix import OutcomeMatrix
from viaticum.routers.query.parameters import RTRSettings
from viaticum.routers.query.rtr import RTRRouter
from viaticum.types import Pair, Query

pytestmark = pytest.mark.usefixtures("one_thread")
FAR = -torch.ones(1, 64) / 8
BUDGETS_HERE = (0.00001, 0.00005, 0.0002, 0.001, 0.003)


@pytest.fixture(scope="module")
def router() -> RTRRouter:
    return fit(OutcomeMatrix.from_outcomes(outcomes(400)), Words())  # type: ignore[arg-type]


def a_query(kind: str, seed: int = 77) -> Query:
    return Query(a_question(kind, np.random.default_rng(seed)))


def test_it_learns_which_pair_is_good_at_what(router: RTRRouter) -> None:
    """Mean probabilities over questions of a kind are near the rates that the answers were drawn with."""
    rng = np.random.default_rng(5)
    for kind, skills in (("sums", (0.92, 0.80)), ("kin", (0.85, 0.15)), ("games", (0.92, 0.85))):
        prediction = router.predict_texts([a_question(kind, rng) for _ in range(60)])
        for model, skill in zip(("big", "tiny"), skills, strict=True):
            column = PAIRS.index(Pair(model, "cot"))
            wanted = skill if model == "big" else {"sums": 0.75, "kin": 0.15, "games": 0.85}[kind]
            assert float(prediction.accuracy[:, column].mean()) == pytest.approx(wanted, abs=0.12)
        assert prediction.trust.mean() > 0.8


def test_the_table_has_a_row_for_every_pair(router: RTRRouter) -> None:
    rows = {row.pair: row for row in router.table(a_query("sums"))}
    assert set(rows) == set(PAIRS)
    for pair, tokens, price in ((Pair("big", "cot"), 90, 4e-5), (Pair("tiny", "direct"), 10, 1e-6)):
        row = rows[pair]
        assert row.tokens_p50 == pytest.approx(tokens, rel=0.3)
        assert row.tokens_p50 < row.tokens_p90 < 3 * tokens
        assert row.cost_p50 == pytest.approx(1e9 * price * row.tokens_p50, rel=0.3)
        assert row.cost_p90 > row.cost_p50


def test_held_out_questions_are_answered_better_than_by_any_mixture_of_pairs(router: RTRRouter) -> None:
    result = evaluate(router, OutcomeMatrix.from_outcomes(outcomes(300, seed=9)), budgets=BUDGETS_HERE)
    assert result["questions"] == 300
    assert result["best_single"]["pair"] == "big+cot"
    for point in result["curve"][1:]:
        assert point["cost"] <= point["budget"] * 1.1  # the mean of 300 questions varies
    gaps = [gap for gap in result["curve_minus_hull"] if gap["difference"] is not None]
    assert len(gaps) == 4, "no pair is as cheap as the first budget"
    assert sum(gap["difference"] > 0.03 for gap in gaps) >= 3
    assert all(gap["low"] <= gap["difference"] <= gap["high"] for gap in gaps)
    assert result["cost_at_best_single_accuracy"] < 0.6
    assert result["ece"] < 0.06
    assert 0.85 < result["token_coverage_p90"] < 0.95
    assert 0 < result["largest_share"] < 1
    assert result["oracle"] > result["best_single"]["accuracy"]


def test_it_learns_from_a_table_with_holes() -> None:
    """The dear pair was asked half of the questions, most of them of the kind that is hard for the others."""
    matrix = OutcomeMatrix.from_outcomes(outcomes(360))
    big, kin = PAIRS.index(Pair("big", "cot")), matrix.datasets == "kin"
    asked = np.random.default_rng(0).random(360) < np.where(kin, 0.9, 0.25)
    holes = {
        name: np.where(asked[:, None] | (np.arange(4) != big), getattr(matrix, name), np.nan)
        for name in ("correct", "tokens", "cost")
    }
    learned = fit(replace(matrix, **holes), Words())  # type: ignore[arg-type]
    rng = np.random.default_rng(5)
    for kind, skill in (("sums", 0.92), ("kin", 0.85), ("games", 0.92)):
        prediction = learned.predict_texts([a_question(kind, rng) for _ in range(60)])
        assert float(prediction.accuracy[:, big].mean()) == pytest.approx(skill, abs=0.12)
    known = ~learned.parameters.correct.isnan()
    others = [n for n, plan in enumerate(learned.plans) if PAIRS[big] not in plan.pairs]
    assert bool(known[:, others].all()), "a plan is known where its own pairs are"
    far = learned.predict(FAR)
    assert float(far.accuracy[0, big]) == pytest.approx(0.9, abs=0.06)


def test_of_equally_accurate_pairs_the_cheapest_is_the_best_single_one(router: RTRRouter) -> None:
    matrix = OutcomeMatrix.from_outcomes(outcomes(60, seed=6))
    all_right = replace(matrix, correct=np.ones_like(matrix.correct))
    best = evaluate(router, all_right, budgets=(0.0002,))["best_single"]
    assert best["pair"] == "tiny+direct"
    assert set(best["ties"]) == {"tiny+cot", "mid+cot", "big+cot"}


def test_questions_that_it_was_fitted_on_are_counted(router: RTRRouter) -> None:
    known = OutcomeMatrix.from_outcomes(outcomes(400)).select(np.arange(20))
    fresh = OutcomeMatrix.from_outcomes(outcomes(30, seed=8))
    assert evaluate(router, fresh.concat(known), budgets=(0.0002,))["learned_from"] == 20
    assert [router.has_seen(Query(text)) for text in (known.texts[0], fresh.texts[0])] == [True, False]


def test_a_table_without_a_question_for_every_pair_is_refused(router: RTRRouter) -> None:
    matrix = OutcomeMatrix.from_outcomes(outcomes(60, seed=6))
    correct = matrix.correct.copy()
    correct[np.arange(60), np.arange(60) % 4] = np.nan
    with pytest.raises(DataError, match="none of the 60 questions"):
        evaluate(router, replace(matrix, correct=correct), budgets=(0.0002,))


def test_the_operating_point_is_chosen_without_looking_at_the_outcomes(router: RTRRouter) -> None:
    """With all answers turned wrong and all costs tripled the same plans are chosen."""
    matrix = OutcomeMatrix.from_outcomes(outcomes(60, seed=4))
    prediction = router.predict_texts(matrix.texts)
    chosen = router.choose_within(prediction, 0.0002)
    other = replace(matrix, correct=1 - matrix.correct, cost=3 * matrix.cost)
    one, two = (evaluate(router, each, budgets=(0.0002,)) for each in (matrix, other))
    right = one["curve"][0]["accuracy"]
    assert two["curve"][0]["cost"] == pytest.approx(3 * one["curve"][0]["cost"])
    assert two["curve"][0]["accuracy"] == pytest.approx(1 - right)
    assert len(set(chosen.tolist())) > 1


def test_far_from_every_known_question_it_predicts_the_static_means(router: RTRRouter) -> None:
    prediction = router.predict(FAR)
    assert float(prediction.trust[0]) == 0
    assert torch.allclose(prediction.accuracy[0], router.parameters.static_means[0], atol=1e-6)
    near = router.predict_texts([a_query("kin").text])
    assert float((near.accuracy[0] - router.parameters.static_means[0]).abs().max()) > 0.1


def test_far_from_every_known_question_a_mixture_uses_up_the_budget(router: RTRRouter) -> None:
    prediction = router.predict(FAR[:1].expand(400, -1))
    cheap, expensive = (
        router.expected_cost(prediction, router.cost_weight_for(prediction, dollars))
        for dollars in (0.0001, 0.001)
    )
    dollars = cheap + 0.3 * (expensive - cheap)
    below, above = router._bracket_cost_weight(prediction, dollars)
    ends = [router.expected_cost(prediction, cost_weight) for cost_weight in (below, above)]
    assert ends[0] < dollars < ends[1], "every question has the same table, so that costs jump"
    chosen = router.choose_within(prediction, dollars)
    assert set(chosen.tolist()) == {
        int(router.choose_columns(prediction, each)[0]) for each in (below, above)
    }
    share = float((chosen == router.choose_columns(prediction, above)).double().mean())
    assert share == pytest.approx((dollars - ends[0]) / (ends[1] - ends[0]), abs=0.01)


def test_without_trust_distance_changes_nothing() -> None:
    router = fit(OutcomeMatrix.from_outcomes(outcomes(200)), Words(), settings=RTRSettings(trust=False))  # type: ignore[arg-type]
    prediction = router.predict(FAR)
    assert not torch.allclose(prediction.accuracy[0], router.parameters.static_means[0], atol=1e-3)


def test_the_same_seed_gives_the_same_router() -> None:
    matrix, text = OutcomeMatrix.from_outcomes(outcomes(120)), a_query("sums").text
    one, two, other = (
        fit(matrix, Words(), settings=RTRSettings(seed=seed)).predict_texts([text])  # type: ignore[arg-type]
        for seed in (3, 3, 4)
    )
    assert torch.equal(one.accuracy, two.accuracy)
    assert torch.equal(one.tokens, two.tokens)
    assert one.accuracy.shape != other.accuracy.shape or not torch.equal(one.accuracy, other.accuracy)


def test_a_plan_is_chosen_within_the_rest_of_the_budget(router: RTRRouter) -> None:
    query = a_query("sums")
    rows = router.plans_for(query)
    best = choose_plan(rows, None, Best())
    assert best.row.accuracy == max(row.accuracy for row in rows)
    tight = choose_plan(rows, 1_500_000, Best())
    assert tight.row.cost_p90 <= 1_500_000
    assert tight.row.accuracy < best.row.accuracy
    assert choose_plan(rows, None, Weighted(1e6)).row.cost_p50 == min(row.cost_p50 for row in rows)
    cheap = choose_plan(rows, None, Cheapest(0.7))
    assert cheap.row.accuracy >= 0.7
    with pytest.raises(BudgetExceeded, match="no pair fits"):
        choose_plan(rows, 10, Best())


def test_saved_and_loaded_it_predicts_the_same(router: RTRRouter, tmp_path: Path) -> None:
    router.save(tmp_path)
    loaded = RTRRouter.load(tmp_path, Words())  # type: ignore[arg-type]
    texts = [a_query(kind).text for kind in ("sums", "kin", "games")]
    one, two = router.predict_texts(texts), loaded.predict_texts(texts)
    assert torch.equal(one.accuracy, two.accuracy)
    assert torch.equal(one.tokens, two.tokens)
    assert loaded.plans == router.plans
    assert loaded.parameters.facts == json.loads((tmp_path / "router.json").read_text())["facts"]
    assert not (tmp_path / "previous").exists()
    loaded.save(tmp_path)
    assert RTRRouter.load(tmp_path / "previous", Words()).plans == router.plans  # type: ignore[arg-type]


def test_damaged_and_other_files_are_refused(router: RTRRouter, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no router in"):
        RTRRouter.load(tmp_path)
    router.save(tmp_path)
    document = json.loads((tmp_path / "router.json").read_text())
    (tmp_path / "router.json").write_text(json.dumps(document | {"format": 99}))
    with pytest.raises(DataError, match="format 99"):
        RTRRouter.load(tmp_path)
    (tmp_path / "router.json").write_text(json.dumps(document))
    (tmp_path / "router.safetensors").write_bytes(b"half a file")
    with pytest.raises(DataError, match="damaged"):
        RTRRouter.load(tmp_path)


def test_names_that_a_catalogue_does_not_have_are_reported(router: RTRRouter) -> None:
    router.check_fits(["tiny", "mid", "big", "more"], ["cot", "direct"])
    with pytest.raises(InputError, match="the router knows big, direct, which"):
        router.check_fits(["tiny", "mid"], ["cot"])


# --- parts --------------------------------------------------------------------------------------------------


def test_censored_lengths_do_not_pull_quantiles_down() -> None:
    """Of a truncated answer only a lower bound of its length is known."""
    predicted = torch.tensor([[[5.0, 6.0]]])
    short = torch.tensor([[4.0]])
    assert float(pinball(predicted, short, torch.tensor([[False]]))) > 0
    assert float(pinball(predicted, short, torch.tensor([[True]]))) == 0
    long = torch.tensor([[7.0]])
    assert float(pinball(predicted, long, torch.tensor([[True]]))) == float(
        pinball(predicted, long, torch.tensor([[False]]))
    )


def test_truncated_answers_raise_the_expected_length() -> None:
    """The same table, once with a fifth of the answers truncated at 60 tokens and once taken for complete."""
    rows = outcomes(300, kinds=("sums",))
    big = Pair("big", "cot")
    truncated = [
        replace(row, output_tokens=60, finish_reason="length")
        if row.pair == big and row.output_tokens and row.output_tokens > 60
        else row
        for row in rows
    ]
    complete = [replace(row, finish_reason="stop") for row in truncated]
    high = [
        {
            row.pair: row.tokens_p90
            for row in fit(OutcomeMatrix.from_outcomes(each), Words()).table(a_query("sums"))
        }[big]  # type: ignore[arg-type]
        for each in (truncated, complete)
    ]
    assert high[0] > 90 > high[1]


def test_neighbours_with_unknown_outcomes() -> None:
    embeddings = torch.eye(3)
    values = torch.tensor([[1.0, float("nan")], [0.0, 1.0], [0.0, 1.0]])
    near = NeighboursHead(embeddings, values)
    means = near.mean(*near.nearest(embeddings[:1], 3), prior=0.0)
    assert float(means[0, 0]) > 0.99
    assert float(means[0, 1]) == pytest.approx(1.0)


def test_a_mixture_leaves_out_a_head_that_knows_nothing() -> None:
    torch.manual_seed(0)
    truth = torch.randn(2000, 3)
    right = (torch.rand(2000, 3) < torch.sigmoid(truth)).float()
    mixture = CalibratedMixture.fit([truth, 2 * torch.randn(2000, 3)], right)
    assert float(mixture.shares[0]) > 0.9
    sharp = CalibratedMixture.fit([3 * truth + 1], right)
    assert sharp.slope == pytest.approx(torch.full((3,), 1 / 3), abs=0.06)
    assert (
        calibration_error(sharp([3 * truth + 1]), right)
        < 0.03
        < calibration_error(torch.sigmoid(3 * truth + 1), right)
    )


def test_the_hull_is_the_best_mixture() -> None:
    correct = np.array([[0, 1, 1], [0, 0, 1], [1, 1, 1], [0, 1, 1]], dtype=float)
    cost = np.tile([1.0, 2.0, 4.0], (4, 1))
    assert best_mixture(correct, cost, 0.5) is None
    shares = best_mixture(correct, cost, 3.0)
    assert shares is not None
    assert shares == pytest.approx([0, 0.5, 0.5])
    shares = best_mixture(correct, cost, 99.0)
    assert shares is not None
    assert shares == pytest.approx([0, 0, 1])


def test_budgets_are_those_that_are_compared() -> None:
    assert BUDGETS == (0.0001, 0.0003, 0.001, 0.002, 0.004, 0.006, 0.012)


# --- added pairs and refits ---------------------------------------------------------------------------------


def test_a_new_pair_starts_from_similar_descriptions_and_learns(router: RTRRouter, tmp_path: Path) -> None:
    """The new model is described like `tiny`, but is as good as `big` at kin and poor at games."""
    pair, descriptions = Pair("fresh", "cot"), {"fresh": "tiny"}
    kin, games = (
        [a_question(kind, np.random.default_rng(seed)) for seed in range(40)] for kind in ("kin", "games")
    )
    without = add(router, pair, descriptions, (0.0, 5.0))
    assert without.pairs == (*PAIRS, pair)
    assert without.plans[:-1] == router.plans
    tiny = PAIRS.index(Pair("tiny", "cot"))
    before = [without.predict_texts(texts).accuracy for texts in (kin, games)]
    for each in before:
        assert torch.corrcoef(torch.stack([each[:, -1], each[:, tiny]]))[0, 1] > 0.8
        assert torch.allclose(
            each[:, :-1], router.predict_texts(kin if each is before[0] else games).accuracy
        )
    rows = [
        replace(row, model="fresh", correct=dataset_right, cost_nanousd=5 * (row.output_tokens or 0))
        for row in outcomes(180, seed=21)
        if row.pair == Pair("mid", "cot")
        for dataset_right in [row.dataset == "kin" or (row.dataset == "sums" and row.correct)]
    ]
    learned = add(router, pair, descriptions, (0.0, 5.0), OutcomeMatrix.from_outcomes(rows))
    after = [float(learned.predict_texts(texts).accuracy[:, -1].mean()) for texts in (kin, games)]
    assert after[0] > 0.6 > float(before[0][:, -1].mean())
    assert after[1] < 0.4 < float(before[1][:, -1].mean())
    row = {row.pair: row for row in learned.table(a_query("kin"))}[pair]
    assert row.tokens_p50 == pytest.approx(60, rel=0.4)
    assert row.cost_p50 == pytest.approx(row.tokens_p50 * 5e-6 * 1e9, rel=0.5)
    learned.save(tmp_path)
    again = RTRRouter.load(tmp_path, Words())  # type: ignore[arg-type]
    assert again.pairs == learned.pairs
    assert again.plans_for(a_query("kin"))[-1].accuracy == pytest.approx(
        learned.plans_for(a_query("kin"))[-1].accuracy, abs=2e-3
    )
    with pytest.raises(InputError, match=r"knows fresh\+cot"):
        add(learned, pair, descriptions, (0.0, 5.0))
    with pytest.raises(DataError, match=r"nothing about fresh\+direct"):
        add(router, Pair("fresh", "direct"), descriptions, (0.0, 5.0), OutcomeMatrix.from_outcomes(rows))


def test_a_refit_follows_changes_and_refuses_a_worse_router(router: RTRRouter) -> None:
    known = OutcomeMatrix.from_outcomes(outcomes(400))
    turned = [
        replace(
            row, question_id=f"live-{n}", correct=not row.correct if row.dataset == "kin" else row.correct
        )
        for n, row in enumerate(outcomes(300, seed=31))
        if n % 4 == n // 4 % 4
    ]
    result = refit(router, known, OutcomeMatrix.from_outcomes(turned, pairs=PAIRS), Words())  # type: ignore[arg-type]
    assert result.after < result.before
    assert result.router is not None
    column = PAIRS.index(Pair("tiny", "cot"))
    text = a_query("kin").text
    assert (
        result.router.predict_texts([text]).accuracy[0, column]
        > router.predict_texts([text]).accuracy[0, column]
    )
    # The known outcomes are inverted, so that fitting on them makes live answers harder to predict.
    live = [replace(row, question_id=f"live-{n}") for n, row in enumerate(outcomes(40, seed=41))]
    worse = refit(
        fit(OutcomeMatrix.from_outcomes(outcomes(400)), Words()),  # type: ignore[arg-type]
        OutcomeMatrix.from_outcomes(
            [replace(row, correct=not row.correct) for row in outcomes(400, seed=8)], pairs=PAIRS
        ),
        OutcomeMatrix.from_outcomes(live, pairs=PAIRS),
        Words(),  # type: ignore[arg-type]
    )
    assert worse.router is None
    assert worse.after > worse.before
    with pytest.raises(DataError, match="4 live outcomes; 30 or more"):
        refit(router, known, OutcomeMatrix.from_outcomes(live[:4], pairs=PAIRS), Words())  # type: ignore[arg-type]


def test_a_table_of_near_duplicates_alone_is_refused() -> None:
    rows = [replace(row, question="How many apples are left?") for row in outcomes(40)]
    with pytest.raises(DataError, match="near-duplicates of one another"):
        fit(OutcomeMatrix.from_outcomes(rows), Words())  # type: ignore[arg-type]
