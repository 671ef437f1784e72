"""The forest head: arrays that predict what scikit-learn's trees do, holes, files, and when it is chosen."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from synthetic_outcomes import Words, outcomes

from viaticum.routers.query import forest as module
from viaticum.routers.query.fit import FOREST_QUESTIONS, fit
from viaticum.routers.query.forest import ForestHead, _floor32, lexical_counts
from viaticum.routers.query.heads import NeighboursHead
from viaticum.routers.query.outcome_matrix import OutcomeMatrix
from viaticum.routers.query.parameters import RTRSettings
from viaticum.routers.query.rtr import RTRRouter

pytestmark = pytest.mark.usefixtures("one_thread")
QUESTIONS, PAIRS = 160, 5


def made_up(holes: float = 0.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Embeddings, lexical counts, outcomes and costs with a rule in the first count."""
    rng = torch.Generator().manual_seed(0)
    x = torch.nn.functional.normalize(torch.randn(QUESTIONS, 24, generator=rng), dim=1)
    lexical = torch.rand(QUESTIONS, 4, generator=rng)
    skill = torch.where(lexical[:, :1] > 0.5, 0.9, 0.1).expand(-1, PAIRS)
    correct = (torch.rand(QUESTIONS, PAIRS, generator=rng) < skill).float()
    cost = 0.01 * (1 + lexical[:, 1:2]) * torch.arange(1, PAIRS + 1)
    unknown = torch.rand(QUESTIONS, PAIRS, generator=rng) < holes
    return x, lexical, correct.masked_fill(unknown, torch.nan), cost.masked_fill(unknown, torch.nan)


def nearest(x: torch.Tensor, correct: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return NeighboursHead(x, correct).nearest(x, 60)


def test_leaves_are_those_of_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same trees, walked as arrays: on the questions that they were grown on, the same leaf in each."""
    from sklearn.ensemble import ExtraTreesRegressor

    grown: list[tuple[ExtraTreesRegressor, np.ndarray]] = []

    class Kept(ExtraTreesRegressor):
        def fit(self, x: np.ndarray, y: np.ndarray) -> Kept:
            super().fit(x, y)
            grown.append((self, x))
            return self

    monkeypatch.setattr("sklearn.ensemble.ExtraTreesRegressor", Kept)
    head = ForestHead.fit(*made_up(), seed=0)
    model, x = grown[0]
    trees, nodes = head.feature.shape
    walked = head._leaves(torch.from_numpy(x)) - nodes * torch.arange(trees)
    assert (walked.numpy() == model.apply(x)).all()
    assert walked.unique().numel() > 20
    other = np.random.default_rng(0).normal(size=x.shape).astype(np.float32)
    assert ((head._leaves(torch.from_numpy(other)) % nodes).numpy() == model.apply(other)).all()


def test_a_rule_in_the_words_is_found_and_costs_follow() -> None:
    x, lexical, correct, cost = made_up()
    logits, dollars = ForestHead.fit(x, lexical, correct, cost, seed=0)(x, lexical, nearest(x, correct))
    probabilities = torch.sigmoid(logits)
    high = lexical[:, 0] > 0.5
    assert probabilities[high].mean() > 0.65
    assert probabilities[~high].mean() < 0.35
    assert np.corrcoef(dollars[:, 0], cost[:, 0])[0, 1] > 0.8


def test_unknown_outcomes_are_left_out_of_the_means() -> None:
    x, lexical, correct, cost = made_up(holes=0.4)
    correct[:, 2], cost[:, 2] = torch.nan, torch.nan
    correct[0, 2], cost[0, 2] = 1.0, 0.5
    logits, dollars = ForestHead.fit(x, lexical, correct, cost, seed=0)(x, lexical, nearest(x, correct))
    assert bool(torch.isfinite(logits).all())
    assert torch.allclose(torch.sigmoid(logits[:, 2]), torch.tensor(0.999), atol=1e-3)
    assert torch.allclose(dollars[:, 2], torch.tensor(0.5))


def test_one_question_gets_what_it_gets_among_many() -> None:
    x, lexical, correct, cost = made_up()
    head = ForestHead.fit(x, lexical, correct, cost, seed=0)
    near = nearest(x, correct)
    many = head(x, lexical, near)
    one = head(x[7:8], lexical[7:8], (near[0][7:8], near[1][7:8]))
    for all_of_them, alone in zip(many, one, strict=True):
        assert torch.allclose(all_of_them[7:8], alone, atol=1e-5)


def test_thresholds_are_rounded_down() -> None:
    """0.1 in float32 is above 0.1: a feature of exactly that value goes the other way in float64."""
    values = np.array([0.1, -0.1, 0.5, 1e-30, 0.3])
    rounded = _floor32(values)
    assert rounded.dtype == np.float32
    assert (rounded.astype(np.float64) <= values).all()
    assert (np.nextafter(rounded, np.float32(np.inf)).astype(np.float64) > values).all()


def test_counts_of_texts() -> None:
    short, sums = lexical_counts(["", "How many are 3 + 4, and why?"])
    assert not short.any()
    assert (sums > 0).sum() >= 6
    assert len(short) == 1 + len(module.PATTERNS) + len(module.WORDS)


@pytest.fixture(scope="module")
def router() -> RTRRouter:
    matrix = OutcomeMatrix.from_outcomes(outcomes(FOREST_QUESTIONS))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("viaticum.routers.query.fit.FOREST_DOUBT", -1e9)
        return fit(matrix, Words(), settings=RTRSettings(plans=False))  # type: ignore[arg-type]


def test_a_router_with_a_forest_is_written_and_read(router: RTRRouter, tmp_path: Path) -> None:
    assert "forest" in router.parameters.facts["shares"]
    router.save(tmp_path)
    texts = ["add the apples of name1 together", "her uncle and her nephew are a family"]
    again = RTRRouter.load(tmp_path, Words())  # type: ignore[arg-type]
    for before, after in zip(router.predict_texts(texts), again.predict_texts(texts), strict=True):
        assert torch.allclose(before.float(), after.float(), rtol=1e-3, atol=1e-4, equal_nan=True)


def test_a_small_table_gets_no_forest() -> None:
    matrix = OutcomeMatrix.from_outcomes(outcomes(FOREST_QUESTIONS - 150))
    small = fit(matrix, Words(), settings=RTRSettings(plans=False))  # type: ignore[arg-type]
    assert small.parameters.forest is None
    assert "forest" not in small.parameters.settings.heads


def test_a_forest_that_gains_nothing_is_left_out() -> None:
    """Outcomes by the throw of a coin: nothing is to be gained beyond noise."""
    matrix = OutcomeMatrix.from_outcomes(outcomes(FOREST_QUESTIONS))
    coin = np.random.default_rng(0).integers(0, 2, matrix.correct.shape).astype(float)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("viaticum.routers.query.fit.FOREST_DOUBT", 1.0)
        found = fit(replace(matrix, correct=coin), Words(), settings=RTRSettings(plans=False))  # type: ignore[arg-type]
    gain, error = found.parameters.facts["forest_gain"]
    assert (found.parameters.forest is None) == (gain <= error)


def test_no_tree_splits_on_rounding() -> None:
    """Pairs that are always right together differ by rounding alone: one component tells all of them."""
    x, lexical, correct, cost = made_up()
    alike = correct[:, :1].expand(-1, PAIRS).contiguous()
    head = ForestHead.fit(x, lexical, alike, cost, 0)
    assert head.features.of_outcomes.shape == (PAIRS, 1)
    assert head.features.basis.shape == (24, 24)
    known = NeighboursHead(x, alike)
    together = head(x, lexical, known.nearest(x, 60))[0]
    for row in range(0, QUESTIONS, 10):
        asked = x[row : row + 1]
        alone = head(asked, lexical[row : row + 1], known.nearest(asked, 60))[0]
        assert torch.allclose(alone[0], together[row], atol=1e-4)
