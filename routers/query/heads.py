"""Heads: from a question's embedding to the chance that each column (a pair or a plan) answers it rightly.

Three of them, as unlike as possible: logistic regression, nearest neighbours, and RTR's dual representation (arXiv
2505.19435, section 3.2). Their log-odds are averaged with weights, and each column is calibrated, both on questions
that the heads had not seen (`CalibratedMixture`). Knows nothing of money, plans or files; unknown outcomes are NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

NEIGHBOURS = 60
SHARPNESS = 10.0  # neighbours weigh exp(SHARPNESS * cosine)
MANY = 16  # questions from which sums over neighbours are one matrix product
PRIOR = 2.0  # neighbours that a column's mean is worth
RIDGE = 2.0
SCALE = 10.0  # of squared embeddings in the logistic regression, whose ridge is then about the same for any encoder
WIDTH, RANK = 128, 64
BATCH = 128
QUANTILES = (0.5, 0.9)
Array = np.ndarray[Any, Any]


def log_odds(chances: Tensor) -> Tensor:
    return torch.logit(chances.clamp(1e-3, 1 - 1e-3))


def mean_known(values: Tensor) -> Tensor:
    """The mean of each column [M] over its known rows; the mean of all where it has none."""
    return values.nanmean(0).nan_to_num(float(values.nanmean()))


class LogisticHead:
    """One ridge logistic regression a column, fitted together. weights [D + 1, M]."""

    def __init__(self, weights: Tensor) -> None:
        self.weights = weights

    @classmethod
    def fit(cls, embeddings: Tensor, right: Tensor, ridge: float = RIDGE) -> LogisticHead:
        x, known = _with_one(embeddings), ~right.isnan()
        target, count = right.nan_to_num(0.0), known.sum(0).clamp_min(1)
        weights = torch.zeros(x.shape[1], right.shape[1])
        weights[-1] = log_odds(mean_known(right))
        weights.requires_grad_()
        optimiser = torch.optim.LBFGS([weights], max_iter=60, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimiser.zero_grad()
            each = F.binary_cross_entropy_with_logits(x @ weights, target, reduction="none") * known
            value = (each.sum(0) / count).sum() + 0.5 * ridge * (weights[:-1].square().sum(0) / count).sum()
            value.backward()  # type: ignore[no-untyped-call]
            return value

        optimiser.step(loss)  # type: ignore[no-untyped-call]
        return cls(weights.detach())

    def __call__(self, embeddings: Tensor) -> Tensor:
        """Log-odds [N, M]."""
        return _with_one(embeddings) @ self.weights


class NeighboursHead:
    """The weighted mean over the nearest known questions. embeddings [Q, D] of length 1; values [Q, M], NaN unknown."""

    def __init__(self, embeddings: Tensor, values: Tensor) -> None:
        self.embeddings, self.values = embeddings, values
        self.means = mean_known(values)
        unknown = values.isnan()
        self._known = (~unknown).float() if bool(unknown.any()) else None
        self._zeroed = values.nan_to_num(0.0) if self._known is not None else values

    def nearest(self, embeddings: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Cosines and numbers [N, count] of the nearest questions."""
        found = (embeddings @ self.embeddings.T).topk(min(count, len(self.embeddings)))
        return found.values, found.indices

    def mean(self, cosines: Tensor, numbers: Tensor, prior: float = PRIOR) -> Tensor:
        """Their mean values [N, M], a column's own mean being worth `prior` neighbours."""
        weights = torch.exp(SHARPNESS * (cosines - cosines[:, :1]))
        weights = weights / weights.sum(1, keepdim=True) * cosines.shape[1]
        total = self._sum(weights, numbers, self.values if self._known is None else self._zeroed)
        if self._known is None:
            return (total + prior * self.means) / (cosines.shape[1] + prior)
        return (total + prior * self.means) / (self._sum(weights, numbers, self._known) + prior)

    def _sum(self, weights: Tensor, numbers: Tensor, values: Tensor) -> Tensor:
        """Weighted sums [N, M] of rows of values; of many at once by one product with a matrix that is mostly zero."""
        if len(numbers) < MANY:
            return torch.einsum("nk,nkm->nm", weights, values[numbers])
        return torch.zeros(len(numbers), len(values)).scatter_(1, numbers, weights) @ values

    def __call__(self, embeddings: Tensor) -> Tensor:
        """Log-odds [N, M]."""
        return log_odds(self.mean(*self.nearest(embeddings, NEIGHBOURS)))


@dataclass(frozen=True)
class Columns:
    """What the columns are. models, strategies: embeddings of their descriptions [A, D], [B, D]; of_pair: numbers of
    model and strategy of each pair [P, 2]; members: shares of each pair in a column [M, P], the first P being pairs."""

    models: Tensor
    strategies: Tensor
    of_pair: Tensor
    members: Tensor


class DualHead(nn.Module):
    """RTR's dual representation: a description's embedding, projected, plus a learned one, for models and strategies.

    A pair is the sum of its two, a plan the mean of its pairs plus one of its own. Accuracy is the product of the
    column's vector with one MLP of the question (`width` numbers), log tokens (`QUANTILES`, pairs alone) with another. Unlike the
    paper's, whose MLP reads question and column together, it answers for all columns at once.
    """

    def __init__(self, columns: Columns, right: Tensor, log_tokens: Tensor, width: int) -> None:
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
        self.bias = nn.Parameter(log_odds(mean_known(right)))
        middle = mean_known(log_tokens)
        spread = torch.tensor([0.0, 0.5])
        self.tokens = nn.Parameter(middle[:, None] + spread)
        self.scale = nn.Parameter(torch.zeros(2))
        self._vectors: tuple[Tensor, Tensor] | None = None

    def pairs(self) -> Tensor:
        """A vector for every pair [P, RANK]."""
        columns = self.columns
        models = self.of_model(3 * columns.models) + self.model
        strategies = self.of_strategy(3 * columns.strategies) + self.strategy
        out: Tensor = models[columns.of_pair[:, 0]] + strategies[columns.of_pair[:, 1]]
        return out

    def forward(self, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        """embeddings [N, D] -> log-odds [N, M] and quantiles of log tokens [N, P, 2]."""
        if self._vectors is not None:
            pairs, vectors = self._vectors
        else:
            pairs = self.pairs()
            vectors = self.columns.members @ pairs + self.own
        right = self.question(3 * embeddings) @ vectors.T / RANK**0.5 + self.bias
        length = self.length(3 * embeddings) @ pairs.T / RANK**0.5
        return right, self.tokens + length[..., None] * torch.exp(self.scale)

    @torch.no_grad()
    def predict(self, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        self.train(False)
        right, tokens = self(embeddings)
        return right, tokens

    @torch.no_grad()
    def freeze(self) -> DualHead:
        """Learn no more: the vectors of the columns are computed once."""
        self.eval().requires_grad_(False)
        pairs = self.pairs()
        self._vectors = pairs, self.columns.members @ pairs + self.own
        return self


@dataclass(frozen=True)
class TrainingData:
    """What a head learns from. embeddings [Q, D]; right and cost [Q, M]; log_tokens [Q, P]; cut [Q, P]; weights:
    what a dollar may be worth in accuracy."""

    embeddings: Tensor
    right: Tensor
    cost: Tensor
    log_tokens: Tensor
    cut: Tensor
    weights: tuple[float, ...]

    def select(self, rows: Tensor) -> TrainingData:
        names = ("embeddings", "right", "cost", "log_tokens", "cut")
        return replace(self, **{name: getattr(self, name)[rows] for name in names})


def pinball(found: Tensor, log_tokens: Tensor, cut: Tensor) -> Tensor:
    """Quantile loss of log tokens; of an answer that was cut only that it is at least so long is known.

    found [N, P, 2]; log_tokens [N, P], NaN unknown. Koenker and Bassett 1978; censored as in Powell 1986.
    """
    levels = torch.tensor(QUANTILES)
    short = log_tokens.nan_to_num(0.0)[..., None] - found
    loss = torch.maximum(levels * short, (levels - 1) * short)
    counted = ~log_tokens.isnan()[..., None] & ((short > 0) | ~cut[..., None])
    return (loss * counted).sum() / (~log_tokens.isnan()).sum().clamp_min(1)


def regret(log_odds_: Tensor, lesson: TrainingData, dice: torch.Generator) -> Tensor:
    """What choosing softly by these predictions gives up, at a worth of a dollar drawn for each question.

    The decision itself is trained, not only the label (2602.03478: routers collapse where predictions are close).
    """
    weights = torch.tensor(lesson.weights)
    worth = weights[torch.randint(len(weights), (len(log_odds_), 1), generator=dice)]
    gain = lesson.right - worth * lesson.cost
    utility = torch.sigmoid(log_odds_) - worth * lesson.cost
    known = ~gain.isnan()
    chosen = torch.softmax(
        (utility / 0.05).masked_fill(~known, float("-inf")).nan_to_num(nan=0.0, neginf=-1e9), 1
    )
    best = gain.masked_fill(~known, float("-inf")).max(1).values
    got = (chosen * gain.nan_to_num(0.0)).sum(1)
    return (best.nan_to_num(neginf=0.0) - got).clamp_max(5.0).mean()


def fit_dual_head(
    columns: Columns,
    lesson: TrainingData,
    *,
    epochs: int,
    seed: int,
    decision: float = 0.5,
    watch: TrainingData | None = None,
) -> tuple[DualHead, int]:
    """Train the dual head; with `watch` (other questions) stop where it does best there, at most after `epochs`.

    Returns it and the number of epochs it was trained for.
    """
    dice = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        dual = DualHead(columns, lesson.right, lesson.log_tokens, lesson.embeddings.shape[1])
        optimiser = torch.optim.AdamW(dual.parameters(), lr=2e-3, weight_decay=0.1)
        known = ~lesson.right.isnan()
        best, best_epoch, kept = float("inf"), epochs, None
        for epoch in range(epochs):
            dual.train()
            for rows in torch.split(torch.randperm(len(known)), BATCH):
                part = lesson.select(rows)
                right, tokens = dual(part.embeddings)
                each = F.binary_cross_entropy_with_logits(right, part.right.nan_to_num(0.0), reduction="none")
                loss = (each * known[rows]).sum() / known[rows].sum().clamp_min(1)
                loss = loss + 0.3 * pinball(tokens, part.log_tokens, part.cut)
                if decision:
                    loss = loss + decision * regret(right, part, dice)
                optimiser.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimiser.step()
            if watch is not None:
                value = log_loss(dual.predict(watch.embeddings)[0], watch.right)
                if value < best:
                    best, best_epoch = value, epoch + 1
                    kept = {name: each.clone() for name, each in dual.state_dict().items()}
                if epoch + 1 - best_epoch >= 5:
                    break
        if kept is not None:
            dual.load_state_dict(kept)
    return dual.freeze(), best_epoch


def log_loss(found: Tensor, right: Tensor) -> float:
    """Mean negative log-likelihood of the known outcomes, in nats."""
    known = ~right.isnan()
    return float(F.binary_cross_entropy_with_logits(found[known], right[known]))


@dataclass(frozen=True)
class CalibratedMixture:
    """Weights of the heads [H], and a line for each column's log-odds: slope [M] and offset [M]."""

    shares: Tensor
    slope: Tensor
    offset: Tensor

    def __call__(self, heads: Sequence[Tensor]) -> Tensor:
        """Log-odds of all heads, H times [N, M] -> chances [N, M]."""
        mixed = sum(share * each for share, each in zip(self.shares, heads, strict=True))
        return torch.sigmoid(mixed * self.slope + self.offset)

    @classmethod
    def fit(
        cls, heads: Sequence[Tensor], right: Tensor, *, calibrate: bool = True, ridge: float = 20.0
    ) -> CalibratedMixture:
        """On predictions for questions that the heads had not seen. ridge: questions that a slope of 1 and an offset of
        0 are worth."""
        known, target = ~right.isnan(), right.nan_to_num(0.0)
        stacked = torch.stack(list(heads))
        raw = torch.zeros(len(heads), requires_grad=True)
        slope, offset = (torch.zeros(right.shape[1], requires_grad=True) for _ in range(2))
        learned = [raw, slope, offset] if calibrate else [raw]
        optimiser = torch.optim.LBFGS(learned, max_iter=80, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimiser.zero_grad()
            mixed = torch.einsum("h,hnm->nm", raw.softmax(0), stacked) * slope.exp() + offset
            each = F.binary_cross_entropy_with_logits(mixed, target, reduction="none") * known
            value = (each.sum() + 0.5 * ridge * (slope.square().sum() + offset.square().sum())) / known.sum()
            value.backward()  # type: ignore[no-untyped-call]
            return value

        optimiser.step(loss)  # type: ignore[no-untyped-call]
        return cls(raw.detach().softmax(0), slope.detach().exp(), offset.detach())


def _with_one(embeddings: Tensor) -> Tensor:
    return F.pad(embeddings * SCALE**0.5, (0, 1), value=1.0)
