"""Heads: from the embedding of a question to the probability that a column (pair or plan) is correct.

Three heads of different kinds: logistic regression, nearest neighbours, and the dual representation of RTR
(arXiv 2505.19435, section 3.2). `CalibratedMixture` averages their log-odds with learned weights and
calibrates each column; both are fitted on out-of-fold predictions. Costs, plans and files are handled
elsewhere. Unknown outcomes are NaN.

Shapes: N questions asked, Q questions of the training data, D embedding size, P pairs, M columns, H heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

NEIGHBOURS = 60
SIMILARITY_SCALE = 10.0  # a neighbour has the weight exp(SIMILARITY_SCALE * cosine)
DENSE_FROM = 16  # questions from which sums over neighbours are one matrix product
MARGIN = 64  # known questions beyond the nearest ones that are looked at exactly
EQUAL = 2**32  # parts of 1: cosines in the same one are equal
CHUNK = 2**24  # numbers of a matrix of asked and known questions that are in memory at a time
PRIOR_NEIGHBOURS = 2.0  # weight of a column's mean, in neighbours
RIDGE = 2.0
FEATURE_SCALE = 10.0  # factor of squared embeddings, so that the same ridge fits any encoder of unit length
WIDTH, RANK = 128, 64
BATCH = 128
PATIENCE = 5  # epochs without improvement before training stops
QUANTILES = (0.5, 0.9)
# Of lowered mean probabilities: the least, the most that an offset is lowered by, and halvings of it.
LEAST_MEAN, MOST_LOWERED, BISECTIONS = 0.005, 30.0, 40
Array = np.ndarray[Any, Any]


def log_odds(probabilities: Tensor) -> Tensor:
    return torch.logit(probabilities.clamp(1e-3, 1 - 1e-3))


def log_loss(logits: Tensor, correct: Tensor) -> float:
    """Mean negative log-likelihood of the known outcomes, in nats."""
    known = ~correct.isnan()
    return float(F.binary_cross_entropy_with_logits(logits[known], correct[known]))


def mean_known(values: Tensor) -> Tensor:
    """The mean of each column [M] over its known rows; the overall mean where a column has none, else 0."""
    overall = values.nanmean().nan_to_num(0.0)
    return values.nanmean(0).nan_to_num(float(overall))


class LogisticHead:
    """One ridge logistic regression per column, all fitted in one optimisation.

    With many columns that is faster than one `sklearn.linear_model.LogisticRegression` per column, at equal
    log loss.

    Args:
        weights: [D + 1, M], the intercepts last.
    """

    def __init__(self, weights: Tensor) -> None:
        self.weights = weights

    @classmethod
    def fit(cls, embeddings: Tensor, correct: Tensor, ridge: float = RIDGE) -> LogisticHead:
        features, known = _with_intercept(embeddings), ~correct.isnan()
        target, count = correct.nan_to_num(0.0), known.sum(0).clamp_min(1)
        weights = torch.zeros(features.shape[1], correct.shape[1])
        weights[-1] = log_odds(mean_known(correct))
        weights.requires_grad_()
        optimiser = torch.optim.LBFGS([weights], max_iter=60, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimiser.zero_grad()
            each = F.binary_cross_entropy_with_logits(features @ weights, target, reduction="none") * known
            loss = (each.sum(0) / count).sum() + 0.5 * ridge * (weights[:-1].square().sum(0) / count).sum()
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        optimiser.step(closure)  # type: ignore[no-untyped-call]
        return cls(weights.detach())

    def __call__(self, embeddings: Tensor) -> Tensor:
        """Log-odds [N, M]."""
        return _with_intercept(embeddings) @ self.weights


class NeighboursHead:
    """Weighted mean over the nearest known questions.

    For one question it takes a third of the time of `sklearn.neighbors.NearestNeighbors`.

    Args:
        embeddings: unit length [Q, D].
        values: outcomes of the known questions [Q, M]; NaN where unknown.
    """

    def __init__(self, embeddings: Tensor, values: Tensor) -> None:
        self.embeddings, self.values = embeddings, values
        self.means = mean_known(values)
        unknown = values.isnan()
        self._known = (~unknown).float() if bool(unknown.any()) else None
        self._zero_filled = values.nan_to_num(0.0) if self._known is not None else values

    def nearest(self, embeddings: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Cosines and row indices of the nearest known questions, each [N, count].

        Of questions that are equally near, such as those of one text, the first come first: which they are
        must not follow from rounding, and so from the questions that are asked at the same time.
        """
        count, size = min(count, len(self.embeddings)), len(self.embeddings)
        if len(embeddings) < DENSE_FROM and 16 * (count + MARGIN) < size:  # of fewer all is as quick
            rough, among = (embeddings @ self.embeddings.T).topk(count + MARGIN)
            exact = torch.einsum("nd,nkd->nk", embeddings.double(), self.embeddings[among].double())
            found = self._first(exact, among, count)
            rounding = torch.finfo(rough.dtype).eps * embeddings.shape[1] * (1 + embeddings.norm(dim=1))
            if bool((found[0][:, -1] > rough[:, -1] + rounding).all()):  # the others are all less near
                return found
        every, chunks = torch.arange(size), self._chunks(embeddings)
        parts = [self._first(part.double() @ self._exact.T, every, count) for part in chunks]
        return torch.cat([each[0] for each in parts]), torch.cat([each[1] for each in parts])

    def _first(self, cosines: Tensor, indices: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The highest cosines (given in double precision) and their row indices [N, count]."""
        chosen = ((cosines * EQUAL).round().long() * len(self.embeddings) - indices).topk(count).indices
        return cosines.gather(1, chosen).to(self.embeddings.dtype), indices.expand_as(cosines).gather(
            1, chosen
        )

    @cached_property
    def _exact(self) -> Tensor:
        """In double precision, in which equal texts are equally near to every other."""
        return self.embeddings.double()

    def _chunks(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Rows of asked questions, so few at a time that their matrices with all known ones stay small."""
        return torch.split(rows, max(1, CHUNK // max(1, len(self.embeddings))))

    def mean(self, cosines: Tensor, indices: Tensor, prior: float = PRIOR_NEIGHBOURS) -> Tensor:
        """Weighted means of the neighbours' values [N, M]; the column mean counts as `prior` neighbours."""
        weights = torch.exp(SIMILARITY_SCALE * (cosines - cosines[:, :1]))
        weights = weights / weights.sum(1, keepdim=True) * cosines.shape[1]
        total = self._weighted_sum(weights, indices, self._zero_filled)
        if self._known is None:
            return (total + prior * self.means) / (cosines.shape[1] + prior)
        return (total + prior * self.means) / (self._weighted_sum(weights, indices, self._known) + prior)

    def _weighted_sum(self, weights: Tensor, indices: Tensor, values: Tensor) -> Tensor:
        """Weighted sums of rows of `values` [N, M]; for many questions as dense matrix products."""
        if len(indices) < DENSE_FROM:
            return torch.einsum("nk,nkm->nm", weights, values[indices])
        sums = [
            torch.zeros(len(of), len(values), dtype=weights.dtype).scatter_(1, of, by) @ values
            for of, by in zip(self._chunks(indices), self._chunks(weights), strict=True)
        ]
        return torch.cat(sums)

    def __call__(self, embeddings: Tensor) -> Tensor:
        """Log-odds [N, M]."""
        return log_odds(self.mean(*self.nearest(embeddings, NEIGHBOURS)))


@dataclass(frozen=True)
class Columns:
    """The columns of the router's predictions: first the P pairs, then the plans.

    Args:
        models, strategies: embeddings of their descriptions [A, D], [B, D].
        of_pair: indices of the model and the strategy of each pair [P, 2].
        members: share of each pair in a column [M, P].
    """

    models: Tensor
    strategies: Tensor
    of_pair: Tensor
    members: Tensor


class DualHead(nn.Module):
    """The dual representation of RTR: a projected description plus a learned embedding.

    Models and strategies have such vectors. The vector of a pair is the sum of its two, that of a plan the
    mean of its pairs plus an embedding of its own. The log-odds of a column are the product of its vector
    with an MLP of the question; log tokens (`QUANTILES`, pairs only) use a second MLP. In the paper an MLP
    reads question and column together; here one pass serves all columns.

    Args:
        columns: descriptions of models, strategies and plans.
        correct: outcomes [Q, M], from which the biases start.
        log_tokens: log output tokens [Q, P], from which the token quantiles start.
        width: size of a question's embedding, D.
    """

    def __init__(self, columns: Columns, correct: Tensor, log_tokens: Tensor, width: int) -> None:
        super().__init__()
        size, count = columns.models.shape[1], len(columns.members)
        self.columns = columns
        self.of_model, self.of_strategy = (nn.Linear(size, RANK, bias=False) for _ in range(2))
        self.model = nn.Parameter(0.1 * torch.randn(len(columns.models), RANK))
        self.strategy = nn.Parameter(0.1 * torch.randn(len(columns.strategies), RANK))
        self.own = nn.Parameter(torch.zeros(count, RANK))
        self.question = nn.Sequential(
            nn.Linear(width, WIDTH), nn.ReLU(), nn.Dropout(0.3), nn.Linear(WIDTH, RANK)
        )
        self.length = nn.Sequential(
            nn.Linear(width, WIDTH), nn.ReLU(), nn.Dropout(0.1), nn.Linear(WIDTH, RANK)
        )
        self.bias = nn.Parameter(log_odds(mean_known(correct)))
        self.tokens = nn.Parameter(mean_known(log_tokens)[:, None] + torch.tensor([0.0, 0.5]))
        self.scale = nn.Parameter(torch.zeros(2))
        self._vectors: tuple[Tensor, Tensor] | None = None

    def pairs(self) -> Tensor:
        """The vector of every pair [P, RANK]."""
        columns = self.columns
        models = self.of_model(3 * columns.models) + self.model
        strategies = self.of_strategy(3 * columns.strategies) + self.strategy
        vectors: Tensor = models[columns.of_pair[:, 0]] + strategies[columns.of_pair[:, 1]]
        return vectors

    def forward(self, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        """embeddings [N, D] -> log-odds [N, M] and quantiles of log tokens [N, P, 2]."""
        pairs, vectors = self._vectors if self._vectors is not None else self._column_vectors()
        logits = self.question(3 * embeddings) @ vectors.T / RANK**0.5 + self.bias
        length = self.length(3 * embeddings) @ pairs.T / RANK**0.5
        return logits, self.tokens + length[..., None] * torch.exp(self.scale)

    def _column_vectors(self) -> tuple[Tensor, Tensor]:
        """Vectors of the pairs [P, RANK] and of all columns [M, RANK]."""
        pairs = self.pairs()
        return pairs, self.columns.members @ pairs + self.own

    @torch.no_grad()
    def predict(self, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        """As `forward`, without dropout and gradients."""
        self.train(False)
        logits, log_tokens = self(embeddings)
        return logits, log_tokens

    @torch.no_grad()
    def freeze(self) -> DualHead:
        """End training and compute the vectors of the columns once."""
        self.eval().requires_grad_(False)
        self._vectors = self._column_vectors()
        return self


@dataclass(frozen=True)
class TrainingData:
    """Tensors that the heads are fitted on.

    Args:
        embeddings: [Q, D].
        correct: 0 or 1 [Q, M]; NaN where unknown.
        cost: dollars [Q, M].
        log_tokens: log output tokens [Q, P].
        truncated: answers cut at the token limit [Q, P].
        cost_weights: values of a dollar in units of accuracy that the decision loss draws from.
        lexical: counts of the texts, for a forest [Q, F].
    """

    embeddings: Tensor
    correct: Tensor
    cost: Tensor
    log_tokens: Tensor
    truncated: Tensor
    cost_weights: tuple[float, ...]
    lexical: Tensor | None = None

    def select(self, rows: Tensor) -> TrainingData:
        names = ("embeddings", "correct", "cost", "log_tokens", "truncated")
        chosen = {name: getattr(self, name)[rows] for name in names}
        return replace(self, **chosen, lexical=None if self.lexical is None else self.lexical[rows])


def pinball(predicted: Tensor, log_tokens: Tensor, truncated: Tensor) -> Tensor:
    """Quantile loss of log tokens (Koenker and Bassett 1978), censored as in Powell 1986.

    Args:
        predicted: quantiles [N, P, 2].
        log_tokens: [N, P], NaN where unknown.
        truncated: answers of which only a lower bound of the length is known [N, P].
    """
    levels = torch.tensor(QUANTILES)
    residual = log_tokens.nan_to_num(0.0)[..., None] - predicted
    loss = torch.maximum(levels * residual, (levels - 1) * residual)
    counted = ~log_tokens.isnan()[..., None] & ((residual > 0) | ~truncated[..., None])
    return (loss * counted).sum() / (~log_tokens.isnan()).sum().clamp_min(1)


def regret(logits: Tensor, data: TrainingData, rng: torch.Generator) -> Tensor:
    """Mean utility that a soft choice by these predictions loses, at a random cost weight per question.

    Training on the decision as well as on the labels counters routers that collapse where predictions are
    close (arXiv 2602.03478). logits: [N, M], of the questions of `data`.
    """
    weights = torch.tensor(data.cost_weights)
    weight = weights[torch.randint(len(weights), (len(logits), 1), generator=rng)]
    utility = data.correct - weight * data.cost
    predicted = torch.sigmoid(logits) - weight * data.cost
    known = ~utility.isnan()
    shares = torch.softmax(
        (predicted / 0.05).masked_fill(~known, float("-inf")).nan_to_num(nan=0.0, neginf=-1e9), 1
    )
    best = utility.masked_fill(~known, float("-inf")).max(1).values
    expected = (shares * utility.nan_to_num(0.0)).sum(1)
    return (best.nan_to_num(neginf=0.0) - expected).clamp_max(5.0).mean()


def fit_dual_head(
    columns: Columns,
    data: TrainingData,
    *,
    epochs: int,
    seed: int,
    decision: float = 0.5,
    validation: TrainingData | None = None,
) -> tuple[DualHead, int]:
    """Train the dual head and return it, frozen, with its number of epochs.

    Args:
        columns: descriptions of models, strategies and plans.
        data: training questions.
        epochs: epochs to train for; with `validation` the most.
        seed: seed of initialisation, batches and cost weights.
        decision: weight of the decision loss (`regret`).
        validation: other questions; the epoch with their lowest log loss is returned.
    """
    rng = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        head = DualHead(columns, data.correct, data.log_tokens, data.embeddings.shape[1])
        optimiser = torch.optim.AdamW(head.parameters(), lr=2e-3, weight_decay=0.1)
        best, best_epoch, best_state = float("inf"), epochs, None
        for epoch in range(epochs):
            _train_epoch(head, data, optimiser, decision, rng)
            if validation is None:
                continue
            loss = log_loss(head.predict(validation.embeddings)[0], validation.correct)
            if loss < best:
                best, best_epoch = loss, epoch + 1
                best_state = {name: each.clone() for name, each in head.state_dict().items()}
            if epoch + 1 - best_epoch >= PATIENCE:
                break
    if best_state is not None:
        head.load_state_dict(best_state)
    return head.freeze(), best_epoch


def _train_epoch(
    head: DualHead,
    data: TrainingData,
    optimiser: torch.optim.Optimizer,
    decision: float,
    rng: torch.Generator,
) -> None:
    """One pass over the questions in random batches."""
    head.train()
    for rows in torch.split(torch.randperm(len(data.correct)), BATCH):
        batch = data.select(rows)
        known = ~batch.correct.isnan()
        logits, log_tokens = head(batch.embeddings)
        each = F.binary_cross_entropy_with_logits(logits, batch.correct.nan_to_num(0.0), reduction="none")
        loss = (each * known).sum() / known.sum().clamp_min(1)
        loss = loss + 0.3 * pinball(log_tokens, batch.log_tokens, batch.truncated)
        if decision:
            loss = loss + decision * regret(logits, batch, rng)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()


@dataclass(frozen=True)
class CalibratedMixture:
    """Weighted mean of the heads' log-odds, then Platt scaling per column.

    Args:
        shares: weights of the heads [H], which sum to 1.
        slope, offset: of each column's log-odds [M].
    """

    shares: Tensor
    slope: Tensor
    offset: Tensor

    def __call__(self, heads: Sequence[Tensor]) -> Tensor:
        """Log-odds of each head, H times [N, M] -> probabilities [N, M]."""
        mixed = sum(share * each for share, each in zip(self.shares, heads, strict=True))
        return torch.sigmoid(mixed * self.slope + self.offset)

    def lowered(self, by: Tensor, heads: Sequence[Tensor]) -> CalibratedMixture:
        """The mixture with offsets at which the mean probability of a column is lower by so much; by: [M].

        heads: log-odds of each head for some questions, H times [Q, M].
        """
        mixed = sum(share * each for share, each in zip(self.shares, heads, strict=True))
        logits = mixed * self.slope + self.offset
        means = torch.sigmoid(logits).mean(0)
        wanted = torch.minimum((means - by).clamp_min(LEAST_MEAN), means)
        low, high = torch.zeros_like(means), torch.full_like(means, MOST_LOWERED)
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            is_above = torch.sigmoid(logits - middle).mean(0) > wanted
            low, high = torch.where(is_above, middle, low), torch.where(is_above, high, middle)
        return replace(self, offset=torch.where(by > 0, self.offset - high, self.offset))

    @classmethod
    def fit(
        cls, heads: Sequence[Tensor], correct: Tensor, *, calibrate: bool = True, ridge: float = 20.0
    ) -> CalibratedMixture:
        """Fit weights and calibration together on out-of-fold predictions.

        Columns with few outcomes stay near slope 1 and offset 0, which scikit-learn's calibration does not
        offer.

        Args:
            heads: log-odds of each head, H times [Q, M].
            correct: outcomes [Q, M].
            calibrate: without it slopes are 1 and offsets 0.
            ridge: strength of the prior of slope 1 and offset 0, in questions.
        """
        known, target = ~correct.isnan(), correct.nan_to_num(0.0)
        stacked = torch.stack(list(heads))
        raw = torch.zeros(len(heads), requires_grad=True)
        slope, offset = (torch.zeros(correct.shape[1], requires_grad=True) for _ in range(2))
        parameters = [raw, slope, offset] if calibrate else [raw]
        optimiser = torch.optim.LBFGS(parameters, max_iter=80, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimiser.zero_grad()
            mixed = torch.einsum("h,hnm->nm", raw.softmax(0), stacked) * slope.exp() + offset
            each = F.binary_cross_entropy_with_logits(mixed, target, reduction="none") * known
            penalty = 0.5 * ridge * (slope.square().sum() + offset.square().sum())
            loss = (each.sum() + penalty) / known.sum()
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        optimiser.step(closure)  # type: ignore[no-untyped-call]
        return cls(raw.detach().softmax(0), slope.detach().exp(), offset.detach())


def _with_intercept(embeddings: Tensor) -> Tensor:
    """Scaled embeddings with a column of ones [N, D + 1]."""
    return F.pad(embeddings * FEATURE_SCALE**0.5, (0, 1), value=1.0)
