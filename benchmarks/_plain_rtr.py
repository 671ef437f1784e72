"""Route-To-Reason as the paper has it (arXiv 2505.19435), to see what the additions are worth.

Dual representation: a model and a strategy are each the embedding of a description plus a learned one of equal size;
question, model and strategy are joined and read by one hidden layer of 768 (ReLU). Accuracy: two logits, cross-entropy.
Tokens: softplus, squared error on raw tokens. Adam 1e-3, batches of 32 questions with all their pairs, at most 100
epochs, patience 5, here on validation questions that share no near-duplicate with the others (the paper stops on test
data). The heads are trained one after the other, each with its own learned embeddings, since the squared error would
drown the cross-entropy. The choice is by accuracy - lambda * tokens; lambda is set on the validation questions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from _baselines import Curve, Predict, Split, curve, operating_points
from torch import Tensor, nn
from torch.nn import functional as F

from viaticum.routers.query.outcome_matrix import Array

WIDTH, BATCH, EPOCHS, PATIENCE = 768, 32, 100, 5
LAMBDAS = np.geomspace(1e-7, 1.0, 120)  # accuracy a token
DOLLARS = np.geomspace(0.1, 1e5, 120)  # accuracy a dollar, for the variant that knows prices


@dataclass(frozen=True)
class Told:
    """Embeddings of descriptions [A, D], [B, D], and numbers of the model and strategy of each pair [P, 2]."""

    models: Tensor
    strategies: Tensor
    of_pair: Tensor


class Head(nn.Module):
    """One hidden layer over question, model and strategy. Its first product is taken apart by input, which changes no
    result and saves most of the work, since there are few pairs."""

    def __init__(self, told: Told, outputs: int) -> None:
        super().__init__()
        size = told.models.shape[1]
        self.told = told
        self.model = nn.Parameter(0.02 * torch.randn_like(told.models))
        self.strategy = nn.Parameter(0.02 * torch.randn_like(told.strategies))
        self.first, self.last = nn.Linear(3 * size, WIDTH), nn.Linear(WIDTH, outputs)

    def pairs(self) -> Tensor:
        """What the first layer makes of every pair [P, WIDTH]."""
        told = self.told
        _, of_model, of_strategy = self.first.weight.chunk(3, 1)
        models = (told.models + self.model) @ of_model.T
        strategies = (told.strategies + self.strategy) @ of_strategy.T
        return models[told.of_pair[:, 0]] + strategies[told.of_pair[:, 1]] + self.first.bias

    def forward(self, questions: Tensor) -> Tensor:
        """Every pair for every question: [N, D] -> [N, P, outputs]."""
        read = questions @ self.first.weight.chunk(3, 1)[0].T
        out: Tensor = self.last(torch.relu(read[:, None] + self.pairs()))
        return out

    @torch.no_grad()
    def table(self, questions: Tensor) -> Tensor:
        return torch.cat([self(part) for part in torch.split(questions, 256)])


Loss = Callable[[Tensor, Tensor], Tensor]


def right_loss(found: Tensor, right: Tensor) -> Tensor:
    return F.cross_entropy(found.reshape(-1, 2), right.reshape(-1).long())


def token_loss(found: Tensor, tokens: Tensor) -> Tensor:
    return F.mse_loss(F.softplus(found[..., 0]), tokens)


def train_head(
    head: Head,
    loss: Loss,
    x: Tensor,
    target: Tensor,
    watch: tuple[Tensor, Tensor],
    report: Callable[[int], None],
) -> int:
    """Train until `watch` (questions, targets) has not got better for `PATIENCE` epochs; returns the epochs."""
    optimiser = torch.optim.Adam(head.parameters(), lr=1e-3, fused=True)
    best, best_epoch, kept = float("inf"), 0, {}
    for epoch in range(EPOCHS):
        for rows in torch.split(torch.randperm(len(x)), BATCH):
            optimiser.zero_grad()
            loss(head(x[rows]), target[rows]).backward()  # type: ignore[no-untyped-call]
            optimiser.step()
        value = float(loss(head.table(watch[0]), watch[1]))
        report(epoch + 1)
        if value < best:
            best, best_epoch = value, epoch + 1
            kept = {name: each.clone() for name, each in head.state_dict().items()}
        if epoch + 1 - best_epoch >= PATIENCE:
            break
    head.load_state_dict(kept)
    return best_epoch


def plain_rtr(
    split: Split, told: Told, price: Array, report: Callable[[str], None]
) -> tuple[Curve, Curve, dict[str, int]]:
    """Its curve by tokens, the curve of the same heads where tokens are priced (price: dollars a token of each pair
    [P]), and the epochs."""
    torch.manual_seed(split.seed)
    inner, train = split.inner, split.train
    x, watched = torch.from_numpy(split.x[~inner]), torch.from_numpy(split.x[inner])
    accuracy, tokens = Head(told, 2), Head(told, 1)
    epochs = {}
    for name, head, loss, target in (
        ("accuracy", accuracy, right_loss, train.correct),
        ("tokens", tokens, token_loss, train.tokens),
    ):
        known = torch.from_numpy(target).float()
        epochs[name] = train_head(
            head,
            loss,
            x,
            known[~inner],
            (watched, known[inner]),
            lambda epoch, name=name: report(f"plain RTR, {name}, epoch {epoch}"),  # type: ignore[misc]
        )

    def by_tokens(asked: Array) -> tuple[Array, Array]:
        questions = torch.from_numpy(asked)
        return (
            accuracy.table(questions).softmax(-1)[..., 1].numpy(),
            F.softplus(tokens.table(questions)[..., 0]).numpy(),
        )

    def by_price(asked: Array) -> tuple[Array, Array]:
        chances, length = by_tokens(asked)
        return chances, length * price

    def chosen(predict: Predict, worths: Array) -> Curve:
        points = operating_points(*predict(split.x[inner]), train.select(inner), worths.tolist())
        return curve(predict, split, points, worths.tolist())

    return chosen(by_tokens, LAMBDAS), chosen(by_price, DOLLARS), epochs
