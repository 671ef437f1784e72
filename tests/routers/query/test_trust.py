"""Trust: shares are chosen by what choices are worth, never below the static means on the same questions."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from synthetic_outcomes import Words, a_question, outcomes

from viaticum.routers.query.fit import fit
from viaticum.routers.query.heads import CalibratedMixture
from viaticum.routers.query.out_of_fold import kind_folds, known_without
from viaticum.routers.query.outcome_matrix import OutcomeMatrix
from viaticum.routers.query.trust import (
    MAX_FACTOR,
    SHARES,
    Predicted,
    Trust,
    accuracy_at,
    budgets_of,
    choices_by_weight,
    cost_factor,
    difficulty_share,
    fit_trust,
    heads_alone,
    limits_of,
    values_of,
)

pytestmark = pytest.mark.usefixtures("one_thread")
ROWS = 400
LAST = (torch.tensor([0.2, 0.4]), torch.zeros(ROWS), torch.zeros(2))


def predicted(
    signal: float, noise: float, *, rows: int = ROWS, ratio: float = 1.0, seed: int = 0
) -> Predicted:
    """A cheap, a middle and a dear column; heads that know `signal` of the truth and make up the rest.

    ratio: real over predicted dollars.
    """
    rng = np.random.default_rng(seed)
    rates = np.clip(np.array([0.5, 0.6, 0.7]) + 0.3 * rng.standard_normal((rows, 3)), 0.02, 0.98)
    correct = (rng.random((rows, 3)) < rates).astype(float)
    dollars = np.array([0.001, 0.004, 0.01]) * np.exp(0.3 * rng.standard_normal((rows, 3)))
    static = np.tile(correct.mean(0), (rows, 1)), np.tile(dollars.mean(0), (rows, 1))
    heads = static[0] + signal * (rates - static[0]) + noise * rng.standard_normal((rows, 3))
    return Predicted(
        np.arange(rows) % 5, np.clip(heads, 0.01, 0.99), dollars, *static, correct, ratio * dollars
    )


def test_heads_that_know_are_trusted_and_heads_that_make_things_up_are_not() -> None:
    knows, makes_up = predicted(1.0, 0.0), predicted(0.0, 0.3)
    trust, facts = fit_trust(knows, makes_up, *LAST)
    assert trust.shares.tolist() == [pytest.approx(0.0, abs=0.25), pytest.approx(1.0, abs=0.25)]
    assert facts["home"]["worth"] == 0, "the heads are usual"  # type: ignore[index]
    misleads = predicted(-1.0, 0.0)
    away, home = fit_trust(misleads, knows, *LAST)[0].shares.tolist()
    assert home == 0.0
    assert away > 0.0


@pytest.mark.parametrize("rows", [40, 100, 400])
def test_away_nothing_worse_than_the_static_means_is_chosen(rows: int) -> None:
    for seed in range(5):
        away = predicted(0.4, 0.3, rows=rows, seed=seed)
        trust, facts = fit_trust(away, away, *LAST)
        gains = values_of(away, budgets_of(away.correct, away.cost))
        chosen = SHARES.index(float(trust.shares[0]))
        assert gains[chosen].mean() >= gains[0].mean()
        assert facts["away"]["worth"] >= 0  # type: ignore[index]


def test_few_questions_leave_doubt() -> None:
    """A gain that chance explains is no reason to leave the static means away."""
    shares = {
        rows: np.mean(
            [
                float(fit_trust(each, each, *LAST)[0].shares[0])
                for each in (predicted(0.15, 0.15, rows=rows, seed=seed) for seed in range(12))
            ]
        )
        for rows in (40, 1500)
    }
    assert shares[40] < shares[1500]


@pytest.mark.parametrize("ratio", [0.5, 1.0, 2.0, 10.0])
def test_costs_are_expected_higher_by_what_choices_cost_too_much(ratio: float) -> None:
    """Never lower: what was cheaper than expected among known kinds need not be among others."""
    found = cost_factor(predicted(0.5, 0.1, ratio=ratio), 0.5)
    assert found == pytest.approx(np.clip(ratio, 1.0, MAX_FACTOR), rel=0.06)


def test_a_budget_is_really_met_between_two_cost_weights() -> None:
    each = predicted(1.0, 0.0)
    chosen = choices_by_weight(each.accuracy, each.dollars)
    rows = np.arange(ROWS)
    means = [each.cost[rows, line].mean() for line in chosen]
    assert means[0] > means[-1]
    low, high = (accuracy_at(chosen, each.correct, each.cost, np.array([b])).mean() for b in (0.002, 0.006))
    assert each.correct[:, 0].mean() < low < high
    only = accuracy_at(chosen, each.correct, each.cost, np.array([1e-6]))
    assert only.mean() == each.correct[rows, chosen[-1]].mean(), "nothing is so cheap: the cheapest choices"


@pytest.mark.parametrize("price", [0.0, 1.0])
def test_free_models_leave_nothing_to_divide_by(price: float) -> None:
    """Local models: all for nothing, or beside one that costs something."""
    each = predicted(1.0, 0.0)
    prices = np.array([0.0, 0.0, price])
    each = replace(
        each,
        dollars=each.dollars * prices,
        static_dollars=each.static_dollars * prices,
        cost=each.cost * prices,
    )
    trust, facts = fit_trust(each, each, *LAST)
    assert trust.cost_factor == 1
    assert float(trust.shares[1]) > 0
    assert np.isfinite(facts["home"]["gains"]).all()  # type: ignore[index]


def test_unknown_outcomes_are_never_chosen() -> None:
    each = predicted(1.0, 0.0)
    holes = np.random.default_rng(1).random((ROWS, 3)) < 0.4
    each = replace(
        each, correct=np.where(holes, np.nan, each.correct), cost=np.where(holes, np.nan, each.cost)
    )
    asked = each.asked()
    values = values_of(asked, budgets_of(asked.correct, asked.cost))
    assert not np.isnan(values).any()
    assert len(asked.correct) == int((~holes).any(1).sum())


def test_closeness_leads_from_away_to_home() -> None:
    limits = limits_of(torch.linspace(-0.2, 0.2, 401))
    last = (torch.tensor([0.25, 0.75]), torch.ones(2), torch.tensor(1.4), torch.tensor([0.5, 0.0]))
    trust = Trust(limits, torch.full((9,), 0.5), *last)
    cosines = torch.tensor([[0.2, 0.2], [0.344, 0.344], [0.8, 0.8]])
    at = trust.at(cosines, torch.zeros(3, 2, dtype=torch.long))
    assert at.tolist() == [0.0, pytest.approx(0.5, abs=0.02), 1.0]
    assert trust.share(at).tolist() == [0.25, pytest.approx(0.5, abs=0.02), 0.75]
    assert trust.factor(at)[[0, 2]].tolist() == [pytest.approx(1.4), 1.0]
    assert trust.wider(at)[[0, 2]].tolist() == [[0.5, 0.0], [0.0, 0.0]]


def test_difficulty_changes_what_is_told_and_no_choice() -> None:
    """A shrunk share keeps what the heads say of all columns alike, as far as accuracies stay below 1."""
    heads = torch.tensor([[0.2, 0.3, 0.1], [0.7, 0.9, 0.8], [0.99, 1.0, 0.98]])
    means, cost = torch.tensor([0.5, 0.6, 0.4]), torch.tensor([0.01, 0.03, 0.002])
    home = torch.ones(3)
    trust = replace(heads_alone(1, 3), shares=torch.tensor([0.0, 0.25]))
    told = trust.mixed(heads, means, home, torch.full((3, 1), 0.25))
    plain = 0.25 * heads + 0.75 * means
    assert torch.allclose(told[:2].mean(1), heads[:2].mean(1))
    assert told.max() <= 1
    for weight in (0.0, 1.0, 5.0, 20.0):
        assert ((told - weight * cost).argmax(1) == (plain - weight * cost).argmax(1)).all()
    unshifted = replace(trust, difficulty=trust.shares)
    assert torch.allclose(unshifted.mixed(heads, means, home, torch.full((3, 1), 0.25)), plain)


@pytest.mark.parametrize(("real", "wanted"), [(1.0, 1.0), (0.5, 0.5), (0.0, 0.0), (-1.0, 0.0)])
def test_the_share_of_difficulty_is_what_outcomes_show_of_it(real: float, wanted: float) -> None:
    rng = np.random.default_rng(0)
    said = rng.normal(0, 0.15, (4_000, 1))
    means = np.full((4_000, 3), 0.5)
    correct = (rng.random((4_000, 3)) < 0.5 + real * said).astype(float)
    correct[rng.random(correct.shape) < 0.2] = np.nan
    dollars = np.ones_like(means)
    predicted = Predicted(np.zeros(4_000), means + said, dollars, means, dollars, correct, dollars)
    assert difficulty_share(predicted) == pytest.approx(wanted, abs=0.08)


def test_a_question_is_as_close_as_its_neighbours_are_to_each_other() -> None:
    """The same similarity is near among questions that differ, and far from a template."""
    similarity = torch.tensor([0.4, 0.9])
    trust = replace(heads_alone(2, 1), limits=torch.tensor([-0.3, -0.1]), similarity=similarity)
    assert trust.at(torch.full((2, 1), 0.5), torch.tensor([[0], [1]])).tolist() == [1.0, 0.0]


def test_a_kind_that_was_never_seen_is_told_from_the_known_ones() -> None:
    """The table has sums and games alone; questions about kin are far from both."""
    table = OutcomeMatrix.from_outcomes(outcomes(300, kinds=("sums", "games")))
    router = fit(table, Words())  # type: ignore[arg-type]
    rng = np.random.default_rng(3)
    near = router.predict_texts([a_question("games", rng) for _ in range(40)])
    far = router.predict_texts([a_question("kin", rng) for _ in range(40)])
    assert float(far.trust.mean()) < 0.5 < 0.8 < float(near.trust.mean())


def test_without_trust_the_heads_decide_alone() -> None:
    trust = heads_alone(9, 2)
    at = trust.at(torch.tensor([[-1.0], [0.0], [1.0]]), torch.zeros(3, 1, dtype=torch.long))
    assert trust.share(at).tolist() == [1.0, 1.0, 1.0]


def test_one_kind_with_nearly_all_questions_can_be_fitted() -> None:
    """Left out, it leaves too few questions to learn anything from."""
    rows = outcomes(36, kinds=("sums",)) + outcomes(2, 1, ("games",)) + outcomes(2, 2, ("kin",))
    table = OutcomeMatrix.from_outcomes(rows)
    router = fit(table, Words())  # type: ignore[arg-type]
    assert router.predict_texts([rows[0].question]).accuracy.isfinite().all()
    assert kind_folds(table, torch.ones(40, 4), 0).unique().numel() > 1


def test_questions_that_are_all_alike_are_of_one_kind() -> None:
    matrix = OutcomeMatrix.from_outcomes(outcomes(30, kinds=("sums",)))
    assert kind_folds(matrix, torch.ones(30, 4), 0).unique().tolist() == [0]


def test_what_a_fold_is_predicted_from_has_none_of_its_near_duplicates() -> None:
    folds, groups = torch.tensor([0, 0, 1, 1, 2]), torch.tensor([0, 1, 1, 2, 3])
    assert known_without(folds, 0, groups).tolist() == [False, False, False, True, True]
    assert known_without(folds, 2, groups).tolist() == [True, True, True, True, False]


@pytest.mark.parametrize(("mean", "by"), [(0.95, 0.08), (0.98, 0.05), (0.5, 0.1), (0.9, 0.0)])
def test_mean_probabilities_are_lowered_by_what_is_said(mean: float, by: float) -> None:
    heads = [torch.logit(torch.tensor([mean])) + torch.randn(500, 1, generator=torch.manual_seed(1))]
    mixture = CalibratedMixture(torch.ones(1), torch.ones(1), torch.zeros(1))
    lowered = mixture.lowered(torch.tensor([by]), heads)
    assert float(mixture(heads).mean() - lowered(heads).mean()) == pytest.approx(by, abs=1e-4)


def test_quantiles_are_widened_by_no_more_than_costs() -> None:
    each = predicted(1.0, 0.0)
    trust, _ = fit_trust(each, each, *LAST[:2], torch.tensor([0.3, 9.0]))
    assert trust.widening.exp().tolist() == pytest.approx([float(torch.tensor(0.3).exp()), MAX_FACTOR])
