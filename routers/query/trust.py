"""How far predictions for a question are trusted, chosen by what it is worth at the decision.

A prediction is `share * heads + (1 - share) * static means`: at share 0 every question has the same table,
and a budget is met by a static mixture of columns. What the heads say of a question's difficulty, the same
for all columns, has a share of its own: it changes what is told of accuracy, and no choice. One share holds
for questions like the known ones (home), one for questions of unknown kinds (away), and closeness to the
known questions leads from one to the other.
Shares are those at which out-of-fold predictions choose best: the mean accuracy at equal real cost, over
budgets from the cheapest pair to the most accurate one. Away, costs are expected to be higher by what choices
of out-of-kind predictions cost too much. Leaves out the predictions themselves (`out_of_fold`, `rtr`).
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from viaticum.routers.query.outcome_matrix import Array

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
BUDGETS = 5  # at which shares are compared
WEIGHTS = 60  # cost weights between which a budget is met
MAX_ROWS = 1_500  # questions that shares are compared on
HOME_QUANTILES = (0.02, 0.2)  # of closeness among questions of known kinds, at which trust is 0 and 1
DOUBT = 1.0  # standard errors by which a gain over the usual share is lowered
NO_MONEY = 1e-12  # dollars
MAX_FACTOR = 3.0  # of expected costs and of the 90% quantile of tokens, away
PRIOR_QUESTIONS = 20  # questions that a cost ratio of 1 is worth


@dataclass(frozen=True)
class Trust:
    """What was chosen.

    Args:
        limits: closeness (`closeness_of`) at which trust is 0 (away) and 1 (home) [2].
        similarity: of the known questions to the others [Q].
        shares: of the heads in predictions at trust 0 and 1; the static means have the rest [2].
        difficulty: shares of what the heads say of all columns alike, at trust 0 and 1 [2].
        cost_factor: by which expected costs are multiplied at trust 0; 1 at trust 1.
        widening: added to the 90% quantile of log tokens of each pair at trust 0; nothing at trust 1 [P].
    """

    limits: Tensor
    similarity: Tensor
    shares: Tensor
    difficulty: Tensor
    cost_factor: Tensor
    widening: Tensor

    def at(self, cosines: Tensor, indices: Tensor) -> Tensor:
        """Trust of questions, 0 to 1 [N].

        Args:
            cosines, indices: of the nearest known questions [N, K].
        """
        low, high = self.limits.tolist()
        closeness = closeness_of(cosines.mean(1), self.similarity[indices])
        trust: Tensor = ((closeness - low) / max(high - low, 1e-6)).clamp(0, 1)
        return trust

    def share(self, trust: Tensor) -> Tensor:
        """The share of the heads [N]."""
        return self.shares[0] + (self.shares[1] - self.shares[0]) * trust

    def mixed(self, accuracy: Tensor, means: Tensor, trust: Tensor, kept: Tensor) -> Tensor:
        """Accuracy with a share of the heads and the rest of the static means [N, M].

        Args:
            accuracy: by the heads [N, M].
            means: static means of the columns [M].
            trust: of the questions [N].
            kept: share of the heads by column [N, M] or [N, 1].
        """
        mixture = kept * accuracy + (1 - kept) * means
        of_difficulty = self.difficulty[0] + (self.difficulty[1] - self.difficulty[0]) * trust
        shift = (of_difficulty - self.share(trust)) * (accuracy - means).mean(1)
        # The same for all columns, so that no choice changes; every accuracy stays between 0 and 1.
        shift = torch.minimum(torch.maximum(shift, -mixture.amin(1)), 1 - mixture.amax(1))
        return mixture + shift[:, None]

    def wider(self, trust: Tensor) -> Tensor:
        """What is added to the 90% quantiles of log tokens [N, P]."""
        return (1 - trust)[:, None] * self.widening

    def factor(self, trust: Tensor) -> Tensor:
        """By what expected costs are multiplied [N]."""
        return 1 + (self.cost_factor - 1) * (1 - trust)


def heads_alone(questions: int, pairs: int) -> Trust:
    """Trust in every question alike, for Q known questions and P pairs."""
    return Trust(
        torch.tensor([-3.0, -2.0]),
        torch.zeros(questions),
        torch.ones(2),
        torch.ones(2),
        torch.tensor(1.0),
        torch.zeros(pairs),
    )


def closeness_of(similarity: Tensor, of_nearest: Tensor) -> Tensor:
    """How far a question's similarity to the nearest known questions is above theirs to their own [N].

    The same similarity is near among questions that differ, and far from a template. Local outlier factors
    (Breunig et al. 2000) compare densities in the same way.

    Args:
        similarity: [N].
        of_nearest: of the nearest known questions [N, K].
    """
    return similarity - of_nearest.mean(1)


@dataclass(frozen=True)
class Predicted:
    """Out-of-fold predictions and static means of the other folds, beside outcomes, each [Q, M].

    folds: of each question [Q]. correct and cost: NaN where unknown.
    """

    folds: Array
    accuracy: Array
    dollars: Array
    static_accuracy: Array
    static_dollars: Array
    correct: Array
    cost: Array

    def asked(self) -> Predicted:
        """The questions of which any outcome is known, at most `MAX_ROWS` of them, evenly spread."""
        rows = np.flatnonzero(self.known.any(1))
        if len(rows) > MAX_ROWS:
            rows = rows[np.linspace(0, len(rows) - 1, MAX_ROWS).round().astype(int)]
        return Predicted(*(getattr(self, field.name)[rows] for field in fields(self)))

    @property
    def known(self) -> Array:
        return ~np.isnan(self.correct) & ~np.isnan(self.cost)

    def mixed(self, share: float) -> tuple[Array, Array]:
        """Accuracy and dollars with a share of the heads; -inf and 0 where no outcome is known."""
        accuracy = share * self.accuracy + (1 - share) * self.static_accuracy
        dollars = share * self.dollars + (1 - share) * self.static_dollars
        return np.where(self.known, accuracy, -np.inf), np.where(self.known, dollars, 0.0)


def fit_trust(
    home: Predicted, away: Predicted, limits: Tensor, similarity: Tensor, widening: Tensor
) -> tuple[Trust, dict[str, object]]:
    """Choose the shares and the cost factor, and tell why.

    Usual are the heads at home and the static means away. Another share is worth its mean gain over the usual
    one, less `DOUBT` standard errors; those of `away` are over kinds: questions of one kind err together.

    Args:
        home, away: predictions for questions whose kind was known, and was left out.
        limits: closeness at which trust is 0 and 1 [2].
        similarity: of the known questions to the others [Q].
        widening: of the quantiles of tokens at trust 0 [P]; at most by `MAX_FACTOR`.
    """
    facts: dict[str, object] = {}
    shares, difficulty = [], []
    for name, predicted in (("away", away.asked()), ("home", home.asked())):
        if not len(predicted.correct):
            shares.append(1.0 if name == "home" else 0.0)
            difficulty.append(shares[-1])
            continue
        values = values_of(predicted, budgets_of(predicted.correct, predicted.cost))
        usual = len(SHARES) - 1 if name == "home" else 0
        gains = values - values[usual]
        doubts = [_error(line, predicted.folds if name == "away" else None) for line in gains]
        worth = gains.mean(1) - DOUBT * np.array(doubts)
        shares.append(SHARES[int(worth.argmax()) if worth.max() > 0 else usual])
        difficulty.append(max(shares[-1], difficulty_share(predicted)))
        facts[name] = {
            "share": shares[-1],
            "difficulty": round(difficulty[-1], 3),
            "gains": [round(float(gain), 4) for gain in gains.mean(1)],
            "worth": round(float(worth.max()), 4),
        }
    factor = cost_factor(away.asked(), shares[0])
    facts["cost_factor"] = round(factor, 3)
    widening = widening.clamp_max(math.log(MAX_FACTOR))
    parts = torch.tensor(shares), torch.tensor(difficulty), torch.tensor(factor)
    return Trust(limits, similarity, *parts, widening), facts


def difficulty_share(predicted: Predicted) -> float:
    """The share of what the heads say of all columns alike that predicts outcomes best, 0 to 1.

    By least squares; said of all columns is the mean over columns of what the heads say beyond static means.
    """
    common = (predicted.accuracy - predicted.static_accuracy).mean(1)
    known = predicted.known
    counts = known.sum(1)
    real = np.where(known, predicted.correct - predicted.static_accuracy, 0.0).sum(1)
    weight = float((counts * common**2).sum())
    return float(np.clip((common * real).sum() / weight, 0.0, 1.0)) if weight > 0 else 0.0


def _error(gains: Array, folds: Array | None) -> float:
    """Standard error of the mean of gains [Q]; with folds [Q] that of a mean over whole folds."""
    if folds is None:
        return float(gains.std() / max(1, len(gains)) ** 0.5)
    parts = [gains[folds == fold] - gains.mean() for fold in np.unique(folds)]
    few = len(parts) / max(1, len(parts) - 1)  # the mean was taken from the same folds
    return float(np.sqrt(few * sum(part.sum() ** 2 for part in parts)) / max(1, len(gains)))


def cost_factor(away: Predicted, share: float) -> float:
    """Real over expected dollars of choices for questions of unknown kinds, mean over budgets; 1 or more.

    Choices look cheap in part because their costs are underestimated, and the more so the less is known.
    """
    if not len(away.correct):
        return 1.0
    accuracy, dollars = away.mixed(share)
    chosen = choices_by_weight(accuracy, dollars)
    rows = np.arange(len(dollars))
    expected = np.array([dollars[rows, line].mean() for line in chosen]) + NO_MONEY
    real = np.array([away.cost[rows, line].mean() for line in chosen]) + NO_MONEY
    prior = PRIOR_QUESTIONS / len(rows)
    ratios = []
    for budget in budgets_of(away.correct, away.cost):
        nearest = int(np.abs(np.log(expected / budget)).argmin())
        ratios.append((real[nearest] + prior * expected[nearest]) / ((1 + prior) * expected[nearest]))
    return float(np.clip(np.mean(ratios), 1.0, MAX_FACTOR))


def budgets_of(correct: Array, cost: Array) -> Array:
    """Mean dollars a question from just above the cheapest column to the most accurate one.

    Where columns are free, from a hundredth of the latter.
    """
    with warnings.catch_warnings():  # columns without a known outcome
        warnings.simplefilter("ignore", RuntimeWarning)
        dollars, accuracy = np.nanmean(cost, 0), np.nanmean(correct, 0)
    low, high = 1.3 * np.nanmin(dollars), max(dollars[np.nanargmax(accuracy)], NO_MONEY)
    low = max(low, high / 100) if low < NO_MONEY else low
    return np.geomspace(min(low, high), max(low, high), BUDGETS)


def choices_by_weight(accuracy: Array, dollars: Array) -> Array:
    """The column of each question at `WEIGHTS` cost weights, dearest choices first [W, Q]."""
    spread = np.maximum(dollars.max(1).mean() - dollars.min(1).mean(), NO_MONEY)
    return np.stack(
        [(accuracy - weight * dollars).argmax(1) for weight in np.geomspace(1e-3, 1e3, WEIGHTS) / spread]
    )


def accuracy_at(chosen: Array, correct: Array, cost: Array, budgets: Array) -> Array:
    """Mean accuracy over budgets at which the choices really cost the budget, by question [Q].

    Between two cost weights a budget is met by a mixture; where all choices cost more, the cheapest counts,
    and where all cost less, the dearest.
    """
    rows = np.arange(len(correct))
    right, spent = (np.stack([each[rows, line] for line in chosen]) for each in (correct, cost))
    means = spent.mean(1)
    total = np.zeros(len(correct))
    for budget in budgets:
        within = np.flatnonzero(means <= budget)
        first = int(within[0]) if len(within) else len(means) - 1
        share = 0.0
        if first > 0 and means[first - 1] > budget >= means[first]:
            share = (budget - means[first]) / (means[first - 1] - means[first])
        total += (1 - share) * right[first] + share * right[max(0, first - 1)]
    return total / len(budgets)


def values_of(predicted: Predicted, budgets: Array) -> Array:
    """Accuracy at equal real cost by share, for each question [len(SHARES), Q]."""
    return np.stack(
        [
            accuracy_at(
                choices_by_weight(*predicted.mixed(share)), predicted.correct, predicted.cost, budgets
            )
            for share in SHARES
        ]
    )


def limits_of(closeness: Tensor) -> Tensor:
    """Closeness at which trust is 0 and 1, from that of questions of known kinds [Q]."""
    return torch.quantile(closeness, torch.tensor(HOME_QUANTILES))
