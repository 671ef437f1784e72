"""Savings within the error of expected costs: a worse pair is not chosen for them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from synthetic_outcomes import Words, outcomes

from viaticum.routers.query import calibration
from viaticum.routers.query.calibration import SMALL_SAVING, without_small_savings
from viaticum.routers.query.fit import fit
from viaticum.routers.query.outcome_matrix import OutcomeMatrix
from viaticum.routers.query.parameters import RTRSettings


def test_a_worse_column_saves_nothing_by_looking_a_little_cheaper() -> None:
    accuracy = torch.tensor([[0.7, 0.3], [0.7, 0.3], [0.7, 0.8], [0.7, 0.7]])
    cost = torch.tensor([[5.0, 4.6], [5.0, 2.0], [5.0, 4.6], [5.0, 4.6]])
    usual = torch.tensor([4.4, 5.2])
    # Kept: what saves more than a fifth, and what is more accurate.
    assert without_small_savings(accuracy, cost, usual)[:, 1].tolist() == pytest.approx([5.0, 2.0, 4.6, 5.0])
    assert without_small_savings(accuracy, cost, usual)[:, 0].tolist() == [5.0] * 4
    assert torch.equal(without_small_savings(accuracy, cost, usual.flip(0)), cost)


@pytest.mark.parametrize("chunk", [1, 100, calibration.CHUNK])
def test_it_does_what_is_said_of_it(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "CHUNK", chunk)
    rng = np.random.default_rng(0)
    accuracy, cost = rng.integers(0, 4, (30, 6)) / 4, rng.uniform(0, 1, (30, 6))
    usual = rng.permutation([0.1, 0.2, 0.2, 0.3, 0.4, float("nan")])
    found = without_small_savings(*map(torch.from_numpy, (accuracy, cost, usual))).numpy()
    for row in range(30):
        for column in range(6):
            others = [
                cost[row, other]
                for other in range(6)
                if usual[other] < usual[column]
                and accuracy[row, other] >= accuracy[row, column]
                and cost[row, column] > (1 - SMALL_SAVING) * cost[row, other]
            ]
            assert found[row, column] == max([cost[row, column], *others])


def test_a_fitted_router_takes_them_back() -> None:
    matrix = OutcomeMatrix.from_outcomes(outcomes(80))
    texts = [f"{text} once more" for text in matrix.texts[:20]]
    taken, believed = (
        fit(matrix, Words(), settings=RTRSettings(savings=savings)).predict_texts(texts)  # type: ignore[arg-type]
        for savings in (True, False)
    )
    usual = torch.from_numpy(matrix.cost.mean(0)).float()
    pairs = len(matrix.pairs)
    assert torch.equal(taken.accuracy, believed.accuracy)
    assert torch.equal(taken.own_cost, believed.cost)
    assert (taken.cost >= believed.cost).all()
    assert (taken.cost > believed.cost).any()
    for cheap in range(pairs):
        for dear in range(pairs):
            if usual[cheap] < usual[dear] * 0.999:
                better = taken.accuracy[:, cheap] >= taken.accuracy[:, dear]
                saves = believed.cost[:, dear] <= (1 - SMALL_SAVING) * believed.cost[:, cheap]
                assert (~better | saves | (taken.cost[:, dear] >= believed.cost[:, cheap])).all()
