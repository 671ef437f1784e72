"""Predictions for known questions by heads that did not see them; calibration and trust learn from these.

Two kinds of folds: groups of near-duplicates at random, which are new questions of known kinds ("home"), and
whole kinds of questions left out, which are what a router meets when its users change ("away"). Kinds are
data sets where there are several, else clusters of embeddings.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from viaticum.routers.query.forest import ForestHead
from viaticum.routers.query.heads import (
    NEIGHBOURS,
    Columns,
    DualHead,
    LogisticHead,
    NeighboursHead,
    TrainingData,
    fit_dual_head,
    log_odds,
)
from viaticum.routers.query.outcome_matrix import OutcomeMatrix, assign_folds
from viaticum.routers.query.parameters import RTRSettings
from viaticum.routers.query.token_quantiles import expected_log_tokens

FOLDS = 5
MAX_EPOCHS = 40
MIN_DATASETS = 3  # fewer are no sample of kinds
TRUST_NEIGHBOURS = 10  # questions whose mean similarity determines trust
Report = Callable[[str, int, int], None]  # stage, done, total


class OutOfFold(NamedTuple):
    """Predictions for each question by heads that were fitted on the other folds.

    Args:
        folds: of each question [Q].
        logits: log-odds by head [Q, M].
        cost: expected dollars [Q, M].
        neighbour_tokens, dual_tokens: log tokens by the neighbours' mean and the dual head's median [Q, P].
        similarity: mean similarity to the nearest known questions [Q].
        nearest: which these are [Q, TRUST_NEIGHBOURS].
    """

    folds: Tensor
    logits: dict[str, Tensor]
    cost: Tensor
    neighbour_tokens: Tensor
    dual_tokens: Tensor
    similarity: Tensor
    nearest: Tensor
    forest_cost: Tensor | None = None

    def with_forest(self) -> OutOfFold:
        """Expected dollars are the mean of the neighbours' and the forest's."""
        return self if self.forest_cost is None else self._replace(cost=(self.cost + self.forest_cost) / 2)

    def shared(self, weights: Tensor) -> OutOfFold:
        """With log-odds that arms share (`viaticum.routers.query.arms.smoother`); weights: [M, M]."""
        return self._replace(logits={name: each @ weights.T for name, each in self.logits.items()})


def kind_folds(matrix: OutcomeMatrix, embeddings: Tensor, seed: int) -> Tensor:
    """A fold for each question, whole kinds together [Q]; at most `FOLDS`, one where there is one kind."""
    names, kinds = np.unique(matrix.datasets, return_inverse=True)
    if len(names) < MIN_DATASETS:
        from sklearn.cluster import KMeans

        count = min(FOLDS, len(np.unique(embeddings.numpy(), axis=0)))
        kinds = KMeans(count, n_init=3, random_state=seed).fit_predict(embeddings.numpy())
    if len(np.unique(kinds)) == 1:
        return torch.zeros(len(matrix), dtype=torch.long)
    return torch.from_numpy(assign_folds(np.asarray(kinds), FOLDS, seed))


def known_without(folds: Tensor, fold: int, groups: Tensor) -> Tensor:
    """Which questions a fold is predicted from [Q]: of other folds, and no near-duplicates of its own.

    groups: of near-duplicates [Q].
    """
    rows = folds == fold
    return ~rows & ~torch.isin(groups, groups[rows])


def choose_epochs(columns: Columns, data: TrainingData, folds: Tensor, settings: RTRSettings) -> int:
    """Epochs of the dual head that predict the second fold best after training on the third and later."""
    return fit_dual_head(
        columns,
        data.select(folds > 1),
        epochs=MAX_EPOCHS,
        seed=settings.seed,
        decision=settings.decision,
        validation=data.select(folds == 1),
    )[1]


def fit_dual(columns: Columns, data: TrainingData, epochs: int, settings: RTRSettings) -> DualHead:
    return fit_dual_head(columns, data, epochs=epochs, seed=settings.seed, decision=settings.decision)[0]


def predict_out_of_fold(
    columns: Columns,
    data: TrainingData,
    folds: Tensor,
    groups: Tensor,
    epochs: int,
    settings: RTRSettings,
    report: Report,
) -> OutOfFold:
    """Predict each fold by heads fitted on the others.

    Args:
        folds: of each question [Q]; every fold has questions that `known_without` it.
        groups: of near-duplicates [Q].
    """
    shape = data.correct.shape
    logits = {name: torch.zeros(shape) for name in ("logistic", "neighbours", "dual")}
    cost, similarity = torch.zeros(shape), torch.zeros(shape[0])
    forest_cost = None
    if "forest" in settings.heads:
        logits["forest"], forest_cost = torch.zeros(shape), torch.zeros(shape)
    nearby = torch.zeros(shape[0], TRUST_NEIGHBOURS, dtype=torch.long)
    expected = expected_log_tokens(data.log_tokens, data.truncated)
    neighbour_tokens, dual_tokens = torch.zeros(expected.shape), torch.zeros(expected.shape)
    numbers = np.unique(folds.numpy()).tolist()
    for done, fold in enumerate(numbers):
        report("fitting folds", done, len(numbers))
        rows, others = folds == fold, known_without(folds, fold, groups)
        known, asked = data.select(others), data.embeddings[rows]
        neighbours = NeighboursHead(known.embeddings, known.correct)
        nearest = neighbours.nearest(asked, NEIGHBOURS)
        logits["neighbours"][rows] = log_odds(neighbours.mean(*nearest))
        cost[rows] = NeighboursHead(known.embeddings, known.cost).mean(*nearest)
        similarity[rows] = nearest[0][:, :TRUST_NEIGHBOURS].mean(1)
        ranks = torch.arange(TRUST_NEIGHBOURS).clamp_max(nearest[1].shape[1] - 1)  # of few: the last again
        nearby[rows] = others.nonzero()[:, 0][nearest[1][:, ranks]]
        logits["logistic"][rows] = LogisticHead.fit(known.embeddings, known.correct)(asked)
        neighbour_tokens[rows] = NeighboursHead(known.embeddings, expected[others]).mean(*nearest)
        logits["dual"][rows], tokens = fit_dual(columns, known, epochs, settings).predict(asked)
        dual_tokens[rows] = tokens[..., 0]
        if forest_cost is not None:
            forest = fit_forest(known, settings)
            logits["forest"][rows], forest_cost[rows] = forest(asked, data.select(rows).lexical, nearest)
    return OutOfFold(folds, logits, cost, neighbour_tokens, dual_tokens, similarity, nearby, forest_cost)


def fit_forest(data: TrainingData, settings: RTRSettings) -> ForestHead:
    assert data.lexical is not None
    return ForestHead.fit(data.embeddings, data.lexical, data.correct, data.cost, settings.seed)


def fold_means(values: Tensor, folds: Tensor) -> Tensor:
    """For each question the column means over the other folds [Q, M]. values: without NaN."""
    result = torch.empty_like(values)
    for fold in np.unique(folds.numpy()).tolist():
        rows = folds == fold
        result[rows] = values[~rows].mean(0)
    return result
